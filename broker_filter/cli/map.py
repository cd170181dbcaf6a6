"""`broker-filter map`: draws a night's embeddings in two dimensions, coloured by anomaly score."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import INPUT_HELP, add_reference_options, add_scoring_options, alert_limit
from broker_filter.errors import BrokerFilterError

DEFAULT_LIMIT = 20_000
"""Number of alerts: UMAP takes about a minute for them, and more points cannot be distinguished in the picture."""


class NothingToDrawError(BrokerFilterError):
    """There are too few alerts for a map."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `map` to the parser."""
    parser = subparsers.add_parser(
        "map",
        help="draw a map of a night's alerts, with similar alerts close together",
        examples=(
            "broker-filter map night.tar.gz --reference ordinary.safetensors --out night.png",
            "broker-filter map --reference stars.safetensors --out stars.png",
        ),
        description="Computes the embeddings of the alerts in files, folders and archives, projects them to two "
        "dimensions with UMAP, and colours each alert by its anomaly score: its distance to the ordinary alerts of the "
        "same survey in a reference set. If there are more alerts than --limit, a random sample is drawn, the same one "
        "in each run. Without INPUT, it draws the alerts, or variable stars, of the reference set itself, coloured by "
        "class if the set has classes.",
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help=INPUT_HELP)
    add_reference_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    parser.add_argument(
        "--limit",
        type=alert_limit,
        default=DEFAULT_LIMIT,
        metavar="N",
        help="maximum number of alerts to draw (default: %(default)s)",
    )
    add_scoring_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the map and return the exit status."""
    from broker_filter.cli.archived import keep_inputs, open_reference, score_archives

    require_extra("explore", "the map", "matplotlib", "umap")
    if not arguments.inputs:
        return _draw_reference(arguments)
    import numpy as np

    from broker_filter.anomalies.score import AnomalyScorer
    from broker_filter.pictures.embedding_map import FEWEST, draw_map, lay_out
    from broker_filter.streaming.build_reference import Sample, ordinary_alerts
    from broker_filter.streaming.expressions import FIELDS, compile_filter

    keep_inputs(arguments.out, arguments.inputs)
    reference, scorer = open_reference(arguments.reference, arguments.model, arguments.device)
    [model] = scorer.models
    cut = compile_filter(reference.card.where, FIELDS, model.outputs) if reference.card.where else None
    night = Sample(arguments.limit)
    columns = cut.columns if cut else []
    for scored in score_archives(arguments.inputs, scorer, columns=columns, registry=arguments.schema_registry):
        alerts = ordinary_alerts(scored, model, cut)
        night.put(alerts[np.isin(alerts.survey, list(reference.surveys))])
    if len(night) < FEWEST:
        raise NothingToDrawError(f"{len(night)} alerts pass `{reference.card.where}`: a map needs {FEWEST}; add inputs")
    alerts = night.take()
    score = np.empty(len(alerts), np.float32)
    for survey, part in reference.surveys.items():
        own = alerts.survey == survey
        score[own] = AnomalyScorer(reference.card, part).score(alerts.embedding[own])
    ordinary = sum(len(part.alerts) for part in reference.surveys.values())
    title = f"{len(alerts):,} alerts, compared with {ordinary:,} ordinary alerts"
    draw_map(arguments.out, title, lay_out(alerts.embedding), score, alerts.object_id.tolist())
    print(arguments.out)
    return 0


def _draw_reference(arguments: argparse.Namespace) -> int:
    """Draw the map of a reference set and return the exit status."""
    import numpy as np

    from broker_filter.anomalies.reference import read_reference
    from broker_filter.anomalies.score import AnomalyScorer
    from broker_filter.cli.archived import keep_inputs
    from broker_filter.cli.parser import UsageError, require_files
    from broker_filter.pictures.embedding_map import FEWEST, draw_classes, draw_map, lay_out

    if arguments.model:
        raise UsageError("--model needs an INPUT: the reference set itself is drawn without a model")
    require_files(arguments.reference)
    keep_inputs(arguments.out, [arguments.reference])
    reference = read_reference(arguments.reference)
    card, parts = reference.card, list(reference.parts.values())
    members = sum(len(part.alerts) for part in parts)
    rows = np.sort(np.random.default_rng(0).permutation(members)[: arguments.limit])
    if len(rows) < FEWEST:
        raise NothingToDrawError(f"{arguments.reference}: a map needs {FEWEST} alerts or stars, not {len(rows)}")
    place = lay_out(np.concatenate([part.alerts.embedding for part in parts])[rows])
    title = f"{len(rows):,} of {members:,} {' and '.join(reference.parts)} of {arguments.reference.name}"
    if card.classes:
        draw_classes(arguments.out, title, place, np.concatenate([part.label for part in parts])[rows], card.classes)
    else:
        score = np.concatenate([AnomalyScorer(card, part).score(part.alerts.embedding) for part in parts])[rows]
        names = np.concatenate([part.alerts.object_id for part in parts])[rows].tolist()
        draw_map(arguments.out, title, place, score, names)
    print(arguments.out)
    return 0
