"""`python -m training COMMAND`: data sets, training, evaluation. Each command is a module, imported only when it runs.

A command module defines `add_arguments(parser)` and `run(arguments)`, or a table COMMANDS of further commands. An error
that the user can fix is one line on stderr. Exit status: 0 success, 1 error, 2 wrong usage, 130 interrupted, 143
terminated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from broker_filter.cli import INTERRUPTED, describe_error
from broker_filter.cli.parser import UsageError, did_you_mean
from broker_filter.cli.termination import ended_by_sigterm
from broker_filter.console import set_up_logging
from broker_filter.errors import FAILED, USAGE, BrokerFilterError, is_fault

COMMANDS = {
    "build-dataset": ("training.data.build_dataset", "build a data set from archives and labels"),
    "fit": ("training.vision.fit", "train the network that a file describes, and write its bundle"),
    "fit-head": ("training.labelling.fit_head", "fit a classifier of few labels on an embedding, and write its bundle"),
    "active": ("training.labelling.choose", "choose the alerts of a night to label next"),
    "active-study": ("training.labelling.study", "measure what chosen labels are worth, compared with random ones"),
    "evaluate": ("training.evaluation.evaluate", "evaluate a bundle on a split, with bootstrap intervals over objects"),
    "compare": ("training.evaluation.compare", "compare evaluations: tables, plots, significance of differences"),
    "pretrain": ("training.vision.pretrain", "train an encoder on galaxy images"),
    "study": ("training.vision.study", "train a grid of networks, pre-trainings, seeds and amounts of data"),
    "train-default": ("training.bundles.train_default", "distil the shipped bundle `default`"),
    "train-attention": ("training.bundles.train_attention", "distil a pre-trained standard network with attention"),
    "train-classes": ("training.bundles.train_classes", "fit the shipped bundle `classes`"),
    "train-curves": ("training.bundles.train_curves", "train the shipped bundle `curves` on typed light curves"),
    "train-rubin": ("training.bundles.train_rubin", "train the shipped bundle `rubin`"),
    "train-embedder": ("training.embedding.train_embedder", "train the shipped bundle `embedder`"),
    "train-embedder-lsst": ("training.embedding.train_embedder_lsst", "train the network for LSST of `embedder`"),
    "anomalies": ("training.embedding.anomalies", "measure how well held-out classes are found as anomalies"),
    "anomalies-lsst": ("training.embedding.anomalies_lsst", "the same for LSST, on real and simulated alerts"),
    "anomalies-served": ("training.embedding.anomalies_served", "find classes of LSST with a bundle as it is served"),
    "anomaly-measures": ("training.evaluation.anomaly_measures", "compare the measures of anomalies, both surveys"),
    "sae": ("training.interpretability.command", "the lens: sparse autoencoders on attention outputs"),
    "suspects": ("training.embedding.suspects", "list the alerts whose labels are most likely wrong"),
    "astrom3": ("training.astrom3.train", "train AstroM3, or a classifier of one of its modalities, as published"),
    "astrom3-embed": ("training.astrom3.embed", "write the embeddings of stars, for retrieval, maps and suspects"),
    "astrom3-simulate": ("training.astrom3.simulate", "simulate variable stars of ten classes, to train AstroM3"),
    "astrom3-study": ("training.astrom3.study", "measure the benefit of AstroM3's pre-training with few labels"),
}
"""Each command's module and purpose."""
OURS = ("training", "broker_filter")
"""Packages of this checkout. If a module of these packages is missing, the program is at fault and not the
installation."""
INSTALL = "pip install --editable '.[train]' in the checkout"


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    return _run("training", COMMANDS, argv)


def _run(group: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str]) -> int:
    """Run one of the `commands` of a `group`: `training`, or `training` and the name of a command that has commands."""
    if not argv or argv[0] not in commands:
        asked = argv[:1] in (["-h"], ["--help"])
        lines = [f"  {name:19} {purpose}" for name, (_, purpose) in commands.items()]
        if argv and not asked:
            lines.append(f"{group}: no command {argv[0]!r}{did_you_mean(argv[0], commands)}")
        print(f"usage: python -m {group} COMMAND ...", *lines, sep="\n", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else USAGE
    command = f"{group} {argv[0]}"
    module, purpose = commands[argv[0]]
    try:
        implementation = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        print(f"{command}: needs {error.name}, which is not installed: {INSTALL}", file=sys.stderr)
        return USAGE
    if not hasattr(implementation, "run"):
        return _run(command, implementation.COMMANDS, argv[1:])
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=purpose)
    implementation.add_arguments(parser)
    arguments = parser.parse_args(argv[1:])
    set_up_logging()
    try:
        with ended_by_sigterm():
            implementation.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BrokerFilterError, OSError) as error:
        if is_fault(error):
            raise
        print(f"{command}: {describe_error(error)}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
