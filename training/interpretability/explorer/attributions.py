"""What a lens says of alerts: activations, direct feature attributions, and outputs before and after ablations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from broker_filter.scoring.bundle import Inputs, Outputs
from broker_filter.scoring.preprocess import prepare, prepare_light_curves
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.data.datasets import LabelledAlerts
from training.interpretability import ablation, attribution
from training.interpretability.attribution import RecursiveAttribution, direct_attribution
from training.interpretability.explorer.alerts import curve_of, source_name, source_points
from training.interpretability.explorer.data import Kind, Leaf
from training.interpretability.sites.open_site import Attention, Box, LightCurveSite, Site

PAIRS_AT_ONCE = 256
"""Number of attributions that are computed at a time."""
SEED = 2026
"""Seed of the random directions."""
MOST_LEAVES = 12
"""Number of terms of a recursive attribution that the page shows one by one."""
COSINE = "cosine with the embedding"
"""Name of the figure that compares the embedding with that of the alert without ablation."""


@dataclass(frozen=True, slots=True)
class OpenLens:
    """A site of a network in evaluation mode, with the dictionary of its activations, and the network's card."""

    site: Site
    dictionary: SparseDictionary
    inputs: Inputs
    outputs: Outputs
    earlier: Mapping[int, SparseDictionary] = field(default_factory=dict)
    """The dictionaries of earlier layers of a light-curve transformer, by layer."""

    @property
    def kind(self) -> Kind:
        """What the sources of the site are."""
        return Kind.CELLS if isinstance(self.site.where(1, self.inputs.images.size)[0], Box) else Kind.POINTS

    @property
    def output_names(self) -> list[str]:
        """Names of the figures that `figures` returns: labels, embedding and modalities."""
        names = [f"probability of {label}" for label in self.outputs.labels]
        if self.outputs.embedding is not None:
            names.append(COSINE)
            names += [f"cosine with the modality {name}" for name in self.outputs.modalities]
        return names

    def figures(self, outputs: Sequence[Tensor], before: Sequence[Tensor]) -> NDArray[np.float64]:
        """Return the probabilities in outputs [N, ...], and cosines of their vectors with those `before`, [N, O]."""
        logits = outputs[0].double()
        columns = [logits.sigmoid() if self.outputs.activation == "sigmoid" else logits.softmax(1)]
        if self.outputs.embedding is not None:
            columns.append(cosine_similarity(outputs[1].double(), before[1].double(), dim=1)[:, None])
            if self.outputs.modalities:
                columns.append(cosine_similarity(outputs[2].double(), before[2].double(), dim=2))
        found: NDArray[np.float64] = torch.cat(columns, dim=1).numpy()
        return found

    def attend(self, alerts: LabelledAlerts) -> tuple[Attention, NDArray[np.float32]]:
        """Return the attention of N alerts, and the features' activations [N, Q, F], which are 0 in padding."""
        prepared = {name: torch.from_numpy(array) for name, array in prepare(alerts.raw, self.inputs).items()}
        with torch.no_grad():
            attention = self.site.attend(prepared)
        z = attention.z.numpy()
        activation = self.dictionary.encode(z.reshape(-1, z.shape[2])).reshape(*z.shape[:2], -1)
        return attention, activation * attention.queries.numpy()[:, :, None]


@dataclass(frozen=True, slots=True)
class Pairs:
    """n pairs of an alert and a feature that it activates, at the row where the feature is most active.

    `heads`: the direct feature attribution (DFA) of each head, summed over the sources; `heads_size`: the same sum of
    absolute values. `sources`: the DFA of each source, summed over the heads; 0 for padding. The sum of `sources` and
    `bias` is the pre-activation.
    """

    alert: NDArray[np.int64]  # [n]
    feature: NDArray[np.int64]  # [n]
    query: NDArray[np.int64]  # [n]
    heads: NDArray[np.float64]  # [n, H]
    heads_size: NDArray[np.float64]  # [n, H]
    sources: NDArray[np.float64]  # [n, P]
    bias: NDArray[np.float64]  # [n]

    @classmethod
    def join(cls, parts: Sequence[Pairs]) -> Pairs:
        """Return the pairs of all `parts`, one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a lens says of N alerts.

    `points`: what each source of a site of light-curve points is (`source_points`), for each alert; empty for a site of
    cells. `unexplained`: the share of the variance of z that the features leave unexplained.
    """

    activation: NDArray[np.float32]  # [N, F] the greatest over the rows of an alert
    unexplained: NDArray[np.float64]  # [N]
    pairs: Pairs
    points: Sequence[Sequence[int]]  # N
    days: NDArray[np.float64]  # [N, P] of the sources before the alert; NaN for the token, padding and cells


def see(lens: OpenLens, batches: Iterator[LabelledAlerts]) -> Seen:
    """Return activations, unexplained shares and all pairs of the alerts in `batches`."""
    activations, pairs, sums, days = [], [], [], []
    points: list[list[int]] = []
    start = 0
    for alerts in batches:
        attention, activation = lens.attend(alerts)
        greatest = activation.max(axis=1)
        alert, feature = np.nonzero(greatest > 0)
        query = activation.argmax(axis=1)[alert, feature]
        own = attribute(lens, attention, alert, feature, query)
        pairs.append(replace(own, alert=alert + start))
        activations.append(greatest)
        sums.append(_sums_of_rows(lens, attention, activation))
        days.append(np.full((len(alerts), own.sources.shape[1]), np.nan))
        if lens.kind is Kind.POINTS:
            _locate_points(lens, alerts, points, days[-1])
        start += len(alerts)
    rows, total, square, error = (np.concatenate(column) for column in zip(*sums, strict=True))
    mean = total.sum(axis=0) / rows.sum()
    about_mean = square - 2 * total @ mean + rows * (mean @ mean)
    unexplained = np.divide(error, about_mean, out=np.full(len(rows), np.nan), where=about_mean > 0)
    return Seen(np.concatenate(activations), unexplained, Pairs.join(pairs), points, np.concatenate(days))


def _locate_points(lens: OpenLens, alerts: LabelledAlerts, points: list[list[int]], days: NDArray[np.float64]) -> None:
    """Append the sources of each alert to `points`, and write their times into `days` [N, P]."""
    curves, mjd = alerts.light_curves, alerts.mjd
    assert curves is not None
    assert mjd is not None
    assert lens.inputs.light_curve is not None
    for i, start in enumerate(curves.offsets[:-1].tolist()):
        token, *seen = source_points(curves, mjd[i], i, lens.inputs.light_curve.points)
        points.append([token, *seen])
        days[i, 1 : 1 + len(seen)] = mjd[i] - curves.mjd[[start + point for point in seen]]


def attribute(
    lens: OpenLens,
    attention: Attention,
    alert: NDArray[np.int64],
    feature: NDArray[np.int64],
    query: NDArray[np.int64],
) -> Pairs:
    """Return n pairs with their DFA, for `alert`, `feature` and `query` int64[n]."""
    heads, sources = lens.site.heads, attention.sources.shape[1]
    parts = [(np.empty((0, heads)), np.empty((0, heads)), np.empty((0, sources)), np.empty(0))]
    for start in range(0, len(alert), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        triples = (torch.from_numpy(column[some]) for column in (alert, query, feature))
        terms, constants = direct_attribution(attention, lens.dictionary, *triples)
        by_head = terms.numpy()
        parts.append(
            (by_head.sum(axis=2), np.abs(by_head).sum(axis=2), by_head.sum(axis=1), constants.sum(dim=1).numpy())
        )
    return Pairs(alert, feature, query, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def _sums_of_rows(
    lens: OpenLens, attention: Attention, activation: NDArray[np.float32]
) -> tuple[NDArray[np.float64], ...]:
    """Return, for each alert, the number of rows, and sums over its rows: of z [d], of |z|^2 and of |z - z^|^2."""
    z, exists = attention.z.numpy().astype(np.float64), attention.queries.numpy()[:, :, None]
    error = (z - lens.dictionary.decode(activation)) * exists
    z = z * exists
    return (
        exists.sum(axis=(1, 2)).astype(np.float64),
        z.sum(axis=1),
        (z**2).sum(axis=(1, 2)),
        (error**2).sum(axis=(1, 2)),
    )


@dataclass(frozen=True, slots=True)
class Ablations:
    """The network's figures (`OpenLens.output_names`) without ablation, and for n pairs after the ablation.

    `random`: after the subtraction of a random direction of the same size instead of the feature.
    """

    alert: NDArray[np.int64]  # [n] the row of `before` of each pair
    before: NDArray[np.float64]  # [N, O]
    after: NDArray[np.float64]  # [n, O]
    random: NDArray[np.float64]  # [n, O]

    @classmethod
    def join(cls, parts: Sequence[Ablations]) -> Ablations:
        """Return the ablations of all `parts`, one after the other."""
        starts = np.cumsum([0, *(len(part.before) for part in parts)])
        return cls(
            np.concatenate([part.alert + start for part, start in zip(parts, starts.tolist(), strict=False)]),
            np.concatenate([part.before for part in parts]),
            np.concatenate([part.after for part in parts]),
            np.concatenate([part.random for part in parts]),
        )


def ablate(lens: OpenLens, alerts: LabelledAlerts, alert: NDArray[np.int64], feature: NDArray[np.int64]) -> Ablations:
    """Return the figures of N alerts before and after the ablation of features, for n pairs int64[n] of both."""
    attention, _ = lens.attend(alerts)
    with torch.no_grad():
        before = lens.site.resume(attention.rest, attention.z)
    unchanged = lens.figures(before, before)
    if not len(alert):
        none = np.empty((0, unchanged.shape[1]))
        return Ablations(alert, unchanged, none, none)
    draws = torch.Generator().manual_seed(SEED)
    pairs = (torch.from_numpy(alert), torch.from_numpy(feature))
    found = ablation.ablate(lens.site, attention, lens.dictionary, *pairs, draws)
    return Ablations(
        alert, unchanged, lens.figures(found.after, found.before), lens.figures(found.random, found.before)
    )


def recursive_leaves(
    lens: OpenLens, alerts: LabelledAlerts, i: int, pairs: Sequence[tuple[int, int]]
) -> list[list[Leaf]]:
    """Return the terms of the recursive attribution of the pairs (query token, feature) of alert `i`.

    Each list has the MOST_LEAVES greatest terms and the sum of the others. It is empty at the first layer of a
    transformer, where the direct attribution says all, and for cells.
    """
    site = lens.site
    if not isinstance(site, LightCurveSite) or site.number == 0:
        return [[] for _ in pairs]
    assert alerts.light_curves is not None
    assert alerts.mjd is not None
    assert lens.inputs.light_curve is not None
    curve, mask = prepare_light_curves(alerts.light_curves[i : i + 1], alerts.mjd[i : i + 1], lens.inputs.light_curve)
    dictionaries = {**lens.earlier, site.number: lens.dictionary}
    recursive = RecursiveAttribution(site.encoder, dictionaries, torch.from_numpy(curve[0]), torch.from_numpy(mask[0]))
    points = source_points(alerts.light_curves, alerts.mjd[i], i, lens.inputs.light_curve.points)
    names = [source_name(curve_of(alerts.light_curves, alerts.mjd[i], i), point) for point in points]
    found = []
    for query, feature in pairs:
        leaves = sorted(recursive.leaves(site.number, query, feature), key=lambda leaf: -abs(leaf.value))
        shown = [Leaf(_leaf_name(leaf, names), leaf.value) for leaf in leaves[:MOST_LEAVES]]
        if rest := leaves[MOST_LEAVES:]:
            shown.append(Leaf(f"{len(rest)} smaller terms", sum(leaf.value for leaf in rest)))
        found.append(shown)
    return found


def _leaf_name(leaf: attribution.Leaf, names: Sequence[str]) -> str:
    """Return what a term is of; `names` are those of the source tokens."""
    at = "" if leaf.source is None else f", {names[leaf.source]}"
    if leaf.kind == "feature":
        return f"layer {leaf.layer}, feature {leaf.feature}{at}"
    if leaf.kind == "embedding":
        return f"embedding{at}"
    what = {"error": "attention outside the features", "perceptron": "perceptron", "constant": "biases"}[leaf.kind]
    return what if leaf.layer is None else f"layer {leaf.layer}, {what}{at}"
