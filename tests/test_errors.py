"""Every exception class of the package is of a known kind: for the user, a fault of the program, or internal."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import broker_filter
import training
from broker_filter.errors import FAILED, USAGE, BrokerFilterError, is_fault

FAULTS = {"PositionError", "UnaccountedError", "UnexpectedMessageError"}
"""Violated invariants: each ends the program with a traceback."""
INTERNAL = {
    "ClaimEndedError",
    "EndedError",
    "FencedError",
    "LetterError",
    "ParquetError",
    "QueryError",
    "RegistryRefusalError",
    "SchemaError",
    "StampError",
    "UnknownSchemaId",
    "_DamagedError",
    "_StoppedError",
    "_UnboundedError",
    "_UnreadableError",
}
"""Answers between modules: the package catches each of them, and rejects a packet, tries again or reports it."""
BASE = re.compile(r"(Error|Exception|Unavailable|Missing|Id)$")
"""Names of the base classes of exceptions."""


def exception_classes() -> list[type[BaseException]]:
    """Return the exception classes that the two packages define, found in the source and imported."""
    found = []
    for package in (broker_filter, training):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
            suspects = [node.name for node in classes if any(BASE.search(ast.unparse(base)) for base in node.bases)]
            if suspects:
                parts = path.relative_to(root.parent).with_suffix("").parts
                module = import_module(".".join(part for part in parts if part != "__init__"))
                found += [getattr(module, name) for name in suspects if hasattr(module, name)]
    return [value for value in found if isinstance(value, type) and issubclass(value, BaseException)]


def test_every_exception_class_is_of_a_known_kind() -> None:
    others = {value.__name__ for value in exception_classes() if not issubclass(value, BrokerFilterError)}
    assert others == FAULTS | INTERNAL


@pytest.mark.parametrize("error", [e for e in exception_classes() if issubclass(e, BrokerFilterError)])
def test_an_error_for_the_user_has_an_exit_status(error: type[BrokerFilterError]) -> None:
    assert error.exit_status in (FAILED, USAGE)


@pytest.mark.parametrize("error", [e for e in exception_classes() if e.__name__ in FAULTS])
def test_a_violated_invariant_is_a_fault(error: type[BaseException]) -> None:
    assert is_fault(error("what is violated"))


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (BrokerFilterError("night.tar: no such file"), False),
        (OSError(28, "No space left on device"), False),
        (TimeoutError(), True),
        (KeyError("x"), True),
    ],
)
def test_an_error_without_a_message_for_the_user_is_a_fault(error: BaseException, fault: bool) -> None:
    assert is_fault(error) == fault
