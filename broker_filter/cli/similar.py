"""`broker-filter similar`: lists and draws the ordinary alerts that are most similar to a given alert."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import add_reference_options, add_scoring_options
from broker_filter.errors import BrokerFilterError

if TYPE_CHECKING:
    from broker_filter.packets.batch import AlertBatch
    from broker_filter.packets.decode import Decoder
    from broker_filter.packets.packet import Packet
    from broker_filter.scoring.anomaly import Neighbour

DEFAULT_COUNT = 8
MAX_COUNT = 100
"""Alerts at most: a picture with more rows cannot be read."""
PACKETS_AT_A_TIME = 64

log = logging.getLogger(__name__)


class NothingToCompareError(BrokerFilterError):
    """There is no alert to compare, or the reference set cannot judge it."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `similar` to the parser."""
    parser = subparsers.add_parser(
        "similar",
        help="list and draw the alerts of a reference set that are most similar to a given alert",
        description="Lists the alerts of a reference set, of the same survey, whose embeddings are nearest to the "
        "embedding of a given alert. A reference set holds no packets: name the inputs that hold them with --packets "
        "to draw them.",
        examples=(
            "broker-filter similar alert.avro --reference ordinary.safetensors",
            "broker-filter similar night.tar.gz --id 3224182880115015010 --reference ordinary.safetensors "
            "--out like.png --packets nights/",
        ),
    )
    parser.add_argument("alert", metavar="ALERT", help="packet, or archive that holds the alert")
    parser.add_argument("--id", type=int, metavar="ALERT_ID", help="id of the alert (default: the first alert)")
    add_reference_options(parser)
    parser.add_argument(
        "--count",
        type=_count,
        default=DEFAULT_COUNT,
        metavar="N",
        help="number of similar alerts (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="picture to write: the alert and the similar alerts, one row each"
    )
    parser.add_argument(
        "--packets",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="files, folders or archives that hold the packets of the reference set",
    )
    add_scoring_options(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not 0 < (count := int(text)) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be between 1 and {MAX_COUNT}, not {count}")
    return count


def run(arguments: argparse.Namespace) -> int:
    """Print the similar alerts, draw them if `--out` is given, and return the exit status."""
    from broker_filter.cli.archived import keep_inputs, open_reference
    from broker_filter.console import printable
    from broker_filter.packets.batch import Survey
    from broker_filter.scoring.anomaly import AnomalyScorer
    from broker_filter.streaming.archives import read_packets

    if arguments.out:
        require_extra("explore", "the picture", "matplotlib")
        keep_inputs(arguments.out, [arguments.alert, *arguments.packets])
    reference, scorer = open_reference(arguments.reference, arguments.model, arguments.device)
    decoder = scorer.decoder(arguments.schema_registry)
    found = _find(read_packets([arguments.alert]), decoder, None if arguments.id is None else {arguments.id})
    if not found:
        which = "no readable alert" if arguments.id is None else f"no alert {arguments.id}"
        raise NothingToCompareError(f"{arguments.alert}: contains {which}; name another file or --id")
    alerts, row = next(iter(found.values()))
    [scores] = scorer.score(alerts).models
    if not scores.taken[row] or scores.embedding is None:
        raise NothingToCompareError(
            f"{arguments.alert}: the model {scores.model} does not score alerts of this alert's survey"
        )
    survey = Survey(int(alerts.survey[row]))
    if survey not in reference.surveys:
        raise NothingToCompareError(
            f"{arguments.reference}: contains no {survey} alerts to compare {arguments.alert} with; build it from "
            "inputs that hold some"
        )
    ordinary = reference.surveys[survey]
    anomaly = AnomalyScorer(reference.card, ordinary)
    embedding = scores.embedding[row : row + 1]
    [score], [similar] = anomaly.score(embedding).tolist(), anomaly.nearest(embedding, arguments.count)
    identity, stranger = alerts.identity(row), float((ordinary.scores > score).mean())
    said = f"score {score:.4f}; {stranger:.1%} of the held-out ordinary alerts score higher"
    print(f"{identity.survey} {identity.alert_id} of {printable(identity.object_id or '?')}: {said}")
    print(f"{'distance':>8}  {'alert':20}  object")
    for one in similar:
        print(f"{one.distance:8.4f}  {one.alert_id:<20}  {printable(one.object_id)}")
    if arguments.out:
        packets = read_packets([*arguments.packets, arguments.alert])
        packets_of = _find(packets, decoder, {one.alert_id for one in similar})
        _draw(arguments.out, (alerts, row), f"score {score:.2f}", similar, packets_of)
        print(arguments.out)
    return 0


def _find(packets: Iterable[Packet], decoder: Decoder, wanted: set[int] | None) -> dict[int, tuple[AlertBatch, int]]:
    """Return the batch and the row of each wanted alert, by id; of the first alert only if `wanted` is None."""
    found: dict[int, tuple[AlertBatch, int]] = {}
    for alerts, _ in decoder.decode_stream(packets, PACKETS_AT_A_TIME):
        for row, alert_id in enumerate(alerts.alert_id.tolist()):
            if wanted is None or alert_id in wanted:
                found.setdefault(alert_id, (alerts, row))
            if len(found) == (1 if wanted is None else len(wanted)):
                return found
    return found


def _draw(
    file: Path,
    asked: tuple[AlertBatch, int],
    said: str,
    similar: Sequence[Neighbour],
    packets_of: Mapping[int, tuple[AlertBatch, int]],
) -> None:
    from broker_filter.pictures.similar_alerts import Shown, draw_similar

    if absent := sum(one.alert_id not in packets_of for one in similar):
        log.warning("%d of %d similar alerts are not drawn: their packets are not in --packets", absent, len(similar))
    rows = [Shown(*asked, said)]
    rows += [
        Shown(*packets_of[one.alert_id], f"distance {one.distance:.4f}")
        for one in similar
        if one.alert_id in packets_of
    ]
    identity = asked[0].identity(asked[1])
    draw_similar(file, f"Ordinary alerts most similar to {identity.survey} {identity.alert_id}", rows)
