"""Statistics of features over alerts: which alerts show a feature, and how its activations and sources are spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.interpretability.explorer_data import Enrichment, Example, Group, Histogram, Interval, Lag, Nearest
from training.interpretability.measures import lifts, unit

TOP = 12
"""Number of most active alerts that are shown of a feature."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The positive activations of a feature are divided into groups at these quantiles."""
IN_A_GROUP = 3
"""Number of alerts that are shown of each group."""
BINS = 24
NEAREST = 5
LAG_DAYS = (0.0, 0.5, 1.5, 4.0, 8.0, 16.0, 32.0, np.inf)
"""Bounds of the intervals of days before the alert. Points up to LAG_DAYS[0] are the alert's own."""


@dataclass(frozen=True, slots=True)
class LabelledActivations:
    """The activations of F features in N alerts, and the classes of the alerts."""

    activation: NDArray[np.float32]  # [N, F] the greatest over the rows of an alert
    object_id: NDArray[np.str_]  # [N]
    label: NDArray[np.int64]  # [N] index into `classes`; -1: no label
    classes: Sequence[str]

    def top(self, feature: int, first: NDArray[np.int64]) -> list[Example]:
        """Return the TOP most active alerts of a feature, one of each object, most active first.

        `first` int64[n]: the alerts that may be chosen.
        """
        order = first[np.argsort(-self.activation[first, feature], kind="stable")]
        order = order[self.activation[order, feature] > 0]
        _, own = np.unique(self.object_id[order], return_index=True)
        return [self._example(alert, feature) for alert in order[np.sort(own)[:TOP]].tolist()]

    def groups(self, feature: int) -> list[Group]:
        """Return alerts from each interval between QUANTILES of the positive activations, the most active group first.

        The alerts of a group are spread evenly over it.
        """
        active = np.flatnonzero(self.activation[:, feature] > 0)
        active = active[np.argsort(self.activation[active, feature], kind="stable")]
        groups = []
        for low, high in zip(QUANTILES[-2::-1], QUANTILES[:0:-1], strict=True):
            members = active[round(low * len(active)) : round(high * len(active))]
            if len(members):
                chosen = members[np.unique(np.linspace(0, len(members) - 1, IN_A_GROUP).round().astype(np.int64))]
                label = f"Activations between the {low:.0%} and the {high:.0%} quantile ({len(members)} alerts)"
                groups.append(Group(label, [self._example(alert, feature) for alert in chosen[::-1].tolist()]))
        return groups

    def histogram(self, feature: int) -> Histogram:
        """Return the histogram of the positive activations of a feature, in BINS equal bins from 0."""
        activation = self.activation[:, feature]
        active = activation[activation > 0]
        counts, edges = np.histogram(active, BINS, (0, float(active.max()) if len(active) else 1.0))
        return Histogram(edges.tolist(), counts.tolist(), int((activation <= 0).sum()))

    def enrichment(self, feature: int) -> list[Enrichment]:
        """Return the enrichment of each class among the active alerts of a feature, by decreasing lift.

        Only labelled alerts count.
        """
        known = self.label >= 0
        active = self.activation[known, feature] > 0
        if not active.any():
            return []
        label = self.label[known]
        found = lifts(active, label, self.classes, self.object_id[known])
        rows = [
            Enrichment(
                name,
                int((label[active] == c).sum()),
                float((label[active] == c).mean()),
                Interval(*(np.nan if limit is None else limit for limit in (lift.value, lift.low, lift.high))),
            )
            for c, name in enumerate(self.classes)
            if (lift := found[name]).value is not None and (label == c).any()
        ]
        return sorted(rows, key=lambda row: -row.lift.value)

    def _example(self, alert: int, feature: int) -> Example:
        return Example(alert, float(self.activation[alert, feature]))


def most_enriched(rows: Sequence[Enrichment]) -> Enrichment | None:
    """Return the class with the greatest lower end of the interval of its lift; None without any."""
    bounded = [row for row in rows if np.isfinite(row.lift.low)]
    return max(bounded, key=lambda row: row.lift.low, default=None)


def lags(attribution: NDArray[np.float64], days: NDArray[np.float64], token: NDArray[np.bool_]) -> list[Lag]:
    """Return the mean DFA of n alerts in each interval of days before the alert.

    `attribution` [n, P], 0 for padding; `days` [n, P] before the alert; `token` bool[n, P]: whether the source is the
    learnt token, which has an interval of its own.
    """
    if not len(attribution):
        return []
    of_points = np.digitize(days, LAG_DAYS[1:-1], right=True) + 1
    interval = np.where(token, 0, np.where(days <= LAG_DAYS[0], 1, of_points + 1))
    names = ["token", "the alert"]
    names += [f"up to {high:g} d" if np.isfinite(high) else f"over {LAG_DAYS[-2]:g} d" for high in LAG_DAYS[1:]]
    total = np.abs(attribution).sum()
    found = []
    for i, name in enumerate(names):
        inside = np.where(interval == i, attribution, 0.0)
        share = float(np.abs(inside).sum() / total) if total > 0 else 0.0
        found.append(Lag(name, float(inside.sum(axis=1).mean()), share))
    return found


def head_shares_by_attribution(by_head: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of each head in the absolute DFA, [H], of attributions [n, H, P]; equal shares without any."""
    size = np.abs(by_head).sum(axis=(0, 2))
    total = size.sum()
    shares: NDArray[np.float64] = size / total if total > 0 else np.full(len(size), 1 / len(size))
    return shares


def nearest(decoder: NDArray[np.float32], feature: int) -> list[Nearest]:
    """Return the NEAREST other features by the cosine of the decoder's directions [F, d], the nearest first."""
    directions = unit(decoder)
    cosine = directions @ directions[feature]
    cosine[feature] = -np.inf
    order = np.argsort(-cosine, kind="stable")[: min(NEAREST, len(cosine) - 1)]
    return [Nearest(other, float(cosine[other])) for other in order.tolist()]
