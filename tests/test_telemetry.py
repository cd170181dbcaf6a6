"""No library that the program loads writes into the user's home or connects to a host that is not configured."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SCORER = """
from broker_filter.config import Runtime
from broker_filter.scoring.scorer import open_scorer
open_scorer(["default"], Runtime())
"""
ENTRIES = {
    "scorer": SCORER,
    "library": "import broker_filter, onnxruntime",
    "benchmark": "import broker_filter.bench.floors",
    "training": "import training.data.datasets, onnxruntime",
}
"""Programs that import onnxruntime in different ways."""
UPLOAD_DELAY_S = 12
"""Seconds to wait; onnxruntime 1.32 looks up its telemetry host 9 to 10 s after the import."""


def new_machine(home: Path) -> dict[str, str]:
    """Return the environment of a new user: without CI, because telemetry is off by itself if CI is set."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(CHECKOUT)}


@pytest.mark.parametrize("code", ENTRIES.values(), ids=ENTRIES)
def test_no_file_is_written_into_the_home_directory(code: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", code], env=new_machine(tmp_path), check=True, stdout=subprocess.DEVNULL)
    assert list(tmp_path.rglob("*")) == []


def test_no_host_is_looked_up_or_connected_to(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("strace (Debian: strace) is not installed")
    home, calls = tmp_path / "home", tmp_path / "calls"
    home.mkdir()
    code = f"{SCORER}\nimport time\ntime.sleep({UPLOAD_DELAY_S})"
    trace = [strace, "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg,openat", "-o", str(calls)]
    done = subprocess.run([*trace, sys.executable, "-c", code], env=new_machine(home), capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"strace may not trace processes here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr

    seen = calls.read_text(errors="replace")
    assert "openat(" in seen, "nothing was traced"
    assert re.findall(r".*(?:resolv\.conf|sa_family=AF_INET).*", seen) == []
