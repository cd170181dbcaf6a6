"""A picture of alerts: the cutouts of each alert, with its object id, magnitude, true kind and score."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from astropy.io import fits
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from broker_filter.demo.results import Alert, band, magnitude, object_id, real, short, stamp
from broker_filter.pictures.cutouts import BACKGROUND, FAINT, NOTHING, PANEL, TEXT, draw_cutout

CUTOUTS = ("Science", "Template", "Difference")
REAL, BOGUS = "#3fb950", "#f85149"
ALERTS_PER_ROW = 4


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row of alerts; `kinds` are their true kinds, from the simulation."""

    title: str
    alerts: Sequence[Alert]
    kinds: Sequence[str]


def draw_contact_sheet(file: Path, title: str, rows: Sequence[Row]) -> None:
    """Write a PNG with the first ALERTS_PER_ROW alerts of each row."""
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": TEXT, "savefig.facecolor": BACKGROUND}):
        figure = plt.figure(figsize=(17, 0.7 + 2.15 * len(rows)), facecolor=BACKGROUND)
        heights = [0.7, *[2.15] * len(rows)]
        top, *lines = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        top.set_facecolor(BACKGROUND)
        top.text(0.012, 0.42, title, fontsize=17, fontweight="bold", va="center")
        top.text(0.988, 0.42, "science   template   difference", fontsize=11, color=FAINT, ha="right", va="center")
        for line, row in zip(lines, rows, strict=True):
            _draw_row(line, row)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def _draw_row(line: SubFigure, row: Row) -> None:
    line.set_facecolor(BACKGROUND)
    line.text(0.012, 0.95, row.title, fontsize=12, color=FAINT, va="top")
    for i, (alert, kind) in enumerate(zip(row.alerts[:ALERTS_PER_ROW], row.kinds, strict=False)):
        left, width = 0.01 + 0.2475 * i, 0.2375
        panel = Rectangle((left, 0.02), width, 0.82, facecolor=PANEL, transform=line.transSubfigure, zorder=-1)
        line.add_artist(panel)  # below the images
        for k, cutout in enumerate(CUTOUTS):
            axes = line.add_axes((left + 0.004 + k * 0.0775, 0.24, 0.0745, 0.58))
            draw_cutout(axes, _pixels(stamp(alert, cutout)))
        _draw_caption(line, left, width, alert, kind)


def _draw_caption(line: SubFigure, left: float, width: float, alert: Alert, kind: str) -> None:
    score = real(alert)
    text = f"{band(alert)} = {magnitude(alert):.1f}   {kind.replace('_', ' ')}"
    line.text(left + 0.005, 0.135, short(object_id(alert)), fontsize=10, fontweight="bold", va="center")
    line.text(left + 0.082, 0.135, text, fontsize=9, color=FAINT, va="center")
    colour, said = (REAL if score > 0.5 else BOGUS, f"real {score:.3f}") if score == score else (FAINT, "not scored")
    line.text(left + width - 0.005, 0.135, said, fontsize=10, color=colour, ha="right", va="center")
    for length, fill in ((1.0, NOTHING), (max(score, 0.01) if score == score else 0.0, colour)):
        bar = Rectangle((left + 0.005, 0.06), (width - 0.01) * length, 0.025, facecolor=fill)
        bar.set_transform(line.transSubfigure)
        line.add_artist(bar)


def _pixels(stamp: bytes) -> NDArray[np.float32]:
    with fits.open(io.BytesIO(stamp)) as hdus:
        return np.asarray(hdus[0].data, dtype=np.float32)
