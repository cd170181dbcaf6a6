"""Imported braai weights reproduce the scores that ZTF publishes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from broker_filter.config import Runtime
from broker_filter.importers.braai import LAYERS, import_braai, read_weights
from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.bundle import BundleError, open_bundle
from broker_filter.scoring.scorer import open_scorer

SCORED_WITH_ANOTHER_TEMPLATE = 472263571115115000
"""The only shared packet (2018) whose drb was not computed from its images."""


@pytest.fixture(scope="module")
def bundles(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    import_braai(shared_models / "braai" / "d6_m7.weights.h5", "row", "d6_m7", folder / "d6_m7")
    import_braai(shared_models / "braai" / "braai_d6_m9.weights.h5", "image", "d6_m9", folder / "d6_m9")
    return folder


@pytest.fixture(scope="module")
def d6_m7_alerts(shared_data: Path, ztf_packets: list[tuple[int, bytes]]) -> AlertBatch:
    """Every shared alert whose drb was computed with d6_m7."""
    labels = pq.read_table(shared_data / "ztf" / "labels.parquet", columns=["candid", "drbversion"]).to_pydict()
    version = dict(zip(labels["candid"], labels["drbversion"], strict=True))
    chosen = [Packet(data, FilePosition(str(candid))) for candid, data in ztf_packets if version.get(candid) == "d6_m7"]
    alerts, rejects = Decoder(open_registry(None), columns=("drb",)).decode(chosen)
    assert not rejects
    return alerts


@pytest.mark.shared
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_reproduces_survey_real_bogus_score(
    bundles: Path, d6_m7_alerts: AlertBatch, engine: Literal["onnxruntime", "torch"]
) -> None:
    scores = open_scorer([str(bundles / "d6_m7")], Runtime(engine=engine)).score(d6_m7_alerts)
    off = np.abs(scores.columns()["d6_m7.real"] - d6_m7_alerts.column("drb")) > 1e-6
    assert len(d6_m7_alerts) >= 1321
    assert d6_m7_alerts.alert_id[off].tolist() == [SCORED_WITH_ANOTHER_TEMPLATE]


@pytest.mark.shared
def test_parity_covers_the_awkward_stamps(d6_m7_alerts: AlertBatch) -> None:
    with np.errstate(invalid="ignore"):
        beyond_bounds = (np.abs(d6_m7_alerts.cutouts) > 1e38).any(axis=(1, 2, 3))
    assert beyond_bounds.sum() >= 5
    assert np.isnan(d6_m7_alerts.cutouts).any(axis=(1, 2, 3)).sum() >= 100
    assert (d6_m7_alerts.cutout_box[..., 2:] < 63).any(axis=(1, 2)).sum() >= 10


@pytest.mark.shared
def test_d6_m9_needs_images_normalised_as_a_whole(
    shared_models: Path, bundles: Path, d6_m7_alerts: AlertBatch, tmp_path: Path
) -> None:
    """With the normalisation of its training, it agrees with d6_m7 on nearly every alert; with rows, it does not."""
    import_braai(shared_models / "braai" / "braai_d6_m9.weights.h5", "row", "misfed", tmp_path / "misfed")
    scorer = open_scorer([str(bundles / "d6_m9"), str(tmp_path / "misfed")], Runtime())
    columns = scorer.score(d6_m7_alerts).columns()
    real = d6_m7_alerts.column("drb") > 0.5
    agreement = {name: ((columns[name] > 0.5) == real).mean() for name in columns}
    assert agreement["d6_m9.real"] > 0.9
    assert agreement["d6_m9.real"] > agreement["misfed.real"] + 0.02


def write_keras_weights(path: Path, below: str = "", **replaced: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Write random weights in the layout of Keras, `below` a group; `replaced`: other shapes of a layer's kernel."""
    rng = np.random.default_rng(6)
    written = {}
    with h5py.File(path, "w") as file:
        for layer, (_, shape) in LAYERS.items():
            for name, size in (("kernel:0", replaced.get(layer, shape)), ("bias:0", shape[-1:])):
                values = rng.normal(0, 0.05, size).astype(np.float32)
                file[f"{below}{layer}/{layer}/{name}"] = values
                written[f"{layer}/{name}"] = values
    return written


def test_maps_are_flattened_in_the_order_height_width_channel(tmp_path: Path) -> None:
    written = write_keras_weights(tmp_path / "w.h5")
    weights = read_weights(tmp_path / "w.h5")
    y, x, channel, unit = 4, 1, 30, 7
    row_in_keras = (y * 6 + x) * 32 + channel
    column_in_torch = (channel * 6 + y) * 6 + x
    assert weights["features.13.weight"][unit, column_in_torch] == written["fc_1/kernel:0"][row_in_keras, unit]


def test_a_saved_model_is_read_like_bare_weights(tmp_path: Path) -> None:
    write_keras_weights(tmp_path / "weights.h5")
    write_keras_weights(tmp_path / "model.h5", below="model_weights/")
    bare, saved = read_weights(tmp_path / "weights.h5"), read_weights(tmp_path / "model.h5")
    assert all(bool((bare[name] == saved[name]).all()) for name in bare.keys() | saved.keys())


def test_an_imported_bundle_names_its_source(tmp_path: Path) -> None:
    write_keras_weights(tmp_path / "w.weights.h5")
    import_braai(tmp_path / "w.weights.h5", "image", "mine", tmp_path / "mine")
    card = open_bundle(tmp_path / "mine").parts[0].card
    assert (card.name, card.version, card.licence) == ("mine", "w", "MIT")
    assert card.inputs.images.normalisation == "l2_image"
    assert card.surveys == ("ztf",)


def test_another_network_is_refused_by_the_layer_that_differs(tmp_path: Path) -> None:
    write_keras_weights(tmp_path / "w.h5", conv3=(5, 5, 16, 32))
    with pytest.raises(BundleError, match=r"conv3/conv3/kernel:0 is \(5, 5, 16, 32\), expected \(3, 3, 16, 32\)"):
        read_weights(tmp_path / "w.h5")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_keras_weights(tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file["fc_out/fc_out/bias:0"][0] = np.nan
    with pytest.raises(BundleError, match="fc_out/fc_out/bias:0 holds NaN"):
        read_weights(tmp_path / "w.h5")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"not HDF5 at all", lambda _: b""])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_keras_weights(tmp_path / "w.h5")
    (tmp_path / "w.h5").write_bytes(damage((tmp_path / "w.h5").read_bytes()))
    with pytest.raises(BundleError, match=r"w\.h5: not a complete HDF5 file"):
        read_weights(tmp_path / "w.h5")


def test_a_name_that_is_not_an_identifier_is_refused(tmp_path: Path) -> None:
    write_keras_weights(tmp_path / "w.h5")
    with pytest.raises(BundleError, match="a bundle cannot be named 'd6-m7'"):
        import_braai(tmp_path / "w.h5", "row", "d6-m7", tmp_path / "out")
    assert not (tmp_path / "out").exists()
