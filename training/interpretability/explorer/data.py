"""The contents of an explorer's page: what it shows of a model, of each feature and of each alert.

This module only holds data. `explore` computes the contents from a run, and `page.js` shows them. Numbers are
stored with FIGURES significant digits, because the page must stay small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

import numpy as np

FIGURES = 4
"""Significant digits of every number that is not an integer."""
TOKEN = -1
"""The place of the learnt token, which is a source of attention but no point of the light curve."""


class Kind(StrEnum):
    """What the sources of attention of a site are."""

    POINTS = "points"
    CELLS = "cells"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text; the first cell of a row names the row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval; NaN where a limit is unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Enrichment:
    """How much more frequent a class is among the alerts that activate a feature than among all alerts.

    `share`: the fraction of the active alerts that are of this class. `lift`: that share divided by the share of the
    class among all alerts.
    """

    name: str
    alerts: int  # active alerts of the class
    share: float
    lift: Interval


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of alerts by the activation of a feature; `zero` alerts do not activate it."""

    edges: Sequence[float]  # B + 1
    counts: Sequence[int]  # B
    zero: int


@dataclass(frozen=True, slots=True)
class Lag:
    """The DFA of the points of one interval of days before the alert, averaged over the active alerts."""

    label: str
    signed: float
    share: float  # of the sum of absolute DFA over all points and the token


@dataclass(frozen=True, slots=True)
class Effect:
    """What ablating a feature changes, averaged over the active alerts; `random`: a random direction of equal size."""

    output: str
    effect: float
    random: float


@dataclass(frozen=True, slots=True)
class Example:
    """An alert that shows a feature: its place in `Page.alerts`."""

    alert: int
    activation: float


@dataclass(frozen=True, slots=True)
class Group:
    """Examples from one interval of the activations."""

    label: str
    examples: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Nearest:
    """Another feature, and the cosine of the two decoder directions."""

    feature: int  # its place in `Page.features`
    cosine: float


@dataclass(frozen=True, slots=True)
class FeatureView:
    """What the page shows of one feature."""

    id: int
    name: str
    note: str
    frequency: float  # share of the alerts that activate it
    stable_in: int | None
    family: str
    main_head: int
    effect: float
    enriched: Enrichment | None
    top: Sequence[Example]
    groups: Sequence[Group]
    histogram: Histogram
    enrichment: Sequence[Enrichment]
    heads_by_weight: Sequence[float]  # H
    heads_by_dfa: Sequence[float]  # H
    lags: Sequence[Lag]  # empty for a site of cells
    cells: Sequence[float]  # mean DFA by source; empty for a site of light-curve points
    effects: Sequence[Effect]
    nearest: Sequence[Nearest]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A term of a recursive attribution."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Active:
    """A feature that an alert activates, at the row where the feature is most active.

    `sources`: DFA by source, summed over the heads, in the order of the sources of `AlertView.points` or of
    `Page.cells`. `bias`: the part of the pre-activation that no source has. `after`: the network's outputs if
    the feature is ablated, in the order of `Page.outputs`.
    """

    feature: int  # its place in `Page.features`
    activation: float
    query: int  # source where the row is: TOKEN, a point of the light curve, or a cell
    heads: Sequence[float]  # H, the sum of DFA over the sources
    sources: Sequence[float]
    bias: float
    leaves: Sequence[Leaf]
    after: Sequence[float]


@dataclass(frozen=True, slots=True)
class Curve:
    """The light curve of an alert, as columns of M points."""

    days: Sequence[float]  # before the alert; negative after it
    flux: Sequence[float]  # nJy
    error: Sequence[float]  # nJy, NaN if unknown
    band: Sequence[int]  # index into BANDS, or UNKNOWN_BAND
    kind: Sequence[int]  # Measurement


@dataclass(frozen=True, slots=True)
class AlertView:
    """What the page shows of one alert.

    `picture`: a PNG in base64 with the three cutouts side by side. `box`: the rectangle (y0, x0, height, width) of each
    cutout's slot that is drawn. `points`: for each source of a light-curve site the index into `curve`, or TOKEN.
    `before`: the network's outputs, in the order of `Page.outputs`. `active`: features with their attributions, the
    most active first. `actives`: the number of all active features. `unexplained`: the share of the variance of z that
    the features leave unexplained; `percentile`: the percentage of the alerts whose share is smaller.
    """

    id: str
    object: str
    survey: str
    label: str
    split: str
    picture: str
    box: tuple[int, int, int, int]
    curve: Curve | None
    points: Sequence[int]
    before: Sequence[float]
    active: Sequence[Active]
    actives: int
    unexplained: float
    percentile: float


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that one page shows."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values of what the lens is of: model, weights, site, split, numbers of alerts."""
    warnings: Sequence[str]
    metrics: Sequence[Table]
    kind: Kind
    heads: int
    seeds: int
    effect: str
    """What `FeatureView.effect` is a change of."""
    outputs: Sequence[str]
    """Names of the network's outputs that an ablation may change."""
    bands: Sequence[str]
    kinds: Sequence[str]
    cells: Sequence[tuple[float, float, float, float]]
    """The boxes (y0, x0, height, width) of the cells, in pixels of the cutout's slot."""
    features: Sequence[FeatureView]
    alerts: Sequence[AlertView]
    columns: Sequence[str]
    """Columns of the CSV of names that the page writes."""
    rows: Sequence[Mapping[str, str]] = field(default_factory=tuple)
    """Rows of that CSV, as read."""


def as_json(page: Page) -> str:
    """Return a page as JSON that can stand in an HTML `script` element: "<", ">" and "&" are escaped."""
    text = json.dumps(_plain(page), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    """Return a value of dataclasses, sequences and numpy numbers as what JSON can hold; NaN and infinity are null."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.{FIGURES}g}") if math.isfinite(value) else None
    return [_plain(one) for one in value]
