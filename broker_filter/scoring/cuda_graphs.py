"""A network on a GPU that is kept busy: while it computes one batch, the next batch is prepared and copied.

A ring of slots, each with pinned (page-locked) host memory, device memory, and the network captured as a CUDA graph for
a few fixed batch sizes. A smaller batch is padded, and the outputs of the padding are dropped. Importing this module
imports torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Precision = Literal["float32", "float16", "bfloat16"]

SIZES = (64, 256)
"""Batch sizes that are captured: a batch of the default size, and one that fills a GPU."""
SLOTS = 3
"""Number of slots: one is filled, one is computed, one is read."""
WARM_UP = 3
"""Runs before a capture, so that libraries choose their algorithms and allocate workspace (torch's notes on CUDA
graphs)."""


class CudaGraphNetwork:
    """A network in inference mode on `device`. Not thread-safe.

    On a CPU nothing is overlapped, pinned or captured; slots and sizes are used in the same order, so that tests need
    no GPU.
    """

    chunk = SIZES[-1]

    def __init__(
        self,
        network: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
        outputs: tuple[str, ...],
        device: torch.device,
        precision: Precision,
        tolerance: float,
    ) -> None:
        """Prepare `network` for a CUDA device.

        `network`: takes the inputs in the order of `shapes` and returns `outputs`. `shapes`: for each input, the shape
        of one alert's values. `tolerance`: see `runtimes.TOLERANCES`.
        """
        self.provider = f"torch/{device}"
        self.tolerance = tolerance
        self._network = network.eval().to(device)
        self._outputs = outputs
        self._device = device
        self._dtype: torch.dtype | None = None if precision == "float32" else getattr(torch, precision)
        on_gpu = device.type == "cuda"
        self._copying: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._computing: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._slots = [_Slot(self, shapes) for _ in range(SLOTS)]

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Return the outputs by name for one batch of at most `chunk` alerts."""
        (result,) = self.run_all([inputs])
        return result

    def run_all(
        self, batches: Iterable[Mapping[str, NDArray[np.float32]]]
    ) -> Iterator[Mapping[str, NDArray[np.float32]]]:
        """Yield the outputs of each batch, in order.

        The next batch is taken from `batches` while earlier batches are computed.
        """
        free, running = deque(self._slots), deque[_Slot]()
        for inputs in batches:
            if not free:
                free.append(running[0])
                yield running.popleft().collect()
            slot = free.popleft()
            slot.start(inputs)
            running.append(slot)
        while running:
            yield running.popleft().collect()

    def _compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        autocast = torch.autocast(self._device.type, self._dtype) if self._dtype else nullcontext()
        with torch.inference_mode(), autocast:
            outputs: tuple[Tensor, ...] = self._network(*inputs)
        return tuple(output.float() for output in outputs)


class _Slot:
    """Host and device memory of a batch in flight, and the CUDA graphs that work on that memory."""

    def __init__(self, owner: CudaGraphNetwork, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._owner = owner
        on_gpu = owner._device.type == "cuda"
        self._staged = {name: torch.zeros(SIZES[-1], *shape, pin_memory=on_gpu) for name, shape in shapes.items()}
        self._inputs = {name: torch.zeros_like(staged, device=owner._device) for name, staged in self._staged.items()}
        self._graphs: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}
        self._copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._done: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._results: list[Tensor] = []
        self._n = 0
        if on_gpu:
            for size in SIZES:
                self._capture(size)

    def _capture(self, size: int) -> None:
        inputs = [tensor[:size] for tensor in self._inputs.values()]
        computing = self._owner._computing
        computing.wait_stream(torch.cuda.current_stream(self._owner._device))
        with torch.cuda.stream(computing):
            for _ in range(WARM_UP):
                self._owner._compute(inputs)
        computing.synchronize()
        graph = torch.cuda.CUDAGraph()
        # A model is captured while others serve, and in the default mode an allocation in any thread ends a capture.
        with torch.cuda.graph(graph, stream=computing, capture_error_mode="thread_local"):
            outputs = self._owner._compute(inputs)
        self._graphs[size] = graph, outputs

    def start(self, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy a batch to the device and compute its outputs; on a GPU this returns before either has finished."""
        self._n = len(next(iter(inputs.values())))
        size = next(size for size in SIZES if size >= self._n)
        for name, staged in self._staged.items():
            staged[: self._n].numpy()[...] = inputs[name]
        copying, computing = self._owner._copying, self._owner._computing
        if computing is None:
            self._copy_inputs()
            self._results = list(self._owner._compute([tensor[:size] for tensor in self._inputs.values()]))
            return
        with torch.cuda.stream(copying):
            self._copy_inputs()
            self._copied.record(copying)
        with torch.cuda.stream(computing):
            computing.wait_event(self._copied)
            graph, outputs = self._graphs[size]
            graph.replay()
            self._results = [self._to_host(output[: self._n]) for output in outputs]
            self._done.record(computing)

    def collect(self) -> Mapping[str, NDArray[np.float32]]:
        """Wait for the outputs and return them by name."""
        if self._done is not None:
            self._done.synchronize()
        return {
            name: result[: self._n].numpy() for name, result in zip(self._owner._outputs, self._results, strict=True)
        }

    def _copy_inputs(self) -> None:
        for name, staged in self._staged.items():
            self._inputs[name][: self._n].copy_(staged[: self._n], non_blocking=True)

    def _to_host(self, output: Tensor) -> Tensor:
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        return host.copy_(output, non_blocking=True)
