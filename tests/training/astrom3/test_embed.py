"""Embeddings of simulated variable stars: similar stars, misclassified and odd stars, and a map."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.image import imread
from pyarrow import parquet

from broker_filter.anomalies.reference import read_reference
from broker_filter.cli import main as broker_filter
from broker_filter.pictures.embedding_map import draw_classes
from broker_filter.streaming import build_reference
from training.__main__ import main
from training.astrom3 import simulate
from training.astrom3.model.network import CLASSES
from training.astrom3.recipe import AstroM3Run
from training.astrom3.stars import Split
from training.astrom3.train import CHECKPOINT, train

from .conftest import ONE_CORE, SEED, SMALL

SHARES = {"EW": 0.3, "SR": 0.3, "RRAB": 0.25, "M": 0.15}
"""Fewer classes than in a published set, so that few stars and epochs separate them."""
COUNTS: dict[Split, int] = {"train": 120, "validation": 20, "test": 60}
MISLABELLED = 5
"""Row of the test split whose label is changed after the training: no network has seen it."""
SUSPECTS = 6
"""Suspects that a person looks at: 3 % of the stars."""


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stars of four classes."""
    directory = tmp_path_factory.mktemp("sky")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "SHARES", SHARES)
        simulate.write_stars(directory, SEED, COUNTS)
    return directory


@pytest.fixture(scope="module")
def checkpoint(sky: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AstroM3 with a classifier on all modalities, trained for some seconds."""
    out = tmp_path_factory.mktemp("all")
    recipe = {"epochs": 12, "warm_up_epochs": 1, "batch": 16, "learning_rate": 0.004, "patience": 20}
    without = dict.fromkeys(("p_dropout", "s_dropout", "m_dropout"), 0.0)
    train(
        AstroM3Run(
            mode="all",
            stars=sky,
            out=out,
            seed=SEED,
            hardware=ONE_CORE,
            logs=(),
            recipe={**recipe, "betas": (0.9, 0.999), "weight_decay": 0.0},
            arguments={**SMALL, **without},
        )
    )
    return out / CHECKPOINT


@pytest.fixture(scope="module")
def file(sky: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of all stars; one star of the test split has a wrong label."""
    directory = tmp_path_factory.mktemp("embedded")
    (directory / "stars" / f"full_{SEED}").mkdir(parents=True)
    for split in COUNTS:
        table = parquet.read_table(sky / f"full_{SEED}" / f"{split}.parquet")
        label = table["label"].to_pylist()
        if split == "test":
            label[MISLABELLED] = wrong(label[MISLABELLED])
        column = table.schema.get_field_index("label")
        parquet.write_table(
            table.set_column(column, "label", pa.array(label)),
            directory / "stars" / f"full_{SEED}" / f"{split}.parquet",
        )
    out = directory / "stars.safetensors"
    arguments = ["astrom3-embed", str(directory / "stars"), "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main([*arguments, "--seed", str(SEED)]) == 0
    return out


def wrong(name: str) -> str:
    return "M" if name != "M" else "EW"


def similar(file: Path, star: int, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Return the lines that `similar` prints for a star: heading, column names and stars, as words."""
    assert broker_filter(["similar", "--id", str(star), "--reference", str(file), "--count", "8"]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_set_holds_every_star_with_its_label(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = read_reference(file)
    assert reference.stars is not None
    assert not reference.surveys
    alerts = reference.stars.alerts
    assert alerts.alert_id.tolist() == list(range(200))
    assert alerts.object_id[[0, 139, 140]].tolist() == ["train:0", "validation:19", "test:0"]
    assert np.linalg.norm(alerts.embedding, axis=1) == pytest.approx(1, abs=1e-5)
    assert {reference.card.classes[i] for i in reference.stars.label.tolist()} == set(SHARES)
    assert broker_filter(["reference", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "made with      astrom3" in shown
    assert "modalities     photometry, spectra, metadata" in shown


def test_stars_like_an_rr_lyrae_are_mostly_rr_lyrae(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For stars of the test split, which the network has not seen; a quarter of all stars are RR Lyrae."""
    stars = read_reference(file).stars
    assert stars is not None
    lyrae = np.flatnonzero((stars.label == CLASSES.index("RRAB")) & (stars.alerts.alert_id >= 140))
    assert len(lyrae) >= 10
    found = []
    for star in lyrae[:6].tolist():
        heading, names, *listed = similar(file, star, capsys)
        assert heading[:5] == ["stars", str(star), "of", f"test:{star - 140}", "(RRAB):"]
        assert names == ["distance", "alert", "class", "object"]
        assert len(listed) == 8
        assert str(star) not in [row[1] for row in listed]
        assert [float(row[0]) for row in listed] == sorted(float(row[0]) for row in listed)
        found += [row[2] for row in listed]
    assert found.count("RRAB") / len(found) > 0.7


def test_a_mislabelled_star_is_among_the_first_suspects(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "suspects.csv"
    assert main(["suspects", "--reference", str(file), "--out", str(out)]) == 0
    with out.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 200
    [place] = [i for i, row in enumerate(rows) if row["object_id"] == f"test:{MISLABELLED}"]
    assert place < SUSPECTS
    assert rows[place]["label"] == wrong(rows[place]["nearest"])
    assert f"test:{MISLABELLED}" in capsys.readouterr().out


def test_odd_stars_are_far_from_every_class(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "odd.csv"
    assert main(["suspects", "--odd", "--reference", str(file), "--out", str(out)]) == 0
    with out.open(newline="") as table:
        rows = list(csv.DictReader(table))
    nearest = [float(row["nearest_distance"]) for row in rows]
    assert nearest == sorted(nearest, reverse=True)
    assert all(float(row["nearest_distance"]) <= float(row["distance"]) + 1e-12 for row in rows)
    assert nearest[0] > 2 * np.median(nearest)


def test_classes_have_colours_on_the_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    place, label = rng.standard_normal((90, 2)).astype(np.float32), np.arange(90) % 3 - 1
    draw_classes(tmp_path / "map.png", "Stars", place, label, ("EW", "SR"))
    image = imread(tmp_path / "map.png")
    assert image.shape[:2] == (1100, 1430)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 100


def test_a_map_of_the_stars_is_drawn(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="maps need the extra `explore`")
    out = tmp_path / "stars.png"
    assert broker_filter(["map", "--reference", str(file), "--out", str(out)]) == 0
    assert imread(out).shape[:2] == (1100, 1430)


def test_embeddings_do_not_depend_on_the_batch(
    sky: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.astrom3 import embed

    monkeypatch.setattr(build_reference, "MIN_ALERTS", 5)
    whole = embed.embed_stars(sky, checkpoint, seed=SEED, splits=["test"])
    monkeypatch.setattr(embed, "STARS_AT_ONCE", 7)
    parts = embed.embed_stars(sky, checkpoint, seed=SEED, splits=["test"])
    assert whole.stars is not None
    assert parts.stars is not None
    np.testing.assert_allclose(whole.stars.alerts.embedding, parts.stars.alerts.embedding, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["similar", "--id", "900"], "contains no alert or star 900"),
        (["similar"], "name an ALERT, or with --id an alert or star of the reference set"),
        (["similar", "--id", "3", "--out", "x.png"], "--out, --packets and --model need an ALERT"),
    ],
)
def test_a_star_that_is_not_there_is_an_error_in_one_line(
    arguments: list[str], complaint: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert broker_filter([*arguments, "--reference", str(file)]) in (1, 2)
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_stars_do_not_judge_alerts(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alert.avro").write_bytes(b"")
    arguments = ["similar", str(tmp_path / "alert.avro"), "--reference", str(file), "--model", "default"]
    assert broker_filter(arguments) == 1
    assert "made with the bundle astrom3, which is not among" in capsys.readouterr().err.splitlines()[-1]


def test_suspects_need_inputs_or_a_set(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suspects"]) == 2
    assert "name INPUT and --labels, or a set of embeddings with --reference" in capsys.readouterr().err
    assert main(["suspects", "night", "--reference", str(file)]) == 2
    assert "--reference holds embeddings and labels: omit inputs" in capsys.readouterr().err


def test_a_network_of_one_modality_is_refused(sky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"epochs": 2, "warm_up_epochs": 1, "batch": 16}
    keys = {"mode": "meta", "stars": sky, "seed": SEED, "recipe": recipe, "arguments": SMALL}
    train(AstroM3Run(**keys, out=tmp_path / "meta", hardware=ONE_CORE, logs=()))
    common = ["--seed", str(SEED), "--out", str(tmp_path / "stars.safetensors")]
    assert main(["astrom3-embed", str(sky), "--checkpoint", str(tmp_path / "meta" / CHECKPOINT), *common]) == 1
    assert "holds a MetadataClassifier, which has no common space" in capsys.readouterr().err.splitlines()[-1]
