"""A list of alerts to look at, in its order: a CSV or Parquet table with the column `alert_id`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import dataset

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.streaming.annotations import MAX_TEXT

KEY, REASON, RANK = "alert_id", "reason", "rank"
MAX_ROWS = 1_000_000


class ChosenListError(BrokerFilterError):
    """The list of alerts cannot be used. The message says what is wrong, where, and what to do."""

    exit_status = USAGE


@dataclass(frozen=True, slots=True)
class Chosen:
    """An entry of the list. `place`: its position, from 0. `reason`: why the alert was chosen; may be empty."""

    place: int
    reason: str


def read_list(file: Path) -> dict[int, Chosen]:
    """Return the entries of a list by alert id, sorted by the column `rank` if there is one. The first entry counts.

    Raises ChosenListError if the file cannot be read or has no column of integer ids.
    """
    try:
        table = dataset.dataset(file, format=file.suffix.removeprefix("."))
        if KEY not in table.schema.names:
            raise ChosenListError(f"{file}: no column {KEY!r}; its columns are {', '.join(table.schema.names)}")
        names = [name for name in (KEY, REASON, RANK) if name in table.schema.names]
        rows = table.to_table(columns=names)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ChosenListError(f"{file}: cannot be read as .csv or .parquet: {' '.join(str(error).split())}") from error
    if not len(rows):
        raise ChosenListError(f"{file}: has no rows; a list names the alerts to show")
    if not pa.types.is_integer(rows.schema.field(KEY).type):
        raise ChosenListError(f"{file}: column {KEY} does not hold integers; write the ids of alerts")
    if len(rows) > MAX_ROWS:
        raise ChosenListError(f"{file}: has {len(rows)} rows, more than {MAX_ROWS}; choose fewer alerts")
    if RANK in names:
        rows = rows.sort_by(RANK)
    reasons = rows[REASON].to_pylist() if REASON in names else [""] * len(rows)
    chosen: dict[int, Chosen] = {}
    for alert_id, reason in zip(rows[KEY].to_pylist(), reasons, strict=True):
        if alert_id is not None:
            chosen.setdefault(alert_id, Chosen(len(chosen), str(reason or "")[:MAX_TEXT]))
    return chosen
