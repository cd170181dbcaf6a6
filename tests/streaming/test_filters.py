"""Filters of a service: each is tried once on a batch, and one that passes too much warns or pauses its own topic."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from broker_filter.config import Service
from broker_filter.metrics import Metrics
from broker_filter.packets.batch import AlertBatch
from broker_filter.streaming.account import account_batch
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filters import FEWEST_PASSED, Filter, Filters, PassRate, open_filters
from broker_filter.streaming.resolved import resolve
from broker_filter.streaming.scored import ScoredBatch

NAN = float("nan")
REAL = compile_filter("real > 0.5", FIELDS, ["default.real"])


class Clock:
    """A clock that stands still until it is set."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def scored(
    make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]
) -> Callable[..., ScoredBatch]:
    def make(real: Sequence[float]) -> ScoredBatch:
        return make_scored(make_alerts(list(range(len(real)))), {"default": real})

    return make


def test_a_rate_forgets_what_is_older_than_its_window() -> None:
    clock = Clock()
    rate = PassRate(10, clock)
    rate.add(100, 10)
    clock.seconds += 300
    rate.add(50, 0)
    assert rate.counts() == (150, 10)
    clock.seconds += 310
    assert rate.counts() == (50, 0)
    clock.seconds += 1e6
    assert rate.counts() == (0, 0)
    for _ in range(10_000):
        clock.seconds += 1
        rate.add(1, 1)
    scored, passed = rate.counts()
    assert scored == passed
    assert 590 <= scored <= 600


@pytest.mark.parametrize(
    ("real", "over"),
    [
        ([0.9, 0.1, 0.1], False),  # one of three
        ([0.9] * (FEWEST_PASSED - 1) + [0.1], False),
        ([0.9] * FEWEST_PASSED + [0.1] * FEWEST_PASSED, False),  # exactly the rate
        ([0.9] * FEWEST_PASSED + [0.1] * (FEWEST_PASSED - 1), True),
        ([0.9] * FEWEST_PASSED + [NAN] * FEWEST_PASSED, True),  # alerts that no model took do not count
    ],
)
def test_a_filter_is_over_its_rate_if_enough_alerts_passed(
    scored: Callable[..., ScoredBatch], real: list[float], over: bool
) -> None:
    filters = Filters([Filter("f", REAL, 0.5, pauses=True), Filter("free", REAL)])
    first, second = filters.outcomes(scored(real))
    assert (first.paused, second.paused) == (over, False)
    assert [(state.over, state.paused) for state in filters.states()] == [(over, over), (False, False)]
    assert first.passed.tolist() == second.passed.tolist() == [value > 0.5 for value in real]
    assert filters.states()[0].rate == np.mean([value > 0.5 for value in real if value == value])


def test_a_topic_is_paused_until_the_rate_is_low_again(
    scored: Callable[..., ScoredBatch], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    filters = Filters([Filter("f", REAL, 0.1, pauses=True, rate=PassRate(10, clock))])
    with caplog.at_level(logging.INFO):
        paused = []
        for real in (0.9, 0.1, 0.1, 0.1):
            [outcome] = filters.outcomes(scored([real] * 50))
            paused.append(outcome.paused)
            clock.seconds += 240
    assert paused == [True, True, True, False]
    assert caplog.messages == [
        "filter f passed 100.0 % of the alerts of the last 10 minutes, more than its max_rate of 10 %: its topic is "
        "paused",
        "filter f passes no more than its max_rate again: its topic goes on",
    ]


def test_a_filter_that_only_warns_is_never_paused(
    scored: Callable[..., ScoredBatch], caplog: pytest.LogCaptureFixture
) -> None:
    filters = Filters([Filter("f", REAL, 0.1)])
    [outcome] = filters.outcomes(scored([0.9] * 50))
    assert not outcome.paused
    [state] = filters.states()
    assert (state.over, state.paused) == (True, False)
    assert "more than its max_rate of 10 %" in caplog.text
    assert "paused" not in caplog.text


def test_duplicates_neither_count_nor_pause(scored: Callable[..., ScoredBatch]) -> None:
    batch = scored([0.9] * 50)
    filters = Filters([Filter("f", REAL, 0.1, pauses=True)])
    again = replace(batch, duplicate=np.ones(50, dtype=np.bool_))
    [outcome] = filters.outcomes(again)
    assert not outcome.paused
    assert filters.states()[0].rate == 0.0
    assert account_batch(replace(again, filters=(outcome,))).passed == {}


def test_metrics_count_what_passed_and_show_the_rates(scored: Callable[..., ScoredBatch]) -> None:
    filters = Filters([Filter("f", REAL, 0.1, pauses=True), Filter("g", REAL)])
    batch = scored([0.9] * 30 + [0.1] * 10)
    batch = replace(batch, filters=filters.outcomes(batch))
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.expect(filters=[*filters.names, "never"])
    metrics.commit([account_batch(batch)], Counter(), "me.dead-letter")
    metrics.set_filters(filters.states())

    def value(name: str, of: str) -> float | None:
        return registry.get_sample_value(f"broker_filter_filter_{name}", {"filter": of})

    assert [value("passed_alerts_total", of) for of in ("f", "g", "never")] == [30, 30, 0]
    assert [value("rate", of) for of in ("f", "g")] == [0.75, 0.75]
    assert [value("over_rate", of) for of in ("f", "g")] == [1, 0]
    assert [value("paused", of) for of in ("f", "g")] == [1, 0]
    metrics.set_filters([])
    assert value("rate", "f") is None


def service_of(where: str, minutes: float = 10, **other: object) -> Service:
    one = {"name": "f", "where": where, "max_rate": 0.1, "max_rate_minutes": minutes, "over_rate": "pause"} | other
    source = {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]}
    return Service.model_validate({"input": source, "output": {"prefix": "me"}, "filters": [one]})


@pytest.mark.parametrize(
    ("after", "still"),
    [
        (service_of("  real  > 0.5"), True),
        (service_of("real > 0.5", max_rate=0.2), True),
        (service_of("real > 0.5", max_rate=1.0), False),
        (service_of("real > 0.6"), False),
        (service_of("real > 0.5", minutes=5), False),
        (service_of("real > 0.5", name="g"), False),
    ],
)
def test_a_paused_topic_stays_paused_over_a_reload_of_the_same_filter(
    scored: Callable[..., ScoredBatch], after: Service, still: bool
) -> None:
    before = open_filters(resolve(service_of("real > 0.5")))
    [outcome] = before.outcomes(scored([0.9] * 50))
    assert outcome.paused
    [state] = open_filters(resolve(after), before).states()
    assert state.paused is still
