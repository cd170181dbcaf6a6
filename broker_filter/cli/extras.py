"""Optional packages that a command needs beyond the base installation, and the extra that installs them.

Looks for the packages without importing them.
"""

from __future__ import annotations

from importlib.util import find_spec

from broker_filter.cli.parser import UsageError


class MissingExtraError(UsageError):
    """The installation lacks packages that the command needs."""


def require_extra(extra: str, task: str, *modules: str) -> None:
    """Raise MissingExtraError, which names the extra to install, if a module is not installed.

    `task` begins the message: "the demo" gives "the demo needs packages that are not installed (galsim): ...".
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise MissingExtraError(
            f"{task} needs packages that are not installed ({', '.join(missing)}): pip install 'broker-filter[{extra}]'"
        )
