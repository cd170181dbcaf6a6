"""Draws maps of embeddings: similar alerts are near each other, and colours show anomaly scores or classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from broker_filter.pictures.cutouts import BACKGROUND, FAINT, PANEL, TEXT, printable

NEIGHBOURS = 22
"""The number of neighbours in UMAP. This value and the cosine distance are those of Rizhko & Bloom
(arXiv:2411.08842)."""
SEED = 22
"""The random seed, fixed so that the same night gives the same map."""
FEWEST = 30
"""The minimum number of alerts for a map."""
NAMED = 12
"""The number of alerts with the highest scores that are marked with a ring and the object's name."""
CROWDED, SPARSE = 3.0, 14.0
"""The smallest and the largest area of a point, in square points, for very many and for few alerts."""


def lay_out(embedding: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return positions float32[N, 2] for embeddings float32[N, D], by UMAP (McInnes et al. 2018, arXiv:1802.03426)."""
    from umap import UMAP

    layout = UMAP(n_neighbors=NEIGHBOURS, metric="cosine", random_state=SEED, n_jobs=1)
    return np.asarray(layout.fit_transform(embedding), np.float32)


def draw_map(
    file: Path, title: str, place: NDArray[np.float32], score: NDArray[np.float32], names: Sequence[str]
) -> None:
    """Write a PNG with N alerts at the positions `place` [N, 2], coloured by their anomaly `score` [N].

    `names`: N object names. The alerts with the highest scores are drawn on top and are marked with their names.
    """
    order = np.argsort(score)
    with _map(file, title) as (figure, axes):
        low, high = np.percentile(score, (1, 99.8))
        norm = PowerNorm(0.6, low, high)
        points = axes.scatter(
            place[order, 0], place[order, 1], s=_area(place), c=score[order], cmap="plasma", norm=norm, linewidths=0
        )
        for i in order[-NAMED:].tolist():
            axes.scatter(place[i, 0], place[i, 1], s=90, facecolors="none", edgecolors=TEXT, linewidths=1.1)
            name = printable(names[i])
            axes.annotate(name, place[i], (6, 6), textcoords="offset points", fontsize=8, color=TEXT, parse_math=False)
        bar = figure.colorbar(points, ax=axes, fraction=0.03, pad=0.01, extend="max")
        bar.set_label("anomaly score: standardised distance from ordinary alerts", color=FAINT)
        bar.ax.tick_params(colors=FAINT)
        bar.outline.set_visible(False)


def draw_classes(
    file: Path, title: str, place: NDArray[np.float32], label: NDArray[np.int64], classes: Sequence[str]
) -> None:
    """Write a PNG with N alerts or stars at the positions `place` [N, 2], coloured by class, with a legend.

    `label`: indices [N] into `classes`; those that are negative have no class, and are drawn faintly.
    """
    colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(classes)))
    with _map(file, title) as (_, axes):
        unlabelled = label < 0
        axes.scatter(place[unlabelled, 0], place[unlabelled, 1], s=_area(place), color=FAINT, alpha=0.4, linewidths=0)
        for c, name in enumerate(classes):
            own = label == c
            axes.scatter(place[own, 0], place[own, 1], s=_area(place), color=colours[c], label=name, linewidths=0)
        axes.legend(facecolor=PANEL, edgecolor=FAINT, labelcolor=TEXT, markerscale=2)


def _area(place: NDArray[np.float32]) -> float:
    """Return the area of a point in square points."""
    return float(np.clip(40_000 / len(place), CROWDED, SPARSE))


@contextmanager
def _map(file: Path, title: str) -> Iterator[tuple[Figure, Axes]]:
    """Return an empty map; when the context ends, write it to a PNG."""
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": TEXT, "savefig.facecolor": BACKGROUND}):
        figure, axes = plt.subplots(figsize=(13, 10), facecolor=BACKGROUND, layout="constrained")
        yield figure, axes
        axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=TEXT, pad=12)
        axes.set_facecolor(PANEL)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        figure.savefig(file, dpi=110)
        plt.close(figure)
