"""A page of explained alerts: one self-contained HTML file with cutouts, light curves, features and sources.

It needs no package besides the base installation, no JavaScript and no network. Text of packets is untrusted and is
always escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, CUTOUTS, UNKNOWN_BAND, AlertBatch, Measurement
from broker_filter.pictures.png import as_url, masked_png

WIDTH, HEIGHT, MARGIN = 420, 150, 12
"""Size of a light curve and its margin, in CSS pixels."""
STAMP = 108
"""Side of a drawn cutout, in CSS pixels."""
FOR, AGAINST, NEUTRAL = "#f0883e", "#58a6ff", "#484f58"
"""Colours of sources with a positive share, with a negative one, and without a share."""

NO_FEATURE: Mapping[str, Any] = {"id": None, "sources": []}
"""Stands for the features of an alert that has none, so that its light curve is drawn all the same."""

STYLE = """
body{background:#0d1117;color:#e6edf3;font:15px/1.45 system-ui,sans-serif;margin:24px auto;max-width:1180px}
h1{font-size:22px}h2{font-size:17px;margin:0 0 6px}
section{background:#161b22;border-radius:8px;padding:16px;margin:16px 0}
p,td,th,figcaption{color:#9da7b3}b,h1,h2,td.v{color:#e6edf3}.w{border-left:3px solid #d29922;padding-left:10px}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:3px 10px 3px 0;vertical-align:top}
figure{display:inline-block;margin:6px 12px 6px 0;vertical-align:top}img{image-rendering:pixelated;background:#30363d}
figcaption{font-size:12px;max-width:420px}svg{background:#0d1117;border-radius:4px}
"""

Shown = Mapping[int, tuple[AlertBatch, int]]
"""Alerts by id: the batch and the row in it."""


def write_page(file: Path, document: Mapping[str, Any], shown: Shown) -> None:
    """Write the page for the JSON form of `broker-filter explain`; the alerts in it are drawn from `shown`."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Explained alerts</title>",
        f"<style>{STYLE}</style><h1>Explained alerts</h1>",
        *(_lens(lens) for lens in document["lenses"]),
        f"<p>A point or a box is <b style='color:{FOR}'>orange</b> where it makes a feature active, and "
        f"<b style='color:{AGAINST}'>blue</b> where it acts against it. Rarity 0 is usual among ordinary alerts, and 3 "
        "is one in a thousand. The effect is what disappears if the feature is removed; heads have signed shares.</p>",
        *(_alert(alert, *shown[alert["alert_id"]]) for alert in document["alerts"]),
    ]
    file.write_text("\n".join(parts), encoding="utf-8")


def _lens(lens: Mapping[str, Any]) -> str:
    ordinary = ", ".join(
        f"{one['alerts']} {escape(survey)} ({escape(one['source'])})" for survey, one in lens["ordinary"].items()
    )
    bundle = f"{escape(lens['bundle']['name'])} {escape(lens['bundle']['version'])}"
    return (
        f"<p class=w><b>{escape(lens['name'])} {escape(lens['version'])}</b>, layer {escape(lens['site'])} of {bundle}."
        f" {escape(lens['worth'])} Ordinary alerts: {ordinary}.</p>"
    )


def _alert(alert: Mapping[str, Any], batch: AlertBatch, row: int) -> str:
    score = "" if alert["anomaly_score"] is None else f", anomaly score {alert['anomaly_score']:.2f}"
    unexplained = ""
    if alert["unexplained"] is not None:
        share, rank = f"{alert['unexplained']:.0%}", f"{alert['unexplained_percentile']:.0f} %"
        unexplained = f" Unexplained: {share}, more than in {rank} of the ordinary alerts."
    rows = "".join(_feature_row(feature, alert["effect_on"]) for feature in alert["features"])
    heading = "<tr><th>feature<th>activation<th>rarity<th>effect<th>heads" if rows else ""
    name, layer = escape(alert["lens"]), escape(alert["site"])
    return "\n".join(
        (
            f"<section><h2>{escape(alert['survey'])} {alert['alert_id']} of {escape(alert['object_id'] or '?')}</h2>",
            f"<p>{name}, {layer}{score}: <b>{escape(alert['says'])}</b>.{unexplained}</p>",
            *_cutouts(batch, row, alert["features"]),
            f"<table>{heading}{rows}</table>",
            *(_light_curve(batch, row, feature) for feature in alert["features"] or [NO_FEATURE]),
            "</section>",
        )
    )


def _feature_row(feature: Mapping[str, Any], effect_on: str) -> str:
    effect = feature["effect"]
    if effect is None:
        says = "not measured"
    elif effect_on == "anomaly_score":
        says = f"{effect:+.1%} of the anomaly score"
    else:
        says = f"{effect:+.3f} in {escape(effect_on)}"
    heads = " ".join(f"{share:+.2f}" for share in feature["heads"])
    absent = "" if feature["activation"] else " (absent)"
    return (
        f"<tr><td class=v>{_title(feature)}<td>{feature['activation']:.3g}{absent}<td>{feature['rarity']:.1f}"
        f"<td>{says}<td>{heads}"
    )


def _title(feature: Mapping[str, Any]) -> str:
    if feature["id"] is None:
        return "light curve"
    doubt = "" if feature["stable"] else " (not stable)"
    return f"{feature['id']}: {escape(feature['name'] or 'without a name')}{doubt}"


def _cutouts(batch: AlertBatch, row: int, features: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a figure for each cutout, with the cells of the first feature if it has cells."""
    cells = [source for source in features[0]["sources"] if "box" in source] if features else []
    for name, pixels in zip(CUTOUTS, batch.stamps(row), strict=True):
        scale = STAMP / max(batch.cutouts.shape[-1], 1)
        boxes = "".join(
            f"<rect x={box[1] * scale:.1f} y={STAMP - (box[0] + box[2]) * scale:.1f} width={box[3] * scale:.1f} "
            f"height={box[2] * scale:.1f} fill='{FOR if cell['share'] > 0 else AGAINST}' "
            f"fill-opacity={0.7 * min(1.0, abs(cell['share'])):.2f} />"
            for cell in cells
            for box in [cell["box"]]
        )
        yield (
            f"<figure><svg width={STAMP} height={STAMP}><image href='{as_url(masked_png(pixels))}' width={STAMP} "
            f"height={STAMP} style='image-rendering:pixelated' />{boxes}</svg><figcaption>{name}</figcaption></figure>"
        )


def _light_curve(batch: AlertBatch, row: int, feature: Mapping[str, Any]) -> str:
    """Return the difference flux against the days before the alert; a point's colour is its share of the feature."""
    curves = batch.light_curves
    mine = slice(int(curves.offsets[row]), int(curves.offsets[row + 1]))
    mjd, flux, kind, band = curves.mjd[mine], curves.flux[mine].astype(np.float64), curves.kind[mine], curves.band[mine]
    if not len(mjd) or any("box" in source for source in feature["sources"]):
        return ""
    days = mjd - batch.mjd[row]
    share = {(source["mjd"], source["band"]): source["share"] for source in feature["sources"] if source["mjd"]}
    token = next((source["share"] for source in feature["sources"] if source["mjd"] is None), None)
    largest = max((abs(value) for value in share.values()), default=0.0) or 1.0
    x = _scaled(np.arcsinh(days), WIDTH)
    y = HEIGHT - _scaled(flux, HEIGHT)
    points = []
    for i in range(len(mjd)):
        letter = None if band[i] == UNKNOWN_BAND else BANDS[band[i]]
        value = share.get((float(mjd[i]), letter), 0.0)
        colour = NEUTRAL if value == 0 else FOR if value > 0 else AGAINST
        size = 2.5 + 5 * abs(value) / largest
        says = f"<title>{letter or '?'} {days[i]:.2f} d, {flux[i]:.0f} nJy, share {value:+.2f}</title>"
        if kind[i] == Measurement.UPPER_LIMIT:
            top, left, right = y[i] - size, x[i] - size, x[i] + size
            edge = f"{x[i]:.1f},{y[i] + size:.1f} {left:.1f},{top:.1f} {right:.1f},{top:.1f}"
            points.append(f"<polygon points='{edge}' fill='none' stroke='{colour}'>{says}</polygon>")
        else:
            fill = colour if kind[i] == Measurement.DETECTION else "none"
            place = f"cx={x[i]:.1f} cy={y[i]:.1f} r={size:.1f}"
            points.append(f"<circle {place} fill='{fill}' stroke='{colour}'>{says}</circle>")
    about = "" if token is None else f"; the learnt token's share is {token:+.2f}"
    drawn = f"<svg width={WIDTH} height={HEIGHT}>{''.join(points)}</svg>"
    return (
        f"<figure>{drawn}<figcaption>{_title(feature)}: difference flux against "
        f"time, {abs(days.min()):.1f} to {abs(days.max()):.1f} days before the alert{about}</figcaption></figure>"
    )


def _scaled(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return values as pixels between the margins of a figure of this size."""
    low, high = float(values.min()), float(values.max())
    return MARGIN + (values - low) / ((high - low) or 1.0) * (size - 2 * MARGIN)
