"""Prints a report as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from broker_filter.bench.measure import (
    FLOPS,
    INFLATE,
    NAIVE,
    NO_WORK,
    PARSE,
    RUNTIME,
    SERVICE,
    SERVICE_2_THREADS,
    Contest,
    Figures,
    Spread,
)
from broker_filter.bench.report import Report
from broker_filter.bench.targets import Judgement, judge, ratios

ORDER = (NAIVE, SERVICE, SERVICE_2_THREADS, INFLATE, PARSE, FLOPS, RUNTIME, NO_WORK)
"""Order of the columns in the table of stages."""


def show(report: Report, console: Console) -> None:
    """Print the machine and the packets, every contest, the ratios, and the targets."""
    models = ", ".join(f"{name} {model}" for name, model in report.models.items())
    console.print(f"{report.processor}, {report.cores} cores; {models}; {report.broker or 'no broker'}")
    console.print(
        f"{report.packets} packets, medians of {report.repetitions} interleaved repetitions (lowest to highest)"
    )
    if report.stages:
        console.print(stages_table(report.stages, on_gpu="cuda" in models.lower()))
    for name, contest in {**report.wholes, **report.scaling}.items():
        console.print(contest_table(name, contest))
    if report.quantities:
        console.print(quantities_table(report.quantities))
    if found := ratios(report):
        console.print(ratios_table(found))
    if judgements := judge(report):
        console.print(targets_table(judgements))


def stages_table(stages: Mapping[str, Contest], *, on_gpu: bool) -> Table:
    """Return a table with a row per stage and a column per competitor.

    It shows the CPU time, or the wall time if a GPU does a part of the work.
    """
    columns = [name for name in ORDER if any(name in contest for contest in stages.values())]
    table = _table(f"{'Wall' if on_gpu else 'CPU'} microseconds per alert, by stage", "stage", *columns)
    for stage, contest in stages.items():
        figures = [contest.get(name) for name in columns]
        spreads = [each and (each.wall_microseconds if on_gpu else each.cpu_microseconds) for each in figures]
        table.add_row(stage, *(_spread(spread) if spread else "" for spread in spreads))
    return table


def contest_table(title: str, contest: Contest) -> Table:
    """Return a table with a row per competitor."""
    table = _table(title, "", "alerts/s", "CPU us/alert", "brokers' CPU us/alert", "peak MB")
    for name, figures in contest.items():
        table.add_row(name, *_cells(figures))
    return table


def quantities_table(quantities: Mapping[str, Spread]) -> Table:
    """Return a table with a row per figure; the name of a figure contains the unit."""
    table = _table("Other figures", "", "")
    for name, spread in quantities.items():
        table.add_row(name, _spread(spread, digits=1))
    return table


def ratios_table(found: Mapping[str, float]) -> Table:
    """Return a table with a row per ratio."""
    table = _table("Ratios", "", "")
    for name, ratio in found.items():
        table.add_row(name, f"{ratio:.2f}")
    return table


def targets_table(judgements: Sequence[Judgement]) -> Table:
    """Return a table with a row per target."""
    table = _table("Targets (2 cores, no GPU, braai network)", "", "figure", "target", "")
    for judgement in judgements:
        target = judgement.target
        bound = f"at {'most' if target.at_most else 'least'} {target.bound:g}"
        stretch = f" (stretch {target.stretch:g})" if target.stretch else ""
        table.add_row(target.name, f"{judgement.figure:.2f}", bound + stretch, "met" if judgement.met else "NOT MET")
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _cells(figures: Figures) -> list[str]:
    spreads = (
        figures.alerts_per_second,
        figures.cpu_microseconds,
        figures.broker_microseconds,
        figures.peak_megabytes,
    )
    return [_spread(spread) if spread else "" for spread in spreads]


def _spread(spread: Spread, digits: int = 0) -> str:
    if spread.lowest == spread.highest:
        return f"{spread.median:,.{digits}f}"
    return f"{spread.median:,.{digits}f} ({spread.lowest:,.{digits}f}-{spread.highest:,.{digits}f})"
