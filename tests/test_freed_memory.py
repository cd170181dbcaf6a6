"""Memory that was freed serves the next blocks, without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, sys, threading
from broker_filter.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    blank = bytearray(130_000)
    for turn in range(4):
        before = faults()
        blocks = [bytes(blank) for _ in range(500)]
        del blocks
    print(faults() - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
PAGES = 500 * 130_000 // 4096
"""The pages of the blocks of one turn."""


def _faults(choice: str) -> int:
    done = subprocess.run([sys.executable, "-c", CHILD, choice], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_the_last_turn_takes_its_blocks_from_the_freed_ones() -> None:
    if _faults("default") < PAGES / 2:
        pytest.skip("this C library keeps freed memory without being told")
    assert _faults("keep") < PAGES / 100
