"""`broker-filter watch`: a page on this machine with the alerts of a topic or of files, and labels for them."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.extras import require_extra
from broker_filter.cli.kafka_options import add_kafka_options, check_topic_options, kafka_properties
from broker_filter.cli.options import (
    INPUT_HELP,
    MOMENT_HELP,
    add_cache_option,
    add_scoring_options,
    milliseconds,
    moment,
    positive,
)
from broker_filter.cli.parser import UsageError, require_files

if TYPE_CHECKING:
    from broker_filter.packets.packet import Packet
    from broker_filter.watch.reading import AlertReader

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8010
DEFAULT_KEEP, MAX_KEEP = 20_000, 1_000_000
"""Alerts that are kept. Packets of ZTF take 50 kB each in temporary files, so 20,000 take 1 GB."""
DEFAULT_NEWEST = 2_000
PACKETS_AT_A_TIME = 64
DEFAULT_RATE = 0.01
END_S = 5.0
"""How long the end of the command waits for the thread that reads."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `watch` to the parser."""
    parser = subparsers.add_parser(
        "watch",
        help="look at alerts on a page in the browser, and label them",
        description="Serves a page on this machine that lists alerts, newest or strangest first, and shows each with "
        "its cutouts, light curve, scores, filters, reason and links. It reads topics of a service without joining a "
        "group or committing, or files and archives of output records or of a survey's packets. Labels go to a table "
        "that `python -m training build-dataset --labels` takes. The page needs no network.",
        examples=(
            "broker-filter watch --bootstrap-servers localhost:9092 --topic me.anomalies --labels labels.csv",
            "broker-filter watch night.tar.gz --model default --model embedder --reference ordinary.safetensors",
            "broker-filter watch night.tar.gz --list next.csv --labels labels.csv --classes SN,AGN,VS",
        ),
    )
    parser.add_argument("inputs", nargs="*", metavar="FILE", help=INPUT_HELP)
    topics = parser.add_argument_group("topics")
    topics.add_argument(
        "--topic", action="append", default=[], metavar="TOPIC", help="topic to read and follow; may be repeated"
    )
    topics.add_argument("--bootstrap-servers", metavar="HOST:PORT", help="brokers of the topics, comma-separated")
    begin = topics.add_mutually_exclusive_group()
    begin.add_argument(
        "--newest",
        type=positive,
        default=DEFAULT_NEWEST,
        metavar="N",
        help="begin with about the newest N alerts of each topic (default: %(default)s)",
    )
    begin.add_argument(
        "--since", type=moment, metavar="TIME", help=f"begin with the alerts published since a time: {MOMENT_HELP}"
    )
    add_kafka_options(topics)
    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--labels", type=Path, metavar="CSV", help="table of labels: read at the start, and written after each label"
    )
    labels.add_argument(
        "--classes",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="classes beside real and bogus, on the keys 1 to 9",
    )
    labels.add_argument(
        "--list",
        type=Path,
        metavar="TABLE",
        help="show only the alerts of this table (.csv or .parquet, column alert_id), in its order",
    )
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="BUNDLE",
        help="score the alerts with this bundle before they are shown; may be repeated",
    )
    scoring.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="reference set, from `reference build`: gives anomaly scores; needs the --model that made it",
    )
    scoring.add_argument(
        "--rate",
        type=_share,
        default=DEFAULT_RATE,
        metavar="SHARE",
        help="share of the alerts to flag as anomalies, with --reference (default: %(default)s)",
    )
    add_scoring_options(scoring)
    add_cache_option(scoring)
    parser.add_argument(
        "--keep",
        type=_keep,
        default=DEFAULT_KEEP,
        metavar="N",
        help="keep at most the newest N alerts, in temporary files of about 50 kB each (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default=DEFAULT_HOST,
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s); on another than loopback, others can reach the page: its "
        "address then holds a key, but the connection is not encrypted",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        metavar="PORT",
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def _keep(text: str) -> int:
    if (keep := positive(text)) > MAX_KEEP:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_KEEP}, not {keep}")
    return keep


def _share(text: str) -> float:
    if not 0 < (share := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted, and return the exit status."""
    require_extra("watch", "the page", "starlette", "uvicorn")
    if not arguments.inputs and not arguments.topic:
        raise UsageError("name files, or topics with --topic")
    check_topic_options(arguments)
    if arguments.reference and not arguments.model:
        raise UsageError("--reference needs --model: the bundle that made the reference set")
    require_files(arguments.reference, arguments.list)

    from broker_filter.console import printable
    from broker_filter.watch.access import listen
    from broker_filter.watch.chosen import read_list
    from broker_filter.watch.feed import Feed
    from broker_filter.watch.labels import LabelTable, check_classes
    from broker_filter.watch.server import Night
    from broker_filter.watch.serving import serve
    from broker_filter.watch.store import AlertStore

    classes = check_classes(arguments.classes)
    labels = LabelTable(arguments.labels) if arguments.labels else None
    chosen = read_list(arguments.list) if arguments.list else {}
    stop = threading.Event()
    reader = _reader(arguments)
    sources = _sources(arguments, reader, stop, lambda problem: feed.report(problem))
    store = AlertStore(arguments.keep)
    feed = Feed(sources, reader, store, only=chosen.keys(), stop=stop)
    names = [*(Path(name).name or name for name in arguments.inputs), *arguments.topic]
    title = printable(", ".join(names))
    night = Night(title, store, feed, labels, classes, chosen, arguments.keep)
    with closing(listen(arguments.host, arguments.port)) as listener:
        feed.start()
        try:
            serve(night, listener, arguments.host)
        finally:
            stop.set()
            feed.join(END_S)
            store.close()
    return 0


def _reader(arguments: argparse.Namespace) -> AlertReader:
    """Return what reads the packets, and scores them if a model is named."""
    from broker_filter.packets.schemas.registry import open_registry
    from broker_filter.watch.reading import AlertReader, Scoring

    scoring = None
    if arguments.model:
        from broker_filter.scoring.scorer import Scorer
        from broker_filter.streaming.judge import open_judge

        scorer = Scorer.open(arguments.model, device=arguments.device)
        judge = open_judge(scorer, arguments.reference, arguments.rate) if arguments.reference else None
        scoring = Scoring(scorer, judge)
    registry = open_registry(arguments.schema_registry, drop_cache=arguments.drop_schema_cache)
    return AlertReader(registry, scoring)


def _sources(
    arguments: argparse.Namespace, reader: AlertReader, stop: threading.Event, report: Callable[[str], None]
) -> list[Iterable[Sequence[Packet]]]:
    """Return the files, and then the topics, as batches of packets. `report`: takes the latest error of the brokers.

    Raises the errors of `read_packets` and `kafka_properties`.
    """
    from broker_filter.packets.alert_rows import in_batches
    from broker_filter.streaming.archives import read_packets

    sources: list[Iterable[Sequence[Packet]]] = []
    if arguments.inputs:
        packets = iter(read_packets(arguments.inputs, wanted=reader.fields))  # rows of tables as packets, to be kept
        sources.append(in_batches(packets, PACKETS_AT_A_TIME))
    if arguments.topic:
        from broker_filter.kafka.topic_reader import follow_topics

        properties = kafka_properties(arguments, arguments.bootstrap_servers)
        since_ms = milliseconds(arguments.since)
        sources.append(
            follow_topics(properties, arguments.topic, stop, newest=arguments.newest, since_ms=since_ms, report=report)
        )
    return sources
