"""Ratios are computed between the right competitors, and compared with their targets in the right direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker_filter.bench.measure import BenchmarkError, Contest, Figures, Run, Spread
from broker_filter.bench.report import Report
from broker_filter.bench.targets import check, judge, ratios


def contest(**microseconds: float) -> Contest:
    """Return competitors that each use one core completely."""
    names = {"service_2": "service, 2 threads", "no_work": "no work", "flops": "FLOPs", "runtime": "runtime alone"}
    return {
        names.get(name, name): Figures.of([Run(1e6 / each, each, broker_microseconds=100)])
        for name, each in microseconds.items()
    }


@pytest.fixture
def report() -> Report:
    return Report(
        processor="",
        cores=2,
        python="",
        libraries={},
        models={"braai": "", "convnext": ""},
        packets=1,
        alerts=1,
        repetitions=1,
        stages={
            "decode": contest(naive=4000, service=200, service_2=110, inflate=100),
            "score: convnext": contest(service=3000, runtime=2400),
        },
        wholes={
            "archive -> scores": contest(naive=6000, service=800, inflate=100, flops=500, runtime=540),
            "Kafka -> scores -> Kafka: braai": contest(
                naive=9000, service=1000, inflate=100, flops=500, no_work=300, runtime=600
            ),
        },
        quantities={"latency p50, ms": Spread.of([50]), "latency p99, ms": Spread.of([251])},
    )


def test_ratios_are_between_competitors_of_one_contest(report: Report) -> None:
    assert ratios(report) == pytest.approx(
        {
            "decode: naive / service": 20,
            "decode: service / inflate": 2,
            "decode: 2 threads / 1": 200 / 110,
            "archive: floor / service": 600 / 800,
            "archive: floor, the runtime's inference / service": 640 / 800,
            "archive: naive / service": 7.5,
            "Kafka: service / naive": 9,
            # 1,000 alerts a second; 2 cores with 300 + 100 (the broker's) + 100 + 500 us an alert allow 2,000.
            "Kafka: service / floors": 0.5,
            "Kafka: service / floors, the runtime's inference": 0.55,
            "braai: Kafka / runtime alone": 0.6,
            "convnext: score / runtime alone": 0.8,
        }
    )


def test_minimum_and_maximum_targets_are_judged_correctly(report: Report) -> None:
    met = {judgement.target.name: judgement.met for judgement in judge(report)}
    assert met == {
        "decode: naive / service": True,
        "decode: service / inflate": False,
        "decode: 2 threads / 1": True,
        "archive: floor / service": True,
        "archive: naive / service": True,
        "Kafka: service / naive": True,
        "Kafka: service / floors, the runtime's inference": False,
        "latency p50, ms": True,
        "latency p99, ms": False,
        "convnext: score / runtime alone": False,
    }


@pytest.mark.parametrize(
    ("name", "now", "is_worse"),
    [
        ("decode: naive / service", 8.1, False),
        ("decode: naive / service", 7.9, True),
        ("decode: naive / service", 100, False),
        ("decode: service / inflate", 11.9, False),
        ("decode: service / inflate", 12.1, True),
        ("decode: service / inflate", 1, False),
    ],
)
def test_only_ratios_worse_than_their_tolerance_fail(tmp_path: Path, name: str, now: float, is_worse: bool) -> None:
    file = tmp_path / "ratios.json"
    expected = {name: {"ratio": 10, "tolerance": 0.2}, "not measured": {"ratio": 1, "tolerance": 0}}
    file.write_text(json.dumps(expected))
    worse = check({name: now}, file)
    assert [line.partition(" is ")[0] for line in worse] == ([name] if is_worse else [])


@pytest.mark.parametrize("text", ["{", '{"decode": 3}', "{}"])
def test_a_check_that_compares_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ratios.json"
    file.write_text(text)
    with pytest.raises(BenchmarkError, match=r"ratios\.json"):
        check({"decode: naive / service": 3}, file)
