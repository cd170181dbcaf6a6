"""`broker-filter similar`: lists and draws the ordinary alerts, or stars, that are most similar to a given one."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import add_reference_options, add_scoring_options
from broker_filter.errors import BrokerFilterError

if TYPE_CHECKING:
    from broker_filter.anomalies.reference import Reference, SurveyReference
    from broker_filter.anomalies.score import Neighbour
    from broker_filter.packets.batch import AlertBatch
    from broker_filter.packets.decode import Decoder
    from broker_filter.streaming.archives import Packets

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
        "to draw them. Without ALERT, it lists the alerts, or variable stars, that are most similar to a member of the "
        "reference set itself.",
        examples=(
            "broker-filter similar alert.avro --reference ordinary.safetensors",
            "broker-filter similar night.tar.gz --id 3224182880115015010 --reference ordinary.safetensors "
            "--out like.png --packets nights/",
            "broker-filter similar --id 17 --reference stars.safetensors",
        ),
    )
    parser.add_argument("alert", nargs="?", metavar="ALERT", help="packet, or archive that holds the alert")
    parser.add_argument(
        "--id",
        type=int,
        metavar="ALERT_ID",
        help="id of the alert (default: the first alert); without ALERT, id of an alert or star of the reference set",
    )
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
    if arguments.alert is None:
        return _within(arguments)

    from broker_filter.anomalies.score import AnomalyScorer
    from broker_filter.cli.archived import keep_inputs, open_reference
    from broker_filter.console import printable
    from broker_filter.packets.batch import Survey
    from broker_filter.streaming.archives import read_packets

    if arguments.out:
        require_extra("explore", "the picture", "matplotlib")
        keep_inputs(arguments.out, [arguments.alert, *arguments.packets])
    reference, scorer = open_reference(arguments.reference, arguments.model, arguments.device)
    decoder = scorer.decoder(arguments.schema_registry)
    found = _find(
        read_packets([arguments.alert], wanted=decoder.fields),
        decoder,
        None if arguments.id is None else {arguments.id},
    )
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
    _list(similar, reference, ordinary)
    if arguments.out:
        packets = read_packets([*arguments.packets, arguments.alert], wanted=decoder.fields)
        packets_of = _find(packets, decoder, {one.alert_id for one in similar})
        _draw(arguments.out, (alerts, row), f"score {score:.2f}", similar, packets_of)
        print(arguments.out)
    return 0


def _within(arguments: argparse.Namespace) -> int:
    """Print the alerts or stars of a reference set that are most similar to one of them, and return the exit status."""
    from broker_filter.anomalies.reference import read_reference
    from broker_filter.anomalies.score import AnomalyScorer
    from broker_filter.cli.parser import UsageError, require_files
    from broker_filter.console import printable

    if arguments.id is None:
        raise UsageError("name an ALERT, or with --id an alert or star of the reference set")
    if arguments.out or arguments.packets or arguments.model:
        raise UsageError("--out, --packets and --model need an ALERT: a reference set holds no packets")
    require_files(arguments.reference)
    reference = read_reference(arguments.reference)
    rows = {name: (part.alerts.alert_id == arguments.id).nonzero()[0] for name, part in reference.parts.items()}
    name = next((name for name, found in rows.items() if len(found)), None)
    if name is None:
        raise NothingToCompareError(f"{arguments.reference}: contains no alert or star {arguments.id}")
    part, row = reference.parts[name], rows[name][:1]
    anomaly, one = AnomalyScorer(reference.card, part), part.alerts[row]
    [score], [similar] = anomaly.score(one.embedding).tolist(), anomaly.nearest(one.embedding, arguments.count + 1)
    stranger = float((part.scores > score).mean())
    said = f"score {score:.4f}; {stranger:.1%} of the held-out {name} score higher"
    label = _class_names(reference, part).get(arguments.id)
    print(f"{name} {arguments.id} of {printable(str(one.object_id[0]))}{f' ({label})' if label else ''}: {said}")
    _list([other for other in similar if other.alert_id != arguments.id][: arguments.count], reference, part)
    return 0


def _list(similar: Sequence[Neighbour], reference: Reference, part: SurveyReference) -> None:
    """Print a line for each of the similar alerts or stars, with its class if the reference set has classes."""
    from broker_filter.console import printable

    class_of = _class_names(reference, part)
    width = max(map(len, ("class", *reference.card.classes)))
    heading = f"{'class':{width}}  " if class_of else ""
    print(f"{'distance':>8}  {'alert':20}  {heading}object")
    for one in similar:
        label = f"{class_of.get(one.alert_id, '-'):{width}}  " if class_of else ""
        print(f"{one.distance:8.4f}  {one.alert_id:<20}  {label}{printable(one.object_id)}")


def _class_names(reference: Reference, part: SurveyReference) -> dict[int, str]:
    """Return the names of the classes of labelled alerts or stars, by id."""
    named = zip(part.alerts.alert_id.tolist(), part.label.tolist(), strict=True)
    return {alert_id: reference.card.classes[label] for alert_id, label in named if label >= 0}


def _find(packets: Packets, decoder: Decoder, wanted: set[int] | None) -> dict[int, tuple[AlertBatch, int]]:
    """Return the batch and the row of each wanted alert, by id; of the first alert only if `wanted` is None."""
    found: dict[int, tuple[AlertBatch, int]] = {}
    for alerts, _ in decoder.decode_batches(packets.batches(PACKETS_AT_A_TIME)):
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
