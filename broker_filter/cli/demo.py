"""`broker-filter demo`: runs the service on simulated nights, on this machine, in about a minute."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import positive

EXTRA = ("galsim", "matplotlib", "noida_db")
"""Modules that the extra `demo` installs."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `demo` to the parser."""
    parser = subparsers.add_parser(
        "demo",
        help="run the service on simulated nights of ZTF and LSST, on this machine",
        examples=("broker-filter demo --out demo-out", "broker-filter demo --out demo-out --alerts 5000 --seed 2"),
        description="Simulates a night of ZTF and one of LSST, starts an embedded Kafka broker and the service, and "
        "sends both nights to the service. Then shows the throughput, the alerts that the filters selected, the "
        "anomalies, and a contact sheet of cutouts. Needs no network and no Kafka installation.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory for everything that is written"
    )
    parser.add_argument(
        "--alerts",
        type=positive,
        default=1500,
        metavar="N",
        help="number of alerts of ZTF; LSST has a fifth of it (default: 1500)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="seed of the simulation; another seed gives another night (default: 1)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration and return the exit status."""
    require_extra("demo", "the demo", *EXTRA)
    from broker_filter.demo.demonstration import run_demo

    run_demo(arguments.out, arguments.alerts, arguments.seed)
    return 0
