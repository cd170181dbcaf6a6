"""A minimal bundle that gives an embedding: the pixels of each cutout, reduced to 7 x 7.

It is for tests of the code that uses embeddings. It has no weights, and runs on onnxruntime only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import yaml
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from broker_filter.scoring.bundle import CARD, ONNX, TEST_VECTOR, WEIGHTS, open_bundle
from broker_filter.scoring.preprocess import prepare

NAME = "looks"
MODALITIES = ("science", "template", "difference")
SIDE = 7
"""Side of a reduced cutout in pixels; 63 is a multiple of it."""


def write_embedding_bundle(directory: Path) -> Path:
    """Write the bundle, whose modalities are the three cutouts, and return its directory."""
    directory.mkdir()
    card = open_bundle("default").part("ztf").card.model_dump(mode="json")
    card |= {"name": NAME, "version": "1", "architecture": {"name": "none"}}
    card["inputs"] |= {"metadata": []}
    card["outputs"] |= {"embedding": len(MODALITIES) * SIDE * SIDE, "modalities": list(MODALITIES)}
    onnx.save(_graph(), str(directory / ONNX))
    save_file({"none": np.zeros(1, np.float32)}, directory / WEIGHTS)
    vector = open_bundle("default").part("ztf").test_vector()
    inputs = open_bundle("default").part("ztf").card.inputs
    images = prepare(vector, inputs)["images"]
    session = onnxruntime.InferenceSession(directory / ONNX)
    names = ("probabilities", "embedding", "modalities")
    outputs = dict(zip(names, session.run(names, {"images": images}), strict=True))
    raw = {"cutouts": vector.cutouts, "cutout_box": vector.cutout_box, "metadata": np.zeros((len(images), 0))}
    save_file(raw | outputs, directory / TEST_VECTOR)
    files = (ONNX, WEIGHTS, TEST_VECTOR)
    card["files"] = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files}
    (directory / CARD).write_text(yaml.safe_dump(card))
    return directory


def _graph() -> onnx.ModelProto:
    size = len(MODALITIES) * SIDE * SIDE
    nodes = [
        helper.make_node("AveragePool", ["images"], ["small"], kernel_shape=[9, 9], strides=[9, 9]),
        helper.make_node("Reshape", ["small", "apart"], ["looks"]),
        helper.make_node("LpNormalization", ["looks"], ["modalities"], axis=2),
        helper.make_node("Flatten", ["modalities"], ["together"]),
        helper.make_node("LpNormalization", ["together"], ["embedding"], axis=1),
        helper.make_node("ReduceMax", ["together"], ["brightest"], axes=[1], keepdims=1),
        helper.make_node("Sigmoid", ["brightest"], ["probabilities"]),
    ]
    apart = helper.make_tensor("apart", TensorProto.INT64, [3], [-1, len(MODALITIES), SIDE * SIDE])
    outputs = {"probabilities": [1], "embedding": [size], "modalities": [len(MODALITIES), SIDE * SIDE]}
    graph = helper.make_graph(
        nodes,
        NAME,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 63, 63])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape]) for name, shape in outputs.items()],
        [apart],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
