"""The functions `in_moc` and `near` in filters: which alerts pass, matches in records, revisions, and errors."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from mocpy import MOC

from broker_filter.packets.batch import AlertBatch
from broker_filter.sky.files import SkyFiles
from broker_filter.streaming.encoding import ContainerFraming, Encoder
from broker_filter.streaming.expressions import FIELDS, Expression, ExpressionError, compile_filter
from broker_filter.streaming.filters import Filter, Filters
from broker_filter.streaming.scored import Match, ScoredBatch
from tests.sky.conftest import CENTRE, cone, write_map

ARCSEC = 1 / 3600
NAN = float("nan")
OUTPUTS = ["default.real"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner, outer = cone(*CENTRE, 5), cone(*CENTRE, 12)
    write_map(tmp_path / "event.fits", [(inner, 0.5), (outer.difference(inner), 0.4), (outer.complement(), 0.1)])
    cone(10, 20, 2).save(tmp_path / "field.json", format="json")
    (tmp_path / "targets.csv").write_text("name,ra,dec\nfirst,359,60\npolar,0,90\nlast,10,20\n")
    (tmp_path / "other.csv").write_text("ra,dec\n10,20.0005\n")
    return tmp_path


@pytest.fixture
def batch(make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]) -> ScoredBatch:
    """Alerts at the centre of the map, 8 degrees away from it, at two places near the pole, at 10 20, and nowhere."""
    ra = [CENTRE[0], CENTRE[0], 123.0, 300.0, 10.0, NAN, 10.0]
    dec = np.array([CENTRE[1], CENTRE[1] - 8, 90 - 1 * ARCSEC, 90 - 3 * ARCSEC, 20 + 0.5 * ARCSEC, 20.0, NAN])
    alerts = replace(make_alerts([1, 2, 3, 4, 5, 6, 7], ra=ra), dec=dec)
    return make_scored(alerts, {"default": [0.9] * 7})


def compiled(text: str, folder: Path) -> Expression:
    return compile_filter(text, FIELDS, OUTPUTS, SkyFiles(folder))


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ('in_moc("event.fits", 0.49)', [1]),
        ('in_moc("event.fits", 0.89)', [1, 2]),
        ('in_moc("event.fits", 1)', [1, 2, 3, 4, 5]),
        ("in_moc('field.json')", [5]),
        ("not in_moc('field.json')", [1, 2, 3, 4]),
        ('near("targets.csv", 2)', [1, 3, 5]),
        ('not near("targets.csv", 2)', [2, 4]),
        ('near("targets.csv", 4.0) and real > 0.5', [1, 3, 4, 5]),
        ('near("targets.csv", 0.9) or near("other.csv", 2.0)', [1, 5]),
        ('near("targets.csv", 30000)', [1, 2, 3, 4, 5]),
        ('in_moc("event.fits", 0.89) and not near("targets.csv", 2.0)', [2]),
        ('not (in_moc("field.json") or near("targets.csv", 2.0)) or alert_id > 5', [2, 4, 6, 7]),
    ],
)
def test_alerts_pass_that_are_in_the_region_or_near_a_target(
    batch: ScoredBatch, folder: Path, text: str, passing: list[int]
) -> None:
    passed = compiled(text, folder).evaluate(batch)
    assert batch.alerts.alert_id[passed].tolist() == passing


def test_expression_reads_positions_and_no_further_columns(folder: Path) -> None:
    expression = compiled('near("targets.csv", 2) and in_moc("event.fits", 0.9) and near("targets.csv", 5)', folder)
    assert (expression.names, expression.columns) == ({"ra", "dec"}, [])
    assert [(near.list, near.radius) for near in expression.nears] == [("targets.csv", 2.0), ("targets.csv", 5.0)]
    assert [file.path.name for file in expression.files] == ["targets.csv", "event.fits"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('real > 0.5 and near("absent.csv", 2)', "character 21: .*absent.csv: no such file"),
        ('near("field.json", 2)', "character 6: .*field.json: no column of right ascension"),
        ('in_moc("targets.csv")', "character 8: .*targets.csv: not a MOC"),
        ('in_moc("event.fits")', "character 8: .*event.fits: a map of probabilities needs a level"),
        ('in_moc("field.json", 0.9)', "character 8: .*field.json: no probabilities"),
        *((f'in_moc("event.fits", {level})', "character 22: a level is needed here: a number above 0 and at most 1")
          for level in ("0", "1.1", "-0.5", "True", "'0.9'", "real", "90", "1e999")),
        *((f'near("targets.csv", {radius})', "character 21: a radius in arcsec is needed here: a number above 0")
          for radius in ("0", "-1", "ra", "648001", "False", "2 + 1")),
        ("near(targets, 2)", "character 6: the name of a file in quotes is needed here"),
        ('near("", 2)', "character 6: the name of a file in quotes is needed here"),
        ('in_moc(f"{ra}", 0.9)', "character 8: the name of a file in quotes is needed here"),
        ('near("targets.csv")', r"character 1: the only functions are .*near\(file, arcsec\)"),
        ('near("targets.csv", radius=2)', "the only functions"),
        ('in_moc("event.fits", 0.9, 1)', "the only functions"),
        ('near(*"ab")', "the only functions"),
        ('in_moc("event.fits", 0.9) > 0.5', "true or false cannot be compared|cannot be compared"),
        ('near("a\0b", 2)', "no such file|not an expression|character"),
    ],
)  # fmt: skip
def test_error_names_the_file_and_what_is_wrong(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        compiled(text, folder)


def test_filter_cannot_read_files_where_none_are_allowed() -> None:
    with pytest.raises(ExpressionError, match="character 6: a filter cannot read files here"):
        compile_filter('near("/etc/passwd", 2)', FIELDS, OUTPUTS)


def test_matches_name_the_nearest_target_of_each_list(batch: ScoredBatch, folder: Path) -> None:
    files = SkyFiles(folder)
    wheres = {
        "close": 'near("targets.csv", 2)',
        "wide": 'near("targets.csv", 4) or near("other.csv", 2)',
        "none": 'real > 2 and near("other.csv", 2)',
    }
    filters = Filters([Filter(name, compile_filter(text, FIELDS, OUTPUTS, files)) for name, text in wheres.items()])
    tried = filters.apply(batch)
    assert [batch.alerts.alert_id[one.passed].tolist() for one in tried.filters] == [[1, 3, 5], [1, 3, 4, 5], []]
    separations = {i: [one.separation for one in found] for i, found in tried.matches.items()}
    assert separations == {
        0: [pytest.approx(0, abs=1e-9)],
        2: [pytest.approx(1)],
        3: [pytest.approx(3)],
        4: [pytest.approx(0.5), pytest.approx(0.0005 * 3600 - 0.5)],
    }
    assert [(one.list, one.name) for one in tried.matches[4]] == [("targets.csv", "last"), ("other.csv", "row 1")]


def test_record_holds_the_matches(batch: ScoredBatch) -> None:
    matches = {0: (Match("targets.csv", "M31 Ä", 0.25), Match("other.csv", "row 1", 1.5)), 4: (Match("a", "b", 2.0),)}
    encoded = Encoder("scores", "0123456789ab").encode(replace(batch, matches=matches), 0)
    records: list[Any] = [
        next(iter(fastavro.reader(io.BytesIO(ContainerFraming().frame(schema, body, "me.scored")))))
        for schema, body in encoded
    ]
    found = [record["broker_filter"]["matches"] for record in records]
    assert found[0] == [
        {"list": "targets.csv", "name": "M31 Ä", "separation": 0.25},
        {"list": "other.csv", "name": "row 1", "separation": 1.5},
    ]
    assert found[4] == [{"list": "a", "name": "b", "separation": 2.0}]
    assert [len(one) for one in found] == [2, 0, 0, 0, 1, 0, 0]
    assert {record["broker_filter"]["configuration"] for record in records} == {"0123456789ab"}


def settled(file: Path) -> None:
    os.utime(file, (1e9, 1e9))


def test_changed_file_is_used_from_the_next_batch_on_and_changes_the_revision(batch: ScoredBatch, folder: Path) -> None:
    now = 0.0
    files = SkyFiles(folder, lambda: now)
    text = 'near("targets.csv", 2) or in_moc("field.json")'
    filters = Filters([Filter("mine", compile_filter(text, FIELDS, OUTPUTS, files))])

    def outcome() -> tuple[str, list[int]]:
        [tried] = filters.apply(batch).filters
        return tried.revision, batch.alerts.alert_id[tried.passed].tolist()

    first = outcome()
    assert first[1] == [1, 3, 5]
    original = (folder / "targets.csv").read_text()
    (folder / "targets.csv").write_text("name,ra,dec\nother,359,52\n")
    settled(folder / "targets.csv")
    assert outcome() == first  # nothing is read within a batch
    now = 1.0
    files.look()
    second = outcome()
    assert second[1] == [2, 5]
    (folder / "field.json").write_text("not a MOC")
    settled(folder / "field.json")
    now = 2.0
    files.look()
    assert outcome() == second
    MOC.from_string("0/0-11").save(folder / "field.json", format="json", overwrite=True)
    (folder / "targets.csv").write_text(original)
    settled(folder / "field.json")
    settled(folder / "targets.csv")
    now = 3.0
    files.look()
    third = outcome()
    assert third[1] == [1, 2, 3, 4, 5]
    assert len({first[0], second[0], third[0]}) == 3
    assert compile_filter(text.replace(" or ", "  or\n "), FIELDS, OUTPUTS, files).revision == third[0]
    assert compile_filter(text.replace("2)", "3)"), FIELDS, OUTPUTS, files).revision != third[0]
