"""Data sets hold what the service sees, are read piece by piece, and are refused if they are damaged."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from broker_filter.packets.batch import Plane
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.bundle import POINT_COLUMNS, ImageInput, Inputs, MetadataColumn, PsfInput
from broker_filter.scoring.labels import Labels, read_labels
from broker_filter.scoring.preprocess import prepare_images, prepare_metadata
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.archives import read_packets
from training.data import build_dataset as building
from training.data.build_dataset import build_dataset
from training.data.datasets import CARD, INDEX, SHARDS, SPLITS, Dataset, SplitRule
from training.errors import DatasetError
from training.recipe import Recipe
from training.vision.classifier import ShownAlerts, chosen_to_train

INPUTS = Inputs(
    images=ImageInput(size=63, order=("science", "template", "difference"), normalisation="l2_image", padding=1e-9),
    metadata=(MetadataColumn(name="magpsf", fill=0), MetadataColumn(name="distnr", fill=-1, flag=True)),
)


def served_inputs(packets: list[Packet]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return the network inputs that the service computes from packets, by alert id."""
    columns = tuple(column.name for column in INPUTS.metadata)
    alerts, _ = Decoder(open_registry(None), columns=columns).decode(packets)
    images = prepare_images(alerts.cutouts, alerts.cutout_box, INPUTS.images)
    metadata = prepare_metadata(alerts.metadata, alerts.columns, INPUTS.metadata)
    return {alert: (images[i], metadata[i]) for i, alert in enumerate(alerts.alert_id.tolist())}


def assert_shown_as_served(dataset: Dataset, packets: list[Packet]) -> None:
    served = served_inputs(packets)
    for split in SPLITS:
        view = dataset[split]
        images, metadata, label = ShownAlerts(view, INPUTS).__getitems__(range(len(view)))
        for i, alert in enumerate(view.alert_id.tolist()):
            assert np.array_equal(images[i].numpy(), served[alert][0])
            assert np.array_equal(metadata[i].numpy(), served[alert][1])
        assert np.array_equal(label.numpy(), view.label)


def test_training_inputs_are_those_of_the_service(night_packets: Path, night_dataset: Dataset) -> None:
    assert_shown_as_served(night_dataset, list(read_packets([night_packets])))


def test_light_curves_are_stored_as_decoded_and_read_in_the_requested_order(
    night_packets: Path, night_labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "ALERTS_PER_SHARD", 20)
    monkeypatch.setattr(building, "PACKETS_AT_ONCE", 20)
    dataset = build_dataset([night_packets], night_labels, tmp_path / "set")
    assert len(dataset.card.shards) == 3
    decoded, _ = Decoder(open_registry(None)).decode(list(read_packets([night_packets])))
    rows = np.random.default_rng(1).permutation(len(dataset.alert_id))[:40]
    places = [decoded.alert_id.tolist().index(alert) for alert in dataset.alert_id[rows].tolist()]
    alerts = dataset.read(rows)
    assert alerts.light_curves is not None
    for name in ("offsets", *POINT_COLUMNS):
        expected = getattr(decoded.light_curves[np.array(places)], name)
        np.testing.assert_array_equal(getattr(alerts.light_curves, name), expected)
    np.testing.assert_array_equal(alerts.mjd, decoded.mjd[places])


@pytest.mark.shared
def test_training_inputs_of_real_alerts_are_those_of_the_service(shared_data: Path, tmp_path: Path) -> None:
    """The archive of a night in 2018, with labels by hemisphere."""
    archive = next((shared_data / "ztf" / "archives").glob("ztf_public*.tar.gz"))
    packets = list(read_packets([archive]))
    alerts, _ = Decoder(open_registry(None)).decode(packets)
    east = alerts.ra > np.median(alerts.ra)
    rows = [f"{alert},{'east' if side else 'west'}" for alert, side in zip(alerts.alert_id, east, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["candid,half", *rows]))
    dataset = build_dataset([archive], read_labels(tmp_path / "labels.csv", "half"), tmp_path / "set")
    assert len(dataset.alert_id) == len(alerts) > 20
    assert_shown_as_served(dataset, packets)


def test_pixels_stay_on_disk_until_they_are_read(night_dataset: Dataset) -> None:
    alerts = night_dataset["train"].read()
    assert len(pickle.dumps(night_dataset)) < 1000 < alerts.cutouts.nbytes
    assert np.array_equal(
        pickle.loads(pickle.dumps(night_dataset))["train"].read().cutouts, alerts.cutouts, equal_nan=True
    )


def test_alerts_per_source_are_limited_and_smaller_fractions_are_subsets(night_dataset: Dataset) -> None:
    night = Dataset.open(night_dataset.directory)
    night.object_id = np.array([f"ZTF{i % 20}" for i in range(len(night.alert_id))])
    night.split = np.zeros_like(night.split)
    view = night["train"]
    chosen = chosen_to_train(view, 2, Recipe(max_alerts_per_source=2))
    assert np.unique(chosen.object_id, return_counts=True)[1].tolist() == [2] * 20
    half, tenth = (set(chosen_to_train(view, 2, Recipe(fraction=share)).object_id) for share in (0.5, 0.1))
    assert tenth < half < set(view.object_id)
    assert len(half) in {10, 11}


def test_damage_and_other_arguments_are_refused(
    night_packets: Path, night_labels: Labels, night_dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="was started with other arguments"):
        build_dataset([night_packets], night_labels, night_dataset.directory, cutout_size=30)
    with pytest.raises(DatasetError, match="not a data set"):
        Dataset.open(tmp_path)
    dataset = build_dataset([night_packets], night_labels, tmp_path / "set")
    shard = tmp_path / "set" / SHARDS / dataset.card.shards[0].file
    os.truncate(shard, 1000)
    with pytest.raises(DatasetError, match="has 1000 bytes instead of"):
        Dataset.open(tmp_path / "set")
    (tmp_path / "set" / CARD).unlink()
    with pytest.raises(DatasetError, match="not a complete shard"):
        build_dataset([night_packets], night_labels, tmp_path / "set")
    index = night_dataset.directory / INDEX
    index.rename(tmp_path / INDEX)
    with pytest.raises(DatasetError, match="cannot be read"):
        Dataset.open(night_dataset.directory)
    table = parquet.read_table(tmp_path / INDEX)
    parquet.write_table(table.set_column(2, "label", pa.array(1 - night_dataset.label)), index)
    with pytest.raises(DatasetError, match=r"index\.parquet: its sha256 is not the one in .*dataset\.yaml"):
        Dataset.open(night_dataset.directory)
    (tmp_path / INDEX).replace(index)


def test_the_version_depends_on_the_content_only(
    night_packets: Path, night_labels: Labels, night_dataset: Dataset, tmp_path: Path
) -> None:
    again = build_dataset([night_packets], night_labels, tmp_path / "again")
    other = build_dataset([night_packets], night_labels, tmp_path / "other", split=SplitRule(seed=1))
    assert again.card.sha256 == night_dataset.card.sha256 != other.card.sha256
    card = yaml.safe_load((tmp_path / "again" / CARD).read_text())
    assert card["counts"]["real"]["train"] == int(((again.label == 1) & (again.split == 0)).sum())


def mixed_set(tmp_path: Path, planes: list[Plane]) -> tuple[Dataset, list[Packet]]:
    """Return a data set of simulated alerts of both surveys, and their packets."""
    alerts = [alert for survey in ("ztf", "lsst") for alert in simulate_night(30, seed=7, survey=survey)]
    for alert in alerts:
        (tmp_path / f"{alert.survey}{alert.alert_id}.avro").write_bytes(alert.packet)
    table = tmp_path / "labels.csv"
    table.write_text("alert_id,half\n" + "".join(f"{alert.alert_id},{'ab'[k % 2]}\n" for k, alert in enumerate(alerts)))
    files = sorted(tmp_path.glob("*.avro"))
    dataset = build_dataset(
        files,
        read_labels(table, "half"),
        tmp_path / "set",
        cutout_size=31,
        planes=planes,
        schema_registry=str(SCHEMAS),
    )
    return dataset, list(read_packets(files))


def test_planes_are_stored_as_decoded_and_shown_as_served(tmp_path: Path) -> None:
    dataset, packets = mixed_set(tmp_path, ["variance", "psf"])
    assert dataset.card.planes == ("variance", "psf")
    served, _ = Decoder(str(SCHEMAS), cutout_size=31, planes=["variance", "psf"]).decode(packets)
    assert served.variance is not None
    assert served.psf is not None
    images = ImageInput(size=31, order=("science", "difference"), normalisation="snr", padding=0)
    expected = prepare_images(served.cutouts, served.cutout_box, images, served.variance)
    row_of = {alert: row for row, alert in enumerate(served.alert_id.tolist())}
    for split in SPLITS:
        view = dataset[split]
        rows = [row_of[alert] for alert in view.alert_id.tolist()]
        raw = view.read().raw
        assert raw.survey is not None
        assert np.array_equal(raw.survey, served.survey[rows])
        assert np.array_equal(raw.variance, served.variance[rows], equal_nan=True)
        assert np.array_equal(raw.psf, served.psf[rows], equal_nan=True)
        shown, _, _ = ShownAlerts(view, Inputs(images=images)).__getitems__(range(len(view)))
        assert np.array_equal(shown.numpy(), expected[rows])


def test_a_data_set_without_planes_gives_none_for_lsst_and_nan_for_ztf(tmp_path: Path, night_dataset: Dataset) -> None:
    dataset, _ = mixed_set(tmp_path, [])
    assert dataset["train"].read().variance is None
    ztf = night_dataset["train"].read()
    assert ztf.variance is not None
    assert ztf.psf is not None
    assert ztf.variance.shape == ztf.cutouts.shape
    assert np.isnan(ztf.variance).all()
    assert np.isnan(ztf.psf).all()
    assert "planes" not in yaml.safe_load((night_dataset.directory / "build.yaml").read_text())


def test_planes_that_a_network_needs_and_a_data_set_lacks_are_named(tmp_path: Path, night_dataset: Dataset) -> None:
    images = ImageInput(size=31, order=("science",), normalisation="snr", padding=0)
    psf = PsfInput(size=31, order=("difference",), normalisation="peak", fallback_fwhm={"lsst": 5})
    dataset, _ = mixed_set(tmp_path, ["variance"])
    assert dataset.missing_planes(Inputs(images=images)) == ()
    assert dataset.missing_planes(Inputs(images=images, psf=psf)) == ("psf",)
    assert night_dataset.missing_planes(Inputs(images=images, psf=psf)) == ()  # ZTF publishes none
