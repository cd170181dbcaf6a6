"""`sae explore`: the page of a run, and what it says of a run that cannot be shown."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker_filter.simulate import simulate_night
from training.__main__ import main
from training.interpretability.runs.rows import TEST, open_run

NAME = "rise </script><b>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 alerts that stand for real ones, with a dictionary and what a study writes into it."""
    packets = tmp_path_factory.mktemp("packets")
    lines = ["candid,weak_class"]
    for number, alert in enumerate(simulate_night(24, seed=7)):
        (packets / f"{alert.alert_id}.avro").write_bytes(alert.packet)
        if number % 4:
            lines.append(f"{alert.alert_id},{('SN', 'SN_cand', 'VS')[number % 3]}")
    labels = packets.parent / "weak.csv"
    labels.write_text("\n".join(lines))
    out = tmp_path_factory.mktemp("runs") / "run"
    collect = ["sae", "collect", "embedder", "light_curve.1", str(packets), "--labels", str(labels)]
    assert main([*collect, "--simulated", "3", "--out", str(out)]) == 0
    train = ["sae", "train", str(out), "--steps", "20", "--batch", "16", "--features", "12", "--seeds", "1"]
    assert main(train) == 0
    rows = "".join(f"{i},{NAME if i == 2 else ''},,{i % 2},few-epoch,{i}\n" for i in range(12))
    (out / "features.csv").write_text(f"id,name,note,stable_in,family,other\n{rows}")
    table = {
        "caption": "Reconstruction",
        "head": ["measure", "features", "PCA"],
        "rows": [["recovered", "0.9", "0.98"]],
    }
    (out / "measures.json").write_text(json.dumps({"tables": [table], "warnings": ["PCA is better."], "site": "x"}))
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def explore(run: Path, file: Path, *options: str) -> dict[str, Any]:
    """Write the page of a run, and return its contents."""
    assert main(["sae", "explore", str(run), "--out", str(file), *options]) == 0
    text = file.read_text(encoding="utf-8")
    contents: dict[str, Any] = json.loads(text.split('id="contents">')[1].split("</script>")[0])
    return contents


def refusal(capsys: pytest.CaptureFixture[str], run: Path, file: Path, *options: str) -> str:
    """Return the line that says why there is no page."""
    capsys.readouterr()
    assert main(["sae", "explore", str(run), "--out", str(file), *options]) == 1
    assert not file.exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_page_shows_the_held_out_real_alerts_and_what_was_measured(run: Path, tmp_path: Path) -> None:
    page = explore(run, tmp_path / "page.html")
    opened = open_run(run)
    held = opened.rows.is_real & (opened.rows.split == TEST)
    assert {alert["id"] for alert in page["alerts"]} == set(opened.alerts.alert_id[held].astype(str))
    assert page["warnings"] == ["PCA is better."]
    assert page["metrics"][0]["rows"] == [["recovered", "0.9", "0.98"]]
    assert {row["name"] for feature in page["features"] for row in feature["enrichment"]} <= {"SN", "VS"}
    assert len(page["features"]) == 12
    assert (page["features"][2]["name"], page["features"][2]["family"]) == (NAME, "few-epoch")
    assert page["rows"][5] == {"id": "5", "name": "", "note": "", "stable_in": "1", "family": "few-epoch", "other": "5"}
    assert dict(page["facts"])["site"] == "light_curve.1, 4 heads of 12"


def test_recursive_attribution_sums_to_the_activation(run: Path, tmp_path: Path) -> None:
    page = explore(run, tmp_path / "page.html")
    active = [one for alert in page["alerts"] for one in alert["active"]]
    assert active
    for one in active:
        np.testing.assert_allclose(
            sum(leaf["value"] for leaf in one["leaves"]), one["activation"], rtol=0.01, atol=0.01
        )
        np.testing.assert_allclose(sum(one["sources"]) + one["bias"], one["activation"], rtol=0.01, atol=0.01)


def test_all_real_alerts_are_shown_on_request(run: Path, tmp_path: Path) -> None:
    assert len(explore(run, tmp_path / "page.html", "--split", "all")["alerts"]) == 24


def test_a_run_without_a_study_is_shown_with_a_warning(copy: Path, tmp_path: Path) -> None:
    (copy / "features.csv").unlink()
    (copy / "measures.json").unlink()
    page = explore(copy, tmp_path / "page.html")
    assert "has not been measured" in page["warnings"][0]
    assert page["columns"] == ["id", "name", "note"]
    assert len(page["rows"]) == 12


def test_a_run_that_cannot_be_shown_is_refused_in_one_sentence(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert "has no real alert of the split validation" in refusal(capsys, copy, page, "--split", "validation")
    assert "is not an earlier layer of" in refusal(capsys, copy, page, "--earlier", str(copy))
    (copy / "measures.json").write_text('{"tables": [{"caption": 3}]}')
    assert "measures.json: cannot be read" in refusal(capsys, copy, page)
    (copy / "measures.json").write_text("[")
    assert "measures.json: cannot be read" in refusal(capsys, copy, page)
    (copy / "measures.json").unlink()
    (copy / "features.csv").write_text("id,note\n1,2\n")
    assert "features.csv: lacks the columns name" in refusal(capsys, copy, page)
    (copy / "features.csv").write_bytes(b"\xff\xfe")
    assert "features.csv: not a CSV table" in refusal(capsys, copy, page)
    (copy / "run.yaml").unlink()
    assert "incomplete: it has no run.yaml yet" in refusal(capsys, copy, page)


def test_a_page_that_would_be_too_large_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.interpretability.explorer.explore.MOST_BYTES", 1000)
    assert "choose fewer --alerts" in refusal(capsys, run, tmp_path / "page.html")
