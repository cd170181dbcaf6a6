"""Runtimes: onnxruntime or torch, on the CPU or a GPU, behind one interface.

A runtime reports the device that really computes, and never falls back to another device than the one demanded. Serving
on the CPU needs onnxruntime alone. torch belongs to the extra `gpu` and is imported only where it is used.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from broker_filter.config import Runtime
from broker_filter.errors import BrokerFilterError
from broker_filter.scoring.bundle import ONNX, WEIGHTS, BundleError, Part

if TYPE_CHECKING:
    from torch import nn

Tensors = Mapping[str, NDArray[np.float32]]
"""float32 arrays [N, ...] over the same N alerts, by the names of inputs and outputs in the ONNX graph."""

NVIDIA_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
"""At least one of these files exists if this process can reach an NVIDIA GPU; the last one is of WSL 2. The look-up
needs no torch, and saves machines without a GPU the two seconds of importing it."""
NO_CUDA_DEVICES = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU."""
INSTALL_TORCH = "pip install 'broker-filter[gpu]'"

log = logging.getLogger(__name__)


class RuntimeUnavailableError(BrokerFilterError):
    """The requested engine or device is not available on this machine."""


CHUNK = 16
"""Alerts per run on a CPU, for each thread that shares the run. The intermediate results of a larger run exceed the CPU
caches, which decoding uses as well (with braai's network a whole batch takes 4 % longer at 32)."""
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
"""Allowed deviation of outputs from the test vector, absolute plus relative, by the precision of the arithmetic: some
units in the last place of 24, 11 or 8 significant bits, accumulated over some layers. A deep network's card allows more
(`tolerances`)."""


class LoadedNetwork(Protocol):
    """A bundle's network, ready to run. Inputs and outputs are named as in `Inputs.shapes` and `Outputs.shapes`."""

    @property
    def provider(self) -> str:
        """The engine and device that really compute, as `engine/device`."""

    @property
    def tolerance(self) -> float:
        """Allowed deviation of outputs from the test vector; see TOLERANCES."""

    @property
    def chunk(self) -> int:
        """Largest number of alerts in one run."""

    def run(self, inputs: Tensors) -> Tensors:
        """Return the outputs for one batch of at most `chunk` alerts."""

    def run_all(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """Yield the outputs of each batch, in order; on a GPU one batch is prepared while others are computed."""


def open_network(bundle: Part, runtime: Runtime) -> LoadedNetwork:
    """Load the bundle's network on the engine and device that `runtime` selects.

    `engine: auto` is torch if a CUDA device is to be used, else onnxruntime.

    Raises RuntimeUnavailableError if the requested engine or device is not available, and BundleError if the bundle's
    files cannot be loaded.
    """
    if runtime.engine == "onnxruntime" and runtime.device == "cuda":
        raise RuntimeUnavailableError("engine onnxruntime does not use CUDA: choose engine torch or device cpu")
    if (runtime.engine == "torch" or runtime.device == "cuda") and not torch_is_installed():
        raise RuntimeUnavailableError(
            f"engine {runtime.engine} on device {runtime.device} needs PyTorch, which is not installed: {INSTALL_TORCH}"
        )
    use_cuda = runtime.device == "cuda" or (
        runtime.device == "auto" and runtime.engine != "onnxruntime" and _cuda_is_usable()
    )
    if runtime.precision != "float32" and not use_cuda:
        raise RuntimeUnavailableError(
            f"precision {runtime.precision} needs engine torch on a CUDA device, and no CUDA device is used"
        )
    threads = runtime.inference_threads or available_cores()
    if runtime.engine == "torch" or use_cuda:
        return _open_torch(bundle, runtime, threads)
    return OnnxNetwork(bundle, threads)


class OnnxNetwork:
    """`model.onnx` in onnxruntime, on the CPU.

    Each run uses one thread, and several runs are computed at the same time: threads that share a run wait for each
    other in each layer.
    """

    tolerance = TOLERANCES["float32"]
    chunk = CHUNK

    def __init__(self, bundle: Part, threads: int) -> None:
        """`threads`: the largest number of runs at the same time."""
        path = bundle.directory / ONNX
        self._session = open_session(path)
        self.provider = f"onnxruntime/{self._session.get_providers()[0]}"
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="network")
        self._outputs = tuple(bundle.card.outputs.shapes())
        _check_graph(path, self._session, bundle)

    def run(self, inputs: Tensors) -> Tensors:
        """Return the outputs for one batch of at most `chunk` alerts."""
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def run_all(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """Yield the outputs of each batch, in order. The next batch is prepared while earlier ones are computed."""
        batches = iter(batches)
        first = list(islice(batches, 2))
        if self._threads == 1 or len(first) == 1:  # save the change of threads
            yield from map(self.run, chain(first, batches))
            return
        running: deque[Future[Tensors]] = deque()
        for batch in chain(first, batches):
            running.append(self._pool.submit(self.run, batch))
            if len(running) > self._threads:  # one waits for a thread
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def open_session(path: Path) -> Any:
    """Return an onnxruntime session that computes on the CPU in the calling thread. Thread-safe.

    Raises BundleError if the file is no graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: its warnings are about optimisations
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types of exceptions
        raise BundleError(f"{path}: onnxruntime cannot load it: {error}") from error


class TorchNetwork:
    """`weights.safetensors` in the architecture of the card, in torch on the CPU: the float32 reference."""

    provider = "torch/cpu"
    tolerance = TOLERANCES["float32"]

    def __init__(self, served: nn.Module, bundle: Part, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.chunk = threads * CHUNK
        self._torch = torch
        self._served = served
        self._inputs = tuple(bundle.card.inputs.shapes())
        self._outputs = tuple(bundle.card.outputs.shapes())

    def run(self, inputs: Tensors) -> Tensors:
        """Return the outputs for one batch of at most `chunk` alerts."""
        with self._torch.inference_mode():
            outputs = self._served(*(self._torch.from_numpy(inputs[name]) for name in self._inputs))
        return {name: output.numpy() for name, output in zip(self._outputs, outputs, strict=True)}

    def run_all(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """Yield the outputs of each batch, in order."""
        return map(self.run, batches)


def _open_torch(bundle: Part, runtime: Runtime, threads: int) -> LoadedNetwork:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from broker_filter.scoring.cuda_graphs import CudaGraphNetwork
    from broker_filter.scoring.networks import ServedNetwork, load_network

    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            "PyTorch sees no CUDA device: check the driver and the build of PyTorch, or choose device cpu"
        )
    path = bundle.directory / WEIGHTS
    try:
        network = load_network(bundle.card.architecture, load_file(path))
    except (SafetensorError, BundleError) as error:
        raise BundleError(f"{path}: {error}") from error
    served = ServedNetwork(network, bundle.card.outputs).eval()
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return TorchNetwork(served, bundle, threads)
    # TF32 keeps 10 bits of a product: scores would move in the third digit.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    card, device = bundle.card, torch.device("cuda:0")
    return CudaGraphNetwork(
        served,
        card.inputs.shapes(),
        tuple(card.outputs.shapes()),
        device,
        runtime.precision,
        TOLERANCES[runtime.precision],
    )


def available_cores() -> int:
    """Return the number of cores that this process may use.

    This is its CPU affinity, limited by the quota of its control group (v2, else v1), rounded up.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except FileNotFoundError:
        v1 = Path("/sys/fs/cgroup/cpu")
        try:
            quota, period = (v1 / "cpu.cfs_quota_us").read_text(), (v1 / "cpu.cfs_period_us").read_text()
        except FileNotFoundError:
            return cores
    if quota.strip() in {"max", "-1"}:
        return cores
    return max(1, min(cores, math.ceil(int(quota) / int(period))))


def torch_is_installed() -> bool:
    """Return whether torch can be imported. Does not import it."""
    return find_spec("torch") is not None


@cache
def _cuda_is_usable() -> bool:
    """Return whether torch can use a GPU here. If a GPU exists that it cannot use, logs a warning once per process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in NO_CUDA_DEVICES
    if hidden or not any(path.exists() for path in NVIDIA_DEVICES):
        return False
    keep_cpu = "or choose device cpu to stay on the CPU without this warning"
    if not torch_is_installed():
        log.warning(
            "the models run on the CPU although this machine has an NVIDIA GPU: PyTorch is not installed; %s, %s",
            INSTALL_TORCH,
            keep_cpu,
        )
        return False
    import torch

    if not torch.cuda.is_available():
        log.warning(
            "the models run on the CPU although this machine has an NVIDIA GPU: PyTorch %s sees no CUDA device; check "
            "the driver and the build of PyTorch, %s",
            torch.__version__,
            keep_cpu,
        )
        return False
    return True


def _check_graph(path: Path, session: Any, bundle: Part) -> None:
    """Raise BundleError if inputs and outputs of the ONNX graph are not those of the card."""
    expected = bundle.card.inputs.shapes() | bundle.card.outputs.shapes()
    nodes = (*session.get_inputs(), *session.get_outputs())
    found = {node.name: tuple(node.shape[1:]) for node in nodes}
    if found != expected:
        raise BundleError(
            f"{path}: its inputs and outputs are {found}, but the card requires {expected}; make the bundle again"
        )
    if fixed := [node.name for node in nodes if isinstance(node.shape[0], int)]:
        raise BundleError(
            f"{path}: accepts a single batch size only, because of {', '.join(fixed)}: in the network, take sizes from "
            "`shape`, "
            "not from `len`, and make the bundle again"
        )
