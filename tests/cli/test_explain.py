"""`explain` writes the features of alerts of both surveys, as JSON, as a page and as a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from broker_filter.cli import main
from broker_filter.demo.ordinary import ALERTS, write_reference
from broker_filter.scoring.lens_files import open_files
from broker_filter.simulate import SCHEMAS, simulate_night

N = 6


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of simulated alerts of both surveys."""
    folder = tmp_path_factory.mktemp("night")
    for survey in ("ztf", "lsst"):
        for alert in simulate_night(N, seed=8, survey=survey):
            (folder / f"{survey}{alert.alert_id}.avro").write_bytes(alert.packet)
    return folder


def explain(*arguments: object) -> int:
    return main(["explain", *map(str, arguments), "--schema-registry", str(SCHEMAS)])


def test_alerts_of_both_surveys_are_explained(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for survey in ALERTS:
        monkeypatch.setitem(ALERTS, survey, 90)  # alerts of the reference set
    write_reference(tmp_path / "ordinary.safetensors", seed=3)
    reference, out = ("--reference", tmp_path / "ordinary.safetensors"), tmp_path / "why.json"
    assert explain(simulated, *reference, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    document = json.loads(out.read_text())
    [lens] = document["lenses"]
    assert lens["worth"] == open_files("embedder").card.worth
    assert {alert["survey"] for alert in document["alerts"]} == {"ztf", "lsst"}
    assert len({alert["alert_id"] for alert in document["alerts"]}) == 2 * N
    for alert in document["alerts"]:
        assert alert["site"] == lens["site"]
        assert alert["anomaly_score"] is not None
        assert set(alert["modalities"]) <= {"image", "light_curve", "metadata"}
        assert alert["pre_activation_error"] is None or alert["pre_activation_error"] < 1e-5
        effects = [feature["effect"] for feature in alert["features"] if feature["effect"] is not None]
        assert effects == sorted(effects, reverse=True)
        assert all(
            source["mjd"] is None or source["mjd"] <= alert["mjd"] for f in alert["features"] for source in f["sources"]
        )

    assert explain(simulated, "--limit", 3, "--out", tmp_path / "why.html") == 0
    page = (tmp_path / "why.html").read_text()
    assert page.count("<section>") == 3
    assert lens["worth"].split(".")[0] in page
    assert not re.search(r"(src|href)=.?(?!data:)\w+:", page)  # nothing is loaded
    assert explain(simulated, "--limit", 2, "--out", tmp_path / "why.png") == 0
    assert imread(tmp_path / "why.png").shape[0] == round(110 * (0.7 + 2 * 2.3))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--lens", "none"), 2, "none: not a lens: there is no lens.yaml in it"),
        (("--model", "default"), 1, "a lens on the bundle embedder, which is not among the models (default)"),
        (("--id", "5"), 1, "the alert 5 of ztf or lsst was not found"),
        (("--reference", "none.safetensors"), 2, "none.safetensors: no such file"),
    ],
)
def test_what_cannot_be_explained_gives_one_error_line(
    simulated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    assert explain(simulated, *arguments, "--out", tmp_path / "why.json") == status
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "why.json").exists()
