"""`reference` makes a reference set from archived packets, and shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import (
    NO_SURVEY,
    ReferenceAlerts,
    SurveyReference,
    make_star_reference,
    read_reference,
)
from broker_filter.cli import main
from broker_filter.packets.batch import Survey

from .conftest import ALERTS

LSST_ALERTS = 80
"""Enough for a reference and its calibration."""


def test_a_reference_is_built_and_shown(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = read_reference(reference)
    part = built.surveys[Survey.ZTF]
    assert 100 < len(part.alerts) + len(part.scores) <= ALERTS
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
    night: Path, embedding_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.safetensors"
    arguments = ["reference", "build", str(night), "--model", str(embedding_bundle), "--out", str(file)]
    assert main([*arguments, "--where", "magpsf < 25", "--limit", "150"]) == 0
    some = read_reference(file)
    part = some.surveys[Survey.ZTF]
    assert len(part.alerts) + len(part.scores) == 150
    assert some.card.where == "magpsf < 25"
    assert main([*arguments, "--where", "magpsf < 0"]) == 1
    assert main([*arguments, "--where", "magps < 0"]) == 2
    assert "--where: character 1: unknown name 'magps'" in capsys.readouterr().err


def test_centroids_are_computed_for_the_classes_of_a_label_table(
    night: Path, embedding_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "classes.safetensors", tmp_path / "labels.csv"
    candids = sorted(int(packet.stem) for packet in night.iterdir())
    rows = [f"{candid},{'early' if candid < candids[ALERTS // 2] else 'late'}" for candid in candids[::2]]
    table.write_text("\n".join(["candid,when", *rows]))
    arguments = ["reference", "build", str(night), "--model", str(embedding_bundle), "--out", str(file)]
    assert main([*arguments, "--measure", "centroids"]) == 2
    assert "needs --labels" in capsys.readouterr().err
    assert main([*arguments, "--measure", "centroids", "--labels", str(table), "--label", "when"]) == 0
    built = read_reference(file)
    assert built.card.classes == ("early", "late")
    part = built.surveys[Survey.ZTF]
    early = dict(zip(part.alerts.alert_id.tolist(), part.label.tolist(), strict=True))
    labelled = {candid: 0 if candid < candids[ALERTS // 2] else 1 for candid in candids[::2]}
    assert early == {candid: labelled.get(candid, -1) for candid in early}
    assert main(["reference", "show", str(file)]) == 0
    assert "centroids of early, late" in capsys.readouterr().out


def test_a_reference_of_lsst_alerts_is_built_from_an_archive_in_wire_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("galsim", reason="simulated alerts need the extra `demo`")
    from broker_filter.simulate import SCHEMAS, simulate_night

    archive, file = tmp_path / "nights", tmp_path / "rubin.safetensors"
    archive.mkdir()
    kinds = {"agn": 1.0, "variable_star": 1.0}
    for alert in simulate_night(LSST_ALERTS, 5, "lsst", kinds):
        (archive / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    arguments = ["reference", "build", str(archive), "--schema-registry", str(SCHEMAS), "--out", str(file)]
    assert main(arguments) == 1  # simulated alerts have no reliability, by which the default cut selects
    assert f"lsst: only 0 of {LSST_ALERTS} alerts are scored by embedder and pass `" in capsys.readouterr().err
    assert not file.exists()

    assert main([*arguments, "--where", "snr > 5"]) == 0
    assert f"lsst: {LSST_ALERTS} alerts read, " in capsys.readouterr().out
    built = read_reference(file)
    assert built.surveys.keys() == {Survey.LSST}
    part = built.surveys[Survey.LSST]
    assert len(part.alerts) + len(part.scores) == built.card.surveys["lsst"].passed
    assert file.stat().st_size < 1000 * LSST_ALERTS  # no packets and no pixels are in it

    one = next(archive.iterdir())
    assert main(["similar", str(one), "--reference", str(file), "--schema-registry", str(SCHEMAS)]) == 0
    listed = capsys.readouterr().out
    assert any(str(alert) in listed for alert in part.alerts.alert_id.tolist())


@pytest.mark.parametrize("command", [["map"], ["reference", "build"]])
def test_limit_outside_the_bounds_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "night", "--out", "it", "--limit", "-5"])
    assert "between 1 and 1000000, not -5" in capsys.readouterr().err
