"""Child processes that must not outlive this one, not even where it is killed and can end nothing itself.

Never for what should be ended in good order: whoever hangs on a lifeline is killed.
"""

from __future__ import annotations

import subprocess


class Lifeline:
    """Holds a child process until it is cut, and kills it where this process is gone before.

    A shell waits on a pipe whose other end this process has. `PR_SET_PDEATHSIG` would do without, but means the thread
    that started the child, and threads come and go.
    """

    def __init__(self, process_id: int) -> None:
        # A session of its own: Ctrl-C at the terminal must not end it.
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", "read _; kill -KILL $0", str(process_id)], stdin=subprocess.PIPE, start_new_session=True
        )

    def cut(self) -> None:
        """Lets go of the child: to be called before it is waited for, after which its id may be anybody's."""
        self._watcher.kill()
        self._watcher.communicate()
