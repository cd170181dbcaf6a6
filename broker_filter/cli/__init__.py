"""The command line: one module for each command.

No module imports a slow library at its top: each command imports what it needs inside its `run` function, so that
`--help` answers at once. An error that a user can mend is one line on stderr, never a traceback. EXIT_STATUS lists the
exit statuses.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from broker_filter import __version__
from broker_filter.cli.parser import CommandParser
from broker_filter.cli.termination import ended_by_sigterm
from broker_filter.console import set_up_logging
from broker_filter.errors import FAILED, BrokerFilterError, is_fault, without_credentials

COMMANDS = (
    "score",
    "run",
    "positions",
    "redrive",
    "replay",
    "inspect",
    "compare-shadow",
    "models",
    "reference",
    "similar",
    "explain",
    "watch",
    "map",
    "config",
    "filters",
    "bench",
    "demo",
)
"""The commands, in the order of `--help`: see `command_module`."""

INTERRUPTED = 130
"""The exit status after SIGINT, as shells report it: 128 + 2."""
UNREAD = 0
"""The exit status if the reader of stdout closes the pipe, as `head` does when it has read enough."""
EXIT_STATUS = (
    "exit status: 0 success; 1 the work failed, for example because no alert could be read or no broker answered; 2 "
    "the command line or the service file is wrong, or names a file or a bundle that does not exist; 130 interrupted; "
    "143 terminated"
)

log = logging.getLogger(__name__)


def command_module(command: str) -> ModuleType:
    """Return the module of a command, which has `_` in its name for each `-` of the command.

    The module has a function `add_parser(subparsers)`, which sets `run` to a function that takes the parsed arguments
    and returns the exit status.
    """
    return import_module(f"broker_filter.cli.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = CommandParser(
        prog="broker-filter",
        description="Scores astronomical alerts, from Kafka or from archives, and flags anomalies.",
        epilog=EXIT_STATUS,
    )
    parser.set_defaults(verbose=False, quiet=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command_module(command).add_parser(subparsers)
    arguments = parser.parse_args(argv)
    set_up_logging(verbose=arguments.verbose, quiet=arguments.quiet)
    try:
        with ended_by_sigterm():
            status = int(arguments.run(arguments))
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("broker-filter: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail
        return UNREAD
    except (BrokerFilterError, OSError) as error:
        if arguments.verbose or is_fault(error):
            raise
        print(f"broker-filter: {describe_error(error)}", file=sys.stderr)
        return error.exit_status if isinstance(error, BrokerFilterError) else FAILED
    except Exception:
        log.critical("this is a fault of the program; please report it with this traceback", exc_info=True)
        return FAILED


def describe_error(error: BrokerFilterError | OSError) -> str:
    """Return one line for stderr: the message of an error; for an error of the system, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{without_credentials(str(error.filename))}: {error.strerror}"
    return str(error)
