"""`broker-filter compare-shadow`: compares shadow models with serving ones, over the records of `<prefix>.shadow`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker_filter.cli.archived import keep_inputs
from broker_filter.cli.kafka_options import add_kafka_options, check_topic_options, kafka_properties
from broker_filter.cli.options import (
    INPUT_HELP,
    MOMENT_HELP,
    add_cache_option,
    add_registry_option,
    fraction,
    milliseconds,
    moment,
)
from broker_filter.cli.parser import UsageError
from broker_filter.errors import BrokerFilterError

if TYPE_CHECKING:
    from broker_filter.packets.decode import Decoder
    from broker_filter.packets.packet import Packet
    from broker_filter.packets.rejects import Reject
    from broker_filter.packets.schemas.registry import SchemaRegistry
    from broker_filter.streaming.comparison import ComparedAlert, ComparedOutput, Comparison

DEFAULT_LIMIT, MAX_LIMIT = 100_000, 2_000_000
"""Alerts to compare. The largest number takes 32 MB for each output of each shadow model."""
DEFAULT_THRESHOLD = 0.5
PACKETS_AT_A_TIME = 64
CUTOUT_SIZE = 64
"""Cutout size in pixels in which examples are drawn; larger stamps show their central part."""

log = logging.getLogger(__name__)


class NoShadowError(BrokerFilterError):
    """No record holds an output of a shadow model that a serving model gives too."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `compare-shadow` to the parser."""
    parser = subparsers.add_parser(
        "compare-shadow",
        help="compare a shadow model with the serving one",
        description="Reads the topic PREFIX.shadow of a service, or files of its records, and compares each output of "
        "a shadow model with that of the serving model of the same name, or of the first model with the same label. "
        "Writes a page with distributions, disagreement, thresholds that pass as many alerts, and the alerts with the "
        "largest differences; prints a summary. It joins no group and commits nothing.",
        examples=(
            "broker-filter compare-shadow --bootstrap-servers localhost:9092 --topic me.shadow --out compared.html",
            "broker-filter compare-shadow night.tar.gz --label real --threshold 0.65 --out compared.html",
        ),
    )
    parser.add_argument("inputs", nargs="*", metavar="FILE", help=f"{INPUT_HELP}, with records of PREFIX.shadow")
    parser.add_argument("--topic", metavar="TOPIC", help="topic to read to its present end, for example PREFIX.shadow")
    parser.add_argument("--bootstrap-servers", metavar="HOST:PORT", help="brokers of the topic, comma-separated")
    parser.add_argument(
        "--since", type=moment, metavar="TIME", help=f"read only the records of the topic since then: {MOMENT_HELP}"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="page to write")
    parser.add_argument("--label", metavar="LABEL", help="compare only this label (default: all labels)")
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=DEFAULT_THRESHOLD,
        metavar="P",
        help="threshold at which filters use the output of the serving model (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=_limit,
        default=DEFAULT_LIMIT,
        metavar="N",
        help="compare at most the first N alerts (default: %(default)s)",
    )
    add_registry_option(parser, "records in Confluent wire format")
    add_cache_option(parser)
    add_kafka_options(parser)
    parser.set_defaults(run=run)


def _limit(text: str) -> int:
    if not 0 < (limit := int(text)) <= MAX_LIMIT:
        raise argparse.ArgumentTypeError(f"must be between 1 and {MAX_LIMIT}, not {limit}")
    return limit


def run(arguments: argparse.Namespace) -> int:
    """Write the page, print the summary, and return the exit status."""
    if bool(arguments.inputs) == bool(arguments.topic):
        raise UsageError("name files, or a topic with --topic")
    check_topic_options(arguments)

    from broker_filter.cli.comparison_page import write_page
    from broker_filter.packets.schemas.registry import open_registry
    from broker_filter.streaming.comparison import Comparison

    keep_inputs(arguments.out, arguments.inputs)
    registry = open_registry(arguments.schema_registry, drop_cache=arguments.drop_schema_cache)
    comparison = Comparison(arguments.label)
    n_read = _compare(_packets(arguments), registry, comparison, arguments.limit)
    compared = comparison.results(arguments.threshold)
    if not n_read:
        raise NoShadowError("no records: the topic, its part since --since, or the files are empty")
    if not compared:
        wanted = f" with the label {arguments.label}" if arguments.label else ""
        raise NoShadowError(
            f"{n_read} records, but none has an output{wanted} of a shadow model that a serving model gives too; read "
            "the topic PREFIX.shadow of a service with a model that has `shadow: true`"
        )
    source = f"{arguments.topic} of {arguments.bootstrap_servers}" if arguments.topic else ", ".join(arguments.inputs)
    write_page(arguments.out, f"{comparison.alerts:,} alerts of {source}", compared)
    print("\n".join(_summary(compared)))
    print(arguments.out)
    return 0


def _packets(arguments: argparse.Namespace) -> Iterator[Packet]:
    """Return the packets of the files or of the topic. Raises as `read_packets` and `kafka_properties`."""
    if arguments.topic:
        from broker_filter.kafka.topic_reader import read_topic

        properties = kafka_properties(arguments, arguments.bootstrap_servers)
        return read_topic(properties, arguments.topic, milliseconds(arguments.since))
    from broker_filter.streaming.archives import read_packets

    return iter(read_packets(arguments.inputs))


def _compare(packets: Iterator[Packet], registry: SchemaRegistry, comparison: Comparison, limit: int) -> int:
    """Add records to a comparison until it has `limit` alerts. Returns the number of packets that were read."""
    from broker_filter.console import progress
    from broker_filter.packets.alert_rows import in_batches
    from broker_filter.packets.decode import Decoder
    from broker_filter.packets.rejects import Reject

    decoder = Decoder(registry, cutout_size=CUTOUT_SIZE, columns=("magpsf", "snr"), require_cutouts=False)
    first: Reject | None = None
    n_read = n_unreadable = 0
    with progress("Comparing") as advance:
        for batch in in_batches(packets, PACKETS_AT_A_TIME):
            for found in _read(batch, decoder, registry):
                if isinstance(found, Reject):
                    first, n_unreadable = first or found, n_unreadable + 1
                elif comparison.alerts < limit:
                    comparison.add(*found)
            n_read += len(batch)
            advance(len(batch))
            if comparison.alerts >= limit:
                break
    if first:
        log.warning(
            "%d records are left out because they cannot be read, such as %s: %s: %s",
            *(n_unreadable, first.packet.position, first.reason, first.detail),
        )
    if comparison.left_out:
        log.warning("%d outputs are left out: the records name too many models and labels", comparison.left_out)
    return n_read


def _read(
    packets: Sequence[Packet], decoder: Decoder, registry: SchemaRegistry
) -> Iterator[tuple[ComparedAlert, str, Mapping[str, Any]] | Reject]:
    """Yield each record, with any payload, as the alert, its survey and its annotation, or as a reject."""
    from broker_filter.streaming.annotations import read_annotation, read_scores_record
    from broker_filter.streaming.comparison import ComparedAlert

    alerts, rejects = decoder.decode(packets)
    for row, record in enumerate(alerts.records):
        identity, (magnitude, snr) = alerts.identity(row), alerts.metadata[row].tolist()
        cutouts = tuple(pixels.copy() for pixels in alerts.stamps(row))  # views would keep the batch in memory
        alert = ComparedAlert(identity.alert_id or 0, identity.object_id or "", magnitude, snr, cutouts)
        yield alert, str(identity.survey), read_annotation(record.body, record.schema)
    for reject in rejects:
        found = read_scores_record(reject.packet, registry)
        if found is None:
            yield reject
        else:
            identity, annotation = found
            yield ComparedAlert(identity.alert_id or 0, identity.object_id or ""), str(identity.survey), annotation


def _summary(compared: Sequence[ComparedOutput]) -> Iterator[str]:
    """Yield the lines that describe the comparisons."""
    from broker_filter.console import printable

    for one in compared:
        pair, found, at = one.pair, one.agreement, one.at_threshold
        yield printable(f"{pair.label} of {pair.survey}: {pair.serving} serves, {pair.shadow} is the shadow")
        yield (
            f"  {found.n:,} alerts, correlation {one.correlation:.4f}, mean difference {found.mean_difference:+.4f}, "
            f"mean absolute difference {found.mean_absolute_difference:.4f}"
        )
        yield (
            f"  at {one.threshold:g} they disagree on {found.disagreement:.2%}; the shadow threshold "
            f"{at.threshold_shadow:.4f} passes as many alerts ({at.passed:,}; {at.gained:,} gained, {at.lost:,} lost)"
        )
