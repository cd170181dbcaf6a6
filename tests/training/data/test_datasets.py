"""Data sets: contents as in the service, no source in two splits, and resumption after a kill."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Iterator
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
from broker_filter.scoring.labels import Labels, parse_rule, read_labels
from broker_filter.scoring.preprocess import prepare_images, prepare_metadata
from broker_filter.simulate import SCHEMAS, SimulatedAlert, simulate_night
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.expressions import ExpressionError
from training.__main__ import main
from training.data import build_dataset as building
from training.data.build_dataset import assign_splits, build_dataset
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


def test_labels_are_joined_by_alert_and_by_object(
    night_packets: Path, alerts_of_the_night: list[SimulatedAlert], night_dataset: Dataset, tmp_path: Path
) -> None:
    truth = {alert.alert_id: alert.is_real for alert in alerts_of_the_night}
    assert [truth[alert] for alert in night_dataset.alert_id.tolist()] == night_dataset.label.astype(bool).tolist()
    by_object = tmp_path / "objects.csv"
    names = sorted({alert.object_id for alert in alerts_of_the_night})
    by_object.write_text("objectId,half\n" + "\n".join(f"{name},{'ab'[i % 2]}" for i, name in enumerate(names)))
    dataset = build_dataset([night_packets], read_labels(by_object, "half"), tmp_path / "set")
    expected = [names.index(name) % 2 for name in dataset.object_id.tolist()]
    assert dataset.label.tolist() == expected
    assert dataset.card.classes == ("a", "b")


def test_a_killed_build_resumes_and_gives_the_same_result(
    night_packets: Path, night_labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "PACKETS_AT_ONCE", 8)
    monkeypatch.setattr(building, "ALERTS_PER_SHARD", 16)
    whole = build_dataset([night_packets], night_labels, tmp_path / "whole")
    assert len(whole.card.shards) > 2

    def cut_short(inputs: list[Path]) -> Iterator[Packet]:
        for i, packet in enumerate(read_packets(inputs)):
            if i == 40:
                raise KeyboardInterrupt
            yield packet

    with monkeypatch.context() as patch:
        patch.setattr(building, "read_packets", cut_short)
        with pytest.raises(KeyboardInterrupt):
            build_dataset([night_packets], night_labels, tmp_path / "killed")
    with pytest.raises(DatasetError, match="run the same build-dataset again"):
        Dataset.open(tmp_path / "killed")
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed" / SHARDS).iterdir()}
    assert written
    resumed = build_dataset([night_packets], night_labels, tmp_path / "killed")
    assert resumed.card == whole.card
    assert all((tmp_path / "killed" / SHARDS / name).stat().st_mtime_ns == time for name, time in written.items())


def test_pixels_stay_on_disk_until_they_are_read(night_dataset: Dataset) -> None:
    alerts = night_dataset["train"].read()
    assert len(pickle.dumps(night_dataset)) < 1000 < alerts.cutouts.nbytes
    assert np.array_equal(
        pickle.loads(pickle.dumps(night_dataset))["train"].read().cutouts, alerts.cutouts, equal_nan=True
    )


def objects_and_labels(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return objects with up to three alerts each; a tenth of the objects are in the rarer class."""
    rng = np.random.default_rng(1)
    object_id = np.repeat([f"ZTF{i}" for i in range(n)], rng.integers(1, 4, n))
    return object_id, (np.array([int(name[3:]) for name in object_id]) % 10 == 0).astype(np.int64)


def test_no_source_is_in_two_splits_and_every_class_is_in_each() -> None:
    object_id, label = objects_and_labels()
    split = assign_splits(object_id, label, ("a", "b"), SplitRule(seed=3))
    sides = [set(object_id[split == side]) for side in range(3)]
    assert sum(map(len, sides)) == 400
    assert [len(side) for side in sides] == [324, 36, 40]
    assert all(set(label[split == side]) == {0, 1} for side in range(3))


def test_at_least_one_source_is_for_training() -> None:
    for n in range(3, 12):
        names = np.array([f"ZTF{i}" for i in range(2 * n)])
        split = assign_splits(names, np.arange(2 * n) % 2, ("a", "b"), SplitRule(validation=0.49, test=0.49))
        assert all(np.bincount(split[i::2], minlength=3).min() > 0 for i in (0, 1))


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    object_id, label = objects_and_labels()
    split = assign_splits(object_id, label, ("a", "b"), SplitRule(seed=3))
    shuffled = np.random.default_rng(2).permutation(len(label))
    assert np.array_equal(
        assign_splits(object_id[shuffled], label[shuffled], ("a", "b"), SplitRule(seed=3)), split[shuffled]
    )
    assert not np.array_equal(assign_splits(object_id, label, ("a", "b"), SplitRule(seed=4)), split)


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


def test_unusable_labels_are_refused(
    night_packets: Path,
    alerts_of_the_night: list[SimulatedAlert],
    night_table: Path,
    tmp_path: Path,
) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("candid,class\n1,a\n2,b\n")
    with pytest.raises(DatasetError, match="none of its 2 labels matches an alert"):
        build_dataset([night_packets], read_labels(table, "class"), tmp_path / "none")
    table.write_text(night_table.read_text() + "7,sky\n")
    labels = read_labels(table, "truth", [parse_rule("bogus=detector"), parse_rule("real=sky")])
    with pytest.raises(DatasetError, match=r"1 labels have no alert among the inputs, for example candid 7:"):
        build_dataset([night_packets], labels, tmp_path / "set")
    assert len(build_dataset([night_packets], labels, tmp_path / "set", allow_unmatched=True).alert_id) == 60
    lonely = read_labels(
        night_table,
        "candid",
        [parse_rule(f"one={alerts_of_the_night[0].alert_id}"), parse_rule("rest=0..1e20")],
    )
    with pytest.raises(DatasetError, match="class one has 1 source, but each of train, validation, test needs one"):
        build_dataset([night_packets], lonely, tmp_path / "lonely")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_inputs_without_an_alert_are_refused(kind: str, night_labels: Labels, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    if kind == "folder":
        empty.mkdir()
    else:
        with tarfile.open(empty, "w:gz"):
            pass
    with pytest.raises(DatasetError, match=r"empty: no alert was read: "):
        build_dataset([empty], night_labels, tmp_path / "set")
    no_alert = tmp_path / "notes.txt"
    no_alert.write_text("no alert")
    with pytest.raises(DatasetError, match=r"no alert was read: none of 1 inputs could be decoded \(\w+ 1\)"):
        build_dataset([no_alert], night_labels, tmp_path / "set")  # there is nothing to resume in this directory


def test_alerts_are_chosen_by_a_filter(
    night_packets: Path, night_labels: Labels, night_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alerts, _ = Decoder(open_registry(None)).decode(list(read_packets([night_packets])))
    wanted = (alerts.column("magpsf") < 19) & (alerts.column("isdiffpos") == 1)
    assert 10 < wanted.sum() < 50
    where = "magpsf < 19 and isdiffpos == 1"
    monkeypatch.setattr(building, "ALERTS_PER_SHARD", 8)
    monkeypatch.setattr(building, "PACKETS_AT_ONCE", 8)
    arguments = ["build-dataset", str(night_packets), "--labels", str(night_table), "--label", "truth"]
    classes = ["--class", "bogus=detector", "--class", "real=sky"]
    assert main([*arguments, *classes, "--where", where, "--out", str(tmp_path / "set")]) == 0
    dataset = Dataset.open(tmp_path / "set")
    assert set(dataset.alert_id.tolist()) == set(alerts.alert_id[wanted].tolist())
    assert dataset.card.where == where
    with pytest.raises(DatasetError, match="was started with other arguments"):
        build_dataset([night_packets], night_labels, tmp_path / "set", where="magpsf < 18")
    with pytest.raises(DatasetError, match=r"none of the 60 alerts passes --where 'magpsf < 0'"):
        build_dataset([night_packets], night_labels, tmp_path / "none", where="magpsf < 0")
    with pytest.raises(ExpressionError, match="unknown name 'magpfs'; did you mean 'magpsf'"):
        build_dataset([night_packets], night_labels, tmp_path / "misspelt", where="magpfs < 18")


def test_undecodable_packets_are_reported(
    night_packets: Path, night_labels: Labels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "short.avro").write_bytes(next(night_packets.iterdir()).read_bytes()[:2000])
    (damaged / "text.avro").write_bytes(b"no alert")
    build_dataset([night_packets, damaged], night_labels, tmp_path / "set")
    assert "2 inputs that could not be decoded are skipped: " in caplog.text


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
