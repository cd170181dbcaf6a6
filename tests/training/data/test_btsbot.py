"""BTSbot's published training set: the same data set as from the packets of its alerts, and errors in its files."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
import torch
import yaml
from astropy.io import fits
from pyarrow import parquet

from broker_filter.config import Runtime
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.bundle import Architecture
from broker_filter.scoring.labels import read_labels
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import open_model
from tests.packets.test_btsbot_columns import expected
from training.__main__ import main
from training.data import build_dataset as building
from training.data.btsbot import CLASSES, COLUMNS, FILE_NAMES, SIZE
from training.data.build_dataset import build_dataset, build_published
from training.data.datasets import SPLITS, Dataset
from training.errors import DatasetError
from training.recipe import PUBLISHED_IMAGES, Fit
from training.vision.fit import BUNDLE, fit
from training.vision.study import Study, configure, plan

pytestmark = pytest.mark.filterwarnings("ignore::astropy.io.fits.verify.VerifyWarning")  # of some shared packets

VERSION = "v12_N100"
LOOKED_AT, EVERY = 400, 3
"""Number of shared packets that are read. Every third is used, and all with a stamp at the edge of an image."""
BRIGHT = 19.0
"""Alerts brighter than this magnitude have the label 1."""
STUDY = Path(__file__).parents[3] / "training" / "vision" / "studies" / "btsbot.yaml"
TINY = Architecture(name="btsbot_cnn", arguments={"channels": (4, 8), "kernel": 3, "hidden": (16, 8)})
OTHER_COLUMNS = {"jd": 2460000.5, "fid": 1, "is_SN": False, "source_set": "trues", "acai_h": 0.5}
"""Columns that the published tables also have, and that are not read."""


def triplet_of(record: dict[str, Any]) -> np.ndarray:
    """Return the triplet [63, 63, 3] of a packet as described by BTSbot's authors, computed with astropy."""
    triplet = np.zeros((SIZE, SIZE, 3))
    for c, name in enumerate(("Science", "Template", "Difference")):
        with fits.open(io.BytesIO(gzip.decompress(record[f"cutout{name}"]["stampData"]))) as hdus:
            stamp = np.nan_to_num(hdus[0].data.astype(np.float32))
        with np.errstate(over="ignore"):  # a pixel of 3.4e38 has an infinite norm
            stamp = stamp / np.linalg.norm(stamp)
        rows, columns = stamp.shape
        triplet[..., c] = np.float32(1e-9)
        triplet[:rows, :columns, c] = stamp
    return triplet


def usable(record: dict[str, Any]) -> bool:
    """Return whether the published set has the alert: no cutout is empty, and every norm is finite."""
    triplet = triplet_of(record)
    return bool(np.isfinite(triplet).all() and (np.abs(triplet) > 1e-8).any(axis=(0, 1)).all())


class Published:
    """Shared alerts in the published layout, and a data set of the same alerts from their packets."""

    def __init__(self, packets: list[bytes], directory: Path) -> None:
        self.folder = directory / "published"
        self.folder.mkdir()
        self.packets = packets
        records = {r["candidate"]["candid"]: r for r in (next(fastavro.reader(io.BytesIO(data))) for data in packets)}
        labels = [f"{i},{int(r['candidate']['magpsf'] < BRIGHT)}" for i, r in records.items()]
        (directory / "labels.csv").write_text("\n".join(["candid,label", *labels]))
        for i, data in zip(records, packets, strict=True):
            (directory / f"{i}.avro").write_bytes(data)
        rules = building.parse_rule("not_bts=0"), building.parse_rule("bts=1")
        self.of_packets = build_dataset(
            [directory / f"{i}.avro" for i in records],
            read_labels(directory / "labels.csv", "label", rules),
            directory / "of_packets",
            columns=COLUMNS,
        )
        for split in SPLITS:
            self._write(split, [records[i] for i in self.of_packets[split].alert_id.tolist()])

    def _write(self, split: str, records: list[dict[str, Any]]) -> None:
        name = FILE_NAMES[split]  # type: ignore[index]
        np.save(self.folder / f"{name}_triplets_{VERSION}.npy", np.stack([triplet_of(r) for r in records]))
        with (self.folder / f"{name}_cand_{VERSION}.csv").open("w", newline="") as file:
            names = ["objectId", "candid", "label", *OTHER_COLUMNS, *sorted(COLUMNS)]
            table = csv.DictWriter(file, names)
            table.writeheader()
            for r in records:
                of_alert = {**r["candidate"], **expected(r)}
                row = {"objectId": r["objectId"], "candid": of_alert["candid"], **OTHER_COLUMNS}
                row |= {column: of_alert.get(column) for column in COLUMNS}
                table.writerow(row | {"label": int(of_alert["magpsf"] < BRIGHT)})


@pytest.fixture(scope="module")
def published(ztf_packets: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Some shared ZTF alerts, among them those at the edge of an image."""
    everything = [Packet(data, FilePosition("test")) for _, data in ztf_packets[:LOOKED_AT]]
    alerts, _ = Decoder(open_registry(None)).decode(everything)
    edge = (alerts.cutout_box[..., 2:] < SIZE).any(axis=(1, 2))
    assert edge.any()
    rows = np.flatnonzero(edge | (np.arange(len(edge)) % EVERY == 0))
    packets = {int(alerts.alert_id[row]): alerts.packets[row].data for row in rows.tolist()}
    chosen = [data for data in packets.values() if usable(next(fastavro.reader(io.BytesIO(data))))]
    return Published(chosen, tmp_path_factory.mktemp("btsbot"))


@pytest.fixture(scope="module")
def dataset(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The data set of the published layout."""
    return build_published(published.folder, VERSION, tmp_path_factory.mktemp("sets") / "btsbot")


@pytest.mark.shared
def test_published_set_and_packets_give_the_same_data_set(published: Published, dataset: Dataset) -> None:
    assert dataset.card.classes == published.of_packets.card.classes == CLASSES
    assert dataset.card.counts == published.of_packets.card.counts
    assert (dataset.card.columns, dataset.card.normalised, dataset.card.split) == (COLUMNS, "l2_image", None)
    for split in SPLITS:
        ours, theirs = published.of_packets[split].read(), dataset[split].read()
        for name in ("alert_id", "object_id", "label", "metadata", "cutout_box", "survey"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name), name)
        images, expected_images = (
            prepare_images(alerts.cutouts, alerts.cutout_box, PUBLISHED_IMAGES) for alerts in (theirs, ours)
        )
        np.testing.assert_allclose(images, expected_images, rtol=2e-6, atol=1e-12)
        stamps = theirs.cutouts != 0
        np.testing.assert_allclose(images[stamps], theirs.cutouts[stamps], rtol=1e-6)  # not normalised twice
    assert np.isnan(dataset["train"].read().metadata).any()


@pytest.mark.shared
def test_a_run_of_the_study_scores_packets_as_its_test_split(
    published: Published, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study in the repository, with a small network in place of BTSbot's, metadata, one regimen and one epoch."""
    study = yaml.safe_load(STUDY.read_text())
    network = study["models"]["btsbot_cnn"]
    network["architecture"]["arguments"] |= TINY.arguments | {"metadata_hidden": [8, 4]}
    network["recipe"] |= {"epochs": 1}
    study |= {"models": {"btsbot_cnn": network}, "regimens": {"scratch": {}}, "fractions": [1.0], "seeds": [1]}
    del study["inputs"]["images"]
    study["recipe"] |= {"warm_up_epochs": 0}
    study["hardware"] = {"accelerator": "cpu", "devices": 1, "threads": 1}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "btsbot").symlink_to(dataset.directory)
    (tmp_path / "btsbot.yaml").write_text(yaml.safe_dump(study))
    assert main(["study", "btsbot.yaml"]) == 0
    [finished] = (tmp_path / "study" / "btsbot_runs" / "runs").iterdir()
    predictions = parquet.read_table(finished / "predictions.parquet")
    said = dict(zip(predictions["alert_id"].to_pylist(), predictions["probability.bts"].to_pylist(), strict=True))
    assert said.keys() == set(published.of_packets["test"].alert_id.tolist())
    model = open_model(str(finished / BUNDLE), Runtime(engine="onnxruntime", device="cpu"))
    decoder = Decoder(open_registry(None), columns=COLUMNS)
    alerts, _ = decoder.decode([Packet(data, FilePosition("test")) for data in published.packets])
    served = model.parts[0].run(raw_alerts(alerts))["probabilities"][:, 0]
    ids = alerts.alert_id.tolist()
    assert served[[ids.index(i) for i in said]] == pytest.approx(list(said.values()), abs=1e-5)
    assert np.ptp(served) > 0


def test_the_study_of_the_published_set_has_every_network_and_regimen() -> None:
    study = Study.model_validate(yaml.safe_load(STUDY.read_text()))
    runs = list(plan(study))
    assert len(runs) == 3 * 3 * 2 * (3 + 2 + 2)
    assert study.inputs == {"images": (), "metadata": COLUMNS}
    for one in (one for one in runs if (one.choice.regimen, one.choice.fraction, one.seed) == ("scratch", 1, 1)):
        config = configure(study, one)
        assert ("fusion" in config.architecture.arguments) == bool(config.metadata)
        arguments = {**config.architecture.arguments, "metadata": len(config.metadata)}
        with torch.device("meta"):
            build_network(Architecture(name=config.architecture.name, arguments=arguments))


@pytest.mark.shared
def test_noise_cannot_be_estimated_in_published_cutouts(dataset: Dataset, tmp_path: Path) -> None:
    images = PUBLISHED_IMAGES.model_copy(update={"normalisation": "snr"})
    config = Fit(name="mine", dataset=dataset.directory, out=tmp_path, architecture=TINY, images=images)
    with pytest.raises(DatasetError, match=r"cutouts were published divided by their L2 norm.*choose l2_image"):
        fit(config)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a set of random normalised cutouts: 5 training, 4 validation and 3 test alerts."""
    folder = tmp_path / "small"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 5), ("val", 4), ("test", 3)):
        pixels = rng.standard_normal((n, SIZE, SIZE, 3)).astype(np.float32)
        np.save(folder / f"{name}_triplets_v1.npy", pixels / np.linalg.norm(pixels, axis=(1, 2), keepdims=True))
        rows = [[f"ZTF{name}{i}", i % 2, *rng.random(len(COLUMNS)).round(3).tolist()] for i in range(n)]
        with (folder / f"{name}_cand_v1.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["objectId", "label", *COLUMNS], *rows])
    return folder


def test_command_keeps_the_published_splits(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-dataset", str(small), "--btsbot", "v1", "--out", str(tmp_path / "set")]) == 0
    dataset = Dataset.open(tmp_path / "set")
    assert dataset.card.counts == {
        "not_bts": {"train": 3, "validation": 2, "test": 2},
        "bts": {"train": 2, "validation": 2, "test": 1},
    }
    assert "bts  train 2  validation 2  test 1" in capsys.readouterr().out
    assert dataset.alert_id.tolist() == list(range(12))  # the tables have no candid
    assert dataset["validation"].object_id.tolist() == [f"ZTFval{i}" for i in range(4)]


def test_an_interrupted_build_resumes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "ALERTS_PER_SHARD", 2)
    whole = build_published(small, "v1", tmp_path / "whole")
    write, left = building._write_shard, iter([True] * 3)

    def write_three(*arguments: Any) -> Path:
        if not next(left, False):
            raise SystemExit
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(building, "_write_shard", write_three)
        with pytest.raises(SystemExit):
            build_published(small, "v1", tmp_path / "resumed")
    assert len(list((tmp_path / "resumed" / "shards").iterdir())) == 3
    assert build_published(small, "v1", tmp_path / "resumed").card.sha256 == whole.card.sha256
    np.save(small / "train_triplets_v2.npy", np.load(small / "train_triplets_v1.npy"))
    with pytest.raises(DatasetError, match="was started with other arguments"):
        build_published(small, "v2", tmp_path / "resumed")


def test_a_source_in_two_splits_is_reported(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = small / "test_cand_v1.csv"
    file.write_text(file.read_text().replace("ZTFtest0", "ZTFtrain3"))
    build_published(small, "v1", tmp_path / "set")
    assert "1 objects are in more than one split as published, for example ZTFtrain3" in caplog.text


def _array(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(file, change(np.load(file)), allow_pickle=True)


def _table(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "val_cand_v1.csv").unlink(), r"val_cand_v1.csv: no such file. Versions .* split val .*: v1$"),
        (lambda f: (f / "val_triplets_v1.npy").unlink(), r"val_triplets_v1.npy: no such file.*: none$"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: a[:-1]), "holds 3 triplets, but .* has 4 rows"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: a[:, 1:]), r"holds \[4, 62, 63, 3\], not triplets"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: a[:0]), "holds 0 triplets; there must be from 1"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: a.astype(np.float16)), "holds float16; .* float32 or"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: (a * 100).astype(np.int32)), "holds int32"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: a.astype(object)), "array of numbers"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: a * 3), "science cutout of row 0 has the L2 norm 3,"),
        (lambda f: (f / "val_triplets_v1.npy").write_bytes(b"no array"), "cannot be read as an array of numbers"),
        (lambda f: _array(f / "val_triplets_v1.npy", lambda a: a[0, 0, 0, 0]), r"holds \[\], not triplets"),
        (lambda f: _table(f / "val_cand_v1.csv", "sgscore2", "sgscore9"), "val_cand_v1.csv: no column sgscore2;"),
        (lambda f: _table(f / "val_cand_v1.csv", "objectId", "name"), "val_cand_v1.csv: no column objectId;"),
        (lambda f: _table(f / "val_cand_v1.csv", "ZTFval2,0", "ZTFval2,2"), "the label of row 2 is 2, not 0 or 1"),
        (lambda f: _table(f / "val_cand_v1.csv", "ZTFval2,0", ",0"), "a row has no objectId"),
        (lambda f: _table(f / "val_cand_v1.csv", "ZTFval2,0,0", "ZTFval2,0,x"), "cannot be read as a table: .*"),
        (
            lambda f: _table(f / "val_cand_v1.csv", ",1,0.", ",0,0."),
            r"split validation has no alert .* label 1 \(bts\)",
        ),
    ],
)
def test_damaged_files_are_refused(
    damage: Callable[[Path], object], complaint: str, small: Path, tmp_path: Path
) -> None:
    damage(small)
    with pytest.raises(DatasetError, match=complaint):
        build_published(small, "v1", tmp_path / "set")


def test_a_truncated_array_is_refused(small: Path, tmp_path: Path) -> None:
    file = small / "test_triplets_v1.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=r"test_triplets_v1\.npy: cannot be read as an array of numbers"):
        build_published(small, "v1", tmp_path / "set")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--btsbot", "v1", "--labels", "x.csv"], "--labels cannot be combined with --btsbot"),
        (["--btsbot", "v1", "--where", "magpsf > 1"], "--where cannot be combined with --btsbot"),
        (["more", "--btsbot", "v1"], "--btsbot takes one folder, not 2 inputs"),
        ([], "--labels is needed for packets"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(
    options: list[str], complaint: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-dataset", str(small), *options, "--out", str(tmp_path / "set")]) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_version_names_those_that_are_there(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-dataset", str(small), "--btsbot", "v7", "--out", str(tmp_path / "set")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("Versions of the split train in this folder: v1")
