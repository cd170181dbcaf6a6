"""`broker-filter reference`: builds and shows reference sets of ordinary alerts, which define what is anomalous."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.options import INPUT_HELP, add_scoring_options, alert_limit
from broker_filter.cli.parser import UsageError, require_files

if TYPE_CHECKING:
    from broker_filter.anomalies.reference import SurveyCounts
    from broker_filter.scoring.scorer import Model

DEFAULT_MODEL = "embedder"
DEFAULT_LIMIT = 100_000
"""Number of alerts: enough to recognise the strangest one in a thousand, few enough to be searched in 0.05 ms."""
MEASURES = ("mahalanobis", "neighbours", "centroids")
REAL = "real"
"""The label of the probability that an alert is real."""
SURVEYS_OWN = {"ztf": "drb", "lsst": "reliability"}
"""The column of each survey's own real/bogus score, used if the model's `real` was not trained for the survey."""
MORE_LIKELY_REAL = 0.5
"""The threshold for a survey's own real/bogus score."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `reference` and its two subcommands to the parser."""
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
        help="build a reference set from archived alerts",
        description="Computes the embeddings of the alerts in files, folders and archives. For each survey, it keeps a "
        "sample of the alerts that pass a cut, and calibrates the anomaly score on held-out alerts of other objects. "
        "It prints how many alerts of each survey were read, passed the cut and were kept; a survey with too few "
        "alerts is left out.",
        examples=(
            "broker-filter reference build nights/ --out ordinary.safetensors",
            "broker-filter reference build nights/ --where 'drb > 0.9 and magpsf < 20' --out ordinary.safetensors",
            "broker-filter reference build nights/ --measure centroids --labels labels.csv --out ordinary.safetensors",
        ),
    )
    builder.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT_HELP)
    builder.add_argument("--out", type=Path, required=True, metavar="FILE", help="reference set to write")
    builder.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="BUNDLE",
        help="bundle that computes the embeddings (default: %(default)s)",
    )
    builder.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="cut that selects the alerts, a filter expression. Default: the model's output `real` is above its "
        "recommended threshold, if it has one; for a survey that `real` was not trained for, the survey's own `drb` or "
        f"`reliability` is above {MORE_LIKELY_REAL}",
    )
    builder.add_argument(
        "--limit",
        type=alert_limit,
        default=DEFAULT_LIMIT,
        metavar="N",
        help="maximum number of alerts of each survey to keep (default: %(default)s)",
    )
    builder.add_argument(
        "--measure",
        choices=MEASURES,
        default=MEASURES[0],
        help="how the distance of an alert to the ordinary alerts is measured: to their mean (mahalanobis), to the "
        "nearest alerts (neighbours), or to the nearest centroid of the classes in --labels (centroids) (default: "
        "%(default)s)",
    )
    builder.add_argument(
        "--labels", type=Path, metavar="TABLE", help="table of labels by alert id or object id, .csv or .parquet"
    )
    builder.add_argument(
        "--label", default="label", metavar="COLUMN", help="column of --labels that holds the labels (default: label)"
    )
    builder.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="name of a class and its labels, comma-separated; may be repeated",
    )
    add_scoring_options(builder)
    builder.set_defaults(run=_build)

    shower = parts.add_parser("show", help="show what a reference set contains")
    shower.add_argument("file", metavar="FILE", type=Path, help="reference set, from `reference build`")
    shower.set_defaults(run=_show)


def _build(arguments: argparse.Namespace) -> int:
    from broker_filter.cli.archived import keep_inputs, score_archives
    from broker_filter.scoring.labels import parse_rule, read_labels
    from broker_filter.scoring.scorer import Scorer
    from broker_filter.streaming.archives import check_inputs
    from broker_filter.streaming.build_reference import build_reference
    from broker_filter.streaming.expressions import FIELDS, ExpressionError, compile_filter

    if (arguments.measure == "centroids") != (arguments.labels is not None):
        raise UsageError("--measure centroids needs --labels; the other measures do not take it")
    require_files(arguments.labels)
    labels = None
    if arguments.labels:
        labels = read_labels(arguments.labels, arguments.label, [parse_rule(rule) for rule in arguments.classes])
    check_inputs(arguments.inputs)
    keep_inputs(arguments.out, arguments.inputs)
    scorer = Scorer.open(arguments.model, device=arguments.device)
    [model] = scorer.models
    where = arguments.where or _recommended_cut(model)
    try:
        cut = compile_filter(where, FIELDS, model.outputs) if where else None
    except ExpressionError as error:
        raise UsageError(f"--where: {error}") from error
    batches = score_archives(
        arguments.inputs, scorer, columns=cut.columns if cut else (), registry=arguments.schema_registry
    )
    reference = build_reference(batches, model, cut, arguments.limit, arguments.measure, labels)
    reference.write(arguments.out)
    if not arguments.quiet:
        for survey, counts in reference.card.surveys.items():
            print(f"{survey}: {_counted(counts)}")
        print(f"cut: {where or 'none'} -> {arguments.out}")
    return 0


def _recommended_cut(model: Model) -> str | None:
    """Return a filter that selects likely real alerts; None if the model recommends no threshold for `real`."""
    from broker_filter.scoring.scores import output_name

    thresholds = model.bundle.thresholds_of(REAL)
    if not thresholds:
        return None
    output = output_name(model.name, REAL)
    if len(set(thresholds.values())) == 1:
        cuts = [f"{output} > {next(iter(thresholds.values())):g}"]
    else:
        cuts = [f"survey == '{survey}' and {output} > {threshold:g}" for survey, threshold in thresholds.items()]
    cuts += [
        f"survey == '{survey}' and {SURVEYS_OWN[str(survey)]} > {MORE_LIKELY_REAL}"
        for survey in model.surveys
        if survey not in model.surveys_of(REAL)
    ]
    return " or ".join(cuts)


def _show(arguments: argparse.Namespace) -> int:
    from broker_filter.anomalies.reference import STARS, read_reference

    require_files(arguments.file)
    reference = read_reference(arguments.file)
    card, parts = reference.card, reference.parts
    entries = {
        "made with": f"{card.bundle} {card.version}, weights {card.weights_sha256[:12]}",
        "surveys": ", ".join(map(str, reference.surveys)) or "none: a set of variable stars",
        "cut": card.where or "none",
        "modalities": ", ".join(card.modalities) or "none",
        "measure": " of ".join((card.measure, *([", ".join(card.classes)] if card.classes else []))),
        **{survey: _counted(counts) for survey, counts in card.surveys.items() if survey != STARS},
    }
    for name, part in parts.items():
        median, strange = (float(part.scores[int(share * (len(part.scores) - 1))]) for share in (0.5, 0.99))
        dimensions = f"{part.alerts.embedding.shape[1]} dimensions"
        if name == STARS:
            entries[STARS] = f"{len(part.alerts):,} stars, {dimensions}, calibrated on {len(part.scores):,} of them"
        else:
            entries[f"{name} alerts"] = f"{len(set(part.alerts.object_id.tolist())):,} objects, {dimensions}"
        entries[f"{name} scores"] = f"median {median:.4f}, 99th percentile {strange:.4f}"
    entries["data sha256"] = card.data_sha256
    for entry, text in entries.items():
        print(f"{entry:14} {text}")
    return 0


def _counted(counts: SurveyCounts) -> str:
    """Return a sentence: how many alerts of a survey were read, passed the cut, and were kept."""
    said = f"{counts.read:,} alerts read, {counts.passed:,} passed, {counts.kept:,} kept"
    if counts.kept:
        return f"{said}, calibrated on {counts.held_out:,} held-out alerts of other objects"
    return f"{said}: too few, so this survey is left out"
