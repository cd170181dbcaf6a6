"""Child processes that must end with this process, even if this process is killed with SIGKILL.

A child gets no chance to end in an orderly way: it is killed.
"""

from __future__ import annotations

import subprocess
from typing import Protocol


class Child(Protocol):
    """A child process that this process has started."""

    @property
    def pid(self) -> int | None:
        """The process id."""

    def kill(self) -> None:
        """Kill the process."""


class KillWithParent:
    """Kills a child process if this process ends before `release` is called.

    A shell waits on a pipe whose other end this process holds. `PR_SET_PDEATHSIG` would need no shell, but it kills the
    child when the thread that started the child ends.
    """

    def __init__(self, child: Child) -> None:
        command = ["/bin/sh", "-c", "read _; kill -KILL $0", str(child.pid)]
        try:
            # The shell has its own session, so that Ctrl-C at the terminal does not end it.
            self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except BaseException:  # without the shell, an interrupt would leave the child running
            child.kill()
            raise

    def release(self) -> None:
        """Stop guarding the child. Call this before waiting for the child: its id may be reused after that."""
        self._watcher.kill()
        self._watcher.communicate()
