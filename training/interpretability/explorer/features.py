"""Statistics of features over alerts: which alerts show a feature, and how its activations and sources are spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.evaluation.bootstrap import Estimate, estimate
from training.evaluation.metrics import Values, Weights
from training.interpretability.explorer.data import Enrichment, Example, Group, Histogram, Interval, Lag, Nearest
from training.interpretability.study.measures import unit

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

    def top(self, feature: int) -> list[Example]:
        """Return the TOP most active alerts of a feature, one of each object, most active first."""
        order = np.argsort(-self.activation[:, feature], kind="stable")
        order = order[self.activation[order, feature] > 0]
        _, own = np.unique(self.object_id[order], return_index=True)
        return [self._example(alert, feature) for alert in order[np.sort(own)[:TOP]].tolist()]

    def groups(self, feature: int, allowed: NDArray[np.bool_]) -> list[Group]:
        """Return alerts from each interval between QUANTILES of the positive activations, the most active group first.

        The alerts of a group are spread evenly over those that are `allowed` bool[N].
        """
        active = np.flatnonzero(self.activation[:, feature] > 0)
        active = active[np.argsort(self.activation[active, feature], kind="stable")]
        groups = []
        for low, high in zip(QUANTILES[-2::-1], QUANTILES[:0:-1], strict=True):
            members = active[round(low * len(active)) : round(high * len(active))]
            if len(among := members[allowed[members]]):
                chosen = among[np.unique(np.linspace(0, len(among) - 1, IN_A_GROUP).round().astype(np.int64))]
                label = f"Activations between the {low:.0%} and the {high:.0%} quantile ({len(members)} alerts)"
                groups.append(Group(label, [self._example(alert, feature) for alert in chosen[::-1].tolist()]))
        return groups

    def histogram(self, feature: int) -> Histogram:
        """Return the histogram of the positive activations of a feature, in BINS equal bins from 0."""
        activation = self.activation[:, feature]
        active = activation[activation > 0]
        counts, edges = np.histogram(active, BINS, (0, float(active.max()) if len(active) else 1.0))
        return Histogram(edges.tolist(), counts.tolist(), int((activation <= 0).sum()))

    def enrichment(self) -> list[list[Enrichment]]:
        """Return, for each feature, the enrichment of each class, by decreasing lift; empty if no alert activates it.

        Only labelled alerts count. The intervals are by object.
        """
        known = np.flatnonzero(self.label >= 0)
        active, label = (self.activation[known] > 0).astype(np.float64), self.label[known]
        present = [c for c in range(len(self.classes)) if (label == c).any()]
        if not len(known):
            return [[] for _ in range(active.shape[1])]

        def lifts(weight: Weights) -> dict[str, Values]:
            all_active = weight @ active
            of_class = {}
            for c in present:
                mine = label == c
                expected = all_active * (weight @ mine / weight.sum(axis=-1))[..., None]
                found = weight[..., mine] @ active[mine]
                of_class[c] = np.divide(found, expected, out=np.full_like(found, np.nan), where=expected > 0)
            return {_key(f, c): lift[..., f] for c, lift in of_class.items() for f in range(active.shape[1])}

        estimates = estimate(lifts, self.object_id[known], lambda _: {})
        return [
            sorted(
                (self._enrichment(estimates[_key(f, c)], active[:, f] > 0, label, c) for c in present),
                key=lambda row: -row.lift.value,
            )
            if active[:, f].any()
            else []
            for f in range(active.shape[1])
        ]

    def _enrichment(self, lift: Estimate, active: NDArray[np.bool_], label: NDArray[np.int64], c: int) -> Enrichment:
        mine = label[active] == c
        limits = (np.nan if limit is None else limit for limit in (lift.value, lift.low, lift.high))
        return Enrichment(self.classes[c], int(mine.sum()), float(mine.mean()), Interval(*limits))

    def _example(self, alert: int, feature: int) -> Example:
        return Example(alert, float(self.activation[alert, feature]))


def _key(feature: int, label: int) -> str:
    return f"{feature}.{label}"


def most_enriched(rows: Sequence[Enrichment]) -> Enrichment | None:
    """Return the class with the greatest lower end of the interval of its lift; None without any."""
    bounded = [row for row in rows if np.isfinite(row.lift.low)]
    return max(bounded, key=lambda row: row.lift.low, default=None)


def lags(attribution: NDArray[np.floating], days: NDArray[np.float64]) -> list[Lag]:
    """Return the mean DFA of n alerts in each interval of days before the alert.

    `attribution` [n, P], 0 for padding; `days` [n, P] before the alert, NaN for the learnt token, which has an interval
    of its own, and for padding.
    """
    if not len(attribution):
        return []
    of_points = np.digitize(days, LAG_DAYS[1:-1], right=True) + 1
    interval = np.where(np.isnan(days), 0, np.where(days <= LAG_DAYS[0], 1, of_points + 1))
    names = ["token", "the alert"]
    names += [f"up to {high:g} d" if np.isfinite(high) else f"over {LAG_DAYS[-2]:g} d" for high in LAG_DAYS[1:]]
    total = np.abs(attribution).sum()
    found = []
    for i, name in enumerate(names):
        inside = np.where(interval == i, attribution, 0.0)
        share = float(np.abs(inside).sum() / total) if total > 0 else 0.0
        found.append(Lag(name, float(inside.sum(axis=1).mean()), share))
    return found


def shares(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of each head, [H], in the sum of sizes [n, H]; equal shares without any."""
    total = sizes.sum()
    found: NDArray[np.float64] = sizes.sum(axis=0) / total if total > 0 else np.full(sizes.shape[1], 1 / sizes.shape[1])
    return found


def nearest(decoder: NDArray[np.float32], feature: int) -> list[Nearest]:
    """Return the NEAREST other features by the cosine of the decoder's directions [F, d], the nearest first."""
    directions = unit(decoder)
    cosine = directions @ directions[feature]
    cosine[feature] = -np.inf
    order = np.argsort(-cosine, kind="stable")[: min(NEAREST, len(cosine) - 1)]
    return [Nearest(other, float(cosine[other])) for other in order.tolist()]
