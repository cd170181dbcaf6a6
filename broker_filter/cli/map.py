"""`broker-filter map`: a night's embeddings on a plane, coloured by how strange they are."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import INPUT_HELP, add_scoring_options, alert_limit

DEFAULT_LIMIT = 20_000
"""Alerts: a minute of UMAP, and as many points as can be told apart."""


class NothingToDrawError(Exception):
    """Too few alerts for a map."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `map`."""
    parser = subparsers.add_parser(
        "map",
        help="draw a night's alerts so that like ones stand together",
        examples=("broker-filter map night.tar.gz --reference ordinary.safetensors --out night.png",),
        description="Embeds the alerts of files, folders and archives, lays them out with UMAP, and colours them by "
        "their distance from a reference set's ordinary alerts of the same survey. Of more than --limit it draws some "
        "by their ids.",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT_HELP)
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="what `reference build` wrote")
    parser.add_argument("--model", metavar="BUNDLE", help="the bundle it was made with (default: the one of that name)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument(
        "--limit",
        type=alert_limit,
        default=DEFAULT_LIMIT,
        metavar="N",
        help="alerts to draw at most (default: %(default)s)",
    )
    add_scoring_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draws the map and returns the exit status."""
    from broker_filter.cli.archived import keep_inputs, open_reference, score_archives

    require_extra("explore", "the map", "matplotlib", "umap")
    import numpy as np

    from broker_filter.pictures.embedding_map import FEWEST, draw_map, lay_out
    from broker_filter.scoring.anomaly import AnomalyScorer
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
        raise NothingToDrawError(f"{len(night)} alerts pass `{reference.card.where}`: a map needs {FEWEST}")
    alerts = night.take()
    score = np.empty(len(alerts), np.float32)
    for survey, part in reference.surveys.items():
        own = alerts.survey == survey
        score[own] = AnomalyScorer(reference.card, part).score(alerts.embedding[own])
    ordinary = sum(len(part.alerts) for part in reference.surveys.values())
    title = f"{len(alerts):,} alerts beside {ordinary:,} ordinary ones"
    draw_map(arguments.out, title, lay_out(alerts.embedding), score, alerts.object_id.tolist())
    print(arguments.out)
    return 0
