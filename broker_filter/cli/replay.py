"""`broker-filter replay`: sends archived alerts to a Kafka topic, as a survey would send them."""

from __future__ import annotations

import argparse
import math
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from broker_filter.cli.archived import share_read
from broker_filter.cli.kafka_options import TOPIC, AddressError, add_kafka_options, kafka_properties, read_inputs
from broker_filter.cli.options import INPUT_HELP, STDIN, add_registry_option
from broker_filter.cli.parser import UsageError

if TYPE_CHECKING:
    from broker_filter.packets.packet import Packet

DEAD_LETTERS = ".dead-letter"
"""Suffix of the topic of a service's dead letters."""
PATIENCE_S = 20.0
"""How long to wait for an answer of the brokers; a wrong address gives no answer either."""


class ReasonError(UsageError):
    """The reason is not one of the reject reasons."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `replay` to the parser."""
    parser = subparsers.add_parser(
        "replay",
        help="send archived alerts to a Kafka topic",
        description="Sends every alert of files, folders and archives to a topic. Each alert is one message, with the "
        "object id as its key and the time of sending as its Kafka timestamp. The topic is created if it does not "
        f"exist. If the input is a service's topic of dead letters ({TOPIC}HOST:PORT/PREFIX{DEAD_LETTERS}), sends the "
        "original messages again.",
        examples=(
            "broker-filter replay night.tar.gz --bootstrap-servers localhost:9092 --topic rehearsal --rate 300/s",
            "broker-filter replay night.tar.gz --bootstrap-servers localhost:9092 --topic rehearsal --speed 10",
        ),
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=f"{INPUT_HELP}; or {TOPIC}HOST:PORT[,HOST:PORT]/PREFIX{DEAD_LETTERS}",
    )
    parser.add_argument(
        "--reason",
        action="append",
        metavar="REASON",
        help="send only dead letters with this reject reason, for example unknown_schema_id; may be repeated (default: "
        "all dead letters)",
    )
    parser.add_argument(
        "--bootstrap-servers", required=True, metavar="HOST:PORT", help="brokers to send to, comma-separated"
    )
    parser.add_argument("--topic", required=True, help="topic to send to")
    parser.add_argument(
        "--partitions",
        type=int,
        default=4,
        metavar="N",
        help="number of partitions, if the topic is created (default: 4)",
    )
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=_positive, metavar="N", help="alerts per second (`300` or `300/s`)")
    pace.add_argument(
        "--speed", type=_positive, metavar="X", help="send X times as fast as the survey took the exposures"
    )
    pace.add_argument(
        "--as-fast-as-possible", action="store_true", help="send as fast as the brokers accept messages (the default)"
    )
    parser.add_argument("--repeat", action="store_true", help="start again after the last alert, until interrupted")
    add_registry_option(parser)
    add_kafka_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Send all alerts, or until interrupted. Returns the exit status: 1 if a message failed, 130 if interrupted."""
    from confluent_kafka.admin import NewTopic

    from broker_filter.cli import INTERRUPTED
    from broker_filter.console import progress
    from broker_filter.kafka.client import ThrottledErrorLog, admin_client, ensure_topics, wait_for_cluster
    from broker_filter.kafka.replay import Replayer, as_fast_as_possible, at_rate, at_speed
    from broker_filter.packets.decode import Decoder
    from broker_filter.packets.schemas.registry import open_registry

    if arguments.repeat and STDIN in arguments.inputs:
        raise UsageError(f"--repeat cannot read {STDIN} again: standard input can be read only once")
    packets = _packets(arguments)
    new_pace = as_fast_as_possible
    if arguments.rate:
        new_pace = partial(at_rate, arguments.rate)
    elif arguments.speed:
        new_pace = partial(at_speed, arguments.speed)
    decoder = Decoder(open_registry(arguments.schema_registry), columns=())
    properties = kafka_properties(arguments, arguments.bootstrap_servers)
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    error_log = ThrottledErrorLog(f"brokers {arguments.bootstrap_servers}")
    if wait_for_cluster(properties, error_log, stop, PATIENCE_S) is None:
        return INTERRUPTED
    ensure_topics(admin_client(properties, error_log), [NewTopic(arguments.topic, num_partitions=arguments.partitions)])
    started = time.monotonic()
    with progress("Replaying", share=lambda: share_read(packets)) as advance:
        replayer = Replayer(properties, arguments.topic, decoder, stop, advance)
        deliveries = replayer.deliveries
        while True:
            sent_before = deliveries.sent
            replayer.replay(packets, new_pace())
            if stop.is_set() or not arguments.repeat or deliveries.sent == sent_before:
                break
            packets = _packets(arguments)
    seconds = time.monotonic() - started
    summary = (
        f"sent {deliveries.sent} alerts ({deliveries.sent_bytes / 1e6:.1f} MB) to {arguments.topic} "
        f"in {seconds:.1f} s, {deliveries.sent / seconds:.0f}/s; "
        f"failed {deliveries.failed}; skipped {deliveries.unsendable} (empty or too large)"
    )
    if not arguments.quiet:
        print(summary)
    if stop.is_set():
        return INTERRUPTED
    return 1 if deliveries.failed else 0


def _packets(arguments: argparse.Namespace) -> Iterator[Packet]:
    from broker_filter.kafka.topic_reader import read_dead_letters
    from broker_filter.packets.rejects import RejectReason

    reasons = set(arguments.reason or RejectReason)
    if unknown := sorted(reasons.difference(RejectReason)):
        raise ReasonError(f"--reason {unknown[0]}: unknown reason; choose from {', '.join(RejectReason)}")

    def read(properties: dict[str, object], topic: str) -> Iterator[Packet]:
        if not topic.endswith(DEAD_LETTERS):
            raise AddressError(
                f"{topic}: not a topic of dead letters (PREFIX{DEAD_LETTERS}); no other topic can be sent again"
            )
        return read_dead_letters(properties, topic, reasons)

    return read_inputs(arguments, read)


def _positive(text: str) -> float:
    try:
        value = float(text.removesuffix("/s"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
