"""Options of commands that connect to brokers without a service file."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_filter.cli.parser import UsageError, require_files

TOPIC = "kafka://"
"""How the address of a topic begins: `kafka://HOST:PORT[,HOST:PORT]/TOPIC`."""


class AddressError(UsageError):
    """A topic's address that is none."""


class PropertiesError(UsageError):
    """Kafka properties that are no properties."""


def add_kafka_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--kafka` and `--kafka-file`."""
    parser.add_argument(
        "--kafka", action="append", default=[], metavar="KEY=VALUE", help="librdkafka property; may be repeated"
    )
    parser.add_argument(
        "--kafka-file", type=Path, metavar="FILE", help="librdkafka properties, one KEY=VALUE a line: for secrets"
    )


def split_address(address: str) -> tuple[str, str]:
    """The bootstrap servers and the topic of an address that begins with TOPIC. Raises AddressError."""
    bootstrap_servers, _, topic = address.removeprefix(TOPIC).partition("/")
    if not bootstrap_servers or not topic:
        raise AddressError(f"{address}: a topic is {TOPIC}HOST:PORT/TOPIC")
    return bootstrap_servers, topic


def kafka_properties(arguments: argparse.Namespace, bootstrap_servers: str) -> dict[str, object]:
    """librdkafka's properties: those in the file, and over them those of the command line.

    Raises UsageError, OSError where the file cannot be read.
    """
    from broker_filter.streaming.kafka_client import NO_TELEMETRY

    require_files(arguments.kafka_file)
    lines = arguments.kafka_file.read_text().splitlines() if arguments.kafka_file else []
    properties: dict[str, object] = {**NO_TELEMETRY}
    for line in [*lines, *arguments.kafka]:
        if line.strip() and not line.lstrip().startswith("#"):
            key, equals, value = line.partition("=")
            if not equals:  # the line is not shown: it may be a secret
                raise PropertiesError("--kafka and the lines of --kafka-file must be KEY=VALUE")
            properties[key.strip()] = value.strip()
    return {**properties, "bootstrap.servers": bootstrap_servers}
