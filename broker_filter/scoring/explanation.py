"""The arithmetic of explanations: which features of an attention layer are active, how rare that is, and from where.

Names as in Kissane et al. 2024 (arXiv:2406.17759): the pre-activation of a feature is linear in z, the concatenated
outputs of the heads, and z is a sum over source tokens, so it splits exactly into one term for each head and source
token (direct feature attribution, DFA). This module sees arrays only and knows no file, network or alert.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.lens_files import OrdinaryFeatures
from broker_filter.scoring.sparse_dictionary import SparseDictionary

USUALLY_ON = 0.9
"""A feature that is active in more than this share of the ordinary alerts counts too where it is absent."""
TINY = float(np.finfo(np.float32).tiny)
"""Smallest divisor, for sums that are all zero."""


class Verdict(StrEnum):
    """What an explanation says about an alert as a whole."""

    EXPLAINED = "these features explain this alert in part"
    UNEXPLAINED = "these features do not explain this alert"
    ACTIVE = "these features are active; their effects were not measured"
    NO_EFFECT = "no feature makes this alert strange"
    NO_SOURCES = "no light curve: the layer saw its learnt token alone"
    USUAL = "what the lens sees is usual in this alert"


@dataclass(frozen=True, slots=True)
class Source:
    """A source token and its share of a feature's attribution, -1 to 1; the absolute shares of all sources sum to 1.

    A point of a light curve has a time `mjd` in days and perhaps a band; a cell of an image has a `box` (y0, x0,
    height, width) in pixels of the stamp; the learnt token of a light curve has neither.
    """

    share: float
    mjd: float | None = None
    band: str | None = None
    box: tuple[int, int, int, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        place = {"box": list(self.box)} if self.box is not None else {"mjd": self.mjd, "band": self.band}
        return {**place, "share": self.share}


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature of an alert: active, or absent although it is active in nearly all ordinary alerts.

    `activation`: the largest over the alert's queries; 0 for an absent feature. `rarity`: see `rarity`. `effect`: what
    its ablation changes, or None if that could not be measured. `heads`: the share of each head in its attribution.
    """

    id: int
    name: str | None
    stable: bool
    activation: float
    rarity: float
    effect: float | None
    sources: tuple[Source, ...]
    heads: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "id": self.id,
            "name": self.name,
            "stable": self.stable,
            "activation": self.activation,
            "rarity": self.rarity,
            "effect": self.effect,
            "sources": [source.as_json() for source in self.sources],
            "heads": list(self.heads),
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """An alert through one lens.

    `unexplained`: the share of the alert's deviation from the mean of ordinary alerts that the features do not
    reconstruct, and `percentile` its percentile among ordinary alerts, 0 to 100. `pre_activation_error`: the largest
    relative difference between a feature's pre-activation and the sum of its attribution.
    """

    lens: str
    version: str
    site: str
    effect_on: str
    verdict: Verdict
    features: tuple[Feature, ...] = ()
    unexplained: float | None = None
    percentile: float | None = None
    pre_activation_error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "lens": self.lens,
            "version": self.version,
            "site": self.site,
            "effect_on": self.effect_on,
            "says": str(self.verdict),
            "features": [feature.as_json() for feature in self.features],
            "unexplained": self.unexplained,
            "unexplained_percentile": self.percentile,
            "pre_activation_error": self.pre_activation_error,
        }


def rarity(activation: float, feature: int, ordinary: OrdinaryFeatures) -> float:
    """Return -log10((1 + n) / (1 + N)), where n of N ordinary alerts are at least as extreme.

    For an active feature these are the alerts in which it is at least as active, for an absent one (activation 0) those
    in which it is absent too. 0: as in every ordinary alert; 3: as in one of a thousand.
    """
    active, total = ordinary.active(feature), len(ordinary.unexplained)
    if activation > 0:
        extreme = len(active) - int(np.searchsorted(active, np.float32(activation), side="left"))
    else:
        extreme = total - len(active)
    return float(-np.log10((1 + extreme) / (1 + total)))


def usual_activations(ordinary: OrdinaryFeatures) -> NDArray[np.float32]:
    """Return the median activation of each feature that is active in most ordinary alerts, float32[F]; 0 for others.

    "Most" is the share USUALLY_ON.
    """
    total = len(ordinary.unexplained)
    medians = np.zeros(len(ordinary.offsets) - 1, np.float32)
    for feature in np.flatnonzero(np.diff(ordinary.offsets) > USUALLY_ON * total).tolist():
        active = ordinary.active(feature)
        medians[feature] = active[total // 2 - (total - len(active))]
    return medians


def unexplained_share(z: NDArray[np.float32], rebuilt: NDArray[np.float32], mean: NDArray[np.float32]) -> float:
    """Return |z - rebuilt|^2 / |z - mean|^2 over an alert's queries, float32[Q, d] each; `mean` is float32[d]."""
    missed, deviation = np.square(z - rebuilt, dtype=np.float64).sum(), np.square(z - mean, dtype=np.float64).sum()
    return float(missed / max(deviation, TINY))


def percentile_of(value: float, ascending: NDArray[np.float32]) -> float:
    """Return the percentage of the `ascending` values that are smaller than `value`, 0 to 100."""
    return 100.0 * int(np.searchsorted(ascending, np.float32(value), side="left")) / len(ascending)


def direct_attribution(
    pattern: NDArray[np.float32], values: NDArray[np.float32], direction: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the direct feature attribution float64[H, P] of one feature at one query.

    `pattern`: the query's attention weights float32[H, P]. `values`: float32[H, P, d_head]. `direction`: the feature's
    column of w_enc, float32[H x d_head]. A term is pattern[h, p] x (values[h, p] . direction[h]) (Kissane et al. 2024,
    section 2).
    """
    heads, _, size = values.shape
    along = np.einsum("hpc,hc->hp", values.astype(np.float64), direction.astype(np.float64).reshape(heads, size))
    return np.asarray(pattern * along, np.float64)


def completeness_error(
    terms: NDArray[np.float64], feature: int, pre_activation: float, dictionary: SparseDictionary
) -> float:
    """Return |terms + bias - pre-activation| relative to the sum of the absolute values of all terms and the bias."""
    w_enc = dictionary.w_enc[:, feature].astype(np.float64)
    bias = float(dictionary.b_enc[feature]) - float(dictionary.b_dec.astype(np.float64) @ w_enc)
    return abs(float(terms.sum()) + bias - pre_activation) / max(float(np.abs(terms).sum()) + abs(bias), TINY)


def shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values divided by the sum of their absolute values; all zeros if they are all zero."""
    return values / max(float(np.abs(values).sum()), TINY)
