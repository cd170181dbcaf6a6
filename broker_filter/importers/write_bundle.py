"""A trained or imported network as a bundle. Needs the `train` extra; serving never imports this.

The bundle's directory appears whole or not at all, and never replaces another.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save as arrays_to_bytes
from safetensors.torch import save as weights_to_bytes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from broker_filter.config import Runtime
from broker_filter.packets.batch import CUTOUTS, UNKNOWN_BAND, LightCurves, Measurement
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    CARD,
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
)
from broker_filter.scoring.networks import ServedNetwork
from broker_filter.scoring.networks.stampnet import log_odds
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.scorer import open_model

ENGINES: tuple[Literal["onnxruntime", "torch"], ...] = ("onnxruntime", "torch")
"""What a bundle must run on."""
NOISE_FACTOR = 16
"""Between float32's distance from float64 in this run, of few alerts, and what other engines and machines are allowed:
they add in another order, and round as much but not the same."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""Lest outputs that are all zeros be divided by."""
SATURATED = 12.0
"""Log-odds: beyond, a probability is nearer to 0 or 1 than any runtime must come to it."""
TEST_SEED = 63
TEST_MJD = 61000.0

for exporter in ("torch.onnx", "onnxscript", "onnx_ir"):
    logging.getLogger(exporter).setLevel(logging.ERROR)  # they tell of every step, and of packages they do without


def write_bundle(directory: Path, description: Description, network: nn.Module) -> None:
    """Writes the bundle of `network`, whose parameters are on the CPU in float32, into the new `directory`.

    Raises BundleError where the directory exists already, or an engine does not give what the network gives; OSError
    where the directory cannot be written.
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
        (bundle / ONNX).write_bytes(_to_onnx(served, inputs, description))
        (bundle / TEST_VECTOR).write_bytes(arrays_to_bytes(arrays))
        files = {
            name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in (WEIGHTS, ONNX, TEST_VECTOR)
        }
        card = Card(**dict(description), files=files, tolerances=tolerances)
        text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
        (bundle / CARD).write_text(text, encoding="utf-8")

        for engine in ENGINES:
            open_model(str(bundle), Runtime(engine=engine, device="cpu"))
        bundle.rename(directory)


def _exact_outputs(
    served: ServedNetwork, inputs: list[torch.Tensor], outputs: Outputs
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """The outputs as float64 arithmetic gives them, rounded to float32; and by output, what `Card.tolerances` says.

    Raises BundleError where float32 arithmetic gives something else.
    """
    with torch.inference_mode():
        # Alone, an alert is computed in another order than among others: each is a sample of what rounding does.
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
        if not tolerances[name] <= MAX_TOLERANCE:  # nor where it is NaN
            raise BundleError(
                f"the network's {name} in float32 are up to {noise:.2g} from those in float64"
                f"{', in log-odds' if name == PROBABILITIES else ''}: rounding alone changes what it says, so that no "
                f"other machine would reproduce it (at most {MAX_TOLERANCE / NOISE_FACTOR * largest:.2g} is allowed); "
                "look for NaN, or for very large numbers that are subtracted from each other"
            )
    arrays = {
        name: output.float().contiguous().numpy()  # safetensors saves buffers
        for name, output in zip(outputs.shapes(), expected, strict=True)
    }
    return arrays, tolerances


def _log_odds_and_others(given: tuple[torch.Tensor, ...], outputs: Outputs) -> dict[str, torch.Tensor]:
    """A network's outputs by name, the log-odds of its probabilities, up to SATURATED, in the place of these."""
    logits, *others = given
    odds = logits if outputs.activation == "sigmoid" else log_odds(logits)
    return dict(
        zip(outputs.shapes(), (odds.clamp(-SATURATED, SATURATED), *others), strict=False)
    )  # some embeddings are not served


def _to_onnx(served: nn.Module, inputs: list[torch.Tensor], description: Description) -> bytes:
    """The graph with a free batch axis and named inputs and outputs, its weights inside."""
    batch = torch.export.Dim("alerts")
    # The exporter writes attention out in plain matrix products: it must trace those, not a fused kernel's strides.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter calls deprecated parts of torch
        program = torch.onnx.export(
            served,
            tuple(inputs),
            input_names=list(description.inputs.shapes()),
            output_names=list(description.outputs.shapes()),
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    # The exporter notes where in the source every node came from, with the paths of the machine it ran on.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return bytes(model.SerializeToString())


def _test_alerts(inputs: Inputs) -> RawAlerts:
    """Four synthetic alerts, as raw as surveys publish them: a new source, a misaligned subtraction, a short stamp, and
    pixels that are NaN or the largest float32. Where light curves are asked for, the first has only its own point, the
    second more than fit, the third none."""
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
    """The alerts as a test vector holds them."""
    arrays: dict[str, NDArray[Any]] = {
        "cutouts": alerts.cutouts,
        "cutout_box": alerts.cutout_box,
        "metadata": alerts.metadata,
    }
    if alerts.mjd is not None and alerts.light_curves is not None:
        arrays["mjd"] = alerts.mjd
        arrays |= {f"{POINTS}{name}": getattr(alerts.light_curves, name) for name in ("offsets", *POINT_COLUMNS)}
    return arrays
