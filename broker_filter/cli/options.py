"""Command-line options that several commands share. Imports nothing heavy: `--help` imports it."""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

STDIN = "-"
"""The name that stands for standard input among the inputs, as in `streaming.archives`."""
INPUT_HELP = f"file, folder (read recursively) or archive; `{STDIN}` for standard input"

AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MOMENT_HELP = "ISO time (UTC, unless it has a zone), or a duration before now such as 90s, 30m, 2h or 1d"


def moment(text: str) -> datetime:
    """Parse a time as MOMENT_HELP describes it, and return it in UTC. Raises ArgumentTypeError for any other text."""
    try:
        if ago := AGO.fullmatch(text):
            return datetime.now(UTC) - timedelta(seconds=float(ago[1]) * SECONDS[ago[2]])
        given = datetime.fromisoformat(text)
        return given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not an {MOMENT_HELP}") from None


def fraction(text: str) -> float:
    """Parse a number above 0 and at most 1. Raises ArgumentTypeError outside, ValueError if it is not a number."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def positive(text: str) -> int:
    """Parse an integer above 0. Raises ArgumentTypeError for any other text."""
    if not (text.isascii() and text.isdecimal()) or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def milliseconds(time: datetime | None) -> int | None:
    """Return a time in Unix milliseconds, as Kafka has it; None if no time is given."""
    return None if time is None else round(1000 * time.timestamp())


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Add the required option `--config` to a parser."""
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the service's YAML file")


def add_registry_option(parser: argparse._ActionsContainer, use: str = "alerts in Confluent wire format") -> None:
    """Add the option `--schema-registry` to a parser. `use`: what the schemas are for, as the help says it."""
    parser.add_argument(
        "--schema-registry",
        metavar="URL|DIR",
        help=f"schema registry, or directory of schemas, for {use}",
    )


def add_cache_option(parser: argparse._ActionsContainer) -> None:
    """Add the option `--drop-schema-cache` to a parser."""
    parser.add_argument(
        "--drop-schema-cache",
        action="store_true",
        help="first delete the registry's schemas that earlier runs cached: needed after the registry was wiped",
    )


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Add the option `--device` to a parser."""
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="device that runs the networks (default: auto, CUDA if it is available)",
    )


def add_scoring_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of every command that scores archives: `--schema-registry` and `--device`."""
    add_registry_option(parser)
    add_device_option(parser)


def add_reference_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that compares alerts with a reference set: `--reference` and `--model`."""
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="FILE", help="reference set, from `reference build`"
    )
    parser.add_argument(
        "--model",
        metavar="BUNDLE",
        help="bundle that made the reference set (default: the bundle that ships under the recorded name)",
    )


def alert_limit(text: str) -> int:
    """Parse the number of alerts that a command keeps: from 1 to the most that a reference set holds.

    Raises ArgumentTypeError outside these limits, ValueError if the text is not an integer.
    """
    from broker_filter.anomalies.reference import MAX_ALERTS

    if not 0 < (limit := int(text)) <= MAX_ALERTS:
        raise argparse.ArgumentTypeError(f"must be between 1 and {MAX_ALERTS}, not {limit}")
    return limit
