"""Combines networks of different surveys into one bundle, which scores each alert with the network of its survey.

The files of the networks are copied into the new bundle, so that it is complete in itself. Nothing is retrained, and
the given bundles are not changed. The new directory is written atomically, and never replaces an existing one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from broker_filter.config import Runtime, SurveyName
from broker_filter.scoring.bundle import (
    BundleError,
    Part,
    RoutedOutputs,
    RoutingCard,
    copy_network,
    describe_problems,
    make_route,
    open_bundle,
    unserved,
    write_card,
)
from broker_filter.scoring.scorer import open_model


def combine_bundles(
    directory: Path,
    name: str,
    version: str,
    networks: Mapping[SurveyName, str | Path],
    task: str | None = None,
) -> RoutingCard:
    """Write the bundle `name` into the new `directory` and return its card.

    `task`: what the bundle is for; by default, the tasks of the networks.

    `networks`: for each survey, the bundle whose network scores its alerts. The labels of the new bundle are those that
    every network gives for its surveys, in the order of the first network.

    Raises BundleError if the directory exists, if a bundle cannot be used or has no network for the survey, or if the
    networks have no label in common; OSError if the directory cannot be written.
    """
    if directory.exists():
        raise BundleError(f"{directory}: exists already; choose another directory, or remove it first")
    parts = {survey: open_bundle(bundle).part(survey) for survey, bundle in networks.items()}
    first = next(iter(parts.values()))
    missing = {
        label: next(filter(None, (unserved(part.card, [survey], [label]) for survey, part in parts.items())), None)
        for label in first.card.outputs.labels
    }
    labels = tuple(label for label, problem in missing.items() if problem is None)
    if not labels:
        raise BundleError(f"no label is given by every network: {'; '.join(filter(None, missing.values()))}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        made = Path(scratch) / directory.name
        made.mkdir()
        folders: dict[Path, str] = {}  # a network that scores several surveys is copied once
        for survey, part in parts.items():
            if part.directory.resolve() not in folders:
                folders[part.directory.resolve()] = survey
                copy_network(part, made / survey)
        routes = {survey: make_route(made, folders[part.directory.resolve()]) for survey, part in parts.items()}
        try:
            card = RoutingCard(
                name=name,
                version=version,
                task=task or _tasks(parts),
                networks=routes,
                outputs=RoutedOutputs(labels=labels),
            )
        except ValidationError as error:
            raise BundleError(f"{directory}: {describe_problems(error)}") from error
        write_card(made, card)
        open_model(str(made), Runtime(engine="onnxruntime", device="cpu"))
        made.rename(directory)
    return card


def _tasks(parts: Mapping[SurveyName, Part]) -> str:
    """Return the task that all networks share, or the task of each."""
    tasks = {survey: part.card.task for survey, part in parts.items()}
    shared = set(tasks.values())
    return shared.pop() if len(shared) == 1 else "; ".join(f"{survey}: {task}" for survey, task in tasks.items())
