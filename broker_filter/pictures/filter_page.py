"""A page about filters that were tried on a night: one self-contained HTML file with counts and a contact sheet.

It needs no JavaScript and no network. Text of packets is untrusted and is always escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from broker_filter.packets.batch import CUTOUTS
from broker_filter.pictures.png import as_url

HOURS = 24
BAR_WIDTH, BARS_HEIGHT = 26, 90
"""Width of the bar of an hour and height of the highest bar, in CSS pixels."""
LABEL_HEIGHT = 16
"""Height of the labels above and below the bars, in CSS pixels."""
STAMP = 82
"""Side of a drawn cutout, in CSS pixels."""

STYLE = """
body{background:#0d1117;color:#e6edf3;font:15px/1.45 system-ui,sans-serif}
body{margin:24px auto;max-width:1180px;padding:0 12px}
h1{font-size:22px}h2{font-size:18px;margin:0 0 6px}h3{font-size:15px;margin:18px 0 4px}
section{background:#161b22;border-radius:8px;padding:16px;margin:16px 0}
p,td,th,figcaption{color:#9da7b3}b,h1,h2,h3,td.v,code{color:#e6edf3}code{overflow-wrap:anywhere}
.over,.fine,.free{border-left:4px solid #7d8590;padding-left:10px}.over{border-color:#f85149}.fine{border-color:#3fb950}
table{border-collapse:collapse}td,th{text-align:right;padding:3px 16px 3px 0}td.v,th.v{text-align:left}
figure{display:inline-block;background:#0d1117;border-radius:6px;margin:6px 8px 6px 0;padding:6px;vertical-align:top}
figcaption{font-size:12px;width:256px;overflow-wrap:anywhere}img{image-rendering:pixelated;margin-right:3px;background:#30363d}
svg text{fill:#9da7b3;font:11px system-ui,sans-serif;text-anchor:middle}
"""


@dataclass(frozen=True, slots=True)
class Example:
    """An alert of the contact sheet. `values`: what the filter read, by name. `cutouts`: PNG files."""

    title: str
    values: Mapping[str, str]
    cutouts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class TermReport:
    """What one operand of the outermost `and` of a filter did with the scored alerts."""

    text: str
    false: int
    """Alerts for which the term is false."""
    missing: int
    """Alerts for which the term is neither true nor false, because a value is missing. They do not pass either."""
    alone: int
    """Alerts that only this term removes: all other terms are true for them."""
    examples: tuple[Example, ...]
    """Some of the alerts that only this term removes."""


@dataclass(frozen=True, slots=True)
class FilterReport:
    """What a filter did with the scored alerts of a night."""

    name: str
    where: str
    revision: str
    limit: float | None
    """Largest fraction of the scored alerts that the filter should pass; None without a limit."""
    scored: int
    passed: int
    hours: tuple[tuple[int, int], ...]
    """Scored alerts and alerts that passed, for each of the 24 hours of the day (UTC)."""
    terms: tuple[TermReport, ...]
    examples: tuple[Example, ...]
    """Some of the alerts that passed."""

    @property
    def share(self) -> float:
        """Fraction of the scored alerts that passed; 0 if none was scored."""
        return self.passed / self.scored if self.scored else 0.0

    @property
    def over(self) -> bool:
        """Whether the filter passed more than its limit."""
        return self.limit is not None and self.share > self.limit

    @property
    def verdict(self) -> str:
        """How many alerts passed, and whether these are too many, in one sentence without a full stop."""
        passed = f"{self.passed:,} of {self.scored:,} scored alerts pass ({100 * self.share:.3g} %)"
        if self.limit is None:
            return f"{passed}, without a limit"
        return f"{passed}, {'more' if self.over else 'not more'} than the limit of {100 * self.limit:.3g} %"


def write_page(file: Path, inputs: Sequence[str], reports: Sequence[FilterReport]) -> None:
    """Write the page. `inputs`: the names of the files that the alerts are from."""
    night = ", ".join(f"<code>{escape(name)}</code>" for name in inputs)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Filters on a night</title>",
        '<meta name=viewport content="width=device-width">',
        f"<style>{STYLE}</style><h1>Filters on a night</h1><p>Alerts of {night}. Duplicates are not counted.</p>",
        *(_filter(report) for report in reports),
    ]
    file.write_text("\n".join(parts), encoding="utf-8")


def _filter(report: FilterReport) -> str:
    removed = [
        f"<h3>Removed by <code>{escape(term.text)}</code> alone: {len(term.examples)} of {term.alone:,}</h3>"
        f"{_sheet(term.examples)}"
        for term in report.terms
        if term.examples
    ]
    return "\n".join(
        (
            f"<section><h2>{escape(report.name)}</h2>",
            f"<p class={_standing(report)}><b>{escape(report.verdict)}</b></p>",
            f"<p><code>{escape(report.where)}</code> (revision {escape(report.revision)})</p>",
            "<h3>What each term removes</h3>",
            _terms(report),
            "<h3>Alerts that pass, by hour (UTC)</h3>",
            _bars(report.hours),
            f"<h3>Alerts that pass: {len(report.examples)} of {report.passed:,}, chosen at random</h3>",
            _sheet(report.examples),
            *removed,
            "</section>",
        )
    )


def _standing(report: FilterReport) -> str:
    """Return the CSS class of the verdict."""
    return "free" if report.limit is None else "over" if report.over else "fine"


def _terms(report: FilterReport) -> str:
    rows = "".join(
        f"<tr><td class=v><code>{escape(term.text)}</code><td>{term.false:,}<td>{term.missing:,}<td>{term.alone:,}"
        f"<td>{report.passed + term.alone:,}"
        for term in report.terms
    )
    heading = "<tr><th class=v>term<th>false<th>value missing<th>removed by it alone<th>would pass without it"
    return f"<table>{heading}{rows}</table>"


def _bars(hours: Sequence[tuple[int, int]]) -> str:
    """Return a bar for each hour with scored alerts. Its height is the number that passed, in units of the largest."""
    most = max((passed for _, passed in hours), default=0) or 1
    bars = []
    shown = [(hour, scored, passed) for hour, (scored, passed) in enumerate(hours) if scored]
    for k, (hour, scored, passed) in enumerate(shown):
        height = BARS_HEIGHT * passed / most
        top, middle = LABEL_HEIGHT + BARS_HEIGHT - height, BAR_WIDTH * (k + 0.5)
        bars.append(
            f"<rect x={BAR_WIDTH * k + 2} y={top:.1f} width={BAR_WIDTH - 4} height={height:.1f} fill='#58a6ff'>"
            f"<title>{passed:,} of {scored:,} scored alerts ({100 * passed / scored:.3g} %)</title></rect>"
            f"<text x={middle} y={top - 4:.1f}>{passed}</text>"
            f"<text x={middle} y={BARS_HEIGHT + 2 * LABEL_HEIGHT - 4}>{hour:02}</text>"
        )
    return f"<svg width={BAR_WIDTH * max(len(shown), 1)} height={BARS_HEIGHT + 2 * LABEL_HEIGHT}>{''.join(bars)}</svg>"


def _sheet(examples: Sequence[Example]) -> str:
    return "".join(
        f"<figure>{''.join(_image(*one) for one in zip(CUTOUTS, example.cutouts, strict=False))}"
        f"<figcaption><b>{escape(example.title)}</b><br>{_values(example.values)}</figcaption></figure>"
        for example in examples
    )


def _image(name: str, png: bytes) -> str:
    return f"<img alt='{name}' title='{name}' width={STAMP} height={STAMP} src='{as_url(png)}'>"


def _values(values: Mapping[str, str]) -> str:
    return ", ".join(f"{escape(name)} {escape(value)}" for name, value in values.items())
