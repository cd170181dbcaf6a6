"""The parser of the command line and of every command: shared error messages, suggestions and examples.

Imports nothing heavy, because every start of the program imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from broker_filter.errors import USAGE, BrokerFilterError, without_credentials

_EXAMPLES = "examples:\n"


class UsageError(BrokerFilterError):
    """Arguments contradict each other, or name something that does not exist."""

    exit_status = USAGE


def require_files(*named: Path | None) -> None:
    """Raise UsageError if a file or folder of the command line does not exist. A path that is None is skipped."""
    for path in named:
        if path is not None and not path.exists():
            raise UsageError(f"{without_credentials(str(path))}: no such file or folder")


class _Help(argparse.HelpFormatter):
    """Wraps descriptions, and keeps the line breaks of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """The parser of a command. An error prints the usage of that command and suggests a similar word.

    `examples`: command lines, shown at the end of the help. `add_subparsers` makes parsers of this class.
    """

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        if examples:
            options["epilog"] = _EXAMPLES + "\n".join(f"  {example}" for example in examples)
        super().__init__(formatter_class=_Help, **options)
        # These options work before and after the command's name. A default would overwrite an option before the name.
        suppressed: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
        self.add_argument("-v", "--verbose", help="log debug messages, and show tracebacks of errors", **suppressed)
        self.add_argument("-q", "--quiet", help="print only warnings and errors: no progress, no summary", **suppressed)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but reports an unknown option with the usage of the command, not of the program."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0], self._options())}")
        return found, unknown

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(choices)}){hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` if one of the `known` words is similar to `word`, else an empty string."""
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
