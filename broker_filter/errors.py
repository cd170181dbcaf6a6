"""The base of every error that a user of the program or of the library can mend, and what its message may show.

A fault of the program (a violated invariant, a bug) must never derive from it: the command line prints one line for a
BrokerFilterError or an error of the operating system, and a traceback for a fault.
"""

from __future__ import annotations

import re
from typing import ClassVar

FAILED = 1
"""Exit status of a command that failed at work, for example because no broker answered."""
USAGE = 2
"""Exit status of a command whose command line, service file, or a name in them is wrong."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")
"""The beginning of a URL, also of one with too few slashes."""


class BrokerFilterError(Exception):
    """An error that the user can mend: the message says what is wrong, where, and what to do.

    `exit_status` is the exit status of a command that ends with this error: FAILED (1) or USAGE (2).

    >>> from broker_filter import BrokerFilterError, open_bundle
    >>> try:
    ...     open_bundle("defualt")
    ... except BrokerFilterError as error:
    ...     print(error.exit_status, str(error).partition("; ")[2])
    2 did you mean 'default'?
    """

    exit_status: ClassVar[int] = FAILED


def is_fault(error: BaseException) -> bool:
    """Return whether an exception is a fault of the program, whose traceback must be logged.

    A BrokerFilterError is not a fault, nor is an OSError with a message, such as a full disk. An OSError without a
    message comes from Python code and not from the system, for example the TimeoutError of a future.
    """
    return not (isinstance(error, BrokerFilterError) or (isinstance(error, OSError) and str(error)))


def without_credentials(location: str) -> str:
    """Return `location` as an error message may show it: `***` replaces the credentials of a URL.

    The URL may be damaged, for example by a mistyped scheme. A path is returned unchanged.
    """
    before, _, after = location.rpartition("@")
    if ":" not in before:
        return location
    scheme = _SCHEME.match(before)
    return f"{scheme[0] if scheme else ''}***@{after}"
