"""Metrics of predictions over weighted alerts; the same code computes a metric and all its resamples.

`weight` [..., N] is the weight of each alert: ones for the metric itself, counts [R, N] for R resamples at once.
Results have the leading shape [...]. A metric that is undefined, for example because a class is absent, is NaN. Nothing
is resampled or rounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.evaluation.calibration import logit_of, slope_and_intercept
from training.evaluation.predictions import Predictions

Weights = NDArray[np.float64]
"""The weights of N alerts, [..., N]: one row for the metric itself, R rows for R resamples."""
Values = NDArray[np.float64]
"""One value of a figure for each row of weights, [...]."""

RELIABILITY_BINS = 15
"""Bins of equal width in probability, as in Guo et al. 2017 (arXiv:1706.04599), section 5."""
CALIBRATED_DRAWS = 1000
"""Number of draws of the outcomes of a perfectly calibrated model."""
CALIBRATED_SEED = 2026
MISSED = (0.01, 0.05)
"""False-negative rates at which the false-positive rate is given."""
_MISSED_NAMES = tuple(f"fpr_at_fnr_{share * 100:.0f}" for share in MISSED)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Weight of positive and negative alerts at or above each of T distinct scores.

    Scores are in descending order; the first entry is 0.
    """

    positive: Values  # [..., T + 1]
    negative: Values  # [..., T + 1]

    @property
    def recall(self) -> Values:
        """Fraction of the positive alerts at or above each score (true-positive rate), [..., T + 1]."""
        return ratio(self.positive, self.positive[..., -1:])

    @property
    def false_positive_rate(self) -> Values:
        """Fraction of the negative alerts at or above each score, [..., T + 1]."""
        return ratio(self.negative, self.negative[..., -1:])

    @property
    def precision(self) -> Values:
        """Fraction of positive alerts among those at or above each score, [..., T + 1]; NaN if there are none."""
        return ratio(self.positive, self.positive + self.negative)

    @property
    def roc_auc(self) -> Values:
        """The probability that a positive alert scores above a negative one.

        Ties count half (Mann-Whitney U / n1 n0).
        """
        return np.asarray(np.trapezoid(self.recall, self.false_positive_rate, axis=-1))

    @property
    def average_precision(self) -> Values:
        """Average precision: sum of precision times step in recall."""
        steps = np.diff(self.recall, axis=-1)
        average: Values = np.where(steps > 0, steps * self.precision[..., 1:], steps).sum(axis=-1)  # NaN stays NaN
        return average

    def false_positive_rate_missing(self, share: float) -> Values:
        """Return the false-positive rate at the highest score that misses at most `share` of the positive alerts."""
        first = (self.recall >= 1 - share).argmax(axis=-1)
        rate = np.take_along_axis(self.false_positive_rate, first[..., None], axis=-1)[..., 0]
        return np.where(self.positive[..., -1] > 0, rate, np.nan)


def rank(positive: NDArray[np.bool_], score: NDArray[np.floating], weight: Weights) -> Ranking:
    """Rank N alerts by score, for weights [..., N]."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # index of the last alert with each score
    weight, positive = weight[..., order], positive[order]

    def accumulated(part: Weights) -> Values:
        start = np.zeros((*part.shape[:-1], 1))
        return np.concatenate([start, np.cumsum(part, axis=-1)[..., last]], axis=-1)

    return Ranking(accumulated(weight * positive), accumulated(weight * ~positive))


def measure(predictions: Predictions, weight: Weights) -> dict[str, Values]:
    """Return all metrics by name, each [...] for weights [..., N].

    Metrics of a label: `roc_auc`, `average_precision`, `precision`, `recall`, `f1`, `fpr_at_fnr_1` and `fpr_at_fnr_5`
    (false-positive rate at a false-negative rate of 1 % and 5 %). With several labels, each is returned for every label
    against the rest (`SN.roc_auc`) and, without prefix, as the mean over the labels (macro average). Metrics of the
    whole: `accuracy`, `balanced_accuracy` and `ece`.
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
    """Return the number of objects behind each metric of `measure`, by name.

    `weight` [..., N] sums to 1 over each object. For a mean over the classes, the number is the harmonic mean of the
    classes' numbers.
    """
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
    """Return the harmonic mean of the numbers of trials, or 0 if one number is 0.

    A mean of several fractions, each without a failure, is as uncertain as one fraction with this number of trials.
    """
    with np.errstate(divide="ignore"):
        return np.asarray(len(trials) / np.sum([np.divide(1.0, each) for each in trials], axis=0))


def measure_calibration(predictions: Predictions, weight: Weights) -> dict[str, Values]:
    """Return `calibration_slope`, `calibration_intercept` and `ece`, each [...] for weights [..., N].

    With several labels: slope and intercept for each label against the rest, and their mean over the labels.
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
    """Return the mean of each metric over the labels and, if there are several labels, the metrics of each."""
    names = next(iter(of_label.values()))
    figures = {name: mean([known[name] for known in of_label.values()]) for name in names}
    if not predictions.binary:
        figures |= {f"{label}.{name}": value for label, known in of_label.items() for name, value in known.items()}
    return figures


def confusion(predictions: Predictions, weight: Weights) -> Values:
    """Return the confusion matrix [..., C, C], for weights [..., N].

    An entry is the weight of the alerts of a true class (row) that are predicted as a class (column).
    """
    c = len(predictions.classes)
    cell = predictions.truth * c + predictions.decided
    in_cell: Values = weight @ np.eye(c * c)[cell]
    return in_cell.reshape(*weight.shape[:-1], c, c)


def confusion_shares(predictions: Predictions, weight: Weights) -> Values:
    """Return the confusion matrix [..., C, C] with each row normalised to 1."""
    counts = confusion(predictions, weight)
    return ratio(counts, counts.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Reliability:
    """Predicted probability against observed frequency, in bins of equal width of the predicted probability.

    With one label: its probability, and how often it is true. With several: the probability of the most probable label,
    and how often it is correct (top-label calibration).
    """

    weight: Values  # [..., B] in each bin
    said: Values  # [..., B] mean probability, NaN in an empty bin
    happened: Values  # [..., B] observed frequency, NaN in an empty bin

    @classmethod
    def of(cls, predictions: Predictions, weight: Weights) -> Reliability:
        """Return the bins of N alerts for weights [..., N]."""
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
        """The expected calibration error (ECE; Guo et al. 2017, eq. 3).

        It is the mean absolute difference between prediction and frequency. It is biased upwards if bins hold few
        alerts, and more so in resamples, so its interval is shifted upwards.
        """
        distance = np.nan_to_num(np.abs(self.said - self.happened))
        return ratio((self.weight * distance).sum(axis=-1), self.weight.sum(axis=-1))


def errors_if_calibrated(predictions: Predictions) -> Values:
    """Return ECEs of a perfectly calibrated model with the same predictions, alerts and objects, [CALIBRATED_DRAWS].

    Outcomes are drawn with the predicted probabilities. All alerts of an object share one random number, because an
    object has one class.
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
    """Return the one-hot bin of each of N probabilities, [N, RELIABILITY_BINS]."""
    in_bins: NDArray[np.float64] = np.eye(RELIABILITY_BINS)[
        np.minimum((said * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    ]
    return in_bins


def ratio(part: Values, whole: Values) -> Values:
    """Return part / whole, NaN where the whole is 0; both have the shape [...]."""
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
        # The precision of an existing class that is never predicted is 0, as its F1 is, and not undefined.
        "precision": np.where((claimed == 0) & (existing > 0), 0, ratio(found, claimed)),
        "recall": ratio(found, existing),
        "f1": ratio(2 * found, claimed + existing),
        **{name: ranking.false_positive_rate_missing(share) for name, share in zip(_MISSED_NAMES, MISSED, strict=True)},
    }
