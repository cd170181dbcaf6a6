"""`python -m training sae study`: what the features of one site are worth, measured on real held-out alerts.

Reconstruction, separation of known properties, stability over seeds, causal effects and families are measured beside
principal components, single dimensions, random directions and an untrained network. Labels choose nothing but the
single scores that are compared, on training alerts. Results are kept part by part, so an interrupted study resumes.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, Measurement, Survey
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import Card, Inputs
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.networks.alert_embedder import Standardise
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.atomic_write import write_whole
from training.data.datasets import sha256_of
from training.evaluation.bootstrap import Estimate
from training.interpretability.attribution import head_shares_by_weights
from training.interpretability.runs.quantities import Property, quantities
from training.interpretability.sites.open_site import Box, Site, open_site
from training.interpretability.study.downstream import Downstream
from training.interpretability.study.effects import Effect, Figures, Reading, ablate, active_alerts, draw_alerts, read
from training.interpretability.study.families import PointSources, family_of_cells, family_of_points, normalised
from training.interpretability.study.losses import Attended, Loss, contrastive_loss, cross_entropy
from training.interpretability.study.measures import (
    Pca,
    Rows,
    enrichment,
    explained_variance,
    greatest_cosines,
    greatest_of_alerts,
    loss_recovered,
    random_features,
    signed,
    sparse,
    sparsity,
    stable_in,
    standardised,
)
from training.interpretability.study.report import tables, warnings, worth
from training.interpretability.study.separation import CHANCE, FEWEST_OBJECTS, Separation, roc_aucs, separate

AT_ONCE = 128
"""Number of alerts that are prepared and attended at a time."""
RANDOM_SEED = 2026
PCA_DIMENSIONS = 8
"""Principal components that are reported besides those of equal L0."""
OF_A_HEAD = 10
"""Number of features with the greatest share of a head by which its polysemanticity is judged, as published."""
CLASSES = {
    "VS": ("VS",),
    "asteroid": ("asteroid",),
    "bogus": ("bogus", "likely_bogus"),
    "SN": ("SN", "SN_cand"),
    "AGN": ("AGN",),
}
"""The weak classes and the labels of each; alerts with other labels, or none, have no class."""
FEATURES = "features"
STABLE, FIRST_COMPONENTS, UNTRAINED = "stable features", "first components", "untrained network"
"""Methods that single features are compared with: those found in most seeds; as many principal components as a row has
active features; and features of a network with random weights. Besides, all components and all dimensions of z, dense
and made as sparse as the features, and sparse random directions. The sign of a direction is free."""

ROUNDING = 1e-6
"""A smaller change of an output is float32 rounding: the feature cannot move it."""
FIRST_LIGHT_CURVE_BAND = 3
"""Position of the first band among the features of a light-curve point: time, flux and uncertainty come before."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """A site of a network, its dictionaries, and N alerts with their rows: what a study is of.

    `held` bool[N]: the alerts of held-out objects. `real` bool[N]: the alerts that are not simulated. `label` [N]: weak
    labels. `read`: returns the raw alerts of rows int64[n].
    """

    site: Site
    card: Card
    network: nn.Module
    dictionaries: Sequence[SparseDictionary]
    z: Rows  # [T, d]
    alert: NDArray[np.int64]  # [T]
    real: NDArray[np.bool_]  # [N]
    held: NDArray[np.bool_]  # [N]
    survey: NDArray[np.uint8]  # [N]
    label: NDArray[np.str_]  # [N]
    object_id: NDArray[np.str_]  # [N]
    read: Callable[[NDArray[np.int64]], RawAlerts]
    retrain: Callable[[Rows], SparseDictionary]
    """Trains a dictionary on other rows with the recipe and the first seed of `dictionaries`."""

    @property
    def dictionary(self) -> SparseDictionary:
        """The dictionary that is studied: that of the first seed."""
        return self.dictionaries[0]

    @property
    def training_rows(self) -> Rows:
        """The rows of the alerts that are not held out."""
        return self.z[~self.held[self.alert]]


class Known(NamedTuple):
    """The attention of the real held-out alerts, with their own properties."""

    rows: NDArray[np.int64]  # [n] positions among the N alerts
    attended: Attended
    inputs: Mapping[str, Tensor]
    loss: Loss


class Feature(NamedTuple):
    """One row of features.csv; the texts are what a person reads."""

    id: int
    name: str
    note: str
    stable_in: int
    seeds: int
    family: str
    frequency: float
    enriched: str
    lift: float | None
    lift_low: float | None
    lift_high: float | None
    main_head: int
    main_head_share: float
    main_head_by_dfa: int
    effect: float
    effect_random: float
    effect_alike: float
    best_property: str
    best_area: float


def attend(
    site: Site, inputs: Inputs, read_alerts: Callable[[NDArray[np.int64]], RawAlerts], rows: NDArray[np.int64]
) -> Attended:
    """Return the attention of the alerts `rows` int64[n] at a site of a network with these `inputs`."""
    with torch.inference_mode():
        parts = [site.attend(prepared(read_alerts(part), inputs)) for part in in_parts(rows)]
    return Attended.join(site, parts)


def in_parts(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the rows [n] in parts of AT_ONCE."""
    return [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]


def prepared(alerts: RawAlerts, inputs: Inputs) -> dict[str, Tensor]:
    """Return the network's inputs [n, ...] by name."""
    return {name: torch.from_numpy(array) for name, array in prepare(alerts, inputs).items()}


def known_alerts(subject: Subject) -> Known:
    """Return the real held-out alerts at the site."""
    rows = np.flatnonzero(subject.held & subject.real)
    attended = attend(subject.site, subject.card.inputs, subject.read, rows)
    light_curve = subject.card.inputs.light_curve is not None
    inputs = {}
    if light_curve:
        chunks = [prepared(subject.read(part), subject.card.inputs) for part in in_parts(rows)]
        inputs = {name: torch.cat([chunk[name] for chunk in chunks]) for name in ("light_curve", "light_curve_mask")}
    loss = (
        contrastive_loss(subject.survey[rows])
        if subject.card.outputs.modalities
        else cross_entropy(reality(subject)[rows])
    )
    return Known(rows, attended, inputs, loss)


def reality(subject: Subject) -> Property:
    """Return whether each of the N alerts is real by its weak label: 0 for bogus, 1 for other classes, NaN without."""
    return np.where(
        np.isin(subject.label, CLASSES["bogus"]),
        0.0,
        np.where(np.isin(subject.label, sum(CLASSES.values(), ())), 1.0, np.nan),
    )


def properties(subject: Subject, survey: Survey) -> dict[str, Property]:
    """Return the classes and quantities of the real alerts of one survey, float64[N]; NaN for all other alerts."""
    rows = np.flatnonzero(subject.real & (subject.survey == survey))
    if not len(rows):
        return {}
    found = {}
    of_classes = np.isin(subject.label[rows], sum(CLASSES.values(), ()))
    for name, labels in CLASSES.items():
        found[f"class {name}"] = np.where(of_classes, np.isin(subject.label[rows], labels), np.nan)
    parts = [quantities(subject.read(part)) for part in in_parts(rows)]
    found |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole = {}
    for name, values in found.items():
        whole[name] = np.full(len(subject.real), np.nan)
        whole[name][rows] = values
    return whole


def reconstruction(subject: Subject, known: Known) -> dict[str, Any]:
    """Return the figures of the dictionary and of PCA as a reconstruction of the rows of real held-out alerts.

    The loss recovered is relative to the mean row of the training alerts, and to zeros, in place of z.
    """
    z, dictionary = known.attended.rows, subject.dictionary
    activations = dictionary.encode(z)
    sparse = sparsity(activations)
    pca, mean = Pca.fit(subject.training_rows), subject.training_rows.mean(axis=0)
    equal = max(1, round(sparse.l0))

    def loss(rows: Rows) -> float:
        return known.loss(known.attended.outputs(rows))

    clean = loss(z)
    ablated = {"mean": loss(np.broadcast_to(mean, z.shape)), "zero": loss(np.zeros_like(z))}

    def figures(rows: Rows, l0: float) -> dict[str, float]:
        replaced = loss(rows)
        return {
            "l0": l0,
            "explained_variance": explained_variance(z, rows),
            "loss": replaced,
            **{f"recovered_{name}": loss_recovered(clean, value, replaced) for name, value in ablated.items()},
        }

    of_methods = {FEATURES: figures(dictionary.decode(activations), sparse.l0)}
    for n in dict.fromkeys((equal, PCA_DIMENSIONS)):
        of_methods[f"PCA of {n}"] = figures(pca.reconstruct(z, n), n)
    alive = (activations > 0).any(axis=0)
    cosines = greatest_cosines(dictionary.w_dec[alive])
    return {
        "alerts": len(known.rows),
        "rows": len(z),
        "loss": {"clean": clean, **ablated},
        "methods": of_methods,
        "sparsity": sparse._asdict(),
        "greatest_cosine": {"median": float(np.median(cosines)), "max": float(cosines.max())},
    }


def stability(subject: Subject) -> NDArray[np.int64]:
    """Return in how many of the dictionaries each feature of the first is found, int64[F]."""
    rows = subject.training_rows
    alive = [np.asarray((dictionary.encode(rows) > 0).any(axis=0)) for dictionary in subject.dictionaries]
    return stable_in([dictionary.w_dec for dictionary in subject.dictionaries], alive)


def is_stable(found: NDArray[np.int64], seeds: int) -> NDArray[np.bool_]:
    """Return whether each feature is found in most of the seeds, bool[F]."""
    return 2 * found > seeds


def scores_of(subject: Subject, stable: NDArray[np.bool_]) -> dict[str, NDArray[np.float32]]:
    """Return the scores [N, D] of all alerts by method, the features first; NaN-free."""
    n, z, train = len(subject.real), subject.z, ~subject.held[subject.alert]

    def greatest(values: Rows) -> NDArray[np.float32]:
        return greatest_of_alerts(values, subject.alert, n)

    features = subject.dictionary.encode(z)
    l0 = sparsity(features[train]).l0
    components = Pca.fit(z[train]).project(z).astype(np.float32)
    d, equal = z.shape[1], max(1, round(l0))
    pca, active = greatest(signed(components)), greatest(features)
    found = {FEATURES: active}
    if stable.any():
        found[STABLE] = active[:, stable]
    return found | {
        FIRST_COMPONENTS: np.concatenate([pca[:, :equal], pca[:, d : d + equal]], axis=1),
        "components": pca,
        "sparse components": greatest(sparse(signed(standardised(components, train)), l0, train)),
        "dimensions": greatest(signed(z)),
        "sparse dimensions": greatest(sparse(signed(standardised(z, train)), l0, train)),
        "random directions": greatest(random_features(z, features.shape[1], l0, RANDOM_SEED, train)),
    }


def untrained_scores(subject: Subject) -> NDArray[np.float32]:
    """Return the scores [N, F] of a dictionary of a network with random weights, trained by the same recipe."""
    torch.manual_seed(RANDOM_SEED)
    network = build_network(subject.card.architecture)
    keep_statistics(subject.network, network)
    everything = np.arange(len(subject.real))
    settle(network, prepared(subject.read(everything[~subject.held][:AT_ONCE]), subject.card.inputs))
    site = open_site(network.eval(), subject.site.name)
    rows, alert = [], []
    for part in in_parts(everything):
        some = attend(site, subject.card.inputs, subject.read, part)
        rows.append(some.rows)
        alert.append(part[some.alert])
    z, owner = np.concatenate(rows), np.concatenate(alert)
    dictionary = subject.retrain(z[~subject.held[owner]])
    return greatest_of_alerts(dictionary.encode(z), owner, len(everything))


def keep_statistics(trained: nn.Module, network: nn.Module) -> None:
    """Copy the constants that standardise inputs from a trained network: they are fitted to data, not trained."""
    own = dict(network.named_modules())
    for name, module in trained.named_modules():
        if isinstance(module, Standardise):
            own[name].load_state_dict(module.state_dict())


def settle(network: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Set the running statistics of batch normalisation from the inputs, so that random weights keep a usual scale."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    for layer in layers:
        layer.momentum = None  # a cumulative mean, here of one batch
    with torch.no_grad():
        network.train()(*inputs.values())


def effects_of(subject: Subject, known: Known) -> list[Effect | None]:
    """Return the effect of each feature on the outputs and on what is computed from them; None for a dead feature."""
    _, greatest = active_alerts(known.attended, subject.dictionary)
    figures = figures_of_embedding(subject, known) if subject.card.outputs.modalities else None
    return [
        ablate(known.attended, subject.dictionary, i, alert, figures) if len(alert) else None
        for i, alert in enumerate(draw_alerts(greatest))
    ]


def figures_of_embedding(subject: Subject, known: Known) -> Figures:
    """Return the figures of the embeddings of the known alerts, fitted on the real alerts that are not held out."""
    rows = np.flatnonzero(subject.real & ~subject.held)
    attended = attend(subject.site, subject.card.inputs, subject.read, rows)
    label, labelled = class_of(subject.label[rows])
    downstream = Downstream(
        attended.outputs(attended.rows)[1].numpy(),
        subject.survey[rows],
        subject.object_id[rows],
        np.where(labelled, label, -1),
        subject.card.outputs.modalities,
        tuple(CLASSES),
    )
    survey = subject.survey[known.rows]
    return lambda embedding, alert: downstream.figures(embedding, survey[alert])


def describe_features(
    subject: Subject,
    known: Known,
    found: NDArray[np.int64],
    measured: Mapping[str, Property],
    effects: Sequence[Effect | None],
    main: str,
) -> list[Feature]:
    """Return what is measured of each feature on the real held-out alerts.

    `found` int64[F]: in how many seeds each is found. `measured`: properties of ZTF's alerts, [N] each. `effects`: of
    the F features. `main`: the name of the output that effects are reported for.
    """
    seeds, dictionary = len(subject.dictionaries), subject.dictionary
    activations, greatest = active_alerts(known.attended, dictionary)
    drawn, shares = draw_alerts(greatest), head_shares_by_weights(dictionary, subject.site.heads)
    label, labelled = class_of(subject.label[known.rows])
    objects = subject.object_id[known.rows]
    features = []
    for i, alert in enumerate(drawn):
        family, by_dfa, effect = "none", 0, effects[i]
        if len(alert):
            reading = read(known.attended, dictionary, activations, i, alert)
            family = family_of(subject, known, reading)
            by_dfa = int(np.abs(reading.attribution).sum(axis=(0, 2)).argmax())
        active = greatest[:, i] > 0
        best = enrichment(active[labelled], label[labelled], tuple(CLASSES), objects[labelled])
        name, area = best_property(greatest[:, i], {key: values[known.rows] for key, values in measured.items()})
        features.append(
            Feature(
                id=i,
                name="",
                note="",
                stable_in=int(found[i]),
                seeds=seeds,
                family=family,
                frequency=float(active.mean()),
                enriched=best.name if best else "",
                lift=best.lift.value if best else None,
                lift_low=best.lift.low if best else None,
                lift_high=best.lift.high if best else None,
                main_head=int(shares[i].argmax()),
                main_head_share=float(shares[i].max()),
                main_head_by_dfa=by_dfa,
                effect=effect.ablated[main] if effect else 0.0,
                effect_random=effect.random[main] if effect else 0.0,
                effect_alike=effect.alike[main] if effect else 0.0,
                best_property=name,
                best_area=area,
            )
        )
    return features


NAMED_AREA = 0.8
"""Least ROC AUC, or 1 minus it, of a property that a feature is named after."""
NAMED_LIFT = 2.0
"""Least lower end of the interval of the lift of a class that a feature is named after."""


def suggested_name(feature: Feature) -> str:
    """Return a name for a stable feature, or no name: of the property that it separates, or of its enriched class."""
    text = feature.best_property.removeprefix("class ").replace("_", " ")
    if feature.best_area >= NAMED_AREA:
        return text
    if feature.best_area <= 1 - NAMED_AREA:
        return f"not {text}"
    return feature.enriched if (feature.lift_low or 0.0) >= NAMED_LIFT else ""


def best_property(score: NDArray[np.floating], measured: Mapping[str, Property]) -> tuple[str, float]:
    """Return the property that a score [n] separates best, and its ROC AUC; properties are [n] with NaN if unknown.

    Properties of fewer than FEWEST_OBJECTS alerts are left out.
    """
    best, area = "", CHANCE
    for name, values in measured.items():
        known = ~np.isnan(values)
        if min((values == 1).sum(), (values == 0).sum()) < FEWEST_OBJECTS:
            continue
        found = float(roc_aucs(score[known][:, None], values[known] == 1)[0])
        if abs(found - CHANCE) > abs(area - CHANCE):
            best, area = name, found
    return best, area


def class_of(label: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the class of each of n weak labels, int64[n] into CLASSES, and whether it has one, bool[n]."""
    index = {name: i for i, names in enumerate(CLASSES.values()) for name in names}
    classes = np.array([index.get(name, -1) for name in label.tolist()], np.int64)
    return classes, classes >= 0


def family_of(subject: Subject, known: Known, reading: Reading) -> str:
    """Return the family of a feature that reads as `reading` says."""
    share = normalised(np.abs(reading.attribution).sum(axis=1))
    stamp = subject.card.inputs.images.size
    places = subject.site.where(share.shape[1], stamp)
    if isinstance(places[0], Box):
        middle = [
            ((box.top + box.bottom - stamp) / 2, (box.left + box.right - stamp) / 2)
            for box in places
            if isinstance(box, Box)
        ]
        return family_of_cells(share, np.hypot(*np.array(middle).T))
    wanted = subject.card.inputs.light_curve
    assert wanted is not None
    points = known.inputs["light_curve"][reading.alert].numpy()
    bands = points[:, :, FIRST_LIGHT_CURVE_BAND : FIRST_LIGHT_CURVE_BAND + len(BANDS)]
    kinds = points[:, :, FIRST_LIGHT_CURVE_BAND + len(BANDS) :][:, :, : len(Measurement)]

    def with_token(values: NDArray[Any]) -> NDArray[Any]:
        return np.pad(values, ((0, 0), (1, 0)))

    token = np.zeros(share.shape, bool)
    token[:, 0] = True
    return family_of_points(
        PointSources(
            share,
            token,
            with_token(np.expm1(points[:, :, 0].astype(np.float64)) * wanted.time_scale),
            with_token(np.where(bands.any(axis=2), bands.argmax(axis=2), UNKNOWN_BAND).astype(np.uint8)),
            with_token(kinds.argmax(axis=2).astype(np.uint8)),
        )
    )


def head_table(subject: Subject, features: Sequence[Feature]) -> list[dict[str, Any]]:
    """Return for each head the families of the OF_A_HEAD living features with its greatest share of their direction.

    A head whose features are all of one family and one property would be monosemantic.
    """
    shares = head_shares_by_weights(subject.dictionary, subject.site.heads)
    alive = [feature for feature in features if feature.frequency > 0]
    table = []
    for head in range(subject.site.heads):
        top = sorted(alive, key=lambda feature: -shares[feature.id, head])[:OF_A_HEAD]
        families, about = Counter(one.family for one in top), Counter(one.best_property for one in top)
        table.append(
            {
                "head": head,
                "least_share": float(min((shares[one.id, head] for one in top), default=0.0)),
                "families": dict(families.most_common()),
                "properties": dict(about.most_common()),
                "same_head_by_dfa": sum(one.main_head_by_dfa == head for one in top),
                "features": [one.id for one in top],
            }
        )
    return table


def causal_summary(effects: Sequence[Effect | None], output: str) -> dict[str, float]:
    """Return how many living features change an output more than directions of equal size, and the median ratios.

    Also returns the median of the changes, `median_change`. A ratio to a change of 0 is left out.
    """
    alive = [one for one in effects if one is not None]
    changed = [one.ablated[output] for one in alive]
    found = {"features": float(len(alive)), "median_change": float(np.median(changed)) if changed else float("nan")}
    for name in ("random", "alike"):
        nulls = [getattr(one, name)[output] for one in alive]
        values = np.array([one.ablated[output] / null for one, null in zip(alive, nulls, strict=True) if null > 0])
        found[f"above_{name}"] = float((values > 1).mean()) if len(values) else float("nan")
        found[f"median_over_{name}"] = float(np.median(values)) if len(values) else float("nan")
    return found


MEASURES, FEATURE_TABLE, PARTS = "measures.json", "features.csv", "study"
"""The results in the directory of a run; the last one is the directory of the parts that are done."""
EDITED = ("name", "note")
"""Columns of FEATURE_TABLE that a person may edit; a study keeps what it finds there."""


def study(subject: Subject, directory: Path) -> dict[str, Any]:
    """Measure everything of a subject, write MEASURES and FEATURE_TABLE into `directory`, and return the measures.

    Parts that an interrupted study of the same dictionaries has finished are read from the directory PARTS.
    """
    of = sha256_of(*(array for one in subject.dictionaries for array in (one.w_enc, one.w_dec, one.threshold)))

    def part(name: str, measure: Callable[[], Any]) -> Any:
        file = directory / PARTS / f"{name}.json"
        if file.exists() and (kept := json.loads(file.read_bytes()))["of"] == of:
            return kept["found"]
        log.info("%s: measuring %s", subject.site.name, name)
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"of": of, "found": found}).encode())
        return found

    known = known_alerts(subject)
    measures: dict[str, Any] = {"site": subject.site.name, "seeds": len(subject.dictionaries)}
    measures["features"] = len(subject.dictionary.w_dec)
    measures["reconstruction"] = part("reconstruction", lambda: reconstruction(subject, known))
    measures["stable_in"] = part("stability", lambda: stability(subject).tolist())
    found = np.array(measures["stable_in"], np.int64)
    measured = {survey: properties(subject, survey) for survey in Survey}
    main = "embedding" if subject.card.outputs.modalities else "logits"
    stable = is_stable(found, len(subject.dictionaries))
    moved = part("effects", lambda: [one and asdict(one) for one in effects_of(subject, known)])
    effects = [one and Effect(**one) for one in moved]
    described = part("features", lambda: describe_features(subject, known, found, measured[Survey.ZTF], effects, main))
    features = [Feature(*one) for one in described]
    features = [one._replace(name=suggested_name(one)) if stable[one.id] else one for one in features]
    measures["causal"] = {"output": main, **causal_summary(effects, main)}
    alive = [one for one in effects if one is not None]
    outputs = [
        name
        for name in (alive[0].random if alive else ())
        if name != "modalities" and np.median([one.random[name] for one in alive]) > ROUNDING  # z can move it
    ]
    measures["effects"] = {output: causal_summary(effects, output) for output in outputs}
    measures["heads"] = head_table(subject, features)
    measures["families"] = dict(Counter(one.family for one in features if one.frequency > 0).most_common())
    measures["separation"] = part("separation", lambda: all_separations(subject, found, measured))
    measures |= {"tables": tables(measures), "warnings": warnings(measures), "worth": worth(measures)}
    write_features(directory / FEATURE_TABLE, features)
    write_whole(directory / MEASURES, json.dumps(measures, indent=1).encode())
    return measures


def all_separations(
    subject: Subject, found: NDArray[np.int64], measured: Mapping[Survey, Mapping[str, Property]]
) -> dict[str, Any]:
    """Return how well features and baselines separate the properties of the real alerts of each survey."""
    scores = scores_of(subject, is_stable(found, len(subject.dictionaries)))
    scores[UNTRAINED] = untrained_scores(subject)
    of_surveys = {}
    for survey, values in measured.items():
        rows = subject.real & (subject.survey == survey)
        of_methods = {method: score[rows] for method, score in scores.items()}
        of_properties = {name: value[rows] for name, value in values.items()}
        if rows.any():
            of_surveys[str(survey)] = as_json(
                separate(of_methods, of_properties, subject.held[rows], subject.object_id[rows])
            )
    return of_surveys


def as_json(separation: Separation) -> dict[str, Any]:
    """Return a separation as values of JSON: an estimate is [value, low, high]."""

    def plain(estimates: Mapping[str, Estimate]) -> dict[str, list[float | None]]:
        return {name: [one.value, one.low, one.high] for name, one in estimates.items()}

    return {
        "area": {name: plain(of) for name, of in separation.area.items()},
        "ahead": {name: plain(of) for name, of in separation.ahead.items()},
        "mean_area": plain(separation.mean_area),
        "mean_ahead": plain(separation.mean_ahead),
        "chosen": {name: {method: list(one) for method, one in of.items()} for name, of in separation.chosen.items()},
        "objects": separation.objects,
    }


def write_features(file: Path, features: Sequence[Feature]) -> None:
    """Write the table of features; names and notes that a person has written into it are kept."""
    edited: dict[str, dict[str, str]] = {}
    if file.exists():
        edited = {row["id"]: row for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))}
    text = io.StringIO()
    writer = csv.DictWriter(text, Feature._fields, lineterminator="\n")
    writer.writeheader()
    for feature in features:
        row = {name: _text(value) for name, value in feature._asdict().items()}
        kept = edited.get(str(feature.id), {})
        writer.writerow(row | {name: kept[name] for name in EDITED if kept.get(name)})
    write_whole(file, text.getvalue().encode())


def _text(value: float | str | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
