"""`broker-filter demo`: the service on a simulated night, on this machine, in a minute."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_filter.cli.extras import require_extra

EXTRA = ("galsim", "matplotlib", "noida_db")
"""What the extra `demo` installs."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="the service on a simulated night, on this machine",
        examples=("broker-filter demo --out demo-out", "broker-filter demo --out demo-out --alerts 5000 --seed 2"),
        description="Simulates a survey night, starts a small broker and the service, replays the night into it, and "
        "shows what came out: throughput, what filters found, a contact sheet. Needs neither a network nor Kafka.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--alerts", type=_positive, default=1500, metavar="N", help="of the night (default: 1500)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="another seed, another night (default: 1)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demonstration."""
    require_extra("demo", "the demo", *EXTRA)
    from broker_filter.demo.demonstration import run_demo

    run_demo(arguments.out, arguments.alerts, arguments.seed)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
