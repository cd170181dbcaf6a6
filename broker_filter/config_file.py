"""Reads a service file, checks it, and reports all its errors at once."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from broker_filter.config import (
    RELOADED,
    SecretFromEnvironment,
    SecretFromFile,
    Section,
    Service,
    changed_keys,
    suggestion,
)
from broker_filter.config_checks import EnvironmentChecks
from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.streaming.resolved import ResolvedService, Resolver

MAX_FILE_BYTES = 1 << 20
"""A service file has some dozens of lines. A file near this size was named by mistake."""
ENVIRONMENT_PREFIX = "BROKER_FILTER__"


@dataclass(frozen=True, slots=True)
class Problem:
    """One error in a service file: the path of the key (`filters[0].where`, empty for the whole file) and a message."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(BrokerFilterError):
    """A service file cannot be used. `problems` lists all errors in it."""

    exit_status = USAGE

    def __init__(self, file: Path, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n  ".join((f"{file} cannot be used:", *map(str, problems))))


def load_service(file: Path, environment: Mapping[str, str] = os.environ) -> ResolvedService:
    """Read a service file, check all of it, and return it with its opened bundles and compiled filters.

    `environment`: the variable `BROKER_FILTER__INPUT__GROUP_ID=me` overrides the key input.group_id. Values are YAML; a
    value for a section replaces the whole section. Raises ConfigError with all errors.
    """
    try:
        document = _read_yaml(file)
        _override(document, environment)
    except _UnreadableError as error:
        raise ConfigError(file, [Problem("", str(error))]) from None
    resolver = Resolver(_bundles(document), file.parent)
    try:
        config = Service.model_validate(document, context=EnvironmentChecks(environment, resolver))
    except ValidationError as error:
        raise ConfigError(file, list(_describe(error, document))) from None
    return resolver.resolve(config)


def load_again(file: Path, before: Service, environment: Mapping[str, str] = os.environ) -> ResolvedService:
    """Read a service file as `load_service` does, to replace the configuration `before` of a running service.

    Raises ConfigError also for each changed key that a running service cannot change.
    """
    service = load_service(file, environment)
    if fixed := [path for path in changed_keys(before, service.config) if path not in RELOADED]:
        reason = "this key has changed, and a running service cannot change it: restart the service, or undo the change"
        raise ConfigError(file, [Problem(path, reason) for path in fixed])
    return service


class _UnreadableError(Exception):
    """The file cannot be read or is not a YAML mapping, or an override has no place in it."""


class _Loader(yaml.SafeLoader):
    """Loads plain YAML values only, and refuses a mapping with a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise _UnreadableError(f"line {key_node.start_mark.line + 1}: the key {key!r} is repeated")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 -- a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise _UnreadableError(f"{line}not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _UnreadableError(f"not valid YAML: {str(error).splitlines()[0]}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _UnreadableError(str(error.strerror)) from None
    if len(content) > MAX_FILE_BYTES:
        raise _UnreadableError(f"more than {MAX_FILE_BYTES} bytes: not a service file")
    try:
        document = _parse_yaml(content.decode())
    except UnicodeDecodeError:
        raise _UnreadableError("not UTF-8 text") from None
    if not isinstance(document, dict):
        raise _UnreadableError("not a mapping with keys `input` and `output`")
    return document


def _override(document: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Write the values of the BROKER_FILTER__... variables into the document."""
    for variable in sorted(environment):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        *sections, key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        target = document
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise _UnreadableError(f"{variable}: {section} is not a mapping; override it as a whole")
        try:
            target[key] = _parse_yaml(environment[variable])
        except _UnreadableError as error:
            raise _UnreadableError(f"{variable}: {error}") from None


def _bundles(document: dict[str, Any]) -> list[str]:
    """Return the names of the bundles, except shadows, in a document that is not validated yet."""
    models = document.get("models", ["default"])
    entries = models if isinstance(models, list) else []
    plain = [entry if isinstance(entry, dict) else {"bundle": entry} for entry in entries]
    named = [entry.get("bundle") for entry in plain if entry.get("shadow") is not True]
    return [bundle for bundle in named if isinstance(bundle, str)]


def _describe(error: ValidationError, document: Any) -> Iterator[Problem]:
    """Convert pydantic's errors to problems with the path of the key and a plain message."""
    for detail in error.errors(include_url=False, include_input=False):
        keys = list(_keys(detail["loc"], document))
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        match detail["type"]:
            case "extra_forbidden":
                message = "unknown key" + suggestion(str(keys[-1]), _known_keys(keys[:-1]))
            case "missing":
                message = "is required"
            case "model_type":
                message = "should be a mapping"
            case "string_type":
                message = "should be text; put it in quotes"
        yield Problem(path, message)


def _keys(location: Sequence[int | str], document: Any) -> Iterator[int | str]:
    """Return the parts of pydantic's location that are keys of the document; the others name members of unions."""
    for part in location:
        if isinstance(document, list) and isinstance(part, int):
            document = document[part]
        elif isinstance(document, dict) and (part in document or part == location[-1]):
            document = document.get(part)
        else:
            continue
        yield part


def _known_keys(path: Sequence[int | str]) -> list[str]:
    section: type[Section] = Service
    for key in path:
        if key in section.model_fields:
            section = next(_sections(section.model_fields[str(key)].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Return the sections in a field's type: the type itself, the elements of a list, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def document_keys(section: type[Section] = Service, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (path, default, description) for every key of a service file.

    The default is `required` for a required key and empty for a key that may be absent.
    """
    for name, key in section.model_fields.items():
        default = "" if key.default is None or isinstance(key.default, Section | list) else str(key.default)
        yield f"{prefix}{name}", "required" if key.is_required() else default, str(key.description)
        inside = next(_sections(key.annotation), None)
        if inside and inside not in (SecretFromEnvironment, SecretFromFile):
            yield from document_keys(inside, f"{prefix}{name}{'[]' if get_origin(key.annotation) is list else ''}.")
