"""The parser of the command line and of every command: one way to complain, to suggest and to show examples.

Imports nothing heavy: every start of the program imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

USAGE = 2
"""Exit status of a command line, a service file or a name in them that is wrong."""
_EXAMPLES = "examples:\n"


class UsageError(Exception):
    """Arguments that do not go together, or name what is not there."""

    exit_status = USAGE


def require_files(*named: Path | None) -> None:
    """Raises UsageError where a file or folder that the command line names is not there; None stands for none named."""
    for path in named:
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file or folder")


class _Help(argparse.HelpFormatter):
    """Wraps descriptions and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """A command's parser. An error shows the usage of that very command, and suggests what may have been meant.

    `examples`: command lines, shown at the end of the help. `add_subparsers` makes parsers of this class.
    """

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        if examples:
            options["epilog"] = _EXAMPLES + "\n".join(f"  {example}" for example in examples)
        super().__init__(formatter_class=_Help, **options)
        # Before the command and after it. A command's own default would undo what stands before it.
        suppressed: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
        self.add_argument("-v", "--verbose", help="debug lines in the log, tracebacks with errors", **suppressed)
        self.add_argument("-q", "--quiet", help="no progress and no account: warnings and errors only", **suppressed)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, except that the command itself refuses what it does not know."""
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
    """`; did you mean 'x'?` where one of the `known` words is much like `word`; else nothing."""
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
