"""`broker-filter bench`: how fast the service is on this machine, beside a naive loop."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker_filter.bench.benchmark import Report
    from broker_filter.bench.measure import Contest

ALERTS = 4000
"""Some transactions of the service, some hundred alerts of the naive loop."""
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

    def table(title: str, figures: dict[str, Contest]) -> Table:
        made = Table("", "naive", "service", "ratio", title=title, title_justify="left")
        for name, contest in figures.items():
            cells = (
                f"{spread.median:,.0f} ({spread.lowest:,.0f} to {spread.highest:,.0f})"
                for spread in (contest["naive"], contest["service"])
            )
            made.add_row(name, *cells, f"{report.ratios[name]:.1f}")
        return made

    console = Console()
    console.print(f"{report.machine['processor']}, {report.machine['cores']} cores; {report.model}; {report.broker}")
    console.print(
        f"{report.packets} packets, medians of {report.repetitions} interleaved repetitions (lowest to highest)"
    )
    console.print(table("CPU microseconds an alert, one thread", report.stages))
    console.print(table("Alerts/s, all cores", report.throughput))
