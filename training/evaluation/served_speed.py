"""Measures the speed and memory of a bundle as it is served: preprocessing and network, on onnxruntime.

Each batch size is measured in a separate process, because a process's peak memory never decreases. Pixel values do not
influence the speed, so the images are noise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from broker_filter.bench.measure import Spread, memory_megabytes, timed
from broker_filter.config import Runtime
from broker_filter.packets.batch import BANDS, CUTOUTS, PSF_SIZE, LightCurves, Measurement, Survey
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import Inputs
from broker_filter.scoring.scorer import open_model
from training.errors import EvaluationError

BATCHES = (1, 32, 128)
"""Batch sizes in alerts."""
REPETITIONS = 5
CHECKOUT = Path(__file__).parents[2]


class ServedSpeed(BaseModel):
    """Speed and memory at one batch size, including preprocessing; the median over the repetitions."""

    model_config = ConfigDict(frozen=True)

    batch: int
    alerts_per_second: float
    cpu_microseconds: float  # per alert, summed over all threads
    peak_megabytes: float  # resident memory of the whole process, including Python and onnxruntime
    provider: str
    threads: int


def measure_served(bundle: Path, batch: int, threads: int) -> ServedSpeed:
    """Measure the speed of a bundle as it is served, in a new process. Raises EvaluationError if that fails."""
    command = [sys.executable, "-m", __name__, str(bundle.resolve()), str(batch), str(threads)]
    child = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if child.returncode:
        reason = (child.stderr.strip() or f"status {child.returncode}").splitlines()[-1]
        raise EvaluationError(f"{bundle}: its speed cannot be measured at batch {batch}: {reason}")
    return ServedSpeed.model_validate_json(child.stdout)


def measure_here(bundle: str, batch: int, threads: int) -> ServedSpeed:
    """Measure in this process."""
    [network] = open_model(bundle, Runtime(engine="onnxruntime", device="cpu", inference_threads=threads)).parts
    alerts = noise(batch, network.inputs)
    runs = [timed(lambda: network.run(alerts), batch) for _ in range(1 + REPETITIONS)][1:]
    return ServedSpeed(
        batch=batch,
        alerts_per_second=Spread.of([run.alerts_per_second for run in runs]).median,
        cpu_microseconds=Spread.of([run.cpu_microseconds for run in runs]).median,
        peak_megabytes=memory_megabytes(os.getpid(), peak=True),
        provider=network.network.provider,
        threads=threads,
    )


def noise(n: int, inputs: Inputs) -> RawAlerts:
    """Return n alerts of noise, with all inputs that the network takes."""
    size, rng = inputs.images.size, np.random.default_rng(0)
    alerts = RawAlerts(
        cutouts=rng.normal(200, 12, (n, len(CUTOUTS), size, size)).astype(np.float32),
        cutout_box=np.tile(np.array([0, 0, size, size], np.int16), (n, len(CUTOUTS), 1)),
        metadata=rng.normal(size=(n, len(inputs.metadata))),
        columns=tuple(column.name for column in inputs.metadata),
    )
    if "variance" in inputs.planes:
        alerts = replace(alerts, variance=np.full_like(alerts.cutouts, 12**2))
    if "psf" in inputs.planes:
        psf = rng.uniform(size=(n, len(CUTOUTS), PSF_SIZE, PSF_SIZE)).astype(np.float32)
        alerts = replace(alerts, psf=psf, survey=np.full(n, Survey.LSST, np.uint8))
    if inputs.light_curve is None:
        return alerts
    each = inputs.light_curve.points
    light_curves = LightCurves(
        offsets=np.arange(n + 1) * each,
        mjd=np.tile(np.arange(each, dtype=np.float64), n),
        band=rng.integers(len(BANDS), size=n * each, dtype=np.uint8),
        flux=rng.normal(0, 1e4, n * each).astype(np.float32),
        flux_err=np.full(n * each, 1e3, np.float32),
        kind=rng.integers(len(Measurement), size=n * each, dtype=np.uint8),
    )
    return replace(alerts, mjd=np.full(n, float(each)), light_curves=light_curves)


if __name__ == "__main__":
    bundle, batch, threads = sys.argv[1:]
    print(measure_here(bundle, int(batch), int(threads)).model_dump_json())
