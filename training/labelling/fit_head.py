"""`fit-head`: fits a linear classifier of some hundred labels on the embedding of a bundle, and writes its bundle.

The embedder is frozen and becomes part of the new bundle, which scores alerts in one pass.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from broker_filter.cli.options import add_registry_option
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import (
    WEIGHTS,
    Architecture,
    Bundle,
    Description,
    Outputs,
    Part,
    Training,
    open_bundle,
)
from broker_filter.scoring.labels import UNLABELLED, Labels, parse_rule, read_labels
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.networks.embedding_head import HEADS, OUTPUTS
from training.arguments import add_labelled_alerts
from training.errors import DatasetError, TrainingError
from training.evaluation.bootstrap import as_card, estimate
from training.evaluation.evaluate import calibration_for_card
from training.evaluation.metrics import measure, trials
from training.evaluation.predictions import Predictions
from training.labelling.embedded import EmbeddedAlerts, embed_archives
from training.labelling.linear import LinearHead, fit_linear

HEAD = "_head"
"""What the name of an architecture with a head has beyond that of its embedder."""
THRESHOLD = 0.5
"""Recommended threshold of a classifier of two classes: above it, the second class is more probable than not."""
FIGURES = ("roc_auc", "average_precision", "balanced_accuracy")
"""The figures of the cross-validation on the card."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit-head`."""
    add_labelled_alerts(parser, "a class, written as for build-dataset; of two classes the second one is scored")
    parser.add_argument("--name", required=True, help="name of the bundle, the prefix of its outputs")
    parser.add_argument("--version", default="1", help="version of the bundle (default: %(default)s)")
    add_survey_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory of the new bundle")


def add_survey_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which alerts are embedded, and how: `--survey`, `--embedder`, `--schema-registry`."""
    parser.add_argument(
        "--survey", choices=["ztf", "lsst"], default="ztf", help="survey whose alerts are taken (default: %(default)s)"
    )
    parser.add_argument(
        "--embedder", default="embedder", metavar="BUNDLE", help="bundle with an embedding (default: %(default)s)"
    )
    add_registry_option(parser)


def run(arguments: argparse.Namespace) -> None:
    """Fit the classifier, write its bundle, and print the figures of the cross-validation."""
    labels = read_labels(arguments.labels, arguments.label, [parse_rule(rule) for rule in arguments.classes])
    embedder = open_bundle(arguments.embedder)
    alerts = embed_archives(arguments.inputs, [], arguments.embedder, arguments.survey, arguments.schema_registry)
    description = fit_head(alerts, labels, embedder, arguments.name, arguments.version, arguments.out)
    assert description.training
    for name in FIGURES:
        print(f"{name}: {description.training.evaluation.get(name, 'undefined')}")
    print(f"{arguments.out}: bundle {arguments.name} written and verified")


def fit_head(
    alerts: EmbeddedAlerts, labels: Labels, embedder: Bundle, name: str, version: str, out: Path
) -> Description:
    """Fit a classifier to the labelled ones of `alerts`, write its bundle to the new directory `out`, and describe it.

    `embedder`: the bundle that gave the embeddings. Raises DatasetError if no alert has a label or a class has too few
    objects, TrainingError if the embedding cannot be classified, and BundleError if `out` exists.
    """
    part = embedder.part(alerts.survey)
    card = part.card
    if (headed := f"{card.architecture.name}{HEAD}") not in HEADS:
        known = ", ".join(name.removesuffix(HEAD) for name in HEADS)
        raise TrainingError(f"{embedder.directory}: no head fits {card.architecture.name}: choose a bundle of {known}")
    label = labels.of(alerts.alert_id, alerts.object_id)
    known = label != UNLABELLED
    if not known.any():
        raise DatasetError(
            f"{labels.table}: labels none of the {len(alerts)} alerts; check that its {labels.key} are those of the "
            "alerts"
        )
    chosen, label, classes = alerts[known], label[known], labels.classes
    head = fit_linear(chosen.embedding, label, chosen.object_id, classes)
    outputs = classes[1:] if len(classes) == 2 else classes
    architecture = Architecture(name=headed, arguments={**card.architecture.arguments, OUTPUTS: len(outputs)})
    description = Description(
        name=name,
        version=version,
        task=f"classification: {', '.join(classes)}",
        surveys=(alerts.survey,),
        inputs=card.inputs,
        outputs=Outputs(
            labels=outputs,
            activation="sigmoid" if len(outputs) == 1 else "softmax",
            thresholds={outputs[0]: THRESHOLD} if len(outputs) == 1 else {},
        ),
        architecture=architecture,
        licence=card.licence,
        source="python -m training fit-head, of broker-filter",
        citation=card.citation,
        training=_describe(chosen, label, labels, head, f"{card.name} {card.version}"),
    )
    write_bundle(out, description, _network(part, architecture, head))
    return description


def _network(part: Part, architecture: Architecture, head: LinearHead) -> nn.Module:
    """Return the network of a bundle's part with the classifier on top."""
    weights = {f"embedder.{name}": value for name, value in load_file(part.directory / WEIGHTS).items()}
    weights["head.weight"] = torch.from_numpy(head.weight).float()
    weights["head.bias"] = torch.from_numpy(head.bias).float()
    return load_network(architecture, weights)


def _describe(alerts: EmbeddedAlerts, label: np.ndarray, labels: Labels, head: LinearHead, embedder: str) -> Training:
    """Return the card's description of the training, with figures of the cross-validation over objects."""
    predictions = Predictions(
        classes=labels.classes,
        alert_id=alerts.alert_id,
        object_id=alerts.object_id,
        magpsf=np.full(len(alerts), np.nan),
        truth=label,
        probabilities=head.crossed.astype(np.float32),
        threshold=THRESHOLD,
    )
    figures = estimate(partial(measure, predictions), predictions.object_id, partial(trials, predictions))
    numbers = np.bincount(label, minlength=len(labels.classes)).tolist()
    counts = ", ".join(f"{name} {n}" for name, n in zip(labels.classes, numbers, strict=True))
    return Training(
        method=f"Logistic regression on the frozen embedding of {embedder}, with L2 regularisation (C = "
        f"{head.strength:g}) of the lowest log loss in a cross-validation over objects.",
        data=f"{len(alerts)} labelled alerts of {len(np.unique(alerts.object_id))} objects ({counts}) of "
        f"{labels.table.name}, column {labels.column}, sha256 {labels.sha256}.",
        evaluation={
            "how": "By cross-validation: each alert was scored by a classifier that saw no alert of its object. If the "
            "labelled alerts were not drawn at random, these figures and the probabilities are those of the labelled "
            "alerts and not of the stream.",
            **as_card({name: figures[name] for name in FIGURES}),
            **calibration_for_card(predictions),
        },
    )
