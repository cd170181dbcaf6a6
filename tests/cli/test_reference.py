"""`reference`, `similar` and `map` make a reference set, a list, a contact sheet and a map from archived packets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import (
    NO_SURVEY,
    ReferenceAlerts,
    SurveyReference,
    make_reference,
    make_star_reference,
    read_reference,
)
from broker_filter.cli import main
from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.pictures.embedding_map import draw_map
from broker_filter.pictures.similar_alerts import Shown, draw_similar
from broker_filter.scoring.bundle import open_bundle

N = 200


@pytest.fixture(scope="module")
def night(ztf_packets: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("night")
    for candid, data in ztf_packets[:N]:
        (folder / f"{candid}.avro").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def reference(night: Path, embedding_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("references") / "ordinary.safetensors"
    assert main(["reference", "build", str(night), "--model", str(embedding_bundle), "--out", str(file)]) == 0
    return file


def test_a_reference_is_built_and_shown(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = read_reference(reference)
    part = built.surveys[Survey.ZTF]
    assert 100 < len(part.alerts) + len(part.scores) <= N
    assert built.card.where == "looks.real > 0.5"  # as the bundle recommends
    assert built.card.modalities == ("science", "template", "difference")
    assert main(["reference", "show", str(reference)]) == 0
    shown = capsys.readouterr().out
    assert "looks.real > 0.5" in shown
    assert "surveys        ztf\n" in shown
    assert built.card.data_sha256 in shown


def test_a_set_of_stars_is_shown_as_stars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n, held_out, rng = 150, 120, np.random.default_rng(1)
    stars = SurveyReference(
        ReferenceAlerts(
            normalise(rng.normal(size=(n, 8)).astype(np.float32)),
            np.arange(n),
            np.array([f"train:{row}" for row in range(n)]),
            np.full(n, NO_SURVEY, np.uint8),
        ),
        scores=np.linspace(0, 1, held_out, dtype=np.float32),
        usual=np.ones((3, 2), np.float32),
        apart=np.ones((2, 2), np.float32),
        label=np.zeros(n, np.int64),
    )
    file = tmp_path / "stars.safetensors"
    make_star_reference("network", "1", "0" * 64, ("curve", "spectrum"), ("EW",), "centroids", stars).write(file)
    assert main(["reference", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "surveys        none: a set of variable stars\n" in shown
    assert "stars          150 stars, 8 dimensions, calibrated on 120 of them\n" in shown
    assert "alert" not in shown


def test_reference_respects_limit_and_cut_of_the_command_line(
    night: Path, embedding_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "some.safetensors"
    arguments = ["reference", "build", str(night), "--model", str(embedding_bundle), "--out", str(file)]
    assert main([*arguments, "--where", "magpsf < 25", "--limit", "150"]) == 0
    some = read_reference(file)
    part = some.surveys[Survey.ZTF]
    assert len(part.alerts) + len(part.scores) == 150
    assert some.card.where == "magpsf < 25"
    assert main([*arguments, "--where", "magpsf < 0"]) == 1


def test_centroids_are_computed_for_the_classes_of_a_label_table(
    night: Path, embedding_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "classes.safetensors", tmp_path / "labels.csv"
    candids = sorted(int(packet.stem) for packet in night.iterdir())
    rows = [f"{candid},{'early' if candid < candids[N // 2] else 'late'}" for candid in candids[::2]]
    table.write_text("\n".join(["candid,when", *rows]))
    arguments = ["reference", "build", str(night), "--model", str(embedding_bundle), "--out", str(file)]
    assert main([*arguments, "--measure", "centroids"]) == 2
    assert "needs --labels" in capsys.readouterr().err
    assert main([*arguments, "--measure", "centroids", "--labels", str(table), "--label", "when"]) == 0
    built = read_reference(file)
    assert built.card.classes == ("early", "late")
    part = built.surveys[Survey.ZTF]
    early = dict(zip(part.alerts.alert_id.tolist(), part.label.tolist(), strict=True))
    labelled = {candid: 0 if candid < candids[N // 2] else 1 for candid in candids[::2]}
    assert early == {candid: labelled.get(candid, -1) for candid in early}
    assert main(["reference", "show", str(file)]) == 0
    assert "centroids of early, late" in capsys.readouterr().out


def test_most_similar_alerts_are_listed_and_drawn(
    reference: Path, night: Path, embedding_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alert = int(read_reference(reference).surveys[Survey.ZTF].alerts.alert_id[7])
    picture = tmp_path / "similar.png"
    common = ["--reference", str(reference), "--model", str(embedding_bundle), "--count", "3"]
    drawn = ["--out", str(picture), "--packets", str(night)]
    assert main(["similar", str(night / f"{alert}.avro"), *common, *drawn]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ztf {alert} of ZTF")
    distances = [float(line.split()[0]) for line in lines[2:5]]
    assert lines[2].split()[1] == str(alert)  # it is in the reference
    assert distances[0] == pytest.approx(0, abs=1e-4)
    assert distances == sorted(distances)
    assert lines[5:] == [str(picture)]
    image = imread(picture)
    assert image.shape[:2] == (round(110 * (0.7 + 4 * 2.3)), 14 * 110)  # four rows
    assert main(["similar", str(night), "--id", str(alert), *common]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == lines[:5]


def test_only_the_given_alert_is_drawn_without_packets(
    reference: Path, night: Path, embedding_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alert = sorted(night.iterdir())[0]
    picture = tmp_path / "alone.png"
    common = ["--reference", str(reference), "--model", str(embedding_bundle), "--count", "3"]
    assert main(["similar", str(alert), *common, "--out", str(picture)]) == 0
    assert imread(picture).shape[0] < round(110 * (0.7 + 3 * 2.3))


@pytest.mark.parametrize("change", ["id", "model"])
def test_alert_that_cannot_be_compared_gives_one_error_line(
    reference: Path, night: Path, embedding_bundle: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    model = "default" if change == "model" else str(embedding_bundle)
    which = ["--id", "5"] if change == "id" else []
    assert main(["similar", str(night), "--reference", str(reference), "--model", model, *which]) == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert ("contains no alert 5" if change == "id" else "not among the configured models (default)") in complaint


def test_map_without_umap_names_the_extra_to_install(
    reference: Path, night: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    assert main(["map", str(night), "--reference", str(reference), "--out", str(tmp_path / "map.png")]) == 2
    assert "pip install 'broker-filter[explore]'" in capsys.readouterr().err


NASTY = "\x1b]0;mine\x07$\\frac$"
"""A name with control characters of a terminal, which matplotlib cannot parse as a formula."""


def test_object_names_with_any_characters_are_printed_and_drawn_safely(
    reference: Path, night: Path, embedding_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built, file = read_reference(reference), tmp_path / "nasty.safetensors"
    part = built.surveys[Survey.ZTF]
    named = replace(part, alerts=replace(part.alerts, object_id=np.full(len(part.alerts), NASTY)))
    counts = {Survey.ZTF: built.card.surveys["ztf"]}
    made_with = open_bundle(str(embedding_bundle))
    make_reference(made_with, None, {Survey.ZTF: named}, counts, "mahalanobis").write(file)
    alert = next(night.iterdir())
    assert main(["similar", str(alert), "--reference", str(file), "--model", str(embedding_bundle)]) == 0
    shown = capsys.readouterr().out
    assert "?]0;mine?$\\frac$" in shown
    assert "\x1b" not in shown

    batch, _ = Decoder(open_registry(None)).decode([Packet(alert.read_bytes(), FilePosition("one"))])
    draw_similar(tmp_path / "similar.png", "One alert", [Shown(replace(batch, object_id=[NASTY]), 0, "")])
    rng = np.random.default_rng(0)
    place, score = rng.standard_normal((300, 2)).astype(np.float32), rng.gamma(2, 1, 300).astype(np.float32)
    draw_map(tmp_path / "map.png", "A night", place, score, [NASTY] * 300)


@pytest.mark.parametrize("command", [["map"], ["reference", "build"]])
def test_limit_outside_the_bounds_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "night", "--out", "it", "--limit", "-5"])
    assert "between 1 and 1000000, not -5" in capsys.readouterr().err


def test_map_labels_the_most_anomalous_alerts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    place, score = rng.standard_normal((300, 2)).astype(np.float32), rng.gamma(2, 1, 300).astype(np.float32)
    draw_map(tmp_path / "map.png", "A night", place, score, [f"ZTF26a{i}" for i in range(300)])
    image = imread(tmp_path / "map.png")
    assert image.shape[:2] == (1100, 1430)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 500  # colours of many scores


def test_map_of_a_night_is_drawn(reference: Path, night: Path, embedding_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="maps need the extra `explore`")
    out = tmp_path / "map.png"
    arguments = ["--reference", str(reference), "--model", str(embedding_bundle), "--out", str(out)]
    assert main(["map", str(night), *arguments]) == 0
    assert imread(out).shape[:2] == (1100, 1430)
