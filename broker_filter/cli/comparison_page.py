"""The page of `broker-filter compare-shadow`: one self-contained HTML file without JavaScript.

Text of records is untrusted and is always escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import CUTOUTS
from broker_filter.pictures.explanation_page import STYLE
from broker_filter.pictures.png import as_url, masked_png
from broker_filter.streaming.comparison import BINS, Bin, ComparedOutput, EqualRate, Example

WIDTH, HEIGHT = 420, 180
"""Size of the figure of distributions, in CSS pixels."""
CELL = 9
"""Side of a cell in the figure of outputs against each other, in CSS pixels."""
STAMP = 96
"""Side of a drawn cutout, in CSS pixels."""
DIGITS = 6
"""Digits of a threshold: many outputs are near 1, where fewer digits do not separate them."""
SERVING, SHADOW = "#58a6ff", "#f0883e"
"""Colours of the serving and of the shadow model."""

MORE_STYLE = "table{margin:14px 0}figcaption{max-width:340px;overflow-wrap:anywhere}h2{margin-top:14px}"


def write_page(file: Path, title: str, compared: Sequence[ComparedOutput]) -> None:
    """Write the page of the comparisons. `title`: what was read, as a text."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Shadow models compared</title>",
        f"<style>{STYLE}{MORE_STYLE}</style><h1>Shadow models compared with serving models</h1><p>{escape(title)}</p>",
        f"<p><b style='color:{SERVING}'>Blue</b>: the model that serves. <b style='color:{SHADOW}'>Orange</b>: the "
        "shadow model. A difference is the shadow output minus the serving one. The models disagree on an alert that "
        "only one of them passes at the threshold.</p>",
        *("\n".join(_section(one)) for one in compared),
    ]
    file.write_text("\n".join(parts), encoding="utf-8")


def _section(one: ComparedOutput) -> Iterator[str]:
    pair, found = one.pair, one.agreement
    both, only_serving, only_shadow, none = one.passed
    yield (
        f"<section><h2>{escape(pair.label)} of {escape(pair.survey)}: "
        f"<span style='color:{SERVING}'>{escape(str(pair.serving))}</span> and "
        f"<span style='color:{SHADOW}'>{escape(str(pair.shadow))}</span></h2>"
    )
    yield (
        f"<p>{found.n:,} alerts; correlation {one.correlation:.4f}; mean difference {found.mean_difference:+.4f}, "
        f"mean absolute difference {found.mean_absolute_difference:.4f}. At the threshold {one.threshold:g} the models "
        f"disagree on <b>{found.disagreement:.2%}</b>: {both:,} alerts pass with both, {only_serving:,} with the "
        f"serving model only, {only_shadow:,} with the shadow model only, {none:,} with none.</p>"
    )
    yield _distributions(one.counts)
    yield _against_each_other(one.counts)
    rows = [("as serving", one.at_threshold), *((f"{rate:.1%}", at) for rate, at in one.at_rates)]
    yield (
        "<table><tr><th>rate<th>serving threshold<th>alerts passed<th>shadow threshold<th>alerts passed<th>gained"
        f"<th>lost{''.join(_rate_row(name, at) for name, at in rows)}</table>"
        "<p>The shadow threshold passes as many alerts as the serving threshold. Gained alerts pass with the shadow "
        "model only, lost ones with the serving model only.</p>"
    )
    yield _bin_table("magnitude", one.by_magnitude)
    yield _bin_table("signal-to-noise ratio", one.by_snr)
    yield "<h2>Largest differences</h2>" if one.examples else ""
    yield from map(_example, one.examples)
    yield "</section>"


def _rate_row(name: str, at: EqualRate) -> str:
    return (
        f"<tr><td class=v>{name}<td>{_number(at.threshold)}<td>{at.passed:,}<td class=v>{_number(at.threshold_shadow)}"
        f"<td>{at.passed_shadow:,}<td>{at.gained:,}<td>{at.lost:,}"
    )


def _bin_table(name: str, bins: Sequence[Bin]) -> str:
    if not bins:
        return f"<p>The records hold no {name}.</p>"
    rows = "".join(
        f"<tr><td class=v>{_interval(one)}<td>{one.agreement.n:,}<td>{one.agreement.mean_serving:.3f}"
        f"<td>{one.agreement.mean_shadow:.3f}<td>{one.agreement.mean_absolute_difference:.4f}"
        f"<td>{one.agreement.disagreement:.2%}"
        for one in bins
    )
    return (
        f"<table><tr><th>{name}<th>alerts<th>serving mean<th>shadow mean<th>mean absolute difference<th>disagreement"
        f"{rows}</table>"
    )


def _interval(one: Bin) -> str:
    if math.isinf(one.low):
        return f"below {one.high:g}"
    return f"{one.low:g} and more" if math.isinf(one.high) else f"{one.low:g} to {one.high:g}"


def _number(value: float) -> str:
    """Return a number with its digits, or what its absence means."""
    return "undefined" if math.isnan(value) else "none passes" if math.isinf(value) else f"{value:.{DIGITS}f}"


def _distributions(counts: NDArray[np.int64]) -> str:
    """Draw the distributions of both outputs as steps, with a logarithmic axis of counts."""
    lines = []
    highest = math.log10(1 + max(int(counts.sum(1).max()), int(counts.sum(0).max()), 1))
    for values, colour in ((counts.sum(1), SERVING), (counts.sum(0), SHADOW)):
        heights = HEIGHT - (HEIGHT - 4) * np.log10(1 + values) / highest
        points = " ".join(
            f"{WIDTH * (k + edge) / BINS:.1f},{height:.1f}" for k, height in enumerate(heights) for edge in (0, 1)
        )
        lines.append(f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2' />")
    drawn = f"<svg width={WIDTH} height={HEIGHT}>{''.join(lines)}</svg>"
    return f"<figure>{drawn}<figcaption>number of alerts (logarithmic) by output, 0 to 1</figcaption></figure>"


def _against_each_other(counts: NDArray[np.int64]) -> str:
    """Draw the number of alerts by both outputs as cells, brighter for more alerts."""
    highest = math.log10(1 + max(int(counts.max()), 1))
    side = CELL * BINS
    cells = "".join(
        f"<rect x={CELL * i} y={side - CELL * (j + 1)} width={CELL} height={CELL} fill='#e6edf3' "
        f"fill-opacity={math.log10(1 + counts[i, j]) / highest:.2f}><title>{counts[i, j]:,}</title></rect>"
        for i, j in np.argwhere(counts).tolist()
    )
    diagonal = f"<line x1=0 y1={side} x2={side} y2=0 stroke='#484f58' />"
    return (
        f"<figure><svg width={side} height={side}>{cells}{diagonal}</svg><figcaption>alerts by serving output "
        "(right) and shadow output (up), each 0 to 1</figcaption></figure>"
    )


def _example(one: Example) -> str:
    alert = one.alert
    facts = [f"magnitude {alert.magnitude:.2f}"] if math.isfinite(alert.magnitude) else []
    facts += [f"S/N {alert.snr:.1f}"] if math.isfinite(alert.snr) else []
    stamps = "".join(
        f"<img width={STAMP} height={STAMP} alt={name} title={name} src='{as_url(masked_png(pixels))}'>"
        for name, pixels in zip(CUTOUTS, alert.cutouts, strict=False)
        if pixels.size
    )
    return (
        f"<figure>{stamps or '<p>no cutouts in the record</p>'}<figcaption><b>{alert.alert_id}</b> of "
        f"{escape(alert.object_id or '?')}: <span style='color:{SERVING}'>{one.serving:.4f}</span>, "
        f"<span style='color:{SHADOW}'>{one.shadow:.4f}</span>{''.join(f', {fact}' for fact in facts)}"
        "</figcaption></figure>"
    )
