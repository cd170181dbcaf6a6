"""`sae explore`: the features of a run, and the alerts that activate them, as one HTML page.

    python -m training sae explore RUN --out page.html

The page needs no other file and no network. It shows the held-out real alerts of the run. Names and notes come from the
run's features.csv; a button of the page downloads that table with the names and notes that were typed into the page.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError

from broker_filter.config import Section
from broker_filter.scoring.bundle import describe_problems
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.arguments import positive
from training.atomic_write import write_whole
from training.data.datasets import SPLITS, View
from training.errors import LensError
from training.interpretability.explorer.attributions import OpenLens
from training.interpretability.explorer.contents import ID, NAME, NOTE, FeatureTable, Header, contents
from training.interpretability.explorer.data import Page, Table
from training.interpretability.explorer.page import render
from training.interpretability.runs.rows import FEATURES, MEASURES, Run, open_run
from training.interpretability.sites.open_site import LightCurveSite

MOST_ALERTS = 1200
"""Default number of alerts on a page: about 10 MB."""
MOST_BYTES = 25_000_000
"""Largest page: a browser opens it in less than two seconds."""
MOST_TABLE_BYTES = 10_000_000
"""Largest table of features or of measures; real ones have some 100 kB."""
DIGEST_LETTERS = 12
EVERY = "all"


class ShownTable(Section):
    """A table in `measures.json` that the page shows as it is."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class ShownMeasures(Section):
    """What the page takes from `measures.json`."""

    tables: tuple[ShownTable, ...] = ()
    warnings: tuple[str, ...] = Field(default=())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sae explore`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory that `sae collect` and `sae train` wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="the page to write")
    parser.add_argument(
        "--split",
        choices=(*SPLITS, EVERY),
        default="test",
        help="real alerts that are shown: of this split, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--alerts",
        type=positive,
        default=MOST_ALERTS,
        metavar="N",
        help="number of alerts on the page; the most active alerts of each feature are always on it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--earlier",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="run of an earlier layer of the same light-curve transformer, whose features the recursive attribution "
        "names; repeat for each",
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Write the page. Raises LensError if the run is incomplete, or if the page would be too large."""
    torch.set_num_threads(arguments.threads)
    opened = open_run(arguments.run)
    earlier = [open_run(directory) for directory in arguments.earlier]
    page = render(explore(opened, arguments.split, arguments.alerts, earlier)).encode()
    if len(page) > MOST_BYTES:
        raise LensError(
            f"{arguments.out}: would have {len(page):,} bytes, and a page may have {MOST_BYTES:,}: "
            "choose fewer --alerts"
        )
    write_whole(arguments.out, page)
    print(f"{arguments.out}: {len(page) / 1e6:.1f} MB")


def explore(opened: Run, split: str, most_alerts: int, earlier: list[Run]) -> Page:
    """Return the contents of the page of a run.

    `split`: the split of the real alerts that are shown, or EVERY. Raises LensError if the run has no dictionary, or no
    real alert of that split.
    """
    dictionary = opened.dictionaries[0]
    card = opened.part.card
    chosen = opened.rows.is_real.copy()
    if split != EVERY:
        chosen &= opened.rows.split == SPLITS.index(split)
    if not chosen.any():
        raise LensError(f"{opened.directory}: has no real alert of the split {split}: choose another --split")
    view = View(opened.alerts, np.flatnonzero(chosen))
    lens = OpenLens(opened.site, dictionary, card.inputs, card.outputs, _earlier(opened, earlier))
    table = read_features(opened.directory / FEATURES, len(dictionary.w_dec), len(opened.card.seeds))
    return contents(lens, view, header(opened, view, split), table, most_alerts)


def _earlier(opened: Run, runs: list[Run]) -> dict[int, SparseDictionary]:
    """Return the dictionaries of earlier layers, by layer. Raises LensError if a run is not of an earlier layer."""
    found = {}
    for other in runs:
        site, own = other.site, opened.site
        same = other.card.weights_sha256 == opened.card.weights_sha256
        if not (
            same and isinstance(site, LightCurveSite) and isinstance(own, LightCurveSite) and site.number < own.number
        ):
            raise LensError(
                f"{other.directory}: {other.card.name}, {other.card.site} is not an earlier layer of "
                f"{opened.card.name}, {opened.card.site}: leave out --earlier {other.directory}"
            )
        found[site.number] = other.dictionaries[0]
    return found


def header(opened: Run, view: View, split: str) -> Header:
    """Return what the page says of the run as a whole, with the measures of `sae study` if it has been run."""
    card = opened.card
    warnings: tuple[str, ...] = ()
    tables: tuple[ShownTable, ...] = ()
    file = opened.directory / MEASURES
    if file.exists():
        measures = read_measures(file)
        warnings, tables = measures.warnings, measures.tables
    else:
        warnings = (
            "This lens has not been measured: whether its features are worth more than principal components is not "
            "known. `python -m training sae study` measures it.",
        )
    facts = [
        ("model", f"{card.name} {card.version}"),
        ("weights", card.weights_sha256[:DIGEST_LETTERS]),
        ("site", f"{card.site}, {card.heads} heads of {card.d_head}"),
        ("features", f"{len(opened.dictionaries[0].w_dec)} in {card.heads * card.d_head} dimensions"),
        ("alerts", f"{len(view):,} real alerts of {len(np.unique(view.object_id)):,} objects"),
        ("split", "every split" if split == EVERY else split),
        ("rule of the split", card.split),
    ]
    if card.recipe is not None:
        facts.append(("autoencoder", f"{card.recipe.kind}, seed {card.seeds[0]} of {len(card.seeds)}"))
    return Header(
        f"{card.name} {card.version}, {card.site}",
        facts,
        warnings,
        [Table(table.caption, table.head, table.rows) for table in tables],
    )


def read_measures(file: Path) -> ShownMeasures:
    """Return the tables and warnings in a file of measures. Raises LensError if it cannot be read."""
    try:
        found: Any = json.loads(_bounded(file))
        return ShownMeasures.model_validate({name: found[name] for name in ShownMeasures.model_fields if name in found})
    except (ValueError, TypeError) as error:
        problem = describe_problems(error) if isinstance(error, ValidationError) else error
        raise LensError(f"{file}: cannot be read ({problem}): remove it, and run `sae study` again") from error


def read_features(file: Path, features: int, seeds: int) -> FeatureTable:
    """Return the table of features; one without names if there is no file. Raises LensError if it cannot be read."""
    if not file.exists():
        return FeatureTable((ID, NAME, NOTE), [{ID: str(i), NAME: "", NOTE: ""} for i in range(features)], seeds)
    try:
        reader = csv.DictReader(io.StringIO(_bounded(file).decode()), restval="")
        rows = [{name: value for name, value in row.items() if name is not None} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise LensError(f"{file}: not a CSV table ({error}): correct it, or run `sae study` again") from error
    columns = reader.fieldnames or ()
    if missing := [name for name in (ID, NAME, NOTE) if name not in columns]:
        raise LensError(f"{file}: lacks the columns {', '.join(missing)}: correct it, or run `sae study` again")
    return FeatureTable(tuple(columns), rows, seeds)


def _bounded(file: Path) -> bytes:
    if (size := file.stat().st_size) > MOST_TABLE_BYTES:
        raise LensError(f"{file}: has {size:,} bytes; it may have {MOST_TABLE_BYTES:,}")
    return file.read_bytes()
