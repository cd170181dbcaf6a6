"""`broker-filter score`: scores archived alerts and writes a table with one row for each alert."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.archived import keep_inputs
from broker_filter.cli.options import INPUT_HELP, STDIN, add_cache_option, add_device_option, add_registry_option
from broker_filter.cli.parser import UsageError
from broker_filter.errors import without_credentials

if TYPE_CHECKING:
    import pyarrow as pa

    from broker_filter.streaming.account import Account

FORMATS = ("parquet", "avro", "jsonl", "csv", "ecsv", "fits")
"""The formats of `tables.formats`, repeated here because importing that module would slow down `--help`."""

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `score` to the parser."""
    parser = subparsers.add_parser(
        "score",
        help="score archived alerts into a table",
        description="Scores every alert of files, folders and archives, and writes a table with one row for each "
        "alert. A rejected input has a row too, with the reason. Ends with status 1 if no alert could be read.",
        examples=(
            "broker-filter score ztf_public_20260225.tar.gz --out night.parquet",
            "broker-filter score nights/ --model default --model ./mine --out nights.fits --rejects rejects.csv",
            "broker-filter score nights/ --where 'real > 0.65 and magpsf < 18.5' --out bright.parquet",
            "curl -L URL | broker-filter score - --out - | jq 'select(.default__real > 0.9)'",
        ),
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT_HELP)
    parser.add_argument(
        "--out",
        type=_table,
        required=True,
        metavar="FILE",
        help=f"table to write; its name ends with the format: {', '.join(f'.{name}' for name in FORMATS)}; `-` for "
        "standard output",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the table, if the name of --out does not give it (default for `-`: jsonl)",
    )
    parser.add_argument(
        "--partition-by",
        choices=["mjd"],
        help="write a directory --out of Parquet files by night, night=YYYYMMDD/scores.parquet, instead of one table; "
        "a night has its date in UTC (ZTF), or the date half a day earlier (LSST, as day_obs)",
    )
    parser.add_argument(
        "--rejects",
        type=_table,
        metavar="FILE",
        help="write the rows of rejected inputs to this table instead of --out; then every row of --out has an alert "
        "id, a time and a position",
    )
    parser.add_argument(
        "--model", action="append", metavar="BUNDLE", help="bundle to score with; may be repeated (default: `default`)"
    )
    parser.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="write only the scored alerts that pass this filter, an expression over scores and alert fields as in a "
        "service file, such as 'real > 0.65 and magpsf < 18.5'; rejected inputs keep their rows",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        choices=["ztf", "lsst"],
        metavar="SURVEY",
        help="also score alerts of this survey, although the bundles were not trained for it; may be repeated",
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="POLICY=OUTPUT",
        help="add a column that says whether the object has passed a policy of the Bright Transient Survey (bts_p1, "
        "bts_p2, prod_p1, prod_p2) up to this alert, from the scores of an output; for example bts_p1=btsbot.bts. "
        "Alerts must be in order of time. May be repeated",
    )
    add_registry_option(parser)
    add_cache_option(parser)
    add_device_option(parser)
    parser.add_argument("--fail-on-reject", action="store_true", help="end with status 1 if any input was rejected")
    parser.set_defaults(run=run)


def _table(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{without_credentials(text)}: tables are written to files, not to URLs; write a file and copy it there"
        )
    return Path(text)


def run(arguments: argparse.Namespace) -> int:
    """Score the inputs, print the counts and return the exit status."""
    from broker_filter.console import progress
    from broker_filter.packets.compiled import why_python
    from broker_filter.packets.schemas.registry import open_registry
    from broker_filter.scoring.scorer import Scorer
    from broker_filter.streaming.account import Account, account_batch
    from broker_filter.streaming.archives import check_inputs
    from broker_filter.streaming.expressions import ExpressionError
    from broker_filter.tables.archive_scores import ArchiveScores
    from broker_filter.tables.rows import STDOUT, check_format, partial_path

    written = _written_tables(arguments)
    by_night = arguments.partition_by is not None
    if by_night:
        _check_partitions(arguments)
    files = {path: kind for path, kind in written.items() if not (by_night and path == arguments.out)}
    for path, kind in files.items():
        check_format(path, kind)
    own = {file for path in files if path != STDOUT for file in (path, partial_path(path))}
    for file in own:
        keep_inputs(file, arguments.inputs)
    if why_python:
        log.warning("%s", why_python)
    check_inputs(arguments.inputs)
    scorer = Scorer.open(arguments.model or ["default"], also=arguments.also, device=arguments.device)
    registry = open_registry(arguments.schema_registry, drop_cache=arguments.drop_schema_cache)
    try:
        scores = ArchiveScores(
            arguments.inputs,
            scorer,
            schema_registry=registry,
            policies=arguments.policy,
            where=arguments.where,
            skip=own,
        )
    except ExpressionError as error:
        raise UsageError(f"--where: {error}") from error
    gc.freeze()  # full collections then skip the objects that start-up created
    account, decoded, passed, started = Account(), 0, 0, time.monotonic()
    try:
        with (
            _open_tables(written, scores.schema, by_night) as write,
            progress("Scoring", share=scores.share_read) as advance,
        ):
            for batch, rows in scores:
                write(rows)
                of_batch = account_batch(batch)
                account.add(of_batch)
                decoded += len(batch.alerts)
                passed += len(rows) - len(batch.rejects)
                advance(of_batch.consumed)
    except BaseException:
        if decoded:
            for path in written:
                if path != STDOUT:
                    log.warning(
                        "the run ended early; the rows so far are in %s", partial_path(path) if path in files else path
                    )
        raise
    if not arguments.quiet:
        names = ", ".join(str(path) for path in written)
        summary = _summary(account, passed if arguments.where is not None else None, time.monotonic() - started)
        print(f"{summary} -> {names}", file=sys.stderr if STDOUT in written else sys.stdout)
    if not decoded:
        print("broker-filter: no alert could be read", file=sys.stderr)
        return 1
    return 1 if arguments.fail_on_reject and account.rejected else 0


def _summary(account: Account, passed: int | None, seconds: float) -> str:
    """Return the counts of all inputs in one line, with the reasons of the rejects and the rate.

    `passed`: the number of scored alerts that passed the filter; None without a filter.
    """
    chosen = "" if passed is None else f" ({passed:,} pass the filter)"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in account.rejected.most_common())
    why = f" ({reasons})" if reasons else ""
    lost = ", ".join(f"{plane} {count:,}" for plane, count in account.fallbacks.items())
    fallbacks = f", scored without a usable plane ({lost})" if lost else ""
    return (
        f"read {account.consumed:,}: scored {account.scored:,}{chosen}, rejected {account.rejected.total():,}{why}, "
        f"duplicates {account.duplicates:,}{fallbacks}; {account.consumed / seconds:,.0f} alerts/s"
    )


def _written_tables(arguments: argparse.Namespace) -> dict[Path, str | None]:
    """Return the tables to write, each with its format, or None if the file name decides the format.

    Raises UsageError if two tables have the same name.
    """
    if arguments.rejects == arguments.out:
        raise UsageError(f"--out and --rejects are both {arguments.out}: name two tables, or omit --rejects")
    written = {arguments.out: arguments.format}
    return written | ({} if arguments.rejects is None else {arguments.rejects: None})


def _check_partitions(arguments: argparse.Namespace) -> None:
    """Raise UsageError if --out cannot be a directory of Parquet files."""
    if str(arguments.out) == STDIN or arguments.format not in (None, "parquet"):
        raise UsageError("--partition-by writes a directory of Parquet files: give the name of a directory as --out")
    for given in arguments.inputs:
        if given != STDIN and arguments.out.resolve().is_relative_to(Path(given).resolve()):
            raise UsageError(f"--out {arguments.out} lies in the input {given}: choose another directory")


@contextmanager
def _open_tables(
    written: Mapping[Path, str | None], schema: pa.Schema, by_night: bool
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Open one table for all rows, or one for scored and one for rejected rows. Yields a function that writes rows.

    `by_night`: the first table is a directory of tables by night.
    """
    from broker_filter.tables.partitions import open_partitions
    from broker_filter.tables.rows import (
        FIXED_COLUMNS,
        open_table,
        rejected_rows,
        scored_rows,
        scored_schema,
    )

    (out, kind), *others = written.items()
    if not others:
        with open_partitions(out, schema) if by_night else open_table(out, schema, kind) as table:
            yield table.write
        return
    [(rejects, rejects_kind)] = others
    kept = scored_schema(schema)
    with (
        open_partitions(out, kept) if by_night else open_table(out, kept, kind) as table,
        open_table(rejects, FIXED_COLUMNS, rejects_kind) as rejects_table,
    ):

        def write(rows: pa.RecordBatch) -> None:
            table.write(scored_rows(rows, kept))
            rejects_table.write(rejected_rows(rows))

        yield write
