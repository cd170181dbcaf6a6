"""Filters: one line of text over scores and alert fields, checked when it is compiled and evaluated on whole batches.

The language is a small part of Python's expressions. Text is parsed with `ast` and compiled here; it is never executed
as Python.

- Numbers: metadata columns, `alert_id`, `mjd`, `ra`, `dec`, model outputs, literals; `+ - * /`, `abs(x)`.
- Text: `object_id`, `survey`, `band`, `schema_version`, `reliability_version`, `designation`, literals; only `==`, `!=`
  and `in` compare it.
- A model output is written `<model>.<label>`, or `<label>` if only one model has this label and no field has this name.
A name that is not a Python identifier is written in backquotes: `` `my-model.SN Ia` > 0.5 ``.
- `in_moc("event.fits", 0.9)`: whether the alert is in a region of the sky. `near("targets.csv", 2.0)`: whether a target
  of a list is within this many arcsec. They take names of files; see `broker_filter.sky`.
- `and`, `or`, `not`; comparisons, also chained (`0.3 < real <= 0.65`); `band in ("g", "r")`. A number stands for true
  where it is not zero, as in `not sso`.

A missing value (null, the survey's sentinel, another survey's score, division by zero) makes every comparison with it
neither true nor false, and `not` does not change that, as in SQL: an alert without a magnitude passes neither
`magpsf < 18` nor `not magpsf < 18`. `isnull(x)` is true for a missing value. Alerts pass a filter that is true for
them.
"""

from __future__ import annotations

import ast
import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, AlertBatch, Survey
from broker_filter.packets.surveys import COLUMNS, DESIGNATION
from broker_filter.scoring.scores import output_name
from broker_filter.sky.files import SkyFiles
from broker_filter.sky.region import Region
from broker_filter.sky.tracked import SkyFileError, TrackedFile
from broker_filter.sky.watchlist import NO_TARGET, Nearest, Watchlist
from broker_filter.streaming.scored import ScoredBatch

MAX_LENGTH = 2000
"""Largest length of a filter in characters, which bounds the work of the parser."""
MAX_DEPTH = 50
"""Largest nesting of a filter, far below the interpreter's recursion limit."""
LARGEST_INTEGER = 2**63 - 1
"""The largest integer literal: alert ids are signed 64-bit integers."""

QUOTED = r""""[^"]*"|'[^']*'|`[^`]+`"""
"""Pattern of a string literal, or of a name in backquotes."""
LARGEST_DECLINATION = 90.0
"""The declination of the celestial pole in degrees."""
LARGEST_RADIUS = 180 * 3600.0
"""The largest radius around a target, in arcsec: the whole sky."""
REVISION_DIGITS = 12
"""Hexadecimal digits of a revision: 48 bits, so that even among 100,000 revisions no two are likely to be equal."""

IDENTITY_NUMBERS = ("alert_id", "mjd", "ra", "dec")
IDENTITY_TEXTS = ("object_id", "survey", "band", "schema_version", "reliability_version")
IDENTITY_FIELDS = IDENTITY_NUMBERS + IDENTITY_TEXTS
"""Fields that every alert has. All other fields are columns that are decoded only if they are wanted."""
TEXTS = (*IDENTITY_TEXTS, DESIGNATION.name)
"""Fields that are text. All other fields are numbers."""
FIELDS = tuple(dict.fromkeys((*IDENTITY_FIELDS, DESIGNATION.name, *(column.name for column in COLUMNS))))
"""The names that a filter can use besides model outputs."""


Content = TypeVar("Content")


class ExpressionError(BrokerFilterError, ValueError):
    """A filter cannot be compiled. The message states the column, the error, and a correction if possible."""

    exit_status = USAGE


class Kind(Enum):
    """The type of a part of an expression."""

    NUMBER = "a number"
    TEXT = "text"
    TRUTH = "true or false"


class Truth(NamedTuple):
    """Three-valued truth of N alerts, two bool[N]: `true` and `false`. If both are False, a value was missing."""

    true: NDArray[np.bool_]
    false: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Near:
    """A call of `near` in a filter: `list` is the file as the filter names it, `radius` is in arcsec."""

    list: str
    radius: float
    file: TrackedFile[Watchlist]

    @property
    def call(self) -> str:
        """The call as text, which no field has as its name."""
        return f"near({self.list!r}, {self.radius!r})"

    def find(self, ra: NDArray[np.float64], dec: NDArray[np.float64]) -> Nearest:
        """Return the nearest target of each of N alerts. `ra`, `dec`: degrees; NaN is missing and finds no target."""
        known = _on_sky(ra, dec)
        found = Nearest(np.full(len(ra), NO_TARGET), np.full(len(ra), np.nan))
        found.row[known], found.separation[known] = self.file.content.nearest(ra[known], dec[known], self.radius)
        return found


Values = Any
"""NUMBER: a float or int array, or a scalar; NaN is missing. TEXT: an object array; None is missing. TRUTH: a Truth.
The value of a call of `near` is a Nearest."""
Evaluate = Callable[[Mapping[str, Values]], Values]


NOTHING_FOUND: Mapping[Near, Nearest] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Term:
    """An operand of the outermost `and` of a filter; the whole filter if it has no outermost `and`."""

    text: str
    _evaluate: Evaluate

    def truth(self, values: Mapping[str, Values], n: int) -> Truth:
        """Return for which of `n` alerts the term is true, and for which it is false. `values`: see Expression."""
        with np.errstate(all="ignore"):
            true, false = self._evaluate(values)
        return Truth(np.broadcast_to(true, n), np.broadcast_to(false, n))


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled filter.

    `names`: the fields and outputs (`<model>.<label>`) that it reads. `nears`: its calls of `near`. `files`: the files
    that it reads, in the order of the text. `terms`: its parts; an alert passes if all of them are true.
    """

    text: str
    names: frozenset[str]
    terms: tuple[Term, ...]
    nears: tuple[Near, ...]
    files: tuple[TrackedFile[Any], ...]
    _evaluate: Evaluate

    @property
    def revision(self) -> str:
        """The first REVISION_DIGITS hexadecimal digits of a sha256 over the text and the content of the files.

        White space in the text does not change the revision.
        """
        content = "".join(file.sha256 for file in self.files)
        return hashlib.sha256(f"{normalised(self.text)}{content}".encode()).hexdigest()[:REVISION_DIGITS]

    @property
    def columns(self) -> list[str]:
        """The metadata columns among the names, which must be decoded."""
        return sorted(name for name in self.names if "." not in name and name not in IDENTITY_FIELDS)

    def evaluate(self, scored: ScoredBatch, found: Mapping[Near, Nearest] = NOTHING_FOUND) -> NDArray[np.bool_]:
        """Return for which alerts of a batch the filter is true, bool[N]. `found`: see `holds`."""
        return self.holds(scored.alerts, scored.scores.columns(), found)

    def holds(
        self,
        alerts: AlertBatch,
        outputs: Mapping[str, NDArray[np.float32]],
        found: Mapping[Near, Nearest] = NOTHING_FOUND,
    ) -> NDArray[np.bool_]:
        """Return for which alerts the filter is true, bool[N]. `outputs`: float32[N] by name `<model>.<label>`.

        `found`: results of `nears` for these alerts that are known already. Raises KeyError if the batch lacks a column
        that the filter reads.
        """
        return self.holds_for(self.values(alerts, outputs, found), len(alerts))

    def values(
        self,
        alerts: AlertBatch,
        outputs: Mapping[str, NDArray[np.float32]],
        found: Mapping[Near, Nearest] = NOTHING_FOUND,
    ) -> dict[str, Values]:
        """Return what the filter reads from N alerts, by name. Arguments and errors are those of `holds`."""
        values: dict[str, Values] = {
            name: outputs[name] if name in outputs else field(alerts, name) for name in self.names
        }
        for near in self.nears:
            values[near.call] = found[near] if near in found else near.find(alerts.ra, alerts.dec)
        return values

    def holds_for(self, values: Mapping[str, Values], n: int) -> NDArray[np.bool_]:
        """Return for which of `n` alerts the filter is true, bool[n].

        `values`: for each of `names` an array [n], as `field` returns it, and for each of `nears` the result of `find`
        under the name `call`. Raises KeyError if one is missing.
        """
        with np.errstate(all="ignore"):
            true = self._evaluate(values).true
        return np.broadcast_to(true, n).copy()


def field(alerts: AlertBatch, name: str) -> NDArray[Any]:
    """Return an identity field or metadata column of N alerts: numbers [N], or text (dtype object)[N].

    A missing number is NaN, and a missing text is None. Raises KeyError if the batch has no such column.
    """
    match name:
        case "alert_id" | "mjd" | "ra" | "dec":
            return np.asarray(getattr(alerts, name))
        case "object_id" | "schema_version":
            return np.array(getattr(alerts, name), dtype=object)
        case "reliability_version":
            return np.array(alerts.reliability_version or [None] * len(alerts), dtype=object)
        case DESIGNATION.name:
            if alerts.designation is None:
                raise KeyError(name)
            return np.array(alerts.designation, dtype=object)
        case "survey":
            return np.array([str(survey) for survey in Survey], dtype=object)[alerts.survey]
        case "band":
            known = alerts.band != UNKNOWN_BAND
            return np.asarray(np.where(known, np.array(BANDS, dtype=object)[alerts.band * known], None))
        case _:
            return alerts.column(name)


def compile_filter(
    text: str, fields: Sequence[str], outputs: Sequence[str] | None, files: SkyFiles | None = None
) -> Expression:
    """Compile a filter.

    `fields`: the identity fields and metadata columns that the filter may use. `outputs`: the names of the models'
    outputs, `<model>.<label>`. If `outputs` is None, any other name is accepted as an output. `files`: reads the files
    that the filter names; if it is None, the filter may name none. Raises ExpressionError if the text is not a valid
    filter, or if a file cannot be used.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"a filter of {len(text)} characters; at most {MAX_LENGTH} are allowed")
    source, quoted = _take_quoted_names(" ".join(text.splitlines()).lstrip())
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        column = error.offset or 1
        hint = "; `==` compares" if source[column - 1 : column] == "=" else ""
        raise ExpressionError(f"character {column}: {error.msg}{hint}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # from deep nesting and null characters
        raise ExpressionError(f"not an expression: {error}") from None
    compiler = _Compiler(fields, outputs, quoted, files)
    evaluate = compiler.truth(tree.body, depth=0)
    operands = tree.body.values if _is_conjunction(tree.body) else [tree.body]
    terms = tuple(Term(_written(source, operand, quoted), compiler.truth(operand, depth=1)) for operand in operands)
    nears, read = tuple(dict.fromkeys(compiler.nears)), tuple(dict.fromkeys(compiler.files))
    return Expression(text, frozenset(compiler.names), terms, nears, read, evaluate)


def _is_conjunction(node: ast.expr) -> TypeGuard[ast.BoolOp]:
    return isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And)


def _written(source: str, node: ast.expr, quoted: Mapping[str, str]) -> str:
    """Return the text of a part of a filter, with the names in backquotes as they were written."""
    text = ast.get_source_segment(source, node) or ""
    return reduce(lambda so_far, name: so_far.replace(name, f"`{quoted[name]}`"), quoted, text)


def normalised(text: str) -> str:
    """Return the text of a filter with one space for each run of white space outside of literals and quoted names."""
    return re.sub(rf"({QUOTED})|\s+", lambda match: match[1] or " ", text.strip())


def _take_quoted_names(source: str) -> tuple[str, dict[str, str]]:
    """Replace each name in backquotes, outside of string literals, by a placeholder of the same length.

    Returns the new text, and the names by placeholder.
    """
    quoted: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        token = match[0]
        if not token.startswith("`"):
            return token
        name = f"_{len(quoted)}".ljust(len(token), "_")
        quoted[name] = token[1:-1]
        return name

    return re.sub(QUOTED, placeholder, source), quoted


@dataclass(frozen=True, slots=True)
class _Part:
    """A compiled part of an expression."""

    kind: Kind
    evaluate: Evaluate


class _Compiler:
    """Compiles a syntax tree to closures, and collects what is read. Raises ExpressionError if invalid."""

    def __init__(
        self,
        fields: Sequence[str],
        outputs: Sequence[str] | None,
        quoted: Mapping[str, str],
        files: SkyFiles | None,
    ) -> None:
        self.names: set[str] = set()
        self.nears: list[Near] = []
        self.files: list[TrackedFile[Any]] = []
        self._files = files
        self._quoted = quoted
        self._closed = outputs is not None
        outputs = outputs or ()
        short = Counter(output.rpartition(".")[2] for output in outputs)
        self._known = {output.rpartition(".")[2]: output for output in outputs}
        self._ambiguous = {label for label, models in short.items() if models > 1}
        self._known |= {name: name for name in (*outputs, *fields)}

    def truth(self, node: ast.expr, depth: int) -> Evaluate:
        """Compile `node` to a function that returns a Truth."""
        part = self._part(node, depth)
        match part.kind:
            case Kind.TRUTH:
                return part.evaluate
            case Kind.NUMBER:
                number = part.evaluate
                return lambda values: _not_zero(number(values))
            case Kind.TEXT:
                raise _refusal(node, "this is text, but a truth value is needed; compare the text with `==` or `in`")

    def number(self, node: ast.expr, depth: int) -> Evaluate:
        """Compile `node` to a function that returns a number."""
        part = self._part(node, depth)
        if part.kind is not Kind.NUMBER:
            raise _refusal(node, f"a number is needed here, but this is {part.kind.value}")
        return part.evaluate

    def _part(self, node: ast.expr, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise _refusal(node, f"nested deeper than {MAX_DEPTH}")
        match node:
            case ast.Constant():
                return self._literal(node)
            case ast.Name() | ast.Attribute():
                return self._name(node)
            case ast.BoolOp(op=op, values=operands):
                combine = _both if isinstance(op, ast.And) else _either
                truths = [self.truth(operand, depth + 1) for operand in operands]
                return _Part(Kind.TRUTH, lambda values: reduce(combine, (truth(values) for truth in truths)))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                negated = self.truth(operand, depth + 1)
                return _Part(Kind.TRUTH, lambda values: _opposite(negated(values)))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number = self.number(operand, depth + 1)
                return _Part(Kind.NUMBER, number if isinstance(sign, ast.UAdd) else lambda values: -number(values))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                compute, a, b = _ARITHMETIC[type(op)], self.number(left, depth + 1), self.number(right, depth + 1)
                return _Part(Kind.NUMBER, lambda values: compute(a(values), b(values)))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                lefts = [left, *rights]
                pairs = [self._comparison(*pair, depth + 1) for pair in zip(lefts, ops, rights, strict=False)]
                return _Part(Kind.TRUTH, lambda values: reduce(_both, (pair(values) for pair in pairs)))
            case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
                number = self.number(argument, depth + 1)
                return _Part(Kind.NUMBER, lambda values: np.abs(number(values)))
            case ast.Call(func=ast.Name(id="isnull"), args=[argument], keywords=[]):
                return self._is_null(argument, depth + 1)
            case ast.Call(func=ast.Name(id="in_moc"), args=[file, *level], keywords=[]) if len(level) <= 1:
                return self._in_moc(file, level[0] if level else None)
            case ast.Call(func=ast.Name(id="near"), args=[file, radius], keywords=[]):
                return self._near(file, radius)
            case ast.Call():
                raise _refusal(
                    node,
                    "the only functions are abs(x), isnull(x), in_moc(file), in_moc(file, level), near(file, arcsec)",
                )
            case _:
                raise _refusal(node, f"filters do not support this ({type(node).__name__})")

    def _in_moc(self, file: ast.expr, level: ast.expr | None) -> _Part:
        p = None if level is None else _constant(level, "a level", 1)
        tracked: TrackedFile[Region] = self._read(file, lambda files, name: files.region(name, p))

        def evaluate(values: Mapping[str, Values]) -> Truth:
            ra, dec = values["ra"], values["dec"]
            known = _on_sky(ra, dec)
            inside = np.zeros(len(ra), np.bool_)
            inside[known] = tracked.content.contains(ra[known], dec[known])
            return Truth(inside, known & ~inside)

        return _Part(Kind.TRUTH, evaluate)

    def _near(self, file: ast.expr, radius: ast.expr) -> _Part:
        arcsec = _constant(radius, "a radius in arcsec", LARGEST_RADIUS)
        tracked = self._read(file, lambda files, name: files.watchlist(name))
        near = Near(_file_name(file), arcsec, tracked)
        self.nears.append(near)

        def evaluate(values: Mapping[str, Values]) -> Truth:
            found: Nearest = values[near.call]
            within = found.row != NO_TARGET
            return Truth(within, _on_sky(values["ra"], values["dec"]) & ~within)

        return _Part(Kind.TRUTH, evaluate)

    def _read(self, file: ast.expr, read: Callable[[SkyFiles, str], TrackedFile[Content]]) -> TrackedFile[Content]:
        """Return the file that an argument names, and note that the filter reads it and needs positions."""
        name = _file_name(file)
        if self._files is None:
            raise _refusal(
                file, "a filter cannot read files here; in_moc and near work in a service file and in `score`"
            )
        try:
            tracked = read(self._files, name)
        except SkyFileError as error:
            raise _refusal(file, str(error)) from None
        self.files.append(tracked)
        self.names.update(("ra", "dec"))
        return tracked

    def _literal(self, node: ast.Constant) -> _Part:
        literal = node.value
        if isinstance(literal, str):
            text = np.array(literal, dtype=object)
            return _Part(Kind.TEXT, lambda _: text)
        if isinstance(literal, bool) or not isinstance(literal, int | float):
            raise _refusal(node, f"{literal!r} is neither a number nor text; write `x`, `not x` or `isnull(x)`")
        if abs(literal) > LARGEST_INTEGER and isinstance(literal, int):
            raise _refusal(node, "this integer needs more than 64 bits")
        return _Part(Kind.NUMBER, lambda _: literal)

    def _name(self, node: ast.Name | ast.Attribute) -> _Part:
        match node:
            case ast.Name(id=written):
                written = self._quoted.get(written, written)
            case ast.Attribute(value=ast.Name(id=model), attr=label):
                written = output_name(model, label)
            case _:
                raise _refusal(node, "a name has at most one dot: `<model>.<label>`")
        if written in self._ambiguous and self._known[written] != written:
            raise _refusal(node, f"more than one model has an output {written!r}; write `<model>.{written}`")
        if self._closed and written not in self._known:
            close = get_close_matches(written, self._known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(sorted(self._known))}"
            raise _refusal(node, f"unknown name {written!r}; {hint}")
        name = self._known.get(written, written)
        self.names.add(name)
        return _Part(Kind.TEXT if name in TEXTS else Kind.NUMBER, lambda values: values[name])

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr, depth: int) -> Evaluate:
        match op:
            case ast.In() | ast.NotIn():
                if not isinstance(right, ast.Tuple | ast.List) or not right.elts:
                    raise _refusal(right, '`in` is followed by values in parentheses: `band in ("g", "r")`')
                equals = [self._comparison(left, ast.Eq(), element, depth + 1) for element in right.elts]
                if isinstance(op, ast.In):
                    return lambda values: reduce(_either, (equal(values) for equal in equals))
                return lambda values: _opposite(reduce(_either, (equal(values) for equal in equals)))
            case ast.Is() | ast.IsNot():
                raise _refusal(right, "filters do not support `is`; write `==`, or isnull(x)")
        a, b = self._part(left, depth), self._part(right, depth)
        if a.kind is not b.kind or a.kind is Kind.TRUTH:
            raise _refusal(right, f"{a.kind.value} cannot be compared with {b.kind.value}")
        if a.kind is Kind.TEXT and not isinstance(op, ast.Eq | ast.NotEq):
            raise _refusal(right, "text can only be compared with `==`, `!=` and `in`")
        compare = _COMPARISONS[type(op)]

        def evaluate(values: Mapping[str, Values]) -> Truth:
            x, y = a.evaluate(values), b.evaluate(values)
            known = ~(_missing(x) | _missing(y))
            holds = np.asarray(compare(x, y), dtype=np.bool_)
            return Truth(known & holds, known & ~holds)

        return evaluate

    def _is_null(self, argument: ast.expr, depth: int) -> _Part:
        part = self._part(argument, depth)
        if part.kind is Kind.TRUTH:
            raise _refusal(argument, "isnull(x) needs a field, a score or a number")

        def evaluate(values: Mapping[str, Values]) -> Truth:
            missing = _missing(part.evaluate(values))
            return Truth(missing, ~missing)

        return _Part(Kind.TRUTH, evaluate)


_COMPARISONS: dict[type[ast.cmpop], Callable[[Values, Values], Values]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Values, Values], Values]] = {
    # Always in float64, because 64-bit integers would overflow without an error.
    ast.Add: lambda a, b: np.add(a, b, dtype=np.float64),
    ast.Sub: lambda a, b: np.subtract(a, b, dtype=np.float64),
    ast.Mult: lambda a, b: np.multiply(a, b, dtype=np.float64),
    ast.Div: lambda a, b: np.where(np.equal(b, 0), np.nan, np.divide(a, b, dtype=np.float64)),
}


def _file_name(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(name)) if name:
            return name
    raise _refusal(node, 'the name of a file in quotes is needed here, such as "targets.csv" or "event.fits"')


def _constant(node: ast.expr, what: str, largest: float) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and 0 < number <= largest:
            return float(number)
    raise _refusal(node, f"{what} is needed here: a number above 0 and at most {largest:g}")


def _on_sky(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which positions exist, bool[N]. Arguments: degrees [N]."""
    return np.isfinite(ra) & (np.abs(dec) <= LARGEST_DECLINATION)


def _refusal(node: ast.expr, what: str) -> ExpressionError:
    return ExpressionError(f"character {node.col_offset + 1}: {what}")


def _missing(value: Values) -> NDArray[np.bool_]:
    """Return where a number is NaN or a text is None, as a bool array or scalar."""
    array = np.asarray(value)
    return np.asarray(array == None if array.dtype == object else np.isnan(array), dtype=np.bool_)  # noqa: E711


def _not_zero(number: Values) -> Truth:
    known = ~_missing(number)
    zero = np.equal(number, 0)
    return Truth(known & ~zero, known & zero)


def _opposite(a: Truth) -> Truth:
    return Truth(a.false, a.true)


def _both(a: Truth, b: Truth) -> Truth:
    return Truth(a.true & b.true, a.false | b.false)


def _either(a: Truth, b: Truth) -> Truth:
    return Truth(a.true | b.true, a.false & b.false)
