"""`broker-filter config`: lists every error of a service file, and the meaning of each key."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker_filter.config import Filter, Model, Service
    from broker_filter.scoring.bundle import Bundle
    from broker_filter.streaming.resolved import ResolvedService

FAILED = 1
"""Exit status if the file is valid, but a cluster cannot be reached or refuses a right."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `config` and its two subcommands to the parser."""
    parser = subparsers.add_parser(
        "config",
        help="check a service file, or list its keys",
        examples=(
            "broker-filter config check service.yaml",
            "broker-filter config check --connect service.yaml",
            "broker-filter config keys",
        ),
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    checker = parts.add_parser(
        "check",
        help="list every error of a service file",
        description="Prints what the service would run with this file. If the file has errors, prints every error with "
        "the path of its key, and ends with status 2.",
    )
    checker.add_argument("file", metavar="FILE", type=Path, help="the service's YAML file")
    checker.add_argument(
        "--connect",
        action="store_true",
        help="also connect to the clusters and try every right that the service needs there. Missing topics are "
        "created, as by `run`; nothing is written to them",
    )
    checker.set_defaults(run=_check)

    lister = parts.add_parser(
        "keys", help="print every key of a service file, with its default and meaning, as Markdown"
    )
    lister.set_defaults(run=_keys)


def _check(arguments: argparse.Namespace) -> int:
    from broker_filter.config_file import load_service

    service = load_service(arguments.file)
    print(summary(service))
    return _connect(service.config) if arguments.connect else 0


def _connect(service: Service) -> int:
    from broker_filter.kafka.preflight import problems

    found = list(problems(service))
    for problem in found:
        print(f"broker-filter: {problem}", file=sys.stderr)
    if not found:
        print("clusters: connected; the service has every right that it needs")
    return FAILED if found else 0


def _keys(_: argparse.Namespace) -> int:
    from broker_filter.config_file import document_keys

    print("| key | default | meaning |", "|---|---|---|", sep="\n")
    for path, default, meaning in document_keys():
        print(f"| `{path}` | {default if default in ('', 'required') else f'`{default}`'} | {meaning} |")
    return 0


def summary(service: ResolvedService) -> str:
    """Describe what a valid service file will run, without its secrets."""
    config = service.config
    source, output = config.input, config.output
    lines = [
        f"input: {', '.join(source.topics)} from {source.bootstrap_servers} as group {source.group_id}, "
        f"start {source.start}",
        f"output: {', '.join(config.output_topics)} to "
        f"{output.bootstrap_servers or source.bootstrap_servers}, payload {output.payload}",
    ]
    lines += [_model_line("model", *one) for one in zip(config.serving, service.bundles, strict=True)]
    lines += [_model_line("shadow model", *one) for one in zip(config.shadows, service.shadows, strict=True)]
    if config.anomalies:
        explained = f", explained by {', '.join(config.anomalies.lens)}" if config.anomalies.lens else ""
        lines.append(f"anomalies: {config.anomalies.rate:g} of the alerts, by {config.anomalies.reference}{explained}")
    for one, (_, expression) in zip(config.filters, service.filters, strict=True):
        lines.append(f"filter: {one.name} {expression.revision} ({one.where}){_limit(one)}")
    lines += [f"file {file.path}: {file.content}" for file in service.files]
    lines.append(f"duplicates: {config.duplicates} within {config.duplicate_window:,} alert ids")
    lines.append(f"http: {config.http.host}:{config.http.port}")
    lines.append(f"revision: {service.revision}")
    return "\n".join(lines)


def _limit(one: Filter) -> str:
    if one.max_rate is None:
        return ""
    return f"; {one.over_rate} above {100 * one.max_rate:g} % in {one.max_rate_minutes:g} minutes"


def _model_line(kind: str, model: Model, bundle: Bundle) -> str:
    card = bundle.card
    surveys = ", ".join(dict.fromkeys([*bundle.surveys, *model.also]))
    line = f"{kind}: {card.name} {card.version} ({', '.join(card.outputs.labels)}) for {surveys}"
    for label in card.outputs.labels:
        if (trained_for := bundle.surveys_of(label)) != bundle.surveys:
            line += f"; {label} only for {', '.join(dict.fromkeys([*trained_for, *model.also]))}"
    if len(bundle.parts) > 1:
        line += "".join(f"; {', '.join(part.surveys)} by {part.card.title}" for part in bundle.parts)
    return line
