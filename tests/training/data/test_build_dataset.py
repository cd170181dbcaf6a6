"""Building a data set: joined labels, no object in two splits, and resumption after a kill."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing import parquet
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.labels import Labels, parse_rule, read_labels
from broker_filter.simulate import SimulatedAlert
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.expressions import ExpressionError
from broker_filter.watch.labels import Label, LabelTable
from training.__main__ import main
from training.data import build_dataset as building
from training.data.build_dataset import assign_splits, build_dataset
from training.data.datasets import SHARDS, Dataset, SplitRule
from training.errors import DatasetError


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


def test_labels_of_a_person_at_the_page_of_alerts_are_taken(
    night_packets: Path, alerts_of_the_night: list[SimulatedAlert], tmp_path: Path
) -> None:
    table = LabelTable(tmp_path / "labels.csv")
    for k, alert in enumerate(alerts_of_the_night[:30]):
        name = "" if k % 10 == 0 else "real" if alert.is_real else "bogus"  # some are interesting, without a label
        table.set(Label(alert.alert_id, alert.object_id, alert.survey, name, not name, 'a, "note"', ""))
    command = ["build-dataset", str(night_packets), "--labels", str(tmp_path / "labels.csv"), "--label", "label"]
    main([*command, "--class", "bogus=bogus", "--class", "real=real", "--out", str(tmp_path / "set")])
    dataset = Dataset.open(tmp_path / "set")
    truth = {alert.alert_id: alert.is_real for alert in alerts_of_the_night}
    assert len(dataset.alert_id) == 27
    assert [truth[alert] for alert in dataset.alert_id.tolist()] == dataset.label.astype(bool).tolist()
    assert len(read_labels(tmp_path / "labels.csv", "interesting").label_of) == 30


def test_rows_of_a_table_give_the_same_data_set_as_their_packets(
    night_parquet: Path, night_labels: Labels, night_dataset: Dataset, tmp_path: Path
) -> None:
    of_rows = build_dataset([night_parquet], night_labels, tmp_path / "rows")
    assert of_rows.card == night_dataset.card  # it has the sha256 of every shard


class CutShort:
    """The packets of inputs, of which the reading is interrupted after some batches."""

    def __init__(self, inputs: list[Path], wanted: Collection[str]) -> None:
        self._packets = read_packets(inputs, wanted=wanted)

    def batches(self, size: int) -> Iterator[Sequence[Packet]]:
        yield from islice(self._packets.batches(size), 5)
        raise KeyboardInterrupt


@pytest.mark.parametrize("stored", ["packets", "rows"])
def test_a_killed_build_resumes_and_gives_the_same_result(
    stored: str,
    night_packets: Path,
    night_parquet: Path,
    night_labels: Labels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    night = {"packets": night_packets, "rows": night_parquet}[stored]
    monkeypatch.setattr(building, "PACKETS_AT_ONCE", 8)
    monkeypatch.setattr(parquet, "MOST_ROWS", 8)
    monkeypatch.setattr(parquet, "ROWS_AT_A_TIME", 8)
    monkeypatch.setattr(building, "ALERTS_PER_SHARD", 16)
    whole = build_dataset([night], night_labels, tmp_path / "whole")
    assert len(whole.card.shards) > 2
    with monkeypatch.context() as patch:
        patch.setattr(building, "read_packets", CutShort)
        with pytest.raises(KeyboardInterrupt):
            build_dataset([night], night_labels, tmp_path / "killed")
    with pytest.raises(DatasetError, match="run the same build-dataset again"):
        Dataset.open(tmp_path / "killed")
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed" / SHARDS).iterdir()}
    assert written
    monkeypatch.setattr(building, "PACKETS_AT_ONCE", 5)  # the build resumes in the middle of a batch
    monkeypatch.setattr(parquet, "MOST_ROWS", 5)
    monkeypatch.setattr(parquet, "ROWS_AT_A_TIME", 5)
    resumed = build_dataset([night], night_labels, tmp_path / "killed")
    assert resumed.alert_id.tolist() == whole.alert_id.tolist()
    assert resumed.label.tolist() == whole.label.tolist()
    assert all((tmp_path / "killed" / SHARDS / name).stat().st_mtime_ns == time for name, time in written.items())


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
    decoder = Decoder(open_registry(None), columns=("magpsf", "isdiffpos", "designation"))
    alerts, _ = decoder.decode(list(read_packets([night_packets])))
    assert alerts.designation is not None
    unknown = np.array([designation is None for designation in alerts.designation])
    wanted = (alerts.column("magpsf") < 19) & (alerts.column("isdiffpos") == 1) & unknown
    assert 10 < wanted.sum() < 50
    assert not unknown.all()
    where = "magpsf < 19 and isdiffpos == 1 and isnull(designation)"
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
