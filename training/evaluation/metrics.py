"""Figures of merit of predictions, over weighted alerts: one implementation gives a figure and all its resamples.

`weight` [..., N] says how much each alert counts: ones for the figure itself, [R, N] counts for R resamples at once;
what comes back has the shape [...] of the rest. A figure that lacks what it needs, such as alerts of a class, is NaN.
Never draws a resample, never rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.evaluation.calibration import logit_of, slope_and_intercept
from training.evaluation.predictions import Predictions

Weights = NDArray[np.float64]
Values = NDArray[np.float64]

RELIABILITY_BINS = 15
"""Of equal width in probability, as in Guo et al. 2017 (arXiv 1706.04599), section 5."""
CALIBRATED_DRAWS = 1000
"""Of the outcomes that a perfectly calibrated model would have had."""
CALIBRATED_SEED = 2026
MISSED = (0.01, 0.05)
"""False-negative rates at which the false-positive rate is given."""
_MISSED_NAMES = tuple(f"fpr_at_fnr_{share * 100:.0f}" for share in MISSED)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How much weight lies at or above each of T distinct scores, from the highest on; before them an entry of none."""

    positive: Values  # [..., T + 1]
    negative: Values  # [..., T + 1]

    @property
    def recall(self) -> Values:
        """The share of the positive alerts at or above each score: the true-positive rate, [..., T + 1]."""
        return ratio(self.positive, self.positive[..., -1:])

    @property
    def false_positive_rate(self) -> Values:
        """The share of the negative alerts at or above each score, [..., T + 1]."""
        return ratio(self.negative, self.negative[..., -1:])

    @property
    def precision(self) -> Values:
        """The share of positive alerts at or above each score, [..., T + 1]; NaN where there are none."""
        return ratio(self.positive, self.positive + self.negative)

    @property
    def roc_auc(self) -> Values:
        """The chance that a positive alert scores above a negative one, ties counting half (Mann-Whitney U / n1 n0)."""
        return np.asarray(np.trapezoid(self.recall, self.false_positive_rate, axis=-1))

    @property
    def average_precision(self) -> Values:
        """Precision averaged over recall, as steps: the mean precision at which a positive alert is found."""
        steps = np.diff(self.recall, axis=-1)
        average: Values = np.where(steps > 0, steps * self.precision[..., 1:], steps).sum(axis=-1)  # NaN stays NaN
        return average

    def false_positive_rate_missing(self, share: float) -> Values:
        """The false-positive rate at the highest score at which at most `share` of the positive alerts are missed."""
        first = (self.recall >= 1 - share).argmax(axis=-1)
        rate = np.take_along_axis(self.false_positive_rate, first[..., None], axis=-1)[..., 0]
        return np.where(self.positive[..., -1] > 0, rate, np.nan)


def rank(positive: NDArray[np.bool_], score: NDArray[np.floating], weight: Weights) -> Ranking:
    """Ranks N alerts by score."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # the last alert of every distinct score
    weight, positive = weight[..., order], positive[order]

    def accumulated(part: Weights) -> Values:
        start = np.zeros((*part.shape[:-1], 1))
        return np.concatenate([start, np.cumsum(part, axis=-1)[..., last]], axis=-1)

    return Ranking(accumulated(weight * positive), accumulated(weight * ~positive))


def measure(predictions: Predictions, weight: Weights) -> dict[str, Values]:
    """Every figure by name.

    Of one label: `roc_auc`, `average_precision`, `precision`, `recall`, `f1`, `fpr_at_fnr_1` and `fpr_at_fnr_5` (per
    cent), besides `accuracy`, `balanced_accuracy` and `ece`. Of several: the former for each label against the rest
    (`SN.roc_auc`) and, without prefix, their mean over the labels (macro).
    """
    decided = predictions.decided
    of_label = {}
    for label, score in zip(predictions.labels, predictions.probabilities.T, strict=True):
        c = predictions.classes.index(label)
        of_label[label] = _one_against_the_rest(predictions.truth == c, score, decided == c, weight)
    figures = _over_labels(predictions, of_label)
    counts = confusion(predictions, weight)
    correct = np.diagonal(counts, axis1=-2, axis2=-1)
    figures["accuracy"] = ratio(correct.sum(axis=-1), counts.sum(axis=(-2, -1)))
    figures["balanced_accuracy"] = ratio(correct, counts.sum(axis=-1)).mean(axis=-1)
    figures["ece"] = Reliability.of(predictions, weight).expected_error
    return figures


def trials(predictions: Predictions, weight: Weights) -> dict[str, Values]:
    """How many objects each figure of `measure` is of, for weights [..., N] that sum to 1 over each object; of a mean
    over the classes, the harmonic mean of theirs."""
    decided = predictions.decided
    of_label = {}
    for label in predictions.labels:
        c = predictions.classes.index(label)
        positive = weight @ (predictions.truth == c)
        negative = weight.sum(axis=-1) - positive
        pairs = np.minimum(positive, negative)
        of_label[label] = {
            "roc_auc": pairs,
            "average_precision": pairs,
            "precision": weight @ (decided == c),
            "recall": positive,
            "f1": positive,
            **dict.fromkeys(_MISSED_NAMES, negative),
        }
    figures = _over_labels(predictions, of_label, harmonic_mean)
    existing = [weight @ (predictions.truth == c) for c in range(len(predictions.classes))]
    return figures | {
        "accuracy": weight.sum(axis=-1),
        "balanced_accuracy": harmonic_mean(existing),
        "ece": weight.sum(axis=-1),
    }


def harmonic_mean(trials: Sequence[Values]) -> Values:
    """Of numbers of trials. A mean of shares, each without a failure, is as uncertain as a share of so many trials; 0
    where one of them has no trial."""
    with np.errstate(divide="ignore"):
        return np.asarray(len(trials) / np.sum([np.divide(1.0, each) for each in trials], axis=0))


def measure_calibration(predictions: Predictions, weight: Weights) -> dict[str, Values]:
    """How well the probabilities are calibrated: `calibration_slope`, `calibration_intercept` and `ece`.

    Of several labels: the former two for each label against the rest, and their mean over the labels.
    """
    of_label = {}
    for label, score in zip(predictions.labels, predictions.probabilities.T, strict=True):
        positive = predictions.truth == predictions.classes.index(label)
        slope, intercept = slope_and_intercept(logit_of(score), positive, weight)
        of_label[label] = {"calibration_slope": slope, "calibration_intercept": intercept}
    return _over_labels(predictions, of_label) | {"ece": Reliability.of(predictions, weight).expected_error}


def _mean(figures: Sequence[Values]) -> Values:
    return np.asarray(np.mean(figures, axis=0))


def _over_labels(
    predictions: Predictions,
    of_label: dict[str, dict[str, Values]],
    mean: Callable[[Sequence[Values]], Values] = _mean,
) -> dict[str, Values]:
    """The mean of each figure over the labels and, where there are several, each label's own."""
    names = next(iter(of_label.values()))
    figures = {name: mean([known[name] for known in of_label.values()]) for name in names}
    if not predictions.binary:
        figures |= {f"{label}.{name}": value for label, known in of_label.items() for name, value in known.items()}
    return figures


def confusion(predictions: Predictions, weight: Weights) -> Values:
    """The weight of the alerts of each true class (rows) that are taken for each class (columns), [..., C, C]."""
    c = len(predictions.classes)
    cell = predictions.truth * c + predictions.decided
    in_cell: Values = weight @ np.eye(c * c)[cell]
    return in_cell.reshape(*weight.shape[:-1], c, c)


def confusion_shares(predictions: Predictions, weight: Weights) -> Values:
    """The confusion matrix with each row, a true class, as shares of it, [..., C, C]."""
    counts = confusion(predictions, weight)
    return ratio(counts, counts.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Reliability:
    """What the model says against what happens, in bins of equal width of what it says.

    For one label: how probable it is, and how often it holds. For several: how probable the most probable one is, and
    how often it is right (top-label calibration).
    """

    weight: Values  # [..., B] in each bin
    said: Values  # [..., B] mean probability, NaN in an empty bin
    happened: Values  # [..., B] share, NaN in an empty bin

    @classmethod
    def of(cls, predictions: Predictions, weight: Weights) -> Reliability:
        """Bins N alerts."""
        said = predictions.probabilities.max(axis=1).astype(np.float64)
        happened = predictions.truth == (1 if predictions.binary else predictions.decided)
        inside = _in_bins(said)
        total = weight @ inside
        return cls(
            total,
            ratio(weight @ (inside * said[:, None]), total),
            ratio(weight @ (inside * happened[:, None]), total),
        )

    @property
    def expected_error(self) -> Values:
        """The expected calibration error, ECE: the mean distance of the two over the alerts (Guo et al. 2017, eq. 3).

        Few alerts in a bin make it larger than it is, resampled ones more so: its interval leans upwards.
        """
        distance = np.nan_to_num(np.abs(self.said - self.happened))
        return ratio((self.weight * distance).sum(axis=-1), self.weight.sum(axis=-1))


def errors_if_calibrated(predictions: Predictions) -> Values:
    """The expected calibration errors that a perfectly calibrated model would show, had it said the same of as many
    alerts and objects: of CALIBRATED_DRAWS outcomes that are drawn with the probabilities that were said, [R].

    All alerts of an object happen or do not by one draw, because an object is of one class.
    """
    said = predictions.probabilities.max(axis=1).astype(np.float64)
    objects, index = np.unique(predictions.object_id, return_inverse=True)
    rng, inside = np.random.default_rng(CALIBRATED_SEED), _in_bins(said)
    expected, total = said @ inside, float(len(said))
    errors = [
        np.abs((rng.random(len(objects))[index] < said) @ inside - expected).sum() / total
        for _ in range(CALIBRATED_DRAWS)
    ]
    return np.array(errors)


def _in_bins(said: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 in the bin of each of N probabilities and 0 in the others, [N, RELIABILITY_BINS]."""
    in_bins: NDArray[np.float64] = np.eye(RELIABILITY_BINS)[
        np.minimum((said * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    ]
    return in_bins


def ratio(part: Values, whole: Values) -> Values:
    """The part of the whole; NaN where there is nothing to take a part of."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.divide(part, whole), np.float64)


def _one_against_the_rest(
    positive: NDArray[np.bool_], score: NDArray[np.floating], decided: NDArray[np.bool_], weight: Weights
) -> dict[str, Values]:
    ranking = rank(positive, score, weight)
    found, claimed, existing = weight @ (positive & decided), weight @ decided, weight @ positive
    return {
        "roc_auc": ranking.roc_auc,
        "average_precision": ranking.average_precision,
        # Of a class that is there and never claimed the precision is 0, as its F1 is: else it would raise the mean.
        "precision": np.where((claimed == 0) & (existing > 0), 0, ratio(found, claimed)),
        "recall": ratio(found, existing),
        "f1": ratio(2 * found, claimed + existing),
        **{name: ranking.false_positive_rate_missing(share) for name, share in zip(_MISSED_NAMES, MISSED, strict=True)},
    }
