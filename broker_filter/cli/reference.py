"""`broker-filter reference`: the ordinary alerts beside which others are called strange."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.options import INPUT_HELP, add_scoring_options, alert_limit
from broker_filter.cli.parser import UsageError, require_files

if TYPE_CHECKING:
    from broker_filter.scoring.reference import SurveyCounts
    from broker_filter.scoring.scorer import Model

DEFAULT_MODEL = "embedder"
DEFAULT_LIMIT = 100_000
"""Alerts: enough to know the strangest in a thousand by, and searched in a twentieth of a millisecond."""
MEASURES = ("mahalanobis", "neighbours", "centroids")
REAL = "real"
"""The output that says how likely an alert is real."""
SURVEYS_OWN = {"ztf": "drb", "lsst": "reliability"}
"""The column of the survey's own real/bogus score, which decides where the model's `real` was not trained for it."""
MORE_LIKELY_REAL = 0.5
"""The cut in such a score."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `reference` with its parts."""
    parser = subparsers.add_parser(
        "reference",
        help="build a reference set of ordinary alerts, or show one",
        examples=(
            "broker-filter reference build nights/ --out ordinary.safetensors",
            "broker-filter reference show ordinary.safetensors",
        ),
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    builder = parts.add_parser(
        "build",
        help="embeddings of archived alerts into a reference set",
        description="Embeds the alerts of files, folders and archives. Of each survey it keeps some of those that "
        "pass a cut, drawn by their ids, and finds out on those of other objects how strange ordinary alerts look. It "
        "prints how many alerts of each survey were read, passed and were kept; a survey with too few is left out.",
        examples=(
            "broker-filter reference build nights/ --out ordinary.safetensors",
            "broker-filter reference build nights/ --where 'drb > 0.9 and magpsf < 20' --out ordinary.safetensors",
            "broker-filter reference build nights/ --measure centroids --labels labels.csv --out ordinary.safetensors",
        ),
    )
    builder.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT_HELP)
    builder.add_argument("--out", type=Path, required=True, metavar="FILE", help="the reference to write")
    builder.add_argument("--model", default=DEFAULT_MODEL, metavar="BUNDLE", help="what embeds (default: %(default)s)")
    builder.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="the alerts to take, as a filter's (default: the model's output `real` above its recommended threshold, "
        "where it has one; for a survey that `real` was not trained for, the survey's own `drb` or `reliability` above "
        f"{MORE_LIKELY_REAL})",
    )
    builder.add_argument(
        "--limit",
        type=alert_limit,
        default=DEFAULT_LIMIT,
        metavar="N",
        help="alerts of each survey to take (default: %(default)s)",
    )
    builder.add_argument(
        "--measure",
        choices=MEASURES,
        default=MEASURES[0],
        help="of how far an alert is from the ordinary ones: from their middle, from the nearest of them, or from the "
        "nearest centroid of the classes that --labels names (default: %(default)s)",
    )
    builder.add_argument("--labels", type=Path, metavar="TABLE", help=".csv or .parquet, by alert or object id")
    builder.add_argument("--label", default="label", metavar="COLUMN", help="its column of labels (default: label)")
    builder.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME=VALUES", help="values of one class"
    )
    add_scoring_options(builder)
    builder.set_defaults(run=_build)

    shower = parts.add_parser("show", help="what a reference set is of")
    shower.add_argument("file", metavar="FILE", type=Path)
    shower.set_defaults(run=_show)


def _build(arguments: argparse.Namespace) -> int:
    from broker_filter.cli.archived import keep_inputs, score_archives
    from broker_filter.config import Runtime
    from broker_filter.scoring.labels import parse_rule, read_labels
    from broker_filter.scoring.scorer import open_scorer
    from broker_filter.streaming.archives import check_inputs
    from broker_filter.streaming.build_reference import build_reference
    from broker_filter.streaming.expressions import FIELDS, compile_filter

    if (arguments.measure == "centroids") != (arguments.labels is not None):
        raise UsageError("centroids are of classes, which --labels names; the other measures need none")
    require_files(arguments.labels)
    labels = None
    if arguments.labels:
        labels = read_labels(arguments.labels, arguments.label, [parse_rule(rule) for rule in arguments.classes])
    check_inputs(arguments.inputs)
    keep_inputs(arguments.out, arguments.inputs)
    scorer = open_scorer([arguments.model], Runtime(device=arguments.device))
    [model] = scorer.models
    where = arguments.where or _recommended_cut(model)
    cut = compile_filter(where, FIELDS, model.outputs) if where else None
    batches = score_archives(
        arguments.inputs, scorer, columns=cut.columns if cut else (), registry=arguments.schema_registry
    )
    reference = build_reference(batches, model, cut, arguments.limit, arguments.measure, labels)
    reference.write(arguments.out)
    if not arguments.quiet:
        for survey, counts in reference.card.surveys.items():
            print(f"{survey}: {_counted(counts)}")
        print(f"ordinary: {where or 'all alerts'} -> {arguments.out}")
    return 0


def _recommended_cut(model: Model) -> str | None:
    """The alerts that are likely real, as a filter; None where the model has no cut for that."""
    threshold = model.bundle.card.outputs.thresholds.get(REAL)
    if threshold is None:
        return None
    cuts = [f"{model.name}.{REAL} > {threshold:g}"]
    cuts += [
        f"survey == '{survey}' and {SURVEYS_OWN[str(survey)]} > {MORE_LIKELY_REAL}"
        for survey in model.surveys
        if survey not in model.surveys_of(REAL)
    ]
    return " or ".join(cuts)


def _show(arguments: argparse.Namespace) -> int:
    from broker_filter.scoring.reference import read_reference

    require_files(arguments.file)
    reference = read_reference(arguments.file)
    card, parts = reference.card, reference.surveys
    entries = {
        "made with": f"{card.bundle} {card.version}, weights {card.weights_sha256[:12]}",
        "surveys": ", ".join(map(str, parts)),
        "that pass": card.where or "(all were taken)",
        "modalities": ", ".join(card.modalities) or "none",
        "measure": " of ".join((card.measure, *([", ".join(card.classes)] if card.classes else []))),
        **{survey: _counted(counts) for survey, counts in card.surveys.items()},
    }
    for survey, part in parts.items():
        median, strange = (float(part.scores[int(share * (len(part.scores) - 1))]) for share in (0.5, 0.99))
        objects = len(set(part.alerts.object_id.tolist()))
        entries[f"{survey} alerts"] = f"{objects:,} objects, {part.alerts.embedding.shape[1]} dimensions"
        entries[f"{survey} scores"] = f"median {median:.4f}, one in a hundred above {strange:.4f}"
    entries["data sha256"] = card.data_sha256
    for entry, text in entries.items():
        print(f"{entry:14} {text}")
    return 0


def _counted(counts: SurveyCounts) -> str:
    """What became of a survey's alerts, in words."""
    said = f"{counts.read:,} alerts read, {counts.passed:,} passed, {counts.kept:,} kept"
    if counts.kept:
        return f"{said}, calibrated on {counts.held_out:,} of other objects"
    return f"{said}: too few, not judged"
