"""Runtimes: the same scores on every runtime, and never another device than the requested one."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from broker_filter.config import Runtime
from broker_filter.scoring import runtimes
from broker_filter.scoring.bundle import WEIGHTS, KnownAnswers, open_bundle
from broker_filter.scoring.cuda_graphs import CudaGraphNetwork
from broker_filter.scoring.networks import ServedNetwork, load_network
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.runtimes import RuntimeUnavailableError, available_cores, open_network
from broker_filter.scoring.scorer import open_model

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def test_onnxruntime_and_torch_agree(test_vector: KnownAnswers) -> None:
    bundle = open_bundle("default").part("ztf")
    rng = np.random.default_rng(0)
    clean = test_vector.cutouts[:3]
    cutouts = clean[rng.integers(3, size=200)] * rng.uniform(-2, 2, (200, 3, 63, 63)).astype(np.float32)
    box = np.tile(np.array([0, 0, 63, 63], np.int16), (200, 3, 1))
    images = prepare_images(cutouts, box, bundle.card.inputs.images)
    outputs = [
        open_network(bundle, Runtime(engine=engine)).run({"images": images})["probabilities"]
        for engine in ("onnxruntime", "torch")
    ]
    assert outputs[0].std() > 0.01
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)


@needs_no_gpu
@pytest.mark.parametrize(
    ("runtime", "provider"),
    [
        (Runtime(), "onnxruntime/CPUExecutionProvider"),
        (Runtime(engine="onnxruntime"), "onnxruntime/CPUExecutionProvider"),
        (Runtime(engine="torch"), "torch/cpu"),
        (Runtime(engine="torch", device="cpu"), "torch/cpu"),
    ],
)
def test_runtime_reports_the_provider_that_really_runs(runtime: Runtime, provider: str) -> None:
    assert open_network(open_bundle("default").part("ztf"), runtime).provider == provider


@needs_no_gpu
@pytest.mark.parametrize("engine", ["auto", "onnxruntime", "torch"])
def test_a_gpu_that_is_demanded_and_not_there_is_an_error(engine: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="CUDA"):
        open_network(open_bundle("default").part("ztf"), Runtime.model_validate({"engine": engine, "device": "cuda"}))


@needs_gpu
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_requested_gpu_runs_and_agrees(engine: str, test_vector: KnownAnswers) -> None:
    bundle = open_bundle("default").part("ztf")
    network = open_network(bundle, Runtime.model_validate({"engine": engine, "device": "cuda"}))
    images = prepare_images(test_vector.cutouts, test_vector.cutout_box, bundle.card.inputs.images)
    assert network.provider == "torch/cuda:0"
    np.testing.assert_allclose(
        network.run({"images": images})["probabilities"], test_vector.outputs["probabilities"], rtol=0, atol=1e-5
    )


def test_threads_and_batches_of_onnxruntime_do_not_change_outputs() -> None:
    bundle = open_bundle("rubin").parts[0]
    rng = np.random.default_rng(5)
    shapes = bundle.card.inputs.shapes()
    inputs = {name: rng.normal(size=(100, *shape)).astype(np.float32) for name, shape in shapes.items()}

    def outputs(threads: int, size: int) -> np.ndarray:
        network = open_network(bundle, Runtime(engine="onnxruntime", inference_threads=threads))
        batches = ({name: each[k : k + size] for name, each in inputs.items()} for k in range(0, 100, size))
        results = [result["probabilities"] for result in network.run_all(batches)]
        assert [len(result) for result in results[:-1]] == [size] * (len(results) - 1)
        return np.concatenate(results)

    expected = outputs(threads=1, size=16)
    assert len(np.unique(expected[:, 0])) > 90
    for threads, size in ((1, 100), (2, 16), (2, 100), (3, 7), (8, 16)):
        np.testing.assert_array_equal(outputs(threads, size), expected)


def test_a_failed_run_raises_its_error_in_the_calling_thread() -> None:
    network = open_network(open_bundle("default").part("ztf"), Runtime(engine="onnxruntime", inference_threads=2))
    good, bad = (np.zeros((2, 3, size, size), np.float32) for size in (63, 5))
    with pytest.raises(Exception, match="images"):
        list(network.run_all({"images": each} for each in (good, bad, good, good)))
    assert [len(each["probabilities"]) for each in network.run_all([{"images": good}] * 3)] == [2] * 3
    assert list(network.run_all([])) == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=needs_gpu)])
def test_batches_in_flight_return_complete_and_in_order(device: str) -> None:
    bundle = open_bundle("default").part("ztf")
    network = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    served = ServedNetwork(network, bundle.card.outputs)
    staged = CudaGraphNetwork(
        served, {"images": (3, 63, 63)}, tuple(bundle.card.outputs.shapes()), torch.device(device), "float32", 1e-5
    )
    rng = np.random.default_rng(3)
    sizes = [1, staged.chunk, 64, 65, 7, 0, 100]  # more batches than slots, with every padding
    batches = [rng.normal(0, 0.05, (n, 3, 63, 63)).astype(np.float32) for n in sizes]
    reference = open_network(bundle, Runtime(engine="torch", device="cpu"))
    results = list(staged.run_all({"images": batch} for batch in batches))
    assert [len(result["probabilities"]) for result in results] == sizes
    for batch, result in zip(batches, results, strict=True):
        for name, expected in reference.run({"images": batch}).items():
            np.testing.assert_allclose(result[name], expected, rtol=0, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_stays_within_its_tolerance(precision: str) -> None:
    runtime = Runtime.model_validate({"engine": "torch", "device": "cuda", "precision": precision})
    assert open_model("default", runtime).provider == "torch/cuda:0"  # opening compares with the test vector


@needs_no_gpu
@pytest.mark.parametrize("engine", ["auto", "onnxruntime", "torch"])
def test_half_precision_without_a_gpu_is_an_error(engine: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="float16"):
        open_network(
            open_bundle("default").part("ztf"), Runtime.model_validate({"engine": engine, "precision": "float16"})
        )


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import system as it is where torch is not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def with_nvidia_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with the device file of an NVIDIA GPU."""
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(runtimes, "NVIDIA_DEVICES", (device,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runtimes._cuda_is_usable.cache_clear()
    yield
    runtimes._cuda_is_usable.cache_clear()


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(("engine", "device"), [("torch", "auto"), ("torch", "cpu"), ("auto", "cuda")])
def test_a_runtime_that_needs_torch_names_the_extra_that_installs_it(engine: str, device: str) -> None:
    said = rf"engine {engine} on device {device} needs PyTorch.*pip install 'broker-filter\[gpu\]'"
    with pytest.raises(RuntimeUnavailableError, match=said):
        open_network(open_bundle("default").part("ztf"), Runtime.model_validate({"engine": engine, "device": device}))


@pytest.mark.usefixtures("without_torch", "with_nvidia_device")
def test_a_gpu_without_torch_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for bundle in ("default", "embedder"):
        assert open_network(open_bundle(bundle).parts[0], Runtime()).provider == "onnxruntime/CPUExecutionProvider"
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "NVIDIA GPU: PyTorch is not installed; pip install 'broker-filter[gpu]'" in warning.getMessage()


@needs_no_gpu
@pytest.mark.usefixtures("with_nvidia_device")
def test_a_gpu_that_torch_cannot_use_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert open_network(open_bundle("default").part("ztf"), Runtime()).provider == "onnxruntime/CPUExecutionProvider"
    assert "sees no CUDA device" in caplog.text


@pytest.mark.usefixtures("without_torch", "with_nvidia_device")
@pytest.mark.parametrize(
    ("runtime", "visible"),
    [
        (Runtime(device="cpu"), None),
        (Runtime(engine="onnxruntime"), None),
        (Runtime(), ""),
        (Runtime(), "-1"),
    ],
)
def test_a_gpu_that_is_not_wanted_is_not_warned_of(
    runtime: Runtime, visible: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    open_network(open_bundle("default").part("ztf"), runtime)
    assert not caplog.records


def test_runtime_uses_the_configured_number_of_threads() -> None:
    open_network(open_bundle("default").part("ztf"), Runtime(engine="torch", device="cpu", inference_threads=1))
    assert torch.get_num_threads() == 1


def test_scoring_on_onnxruntime_does_not_import_torch() -> None:
    """Importing torch takes seconds, and a service on onnxruntime does not use it."""
    program = (
        "import sys\n"
        "from broker_filter.config import Runtime\n"
        "from broker_filter.scoring.scorer import open_scorer\n"
        "open_scorer(['default'], Runtime(device='cpu'))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_cores_are_those_of_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    files: dict[str, str] = {}

    def read_text(path: Path, *_: object) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_cores() == 16
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert available_cores() == 16
    files["/sys/fs/cgroup/cpu.max"] = "250000 100000\n"
    assert available_cores() == 3
    files["/sys/fs/cgroup/cpu.max"] = "50000 100000\n"
    assert available_cores() == 1
    files.clear()
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1\n"
    files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000\n"
    assert available_cores() == 16
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "400000\n"
    assert available_cores() == 4
