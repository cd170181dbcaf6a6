"""Families of features, computed from where in an alert a feature reads: from its direct feature attribution (DFA).

The input is the share of each source token in a feature: the absolute DFA, summed over heads, divided by its sum over
the sources. Nothing is judged by eye.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, Measurement

Shares = NDArray[np.float64]
"""Shares of P source tokens in a feature for n rows in which it is active, [n, P]; each row sums to 1."""

MOST = 0.5
"""A feature reads mostly where this share of its attribution is."""
SPECIFIC = 0.8
"""Least share of one band or kind in a feature that is specific to it."""
NOT_THE_ONLY_ONE = 0.65
"""Greatest fraction of a band or kind among the sources: where nearly all points are of one band, every feature is."""
FEW_SOURCES = 3.0
"""Greatest effective number of sources of a few-epoch feature."""
SHORT_DAYS = 3.0
"""Time before the alert that a short-range feature reads: one or two visits of ZTF."""
CENTRAL_PIXELS = 8.0
"""Distance from the centre of a stamp, in pixels, within which the alert and its host lie."""


@dataclass(frozen=True, slots=True)
class PointSources:
    """The points that the attribution of n rows is spread over, [n, P] each; padding has the share 0.

    `token`: whether the source is the learnt token; its other columns mean nothing. `days`: time before the alert; the
    alert's own point has 0. `band`: index into BANDS. `kind`: Measurement.
    """

    share: Shares
    token: NDArray[np.bool_]
    days: NDArray[np.float64]
    band: NDArray[np.uint8]
    kind: NDArray[np.uint8]


def normalised(attribution: NDArray[np.floating]) -> Shares:
    """Return the shares [n, P] of attributions [n, P] by absolute value; a row without attribution stays 0."""
    size = np.abs(attribution).astype(np.float64)
    total = size.sum(axis=1, keepdims=True)
    shares: Shares = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    return shares


def effective_sources(share: Shares) -> float:
    """Return the mean effective number of sources, exp(entropy), of shares [n, P]; 1 if each row has one source."""
    logarithm = np.log(share, out=np.zeros_like(share), where=share > 0)
    return float(np.exp(-(share * logarithm).sum(axis=1)).mean())


def family_of_points(sources: PointSources) -> str:
    """Return the family of a feature of light curves, from the rows in which it is active.

    `token-only`, `alert-only`: most of it is on the learnt token, on the alert's own point. `band-specific r`,
    `kind-specific upper limit`: nearly all of it is on points of one band or kind, which are not nearly all points.
    `few-epoch`: few points. `short-range`: most of it is on points of the last days. Otherwise `whole-history`. The
    first of these that holds is the family; `none` without rows.
    """
    share = sources.share
    if not share.any():
        return "none"
    total = share.sum()
    if share[sources.token].sum() >= MOST * total:
        return "token-only"
    points = np.where(sources.token, 0, share)
    of_points = points.sum()
    if points[sources.days <= 0].sum() >= MOST * total:
        return "alert-only"
    existing = (share > 0) & ~sources.token
    for name, of in (("band", sources.band), ("kind", sources.kind)):
        for value in np.unique(of[existing]).tolist():
            common = (of[existing] == value).mean() > NOT_THE_ONLY_ONE
            if not common and points[of == value].sum() >= SPECIFIC * of_points:
                return f"{name}-specific {_name(name, value)}"
    if effective_sources(share) <= FEW_SOURCES:
        return "few-epoch"
    if points[sources.days <= SHORT_DAYS].sum() >= MOST * of_points:
        return "short-range"
    return "whole-history"


def family_of_cells(share: Shares, distance: NDArray[np.float64]) -> str:
    """Return the family of a feature of images, from the shares [n, P] of the cells in the rows where it is active.

    `distance` [P]: distance of each cell's centre from the centre of the stamp, in pixels. `central`: most of it is
    near the centre, where fewer than most of the cells are. `few-cell`: few cells. Otherwise `whole-stamp`; `none`
    without rows.
    """
    if not share.any():
        return "none"
    near = distance <= CENTRAL_PIXELS
    if near.mean() < MOST and share[:, near].sum() >= MOST * share.sum():
        return "central"
    return "few-cell" if effective_sources(share) <= FEW_SOURCES else "whole-stamp"


def _name(name: str, value: int) -> str:
    if name == "kind":
        return Measurement(value).name.lower().replace("_", " ")
    return BANDS[value] if value < len(BANDS) else "unknown"
