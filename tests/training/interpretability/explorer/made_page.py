"""Makes the contents of an explorer's page from simulated alerts and random attributions, for tests of the page."""

from __future__ import annotations

from functools import cache

import numpy as np

from broker_filter import Decoder, Packet
from broker_filter.packets.batch import BANDS, AlertBatch
from broker_filter.simulate import simulate_night
from training.interpretability.explorer.data import (
    TOKEN,
    Active,
    AlertView,
    Curve,
    Effect,
    Enrichment,
    Example,
    FeatureView,
    Group,
    Histogram,
    Interval,
    Kind,
    Lag,
    Leaf,
    Nearest,
    Page,
    Table,
)
from training.interpretability.explorer.pictures import draw_strip

HEADS = 4
GRID = 7
SIDE = 63
HOSTILE = "</script><img src=x onerror=\"document.title='run'\">"
"""Text that a page must show, and never run."""


def made_page(kind: Kind = Kind.POINTS, alerts: int = 40, features: int = 10, name: str = "") -> Page:
    """Return a page of `features` features and of about `alerts` alerts; `name` is the name of the first feature."""
    rng = np.random.default_rng(0)
    batch = _night(alerts)
    views = [_alert(batch, i, kind, features, rng) for i in range(len(batch))]
    return Page(
        title=f"embedder 1.1, {'light_curve.1' if kind is Kind.POINTS else 'stages.4.1.transformer.0'}",
        facts=[("model", "embedder 1.1"), ("weights", "0123456789ab"), ("split", "test")],
        warnings=["The best feature finds no class better than a principal component of equal L0."],
        metrics=[
            Table(
                "Measures beside the comparisons",
                ["measure", "lens", "PCA", "untrained network"],
                [["loss recovered", "0.97", "0.98", "0.40"], ["best AUROC, SN", "0.81 (0.75 to 0.86)", "0.79", "0.60"]],
            )
        ],
        kind=kind,
        heads=HEADS,
        seeds=5,
        effect="1 - cosine of the embedding",
        outputs=("cosine of the embedding", "real"),
        bands=BANDS,
        kinds=("detection", "upper limit", "forced photometry"),
        cells=_cells() if kind is Kind.CELLS else (),
        features=[_feature(i, name if i == 0 else "", views, kind, features, rng) for i in range(features)],
        alerts=views,
        columns=("id", "name", "note", "family"),
        rows=[{"id": str(i), "name": name if i == 0 else "", "note": "", "family": "few"} for i in range(features)],
    )


@cache
def _night(alerts: int) -> AlertBatch:
    batch, _ = Decoder().decode([Packet(alert.packet) for alert in simulate_night(alerts, seed=1)])
    return batch


def _cells() -> list[tuple[float, float, float, float]]:
    side = SIDE / GRID
    return [(row * side, column * side, side, side) for row in range(GRID) for column in range(GRID)]


def _alert(batch: AlertBatch, i: int, kind: Kind, features: int, rng: np.random.Generator) -> AlertView:
    mine = slice(int(batch.light_curves.offsets[i]), int(batch.light_curves.offsets[i + 1]))
    curves = batch.light_curves
    curve = Curve(
        batch.mjd[i] - curves.mjd[mine], curves.flux[mine], curves.flux_err[mine], curves.band[mine], curves.kind[mine]
    )
    points = [TOKEN, *range(len(curve.days))][:33]
    sources = len(points) if kind is Kind.POINTS else GRID**2
    picture, box = draw_strip(batch.cutouts[i], batch.cutout_box[i])
    active = [
        Active(
            feature=int(feature),
            activation=float(rng.exponential()),
            query=TOKEN if kind is Kind.POINTS else int(rng.integers(sources)),
            heads=rng.normal(size=HEADS),
            sources=rng.normal(size=sources) ** 3,
            bias=0.1,
            leaves=[Leaf("point embedding", 0.4), Leaf("layer 0, perceptron", -0.1)],
            after=(0.93, 0.8),
        )
        for feature in rng.permutation(features)[:3]
    ]
    return AlertView(
        id=str(batch.alert_id[i]),
        object=batch.object_id[i],
        survey="ztf",
        label="SN" if i % 3 else HOSTILE,
        split="test",
        picture=picture,
        box=box,
        curve=curve,
        points=points if kind is Kind.POINTS else [],
        before=(1.0, 0.8),
        actives=len(active) + i % 2,
        active=sorted(active, key=lambda one: -one.activation),
        unexplained=float(rng.uniform(0, 0.4)),
        percentile=100.0 * i / len(batch),
    )


def _feature(
    i: int, name: str, alerts: list[AlertView], kind: Kind, features: int, rng: np.random.Generator
) -> FeatureView:
    found = sorted(
        (
            Example(a, active.activation)
            for a, alert in enumerate(alerts)
            for active in alert.active
            if active.feature == i
        ),
        key=lambda example: -example.activation,
    )
    lift = Enrichment("SN", 7, 0.6, Interval(2.1, 1.4, 3.0))
    return FeatureView(
        id=i,
        name=name,
        note="",
        frequency=len(found) / len(alerts),
        stable_in=i % 6,
        family=("alert-only", "whole-history")[i % 2],
        main_head=i % HEADS,
        effect=float(rng.exponential(0.01)),
        enriched=lift if i % 4 else None,
        top=found[:12],
        groups=[Group("Activations from the 50th to the 75th percentile", found[4:8])],
        histogram=Histogram(np.linspace(0, 2, 21), rng.integers(0, 30, 20).tolist(), len(alerts) - len(found)),
        enrichment=[lift, Enrichment("AGN", 3, 0.2, Interval(0.5, np.nan, np.nan))],
        heads_by_weight=rng.dirichlet(np.ones(HEADS)),
        heads_by_dfa=rng.dirichlet(np.ones(HEADS)),
        lags=[Lag("token", -0.1, 0.2), Lag("0 to 3 d", 0.5, 0.8)] if kind is Kind.POINTS else (),
        cells=rng.normal(size=GRID**2) if kind is Kind.CELLS else (),
        effects=[Effect("cosine of the embedding", 0.02, 0.004), Effect("anomaly score", 0.3, 0.2)],
        nearest=[Nearest((i + 1) % features, 0.7)],
    )
