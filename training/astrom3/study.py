"""`astrom3-study`: compares contrastive pre-training with random initial weights, on simulated stars.

For every seed, it simulates a set, pre-trains AstroM3 on all training stars without labels, and trains each classifier
twice on a class-capped subset: from random weights and from the pre-trained encoders, with equal settings except for
the learning rate. Every classifier is evaluated on the whole test split, with all keys (`random_keys.py`). Finished
steps are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from broker_filter.config import Section
from training.astrom3.model.checkpoint import load_network
from training.astrom3.model.informer import PhotometryClassifier
from training.astrom3.model.network import AstroM3
from training.astrom3.random_keys import compare_keys
from training.astrom3.recipe import AstroM3Run, Mode
from training.astrom3.simulate import write_stars
from training.astrom3.stars import Split, Subset, read_stars
from training.astrom3.train import CHECKPOINT, measure, predict, shown, train
from training.atomic_write import write_whole
from training.recipe import Hardware, begin, read_configuration

TABLE, SUMMARY = "study.csv", "summary.md"
STARS, RUNS = "stars", "runs"
MODES: tuple[Mode, ...] = ("photo", "spectra", "meta", "all")
"""Modes of the classifiers."""
SCRATCH, CLIP = "scratch", "clip"
FIGURES = ("accuracy", "balanced_accuracy")

log = logging.getLogger(__name__)


class Counts(Section):
    """Number of simulated stars for each seed."""

    train: int = Field(gt=0)
    validation: int = Field(gt=0)
    test: int = Field(gt=0)

    @property
    def by_split(self) -> dict[Split, int]:
        """The counts in the format of `write_stars`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


class Rates(Section):
    """Learning rates by the initial weights; each has its own best one, as published."""

    scratch: float = Field(gt=0)
    clip: float = Field(gt=0)


class Study(Section):
    """The keys of a study's YAML file."""

    out: Path
    stars: Counts
    subset: Subset = Field(default="sub10", description="Subset that the classifiers are trained on.")
    seeds: tuple[int, ...] = Field(default=(42, 0, 66, 12, 123), min_length=2)
    arguments: dict[str, Any] = Field(default={}, description="Keys of `AstroM3Arguments` for all networks.")
    pretraining: dict[str, Any] = Field(default={}, description="Keys of `Recipe` for the pre-training.")
    recipe: dict[str, Any] = Field(default={}, description="Keys of `Recipe` for all classifiers.")
    learning_rate: dict[Mode, Rates] = Field(description="Learning rates of the classifiers, by mode.")
    hardware: Hardware = Hardware()

    @model_validator(mode="after")
    def _has_every_rate(self) -> Self:
        if self.learning_rate.keys() != set(MODES):
            raise ValueError(f"learning_rate: must have {', '.join(MODES)}, not {', '.join(self.learning_rate)}")
        return self


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `astrom3-study`."""
    parser.add_argument(
        "study", type=Path, metavar="STUDY.yaml", help="YAML file with the keys of `training.astrom3.study.Study`"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run all unfinished trainings, and print the summary."""
    config = read_configuration(Study, arguments.study)
    print(study(config))


def study(config: Study) -> str:
    """Run all trainings, write a row for each and a summary over seeds, and return the summary.

    Raises TrainingError if `out` was started with another study.
    """
    begin(config.out, config)
    rows, keys = [], []
    for seed in config.seeds:
        rows += _train(config, seed)
        keys.append(_compare_keys(config, seed))
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(config.out / TABLE, table.getvalue().encode())
    summary = f"{summarise(rows)}\n{summarise_keys(keys)}"
    write_whole(config.out / SUMMARY, summary.encode())
    return summary


def _train(config: Study, seed: int) -> list[dict[str, Any]]:
    """Return a row for each classifier."""
    stars = config.out / STARS
    subsets: tuple[Subset, ...] = ("full", config.subset) if config.subset != "full" else ("full",)
    write_stars(stars, seed, config.stars.by_split, subsets)
    log.info("seed %d: pre-training", seed)
    train(_pretraining(config, seed))
    test = read_stars(stars, "full", seed, "test")
    rows = []
    for mode in MODES:
        for beginning in (SCRATCH, CLIP):
            log.info("seed %d: %s from %s", seed, mode, beginning)
            classifier = _classifier(config, seed, mode, beginning)
            trained = train(classifier)
            network = load_network(classifier.out / CHECKPOINT)
            figures = measure(test.label, predict(network, shown(test, classifier, "test")))
            rows.append(
                {
                    "seed": seed,
                    "mode": mode,
                    "beginning": beginning,
                    "epoch": trained["epoch"],
                    **{name: figures[name] for name in FIGURES},
                }
            )
    return rows


def _pretraining(config: Study, seed: int) -> AstroM3Run:
    return _configured(config, seed, "pretraining", mode="clip", recipe=config.pretraining)


def _classifier(config: Study, seed: int, mode: Mode, beginning: str) -> AstroM3Run:
    return _configured(
        config,
        seed,
        f"{mode}_{beginning}",
        mode=mode,
        subset=config.subset,
        recipe={**config.recipe, "learning_rate": config.learning_rate[mode].model_dump()[beginning]},
        pretrained=_pretraining(config, seed).out / CHECKPOINT if beginning == CLIP else None,
    )


def _configured(config: Study, seed: int, name: str, **others: Any) -> AstroM3Run:
    return AstroM3Run(
        stars=config.out / STARS,
        out=config.out / RUNS / f"{name}_{seed}",
        seed=seed,
        arguments=config.arguments,
        hardware=config.hardware,
        **others,
    )


def _compare_keys(config: Study, seed: int) -> dict[str, float]:
    """Return the effect of random keys on two networks, by name.

    The networks are the pre-trained one and the photometry classifier that started from it.
    """
    pretraining, classifier = _pretraining(config, seed), _classifier(config, seed, "photo", CLIP)
    network, photometry = load_network(pretraining.out / CHECKPOINT), load_network(classifier.out / CHECKPOINT)
    assert isinstance(network, AstroM3)
    assert isinstance(photometry, PhotometryClassifier)
    torch.manual_seed(seed)
    test = read_stars(classifier.stars, "full", seed, "test")
    return compare_keys(network, photometry, shown(test, classifier, "test"))


def summarise(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the results, in per cent.

    It holds means and standard deviations over the seeds, and those of the paired differences.
    """
    lines = [
        "| classifier | figure | from scratch | from CLIP | difference | seeds better |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for figure in FIGURES:
            by_beginning = {
                beginning: 100 * np.array([r[figure] for r in rows if (r["mode"], r["beginning"]) == (mode, beginning)])
                for beginning in (SCRATCH, CLIP)
            }
            difference = by_beginning[CLIP] - by_beginning[SCRATCH]
            cells = [f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" for values in by_beginning.values()]
            cells.append(f"{difference.mean():+.1f} ± {difference.std(ddof=1):.1f}")
            cells.append(f"{(difference > 0).sum()} of {len(difference)}")
            lines.append(f"| {mode} | {figure.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summarise_keys(keys: Sequence[dict[str, float]]) -> str:
    """Return a Markdown table of means and standard deviations over the seeds of the figures of `compare_keys`."""
    lines = ["| photometry, test split | mean over stars |", "| --- | --- |"]
    for name in keys[0]:
        values = np.array([figures[name] for figures in keys])
        lines.append(f"| {name} | {values.mean():.2g} ± {values.std(ddof=1):.1g} |")
    return "\n".join(lines) + "\n"
