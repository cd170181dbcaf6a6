"""The ratios of a run, the targets for them, and the comparison with the ratios of an earlier run.

Ratios can be compared between machines; microseconds cannot. A ratio exists only if its parts were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from broker_filter.bench.lsst import DECODE_LSST
from broker_filter.bench.measure import (
    FLOPS,
    INFLATE,
    NAIVE,
    NO_WORK,
    PARSE,
    RUNTIME,
    SERVICE,
    SERVICE_2_THREADS,
    BenchmarkError,
    Contest,
)
from broker_filter.bench.report import Report
from broker_filter.bench.rows import PACKETS, ROWS, rows_contest
from broker_filter.bench.runs.memory import EARLY, LATE, resident_at
from broker_filter.bench.runs.throughput import ARCHIVE, kafka_whole
from broker_filter.bench.stages import DECODE, score_stage
from broker_filter.config import Section
from broker_filter.packets.batch import Survey


@dataclass(frozen=True, slots=True)
class Target:
    """The bound of a ratio or another figure: a minimum, or a maximum if `at_most`."""

    name: str
    bound: float
    stretch: float | None = None
    at_most: bool = False


def rows_ratio(survey: Survey) -> str:
    """Return the name of the ratio between rows of Parquet and packets for the alerts of a survey."""
    return f"archive of {survey.name}: rows / packets"


RESIDENT = f"resident: alert {LATE:,} / {EARLY:,}"
TARGETS = (
    Target("decode: naive / service", 10),
    Target("decode: service / inflate", 1.8, stretch=1.4, at_most=True),
    Target("decode: 2 threads / 1", 1.7),
    Target("archive: floor / service", 0.75),
    Target("archive: naive / service", 5.5),
    Target(rows_ratio(Survey.ZTF), 1.5, at_most=True),
    Target("Kafka: service / naive", 6, stretch=8),
    Target("Kafka: service / floors, the runtime's inference", 0.65),
    Target("latency p50, ms", 60, at_most=True),
    Target("latency p99, ms", 250, at_most=True),
    Target("burst drained, s", 60, at_most=True),
    Target("burst, rebalances", 0, at_most=True),
    Target("burst, peak MB", 2048, at_most=True),
    Target(RESIDENT, 1.1, at_most=True),
    Target("first score of a replay, s", 4, at_most=True),
    Target("first score of the service, s", 4, at_most=True),
)
"""Targets on 2 cores without a GPU, with the braai network. Stages and archives are compared by CPU time, numbers of
threads and runs through the broker by throughput."""
MODEL_TARGET = 0.85
"""Target for each model after the first, whose network is most of the work: throughput over that of its runtime."""


def ratios(report: Report) -> dict[str, float]:
    """Return the ratios of the measured parts, by name."""
    models = list(report.models)
    found: dict[str, float] = {}
    if decode := report.stages.get(DECODE):
        found["decode: naive / service"] = _cpu(decode, NAIVE) / _cpu(decode, SERVICE)
        found["decode: service / inflate"] = _cpu(decode, SERVICE) / _cpu(decode, INFLATE)
        found["decode: 2 threads / 1"] = _rate(decode, SERVICE_2_THREADS) / _rate(decode, SERVICE)
    if lsst := report.stages.get(DECODE_LSST):
        found["decode LSST: naive / service"] = _cpu(lsst, NAIVE) / _cpu(lsst, SERVICE)
        found["decode LSST: service / parse"] = _cpu(lsst, SERVICE) / _cpu(lsst, PARSE)
    if archive := report.wholes.get(ARCHIVE):
        found["archive: floor / service"] = _cpu(archive, INFLATE, FLOPS) / _cpu(archive, SERVICE)
        with_runtime = _cpu(archive, INFLATE, RUNTIME) / _cpu(archive, SERVICE)
        found["archive: floor, the runtime's inference / service"] = with_runtime
        found["archive: naive / service"] = _cpu(archive, NAIVE) / _cpu(archive, SERVICE)
    for survey in Survey:
        if formats := report.wholes.get(rows_contest(survey)):
            found[rows_ratio(survey)] = _cpu(formats, ROWS) / _cpu(formats, PACKETS)
    if kafka := report.wholes.get(kafka_whole(models[0])):
        found["Kafka: service / naive"] = _rate(kafka, SERVICE) / _rate(kafka, NAIVE)
        if broker := kafka[NO_WORK].broker_microseconds:
            for name, inference in (("floors", FLOPS), ("floors, the runtime's inference", RUNTIME)):
                core_microseconds = broker.median + _cpu(kafka, NO_WORK, INFLATE, inference)
                found[f"Kafka: service / {name}"] = _rate(kafka, SERVICE) * core_microseconds / 1e6 / report.cores
    for model in models:
        of_score, of_kafka = _of_runtime(model)
        if score := report.stages.get(score_stage(model)):
            found[of_score] = _rate(score, SERVICE) / _rate(score, RUNTIME)
        if kafka := report.wholes.get(kafka_whole(model)):
            found[of_kafka] = _rate(kafka, SERVICE) / _rate(kafka, RUNTIME)
    if late := report.quantities.get(resident_at(LATE)):
        found[RESIDENT] = late.median / report.quantities[resident_at(EARLY)].median
    return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """A target and the measured figure."""

    target: Target
    figure: float

    @property
    def met(self) -> bool:
        """Whether the figure reaches the target."""
        figure, bound = self.figure, self.target.bound
        return figure <= bound if self.target.at_most else figure >= bound


def judge(report: Report) -> list[Judgement]:
    """Return the targets for which a figure was measured."""
    figures = ratios(report) | {name: spread.median for name, spread in report.quantities.items()}
    of_models = [Target(name, MODEL_TARGET) for model in list(report.models)[1:] for name in _of_runtime(model)]
    return [Judgement(target, figures[target.name]) for target in (*TARGETS, *of_models) if target.name in figures]


class Expected(Section):
    """A ratio of an earlier run, and its tolerance: with 0.2, it may be up to 20 % worse now."""

    ratio: float
    tolerance: float = Field(ge=0)


def check(ratios: Mapping[str, float], file: Path) -> list[str]:
    """Return one line for each ratio that is worse than in `file` by more than its tolerance.

    Ratios that were not measured are skipped. Raises BenchmarkError if the file is invalid, or if none of its ratios
    was measured.
    """
    try:
        expected = TypeAdapter(dict[str, Expected]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise BenchmarkError(f"{file}: {error}") from error
    compared = expected.keys() & ratios.keys()
    if not compared:
        raise BenchmarkError(f"{file}: none of its ratios was measured; choose other --parts")
    lower_is_better = {target.name for target in TARGETS if target.at_most}
    worse = []
    for name in sorted(compared):
        then, tolerance, now = expected[name].ratio, expected[name].tolerance, ratios[name]
        bad = now > then * (1 + tolerance) if name in lower_is_better else now < then * (1 - tolerance)
        if bad:
            worse.append(f"{name} is {now:.2f}, was {then:.2f} (tolerance {tolerance:.0%})")
    return worse


def _of_runtime(model: str) -> tuple[str, str]:
    return f"{model}: score / runtime alone", f"{model}: Kafka / runtime alone"


def _cpu(contest: Contest, *names: str) -> float:
    return sum(contest[name].cpu_microseconds.median for name in names)


def _rate(contest: Contest, name: str) -> float:
    return contest[name].alerts_per_second.median
