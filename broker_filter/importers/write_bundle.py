"""Writes a trained or imported network as a bundle. Needs the `train` extra; serving never imports this module.

The bundle's directory is written atomically, and never replaces an existing one.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as arrays_to_bytes
from safetensors.torch import save as weights_to_bytes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from broker_filter.config import Runtime
from broker_filter.packets.batch import CUTOUTS, PSF_SIZE, UNKNOWN_BAND, LightCurves, Measurement, Survey
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    MAX_TOLERANCE,
    ONNX,
    POINT_COLUMNS,
    POINTS,
    PROBABILITIES,
    TEST_VECTOR,
    WEIGHTS,
    BundleError,
    Card,
    Description,
    Inputs,
    Outputs,
    write_card,
)
from broker_filter.scoring.networks import ServedNetwork, for_onnx
from broker_filter.scoring.networks.stampnet import log_odds
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.scorer import open_model

ENGINES: tuple[Literal["onnxruntime", "torch"], ...] = ("onnxruntime", "torch")
"""Runtimes on which every bundle must run."""
NOISE_FACTOR = 16
"""Ratio of the allowed deviation on other engines and machines to the float32 rounding error measured here on a few
alerts: they sum in another order, and their rounding errors are of the same size but not the same."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""Smallest divisor, for outputs that are all zero."""
SATURATED = 12.0
"""Log-odds are clipped to this absolute value: beyond it, a probability is within 1e-5 of 0 or 1."""
TEST_SEED = 63
TEST_MJD = 61000.0

for exporter in ("torch.onnx", "onnxscript", "onnx_ir"):
    logging.getLogger(exporter).setLevel(
        logging.ERROR
    )  # at INFO they log every step and every missing optional package


def write_bundle(directory: Path, description: Description, network: nn.Module) -> None:
    """Write the bundle of `network`, whose parameters are float32 on the CPU, into the new `directory`.

    Raises BundleError if the directory exists, or if a runtime does not reproduce the network's outputs; OSError if the
    directory cannot be written.
    """
    if directory.exists():
        raise BundleError(f"{directory}: exists already; choose another directory, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        bundle = Path(scratch) / directory.name
        bundle.mkdir()
        alerts = _test_alerts(description.inputs)
        inputs = [torch.from_numpy(array) for array in prepare(alerts, description.inputs).values()]
        served = ServedNetwork(network, description.outputs).eval()
        outputs, tolerances = _exact_outputs(served, inputs, description.outputs)
        arrays = _arrays(alerts) | outputs

        (bundle / WEIGHTS).write_bytes(weights_to_bytes(network.state_dict()))
        named = dict(zip(description.inputs.shapes(), inputs, strict=True))
        exported = ServedNetwork(for_onnx(network), description.outputs).eval()
        (bundle / ONNX).write_bytes(to_onnx(exported, named, tuple(description.outputs.shapes())))
        (bundle / TEST_VECTOR).write_bytes(arrays_to_bytes(arrays))
        files = {
            name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in (WEIGHTS, ONNX, TEST_VECTOR)
        }
        card = Card(**dict(description), files=files, tolerances=tolerances)
        write_card(bundle, card)

        for engine in ENGINES:
            open_model(str(bundle), Runtime(engine=engine, device="cpu"))
        bundle.rename(directory)


def _exact_outputs(
    served: ServedNetwork, inputs: list[torch.Tensor], outputs: Outputs
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Return the outputs computed in float64, rounded to float32, and the tolerance of each output.

    For tolerances, see `Card.tolerances`.

    Raises BundleError if float32 arithmetic gives other results.
    """
    with torch.inference_mode():
        # Sums of a single alert run in another order than those of a batch: both sample the rounding errors.
        together = _log_odds_and_others(served.network(*inputs), outputs)
        alone = [
            _log_odds_and_others(served.network(*one), outputs)
            for one in zip(*(torch.split(tensor, 1) for tensor in inputs), strict=True)
        ]
        in_float64 = copy.deepcopy(served).double()
        doubles = [tensor.double() for tensor in inputs]
        exact = _log_odds_and_others(in_float64.network(*doubles), outputs)
        expected = in_float64(*doubles)
    tolerances = {}
    for name in outputs.shapes():
        rounded = torch.stack([together[name], torch.cat([one[name] for one in alone])])
        noise = float((rounded.double() - exact[name]).abs().max())
        largest = 1.0 if name == PROBABILITIES else float(exact[name].abs().max())
        tolerances[name] = NOISE_FACTOR * noise / max(largest, SMALLEST)
        if not tolerances[name] <= MAX_TOLERANCE:  # also true for NaN
            raise BundleError(
                f"the network's {name} in float32 differ by up to {noise:.2g} from those in float64"
                f"{', in log-odds' if name == PROBABILITIES else ''}: rounding errors dominate, so other machines "
                f"would not reproduce them (at most {MAX_TOLERANCE / NOISE_FACTOR * largest:.2g} is allowed); look for "
                "NaN, or for differences of very large numbers"
            )
    arrays = {
        name: output.float().contiguous().numpy()  # safetensors saves buffers
        for name, output in zip(outputs.shapes(), expected, strict=True)
    }
    return arrays, tolerances


def _log_odds_and_others(given: tuple[torch.Tensor, ...], outputs: Outputs) -> dict[str, torch.Tensor]:
    """Return a network's outputs by name, with the log-odds (clipped to SATURATED) in place of the probabilities."""
    logits, *others = given
    odds = logits if outputs.activation == "sigmoid" else log_odds(logits)
    return dict(
        zip(outputs.shapes(), (odds.clamp(-SATURATED, SATURATED), *others), strict=False)
    )  # some embeddings are not served


def to_onnx(network: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str]) -> bytes:
    """Return the ONNX graph of a network with its weights, a free batch axis, and named inputs and outputs.

    `inputs`: an example of each input, by name, in the order in which the network takes them.
    """
    batch = torch.export.Dim("alerts")
    # The exporter writes attention as matrix products: it must trace those, not the strides of a fused kernel.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter calls deprecated parts of torch
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    # The exporter records the source position of every node, with local paths.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return bytes(model.SerializeToString())


def _test_alerts(inputs: Inputs) -> RawAlerts:
    """Return four synthetic raw alerts.

    They show a new source, a misaligned subtraction, an incomplete stamp, and pixels of NaN or the largest float32.
    The last alert has no planes, and the second has unusable pixels in its variance.

    If light curves are needed, the first alert has one point, the second more points than fit, the third none.
    """
    rng = np.random.default_rng(TEST_SEED)
    size = inputs.images.size
    y, x = np.ogrid[:size, :size]

    def star(flux: float, dx: float = 0.0) -> NDArray[np.float64]:
        return flux * np.exp(-((y - size // 2) ** 2 + (x - size // 2 - dx) ** 2) / (2 * 1.5**2))

    difference = np.stack([star(300), star(900) - star(900, dx=1), star(100), star(2000)])
    template = np.stack([star(0), star(900, dx=1), star(400, dx=4), star(50)])
    clean = np.stack([200 + template + difference, 100 + template, difference], axis=1)
    cutouts = (clean + rng.normal(0, 12, clean.shape)).astype(np.float32)
    box = np.tile(np.array([0, 0, size, size], np.int16), (len(cutouts), len(CUTOUTS), 1))
    box[2, :, 2] = size * 2 // 3
    cutouts[2, :, size * 2 // 3 :] = 0
    cutouts[3, :, :, : size // 8] = np.nan
    cutouts[3, 0, 0, -1] = np.finfo(np.float32).max
    metadata = rng.normal(0, 1, (len(cutouts), len(inputs.metadata)))
    metadata[0, :1] = np.nan
    columns = tuple(column.name for column in inputs.metadata)
    alerts = RawAlerts(cutouts, box, metadata, columns)
    if "variance" in inputs.planes:
        variance = (12**2 + np.maximum(clean, 0)).astype(np.float32)
        variance[1, :, 0, :3] = 0, -1, np.inf
        variance[3] = np.nan
        alerts = replace(alerts, variance=variance)
    if "psf" in inputs.planes:
        offset = np.arange(PSF_SIZE) - PSF_SIZE // 2
        width = np.array([1.0, 1.5, 2.5])[:, None, None]
        psf = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * width**2)) / (2 * np.pi * width**2)
        psf = np.tile(psf.astype(np.float32), (len(cutouts), 1, 1, 1))
        psf[3] = np.nan
        alerts = replace(alerts, psf=psf, survey=np.full(len(cutouts), Survey.LSST, np.uint8))
    if inputs.light_curve is None:
        return alerts
    mjd = np.full(len(cutouts), TEST_MJD)
    counts = np.array([1, inputs.light_curve.points + 3, 0, 5])
    days = np.concatenate([np.sort(rng.uniform(0, 30, count))[::-1] for count in counts])
    m = len(days)
    error = inputs.light_curve.flux_scale * rng.uniform(0.1, 10, m)
    light_curves = LightCurves(
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        mjd=TEST_MJD - days,
        band=rng.choice(np.array([1, 2, UNKNOWN_BAND], np.uint8), m),
        flux=(error * rng.normal(0, 20, m)).astype(np.float32),
        flux_err=error.astype(np.float32),
        kind=rng.integers(len(Measurement), size=m, dtype=np.uint8),
    )
    return replace(alerts, mjd=mjd, light_curves=light_curves)


def _arrays(alerts: RawAlerts) -> dict[str, NDArray[Any]]:
    """Return the arrays of a test vector for these alerts."""
    arrays: dict[str, NDArray[Any]] = {
        "cutouts": alerts.cutouts,
        "cutout_box": alerts.cutout_box,
        "metadata": alerts.metadata,
    }
    for name in ("variance", "psf", "survey"):
        if (array := getattr(alerts, name)) is not None:
            arrays[name] = array
    if alerts.mjd is not None and alerts.light_curves is not None:
        arrays["mjd"] = alerts.mjd
        arrays |= {f"{POINTS}{name}": getattr(alerts.light_curves, name) for name in ("offsets", *POINT_COLUMNS)}
    return arrays
