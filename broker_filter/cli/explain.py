"""`broker-filter explain`: says which features of a network's attention are active in an alert, and from where."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import INPUT_HELP, add_scoring_options
from broker_filter.errors import BrokerFilterError

if TYPE_CHECKING:
    from broker_filter.packets.batch import AlertBatch

DEFAULT_LENS = "embedder"
DEFAULT_LIMIT = 20
MAX_LIMIT = 1000
"""Alerts at most: the cutouts of more would not fit into a page that a browser opens at once."""
FORMATS = (".html", ".json", ".png")

log = logging.getLogger(__name__)


class NothingToExplainError(BrokerFilterError):
    """No alert among the inputs is one that the lens can explain."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `explain` to the parser."""
    parser = subparsers.add_parser(
        "explain",
        help="say which features of a network's attention are active in an alert, and from where",
        description="Looks at alerts through a lens: a sparse autoencoder on an attention layer of a bundle. For each "
        "alert it gives the active features, how rare they are in ordinary alerts, the points of the light curve or "
        "the cells of the stamp that they come from, and what share of the alert they leave unexplained. With "
        "--reference it also measures how much of the anomaly score disappears without a feature. The lens states "
        "how far it can be trusted.",
        examples=(
            "broker-filter explain alert.avro --reference ordinary.safetensors --out explain.html",
            "broker-filter explain night.tar.gz --id 3224182880115015010 --out explain.json",
        ),
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT_HELP)
    parser.add_argument(
        "--id", type=int, action="append", metavar="ALERT_ID", help="id of an alert to explain; may be repeated"
    )
    parser.add_argument(
        "--lens",
        default=DEFAULT_LENS,
        metavar="LENS",
        help="lens: the name of one that ships, or a directory (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="BUNDLE", help="bundle of the lens (default: the one that ships under the recorded name)"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="reference set, from `reference build`, to measure effects with"
    )
    parser.add_argument(
        "--limit",
        type=_limit,
        default=DEFAULT_LIMIT,
        metavar="N",
        help="explain at most the first N alerts (default: %(default)s)",
    )
    parser.add_argument("--out", type=_out, required=True, metavar="FILE", help="file to write: .html, .json or .png")
    add_scoring_options(parser)
    parser.set_defaults(run=run)


def _limit(text: str) -> int:
    if not 0 < (limit := int(text)) <= MAX_LIMIT:
        raise argparse.ArgumentTypeError(f"must be between 1 and {MAX_LIMIT}, not {limit}")
    return limit


def _out(text: str) -> Path:
    if (file := Path(text)).suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end with {', '.join(FORMATS)}: {text}")
    return file


def run(arguments: argparse.Namespace) -> int:
    """Write the explanations and return the exit status."""
    from broker_filter.anomalies.reference import check_made_with, read_reference
    from broker_filter.anomalies.score import AnomalyScorer
    from broker_filter.cli.archived import keep_inputs, score_archives
    from broker_filter.cli.parser import require_files
    from broker_filter.scoring.lens_files import open_files
    from broker_filter.scoring.scorer import Scorer
    from broker_filter.streaming.explain import as_document, explain_rows, open_lenses

    if arguments.out.suffix == ".png":
        require_extra("explore", "the picture", "matplotlib")
    keep_inputs(arguments.out, arguments.inputs)
    card = open_files(arguments.lens).card
    require_files(arguments.reference)
    scorer = Scorer.open(arguments.model or card.bundle.name, device=arguments.device)
    reference = read_reference(arguments.reference) if arguments.reference else None
    if reference:
        check_made_with(arguments.reference, reference.card, [model.bundle for model in scorer.models])
    [lens] = open_lenses([arguments.lens], scorer, reference.card if reference else None)
    judges = {one: AnomalyScorer(reference.card, part) for one, part in reference.surveys.items()} if reference else {}
    explained: list[dict[str, Any]] = []
    shown: dict[int, tuple[AlertBatch, int]] = {}
    for scored in score_archives(arguments.inputs, scorer, registry=arguments.schema_registry):
        for row, entry in explain_rows(scored, lens, judges, arguments.id)[: arguments.limit - len(explained)]:
            explained.append(entry)
            shown[entry["alert_id"]] = scored.alerts, row
        if len(explained) == (len(set(arguments.id)) if arguments.id else arguments.limit):
            break
    if not explained:
        which = f"the alert {', '.join(map(str, arguments.id))}" if arguments.id else "an alert"
        raise NothingToExplainError(
            f"{', '.join(arguments.inputs)}: {which} of {' or '.join(map(str, lens.lens.surveys))} was not found; the "
            f"lens {card.title} explains no other alerts"
        )
    _write(arguments.out, as_document(card, explained), shown)
    log.info("%s: %s", card.title, card.worth)
    print(arguments.out)
    return 0


def _write(file: Path, document: dict[str, Any], shown: dict[int, tuple[AlertBatch, int]]) -> None:
    match file.suffix:
        case ".json":
            file.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        case ".html":
            from broker_filter.pictures.explanation_page import write_page

            write_page(file, document, shown)
        case _:
            from broker_filter.pictures.similar_alerts import Shown, draw_similar

            [lens] = document["lenses"]
            rows = [Shown(*shown[alert["alert_id"]], *_caption(alert)) for alert in document["alerts"]]
            draw_similar(file, f"Alerts and their first feature by {lens['name']} {lens['version']}", rows)


def _caption(alert: dict[str, Any]) -> tuple[str, dict[tuple[float, str | None], float]]:
    """Return the first feature of an alert in words, and the share of each point of its light curve."""
    if not alert["features"]:
        return str(alert["says"]), {}
    first = alert["features"][0]
    shares = {(source["mjd"], source["band"]): source["share"] for source in first["sources"] if source.get("mjd")}
    return str(first["name"] or f"feature {first['id']}"), shares
