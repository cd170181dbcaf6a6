"""Draws alerts, one per row, with cutouts, light curve and name: for example an alert and its nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, AlertBatch, Measurement
from broker_filter.pictures.cutouts import BACKGROUND, FAINT, NOTHING, PANEL, TEXT, draw_cutout, printable

COLOURS = ("#a371f7", "#3fb950", "#f85149", "#d29922", "#db6d28", "#bf8700")
"""The colours of BANDS. An unknown band is drawn in FAINT."""
ROW_INCHES, HEAD_INCHES = 2.3, 0.7
LIMIT_SIGMAS = 5.0
"""The height at which an upper limit is drawn, in units of its uncertainty."""
RING = 800
"""Area of the ring of a point whose share is 1, in square points."""
FOR, AGAINST = "#f0883e", "#58a6ff"
"""Colours of rings with a positive and with a negative share."""
KEY = "dot: detection   square: forced photometry   triangle: upper limit"
"""What the markers of a light curve mean."""
KEY_OF_RINGS = "ring: a point that the feature reads, larger for a larger share (orange raises it, blue lowers it)"
"""What the rings around points mean."""
MARGIN = 0.25
"""The margin of the flux axis above and below the detections, as a fraction of their range. Only detections set the
range, so that an outlier of the forced photometry cannot compress it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An alert to draw: row `row` of the batch `alerts`, with a caption.

    `shares`: points of the light curve, by time and band, that are ringed, the larger the absolute share the larger.
    """

    alerts: AlertBatch
    row: int
    caption: str
    shares: Mapping[tuple[float, str | None], float] = field(default_factory=dict)


def draw_similar(file: Path, title: str, shown: Sequence[Shown]) -> None:
    """Write a PNG with one row for each alert in `shown`, below the title."""
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": TEXT, "savefig.facecolor": BACKGROUND}):
        figure = plt.figure(figsize=(14, HEAD_INCHES + ROW_INCHES * len(shown)), facecolor=BACKGROUND)
        heights = [HEAD_INCHES, *[ROW_INCHES] * len(shown)]
        top, *lines = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        top.set_facecolor(BACKGROUND)
        top.text(0.012, 0.62, title, fontsize=16, fontweight="bold", va="center")
        top.text(0.988, 0.55, "science   template   difference   light curve", fontsize=11, color=FAINT, ha="right")
        key = f"{KEY}   {KEY_OF_RINGS}" if any(one.shares for one in shown) else KEY
        top.text(0.988, 0.18, key, fontsize=9, color=FAINT, ha="right")
        for line, one in zip(lines, shown, strict=True):
            _draw_row(line, one)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def _draw_row(line: SubFigure, one: Shown) -> None:
    line.set_facecolor(BACKGROUND)
    panel = Rectangle((0.01, 0.03), 0.98, 0.94, facecolor=PANEL, transform=line.transSubfigure, zorder=-1)
    line.add_artist(panel)  # below the images
    alerts, i = one.alerts, one.row
    identity = alerts.identity(i)
    name = printable(identity.object_id or "?")
    line.text(0.02, 0.90, name, fontsize=12, fontweight="bold", va="center", parse_math=False)
    line.text(0.02, 0.115, f"{identity.survey} {identity.alert_id}", fontsize=9, color=FAINT, va="center")
    line.text(0.362, 0.115, one.caption, fontsize=10, ha="right", va="center")
    for k, pixels in enumerate(alerts.stamps(i)):
        axes = line.add_axes((0.02 + 0.115 * k, 0.175, 0.112, 0.66))
        draw_cutout(axes, pixels)
    _draw_light_curve(line.add_axes((0.45, 0.22, 0.525, 0.70)), alerts, i, one.shares)


def _draw_light_curve(axes: Axes, alerts: AlertBatch, i: int, shares: Mapping[tuple[float, str | None], float]) -> None:
    """Plot the difference flux (nJy) against the time from the alert (days), with one colour per band."""
    curves = alerts.light_curves
    mine = slice(int(curves.offsets[i]), int(curves.offsets[i + 1]))
    days, kind, band = curves.mjd[mine] - alerts.mjd[i], curves.kind[mine], curves.band[mine]
    flux, error = curves.flux[mine].astype(np.float64), curves.flux_err[mine].astype(np.float64)
    limit = kind == Measurement.UPPER_LIMIT
    height = np.where(limit, LIMIT_SIGMAS * error, flux)
    for code in np.unique(band).tolist():
        colour, name = (FAINT, "?") if code == UNKNOWN_BAND else (COLOURS[code], BANDS[code])
        of_band = band == code
        for which, marker, size, filled in (
            (of_band & (kind == Measurement.DETECTION), "o", 4.5, True),
            (of_band & (kind == Measurement.FORCED), "s", 3.0, False),
        ):
            axes.errorbar(
                days[which], flux[which], error[which], fmt=marker, markersize=size, color=colour, elinewidth=0.9,
                markerfacecolor=colour if filled else "none", label=name if which.any() and filled else None,
            )  # fmt: skip
        axes.plot(days[of_band & limit], height[of_band & limit], "v", markersize=4, color=colour, alpha=0.35)
    for point in range(len(days)) if shares else ():
        letter = None if band[point] == UNKNOWN_BAND else BANDS[band[point]]
        share = shares.get((float(curves.mjd[mine][point]), letter), 0.0)
        colour = FOR if share > 0 else AGAINST
        axes.scatter(days[point], height[point], s=RING * abs(share), facecolors="none", edgecolors=colour)
    axes.axhline(0, color=NOTHING, linewidth=0.8, zorder=0)
    detected = flux[kind == Measurement.DETECTION]
    if len(detected):
        low, high = min(detected.min(), 0.0), max(detected.max(), 0.0)
        room = MARGIN * (high - low) or 1.0
        axes.set_ylim(low - room, high + room)
        axes.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=TEXT, ncols=len(BANDS), handletextpad=0.2)
    axes.set_facecolor(BACKGROUND)
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines[:].set_color(NOTHING)
    axes.set_xlabel("days before the alert" if len(days) else "no light curve", fontsize=8, color=FAINT, labelpad=1)
    axes.set_ylabel("flux (nJy)", fontsize=8, color=FAINT)
