"""A trial of a filter: its counts are those of separate filters, and its page shows packet text only as text."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broker_filter.packets.batch import AlertBatch
from broker_filter.pictures.filter_page import write_page
from broker_filter.sky.files import SkyFiles
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.scored import ScoredBatch
from broker_filter.streaming.trial import ILLUSTRATED_TERMS, REMOVED_EXAMPLES, FilterTrial, RandomExamples

NAN = float("nan")
MIDNIGHT = 61096.0
OUTPUTS = ["default.real"]
TERMS = ("real > 0.5", "magpsf < 19", "ndethist <= 3 or isnull(ndethist)")
Night = Callable[..., list[ScoredBatch]]


@pytest.fixture
def night(make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]) -> Night:
    """Batches of random alerts, of which some are duplicates, some lack a value, and some no model takes."""

    def make(batches: int = 3, n: int = 200, **fields: object) -> list[ScoredBatch]:
        rng = np.random.default_rng(5)
        made = []
        for k in range(batches):
            columns = {
                name: np.where(rng.random(n) < 0.1, NAN, values).tolist()
                for name, values in {"magpsf": rng.uniform(17, 21, n), "ndethist": rng.integers(0, 9, n)}.items()
            }
            alerts = make_alerts(list(range(k * n, (k + 1) * n)), **columns, **fields)
            alerts = replace(
                alerts,
                mjd=MIDNIGHT + rng.uniform(2, 9, n) / 24,
                cutouts=np.ones((n, 3, 4, 4), np.float32),
                cutout_box=np.full((n, 3, 4), (0, 0, 4, 4), np.int16),
            )
            real = np.where(rng.random(n) < 0.05, NAN, rng.random(n)).tolist()
            made.append(replace(make_scored(alerts, {"default": real}), duplicate=rng.random(n) < 0.1))
        return made

    return make


def tried(batches: list[ScoredBatch], where: str, limit: float | None = None, examples: int = 5) -> FilterTrial:
    trial = FilterTrial("f", compile_filter(where, FIELDS, OUTPUTS), limit, examples)
    for batch in batches:
        trial.add(batch)
    return trial


def passing(batches: list[ScoredBatch], where: str) -> int:
    """Return how many of the counted alerts pass a filter."""
    expression = compile_filter(where, FIELDS, OUTPUTS)
    return sum(int((one.scores.taken & ~one.duplicate & expression.evaluate(one)).sum()) for one in batches)


def test_the_counts_are_those_of_separate_filters(night: Night) -> None:
    batches = night()
    report = tried(batches, " and ".join(f"({term})" for term in TERMS)).report()
    assert report.scored == passing(batches, "1 < 2")
    assert report.passed == passing(batches, " and ".join(f"({term})" for term in TERMS)) > 0
    assert tuple(term.text for term in report.terms) == TERMS
    for k, term in enumerate(report.terms):
        others = " and ".join(f"({other})" for other in (*TERMS[:k], *TERMS[k + 1 :]))
        assert term.false == passing(batches, f"not ({term.text})")
        assert term.false + term.missing == report.scored - passing(batches, term.text)
        assert report.passed + term.alone == passing(batches, others)
    assert report.terms[1].missing > 0
    assert report.terms[2].missing == 0
    assert [scored > 0 for scored, _ in report.hours] == [2 <= hour < 9 for hour in range(24)]
    assert [sum(counts) for counts in zip(*report.hours, strict=True)] == [report.scored, report.passed]


@pytest.mark.parametrize("mjd", [NAN, np.inf, -1e300, 1e300, -1e-30])
def test_times_that_are_no_times_are_counted_all_the_same(night: Night, mjd: float) -> None:
    [batch] = night(batches=1)
    odd = replace(batch, alerts=replace(batch.alerts, mjd=np.full(len(batch.alerts), mjd)))
    report = tried([odd], "real > 0.5").report()
    assert sum(passed for _, passed in report.hours) == report.passed > 0


@pytest.mark.parametrize(
    ("where", "limit", "over"),
    [("1 < 2", None, False), ("1 < 2", 1.0, False), ("1 < 2", 0.99, True), ("2 < 1", 0.01, False)],
)
def test_a_filter_is_over_only_a_limit_that_it_has(night: Night, where: str, limit: float | None, over: bool) -> None:
    report = tried(night(), where, limit).report()
    assert report.over is over
    assert ("without a limit" in report.verdict) is (limit is None)


def test_examples_are_a_random_sample_that_every_run_repeats(night: Night) -> None:
    batches = night()
    report = tried(batches, "real > 0.5 and magpsf < 19", examples=9).report()
    again = tried(batches, "real > 0.5 and magpsf < 19", examples=9).report()
    assert report == again
    assert len({example.title for example in report.examples}) == 9
    for example in report.examples:
        assert float(example.values["default.real"]) > 0.5
        assert float(example.values["magpsf"]) < 19
        assert all(png.startswith(b"\x89PNG") for png in example.cutouts)
    bogus, faint = (term.examples for term in report.terms)
    assert len(bogus) == len(faint) == REMOVED_EXAMPLES
    assert all(float(example.values["default.real"]) <= 0.5 for example in bogus)
    assert all(float(example.values["magpsf"].replace("missing", "99")) >= 19 for example in faint)
    chances = np.zeros(30)
    for seed in range(200):
        sample = RandomExamples(6)
        sample._random = np.random.default_rng(seed)
        for start in range(0, 30, 10):
            sample.offer(batches[0].alerts, np.arange(start, start + 10), lambda _: {})
        for example in sample.examples:
            chances[int(example.title.rpartition(" ")[2])] += 1 / 200
    assert abs(chances - 0.2).max() < 0.12  # each of 30 alerts is among the 6 with the same chance; 4 sigma


def test_examples_name_the_target_that_is_near(night: Night, tmp_path: Path) -> None:
    (tmp_path / "targets.csv").write_text("name,ra,dec\nAT 2026x,150.0,-5.5\nelsewhere,10,10\n")
    where = "real > 0.5 and (near('targets.csv', 2) or ra > 0)"
    [batch] = night(batches=1, n=60, ra=[150.0 + 1 / 3600, 20.0] * 30)
    trial = FilterTrial("f", compile_filter(where, FIELDS, OUTPUTS, SkyFiles(tmp_path)), None, 60)
    trial.add(batch)
    said = {example.values["ra"]: example.values["near('targets.csv', 2.0)"] for example in trial.report().examples}
    assert said == {"150": "AT 2026x, 1.00 arcsec", "20": "no target"}


def test_a_filter_of_many_terms_keeps_few_examples(night: Night) -> None:
    report = tried(night(), " and ".join(["real > 0.1"] * 40)).report()
    assert len(report.terms) == 40
    assert sum(len(term.examples) for term in report.terms) <= ILLUSTRATED_TERMS * REMOVED_EXAMPLES


def test_the_page_shows_text_of_packets_only_as_text(night: Night, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>'\"&\u202e"
    batches = night(batches=1, n=4, object_id=[hostile] * 4)
    report = tried(batches, f"real > 0 and object_id != {'<b>'!r}", limit=0.1).report()
    file = tmp_path / "page.html"
    write_page(file, ["<night>"], [report])
    text = file.read_text()
    assert text.startswith("<!doctype html>")
    assert "<script" not in text
    assert "<b>'" not in text
    assert "<night>" not in text
    assert text.count("&lt;script&gt;alert(1)") >= len(report.examples) > 0
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)'", text)
    assert len(pictures) == 3 * (len(report.examples) + sum(len(term.examples) for term in report.terms))
    assert all(base64.b64decode(one).startswith(b"\x89PNG") for one in pictures)
    assert "://" not in text
