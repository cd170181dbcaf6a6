"""Imported ACAI networks compute the same as the Keras layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from broker_filter.cli import main
from broker_filter.config import Runtime
from broker_filter.importers.acai import COLUMNS, CONVOLUTIONS, DENSE, import_acai, read_weights
from broker_filter.packets.batch import AlertBatch
from broker_filter.scoring.bundle import BundleError, open_bundle
from broker_filter.scoring.preprocess import prepare_images, prepare_metadata
from broker_filter.scoring.scorer import open_scorer

Floats = NDArray[np.floating]


def write_model(path: Path, **replaced: tuple[int, ...]) -> dict[str, Floats]:
    """Write random weights as Keras saves a model; `replaced`: other shapes of a layer's (pointwise) kernel."""
    rng = np.random.default_rng(3)
    written = {}
    for layer, (_, channels_in, channels_out) in CONVOLUTIONS.items():
        written[f"{layer}/depthwise_kernel"] = rng.normal(0, 0.5, (3, 3, channels_in, 1))
        shape = replaced.get(layer, (1, 1, channels_in, channels_out))
        written[f"{layer}/pointwise_kernel"] = rng.normal(0, 0.7, shape)
        written[f"{layer}/bias"] = rng.normal(0, 0.05, channels_out)
    for layer, (_, units_in, units_out) in DENSE.items():
        written[f"{layer}/kernel"] = rng.normal(0, 0.2, replaced.get(layer, (units_in, units_out)))
        written[f"{layer}/bias"] = rng.normal(0, 0.05, units_out)
    with h5py.File(path, "w") as file:
        for name, values in written.items():
            layer, weight = name.split("/")
            file[f"model_weights/{layer}/{layer}/{weight}:0"] = values.astype(np.float32)
    return {name: values.astype(np.float32).astype(np.float64) for name, values in written.items()}


def by_keras_definitions(weights: dict[str, Floats], images: Floats, features: Floats) -> Floats:
    """Return scores [N] of images [N, 63, 63, 3] and features [N, 25]: channels last, without padding, as in Keras."""

    def dense(x: Floats, layer: str) -> Floats:
        return x @ weights[f"{layer}/kernel"] + weights[f"{layer}/bias"]

    def separable(x: Floats, layer: str) -> Floats:
        windows = sliding_window_view(x, (3, 3), axis=(1, 2))  # [N, H - 2, W - 2, C, 3, 3]
        depthwise = np.einsum("nhwcij,ijc->nhwc", windows, weights[f"{layer}/depthwise_kernel"][..., 0])
        pointwise = depthwise @ weights[f"{layer}/pointwise_kernel"][0, 0]
        return np.maximum(pointwise + weights[f"{layer}/bias"], 0)

    def pool(x: Floats) -> Floats:
        n, h, w, c = x.shape
        return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))

    x = pool(separable(separable(images, "conv_conv_1"), "conv_conv_2"))
    x = pool(separable(separable(x, "conv_conv_3"), "conv_conv_4")).mean(axis=(1, 2))
    told = np.maximum(dense(np.maximum(dense(features, "dense_fc_1"), 0), "dense_fc_2"), 0)
    joint = np.maximum(dense(np.concatenate([told, x], axis=1), "fc_1"), 0)
    return 1 / (1 + np.exp(-dense(joint, "score")[:, 0]))


def test_an_imported_network_gives_the_scores_of_keras(tmp_path: Path, make_batch: Callable[..., AlertBatch]) -> None:
    weights = write_model(tmp_path / "acai_h.h5")
    import_acai(tmp_path / "acai_h.h5", "h", "acai_h", tmp_path / "acai_h")
    rng = np.random.default_rng(4)
    metadata = rng.normal(0, 1, (6, len(COLUMNS)))
    metadata[1, COLUMNS.index("drb")] = metadata[2, COLUMNS.index("sgscore3")] = np.nan
    batch = make_batch(
        rng.normal(20, 9, (6, 3, 63, 63)).astype(np.float32), columns=COLUMNS[::-1], metadata=metadata[:, ::-1]
    )
    inputs = open_bundle(tmp_path / "acai_h").parts[0].card.inputs
    images = prepare_images(batch.cutouts, batch.cutout_box, inputs.images).transpose(0, 2, 3, 1)
    features = prepare_metadata(batch.metadata, batch.columns, inputs.metadata)
    assert features[1, 0] == 0.5
    assert features[2, 15] == -999
    assert features[3] == pytest.approx(metadata[3], rel=1e-6)
    expected = by_keras_definitions(weights, images.astype(np.float64), features.astype(np.float64))
    for engine in ("onnxruntime", "torch"):
        runtime = Runtime.model_validate({"engine": engine, "device": "cpu"})
        scores = open_scorer([str(tmp_path / "acai_h")], runtime).score(batch).columns()
        assert scores["acai_h.hosted"] == pytest.approx(expected, abs=1e-5)
    assert expected.std() > 0.01


def test_the_command_imports_one_of_the_five_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "acai_v.d1_dnn_20201130.h5")
    arguments = ["models", "import", "acai", str(tmp_path / "acai_v.d1_dnn_20201130.h5"), "--class", "v"]
    assert main([*arguments, "--name", "acai_v", "--out", str(tmp_path / "acai_v")]) == 0
    assert "bundle acai_v written and verified" in capsys.readouterr().out
    card = open_bundle(tmp_path / "acai_v").parts[0].card
    assert (card.version, card.outputs.labels, card.licence) == ("acai_v.d1_dnn_20201130", ("variable",), "MIT")


def test_a_network_of_other_widths_is_refused_by_the_layer_that_differs(tmp_path: Path) -> None:
    write_model(tmp_path / "wide.h5", dense_fc_1=(25, 128))
    with pytest.raises(
        BundleError, match=r"not weights of ACAI: dense_fc_1/.*kernel:0 is \(25, 128\), expected \(25, 64\)"
    ):
        read_weights(tmp_path / "wide.h5")
    write_model(tmp_path / "fewer.h5", dense_fc_1=(24, 64))
    with pytest.raises(BundleError, match=r"is \(24, 64\), expected \(25, 64\)"):
        read_weights(tmp_path / "fewer.h5")
