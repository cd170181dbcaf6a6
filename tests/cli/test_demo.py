"""`broker-filter demo` reports missing packages and wrong arguments before it starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from broker_filter.cli import main


def test_missing_extra_gives_one_line_that_names_it(tmp_path: Path) -> None:
    # This Python process does not find matplotlib, as in an installation without the extra `demo`.
    program = (
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
        "from broker_filter.cli import main\n"
        f"sys.exit(main(['demo', '--out', {str(tmp_path / 'out')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "broker-filter: the demo needs packages that are not installed (matplotlib): "
        "pip install 'broker-filter[demo]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alerts", ["0", "-3", "many"])
def test_number_of_alerts_must_be_positive(alerts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path), "--alerts", alerts])
    assert ended.value.code == 2
    assert "--alerts" in capsys.readouterr().err


def test_unwritable_output_fails_before_work_begins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", "/proc/demo"]) == 1
    assert "/proc/demo" in capsys.readouterr().err
