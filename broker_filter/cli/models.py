"""`broker-filter models`: imports published weights; combines, exports, lists, shows and verifies bundles.

Never changes a bundle: the distribution of alerts is recorded in a copy of it.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from broker_filter.cli.extras import require_extra
from broker_filter.cli.options import INPUT_HELP, add_scoring_options
from broker_filter.cli.parser import UsageError, require_files

if TYPE_CHECKING:
    from broker_filter.config import SurveyName
    from broker_filter.scoring.bundle import Bundle, Part
    from broker_filter.scoring.distribution import Distribution

ENGINES: tuple[Literal["onnxruntime", "torch"], ...] = ("onnxruntime", "torch")
"""Engines that a bundle must run on."""
LINE = 100
"""Width in characters to which a card is wrapped."""

SURVEYS: tuple[SurveyName, ...] = ("ztf", "lsst")
"""Surveys for which a bundle may have a network."""
IMPORT_MODULES = ("h5py", "onnx", "onnxscript", "timm", "torch")
"""Modules of the extra `train` that importing weights needs."""
HOSTS = ("boom",)
"""Brokers for which a bundle can be exported."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `models` and its seven subcommands to the parser."""
    parser = subparsers.add_parser(
        "models",
        help="import, combine, export, list, show and verify model bundles; record distributions in them",
        examples=(
            "broker-filter models list bundles/",
            "broker-filter models show default",
            "broker-filter models combine --ztf default --lsst mine/ --name both --version 1 --out bundles/both",
            "broker-filter models import braai d6_m7.weights.h5 --normalisation row --name d6_m7 --out bundles/d6_m7",
            "broker-filter models export default --for boom --out default.onnx",
            "broker-filter models record-distribution default nights/ --out bundles/default",
        ),
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    importer = parts.add_parser("import", help="make a bundle from published weights")
    kinds = importer.add_subparsers(title="kinds of weights", metavar="KIND", required=True)
    braai = kinds.add_parser("braai", help="braai, ZTF's real/bogus network, from Keras .h5 weights")
    braai.add_argument("weights", metavar="WEIGHTS.h5", type=Path, help="the published file of weights")
    braai.add_argument(
        "--normalisation",
        choices=("row", "image"),
        required=True,
        help="which pixels the network expects to be divided by their L2 norm: each row of an image separately "
        "(d6_m7 and older) or the whole image (d6_m9)",
    )
    braai.set_defaults(run=_import_braai)
    acai = kinds.add_parser("acai", help="one of ACAI's five networks for ZTF alerts, from a Keras .h5 model")
    acai.add_argument("weights", metavar="MODEL.h5", type=Path, help="the published model file")
    acai.add_argument(
        "--class",
        dest="letter",
        choices=("h", "n", "v", "o", "b"),
        required=True,
        help="class of the network: h (hosted), n (nuclear), v (variable), o (orphan) or b (bogus); the file "
        "`acai_h...h5` is of class h",
    )
    acai.set_defaults(run=_import_acai)
    btsbot = kinds.add_parser(
        "btsbot", help="BTSbot, the Bright Transient Survey's networks, as published on Hugging Face"
    )
    btsbot.add_argument(
        "folder", metavar="DIR", type=Path, help="directory with pytorch_model.bin and train_config.json"
    )
    btsbot.set_defaults(run=_import_btsbot)
    for kind in (braai, acai, btsbot):
        kind.add_argument("--name", required=True, help="name of the bundle, and prefix of its output columns")
        kind.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory of the new bundle")

    combiner = parts.add_parser(
        "combine",
        help="make one bundle of networks for different surveys",
        description="Copies the networks of several bundles into one bundle, which scores each alert with the network "
        "of its survey. The outputs are the labels that all networks have in common.",
    )
    for survey in SURVEYS:
        combiner.add_argument(f"--{survey}", metavar="BUNDLE", help=f"bundle whose network scores alerts of {survey}")
    combiner.add_argument("--name", required=True, help="name of the new bundle, and prefix of its output columns")
    combiner.add_argument("--version", required=True, help="version of the new bundle")
    combiner.add_argument("--task", help="what the new bundle is for (default: the tasks of its networks)")
    combiner.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory of the new bundle")
    combiner.set_defaults(run=_combine)

    exporter = parts.add_parser(
        "export",
        help="write a bundle as a file for another broker",
        description="Writes the bundle's network for ZTF alerts as an ONNX file with the inputs and outputs of the "
        "network BTSbot in BOOM. The file is written after its scores were compared with those of the bundle.",
    )
    exporter.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle, or name of a bundle that ships")
    exporter.add_argument("--for", dest="host", choices=HOSTS, required=True, help="the broker that is to run it")
    exporter.add_argument("--label", help="the probability that is the score, if the bundle gives several")
    exporter.add_argument("--out", metavar="FILE.onnx", type=Path, required=True, help="the new file")
    exporter.set_defaults(run=_export)

    recorder = parts.add_parser(
        "record-distribution",
        help="copy a bundle, and record in the copy how its outputs and key metadata are distributed over alerts",
        description="Scores the alerts in files, folders and archives, and writes a copy of the bundle that records "
        "the distribution of each output and of key metadata over these alerts, for each survey. A service with the "
        "copy measures how far its stream is from it (`broker_filter_drift_psi`). The scores of the copy are the same.",
        examples=(
            "broker-filter models record-distribution default nights/ --of 'public alerts of May 2026' --out mine",
            "broker-filter models record-distribution default nights/ --where 'default.real > 0.5' --out mine",
        ),
    )
    recorder.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle, or name of a bundle that ships")
    recorder.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUT_HELP)
    recorder.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory of the new bundle")
    recorder.add_argument(
        "--of", metavar="TEXT", help="which alerts these are, for the reader of the bundle (default: the inputs' names)"
    )
    recorder.add_argument("--where", metavar="EXPRESSION", help="cut that selects the alerts, a filter expression")
    add_scoring_options(recorder)
    recorder.set_defaults(run=_record)

    lister = parts.add_parser("list", help="list the bundles that ship, and the bundles in directories")
    lister.add_argument("directories", metavar="DIR", nargs="*", type=Path, help="bundle, or directory of bundles")
    lister.set_defaults(run=_list)

    bundle_help = "directory of a bundle, or name of a bundle that ships"
    shower = parts.add_parser("show", help="show a bundle's card")
    shower.add_argument("bundle", metavar="BUNDLE", help=bundle_help)
    shower.set_defaults(run=_show)

    verifier = parts.add_parser(
        "verify", help="check a bundle's files and run its test vector on each installed engine"
    )
    verifier.add_argument("bundle", metavar="BUNDLE", help=bundle_help)
    verifier.set_defaults(run=_verify)


def _import_braai(arguments: argparse.Namespace) -> int:
    _require_extra()
    require_files(arguments.weights)
    from broker_filter.importers.braai import import_braai

    import_braai(arguments.weights, arguments.normalisation, arguments.name, arguments.out)
    return _report_import(arguments)


def _import_acai(arguments: argparse.Namespace) -> int:
    _require_extra()
    require_files(arguments.weights)
    from broker_filter.importers.acai import import_acai

    import_acai(arguments.weights, arguments.letter, arguments.name, arguments.out)
    return _report_import(arguments)


def _import_btsbot(arguments: argparse.Namespace) -> int:
    _require_extra()
    require_files(arguments.folder)
    from broker_filter.importers.btsbot import import_btsbot

    import_btsbot(arguments.folder, arguments.name, arguments.out)
    return _report_import(arguments)


def _require_extra() -> None:
    require_extra("train", "importing weights", *IMPORT_MODULES)


def _report_import(arguments: argparse.Namespace) -> int:
    print(f"{arguments.out}: bundle {arguments.name} written and verified")
    return 0


def _combine(arguments: argparse.Namespace) -> int:
    from broker_filter.importers.combine import combine_bundles

    networks = {survey: bundle for survey in SURVEYS if (bundle := getattr(arguments, survey)) is not None}
    if not networks:
        raise UsageError(f"no network given; use {' and '.join(f'--{survey}' for survey in SURVEYS)}")
    card = combine_bundles(arguments.out, arguments.name, arguments.version, networks, arguments.task)
    print(f"{arguments.out}: bundle {card.title} written and verified; it gives {', '.join(card.outputs.labels)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    require_extra("train", "exporting a bundle", "onnx")
    from broker_filter.plugins.boom import export_for_boom

    properties = export_for_boom(arguments.bundle, arguments.out, arguments.label)
    print(
        f"{arguments.out}: {properties['broker_filter.label']} of {properties['broker_filter.bundle']} written for "
        f"{arguments.host}; it gives the scores of the bundle"
    )
    return 0


def _record(arguments: argparse.Namespace) -> int:
    from broker_filter.cli.archived import score_archives
    from broker_filter.scoring.scorer import Scorer
    from broker_filter.streaming.archives import check_inputs
    from broker_filter.streaming.expressions import FIELDS, ExpressionError, compile_filter
    from broker_filter.streaming.record_distribution import (
        distribution_columns,
        measure_distributions,
        write_recorded,
    )

    check_inputs(arguments.inputs)
    scorer = Scorer.open(arguments.bundle, device=arguments.device)
    [model] = scorer.models
    try:
        where = compile_filter(arguments.where, FIELDS, model.outputs) if arguments.where else None
    except ExpressionError as error:
        raise UsageError(f"--where: {error}") from error
    batches = score_archives(
        arguments.inputs,
        scorer,
        columns=(*distribution_columns(model.surveys), *(where.columns if where else ())),
        registry=arguments.schema_registry,
    )
    found = measure_distributions(batches, model, where)
    of = arguments.of or ", ".join(Path(given).name for given in arguments.inputs)
    if arguments.where:
        of = f"{of}; cut: {arguments.where}"
    write_recorded(model.bundle, arguments.out, of, found)
    counted = ", ".join(f"{one.alerts:,} alerts of {survey}" for survey, one in found.items())
    print(f"{arguments.out}: bundle {model.name} {model.version} written with the distribution of {counted}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from broker_filter.scoring.bundle import CARD, BundleError, open_bundle, shipped_bundles

    require_files(*arguments.directories)
    found: list[str | Path] = [*shipped_bundles()]
    for directory in arguments.directories:
        inside = (
            [directory] if (directory / CARD).is_file() else sorted(card.parent for card in directory.glob(f"*/{CARD}"))
        )
        found += [path.absolute() for path in inside]
    rows = [("NAME", "VERSION", "NETWORKS", "OUTPUTS", "TASK", "DIRECTORY")]
    status = 0
    for path in found:
        try:
            bundle = open_bundle(path)
        except BundleError as error:  # the other bundles are still listed
            print(f"broker-filter: {error}", file=sys.stderr)
            status = 1
            continue
        card = bundle.card
        networks = ";".join(f"{','.join(part.surveys)}:{part.card.architecture.name}" for part in bundle.parts)
        columns = ",".join(bundle.output_names)
        rows.append((card.name, card.version, networks, columns, card.task, str(bundle.directory)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return status


def _show(arguments: argparse.Namespace) -> int:
    from broker_filter.scoring.bundle import open_bundle

    for line in _describe(open_bundle(arguments.bundle)):
        print(line)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from broker_filter.config import Runtime
    from broker_filter.scoring.runtimes import INSTALL_TORCH, torch_is_installed
    from broker_filter.scoring.scorer import open_model

    for engine in ENGINES:
        if engine == "torch" and not torch_is_installed():
            print(f"torch: not verified, because PyTorch is not installed: {INSTALL_TORCH}")
            continue
        for part in open_model(arguments.bundle, Runtime(engine=engine)).parts:
            print(
                f"{part.bundle.directory}: for {', '.join(map(str, part.surveys))}: the files match their sha256, and "
                f"{part.network.provider} reproduces the test vector"
            )
    return 0


def _describe(bundle: Bundle) -> list[str]:
    """Return the lines that describe a bundle: its networks, if it has several, and the card of each network."""
    from broker_filter.scoring.scores import output_name

    if len(bundle.parts) == 1:
        return _describe_network(bundle.parts[0])
    thresholds = {
        output_name(bundle.card.name, label): bundle.thresholds_of(label) for label in bundle.card.outputs.labels
    }
    entries = {
        "directory": str(bundle.directory),
        "outputs": ", ".join(bundle.output_names),
        "cuts": ", ".join(
            f"{name} > {cut:g} ({survey})" for name, cuts in thresholds.items() for survey, cut in cuts.items()
        ),
        "embedding": str(bundle.embedding or ""),
        **{", ".join(part.surveys): f"by {part.card.title} in {part.directory.name}/" for part in bundle.parts},
    }
    lines = _lines(f"{bundle.card.title}: {bundle.card.task}", entries)
    for part in bundle.parts:
        lines += ["", *_describe_network(part)]
    return lines


def _describe_network(part: Part) -> list[str]:
    from broker_filter.scoring.scores import output_name

    card, distribution = part.card, part.distribution()
    images, outputs = card.inputs.images, card.outputs
    cuts = [f"{label} > {cut:g}" for label, cut in outputs.thresholds.items()]
    arguments = [f"{name}={value}" for name, value in card.architecture.arguments.items()]
    entries = {
        "directory": str(part.directory),
        "surveys": ", ".join(card.surveys),
        "images": f"{', '.join(images.order)}; {images.size} px, {images.normalisation}, padding {images.padding:g}",
        "planes": ", ".join(
            {
                "variance": "variance (where it is unusable: the noise of the pixels)",
                "psf": "psf (where it is unusable: a Gaussian)",
            }[plane]
            for plane in card.inputs.planes
        ),
        "metadata": ", ".join(
            f"{column.name} ({column.fill:g}{', and a flag,' * column.flag} where missing)"
            for column in card.inputs.metadata
        ),
        "outputs": ", ".join(output_name(card.name, label) for label in outputs.labels) + f" ({outputs.activation})",
        "null": "; ".join(
            f"{output_name(card.name, label)} for all surveys except {', '.join(surveys)}"
            for label, surveys in outputs.surveys.items()
        ),
        "cuts": ", ".join(cuts),
        "embedding": str(outputs.embedding or ""),
        "network": f"{card.architecture.name}({', '.join(arguments)})",
        "trained": card.training.method,
        "data": card.training.data,
        **{f"  {name}": str(value) for name, value in card.training.evaluation.items()},
        "drift": "" if distribution is None else _recorded(distribution),
        "licence": card.licence,
        "source": card.source,
        "citation": card.citation,
    }
    return _lines(f"{card.title}: {card.task}", entries)


def _recorded(distribution: Distribution) -> str:
    """Return which alerts a distribution was recorded over."""
    counted = ", ".join(f"{one.alerts:,} alerts of {survey}" for survey, one in distribution.surveys.items())
    return f"measured from the distribution of {counted}: {distribution.of}"


def _lines(title: str, entries: Mapping[str, str]) -> list[str]:
    """Return the title, and the entries below each other, wrapped to LINE characters."""
    margin = max(map(len, entries)) + 2
    lines = [title]
    for entry, text in entries.items():
        lines += textwrap.wrap(
            text or "none", LINE, initial_indent=f"  {entry:{margin}}", subsequent_indent=" " * (margin + 2)
        )
    return lines
