"""`broker-filter inspect`: describes the contents of a packet, an archive or a topic, for a person. Scores nothing."""

from __future__ import annotations

import argparse
import sys
from itertools import islice

from broker_filter.cli.archived import share_read
from broker_filter.cli.kafka_options import TOPIC, add_kafka_options, read_inputs
from broker_filter.cli.options import INPUT_HELP, add_cache_option, add_registry_option

DEFAULT_LIMIT = 1000
"""Packets to read: one or two seconds of work, and enough to describe an archive."""
PLAIN_WIDTH = 160
"""Width of the output in characters, if it is not written to a terminal."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `inspect` to the parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a packet, archive or topic contains",
        description="Counts the packets of files, folders, archives or a topic by survey, schema version, framing and "
        "outcome, and shows the first alert. Ends with status 1 if there is no readable alert.",
        examples=(
            "broker-filter inspect ztf_public_20260225.tar.gz",
            "broker-filter inspect --limit 0 --all nights/",
            "broker-filter inspect kafka://localhost:9092/me.scored",
            "kcat -b localhost:9092 -t me.scored -C -c 1 -D '' | broker-filter inspect -",
        ),
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help=f"{INPUT_HELP}; or {TOPIC}HOST:PORT[,HOST:PORT]/TOPIC"
    )
    parser.add_argument(
        "--limit",
        type=_limit,
        default=DEFAULT_LIMIT,
        metavar="N",
        help=f"number of packets to read, 0 for all (default: {DEFAULT_LIMIT})",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="show every metadata column of the first alert (default: the most informative ones)",
    )
    add_registry_option(parser)
    add_cache_option(parser)
    add_kafka_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the counts and the first alert, and return the exit status, which is 1 if there is no readable alert."""
    from broker_filter.cli.packet_summary import CUTOUT_SIZE, print_alert, print_counts, take_stock
    from broker_filter.console import progress, stdout_console
    from broker_filter.kafka.topic_reader import read_topic
    from broker_filter.packets.decode import Decoder
    from broker_filter.packets.schemas.registry import open_registry
    from broker_filter.packets.surveys import DEFAULT_COLUMNS, DESIGNATION

    # Text of packets must not be interpreted as markup or emoji.
    console = stdout_console(
        markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH
    )
    decoder = Decoder(
        open_registry(arguments.schema_registry, drop_cache=arguments.drop_schema_cache),
        cutout_size=CUTOUT_SIZE,
        columns=(*DEFAULT_COLUMNS, DESIGNATION.name),
    )
    packets = read_inputs(arguments, read_topic, decoder.fields)
    limit = arguments.limit or None
    with progress("Reading", limit, "packets", lambda: share_read(packets)) as advance:
        contents = take_stock(islice(packets, limit), decoder, advance)
    print_counts(console, contents, ", ".join(arguments.inputs))
    if contents.n_packets == arguments.limit:
        console.print(f"only the first {arguments.limit} packets were read: --limit 0 reads all")
    if contents.first is None:
        return 1
    print_alert(console, contents.first, every_field=arguments.all)
    return 0


def _limit(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of packets")
    return int(text)
