"""`broker-filter bench`: how fast the service is on this machine, beside a naive loop."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker_filter.bench.benchmark import Report
    from broker_filter.bench.measure import Contest

ALERTS = 4000
"""Some transactions of the service, some hundred alerts of the naive loop."""
LEAST_ALERTS = 256
"""Fewer are committed at once, and there is nothing to measure."""
REPETITIONS = 5

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure stages and throughput beside a naive loop",
        description="Measures the service beside a naive loop (fastavro, astropy, torch, one alert at a time) in one "
        "run on the same packets: stages in CPU time, archive to scores, and topic to topic through a broker.",
    )
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="ZTF packets; simulated ones without any")
    parser.add_argument("--model", default="default", metavar="BUNDLE", help="bundle to score with")
    parser.add_argument(
        "--alerts", type=int, default=ALERTS, help=f"alerts through archive and broker (default {ALERTS})"
    )
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help=f"of each figure (default {REPETITIONS})")
    parser.add_argument(
        "--bootstrap-servers",
        metavar="HOST:PORT",
        help="cluster to use; without it Apache Kafka is started from KAFKA_HOME, or else the embedded broker",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table, writes the figures."""
    from broker_filter.bench.benchmark import run_benchmark

    if arguments.alerts < LEAST_ALERTS or arguments.repetitions < 1:
        print(f"broker-filter bench: --alerts from {LEAST_ALERTS}, --repetitions from 1", file=sys.stderr)
        return 2
    report = run_benchmark(
        arguments.inputs,
        model=arguments.model,
        alerts=arguments.alerts,
        repetitions=arguments.repetitions,
        bootstrap_servers=arguments.bootstrap_servers,
        announce=log.info,
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    show(report)
    return 0


def show(report: Report) -> None:
    """The report as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    def table(title: str, contests: dict[str, Contest], figure: str, ratio: str) -> Table:
        made = Table("", "naive", "service", "ratio", title=title, title_justify="left")
        for name, contest in contests.items():
            spreads = (getattr(figures, figure) for figures in (contest.naive, contest.service))
            cells = (f"{spread.median:,.0f} ({spread.lowest:,.0f} to {spread.highest:,.0f})" for spread in spreads)
            made.add_row(name, *cells, f"{getattr(contest, ratio):.1f}")
        return made

    console = Console()
    console.print(f"{report.machine['processor']}, {report.machine['cores']} cores; {report.model}; {report.broker}")
    console.print(
        f"{report.packets} packets, medians of {report.repetitions} interleaved repetitions (lowest to highest)"
    )
    cpu, throughput = ("cpu_microseconds", "cpu_ratio"), ("alerts_per_second", "throughput_ratio")
    console.print(table("CPU microseconds an alert, one thread", report.stages, *cpu))
    console.print(table("CPU microseconds an alert, all cores", report.wholes, *cpu))
    console.print(table("Alerts/s, all cores", report.wholes, *throughput))
