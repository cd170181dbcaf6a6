"""`broker-filter filters try`: what the filters of a service file do with the alerts of a past night."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.cli.options import INPUT_HELP, fraction
from broker_filter.cli.parser import UsageError

if TYPE_CHECKING:
    from broker_filter.pictures.filter_page import FilterReport

FAILED = 1
"""Exit status if a filter passes too many alerts, or if no alert could be read."""
DEFAULT_EXAMPLES = 12
MAX_EXAMPLES = 200
"""Examples at most of each filter: the cutouts of more would not fit into a page that a browser opens at once."""

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `filters` and its subcommand to the parser."""
    parser = subparsers.add_parser(
        "filters",
        help="try the filters of a service file on a past night",
        examples=("broker-filter filters try service.yaml ztf_public_20260225.tar.gz --out night.html",),
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    trial = parts.add_parser(
        "try",
        help="count what each filter passes of archived alerts, and show examples",
        description="Scores archived alerts as the service would, and says for each filter of the service file how "
        "many alerts pass, at which hours, and what each term removes: each operand of the outermost `and`. Duplicates "
        "are not counted. It connects to no broker. Ends with status 1 if a filter passes a larger fraction than its "
        "`max_rate` in the file, or than --max-rate; or if no alert could be scored.",
        examples=(
            "broker-filter filters try service.yaml night.tar.gz",
            "broker-filter filters try service.yaml nights/ --max-rate 0.05 --out night.html",
        ),
    )
    trial.add_argument("service", metavar="SERVICE", type=Path, help="the service's YAML file")
    trial.add_argument("inputs", nargs="+", metavar="NIGHT", help=INPUT_HELP)
    trial.add_argument(
        "--max-rate",
        type=fraction,
        metavar="RATE",
        help="largest fraction of the scored alerts that a filter without `max_rate` should pass, such as 0.05",
    )
    trial.add_argument(
        "--out", type=_page, metavar="HTML", help="page to write: the counts, and cutouts of a random sample of alerts"
    )
    trial.add_argument(
        "--examples",
        type=_examples,
        default=DEFAULT_EXAMPLES,
        metavar="N",
        help="number of alerts on the page that pass each filter (default: %(default)s)",
    )
    trial.set_defaults(run=run)


def _page(text: str) -> Path:
    if (file := Path(text)).suffix != ".html":
        raise argparse.ArgumentTypeError(f"must end with .html: {text}")
    return file


def _examples(text: str) -> int:
    if not 0 <= (count := int(text)) <= MAX_EXAMPLES:
        raise argparse.ArgumentTypeError(f"must be between 0 and {MAX_EXAMPLES}, not {count}")
    return count


def run(arguments: argparse.Namespace) -> int:
    """Print what each filter does, write the page and return the exit status."""
    from broker_filter.cli.archived import keep_inputs
    from broker_filter.config_file import load_service
    from broker_filter.console import progress
    from broker_filter.pictures.filter_page import write_page
    from broker_filter.streaming.account import Account, account_batch
    from broker_filter.streaming.archives import check_inputs, read_packets
    from broker_filter.streaming.filtering import score_stream
    from broker_filter.streaming.generation import open_generation, open_input_schemas
    from broker_filter.streaming.trial import FilterTrial

    if arguments.out:
        keep_inputs(arguments.out, [arguments.service, *arguments.inputs])
    check_inputs(arguments.inputs)
    service = load_service(arguments.service)
    if not service.filters:
        raise UsageError(f"{arguments.service}: has no filters to try: add a section `filters`")
    generation = open_generation(service, open_input_schemas(service.config.input))
    examples = arguments.examples if arguments.out else 0
    trials = [
        FilterTrial(name, expression, one.max_rate or arguments.max_rate, examples)
        for one, (name, expression) in zip(service.config.filters, service.filters, strict=True)
    ]
    gc.freeze()  # full collections then skip the objects that start-up created
    account = Account()
    packets = read_packets(arguments.inputs, wanted=generation.decoder.fields)
    with progress("Scoring", share=packets.share_read) as advance:
        for batch in score_stream(packets, generation.decoder, generation.scorer):
            for trial in trials:
                trial.add(batch)
            of_batch = account_batch(batch)
            account.add(of_batch)
            advance(of_batch.consumed)
    reports = [trial.report() for trial in trials]
    print(
        f"read {account.consumed:,}: scored {account.scored:,}, rejected {account.rejected.total():,}, duplicates "
        f"{account.duplicates:,}"
    )
    for report in reports:
        _print_filter(report)
    _print_hours(reports)
    if arguments.out:
        write_page(arguments.out, arguments.inputs, reports)
        print(f"\n{arguments.out}")
    if not account.scored:
        print("broker-filter: no alert could be scored", file=sys.stderr)
        return FAILED
    if over := [report.name for report in reports if report.over]:
        print(f"broker-filter: these filters pass more than their limit: {', '.join(over)}", file=sys.stderr)
        return FAILED
    return 0


def _print_filter(report: FilterReport) -> None:
    print(f"\n{report.name}: {report.verdict}")
    print(f"  {'false':>9}  {'missing':>9}  {'alone':>9}  {'without':>9}  term")
    for term in report.terms:
        counts = (term.false, term.missing, term.alone, report.passed + term.alone)
        print("".join(f"  {count:9,}" for count in counts), "", term.text)


def _print_hours(reports: Sequence[FilterReport]) -> None:
    """Print for each hour with scored alerts how many were scored, and how many passed each filter."""
    widths = [max(len(report.name), 9) for report in reports]
    names = (f"{report.name:>{width}}" for report, width in zip(reports, widths, strict=True))
    print()
    print("  ".join(("hour (UTC)", f"{'scored':>9}", *names)))
    for hour, of_filters in enumerate(zip(*(report.hours for report in reports), strict=True)):
        scored = of_filters[0][0]
        if scored:
            passed = (f"{count:{width},}" for (_, count), width in zip(of_filters, widths, strict=True))
            print("  ".join((f"{hour:>10}", f"{scored:9,}", *passed)))
