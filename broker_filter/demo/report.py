"""The demonstration's results: tables, the alerts of the contact sheet, and the check that no alert was lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from broker_filter.demo.contact_sheet import ALERTS_PER_ROW, Row
from broker_filter.demo.night import Night
from broker_filter.demo.results import Alert, Results, real
from broker_filter.simulate import RATES, REAL

SHOWN_PER_FILTER = 4
BANDS = {1: "g", 2: "r"}
DECIDED = 0.5
"""The threshold on the score above which an alert is classified as real."""
WELL_EXPOSED = 16.0
"""Magnitude of the brightest stars that are shown: brighter ones saturate the simulated camera."""


def write_scores(file: Path, results: Results, night: Night) -> None:
    """Write a Parquet table with one row for each scored alert."""
    rows = [
        {
            "alert_id": alert["candid"],
            "object_id": alert["objectId"],
            "jd": alert["candidate"]["jd"],
            "ra": alert["candidate"]["ra"],
            "dec": alert["candidate"]["dec"],
            "band": BANDS[alert["candidate"]["fid"]],
            "magpsf": alert["candidate"]["magpsf"],
            "duplicate": alert["broker_filter"]["duplicate"],
            "default__real": real(alert),
            "true_kind": night.kinds[alert["candid"]],
        }
        for alert in results.scored
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)


def kinds_table(results: Results, night: Night) -> Table:
    """Return a table of the default model's scores for each true kind of alert, which only a simulation knows."""
    scores: dict[str, list[float]] = {kind: [] for kind in RATES}
    for alert in results.scored:
        scores[night.kinds[alert["candid"]]].append(real(alert))
    table = _table(
        "Scores of the default model by kind of alert",
        ("kind", "truth"),
        ("alerts", "median score", "classified real"),
    )
    for kind, values in scores.items():
        if values:
            truth = "[green]real[/]" if kind in REAL else "[red]bogus[/]"
            called = np.mean(np.array(values) > DECIDED)
            table.add_row(_words(kind), truth, str(len(values)), f"{np.median(values):.3f}", f"{called:.0%}")
    return table


def interesting_table(results: Results, night: Night) -> Table:
    """Return a table of the brightest alerts that each filter selected."""
    table = _table("Alerts that the filters selected", ("filter", "object", "truth", "band"), ("mag", "seen", "score"))
    for name, alerts in _filtered(results).items():
        for i, alert in enumerate(alerts[:SHOWN_PER_FILTER]):
            candidate = alert["candidate"]
            table.add_row(
                f"{_words(name)} ({len(alerts)})" if i == 0 else "",
                alert["objectId"],
                _words(night.kinds[alert["candid"]]),
                BANDS[candidate["fid"]],
                f"{candidate['magpsf']:.2f}",
                f"{candidate['ndethist']} x",
                f"{real(alert):.3f}",
                end_section=i == min(len(alerts), SHOWN_PER_FILTER) - 1,
            )
    return table


def anomalies_table(results: Results, night: Night) -> Table:
    """Return a table of the strongest anomalies, with the nearest ordinary alert and the most unusual modality."""
    alerts = _strangest(results)
    words, numbers = ("object", "truth", "nearest", "differs in"), ("distance", "score")
    table = _table(f"Anomalies ({len(alerts)}): outliers among the alerts that look real", words, numbers)
    for alert in alerts[:SHOWN_PER_FILTER]:
        anomaly = alert["broker_filter"]["anomaly"]
        [nearest, *_] = anomaly["reason"]["neighbours"]
        table.add_row(
            alert["objectId"],
            _words(night.kinds[alert["candid"]]),
            nearest["object_id"],
            _words(anomaly["reason"]["most_unlike"]),
            f"{nearest['distance']:.3f}",
            f"{anomaly['score']:.2f}",
        )
    return table


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def contact_sheet_rows(results: Results, night: Night) -> list[Row]:
    """Return the rows of the contact sheet.

    One row for each filter, one of anomalies, one of variable stars, and two of alerts of different true kinds that are
    classified as bogus.
    """
    rows = [_row(_words(name), alerts, night) for name, alerts in _filtered(results).items()]
    rows.append(_row("anomaly", _strangest(results), night))
    alerts = sorted((a for a in results.scored if not a["broker_filter"]["duplicate"]), key=_magnitude)
    stars = (alert for alert in alerts if night.kinds[alert["candid"]] == "variable_star")
    rows.append(_row("variable star", (star for star in stars if _magnitude(star) > WELL_EXPOSED), night))
    bogus = [alert for alert in alerts if real(alert) < DECIDED]
    kinds = [night.kinds[alert["candid"]] for alert in bogus]
    first_of_kind = [alert for i, alert in enumerate(bogus) if kinds[i] not in kinds[:i]]
    rows.append(_row("classified as bogus", first_of_kind, night))
    rows.append(_row("", first_of_kind[ALERTS_PER_ROW:], night))
    return [row for row in rows if row.alerts]


def audit(results: Results, night: Night, account: Mapping[str, int], screen: Console) -> list[str]:
    """Print the counts, and return the problems found: an empty list if every message was published exactly once."""
    published = sum(results.inputs.values())
    duplicates = sum(alert["broker_filter"]["duplicate"] for alert in results.scored)
    rejected = ", ".join(f"{reason} {count}" for reason, count in sorted(results.rejected.items()))
    screen.print(
        f"[bold]{account['consumed']:,} consumed[/] = {account['scored']:,} scored + {account['rejected']:,} rejected "
        f"({rejected}) + {account['duplicate']:,} duplicates",
        highlight=False,
    )
    checks = {
        f"{night.packets} sent but {account['consumed']} consumed": night.packets == account["consumed"],
        "consumed is not scored + rejected + duplicates": account["consumed"]
        == account["scored"] + account["rejected"] + account["duplicate"],
        f"{published} results were published for {night.packets} messages": published == night.packets,
        f"results of only {len(results.inputs)} different messages were published": len(results.inputs)
        == night.packets,
        f"{duplicates} marked as duplicates but {account['duplicate']} counted": duplicates == account["duplicate"],
        f"{results.rejected.total()} dead letters but {account['rejected']} rejected": results.rejected.total()
        == account["rejected"],
    }
    problems = [problem for problem, holds in checks.items() if not holds]
    if not problems:
        screen.print(
            f"[green]Each of the {night.packets:,} messages was published exactly once[/] (read_committed client).\n"
        )
    return problems


def _filtered(results: Results) -> dict[str, list[Alert]]:
    """Return the alerts of each filter, brightest first, without duplicates."""
    by_id = {alert["candid"]: alert for alert in results.scored}
    return {
        name: sorted((by_id[alert_id] for alert_id in set(alert_ids)), key=_magnitude)
        for name, alert_ids in results.filtered.items()
    }


def _strangest(results: Results) -> list[Alert]:
    """Return the anomalies, highest score first, without duplicates."""
    by_id = {alert["candid"]: alert for alert in results.anomalies}
    return sorted(by_id.values(), key=lambda alert: -float(alert["broker_filter"]["anomaly"]["score"]))


def _row(title: str, alerts: Iterable[Alert], night: Night) -> Row:
    chosen = list(islice(alerts, ALERTS_PER_ROW))
    return Row(title, chosen, [night.kinds[alert["candid"]] for alert in chosen])


def _magnitude(alert: Alert) -> float:
    return float(alert["candidate"]["magpsf"])


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
