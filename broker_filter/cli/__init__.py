"""The command line: one module a command.

Imports nothing heavy: a command's module imports what it needs inside its `run` function, so that `--help` answers at
once. An error that a person can mend is one line on stderr, never a traceback. The exit status is one for each kind of
end: see EXIT_STATUS.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from broker_filter import __version__
from broker_filter.cli.parser import CommandParser
from broker_filter.console import set_up_logging
from broker_filter.errors import FAILED, BrokerFilterError

COMMANDS = ("score", "run", "replay", "inspect", "models", "reference", "similar", "map", "config", "bench", "demo")
"""Modules of this package in the order of `--help`; each has `add_parser(subparsers)`, which sets `run` to a function
of the parsed arguments that returns the exit status."""

INTERRUPTED = 130
"""What shells give for a process that SIGINT ended: 128 + 2."""
SIGNALLED = 128
"""Added to a signal's number for the exit status of what it ended."""
UNREAD = 0
"""Where the reader of stdout has left, as `head` does: it has what it wanted."""
EXIT_STATUS = (
    "exit status: 0 done; 1 failed at work, as where no alert could be read or no broker answered; 2 the command line "
    "or the service file is wrong, or names a file or a bundle that is not there; 130 interrupted; 143 terminated"
)

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = CommandParser(
        prog="broker-filter",
        description="Kafka or archived nights in, scored and anomaly-flagged astronomical alerts out.",
        epilog=EXIT_STATUS,
    )
    parser.set_defaults(verbose=False, quiet=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        import_module(f"broker_filter.cli.{command}").add_parser(subparsers)
    arguments = parser.parse_args(argv)
    set_up_logging(verbose=arguments.verbose, quiet=arguments.quiet)
    # Ended from outside, a command still closes its files and ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(SIGNALLED + number))
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("broker-filter: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left fails no more at the end
        return UNREAD
    except (BrokerFilterError, OSError) as error:
        if arguments.verbose:
            raise
        print(f"broker-filter: {describe_error(error)}", file=sys.stderr)
        return error.exit_status if isinstance(error, BrokerFilterError) else FAILED
    except Exception:
        log.critical("this is a fault of the program; please report it with this traceback", exc_info=True)
        return FAILED


def describe_error(error: BrokerFilterError | OSError) -> str:
    """Return one line for stderr: the message of an error; for an error of the system, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
