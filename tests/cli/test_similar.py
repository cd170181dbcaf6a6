"""`similar` lists and draws the alerts of a reference set that are most like an alert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from broker_filter.anomalies.reference import make_reference, read_reference
from broker_filter.cli import main
from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.pictures.embedding_map import draw_map
from broker_filter.pictures.similar_alerts import Shown, draw_similar
from broker_filter.scoring.bundle import open_bundle


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
