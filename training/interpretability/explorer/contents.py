"""Makes the contents of an explorer's page from a lens, alerts and the study's table of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, Survey
from training.data.datasets import SPLITS, LabelledAlerts, View
from training.interpretability.attribution import head_shares_by_weights
from training.interpretability.explorer.alerts import KINDS, curve_of
from training.interpretability.explorer.attributions import (
    COSINE,
    Ablations,
    OpenLens,
    Seen,
    ablate,
    recursive_leaves,
    see,
)
from training.interpretability.explorer.data import (
    Active,
    AlertView,
    Effect,
    Enrichment,
    Example,
    FeatureView,
    Group,
    Kind,
    Leaf,
    Page,
)
from training.interpretability.explorer.data import Table as TextTable
from training.interpretability.explorer.features import (
    LabelledActivations,
    lags,
    most_enriched,
    nearest,
    shares,
)
from training.interpretability.explorer.pictures import draw_strip
from training.interpretability.runs.collect import WITHOUT_LABEL
from training.interpretability.sites.open_site import Box
from training.interpretability.study.study import CLASSES

ALERTS_AT_ONCE = 64
MOST_ACTIVE = 6
"""Number of features of an alert whose attributions and ablations the page holds, besides those of examples."""
SEED = 2026
"""Seed of the choice of alerts if there are more than the page may hold."""
ID, NAME, NOTE, STABLE_IN, FAMILY = "id", "name", "note", "stable_in", "family"
"""Columns of the table of features that the page shows."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the page says of the lens as a whole."""

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    metrics: Sequence[TextTable]


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """The study's table of features, as text. `seeds`: the number of dictionaries in which stability is counted."""

    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    seeds: int


def contents(lens: OpenLens, view: View, header: Header, table: FeatureTable, most_alerts: int) -> Page:
    """Return the page's contents: statistics of all alerts in `view`, and views of about `most_alerts` of them.

    The most active alerts of every feature are always among them.
    """
    seen = see(lens, view.batches(ALERTS_AT_ONCE))
    activations = LabelledActivations(seen.activation, view.object_id, *weak_classes(view))
    features = range(seen.activation.shape[1])
    tops = [activations.top(feature) for feature in features]
    shown = choose(len(view), {example.alert for top in tops for example in top}, most_alerts)
    groups = [activations.groups(feature, shown) for feature in features]
    examples = {
        (example.alert, feature)
        for feature in features
        for example in [*tops[feature], *(one for group in groups[feature] for one in group.examples)]
    }
    held = _held(seen, shown, examples)
    alerts, ablations = _alerts(lens, view, seen, shown, held)
    place = {alert: i for i, alert in enumerate(np.flatnonzero(shown).tolist())}
    rows = {row.get(ID, ""): row for row in table.rows}
    enrichment = activations.enrichment()
    heads = head_shares_by_weights(lens.dictionary, lens.site.heads)
    return Page(
        title=header.title,
        facts=header.facts,
        warnings=header.warnings,
        metrics=header.metrics,
        kind=lens.kind,
        heads=lens.site.heads,
        seeds=table.seeds,
        effect=effect_of(lens),
        outputs=lens.output_names,
        bands=BANDS,
        kinds=KINDS,
        cells=_cells(lens, view, seen.days.shape[1]),
        features=[
            _feature(
                lens,
                feature,
                rows.get(str(feature), {}),
                seen,
                activations,
                _placed(tops[feature], place),
                [replace(group, examples=_placed(group.examples, place)) for group in groups[feature]],
                enrichment[feature],
                heads[feature],
                _effects(lens, ablations, seen.pairs.feature[held] == feature),
            )
            for feature in features
        ],
        alerts=alerts,
        columns=table.columns,
        rows=table.rows,
    )


def weak_classes(view: View) -> tuple[NDArray[np.int64], list[str]]:
    """Return the class of each of N alerts, int64[N], and the names of the classes; -1 for an alert without label.

    Labels that the study joins into one class are joined here, too.
    """
    joined = {label: name for name, labels in CLASSES.items() for label in labels}
    of_label = [joined.get(label, label) for label in view.dataset.card.classes]
    names = sorted(set(of_label) - {WITHOUT_LABEL})
    index = np.array([names.index(name) if name != WITHOUT_LABEL else -1 for name in of_label])
    return index[view.label], names


def choose(n: int, wanted: set[int], most: int) -> NDArray[np.bool_]:
    """Return a mask bool[n] of the alerts to show: those `wanted`, and random others up to `most` in all."""
    shown = np.zeros(n, np.bool_)
    shown[sorted(wanted)] = True
    others = np.random.default_rng(SEED).permutation(np.flatnonzero(~shown))
    shown[others[: max(most - int(shown.sum()), 0)]] = True
    return shown


def effect_of(lens: OpenLens) -> str:
    """Return what the effect in the list of features is."""
    change = "1 - cosine of the embeddings" if COSINE in lens.output_names else "change of the first probability"
    return f"{change} before and after an ablation, mean over the active alerts of the page"


def _held(seen: Seen, shown: NDArray[np.bool_], examples: set[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the pairs of alerts that are shown that the page holds: examples, and the MOST_ACTIVE of each alert.

    They are ordered by alert, and by decreasing activation.
    """
    alert, feature = seen.pairs.alert, seen.pairs.feature
    order = np.lexsort((-seen.activation[alert, feature], alert))
    order = order[shown[alert[order]]]
    first = np.searchsorted(alert[order], alert[order])  # the place of the alert's most active feature
    rank = np.arange(len(order)) - first
    wanted = [
        rank[i] < MOST_ACTIVE or (int(alert[pair]), int(feature[pair])) in examples
        for i, pair in enumerate(order.tolist())
    ]
    return order[np.array(wanted, np.bool_)]


def _alerts(
    lens: OpenLens, view: View, seen: Seen, shown: NDArray[np.bool_], held: NDArray[np.int64]
) -> tuple[list[AlertView], Ablations]:
    """Return the views of the alerts that are shown, and the ablations of the pairs `held`."""
    which = np.flatnonzero(shown)
    views: list[AlertView] = []
    ablations: list[Ablations] = []
    for start in range(0, len(which), ALERTS_AT_ONCE):
        chosen = which[start : start + ALERTS_AT_ONCE]
        alerts = view[chosen].read()
        pairs = held[np.isin(seen.pairs.alert[held], chosen)]
        ablated = ablate(lens, alerts, np.searchsorted(chosen, seen.pairs.alert[pairs]), seen.pairs.feature[pairs])
        ablations.append(ablated)
        for i, alert in enumerate(chosen.tolist()):
            mine = np.flatnonzero(seen.pairs.alert[pairs] == alert)
            rows = [(int(seen.pairs.query[pair]), int(seen.pairs.feature[pair])) for pair in pairs[mine].tolist()]
            leaves = recursive_leaves(lens, alerts, i, rows)
            active = [
                _active(seen, int(pairs[k]), ablated.after[k], own)
                for k, own in zip(mine.tolist(), leaves, strict=True)
            ]
            split = SPLITS[int(view.dataset.split[view.rows[alert]])]
            label = view.dataset.card.classes[int(view.label[alert])]
            views.append(_alert(alerts, i, label, split, seen, alert, ablated.before[i], active))
    return views, Ablations.join(ablations)


def _alert(
    alerts: LabelledAlerts,
    i: int,
    label: str,
    split: str,
    seen: Seen,
    alert: int,
    before: NDArray[np.float64],
    active: Sequence[Active],
) -> AlertView:
    """Return the view of alert `i` of the alerts in memory, which is number `alert` of those seen."""
    picture, box = draw_strip(alerts.cutouts[i], alerts.cutout_box[i])
    curve = None
    if alerts.light_curves is not None and alerts.mjd is not None:
        curve = curve_of(alerts.light_curves, alerts.mjd[i], i)
    return AlertView(
        id=str(alerts.alert_id[i]),
        object=str(alerts.object_id[i]),
        survey=str(Survey(int(alerts.survey[i]))),
        label=label,
        split=split,
        picture=picture,
        box=box,
        curve=curve,
        points=seen.points[alert] if seen.points else (),
        before=before.tolist(),
        active=active,
        actives=int((seen.activation[alert] > 0).sum()),
        unexplained=float(seen.unexplained[alert]),
        percentile=float(100 * np.nanmean(seen.unexplained < seen.unexplained[alert])),
    )


def _active(seen: Seen, pair: int, after: NDArray[np.float64], leaves: Sequence[Leaf]) -> Active:
    alert, feature, query = (int(column[pair]) for column in (seen.pairs.alert, seen.pairs.feature, seen.pairs.query))
    points = seen.points[alert] if seen.points else None
    return Active(
        feature=feature,
        activation=float(seen.activation[alert, feature]),
        query=points[query] if points is not None else query,
        heads=seen.pairs.heads[pair].tolist(),
        sources=seen.pairs.sources[pair][: None if points is None else len(points)].tolist(),
        bias=float(seen.pairs.bias[pair]),
        leaves=leaves,
        after=after.tolist(),
    )


def _feature(
    lens: OpenLens,
    feature: int,
    row: Mapping[str, str],
    seen: Seen,
    activations: LabelledActivations,
    top: Sequence[Example],
    groups: Sequence[Group],
    enrichment: Sequence[Enrichment],
    heads_by_weight: NDArray[np.float64],
    effects: Sequence[Effect],
) -> FeatureView:
    own = np.flatnonzero(seen.pairs.feature == feature)
    sources = seen.pairs.sources[own]
    heads_by_dfa = shares(seen.pairs.heads_size[own])
    stable_in = row.get(STABLE_IN, "")
    of_points = lens.kind is Kind.POINTS
    return FeatureView(
        id=feature,
        name=row.get(NAME, ""),
        note=row.get(NOTE, ""),
        frequency=float((seen.activation[:, feature] > 0).mean()),
        stable_in=int(stable_in) if stable_in.isdecimal() else None,
        family=row.get(FAMILY, ""),
        main_head=int(heads_by_dfa.argmax()),
        effect=effects[0].effect if effects else float("nan"),
        enriched=most_enriched(enrichment),
        top=top,
        groups=groups,
        histogram=activations.histogram(feature),
        enrichment=enrichment,
        heads_by_weight=heads_by_weight.tolist(),
        heads_by_dfa=heads_by_dfa.tolist(),
        lags=lags(sources, seen.days[seen.pairs.alert[own]]) if of_points else (),
        cells=() if of_points or not len(own) else sources.mean(axis=0).tolist(),
        effects=effects,
        nearest=nearest(lens.dictionary.w_dec, feature),
    )


def _effects(lens: OpenLens, ablations: Ablations, chosen: NDArray[np.bool_]) -> list[Effect]:
    """Return the mean absolute change of each figure over the ablations `chosen`, the embedding first."""
    if not chosen.any():
        return []
    base = ablations.before[ablations.alert[chosen]]
    changes = [np.abs(figures[chosen] - base).mean(axis=0) for figures in (ablations.after, ablations.random)]
    effects = [
        Effect(name, float(own), float(random)) for name, own, random in zip(lens.output_names, *changes, strict=True)
    ]
    return sorted(effects, key=lambda effect: effect.output != COSINE)


def _placed(examples: Sequence[Example], place: Mapping[int, int]) -> list[Example]:
    return [replace(example, alert=place[example.alert]) for example in examples]


def _cells(lens: OpenLens, view: View, sources: int) -> list[tuple[float, float, float, float]]:
    """Return the boxes of the cells in pixels of the cutout's slot, of which the network takes the centre."""
    size = lens.inputs.images.size
    shift = (view.dataset.card.cutout_size - size) / 2
    boxes = [box for box in lens.site.where(sources, size) if isinstance(box, Box)]
    return [(box.top + shift, box.left + shift, box.bottom - box.top, box.right - box.left) for box in boxes]
