"""The demonstration's results: tables, the alerts of the contact sheet, and the check that no alert was lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from broker_filter.demo.contact_sheet import ALERTS_PER_ROW, Row
from broker_filter.demo.results import (
    Alert,
    Results,
    Survey,
    alert_id,
    band,
    detections,
    julian_date,
    magnitude,
    object_id,
    real,
    short,
    survey_of,
)
from broker_filter.simulate import BOGUS, REAL

SHOWN_PER_FILTER = 4
DECIDED = 0.5
"""The threshold on the score above which an alert is classified as real."""
WELL_EXPOSED = 16.0
"""Magnitude of the brightest stars that are shown: brighter ones saturate ZTF's simulated camera."""

Kinds = Mapping[int, str]
"""The true kind of each simulated alert, by alert id."""


def write_scores(file: Path, results: Results, kinds: Kinds) -> None:
    """Write a Parquet table with one row for each scored alert."""
    rows = [
        {
            "alert_id": alert_id(alert),
            "object_id": object_id(alert),
            "survey": survey_of(alert),
            "jd": julian_date(alert),
            "ra": _detection(alert)["ra"],
            "dec": _detection(alert)["dec"],
            "band": band(alert),
            "magpsf": magnitude(alert),
            "duplicate": alert["broker_filter"]["duplicate"],
            "default__real": real(alert),
            "true_kind": kinds[alert_id(alert)],
        }
        for alert in results.scored
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)


def kinds_table(results: Results, kinds: Kinds, survey: Survey) -> Table:
    """Return a table of the default model's scores for each true kind of alert, which only a simulation knows."""
    scores: dict[str, list[float]] = {kind: [] for kind in (*REAL, *BOGUS)}
    for alert in results.scored:
        if survey_of(alert) == survey:
            scores[kinds[alert_id(alert)]].append(real(alert))
    title = f"{survey.upper()}: scores of the default model by kind of alert"
    if np.isnan([value for values in scores.values() for value in values]).all():
        title += f"\nThe default model has no network for {survey.upper()}: these alerts have no score"
    table = _table(title, ("kind", "truth"), ("alerts", "median score", "classified real"))
    for kind, values in scores.items():
        if values:
            truth = "[green]real[/]" if kind in REAL else "[red]bogus[/]"
            table.add_row(_words(kind), truth, str(len(values)), *_median_and_share(np.array(values)))
    return table


def _median_and_share(scores: NDArray[np.float64]) -> tuple[str, str]:
    """Return the median of the scores, and the share above DECIDED; dashes if there are none."""
    known = scores[np.isfinite(scores)]
    return (f"{np.median(known):.3f}", f"{np.mean(known > DECIDED):.0%}") if len(known) else ("-", "-")


def interesting_table(results: Results, kinds: Kinds) -> Table:
    """Return a table of the brightest alerts that each filter selected."""
    table = _table("Alerts that the filters selected", ("filter", "object", "truth", "band"), ("mag", "seen", "score"))
    for name, alerts in _filtered(results).items():
        for i, alert in enumerate(alerts[:SHOWN_PER_FILTER]):
            table.add_row(
                f"{_words(name)} ({len(alerts)})" if i == 0 else "",
                short(object_id(alert)),
                _words(kinds[alert_id(alert)]),
                f"{survey_of(alert).upper()} {band(alert)}",
                f"{magnitude(alert):.2f}",
                f"{detections(alert)} x",
                f"{real(alert):.3f}",
                end_section=i == min(len(alerts), SHOWN_PER_FILTER) - 1,
            )
    return table


def anomalies_table(results: Results, kinds: Kinds) -> Table:
    """Return a table of the strongest anomalies, with the nearest ordinary alert and the most unusual modality."""
    alerts = _strangest(results)
    words, numbers = ("object", "truth", "nearest", "differs in"), ("distance", "score")
    table = _table(f"Anomalies ({len(alerts)}): outliers among the alerts that look real", words, numbers)
    for alert in _of_each_survey(alerts, SHOWN_PER_FILTER):
        anomaly = alert["broker_filter"]["anomaly"]
        [nearest, *_] = anomaly["reason"]["neighbours"]
        table.add_row(
            short(object_id(alert)),
            _words(kinds[alert_id(alert)]),
            short(nearest["object_id"]),
            _words(anomaly["reason"]["most_unlike"]),
            f"{nearest['distance']:.3f}",
            f"{anomaly['score']:.2f}",
        )
    return table


def features_table(results: Results) -> Table:
    """Return a table of the features that make anomalies strange, and of what the lens says of anomalies without any.

    Anomalies with features come first, and the strongest of them first.
    """
    alerts = _strangest(results)
    explained = [alert for alert in alerts if alert["broker_filter"]["anomaly"]["reason"]["features"]]
    words, numbers = ("object", "feature, or what the lens says"), ("rarity", "effect")
    title = f"Features of {len(explained)} of {len(alerts)} anomalies, and what disappears of the score without each"
    table = _table(title, words, numbers)
    others = [alert for alert in alerts if alert not in explained]
    for alert in _of_each_survey([*explained, *others], SHOWN_PER_FILTER):
        reason, name = alert["broker_filter"]["anomaly"]["reason"], short(object_id(alert))
        for feature in reason["features"]:
            effect = "-" if feature["effect"] is None else f"{feature['effect']:.0%}"
            table.add_row(name, feature["name"] or f"feature {feature['id']}", f"{feature['rarity']:.1f}", effect)
            name = ""
        if not reason["features"]:
            table.add_row(name, "; ".join(one["says"] for one in reason["lenses"]))
    return table


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def contact_sheet_rows(results: Results, kinds: Kinds) -> list[Row]:
    """Return the rows of the contact sheet.

    One row for each filter, one of anomalies, one of variable stars of ZTF, two of alerts of ZTF of different true
    kinds that are classified as bogus, and one of alerts of LSST that are classified as real, as bogus, or not scored.
    """
    rows = [_row(_words(name), alerts, kinds) for name, alerts in _filtered(results).items()]
    rows.append(_row("anomaly", _of_each_survey(_strangest(results), ALERTS_PER_ROW // 2), kinds))
    every = sorted((a for a in results.scored if not a["broker_filter"]["duplicate"]), key=magnitude)
    alerts = [alert for alert in every if survey_of(alert) == "ztf"]
    stars = (alert for alert in alerts if kinds[alert_id(alert)] == "variable_star")
    rows.append(_row("variable star", (star for star in stars if magnitude(star) > WELL_EXPOSED), kinds))
    bogus = _one_of_each_kind((alert for alert in alerts if real(alert) < DECIDED), kinds)
    rows.append(_row("classified as bogus", bogus, kinds))
    rows.append(_row("", bogus[ALERTS_PER_ROW:], kinds))
    lsst = [alert for alert in every if survey_of(alert) == "lsst"]
    decided = {
        "LSST: classified as real": [alert for alert in lsst if real(alert) > DECIDED],
        "LSST: classified as bogus": [alert for alert in lsst if real(alert) <= DECIDED],
        "LSST: not scored by the default model": [alert for alert in lsst if math.isnan(real(alert))],
    }
    rows += [_row(title, _one_of_each_kind(chosen, kinds), kinds) for title, chosen in decided.items()]
    return [row for row in rows if row.alerts]


def _one_of_each_kind(alerts: Iterable[Alert], kinds: Kinds) -> list[Alert]:
    """Return the first alert of each true kind, the most frequent kind first, so that rare errors come last."""
    first: dict[str, Alert] = {}
    frequency: Counter[str] = Counter()
    for alert in alerts:
        kind = kinds[alert_id(alert)]
        first.setdefault(kind, alert)
        frequency[kind] += 1
    return [first[kind] for kind, _ in frequency.most_common()]


def audit(results: Results, packets: int, account: Mapping[str, int], screen: Console) -> list[str]:
    """Print the counts, and return the problems found: an empty list if every message was published exactly once.

    `packets`: the number of messages that were sent.
    """
    published = sum(results.inputs.values())
    duplicates = sum(alert["broker_filter"]["duplicate"] for alert in results.scored)
    rejected = ", ".join(f"{reason} {count}" for reason, count in sorted(results.rejected.items()))
    screen.print(
        f"[bold]{account['consumed']:,} consumed[/] = {account['scored']:,} scored + {account['rejected']:,} rejected "
        f"({rejected}) + {account['duplicate']:,} duplicates",
        highlight=False,
    )
    checks = {
        f"{packets} sent but {account['consumed']} consumed": packets == account["consumed"],
        "consumed is not scored + rejected + duplicates": account["consumed"]
        == account["scored"] + account["rejected"] + account["duplicate"],
        f"{published} results were published for {packets} messages": published == packets,
        f"results of only {len(results.inputs)} different messages were published": len(results.inputs) == packets,
        f"{duplicates} marked as duplicates but {account['duplicate']} counted": duplicates == account["duplicate"],
        f"{results.rejected.total()} dead letters but {account['rejected']} rejected": results.rejected.total()
        == account["rejected"],
    }
    problems = [problem for problem, holds in checks.items() if not holds]
    if not problems:
        screen.print(
            f"[green]Each of the {packets:,} messages was published exactly once[/] (read_committed client).\n"
        )
    return problems


def _filtered(results: Results) -> dict[str, list[Alert]]:
    """Return the alerts of each filter, brightest first, without duplicates."""
    by_id = {alert_id(alert): alert for alert in results.scored}
    return {
        name: sorted((by_id[selected] for selected in set(alert_ids)), key=magnitude)
        for name, alert_ids in results.filtered.items()
    }


def _strangest(results: Results) -> list[Alert]:
    """Return the anomalies, highest score first, without duplicates."""
    by_id = {alert_id(alert): alert for alert in results.anomalies}
    return sorted(by_id.values(), key=lambda alert: -float(alert["broker_filter"]["anomaly"]["score"]))


def _row(title: str, alerts: Iterable[Alert], kinds: Kinds) -> Row:
    chosen = list(islice(alerts, ALERTS_PER_ROW))
    return Row(title, chosen, [kinds[alert_id(alert)] for alert in chosen])


def _of_each_survey(alerts: Iterable[Alert], n: int) -> list[Alert]:
    """Return the first `n` alerts of each survey."""
    chosen: dict[Survey, list[Alert]] = {"ztf": [], "lsst": []}
    for alert in alerts:
        chosen[survey_of(alert)].append(alert)
    return [alert for own in chosen.values() for alert in own[:n]]


def _detection(alert: Alert) -> Mapping[str, float]:
    """Return the survey's record of the detection."""
    detection: Mapping[str, float] = alert["candidate" if survey_of(alert) == "ztf" else "diaSource"]
    return detection


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
