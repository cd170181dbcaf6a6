"""Options of commands that connect to brokers without a service file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.parser import UsageError, require_files
from broker_filter.errors import without_credentials

if TYPE_CHECKING:
    from broker_filter.packets.packet import Packet

TOPIC = "kafka://"
"""Prefix of a topic's address: `kafka://HOST:PORT[,HOST:PORT]/TOPIC`."""


class AddressError(UsageError):
    """The address of a topic is malformed, or the command cannot read that topic."""


class PropertiesError(UsageError):
    """A Kafka property is not of the form KEY=VALUE."""


def add_kafka_options(parser: argparse._ActionsContainer) -> None:
    """Add the options `--kafka` and `--kafka-file` to a parser."""
    parser.add_argument(
        "--kafka", action="append", default=[], metavar="KEY=VALUE", help="librdkafka property; may be repeated"
    )
    parser.add_argument(
        "--kafka-file",
        type=Path,
        metavar="FILE",
        help="file of librdkafka properties, one KEY=VALUE per line: keeps secrets off the command line",
    )


def check_topic_options(arguments: argparse.Namespace) -> None:
    """Raise UsageError if one of `--topic`, `--bootstrap-servers` and `--since` lacks another one that it needs."""
    if arguments.topic and not arguments.bootstrap_servers:
        raise UsageError("--topic needs --bootstrap-servers HOST:PORT")
    if arguments.since and not arguments.topic:
        raise UsageError("--since needs --topic")


def split_address(address: str) -> tuple[str, str]:
    """Return the bootstrap servers and the topic name of an address `kafka://...`. Raises AddressError."""
    bootstrap_servers, _, topic = address.removeprefix(TOPIC).partition("/")
    if not bootstrap_servers or not topic:
        raise AddressError(f"{without_credentials(address)}: not the address of a topic; write {TOPIC}HOST:PORT/TOPIC")
    return bootstrap_servers, topic


def read_inputs(
    arguments: argparse.Namespace,
    read: Callable[[dict[str, object], str], Iterator[Packet]],
    wanted: Collection[str] = (),
) -> Iterator[Packet]:
    """Yield the packets of the archives and topics in `arguments.inputs`.

    `read` returns the packets of a topic, given librdkafka's properties and the topic's name. `wanted`: fields to read
    from Parquet archives. Raises AddressError, PropertiesError and NoInputError before anything is read.
    """
    from broker_filter.streaming.archives import check_inputs, read_packets

    archives = [given for given in arguments.inputs if not given.startswith(TOPIC)]
    if archives == arguments.inputs:
        return read_packets(archives, wanted=wanted)
    check_inputs(archives)
    packets: list[Iterator[Packet]] = []
    for given in arguments.inputs:
        if given.startswith(TOPIC):
            bootstrap_servers, topic = split_address(given)
            packets.append(read(kafka_properties(arguments, bootstrap_servers), topic))
        else:
            packets.append(read_packets([given], wanted=wanted))
    return chain.from_iterable(packets)


def kafka_properties(arguments: argparse.Namespace, bootstrap_servers: str) -> dict[str, object]:
    """Return librdkafka's properties from `--kafka-file` and `--kafka`, which overrides the file.

    Raises UsageError if the file does not exist, PropertiesError if a property is malformed, and OSError if the file
    cannot be read.
    """
    from broker_filter.kafka.client import NO_TELEMETRY

    require_files(arguments.kafka_file)
    lines = arguments.kafka_file.read_text().splitlines() if arguments.kafka_file else []
    properties: dict[str, object] = {**NO_TELEMETRY}
    for line in [*lines, *arguments.kafka]:
        if line.strip() and not line.lstrip().startswith("#"):
            key, equals, value = line.partition("=")
            if not equals:  # the message must not show the line, which may be a secret
                raise PropertiesError("--kafka and the lines of --kafka-file must be KEY=VALUE")
            properties[key.strip()] = value.strip()
    return {**properties, "bootstrap.servers": bootstrap_servers}
