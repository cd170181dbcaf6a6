"""The table of labels that a person gives to alerts: a CSV with one line for each labelled alert.

`python -m training build-dataset --labels FILE` reads it. The file is always replaced as a whole, so that it is never
half written.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.file_stamp import Stamp, stamp
from broker_filter.scoring.labels import CLASS_NAME, UNLABELLED_TEXTS

REAL, BOGUS = "real", "bogus"
"""The two labels that exist without `--classes`."""
MAX_CLASSES = 9
"""The most classes beside real and bogus: the digits of the keyboard."""
MAX_NOTE = 500
"""Longest note, in characters."""
MAX_FILE_BYTES = 256 * 2**20
_PLAIN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
"""An object id that is written to the table. Any other text of a packet is left out: a spreadsheet might run it."""


class LabelFileError(BrokerFilterError):
    """The table of labels, or a class, cannot be used. The message says what is wrong, where, and what to do."""

    exit_status = USAGE


@dataclass(frozen=True, slots=True)
class Label:
    """A line of the table.

    `label`: `real`, `bogus`, a class, or empty. `interesting`: whether a person marked the alert, with or without a
    label. `labelled_at`: time in UTC (ISO 8601).
    """

    alert_id: int
    object_id: str
    survey: str
    label: str
    interesting: bool
    note: str
    labelled_at: str

    @property
    def says_nothing(self) -> bool:
        """Whether the line would be empty, so that it is not written."""
        return not (self.label or self.interesting or self.note)


COLUMNS = tuple(field.name for field in fields(Label))


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes if they can be labels. Raises LabelFileError otherwise."""
    for name in classes:
        if not CLASS_NAME.fullmatch(name) or name in UNLABELLED_TEXTS:
            raise LabelFileError(f"{name!r} cannot be a class: a name is an identifier of at most 64 characters")
    if twice := [name for name in (REAL, BOGUS, *classes) if (REAL, BOGUS, *classes).count(name) > 1]:
        raise LabelFileError(f"class {twice[0]} is named twice (real and bogus always exist)")
    if len(classes) > MAX_CLASSES:
        raise LabelFileError(f"{len(classes)} classes are too many: the keyboard has {MAX_CLASSES} digits for them")
    return tuple(classes)


class LabelTable:
    """The labels, in memory and in the file. Thread-safe.

    If another program changed the file since it was last read, it is read again before a label is added.
    """

    def __init__(self, file: Path) -> None:
        """Read the file if it exists. Raises LabelFileError if it is not a table of labels."""
        self._file = file
        self._lock = Lock()
        self._labels: dict[int, Label] = {}
        self._seen: Stamp | None = None
        if file.exists():
            self._read()
        elif not file.resolve().parent.is_dir():
            raise LabelFileError(f"{file}: its folder does not exist; create it first")

    def __len__(self) -> int:
        return len(self._labels)

    def get(self, alert_id: int) -> Label | None:
        """Return the label of an alert; None if it has none."""
        return self._labels.get(alert_id)

    def set(self, label: Label) -> Label:
        """Store a label in place of the alert's earlier one, write the file, and return the label as it was stored.

        Raises OSError if the file cannot be written; then the earlier labels remain.
        """
        object_id = label.object_id if _PLAIN_ID.fullmatch(label.object_id) else ""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        stored = replace(label, object_id=object_id, note=one_line(label.note), labelled_at=now)
        with self._lock:
            if (present := stamp(self._file)) and present != self._seen:
                self._read()
            labels = {**self._labels, stored.alert_id: stored}
            if stored.says_nothing:
                del labels[stored.alert_id]
            _write(self._file, list(labels.values()))
            self._labels = labels
            self._seen = stamp(self._file)
        return stored

    def _read(self) -> None:
        seen = stamp(self._file)
        if seen and seen.size > MAX_FILE_BYTES:
            raise LabelFileError(f"{self._file}: more than {MAX_FILE_BYTES} bytes are no table of labels")
        with self._file.open(newline="", encoding="utf-8") as file:
            try:
                rows = csv.DictReader(file, strict=True)
                if tuple(rows.fieldnames or ()) != COLUMNS:
                    raise LabelFileError(
                        f"{self._file}: its columns are not {','.join(COLUMNS)}, so it would be damaged; name another "
                        "file with --labels"
                    )
                labels = [_parsed(row) for row in rows]
            except (csv.Error, ValueError, TypeError) as error:
                raise LabelFileError(
                    f"{self._file}: line {rows.line_num} is not a label ({error}); mend or move the file"
                ) from error
        self._labels = {label.alert_id: label for label in labels}  # the last label of an alert wins
        self._seen = seen


def one_line(text: str) -> str:
    """Return a note on one line, without control characters, of at most MAX_NOTE characters."""
    shown = "".join(" " if unicodedata.category(character)[0] in "CZ" else character for character in text[:MAX_NOTE])
    return " ".join(shown.split())


def _parsed(row: dict[str, str]) -> Label:
    """Return the label of a line. Raises ValueError or TypeError if it is none."""
    if None in row or None in row.values():
        raise ValueError("it does not have a value for each column")
    if row["interesting"] not in ("true", "false"):
        raise ValueError(f"interesting is {row['interesting'][:20]!r}, not true or false")
    return Label(**{**row, "alert_id": int(row["alert_id"]), "interesting": row["interesting"] == "true"})  # type: ignore[arg-type]


def _write(file: Path, labels: Sequence[Label]) -> None:
    """Replace the file atomically."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    rows.writeheader()
    rows.writerows({**asdict(label), "interesting": "true" if label.interesting else "false"} for label in labels)
    target = file.resolve()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as new:
            new.write(text.getvalue())
            new.flush()
            os.fsync(new.fileno())
        Path(name).chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
