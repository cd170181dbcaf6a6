"""`broker-filter bench`: how fast the service is on this machine, beside a naive loop and the floors."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from broker_filter.bench.options import PARTS, Options
from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import add_device_option

DEFAULT_PARTS = ("stages", "archive", "kafka", "latency", "startup")
"""Some minutes; the others take as long again, each."""
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
        help="measure stages and throughput beside a naive loop and the floors",
        examples=(
            "broker-filter bench",
            "broker-filter bench night.tar.gz --model default --parts stages,archive --out bench.json",
        ),
        description="Measures the service beside a naive loop (fastavro, astropy, torch, one alert at a time) and the "
        "floors (inflating, the network's operations, a Kafka loop without work), in one run on the same packets.",
    )
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="ZTF packets; simulated ones without any")
    parser.add_argument(
        "--model",
        action="append",
        metavar="BUNDLE",
        help="bundle to score with; may be repeated: all but the first compete with their runtime alone "
        "(default: `default`)",
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default=DEFAULT_PARTS,
        metavar="PART,...",
        help=f"of {', '.join(PARTS)}; or all (default {','.join(DEFAULT_PARTS)})",
    )
    add_device_option(parser)
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
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="end with status 1 where a ratio is worse than the file's"
    )
    parser.set_defaults(run=run)


def _parts(text: str) -> tuple[str, ...]:
    parts = PARTS if text == "all" else tuple(text.split(","))
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return parts


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the figures, compares the ratios."""
    require_extra("bench", "the benchmark", "torch")
    from broker_filter.bench.benchmark import run_benchmark
    from broker_filter.bench.tables import show
    from broker_filter.bench.targets import check, judge, ratios
    from broker_filter.console import stdout_console

    if arguments.alerts < LEAST_ALERTS or arguments.repetitions < 1:
        print(f"broker-filter bench: --alerts from {LEAST_ALERTS}, --repetitions from 1", file=sys.stderr)
        return 2
    options = Options(
        inputs=arguments.inputs,
        models=arguments.model or ["default"],
        parts=arguments.parts,
        device=arguments.device,
        alerts=arguments.alerts,
        repetitions=arguments.repetitions,
        bootstrap_servers=arguments.bootstrap_servers,
    )
    for package in ("kafka", "streaming"):  # parts of the service run in this process too, and would log each step
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
