"""`filters try` counts what filters pass of a night, and its exit status says whether one passes too much."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_filter.cli import main
from broker_filter.simulate import simulate_night

HEAD = """
input: {bootstrap_servers: "nowhere:9", group_id: me, topics: [ztf], start: earliest}
output: {prefix: me}
"""
FILTERS = """
filters:
  - {name: limited, where: "real > 0.5 and magpsf < 19", max_rate: 0.01}
  - {name: free, where: "real > 0.5 and magpsf < 19"}
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("night")
    for alert in simulate_night(40, seed=3):
        (folder / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    (folder / "damaged.avro").write_bytes(b"Obj\1")
    return folder


@pytest.fixture
def service(tmp_path: Path) -> Path:
    file = tmp_path / "service.yaml"
    file.write_text(HEAD + FILTERS)
    return file


def test_a_night_is_counted_and_drawn(
    simulated: Path, service: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, table = tmp_path / "night.html", tmp_path / "night.csv"
    chosen = ["--where", "real > 0.5 and magpsf < 19", "--rejects", str(tmp_path / "rejects.csv")]
    assert main(["score", str(simulated), *chosen, "--out", str(table)]) == 0
    passed = len(table.read_text().splitlines()) - 1
    assert 1 < passed < 40
    assert main(["filters", "try", str(service), str(simulated), "--out", str(page)]) == 1
    out, err = capsys.readouterr()
    share = f"{passed} of 40 scored alerts pass ({100 * passed / 40:.3g} %)"
    assert "read 41: scored 40, rejected 1, duplicates 0\n" in out
    assert f"\nlimited: {share}, more than the limit of 1 %\n" in out
    assert f"\nfree: {share}, without a limit\n" in out
    assert out.count(" real > 0.5\n") == out.count(" magpsf < 19\n") == 2
    assert out.endswith(f"\n{page}\n")
    assert "these filters pass more than their limit: limited\n" in err
    text = page.read_text()
    assert f"Alerts that pass: {min(passed, 12)} of {passed}, chosen at random" in text


@pytest.mark.parametrize(
    ("limit", "status", "too_many"),
    [("0.001", 1, "limited, free"), ("1", 1, "limited"), ("2", 2, ""), ("0", 2, "")],
)
def test_the_option_limits_filters_that_have_no_limit(
    simulated: Path, service: Path, capsys: pytest.CaptureFixture[str], limit: str, status: int, too_many: str
) -> None:
    command = ["filters", "try", str(service), str(simulated), "--max-rate", limit]
    if status == 2:
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert "must be above 0 and at most 1" in capsys.readouterr().err
        return
    assert main(command) == status
    assert f"these filters pass more than their limit: {too_many}\n" in capsys.readouterr().err


def test_a_page_in_a_missing_folder_is_refused_before_the_night_is_read(
    simulated: Path, service: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["filters", "try", str(service), str(simulated), "--out", str(tmp_path / "none" / "night.html")]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert "there is no folder" in printed.err
    assert printed.out == ""


def test_a_night_within_the_limits_succeeds(simulated: Path, service: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service.write_text(HEAD + FILTERS.replace("0.01", "0.99"))
    assert main(["filters", "try", str(service), str(simulated)]) == 0
    assert "not more than the limit of 99 %" in capsys.readouterr().out


def test_errors_say_what_to_do(
    simulated: Path, service: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(status: int, message: str, *arguments: object) -> None:
        assert main(["filters", "try", *map(str, arguments)]) == status
        assert message in capsys.readouterr().err

    fails(2, "has no filters to try: add a section `filters`", _file(tmp_path, HEAD), simulated)
    misspelt = _file(tmp_path, HEAD + "filters: [{name: a, where: magps < 19}]\n")
    fails(2, "did you mean 'magpsf'?", misspelt, simulated)
    fails(2, "missing", service, tmp_path / "missing")
    page = tmp_path / "page.html"
    page.write_bytes(next(simulated.iterdir()).read_bytes())
    fails(2, "is an input and would be overwritten", service, page, "--out", page)
    fails(1, "no alert could be scored", service, simulated / "damaged.avro")


def _file(folder: Path, text: str) -> Path:
    file = folder / "other.yaml"
    file.write_text(text)
    return file
