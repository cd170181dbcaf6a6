"""Child processes that must not outlive this one, not even where it is killed and can end nothing itself.

Never for what should be ended in good order: the child is killed.
"""

from __future__ import annotations

import subprocess
from typing import Protocol


class Child(Protocol):
    """A process that was started here."""

    @property
    def pid(self) -> int | None:
        """Its id."""

    def kill(self) -> None:
        """Ends it at once."""


class KillWithParent:
    """Holds a child process until it is cut, and kills it where this process is gone before.

    A shell waits on a pipe whose other end this process has. `PR_SET_PDEATHSIG` would do without, but means the thread
    that started the child, and threads come and go.
    """

    def __init__(self, child: Child) -> None:
        command = ["/bin/sh", "-c", "read _; kill -KILL $0", str(child.pid)]
        try:
            # A session of its own: Ctrl-C at the terminal must not end it.
            self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except BaseException:  # nobody holds the child yet: an interrupt would leave it alone
            child.kill()
            raise

    def release(self) -> None:
        """Lets go of the child: to be called before it is waited for, after which its id may be anybody's."""
        self._watcher.kill()
        self._watcher.communicate()
