"""The table of labels is written as a whole, read again, and taken by `build-dataset`."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

pytest.importorskip("galsim", reason="simulated packets need the extra `demo`")

from broker_filter.errors import BrokerFilterError
from broker_filter.watch.chosen import read_list
from broker_filter.watch.labels import COLUMNS, Label, LabelFileError, LabelTable, check_classes, one_line

from .made_night import FIRST_ID, HOSTILE


def label(alert_id: int, name: str = "", *, interesting: bool = False, note: str = "", object_id: str = "o") -> Label:
    return Label(alert_id, object_id, "ztf", name, interesting, note, "")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def test_each_alert_has_one_line_and_its_last_label(tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels.csv")
    table.set(label(FIRST_ID, "real"))
    table.set(label(FIRST_ID + 1, "bogus", interesting=True, note='a, "b"\nc'))
    table.set(label(FIRST_ID, "bogus"))
    found = rows(tmp_path / "labels.csv")
    assert tuple(found[0]) == COLUMNS == (
        "alert_id", "object_id", "survey", "label", "interesting", "note", "labelled_at",
    )  # fmt: skip
    assert [(int(row["alert_id"]) - FIRST_ID, row["label"], row["interesting"]) for row in found] == [
        (0, "bogus", "false"),
        (1, "bogus", "true"),
    ]
    assert found[1]["note"] == 'a, "b" c'
    again = LabelTable(tmp_path / "labels.csv")
    assert again.get(FIRST_ID + 1) == table.get(FIRST_ID + 1)
    assert [file.name for file in tmp_path.iterdir()] == ["labels.csv"]


def test_a_label_that_is_undone_leaves_no_line(tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels.csv")
    table.set(label(1, "real"))
    table.set(label(1))
    assert rows(tmp_path / "labels.csv") == []


def test_the_last_line_of_an_alert_wins(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(f"{','.join(COLUMNS)}\n1,o,ztf,real,false,,t\n1,o,ztf,bogus,false,,t\n")
    assert LabelTable(file).get(1).label == "bogus"  # type: ignore[union-attr]


def test_labels_of_another_program_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    first, second = LabelTable(file), LabelTable(file)
    first.set(label(1, "real"))
    second.set(label(2, "bogus"))
    first.set(label(3, "real"))
    assert [row["alert_id"] for row in rows(file)] == ["1", "2", "3"]


def test_text_of_a_packet_cannot_become_a_formula_or_a_line(tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels.csv")
    for k, text in enumerate(["=HYPERLINK(1)", "a\n9,x", HOSTILE, "ZTF18abcdefg", "170.1-x+y"]):
        table.set(label(k, "real", object_id=text))
    assert [row["object_id"] for row in rows(tmp_path / "labels.csv")] == ["", "", "", "ZTF18abcdefg", "170.1-x+y"]
    assert one_line("a\r\n\tb\u202ec\x00") == "a b c"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alert_id,label\n1,real\n", "its columns are not"),
        (f"{','.join(COLUMNS)}\n1,o,ztf,real,maybe,,t\n", "line 2 is not a label"),
        (f"{','.join(COLUMNS)}\n1,o,ztf\n", "line 2 is not a label"),
        (f"{','.join(COLUMNS)}\nx,o,ztf,real,true,,t\n", "line 2 is not a label"),
    ],
)
def test_a_file_that_is_no_table_of_labels_is_left_alone(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(content)
    with pytest.raises(LabelFileError, match=message):
        LabelTable(file)
    assert file.read_text() == content


def test_a_label_that_cannot_be_written_is_not_shown(tmp_path: Path) -> None:
    table = LabelTable(tmp_path / "labels.csv")
    table.set(label(1, "real"))
    if os.geteuid() == 0:  # root may write anywhere, but no file can replace a folder
        (tmp_path / "labels.csv").unlink()
        (tmp_path / "labels.csv").mkdir()
    else:
        tmp_path.chmod(0o500)
    with pytest.raises((OSError, LabelFileError)):
        table.set(label(1, "bogus"))
    assert table.get(1).label == "real"  # type: ignore[union-attr]
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("classes", [["SN Ia"], ["real"], ["SN", "SN"], ["NA"], [f"c{k}" for k in range(10)]])
def test_classes_that_cannot_be_labels_are_refused(classes: list[str]) -> None:
    with pytest.raises(LabelFileError):
        check_classes(classes)


def test_a_list_is_read_in_the_order_of_its_ranks(tmp_path: Path) -> None:
    file = tmp_path / "next.csv"
    file.write_text(f"alert_id,rank,reason,score\n{FIRST_ID},2,odd,0.1\n5,1,uncertain,0.5\n5,3,again,0.5\n")
    assert [(key, one.place, one.reason) for key, one in read_list(file).items()] == [
        (5, 0, "uncertain"),
        (FIRST_ID, 1, "odd"),
    ]
    file.write_text("alert_id\nx\n")
    with pytest.raises(BrokerFilterError, match="does not hold integers"):
        read_list(file)
    file.write_text("alert_id\n")
    with pytest.raises(BrokerFilterError, match="has no rows"):
        read_list(file)
    file.write_text("id\n1\n")
    with pytest.raises(BrokerFilterError, match="no column 'alert_id'"):
        read_list(file)
