"""`broker-filter redrive`: scores the dead letters of a service again, and publishes what is now accepted."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from broker_filter.cli.options import MOMENT_HELP, add_config_option, moment, positive

if TYPE_CHECKING:
    from broker_filter.kafka.redrive import Tally


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `redrive` to the parser."""
    parser = subparsers.add_parser(
        "redrive",
        help="score the dead letters of a service again",
        description="Scores the original bytes of the dead letters with the models and filters of the service file, "
        "and publishes the alerts to the topics of the service, each exactly once; `redriven` in the record is then 1 "
        "or more. A message that is rejected again becomes a new dead letter, whose header `tries` counts up. A letter "
        "that is not selected stays for a later run. The service may run meanwhile. A run that was interrupted or "
        "killed is continued by the next one.",
        examples=(
            "broker-filter redrive --config service.yaml --dry-run",
            "broker-filter redrive --config service.yaml --reason unknown_schema_id,schema_refused --since 2h",
            "broker-filter redrive --config service.yaml --max-tries 3",
        ),
    )
    add_config_option(parser)
    parser.add_argument(
        "--reason",
        action="append",
        type=_reasons,
        default=[],
        metavar="REASON[,REASON]",
        help="only dead letters with one of these reject reasons; may be repeated (default: all)",
    )
    parser.add_argument(
        "--since", type=moment, metavar="TIME", help=f"only dead letters written since a time: {MOMENT_HELP}"
    )
    parser.add_argument(
        "--max-tries", type=positive, metavar="N", help="only dead letters that failed fewer than N times before"
    )
    parser.add_argument("--dry-run", action="store_true", help="only count the dead letters by reason")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Score the selected letters, and print how many there were. Returns the exit status."""
    from broker_filter.config_file import load_service
    from broker_filter.console import progress
    from broker_filter.kafka.redrive import Redrive, Selection

    reasons = frozenset(reason for given in arguments.reason for reason in given)
    selection = Selection(reasons, arguments.since, arguments.max_tries)
    redrive = Redrive(load_service(arguments.config), selection)
    if arguments.dry_run:
        redrive.count()
        print(_counts(redrive.tally))
        return 0
    try:
        with progress("Redriving", unit="dead letters") as advance:
            redrive.run(advance)
    finally:  # also after an error: the outcome of these letters is committed
        if not arguments.quiet:
            print(_summary(redrive.tally))
    return 0


def _reasons(text: str) -> list[str]:
    from broker_filter.packets.rejects import RejectReason

    reasons = text.split(",")
    if unknown := [reason for reason in reasons if reason not in list(RejectReason)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: unknown reason; choose from {', '.join(RejectReason)}")
    return reasons


def _counts(tally: Tally) -> str:
    """Return a table of the letters by reason."""
    rows: list[tuple[str, int, int]] = [
        (reason, tally.selected[reason], tally.not_selected[reason])
        for reason in sorted(tally.selected.keys() | tally.not_selected.keys())
    ]
    rows.append(("total", tally.selected.total(), tally.not_selected.total()))
    lines = [f"{'reason':<24}{'selected':>10}{'other':>10}", *(f"{name:<24}{n:>10}{m:>10}" for name, n, m in rows)]
    return "\n".join([*lines, *_unusable(tally)])


def _summary(tally: Tally) -> str:
    again = f"{tally.rejected.total()} rejected again{_by_reason(tally.rejected)}"
    left = f"{tally.not_selected.total()} dead letters not selected{_by_reason(tally.not_selected)}"
    first = f"{tally.done} dead letters scored again: {tally.published} alerts published, {again}; {left}"
    return "\n".join([first, *_unusable(tally)])


def _by_reason(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{reason} {n}' for reason, n in sorted(counts.items()))})" if counts else ""


def _unusable(tally: Tally) -> list[str]:
    lines = []
    if tally.cut_short:
        lines.append(f"{tally.cut_short} dead letters cannot be scored: they were cut short to fit into the topic")
    if tally.unreadable:
        lines.append(f"{tally.unreadable} messages of the topic are no dead letters of this program")
    return lines
