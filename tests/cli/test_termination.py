"""Tests of the end after SIGTERM, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

PROGRAM = """
import os, signal, time, weakref
from broker_filter.cli.termination import ended_by_sigterm

class Referent:
    pass

with ended_by_sigterm():
    referent = Referent()
    reference = weakref.ref(referent, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    try:
        {interrupt}
        time.sleep(60)
    finally:
        time.sleep(2.5)
        print("closed")
"""


def run(interrupt: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(interrupt=interrupt)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)


def test_a_command_closes_its_files_before_it_ends() -> None:
    done = run("os.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "closed\n", "")


def test_a_signal_that_comes_in_a_callback_of_the_garbage_collector_ends_the_command() -> None:
    done = run("del referent")
    assert "Exception ignored" in done.stderr
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "closed\n")
