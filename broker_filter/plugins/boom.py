"""BOOM (https://github.com/boom-astro/boom): exports a bundle as an ONNX file with the interface of BOOM's BTSbot.

BOOM decodes and normalises the cutouts of a ZTF alert itself, and hands them to its ONNX models in onnxruntime
(`src/enrichment/models`). The exported graph turns these inputs into those of the bundle, so that the network sees the
tensor that it was trained on. Needs onnx, which is part of the extra `train`.

The graph must never accept an input that BOOM does not have: a bundle that needs more is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.config import Runtime, SurveyName
from broker_filter.packets.batch import CUTOUTS
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    ONNX,
    PROBABILITIES,
    WEIGHTS,
    Bundle,
    BundleError,
    ImageInput,
    Inputs,
    Part,
    open_bundle,
)
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import load_model

if TYPE_CHECKING:
    import onnx

SURVEY: SurveyName = "ztf"
"""The survey whose alerts BOOM hands to BTSbot."""
TRIPLET, METADATA = "triplet", "metadata"
"""Names of the inputs of BOOM's BTSbot."""
SCORES = ("fc_out", "score")
"""Names of the outputs. BOOM reads `fc_out` of BTSbot and `score` of its other image networks; both hold the same."""
SIZE = 63
"""Pixels per side of BOOM's cutouts."""
COLUMNS: tuple[str, ...] = (
    *("sgscore1", "distpsnr1", "sgscore2", "distpsnr2", "fwhm", "magpsf", "sigmapsf", "chipsf", "ra", "dec"),
    *("diffmaglim", "ndethist", "nmtchps", "age", "days_since_peak", "days_to_peak", "peakmag_so_far", "drb"),
    *("ncovhist", "nnotdet", "chinr", "sharpnr", "scorr", "sky", "maxmag_so_far"),
)
"""The columns of `metadata` in BOOM's order, which is that of BTSbot, under the names of this package."""
SAME_COLUMNS = {"new_drb": "drb"}
"""Further names of these columns."""
SIGNED_COLUMN = "age"
"""BOOM computes the age as the first time minus the last one, which is negative; the networks were trained on positive
ages. The graph takes the absolute value, which is right for either sign."""
MISSING = -999.0
"""ZTF's value for a missing measurement. The graph replaces it, and NaN, by the bundle's fill value."""
AS_BOOM = ImageInput(size=SIZE, order=("science", "template", "difference"), normalisation="l2_image", padding=0.0)
"""BOOM's preprocessing of cutouts (`src/utils/fits.rs`)."""
MAX_PADDING = 1e-6
"""Largest padding (absolute) that is as good as BOOM's zeros: pixels of a normalised stamp are of the order of 0.01."""
HUGE = 1e15
"""A pixel above this value overflows the norm of its stamp in float32."""
TOLERANCE = 1e-6
"""Largest difference of a score from that of the bundle, in a test on the bundle's test vector."""
PREFIX = "network/"
"""Prefix of the names of the bundle's graph within the exported one."""
PROPERTIES = "broker_filter."
"""Prefix of the metadata properties of the ONNX file."""


def export_for_boom(bundle: str | Path, out: Path, label: str | None = None) -> dict[str, str]:
    """Write the network of a bundle for ZTF as an ONNX file for BOOM, and return the metadata properties of the file.

    `bundle`: name or directory, as for `open_bundle`. `label`: the probability that is the score; needed only if the
    bundle gives several. The file is written atomically, after its scores were compared with those of the bundle on
    the bundle's test vector.

    Inputs of the graph: float32 `triplet` [N, 63, 63, 3], stamps in the order science, template, difference, each
    divided by its L2 norm and padded with 0; float32 `metadata` [N, 25], the COLUMNS. Outputs: float32 `fc_out` and
    `score` [N, 1], the same probability.

    Raises BundleError if the file exists, if the bundle has no network for ZTF, if the network needs an input that BOOM
    does not have, or if the exported scores differ; OSError if the file cannot be written.
    """
    if out.exists():
        raise BundleError(f"{out}: exists already; choose another file, or remove it first")
    opened = open_bundle(bundle)
    part = opened.part(SURVEY)
    check_exportable(part)
    label = _choose_label(part, opened.card.outputs.labels, label)
    model = _build(part, label)
    properties = _properties(opened, part, label)
    for key, value in properties.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    data = model.SerializeToString()
    _verify(part, label, data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        written = Path(scratch) / out.name
        written.write_bytes(data)
        written.rename(out)
    return properties


def check_exportable(part: Part) -> None:
    """Raise BundleError, with every reason, if the network needs an input that BOOM does not have."""
    inputs = part.card.inputs
    images, names = inputs.images, _boom_names(inputs)
    reasons = []
    if images.size != SIZE:
        reasons.append(f"it takes cutouts of {images.size} px, and BOOM's have {SIZE} px")
    if images.normalisation not in ("l2_row", "l2_image"):
        reasons.append(f"it needs the normalisation {images.normalisation}, and BOOM has divided by the L2 norm before")
    if abs(images.padding) > MAX_PADDING:
        reasons.append(f"it pads cutouts with {images.padding:g}, and BOOM with 0")
    if absent := [name for name in names if name not in COLUMNS]:
        reasons.append(f"it needs metadata that are not among BOOM's {len(COLUMNS)}: {', '.join(absent)}")
    if inputs.light_curve is not None:
        reasons.append("it needs light curves, which BOOM does not pass on")
    if inputs.psf is not None:
        reasons.append("it needs PSF images, which ZTF alerts do not hold")
    if reasons:
        raise BundleError(
            f"{part.directory}: {part.card.title} cannot be exported for BOOM: {'; '.join(reasons)}. Export a bundle "
            f"of {SIZE} px cutouts divided by their L2 norm, such as `default`"
        )


def boom_inputs(alerts: RawAlerts) -> dict[str, NDArray[np.float32]]:
    """Return the inputs that BOOM gives its networks for N alerts: `triplet` [N, 63, 63, 3] and `metadata` [N, 25].

    An incomplete stamp stays where the decoder placed it; BOOM moves it to the centre. Columns that `alerts` lacks, and
    missing values, are MISSING.
    """
    stamps = prepare_images(alerts.cutouts, alerts.cutout_box, AS_BOOM)
    metadata = np.full((len(alerts), len(COLUMNS)), MISSING, np.float32)
    for name, values in zip(alerts.columns, alerts.metadata.T, strict=True):
        if (column := SAME_COLUMNS.get(name, name)) in COLUMNS:
            metadata[:, COLUMNS.index(column)] = np.where(np.isnan(values), MISSING, values)
    return {TRIPLET: np.ascontiguousarray(stamps.transpose(0, 2, 3, 1)), METADATA: metadata}


def _boom_names(inputs: Inputs) -> list[str]:
    """Return the names of the network's metadata columns, as COLUMNS has them where it has them."""
    return [SAME_COLUMNS.get(column.name, column.name) for column in inputs.metadata]


def _choose_label(part: Part, served: tuple[str, ...], label: str | None) -> str:
    choices = [name for name in served if SURVEY in part.card.surveys_of(name)]
    if label is None and len(choices) == 1:
        return choices[0]
    if label in choices:
        return label
    wrong = "gives several scores, and BOOM reads one" if label is None else f"has no label {label!r} for {SURVEY}"
    raise BundleError(f"{part.directory}: {part.card.title} {wrong}; choose one with --label: {', '.join(choices)}")


def _properties(bundle: Bundle, part: Part, label: str) -> dict[str, str]:
    """Return what a reader of the file must know about its inputs and its origin, as ONNX metadata properties."""
    card = part.card
    named: Mapping[str, Any] = {
        "host": "boom",
        "bundle": bundle.card.title,
        "network": card.title,
        "label": label,
        "threshold": card.outputs.thresholds.get(label),
        f"{TRIPLET}.layout": "NHWC",
        f"{TRIPLET}.order": list(CUTOUTS),
        f"{TRIPLET}.normalisation": "l2_image",
        f"{TRIPLET}.padding": 0.0,
        f"{METADATA}.columns": list(COLUMNS),
        f"{METADATA}.used": [name for name in COLUMNS if name in _boom_names(card.inputs)],
        f"{METADATA}.missing": MISSING,
        "weights_sha256": card.files[WEIGHTS],
        "licence": card.licence,
        "source": card.source,
        "citation": card.citation,
    }
    return {
        f"{PROPERTIES}{key}": value if isinstance(value, str) else json.dumps(value) for key, value in named.items()
    }


def _build(part: Part, label: str) -> onnx.ModelProto:
    """Return the bundle's graph with BOOM's inputs in front of it and the probability of `label` behind it."""
    import onnx
    from onnx import compose, helper, numpy_helper

    network = onnx.load_model_from_string((part.directory / ONNX).read_bytes())
    given = {opset.domain: opset.version for opset in network.opset_import}
    network = compose.add_prefix(network, PREFIX)
    front = helper.make_model(
        _front(part.card.inputs),
        ir_version=network.ir_version,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in given.items()],
    )
    joined = [(output.name, PREFIX + output.name.removeprefix("prepared/")) for output in front.graph.output]
    model = compose.merge_models(front, network, io_map=joined)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([part.card.outputs.labels.index(label)]), "label"))
    del graph.output[:]
    for name in SCORES:
        graph.node.append(helper.make_node("Gather", [PREFIX + PROBABILITIES, "label"], [name], axis=1))
        graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["alerts", 1]))
    del graph.value_info[:]  # shapes of the parts, which onnxruntime infers again
    graph.name = f"{part.card.title} for BOOM"
    model.producer_name = "broker-filter"
    onnx.checker.check_model(model)
    return model


def _front(inputs: Inputs) -> onnx.GraphProto:
    """Return the graph from BOOM's inputs to those of the network, called `prepared/<name of the input>`."""
    from onnx import TensorProto, helper, numpy_helper

    constants: dict[str, NDArray[Any]] = {
        "order": np.array([CUTOUTS.index(name) for name in inputs.images.order]),
        "zero": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("Transpose", [TRIPLET], ["stamps"], perm=[0, 3, 1, 2]),
        helper.make_node("Gather", ["stamps", "order"], ["ordered"], axis=1),
        # BOOM divides a stamp that is 0 everywhere by 0.
        helper.make_node("IsNaN", ["ordered"], ["empty"]),
        helper.make_node("Where", ["empty", "zero", "ordered"], ["clean"]),
    ]
    if inputs.images.normalisation == "l2_row":
        # The norm of a row does not depend on what the stamp was divided by before.
        constants |= {"row": np.array([3]), "one": np.array(1, np.float32)}
        nodes += [
            helper.make_node("Mul", ["clean", "clean"], ["squares"]),
            helper.make_node("ReduceSum", ["squares", "row"], ["sums"], keepdims=1),
            helper.make_node("Sqrt", ["sums"], ["norms"]),
            helper.make_node("Equal", ["norms", "zero"], ["blank"]),
            helper.make_node("Where", ["blank", "one", "norms"], ["divisors"]),
            helper.make_node("Div", ["clean", "divisors"], ["prepared/images"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["clean"], ["prepared/images"]))
    shapes = inputs.shapes()
    outputs = [helper.make_tensor_value_info("prepared/images", TensorProto.FLOAT, ["alerts", *shapes["images"]])]
    if inputs.metadata:
        signed = np.array([name == SIGNED_COLUMN for name in COLUMNS])
        flagged = [place for place, column in enumerate(inputs.metadata) if column.flag]
        constants |= {
            "columns": np.array([COLUMNS.index(name) for name in _boom_names(inputs)]),
            "missing": np.array(MISSING, np.float32),
            "fills": np.array([column.fill for column in inputs.metadata], np.float32),
            "signed": signed[[COLUMNS.index(name) for name in _boom_names(inputs)]],
            "flagged": np.array(flagged, np.int64),
        }
        nodes += [
            helper.make_node("Gather", [METADATA, "columns"], ["chosen"], axis=1),
            helper.make_node("IsNaN", ["chosen"], ["unknown"]),
            helper.make_node("Equal", ["chosen", "missing"], ["unmeasured"]),
            helper.make_node("Or", ["unknown", "unmeasured"], ["absent"]),
            helper.make_node("Abs", ["chosen"], ["positive"]),
            helper.make_node("Where", ["signed", "positive", "chosen"], ["values"]),
            helper.make_node("Where", ["absent", "fills", "values"], ["filled"]),
        ]
        if flagged:
            nodes += [
                helper.make_node("Gather", ["absent", "flagged"], ["flags"], axis=1),
                helper.make_node("Cast", ["flags"], ["numbers"], to=TensorProto.FLOAT),
                helper.make_node("Concat", ["filled", "numbers"], ["prepared/metadata"], axis=1),
            ]
        else:
            nodes.append(helper.make_node("Identity", ["filled"], ["prepared/metadata"]))
            del constants["flagged"]
        outputs.append(
            helper.make_tensor_value_info("prepared/metadata", TensorProto.FLOAT, ["alerts", *shapes["metadata"]])
        )
    # BOOM passes both inputs to the session by name, so the graph has them even if it does not read them.
    given = {TRIPLET: (SIZE, SIZE, len(CUTOUTS)), METADATA: (len(COLUMNS),)}
    return helper.make_graph(
        nodes,
        "inputs",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["alerts", *shape]) for name, shape in given.items()],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )


def _verify(part: Part, label: str, data: bytes) -> None:
    """Raise BundleError if the exported graph gives other scores than the bundle on alerts of its test vector."""
    import onnxruntime

    vector = part.test_vector()
    alerts = replace(
        vector,
        # BOOM loses a whole stamp to such a pixel, and an l2_row network only its row.
        cutouts=np.where(np.abs(vector.cutouts) < HUGE, vector.cutouts, np.float32(0)),
        metadata=np.abs(vector.metadata),  # an age of the random test vector may be negative
    )
    opened = open_bundle(part.directory)
    (loaded,) = load_model(opened, Runtime(engine="onnxruntime", device="cpu")).parts
    expected = loaded.run(alerts)[PROBABILITIES][:, part.card.outputs.labels.index(label)]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for name, scores in zip(SCORES, session.run(list(SCORES), boom_inputs(alerts)), strict=True):
        off = np.abs(scores[:, 0] - expected).max()
        if not off <= TOLERANCE:  # also true for NaN
            raise BundleError(
                f"{part.directory}: the exported {name} differs from the score of {part.card.title} by {off:.2g} on "
                f"its test vector, where {TOLERANCE:g} is allowed; the file was not written. Report this as an error"
            )
