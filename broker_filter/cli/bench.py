"""`broker-filter bench`: how fast the service is on this machine, compared with a naive loop and with lower bounds."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from broker_filter.bench.options import OF_BOTH, OF_LSST, PARTS, VISIT, Options
from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import add_device_option, add_registry_option

DEFAULT_PARTS = ("stages", "archive", "kafka", "latency", "startup")
"""These parts take some minutes together. Each of the other parts takes about as long again."""
ALERTS = 4000
"""Enough for several transactions of the service, and for some hundred alerts of the naive loop."""
LEAST_ALERTS = 256
"""The service commits fewer alerts in a single transaction, so that there is no time between two commits to measure."""
REPETITIONS = 5

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `bench` to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed, compared with a naive loop and with lower bounds",
        examples=(
            "broker-filter bench",
            "broker-filter bench night.tar.gz --model default --parts stages,archive --out bench.json",
        ),
        description="Measures the service in one run with two comparisons, on the same packets. The naive loop "
        "processes one alert at a time with fastavro, astropy and torch. The floors are lower bounds on the work: "
        "decompressing the stamps, the network's floating-point operations, and a Kafka loop that copies messages.",
    )
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="packets (default: simulated)")
    parser.add_argument(
        "--model",
        action="append",
        metavar="BUNDLE",
        help="bundle to score with; may be repeated. The naive loop runs the first bundle only; the others are "
        "compared with their runtime alone (default: `default`)",
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default=DEFAULT_PARTS,
        metavar="PART,...",
        help=f"parts to measure: {', '.join(PARTS)}; or `all` (default: {','.join(DEFAULT_PARTS)})",
    )
    add_device_option(parser)
    add_registry_option(
        parser,
        f"LSST packets in INPUT: the parts {', '.join((*OF_LSST, *OF_BOTH))} then use these packets instead of "
        "simulated ones",
    )
    parser.add_argument(
        "--visit",
        type=int,
        default=VISIT,
        metavar="N",
        help=f"alerts that arrive together in the part burst (default: {VISIT})",
    )
    parser.add_argument(
        "--alerts",
        type=int,
        default=ALERTS,
        metavar="N",
        help=f"alerts to send through the archive and through the broker, at least {LEAST_ALERTS} (default: {ALERTS})",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=REPETITIONS,
        metavar="N",
        help=f"how often each figure is measured (default: {REPETITIONS})",
    )
    parser.add_argument(
        "--bootstrap-servers",
        metavar="HOST:PORT",
        help="Kafka cluster to use (default: start Apache Kafka from KAFKA_HOME, or the embedded broker without it)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="end with status 1 if a ratio is worse than in this file"
    )
    parser.set_defaults(run=run)


def _parts(text: str) -> tuple[str, ...]:
    parts = PARTS if text == "all" else tuple(text.split(","))
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    return parts


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark, print and write its figures, compare the ratios, and return the exit status."""
    require_extra("bench", "the benchmark", "torch")
    from broker_filter.bench.benchmark import run_benchmark
    from broker_filter.bench.tables import show
    from broker_filter.bench.targets import check, judge, ratios
    from broker_filter.console import stdout_console

    if arguments.alerts < LEAST_ALERTS or arguments.repetitions < 1 or arguments.visit < 1:
        print(
            f"broker-filter bench: --alerts must be at least {LEAST_ALERTS}, --repetitions and --visit at least 1",
            file=sys.stderr,
        )
        return 2
    options = Options(
        inputs=arguments.inputs,
        models=arguments.model or ["default"],
        parts=arguments.parts,
        device=arguments.device,
        alerts=arguments.alerts,
        repetitions=arguments.repetitions,
        bootstrap_servers=arguments.bootstrap_servers,
        schema_registry=arguments.schema_registry,
        visit=arguments.visit,
    )
    for package in ("kafka", "streaming"):  # the service's modules run in this process, and would log each step
        logging.getLogger(f"broker_filter.{package}").setLevel(logging.WARNING)
    report = run_benchmark(options, log.info)
    if arguments.out:
        targets = {one.target.name: {**asdict(one), "met": one.met} for one in judge(report)}
        figures = {**asdict(report), "ratios": ratios(report), "targets": targets}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    show(report, stdout_console())
    worse = check(ratios(report), arguments.check) if arguments.check else []
    for line in worse:
        print(f"broker-filter bench: {line}", file=sys.stderr)
    return 1 if worse else 0
