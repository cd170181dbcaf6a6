"""The reference pages, generated from the code: a small Sphinx extension.

A page below docs/ says with a line `<!-- generated: NAME -->` where the text of the function `NAME` in `GENERATED`
goes. Each function returns Markdown. A hand-written copy of what the code says must never stand beside it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import broker_filter
from broker_filter.cli import COMMANDS, EXIT_STATUS, command_module
from broker_filter.cli.parser import CommandParser
from broker_filter.config_file import document_keys
from broker_filter.metrics import Metrics
from broker_filter.packets import batch, packet, rejects
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.surveys import COLUMNS, DESIGNATION, Derived, Source
from broker_filter.packets.surveys import Field as PacketField
from broker_filter.scoring import scores
from broker_filter.tables.rows import table_schema

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PROGRAM = "broker-filter"
USAGE_WIDTH = 88
"""Columns that a usage is wrapped to: as many as the page has room for."""
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
CODE = re.compile(r"(`[^`]*`)")
MARKUP = re.compile(r"([\\*_<>\[\]#])")


def command_line() -> str:
    """Return a section for each command: usage, description, arguments and options, examples."""
    parser = CommandParser(prog=PROGRAM)
    commands = parser.add_subparsers()
    for name in COMMANDS:
        command_module(name).add_parser(commands)
    common = {action.dest for action in parser._actions}
    return "\n".join(_command(found, common) for found in _parsers(commands)) + f"\n{_sentence(EXIT_STATUS)}\n"


def _parsers(commands: argparse.Action) -> Iterator[tuple[int, CommandParser, str]]:
    """Yield each parser below `commands`, with its depth and its line in the list of commands.

    The outermost parsers have the depth 0.
    """
    assert isinstance(commands, argparse._SubParsersAction)
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    for name, parser in commands.choices.items():
        yield 0, parser, helps[name]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from ((depth + 1, inner, text) for depth, inner, text in _parsers(action))


def _command(found: tuple[int, CommandParser, str], common: set[str]) -> str:
    """Return the section of one command, without the options `common` to all commands."""
    depth, parser, text = found
    formatter = argparse.HelpFormatter(prog=parser.prog)
    rows = []
    for action in parser._actions:
        if action.dest in common or isinstance(action, argparse._SubParsersAction):
            continue
        values = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        if not action.option_strings:
            values = formatter._format_args(action, formatter._get_default_metavar_for_positional(action))
        name = " ".join((", ".join(action.option_strings), values)).strip()
        rows.append((f"`{name}`", _markdown(formatter._expand_help(action)) if action.help else ""))
    usage = parser.format_usage().removeprefix("usage: ")
    parts = [
        f"{'#' * (depth + 2)} {parser.prog}",
        _sentence(_markdown(parser.description or text)),
        f"```text\n{_usage(usage)}\n```",
        _table(("argument", "meaning"), rows) if rows else "",
        f"```bash\n{textwrap.dedent(parser.epilog.partition(chr(10))[2])}\n```" if parser.epilog else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(usage: str) -> str:
    """Return a usage on lines of one width, whatever the width of the terminal is. An option stays beside its value."""
    words = re.findall(r"\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]|\S+", " ".join(usage.split()))
    kept = [word.replace(" ", "\0") for word in words if word not in ("[-h]", "[-v]", "[-q]")]
    lines = textwrap.wrap(" ".join(kept), USAGE_WIDTH, subsequent_indent=" " * 4, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def configuration_keys() -> str:
    """Return the keys at the top of a service file, and a table for each of its sections."""
    keys = list(document_keys())
    sections = [(section, list(inside)) for section, inside in groupby(keys, lambda key: re.split(r"[.\[]", key[0])[0])]
    head = ("key", "default", "meaning")
    texts = ["## Top level", _table(head, (_key(*inside[0]) for _, inside in sections))]
    for section, inside in sections:
        if len(inside) > 1:
            texts += [f"## {section}", _markdown(inside[0][2]), _table(head, (_key(*key) for key in inside[1:]))]
    return "\n\n".join(texts)


def _key(path: str, default: str, meaning: str) -> tuple[str, str, str]:
    shown = default if default in ("", "required") else f"`{default}`"
    return f"`{path}`", shown, _markdown(meaning)


def metrics() -> str:
    """Return a table of every metric that the service exports, besides those of its process."""
    registry = CollectorRegistry()
    Metrics(registry)
    rows = []
    for collector in registry._collector_to_names:
        if isinstance(collector, MetricWrapperBase):
            [metric] = collector.describe()
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            labels = ", ".join(f"`{label}`" for label in collector._labelnames)
            rows.append((f"`{name}`", metric.type, labels, _markdown(metric.documentation)))
    return _table(("metric", "type", "labels", "meaning"), rows)


def reject_reasons() -> str:
    """Return a table of every reason of the closed list."""
    meanings = _attribute_docstrings(RejectReason)
    return _table(("reason", "meaning"), ((f"`{reason}`", _markdown(meanings[reason.name])) for reason in RejectReason))


def metadata_columns() -> str:
    """Return a table of every metadata column, with the fields of a packet that each survey's values come from."""
    rows = [
        (f"`{column.name}`", column.unit, _markdown(column.meaning), _source(column.ztf), _source(column.lsst))
        for column in COLUMNS
    ]
    ztf, lsst = (_source(PacketField(paths)) for paths in (DESIGNATION.ztf, DESIGNATION.lsst))
    rows.append((f"`{DESIGNATION.name}`", "text", _markdown(DESIGNATION.meaning), ztf, lsst))
    return _table(("column", "unit", "meaning", "ZTF", "LSST"), rows)


def _source(source: Source | None) -> str:
    match source:
        case None:
            return ""
        case PacketField():
            return " or ".join(f"`{path}`" for path in source.paths)
        case Derived():
            return f"from {', '.join(dict.fromkeys(_source(field) for field in source.fields))}"
        case _:
            return "the light curve"


def table_columns() -> str:
    """Return a table of the columns that `broker-filter score` writes."""
    schema = table_schema(["<model>.<label>"], ["<policy>"], ["<model>"])
    rows = []
    for column in schema:
        about = {name.decode(): value.decode() for name, value in column.metadata.items()}
        rows.append((f"`{column.name}`", _arrow_type(column.type), about["unit"], _markdown(about["description"])))
    return _table(("column", "type", "unit", "meaning"), rows)


def _arrow_type(kind: pa.DataType) -> str:
    """Return the name of a type as numpy has it; Arrow calls float32 `float`."""
    if pa.types.is_list(kind):
        return f"list of {_arrow_type(kind.value_type)}"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))


def output_schema() -> str:
    """Return a table of the fields of each record type in the schema of a scored record."""
    schema = json.loads((files("broker_filter.schemas") / "scored_alert.avsc").read_text())
    texts = []
    for path, record in _avro_records("", schema):
        rows = (
            (f"`{field['name']}`", f"`{_avro_type(field['type'])}`", _markdown(field.get("doc", "")))
            for field in record["fields"]
        )
        place = f"The type of `{path}`." if path else "The record."
        texts += [f"## {record['name']}", place, _table(("field", "type", "meaning"), rows)]
    return "\n\n".join(texts)


def _avro_records(path: str, schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each record type in a schema, with the path of the field that holds it."""
    match schema:
        case list():
            for branch in schema:
                yield from _avro_records(path, branch)
        case {"type": "array", "items": items}:
            yield from _avro_records(f"{path}[]", items)
        case {"type": "record"}:
            yield path, schema
            for field in schema["fields"]:
                yield from _avro_records(f"{path}.{field['name']}".lstrip("."), field["type"])


def _avro_type(schema: Any) -> str:
    match schema:
        case str():
            return schema
        case list():
            return " or ".join(_avro_type(branch) for branch in schema)
        case {"type": "array", "items": items}:
            return f"array of {_avro_type(items)}"
        case {"type": "map", "values": values}:
            return f"map of {_avro_type(values)}"
        case {"type": "record", "name": str(name)}:
            return name
        case {"logicalType": str(logical)}:
            return logical
    raise TypeError(f"scored_alert.avsc: no name for the type {schema!r}")


def library() -> str:
    """Return the documentation of the package, and of every name in `broker_filter.__all__`."""
    names = broker_filter.__all__
    texts = [f"## {name}\n\n{_autodoc(f'broker_filter.{name}', getattr(broker_filter, name))}" for name in names]
    return "\n".join(["```{eval-rst}\n.. automodule:: broker_filter\n   :no-members:\n```\n", *texts])


def library_values() -> str:
    """Return the documentation of the other classes whose instances the library takes and returns, by module."""
    public = [getattr(broker_filter, name) for name in broker_filter.__all__]
    sections = []
    for module in (packet, batch, rejects, scores):
        classes = [value for value in vars(module).values() if inspect.isclass(value) and value not in public]
        own = [value for value in classes if value.__module__ == module.__name__]
        texts = [_autodoc(f"{module.__name__}.{value.__name__}", value) for value in own]
        sections.append(f"## {module.__name__}\n\n" + "\n".join(texts))
    return "\n".join(sections)


def _autodoc(path: str, value: object) -> str:
    """Return the directive that documents a class, an exception or a function."""
    if not inspect.isclass(value):
        return f"```{{eval-rst}}\n.. autofunction:: {path}\n```\n"
    if issubclass(value, BaseException):
        return f"```{{eval-rst}}\n.. autoexception:: {path}\n```\n"
    return f"```{{eval-rst}}\n.. autoclass:: {path}\n   :members:\n```\n"


GENERATED: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        command_line,
        configuration_keys,
        metrics,
        reject_reasons,
        metadata_columns,
        table_columns,
        output_schema,
        library,
        library_values,
    )
}
"""What a marker can name."""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table whose rows become blocks on a narrow screen. The cells are Markdown of one line each."""
    lines = [head, ("---",) * len(head), *rows]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return f":::{{container}} stacked\n\n{table}\n\n:::\n"


def _markdown(text: str) -> str:
    """Return plain text, in which backquotes mark code, as one line of Markdown."""
    pieces = CODE.split(" ".join(text.split()))
    return "".join(piece if CODE.fullmatch(piece) else MARKUP.sub(r"\\\1", piece) for piece in pieces)


def _sentence(text: str) -> str:
    """Return a text that begins with a capital letter and ends with a full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Return the string literals below the attributes of a class, by the name of the attribute."""
    [definition] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in pairwise(definition.body):
        match statement, following:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


def generate(text: str) -> str:
    """Return the text of a page with every marker replaced. Raises KeyError for a name that is not in `GENERATED`."""
    return MARKER.sub(lambda marker: GENERATED[marker[1]](), text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Replace the markers of each page before Sphinx parses it."""

    def on_source_read(_app: Sphinx, _page: str, source: list[str]) -> None:
        source[0] = generate(source[0])

    app.connect("source-read", on_source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
