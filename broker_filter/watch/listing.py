"""Which alerts of the store a page shows, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from broker_filter.watch.chosen import Chosen
from broker_filter.watch.labels import Label, LabelTable
from broker_filter.watch.store import Alert

NEWEST, STRANGEST, LISTED, ARRIVAL = "newest", "strangest", "listed", "arrival"
"""Orders beside those by a score, which are called `<model>.<label>`, and `-<model>.<label>` for the lowest first."""
ANY, NONE, INTERESTING = "any", "none", "interesting"
"""Choices of labels beside the labels themselves: some label, no label, and the mark `interesting`."""
PER_PAGE = 50
MAX_TEXT = 200
"""Longest text of a request, in characters."""


class QueryError(ValueError):
    """A parameter of a request is not valid. The message names the parameter."""


@dataclass(frozen=True, slots=True)
class Query:
    """A request for a page of the list.

    `until`: number of the newest alert that the person has seen in the list; later alerts are only counted. `text`:
    what the ids, the reasons or the note contain, in any case of letters. `score`: name of the score between `low` and
    `high`; `anomaly` is the anomaly score. `passed`: name of a filter. Empty texts select all alerts.
    """

    sort: str = NEWEST
    text: str = ""
    survey: str = ""
    label: str = ""
    passed: str = ""
    score: str = ""
    low: float = -math.inf
    high: float = math.inf
    page: int = 0
    until: int | None = None

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Query:
        """Return the query of a request. Raises QueryError."""
        if unknown := [name for name in parameters if name not in cls.__dataclass_fields__]:
            raise QueryError(f"unknown parameter {unknown[0][:MAX_TEXT]}")
        if long := [name for name, value in parameters.items() if len(value) > MAX_TEXT]:
            raise QueryError(f"{long[0]} has more than {MAX_TEXT} characters")
        texts = {name: parameters[name] for name in _TEXTS if name in parameters}
        return cls(
            **texts,
            low=_number(parameters, "low", -math.inf),
            high=_number(parameters, "high", math.inf),
            page=_count(parameters, "page") or 0,
            until=_count(parameters, "until"),
        )


_TEXTS = ("sort", "text", "survey", "label", "passed", "score")


def _number(parameters: Mapping[str, str], name: str, default: float) -> float:
    text = parameters.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise QueryError(f"{name} is not a number")
    return value


def _count(parameters: Mapping[str, str], name: str) -> int | None:
    text = parameters.get(name, "")
    if not text:
        return None
    if not (text.isdecimal() and text.isascii() and len(text) <= len(str(2**63))):
        raise QueryError(f"{name} is not a count")
    return int(text)


def select(
    alerts: Sequence[Alert], query: Query, labels: LabelTable | None, chosen: Mapping[int, Chosen]
) -> list[Alert]:
    """Return the alerts that a query selects, of all pages, in its order."""
    found = [alert for alert in alerts if _is_wanted(alert, query, labels, chosen)]
    found.sort(key=_order(query.sort, chosen))
    return found


def _is_wanted(alert: Alert, query: Query, labels: LabelTable | None, chosen: Mapping[int, Chosen]) -> bool:
    facts = alert.facts
    if query.until is not None and alert.number > query.until:
        return False
    if query.survey and facts.survey != query.survey:
        return False
    if query.passed and query.passed not in facts.passed:
        return False
    if query.score:
        value = score_of(alert, query.score)
        if value is None or not query.low <= value <= query.high:
            return False
    label = labels.get(facts.alert_id) if labels else None
    if query.label and not _has_label(label, query.label):
        return False
    if query.text:
        reason = chosen[facts.alert_id].reason if facts.alert_id in chosen else ""
        texts = (facts.object_id, str(facts.alert_id), facts.reason, reason, label.note if label else "")
        wanted = query.text.casefold()
        return any(wanted in text.casefold() for text in texts)
    return True


def _has_label(label: Label | None, wanted: str) -> bool:
    name = label.label if label else ""
    if wanted == ANY:
        return bool(name)
    if wanted == NONE:
        return not name
    if wanted == INTERESTING:
        return bool(label and label.interesting)
    return name == wanted


def score_of(alert: Alert, name: str) -> float | None:
    """Return a score of an alert by name, `<model>.<label>` or `anomaly`; None if the alert does not have it."""
    return alert.facts.anomaly if name == "anomaly" else alert.facts.scores.get(name)


def _order(sort: str, chosen: Mapping[int, Chosen]) -> Callable[[Alert], tuple[float, ...]]:
    """Return the key by which alerts are sorted; alerts without the value come last, the newest of equals first."""
    if sort == NEWEST:
        return lambda alert: (-alert.facts.mjd, -alert.number)
    if sort == ARRIVAL:
        return lambda alert: (-alert.number,)
    if sort == LISTED:
        places = {alert_id: one.place for alert_id, one in chosen.items()}
        return lambda alert: (places.get(alert.facts.alert_id, math.inf), -alert.number)
    name = "anomaly" if sort == STRANGEST else sort.removeprefix("-")
    sign = 1 if sort.startswith("-") else -1

    def by_score(alert: Alert) -> tuple[float, ...]:
        value = score_of(alert, name)
        return (math.inf if value is None else sign * value, -alert.number)

    return by_score
