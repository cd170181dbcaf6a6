"""The distribution of a model's outputs and of key metadata over stated alerts, and the distance of a stream from it.

A bundle may hold it as `distribution.yaml`, whose sha256 its card lists. It describes alerts and never changes a score.
The distance is the population stability index (PSI; Siddiqi 2006, "Credit Risk Scorecards", chapter 5; its sampling
distribution: Yurdakul 2018, "Statistical Properties of Population Stability Index", Western Michigan University).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator

from broker_filter.config import Section, SurveyName
from broker_filter.packets.batch import AlertBatch, Survey

DISTRIBUTION = "distribution.yaml"
MAX_DISTRIBUTION_BYTES = 2**20
BINS = 10
"""Number of bins of equal frequency; the usual number for PSI."""
ALERTS_PER_BIN = 25
"""Fewest alerts of a bin. Sampling alone raises the PSI by (bins - 1) / alerts on average, here by less than 0.04."""
LEAST_RECORDED = 100
"""Fewest alerts of a survey whose distribution is recorded: four bins of ALERTS_PER_BIN."""
MAX_EDGES = 63
MAX_QUANTITIES = 256
DIGITS = 6
"""Significant digits of the bin edges."""
DECIMALS = 4
"""Decimals of the bin edges of probabilities. Runtimes and machines differ by less."""
PSEUDO_COUNT = 0.5
"""Is added to the count of every bin (Jeffreys' prior), so that an empty bin does not make the PSI infinite."""

QUANTITIES: Mapping[SurveyName, tuple[str, ...]] = {
    "ztf": ("magpsf", "snr", "diffmaglim", "fwhm", "ndethist", "galactic_b", "drb"),
    "lsst": ("magpsf", "snr", "diffmaglim", "ixxPSF", "ndethist", "galactic_b", "reliability"),
}
"""The quantities of each survey: the brightness; the detection threshold; the depth, which contains the brightness of
the sky; the seeing; new against known sources; the place in the sky, from crowded fields to empty ones; and the
survey's own real-bogus score."""
REAL_BOGUS_SCORES = ("drb", "reliability")
"""The quantities that are probabilities."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Bins(Section):
    """The numbers of alerts in the bins of one quantity."""

    edges: tuple[Finite, ...] = Field(
        max_length=MAX_EDGES,
        description="The limits between the bins, ascending; a value that equals a limit is in the bin above it. The "
        "first and the last bin have no outer limit.",
    )
    counts: tuple[Count, ...] = Field(
        description="The number of alerts in each bin, from the lowest values to the highest, and at the end the "
        "number of alerts without a value."
    )

    @model_validator(mode="after")
    def _counts_fit_edges(self) -> Bins:
        if len(self.counts) != len(self.edges) + 2:
            raise ValueError(f"{len(self.edges)} edges need {len(self.edges) + 2} counts, not {len(self.counts)}")
        if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("edges must ascend")
        if not sum(self.counts):
            raise ValueError("counts are all 0")
        return self


class SurveyDistribution(Section):
    """The distributions over the alerts of one survey."""

    alerts: int = Field(gt=0, description="Number of alerts.")
    outputs: dict[Name, Bins] = Field(max_length=MAX_QUANTITIES, description="The probability of each label.")
    quantities: dict[Name, Bins] = Field(max_length=MAX_QUANTITIES, description="Metadata columns.")


class Distribution(Section):
    """The contents of `distribution.yaml`."""

    format: Literal[1] = 1
    of: str = Field(min_length=1, description="The alerts: which they are, and where they come from.")
    surveys: dict[SurveyName, SurveyDistribution] = Field(min_length=1)

    def of_survey(self, survey: Survey) -> SurveyDistribution | None:
        """Return the distribution over the alerts of a survey; None if none was recorded."""
        return next((one for name, one in self.surveys.items() if name == str(survey)), None)

    def write(self, file: Path) -> None:
        """Write the distribution to `file`."""
        values = self.model_dump(mode="json")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
        file.write_text(text, encoding="utf-8")


def bins_of(values: NDArray[np.floating], *, probabilities: bool = False) -> Bins:
    """Return up to BINS bins that hold about equally many of the values, float[N]; NaN is a missing value.

    There are fewer bins if there are few values, or if many values are equal: a value that would fill several bins has
    a bin of its own. The edges have DIGITS significant digits. Those of probabilities are rounded to DECIMALS, so that
    the counts do not depend on the machine that computes the probabilities.
    """
    known = np.sort(values[~np.isnan(values)].astype(np.float64))
    edges = np.empty(0)
    n_bins = min(BINS, len(known) // ALERTS_PER_BIN)
    if n_bins > 1:
        quantiles, repeats = np.unique(known[np.arange(1, n_bins) * len(known) // n_bins], return_counts=True)
        after = np.searchsorted(known, quantiles[repeats > 1], side="right")
        edges = np.concatenate([quantiles, known[after[after < len(known)]]])
        rounded = [round(edge, DECIMALS) if probabilities else float(f"{edge:.{DIGITS}g}") for edge in edges.tolist()]
        edges = np.unique(rounded)
        edges = edges[(edges > known[0]) & ((edges < 1) | (not probabilities))]
    counts = np.bincount(np.searchsorted(edges, known, side="right"), minlength=len(edges) + 1)
    return Bins(edges=tuple(edges.tolist()), counts=(*counts.tolist(), len(values) - len(known)))


def population_stability_index(expected: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """Return the PSI of counts `found` int64[B] against counts `expected` int64[B] of the same bins.

    It is the sum over the bins of (f - e) ln(f / e), where e and f are the shares of the alerts in the bin.
    PSEUDO_COUNT is added to each count. It is 0 for equal shares; above 0.1 the difference is usually called moderate,
    and above 0.25 large. For two samples of N and M alerts of one population, its mean is (B - 1) (1 / N + 1 / M).
    """
    e = (expected + PSEUDO_COUNT) / (expected + PSEUDO_COUNT).sum()
    f = (found + PSEUDO_COUNT) / (found + PSEUDO_COUNT).sum()
    return float(((f - e) * np.log(f / e)).sum())


def quantities_of(alerts: AlertBatch, names: Sequence[str]) -> NDArray[np.float64]:
    """Return metadata columns of N alerts, float64[N, len(names)], NaN where a value is missing.

    Raises ValueError if the batch lacks a column.
    """
    return alerts.metadata[:, [alerts.columns.index(name) for name in names]]
