"""`broker-filter positions`: shows where a service reads its input, and moves it to another offset or time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC
from typing import TYPE_CHECKING

from broker_filter.cli.options import MOMENT_HELP, add_config_option, moment
from broker_filter.cli.parser import UsageError

if TYPE_CHECKING:
    from broker_filter.kafka.positions import Key, Place, Standing, StoredPositions

CANCELLED = 1
"""Exit status if the operator does not confirm."""
CONFIG = "--config service.yaml"
NONE = "-"
"""Shown in the place of a value that does not exist."""
REMADE = "deleted topic"
"""Shown in the place of the lag if the position belongs to a deleted topic of the same name."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `positions` and its three subcommands to the parser."""
    parser = subparsers.add_parser(
        "positions",
        help="show or move the positions of a service in its input",
        examples=(
            f"broker-filter positions show {CONFIG}",
            f"broker-filter positions rewind {CONFIG} --to 2h --dry-run",
            f"broker-filter positions set {CONFIG} --topic alerts --partition 0 --offset 1200",
        ),
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    shower = parts.add_parser(
        "show",
        help="show the stored position of each partition",
        description="Prints for each partition of the input's topics: the stored position (the first message whose "
        "output is not committed), the beginning and the end of the log, the lag, and the time of the message at the "
        "position. The service may run.",
    )
    _add_selection(shower)
    shower.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    shower.set_defaults(run=_show)

    setter = parts.add_parser(
        "set",
        help="move positions, forward or back",
        description="Stores new positions for all partitions of the input's topics, or for those that --topic and "
        "--partition select. The service must be stopped. If a position moves back, the messages after it are read "
        "again, and their alerts are published again. If it moves forward, the messages in between are never read.",
        examples=(
            f"broker-filter positions set {CONFIG} --topic alerts --partition 0 --offset 1200",
            f"broker-filter positions set {CONFIG} --offset end --yes",
            f"broker-filter positions set {CONFIG} --to 2026-11-27T22:00 --dry-run",
        ),
    )
    _add_selection(setter)
    where = setter.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--offset",
        type=_offset,
        metavar="N",
        help="the offset of a message, for one partition; or `beginning` or `end` of the log",
    )
    where.add_argument("--to", type=moment, metavar="TIME", help=f"the first message at or after a time: {MOMENT_HELP}")
    _add_consent(setter)
    setter.set_defaults(run=_set)

    rewinder = parts.add_parser(
        "rewind",
        help="move positions back to a time",
        description="Moves each position back to the first message at or after a time, so that the service reads these "
        "messages again and publishes their alerts again. A position that is before this message stays, and so does a "
        "partition without a stored position. The service must be stopped.",
        examples=(
            f"broker-filter positions rewind {CONFIG} --to 2h --dry-run",
            f"broker-filter positions rewind {CONFIG} --to 2026-11-27T22:00",
        ),
    )
    _add_selection(rewinder)
    rewinder.add_argument("--to", type=moment, metavar="TIME", required=True, help=MOMENT_HELP)
    _add_consent(rewinder)
    rewinder.set_defaults(run=_rewind)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    add_config_option(parser)
    parser.add_argument("--topic", metavar="TOPIC", help="only this topic of the input (default: all that exist)")
    parser.add_argument("--partition", type=int, metavar="N", help="only the partition with this number (default: all)")


def _add_consent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only print what would change")
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def _offset(text: str) -> int | str:
    if text in ("beginning", "end"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not an offset, `beginning` or `end`")
    return int(text)


def _show(arguments: argparse.Namespace) -> int:
    with closing(_open(arguments)) as positions:
        keys = positions.partitions(arguments.topic, arguments.partition)
        standings = positions.standings(keys, settled=False, times=True)
        members = positions.members()
    if arguments.json:
        print(json.dumps(_document(positions, members, standings), indent=2))
        return 0
    print(f"group {positions.group}, positions in {positions.stored_in}")
    print(f"live members: {'; '.join(members) or 'none'}")
    head = ("topic", "partition", "position", "beginning", "end", "lag", "time at position")
    _print_table(head, [(*one.key, _or_none(one.position), one.beginning, one.end, *_lag(one)) for one in standings])
    return 0


def _set(arguments: argparse.Namespace) -> int:
    if isinstance(arguments.offset, int) and (arguments.topic is None or arguments.partition is None):
        raise UsageError("--offset N is an offset of one partition: give --topic and --partition too")
    return _move(arguments, arguments.to if arguments.offset is None else arguments.offset, back_only=False)


def _rewind(arguments: argparse.Namespace) -> int:
    return _move(arguments, arguments.to, back_only=True)


def _move(arguments: argparse.Namespace, place: Place, *, back_only: bool) -> int:
    from broker_filter.kafka.positions import moved_messages

    with closing(_open(arguments)) as positions:
        standings = positions.standings(positions.partitions(arguments.topic, arguments.partition))
        targets = positions.targets(standings, place, back_only=back_only)
        if not targets:
            print("no position changes")
            return 0
        _print_change(standings, targets)
        again, skipped = moved_messages(standings, targets)
        print(f"{len(targets)} positions change: messages to read again: {again}, to skip: {skipped}")
        if arguments.dry_run:
            return 0
        if not arguments.yes and not _confirmed():
            print("nothing was changed")
            return CANCELLED
        positions.move(targets)
        changed = [one for one in positions.standings(list(targets)) if one.position != targets[one.key]]
    if changed:  # only a service that started meanwhile can have stored another position
        print(f"{len(changed)} positions have moved on since: the service runs again")
    print("stored")
    return 0


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise UsageError("standard input is not a terminal, so nobody can confirm: give --yes")
    return input("Store these positions? [y/N] ").strip().lower() in ("y", "yes")


def _open(arguments: argparse.Namespace) -> StoredPositions:
    from broker_filter.config_file import load_service
    from broker_filter.kafka.positions import StoredPositions

    return StoredPositions(load_service(arguments.config).config)


def _print_change(standings: Sequence[Standing], targets: Mapping[Key, int]) -> None:
    head = ("topic", "partition", "before", "after", "beginning", "end")
    rows = [
        (*one.key, REMADE if one.remade else _or_none(one.position), targets[one.key], one.beginning, one.end)
        for one in standings
        if one.key in targets
    ]
    _print_table(head, rows)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in columns; the first column is aligned to the left, the others to the right."""
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def _or_none(value: object) -> str:
    return NONE if value is None else str(value)


def _lag(one: Standing) -> tuple[str, str]:
    return REMADE if one.remade else _or_none(one.lag), f"{one.time:%Y-%m-%dT%H:%M:%SZ}" if one.time else NONE


def _document(positions: StoredPositions, members: Sequence[str], standings: Sequence[Standing]) -> dict[str, object]:
    """Return the content of `show` for JSON; times are ISO 8601 in UTC."""
    rows = [
        {
            "topic": one.topic,
            "partition": one.partition,
            "position": one.position,
            "beginning": one.beginning,
            "end": one.end,
            "lag": one.lag,
            "time": one.time.astimezone(UTC).isoformat() if one.time else None,
            "deleted_topic": one.remade,
        }
        for one in standings
    ]
    return {
        "group": positions.group,
        "stored_in": positions.stored_in,
        "members": list(members),
        "partitions": rows,
    }
