"""`compare-shadow` states what plain numpy finds in the records, and shows no markup of the records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.cli import main
from broker_filter.streaming.comparison import MAX_OUTPUTS, ComparedAlert, Comparison

N = 2000


def annotation(models: Sequence[tuple[str, str, Mapping[str, float], bool]], **fields: Any) -> dict[str, Any]:
    named = [
        {"model": name, "version": version, "outputs": dict(outputs), "shadow": shadow}
        for name, version, outputs, shadow in models
    ]
    return {"models": named, **fields}


def write_records(file: Path, records: Sequence[tuple[str, str, dict[str, Any]]]) -> Path:
    """Write records of `payload: scores`: object id, survey and annotation of each."""
    schema = json.loads(files("broker_filter.schemas").joinpath("scored_alert.avsc").read_bytes())
    alert = {"schema_version": "4.02", "mjd": 61096.25, "ra": 150.0, "dec": -5.5}
    made = {"service_version": "1", "scored_at": 0, "duplicate": False}
    with file.open("wb") as out:
        fastavro.writer(
            out,
            schema,
            [
                {"alert_id": i, "object_id": object_id, "survey": survey, **alert, "broker_filter": made | field}
                for i, (object_id, survey, field) in enumerate(records)
            ],
            sync_interval=1,
        )
    return file


@pytest.fixture(scope="module")
def outputs() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    old = rng.beta(0.5, 0.5, N).astype(np.float32)
    return old, np.clip(old + 0.1 * rng.standard_normal(N), 0, 1).astype(np.float32)


def test_the_numbers_are_those_of_numpy(outputs: tuple[NDArray[np.float32], NDArray[np.float32]]) -> None:
    old, new = outputs
    magnitude = np.linspace(15, 22, N)
    comparison = Comparison()
    for i in range(N):
        pair = [("default", "1", {"real": float(old[i])}, False), ("default", "2", {"real": float(new[i])}, True)]
        alert = ComparedAlert(i, f"ZTF{i}", magnitude=float(magnitude[i]))
        comparison.add(alert, "ztf", annotation(pair))
        comparison.add(alert, "ztf", annotation(pair, duplicate=True))  # counts once
    [found] = comparison.results(0.7)
    assert (found.pair.survey, found.pair.label) == ("ztf", "real")
    assert (str(found.pair.serving), str(found.pair.shadow)) == ("default 1", "default 2")
    assert comparison.alerts == found.agreement.n == N
    assert found.correlation == pytest.approx(np.corrcoef(old, new)[0, 1], rel=1e-6)
    assert found.agreement.mean_difference == pytest.approx((new.astype(float) - old).mean(), abs=1e-9)
    assert found.agreement.mean_absolute_difference == pytest.approx(np.abs(new.astype(float) - old).mean(), rel=1e-6)
    passed = [((old >= 0.7) == a) & ((new >= 0.7) == b) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
    assert found.passed == tuple(int(one.sum()) for one in passed)
    assert found.agreement.disagreement == pytest.approx((passed[1] | passed[2]).mean())
    assert (found.counts == np.histogram2d(old, new, 20, [[0, 1], [0, 1]])[0]).all()

    assert found.at_threshold.passed == (old >= 0.7).sum()
    assert [rate for rate, _ in found.at_rates] == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    for rate, at in found.at_rates:
        assert at.threshold == np.sort(old)[-round(rate * N)]
        assert at.passed == (old >= at.threshold).sum()
        assert at.threshold_shadow == np.sort(new)[-at.passed]
        assert at.passed_shadow == (new >= at.threshold_shadow).sum()
        assert at.gained == ((new >= at.threshold_shadow) & (old < at.threshold)).sum()
        assert at.lost == ((new < at.threshold_shadow) & (old >= at.threshold)).sum()

    assert sum(one.agreement.n for one in found.by_magnitude) == N
    faint = next(one for one in found.by_magnitude if one.low == 20)
    inside = (magnitude >= 20) & (magnitude < 21)
    assert faint.agreement.n == inside.sum()
    assert faint.agreement.mean_shadow == pytest.approx(new[inside].mean(), rel=1e-5)
    assert found.by_snr == ()  # these alerts have none
    ranked = np.argsort(-np.abs(new - old))
    highest, lowest = ([i for i in ranked if (new[i] > old[i]) == up][:6] for up in (True, False))
    assert {one.alert.alert_id for one in found.examples} == {*highest, *lowest}
    assert found.examples[0].alert.alert_id == ranked[0]


def test_only_probabilities_of_known_models_are_compared_within_bounds() -> None:
    comparison = Comparison()
    alert = ComparedAlert(1, "ZTF1")
    for malformed in ({}, {"models": 3}, {"models": [1, {"outputs": 2}, {"model": "a", "outputs": {"real": "x"}}]}):
        comparison.add(alert, "ztf", malformed)
    for value in (math.nan, math.inf, 1e300, -0.1, "0.5", True):
        comparison.add(alert, "ztf", annotation([("a", "1", {"x": 0.5}, False), ("a", "2", {"x": value}, True)]))  # type: ignore[dict-item]
    comparison.add(alert, "ztf", annotation([("a", "1", {"y": 0.5}, False), ("a", "2", {"x": 0.5}, True)]))
    assert comparison.results() == []
    for k in range(MAX_OUTPUTS + 5):
        comparison.add(alert, "ztf", annotation([("a", "1", {"x": 0.5}, False), ("a", str(k), {"x": 0.5}, True)]))
    assert (len(comparison.results()), comparison.alerts, comparison.left_out) == (MAX_OUTPUTS, MAX_OUTPUTS, 5)
    constant = comparison.results()[0]
    assert math.isnan(constant.correlation)
    assert constant.examples == ()


NASTY = "<script>alert(1)</script>\x1b]0;mine\x07"


def test_the_command_writes_a_page_without_markup_of_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], outputs: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    def models(k: int) -> list[tuple[str, str, dict[str, float], bool]]:
        return [
            (NASTY, NASTY, {NASTY: 0.2, "real": float(outputs[0][k])}, False),
            (NASTY, "2", {NASTY: 0.9, "real": float(outputs[1][k])}, True),
        ]

    records = [(NASTY, "ztf", annotation(models(k))) for k in range(40)]
    file = write_records(tmp_path / "records.avro", [*records, ("ZTF1", "ztf", annotation(models(0)[:1]))])
    page = tmp_path / "page.html"
    assert main(["compare-shadow", str(file), "--out", str(page)]) == 0
    printed, text = capsys.readouterr().out, page.read_text()
    assert "40 alerts" in printed
    assert "\x1b" not in printed
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text  # the page loads nothing
    assert text.count("<section>") == 2

    assert main(["compare-shadow", str(file), "--out", str(page), "--label", "real", "--limit", "10"]) == 0
    assert "10 alerts of" in page.read_text()
    assert page.read_text().count("<section>") == 1
    assert main(["compare-shadow", str(file), "--out", str(page), "--label", "SN"]) == 1
    assert "none has an output with the label SN of a shadow model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "name files, or a topic with --topic"),
        (["a.avro", "--topic", "me.shadow"], "name files, or a topic with --topic"),
        (["--topic", "me.shadow"], "--topic needs --bootstrap-servers"),
        (["a.avro", "--since", "2026-02-26"], "--since needs --topic"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert main(["compare-shadow", *options, "--out", str(tmp_path / "page.html")]) == 2
    assert complaint in capsys.readouterr().err
