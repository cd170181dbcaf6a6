"""Lenses: which features of an attention layer are active in an alert, where they come from, and what they change.

A lens belongs to one network. It runs two parts of this network in onnxruntime: from the network's inputs to the
outputs of the layer's heads (z, with attention pattern and values), and from z to the outputs that z can move. It is
meant for the few alerts that somebody asks about: it never runs on an alert that is not flagged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, Survey
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import WEIGHTS, Bundle, Inputs, Part
from broker_filter.scoring.explanation import (
    Explanation,
    Feature,
    Source,
    Verdict,
    completeness_error,
    direct_attribution,
    percentile_of,
    rarity,
    shares,
    unexplained_share,
    usual_activations,
)
from broker_filter.scoring.lens_files import (
    ANOMALY_SCORE,
    FROM_Z,
    KNOWN,
    LENS_CARD,
    TO_Z,
    FeatureName,
    LensCard,
    LensError,
    LensFiles,
)
from broker_filter.scoring.preprocess import kept_points, prepare
from broker_filter.scoring.runtimes import Tensors, open_session

MAX_FEATURES = 5
"""Features of an explanation: the ones with the largest effect. A reader hardly looks at more."""
MAX_CANDIDATES = 64
"""Features of an alert whose effect is measured, the rarest ones: it bounds the time of one explanation."""
LEAST_EFFECT = 0.01
"""A feature whose ablation changes less is not a reason: 1 % of an anomaly score, or 0.01 of a probability."""
MOSTLY_UNEXPLAINED = 0.5
"""Above this unexplained share, the features miss more of an alert's deviation than they reconstruct."""
RARELY_UNEXPLAINED = 99.0
"""From this percentile of the unexplained share on, the features reconstruct an alert worse than ordinary alerts."""
TOLERANCE = 1e-4
"""Allowed deviation from the test vector, absolute and relative to its largest value: float32 on another machine."""
AT_A_TIME = 16
"""Alerts in one run of the network: the attention patterns of more need more memory than the caches have."""

Outcome = Callable[[int, NDArray[np.float32]], NDArray[np.float64]]
"""Returns what effects are measured on, float64[K], for K variants of the alert in a row: takes the row and the moved
outputs of the network, float32[K, ...]."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer's attention for N alerts, as `to_z.onnx` gives it: Q queries, P source tokens, H heads, d = H x C."""

    z: NDArray[np.float32]  # [N, Q, d]
    pattern: NDArray[np.float32]  # [N, H, Q, P]
    values: NDArray[np.float32]  # [N, H, P, C]
    queries: NDArray[np.bool_]  # [N, Q] queries that exist
    sources: NDArray[np.bool_]  # [N, P] source tokens that exist


class Lens:
    """A lens on one network. Thread-safe."""

    def __init__(self, files: LensFiles, part: Part) -> None:
        """Load the graphs, and check that they reproduce the test vector. Raises LensError if they do not."""
        self._files = files
        self._inputs = part.card.inputs
        self._to_z = open_session(files.directory / TO_Z)
        self._from_z = open_session(files.directory / FROM_Z)
        self._seen_inputs = [node.name for node in self._to_z.get_inputs()]
        self._moved_inputs = [node.name for node in self._from_z.get_inputs() if node.name != "z"]
        self._usual = {survey: usual_activations(ordinary) for survey, ordinary in files.ordinary.items()}
        self._verify(part)

    @property
    def card(self) -> LensCard:
        """The lens's card."""
        return self._files.card

    @property
    def surveys(self) -> tuple[Survey, ...]:
        """Surveys whose alerts are explained."""
        return tuple(self._files.ordinary)

    def explain(self, alerts: RawAlerts, survey: Survey, outcome: Outcome | None) -> list[Explanation]:
        """Return the explanation of each of N alerts, which are all of `survey`, one of the lens's surveys.

        `outcome`: measures the effects; without it, the features have no effect and the rarest come first. Raises as
        `preprocess.prepare` does.
        """
        explanations = []
        places = _places(alerts, self._inputs, self.card)
        for start in range(0, len(alerts), AT_A_TIME):
            chunk = slice(start, start + AT_A_TIME)
            inputs = prepare(alerts[chunk], self._inputs)
            seen = self.see(inputs)
            for i, row in enumerate(range(len(alerts))[chunk]):
                one = {name: array[i : i + 1] for name, array in inputs.items()}
                measured = None if outcome is None else _of_row(outcome, row)
                explanations.append(self._explain(seen, i, one, survey, places[row], measured))
        return explanations

    def see(self, inputs: Tensors) -> Seen:
        """Return the attention of the layer for network inputs [N, ...] by name."""
        names = ("z", "pattern", "values", "queries", "sources")
        return Seen(*self._to_z.run(names, {name: inputs[name] for name in self._seen_inputs}))

    def _explain(
        self,
        seen: Seen,
        i: int,
        inputs: Tensors,
        survey: Survey,
        places: Sequence[Source],
        outcome: Callable[[NDArray[np.float32]], NDArray[np.float64]] | None,
    ) -> Explanation:
        card, dictionary, ordinary = self.card, self._files.dictionary, self._files.ordinary[survey]
        about = card.name, card.version, card.site, card.effect_on
        if card.modality == "light_curve" and seen.sources[i].sum() <= 1:
            return Explanation(*about, Verdict.NO_SOURCES)
        queries = np.flatnonzero(seen.queries[i])
        z = seen.z[i][queries]
        pre = dictionary.pre_activations(z)
        active = np.where(pre > dictionary.threshold, pre, np.float32(0))
        strongest, at = active.max(axis=0), pre.argmax(axis=0)
        rare = {f: rarity(float(strongest[f]), f, ordinary) for f in self._candidates(strongest, survey)}
        candidates = sorted(rare, key=rare.__getitem__, reverse=True)[:MAX_CANDIDATES]
        effects: dict[int, float | None] = dict.fromkeys(candidates)
        if outcome is not None and candidates:
            changed = np.repeat(seen.z[i : i + 1], 1 + len(candidates), axis=0)
            for k, f in enumerate(candidates, 1):
                if strongest[f] > 0:
                    changed[k, queries] -= active[:, f, None] * dictionary.w_dec[f]
                else:
                    changed[k, queries[at[f]]] += self._usual[survey][f] * dictionary.w_dec[f]
            effects = dict(zip(candidates, self._effects(outcome(self._moved(changed, inputs))), strict=True))
        features, errors = [], []
        for f in self._chosen(candidates, effects):
            query = queries[at[f]]
            terms = direct_attribution(seen.pattern[i][:, query], seen.values[i], dictionary.w_enc[:, f])
            errors.append(completeness_error(terms, f, float(pre[at[f], f]), dictionary))
            of_source, of_head = shares(terms.sum(axis=0)), shares(terms.sum(axis=1))
            there = [p for p in np.argsort(-np.abs(of_source)).tolist() if seen.sources[i, p]]
            sources = tuple(Source(float(of_source[p]), places[p].mjd, places[p].band, places[p].box) for p in there)
            named = self._files.names.get(f, FeatureName(None, "", False))
            features.append(
                Feature(
                    id=f,
                    name=named.name,
                    stable=named.stable,
                    activation=float(strongest[f]),
                    rarity=rare[f],
                    effect=effects[f],
                    sources=sources,
                    heads=tuple(of_head.tolist()),
                )
            )
        unexplained = unexplained_share(z, dictionary.decode(active), ordinary.mean)
        percentile = percentile_of(unexplained, ordinary.unexplained)
        verdict = Verdict.NO_EFFECT
        if features:
            largest = features[0].effect
            verdict = Verdict.ACTIVE if largest is None else verdict if largest < LEAST_EFFECT else Verdict.EXPLAINED
        if unexplained > MOSTLY_UNEXPLAINED or percentile >= RARELY_UNEXPLAINED:
            verdict = Verdict.UNEXPLAINED
        return Explanation(
            *about,
            verdict,
            tuple(features),
            unexplained,
            percentile,
            max(errors, default=None),
        )

    def _candidates(self, strongest: NDArray[np.float32], survey: Survey) -> list[int]:
        """Return the features that are active, and those that usually are but are absent."""
        absent = (strongest == 0) & (self._usual[survey] > 0)
        return np.flatnonzero((strongest > 0) | absent).tolist()

    def _chosen(self, candidates: Sequence[int], effects: dict[int, float | None]) -> list[int]:
        """Return the features that are shown: those with the largest effects, or the rarest if no effect is known.

        If some features are reasons (LEAST_EFFECT), only these are shown.
        """
        known = {f: effect for f in candidates if (effect := effects[f]) is not None}
        if not known:
            return list(candidates[:MAX_FEATURES])
        reasons = [f for f, effect in known.items() if effect >= LEAST_EFFECT]
        return sorted(reasons or known, key=known.__getitem__, reverse=True)[:MAX_FEATURES]

    def _effects(self, outcomes: NDArray[np.float64]) -> list[float | None]:
        """Return the effects of K ablations, from the outcomes [1 + K] before and after them.

        The effect on an anomaly score is the share of it that disappears, and None if the score is not positive; the
        effect on a probability is how much it falls.
        """
        before, after = float(outcomes[0]), outcomes[1:]
        if self.card.effect_on != ANOMALY_SCORE:
            return [float(effect) for effect in before - after]
        return [float(effect) for effect in 1 - after / before] if before > 0 else [None] * len(after)

    def _moved(self, z: NDArray[np.float32], inputs: Tensors) -> NDArray[np.float32]:
        """Return the outputs that z [K, Q, d] moves, float32[K, ...], for one alert with `inputs` [1, ...]."""
        repeated = {name: np.repeat(inputs[name], len(z), axis=0) for name in self._moved_inputs}
        [moved] = self._from_z.run(["moved"], {**repeated, "z": z})
        return np.asarray(moved)

    def _verify(self, part: Part) -> None:
        """Raise LensError if the graphs do not reproduce the test vector for the alerts of the bundle's test vector."""
        inputs = prepare(part.test_vector(), self._inputs)
        seen, d = self.see(inputs), self._files.dictionary.w_enc.shape[0]
        found = {"z": seen.z, "pre_activations": self._files.dictionary.pre_activations(seen.z.reshape(-1, d))}
        [found["moved"]] = self._from_z.run(["moved"], {**{n: inputs[n] for n in self._moved_inputs}, "z": seen.z})
        there = np.broadcast_to(seen.queries[..., None], seen.z.shape)
        for name, values in found.items():
            known = self._files.known.get(name)
            if known is None or known.shape != values.shape:
                raise LensError(
                    f"{self._files.directory / KNOWN}: {name} is missing or has another shape; export again"
                )
            rows = there if name == "z" else there.reshape(-1, d)[:, :1] if name == "pre_activations" else True
            off = np.where(rows, np.abs(values - known), 0)
            if not off.max() <= TOLERANCE * max(1.0, float(np.abs(known).max())):  # also true for NaN
                raise LensError(
                    f"{self._files.directory}: onnxruntime does not reproduce {KNOWN}: {name} is off by "
                    f"{off.max():.2g}; the files do not belong together; export the lens again"
                )


def find_network(files: LensFiles, bundles: Sequence[Bundle]) -> tuple[Bundle, Part]:
    """Return the network that a lens explains, and its bundle. Raises LensError if it is in none of the bundles."""
    made_with, where = files.card.bundle, files.directory / LENS_CARD
    for bundle in bundles:
        for part in bundle.parts:
            if part.card.files[WEIGHTS] == made_with.weights_sha256:
                return bundle, part
    if any(bundle.card.name == made_with.name for bundle in bundles):
        raise LensError(
            f"{where}: a lens on other weights of {made_with.name} ({made_with.version}, weights "
            f"{made_with.weights_sha256[:12]}); export a lens from the bundle that is used"
        )
    raise LensError(
        f"{where}: a lens on the bundle {made_with.name}, which is not among the models "
        f"({', '.join(bundle.card.name for bundle in bundles)}); add it, or choose another lens"
    )


def _of_row(outcome: Outcome, row: int) -> Callable[[NDArray[np.float32]], NDArray[np.float64]]:
    return lambda moved: outcome(row, moved)


def _places(alerts: RawAlerts, inputs: Inputs, card: LensCard) -> list[list[Source]]:
    """Return where the P source tokens of each alert are, with a share of 0."""
    if card.cells or inputs.light_curve is None:
        return [[Source(0.0, box=cell) for cell in card.cells]] * len(alerts)
    assert alerts.light_curves is not None
    assert alerts.mjd is not None
    curves, token = alerts.light_curves, Source(0.0)
    places = [[token] * (1 + inputs.light_curve.points) for _ in range(len(alerts))]
    for point, alert, place in zip(*kept_points(curves, alerts.mjd, inputs.light_curve.points), strict=True):
        band = int(curves.band[point])
        places[alert][1 + place] = Source(0.0, float(curves.mjd[point]), None if band == UNKNOWN_BAND else BANDS[band])
    return places
