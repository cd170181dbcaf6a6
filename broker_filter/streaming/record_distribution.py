"""Records the distribution of a model's outputs and of key metadata over scored alerts, into a copy of its bundle.

The bundle that is given is not changed, and the scores of the copy are the same.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter.config import SurveyName
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import Bundle, BundleError, add_distribution, copy_bundle
from broker_filter.scoring.distribution import (
    LEAST_RECORDED,
    QUANTITIES,
    REAL_BOGUS_SCORES,
    SurveyDistribution,
    bins_of,
    quantities_of,
)
from broker_filter.scoring.scorer import Model
from broker_filter.streaming.expressions import Expression
from broker_filter.streaming.scored import ScoredBatch

SAMPLED = 200_000
"""At least as many alerts of a survey are kept in memory, at most twice as many: their quantiles are exact to 0.2 %."""

log = logging.getLogger(__name__)


class ThinnedRows:
    """Rows of numbers, of which every second one is dropped whenever there are more than 2 SAMPLED."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []
        self._step = 1
        self._seen = 0

    def put(self, rows: NDArray[np.float64]) -> None:
        """Add rows, float64[n, Q], of which every `_step`-th one is kept."""
        self._parts.append(rows[-self._seen % self._step :: self._step])
        self._seen += len(rows)
        if sum(map(len, self._parts)) > 2 * SAMPLED:
            self._parts = [np.concatenate(self._parts)[::2]]
            self._step *= 2

    def rows(self) -> NDArray[np.float64] | None:
        """Return the rows that are kept, float64[N, Q]; None if there was none."""
        return np.concatenate(self._parts) if self._parts else None


def distribution_columns(surveys: Iterable[Survey]) -> tuple[str, ...]:
    """Return the metadata columns that must be decoded to record the distributions of `surveys`."""
    names = (column for survey in surveys for column in QUANTITIES[survey_name(survey)])
    return tuple(dict.fromkeys(names))


def measure_distributions(
    batches: Iterable[ScoredBatch], model: Model, where: Expression | None = None
) -> dict[SurveyName, SurveyDistribution]:
    """Return the distributions over scored alerts, by survey. Duplicates are left out.

    `where`: selects the alerts; None selects all. A survey with fewer than LEAST_RECORDED alerts is left out with a
    warning.
    """
    samples = {survey: ThinnedRows() for survey in model.surveys}
    for scored in batches:
        scores = next(one for one in scored.scores.models if one.model == model.name)
        passed = scores.taken & ~scored.duplicate & (where.evaluate(scored) if where else True)
        for survey, sample in samples.items():
            if not (own := passed & (scored.alerts.survey == survey)).any():
                continue
            outputs = scores.probabilities[:, [scores.labels.index(label) for label in _labels(model, survey)]]
            quantities = quantities_of(scored.alerts, QUANTITIES[survey_name(survey)])
            sample.put(np.hstack([outputs[own], quantities[own]]))
    found: dict[SurveyName, SurveyDistribution] = {}
    for survey, sample in samples.items():
        rows = sample.rows()
        n = 0 if rows is None else len(rows)
        if rows is None or n < LEAST_RECORDED:
            log.warning("%s: %d alerts, fewer than %d: no distribution is recorded", survey, n, LEAST_RECORDED)
            continue
        labels = _labels(model, survey)
        found[survey_name(survey)] = survey_distribution(
            dict(zip(labels, rows.T, strict=False)),
            dict(zip(QUANTITIES[survey_name(survey)], rows.T[len(labels) :], strict=True)),
        )
    return found


def survey_distribution(
    outputs: Mapping[str, NDArray[np.floating]], quantities: Mapping[str, NDArray[np.floating]]
) -> SurveyDistribution:
    """Return the distribution of values by name, float[N] each, NaN where one is missing."""
    [n] = {len(values) for values in (*outputs.values(), *quantities.values())}
    return SurveyDistribution(
        alerts=n,
        outputs={label: bins_of(values, probabilities=True) for label, values in outputs.items()},
        quantities={
            name: bins_of(values, probabilities=name in REAL_BOGUS_SCORES) for name, values in quantities.items()
        },
    )


def write_recorded(bundle: Bundle, out: Path, of: str, distributions: Mapping[SurveyName, SurveyDistribution]) -> None:
    """Write a copy of the bundle with the distributions into the new directory `out`, atomically.

    Raises BundleError if the directory exists or there is no distribution, and OSError if it cannot be written.
    """
    if not distributions:
        raise BundleError(
            f"no survey of {bundle.card.name} ({', '.join(bundle.surveys)}) has {LEAST_RECORDED} alerts among the "
            "inputs: give more alerts"
        )
    if out.exists():
        raise BundleError(f"{out}: exists already; choose another directory, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / out.name
        copy_bundle(bundle, made)
        add_distribution(made, of, distributions)
        made.rename(out)


def _labels(model: Model, survey: Survey) -> Sequence[str]:
    return [label for label in model.labels if survey in model.surveys_of(label)]


def survey_name(survey: Survey) -> SurveyName:
    """Return the name of a survey, as cards have it."""
    return "ztf" if survey is Survey.ZTF else "lsst"
