"""Tables of labels: every label gets its class, and unusable tables are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from broker_filter.scoring.labels import LabelsError, parse_rule, read_labels


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ("name,class\nx,a\n", "class", "no column to join by"),
        ("candid,class\n1,a\n", "kind", "no column 'kind'; its columns are candid, class"),
        ("candid,class\n1,a\n2,a\n", "class", "has 1 class"),
        ("candid,class\n1,a\n1,b\n", "class", "candid 1 is labelled both a and b"),
        ("candid,class\n1,SN Ia\n2,b\n", "class", "value 'SN Ia' of column 'class' cannot be .*--class NAME='SN Ia'"),
        ("candid,class\n1,\n2,b\n", "class", "has 1 class"),
        ("candid,class\n1,nan\n2,NaN\n", "class", r"has 0 class \(every label is missing\)"),
        ("candid,class\n", "class", "has no rows"),
        ("", "class", r"cannot be read as \.csv or \.parquet"),
        ("candid,class\n1.5e18,a\n2,b\n", "class", "candid holds floating-point numbers, which round ids"),
        ("candid,class,class\n1,a,b\n2,b,a\n", "class", r"cannot be read as \.csv or \.parquet"),
    ],
)
def test_an_unusable_table_is_refused(content: str, column: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(content)
    with pytest.raises(LabelsError, match=message):
        read_labels(table, column)


def test_rows_without_a_label_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("candid,class\n1,a\n2,\n3,b\n")
    pandas_like = {"candid": ["1", "2", "3", ""], "class": ["a", None, "b", "a"], "number": [0.0, np.nan, 1.0, 1.0]}
    parquet.write_table(pa.table(pandas_like), tmp_path / "labels.parquet")
    for name in ("labels.csv", "labels.parquet"):
        labels = read_labels(tmp_path / name, "class")
        assert (labels.classes, labels.label_of) == (("a", "b"), {"1": 0, "3": 1})
    rules = [parse_rule("no=-1..0.5"), parse_rule("yes=0.5..1")]
    assert read_labels(tmp_path / "labels.parquet", "number", rules).label_of == {"1": 0, "3": 1}


def test_a_missing_table_or_another_encoding_is_reported(tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match=r"absent\.csv: no such file"):
        read_labels(tmp_path / "absent.csv", "class")
    (tmp_path / "labels.csv").write_bytes("candid,class\n1,café\n2,b\n".encode("latin1"))
    with pytest.raises(LabelsError, match="column 'class' is not UTF-8 text"):
        read_labels(tmp_path / "labels.csv", "class")


@pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "N/A", "null", "None", "<NA>", " "])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_no_spelling_of_a_missing_label_is_a_class(missing: str, kind: str, tmp_path: Path) -> None:
    columns = {"candid": ["1", "2", "3"], "class": ["a", missing, "b"]}
    if kind == "csv":
        (tmp_path / "labels.csv").write_text(f"candid,class\n1,a\n2,{missing}\n3,b\n")
    else:
        parquet.write_table(pa.table(columns), tmp_path / "labels.parquet")
    labels = read_labels(tmp_path / f"labels.{kind}", "class")
    assert (labels.classes, labels.label_of) == (("a", "b"), {"1": 0, "3": 1})
    if missing.strip():
        rules = [parse_rule("a=a"), parse_rule(f"nothing={missing}")]
        assert read_labels(tmp_path / f"labels.{kind}", "class", rules).label_of == {"1": 0, "2": 1}


def test_two_rules_of_one_class_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("candid,drb\n1,0.2\n2,0.8\n")
    rules = [parse_rule("real=0..0.5"), parse_rule("real=0.5..1")]
    with pytest.raises(LabelsError, match="class real is described more than once"):
        read_labels(tmp_path / "labels.csv", "drb", rules)


def test_ranges_of_numbers_are_classes(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("candid,drb\n1,0\n2,0.5\n3,0.51\n4,1\n5,\n")
    labels = read_labels(table, "drb", [parse_rule("bogus=0..0.5"), parse_rule("real=0.5..1")])
    assert labels.label_of == {"2": 0, "3": 1, "4": 1}
    with pytest.raises(LabelsError, match=r"no value of column 'drb' belongs to class huge"):
        read_labels(table, "drb", [parse_rule("real=0..1"), parse_rule("huge=1..9")])
    with pytest.raises(LabelsError, match=r"LOW \(2\) must be below HIGH \(1\)"):
        parse_rule("wrong=2..1")


def test_labels_are_joined_by_the_id_column_of_the_table(tmp_path: Path) -> None:
    alert_id, object_id = np.array([1, 2, 3]), np.array(["ZTF1", "ZTF2", "ZTF2"])
    (tmp_path / "alerts.csv").write_text("candid,class\n1,a\n3,b\n")
    (tmp_path / "objects.csv").write_text("objectId,class\nZTF2,a\nZTF9,b\n")
    assert read_labels(tmp_path / "alerts.csv", "class").of(alert_id, object_id).tolist() == [0, -1, 1]
    assert read_labels(tmp_path / "objects.csv", "class").of(alert_id, object_id).tolist() == [-1, 0, 0]
