"""Compares the outputs of shadow models with those of serving models, over the records of `<prefix>.shadow`.

The records are untrusted: what is kept of them is bounded.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.streaming.shadow import THRESHOLD, counterpart

MAX_OUTPUTS = 32
"""The most pairs of outputs that are compared: records with invented names must not fill the memory."""
EXAMPLES = 6
"""Examples that are kept for each sign of the difference."""
BINS = 20
"""Bins of a histogram of probabilities from 0 to 1."""
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the alerts that a filter passes, for which the thresholds of both models are given."""
MAGNITUDES = (-math.inf, 15.0, 16.0, 17.0, 18.0, 19.0, 20.0, 21.0, 22.0, 23.0, 24.0, math.inf)
SIGNAL_TO_NOISE = (0.0, 5.0, 6.0, 7.0, 10.0, 20.0, 50.0, 100.0, math.inf)


class ModelName(NamedTuple):
    """Name and version of a model."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class OutputPair(NamedTuple):
    """An output that a serving and a shadow model both give for the alerts of a survey."""

    survey: str
    label: str
    serving: ModelName
    shadow: ModelName


@dataclass(frozen=True, slots=True)
class ComparedAlert:
    """What is known of an alert. `magnitude` (AB) and `snr` are NaN, and `cutouts` is empty, if the record lacks them.

    `cutouts`: its science, template and difference cutouts, each float32[H, W].
    """

    alert_id: int
    object_id: str
    magnitude: float = math.nan
    snr: float = math.nan
    cutouts: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """An alert on which two models differ much, with both outputs."""

    alert: ComparedAlert
    serving: float
    shadow: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two outputs agree over `n` alerts. All numbers are NaN if `n` is 0."""

    n: int
    mean_serving: float
    mean_shadow: float
    mean_difference: float
    """Mean of shadow minus serving output."""
    mean_absolute_difference: float
    disagreement: float
    """Share of the alerts that only one of the outputs passes at the threshold."""


@dataclass(frozen=True, slots=True)
class EqualRate:
    """The threshold of the shadow output that passes as many alerts as a threshold of the serving output.

    An output passes at a threshold if it is at least as large. Outputs that are exactly equal pass together, so
    `passed_shadow` may be larger than `passed`.
    """

    threshold: float
    passed: int
    threshold_shadow: float
    passed_shadow: int
    gained: int
    """Alerts that pass with the shadow output only."""
    lost: int
    """Alerts that pass with the serving output only."""


@dataclass(frozen=True, slots=True)
class Bin:
    """The agreement over the alerts whose magnitude or signal-to-noise ratio is from `low` to below `high`."""

    low: float
    high: float
    agreement: Agreement


@dataclass(frozen=True, slots=True)
class ComparedOutput:
    """The comparison of one pair of outputs."""

    pair: OutputPair
    threshold: float
    agreement: Agreement
    correlation: float
    """Pearson's correlation coefficient; NaN if one of the outputs is constant."""
    passed: tuple[int, int, int, int]
    """Alerts that pass with both outputs, with the serving one only, with the shadow one only, and with none."""
    counts: NDArray[np.int64]
    """[BINS, BINS] alerts by serving output (first axis) and shadow output, in equal bins from 0 to 1."""
    at_threshold: EqualRate
    at_rates: tuple[tuple[float, EqualRate], ...]
    """For those of RATES that select different numbers of alerts, at least one."""
    by_magnitude: tuple[Bin, ...]
    by_snr: tuple[Bin, ...]
    examples: tuple[Example, ...]
    """The alerts with the largest absolute differences, the largest first, up to EXAMPLES of each sign."""


@dataclass(slots=True)
class _Pair:
    """The values of a pair of outputs: 16 bytes for each alert, and a few examples."""

    serving: array[float] = field(default_factory=lambda: array("f"))
    shadow: array[float] = field(default_factory=lambda: array("f"))
    magnitude: array[float] = field(default_factory=lambda: array("f"))
    snr: array[float] = field(default_factory=lambda: array("f"))
    higher: list[tuple[float, int, Example]] = field(default_factory=list)
    lower: list[tuple[float, int, Example]] = field(default_factory=list)

    def add(self, alert: ComparedAlert, serving: float, shadow: float) -> None:
        for values, value in (
            (self.serving, serving),
            (self.shadow, shadow),
            (self.magnitude, alert.magnitude),
            (self.snr, alert.snr),
        ):
            values.append(value)
        if shadow == serving:
            return
        heap = self.higher if shadow > serving else self.lower
        item = abs(shadow - serving), len(self.serving), Example(alert, serving, shadow)
        if len(heap) < EXAMPLES:
            heappush(heap, item)
        elif item > heap[0]:
            heappushpop(heap, item)


class Comparison:
    """Collects the outputs of records, and compares them. It keeps 16 bytes for each alert and pair of outputs."""

    def __init__(self, label: str | None = None) -> None:
        """`label`: the only label that is compared; None for all labels."""
        self._label = label
        self._pairs: dict[OutputPair, _Pair] = {}
        self.alerts = 0
        """Alerts with an output of a shadow model that was compared."""
        self.left_out = 0
        """Pairs of outputs of alerts that were not compared because there are more than MAX_OUTPUTS pairs."""

    def add(self, alert: ComparedAlert, survey: str, annotation: Mapping[str, Any]) -> None:
        """Add the outputs of a record, unless it is marked as a duplicate.

        `annotation`: the record's decoded field `broker_filter`, which may hold anything.
        """
        if annotation.get("duplicate") is True:
            return
        compared = False
        for pair, serving, shadow in pairs_of(survey, annotation):
            if self._label not in (None, pair.label):
                continue
            if pair not in self._pairs:
                if len(self._pairs) >= MAX_OUTPUTS:
                    self.left_out += 1
                    continue
                self._pairs[pair] = _Pair()
            self._pairs[pair].add(alert, serving, shadow)
            compared = True
        self.alerts += compared

    def results(self, threshold: float = THRESHOLD) -> list[ComparedOutput]:
        """Return the comparison of each pair of outputs, sorted by pair. `threshold`: of the serving model's filter."""
        return [_compare(pair, values, threshold) for pair, values in sorted(self._pairs.items())]


def pairs_of(survey: str, annotation: Mapping[str, Any]) -> Iterator[tuple[OutputPair, float, float]]:
    """Yield each pair of outputs of an annotation with both values, which are from 0 to 1."""
    serving: dict[str, tuple[ModelName, Mapping[str, float]]] = {}
    shadows = []
    for model, outputs, is_shadow in _models(annotation):
        if is_shadow:
            shadows.append((model, outputs))
        else:
            serving.setdefault(model.name, (model, outputs))
    labels = {name: list(outputs) for name, (_, outputs) in serving.items()}
    for shadow, outputs in shadows:
        for label, value in outputs.items():
            name = counterpart(shadow.name, label, labels)
            if name is not None:
                model, old = serving[name]
                yield OutputPair(survey, label, model, shadow), old[label], value


def _models(annotation: Mapping[str, Any]) -> Iterator[tuple[ModelName, Mapping[str, float], bool]]:
    """Yield name, outputs and the mark of a shadow of each model of an annotation, without what is malformed."""
    models = annotation.get("models")
    for model in models if isinstance(models, list) else ():
        if not isinstance(model, dict) or not isinstance(outputs := model.get("outputs"), dict):
            continue
        values = {str(label): value for label, value in outputs.items() if _is_probability(value)}
        yield ModelName(str(model.get("model")), str(model.get("version"))), values, model.get("shadow") is True


def _is_probability(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= 1  # False for NaN


def _compare(pair: OutputPair, values: _Pair, threshold: float) -> ComparedOutput:
    columns = (values.serving, values.shadow, values.magnitude, values.snr)
    old, new, magnitude, snr = (np.array(column, np.float32) for column in columns)
    passes_old, passes_new = old >= threshold, new >= threshold
    both = int((passes_old & passes_new).sum())
    only_old, only_new = int(passes_old.sum()) - both, int(passes_new.sum()) - both
    descending = np.sort(old)[::-1]
    ranks = {round(rate * len(old)): rate for rate in reversed(RATES)}  # of equal ranks, the lowest rate
    examples = sorted((*values.higher, *values.lower), reverse=True)
    return ComparedOutput(
        pair,
        threshold,
        agreement(old, new, threshold),
        _correlation(old, new),
        (both, only_old, only_new, len(old) - both - only_old - only_new),
        histogram(old, new),
        equal_rate(old, new, threshold),
        tuple(
            (rate, equal_rate(old, new, float(descending[rank - 1]))) for rank, rate in sorted(ranks.items()) if rank
        ),
        tuple(_bins(old, new, magnitude, MAGNITUDES, threshold)),
        tuple(_bins(old, new, snr, SIGNAL_TO_NOISE, threshold)),
        tuple(example for _, _, example in examples),
    )


def agreement(old: NDArray[np.float32], new: NDArray[np.float32], threshold: float) -> Agreement:
    """Return how far the serving outputs `old` and the shadow outputs `new`, float32[N], agree."""
    if not len(old):
        return Agreement(0, *[math.nan] * 5)
    difference = new.astype(np.float64) - old
    return Agreement(
        len(old),
        float(old.mean(dtype=np.float64)),
        float(new.mean(dtype=np.float64)),
        float(difference.mean()),
        float(np.abs(difference).mean()),
        float(((old >= threshold) != (new >= threshold)).mean()),
    )


def equal_rate(old: NDArray[np.float32], new: NDArray[np.float32], threshold: float) -> EqualRate:
    """Return the threshold of `new` that passes as many alerts as `threshold` passes of `old`, both float32[N].

    If no alert passes, the threshold is infinite.
    """
    passes = old >= np.float32(threshold)
    passed = int(passes.sum())
    equal = float(np.partition(new, len(new) - passed)[len(new) - passed]) if passed else math.inf
    passes_new = new >= np.float32(equal)
    both = int((passes & passes_new).sum())
    passed_new = int(passes_new.sum())
    return EqualRate(threshold, passed, equal, passed_new, passed_new - both, passed - both)


def histogram(old: NDArray[np.float32], new: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the number of alerts by `old` (first axis) and `new`, int64[BINS, BINS].

    `old`, `new`: from 0 to 1. A bin has its lower edge, and the last one also has 1.
    """
    first, second = (np.minimum((BINS * values).astype(np.int64), BINS - 1) for values in (old, new))
    return np.bincount(BINS * first + second, minlength=BINS * BINS).reshape(BINS, BINS)


def _correlation(old: NDArray[np.float32], new: NDArray[np.float32]) -> float:
    if not len(old) or not np.ptp(old) or not np.ptp(new):
        return math.nan
    return float(np.corrcoef(old.astype(np.float64), new.astype(np.float64))[0, 1])


def _bins(
    old: NDArray[np.float32],
    new: NDArray[np.float32],
    by: NDArray[np.float32],
    edges: Sequence[float],
    threshold: float,
) -> Iterable[Bin]:
    """Yield the agreement in each bin of `by` that has alerts."""
    for low, high in pairwise(edges):
        inside = (by >= low) & (by < high)
        if inside.any():
            yield Bin(low, high, agreement(old[inside], new[inside], threshold))
