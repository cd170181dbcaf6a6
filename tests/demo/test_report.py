"""The rows of the demonstration's contact sheet."""

from __future__ import annotations

from broker_filter.demo.report import contact_sheet_rows
from broker_filter.demo.results import Alert, Results


def lsst_alert(number: int, flux: float) -> Alert:
    """Return the fields that the sheet reads of an alert that is classified as real; `flux`: nJy."""
    return {
        "diaSourceId": number,
        "diaSource": {"psfFlux": flux},
        "broker_filter": {"duplicate": False, "models": [{"model": "default", "outputs": {"real": 0.8}}]},
    }


def test_the_most_frequent_kind_is_shown_first_and_a_bright_error_last() -> None:
    kinds = {1: "dipole", 2: "variable_star", 3: "asteroid", 4: "asteroid", 5: "variable_star", 6: "asteroid"}
    scored = [lsst_alert(number, 1e5 / number) for number in kinds]
    [row] = contact_sheet_rows(Results(scored=scored), kinds)
    assert row.title == "LSST: classified as real"
    assert row.kinds == ["asteroid", "variable_star", "dipole"]
    assert [alert["diaSourceId"] for alert in row.alerts] == [3, 2, 1]
