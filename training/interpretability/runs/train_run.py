"""`sae train`: the dictionaries of a run, one for each seed. An interrupted command goes on where it stopped."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from broker_filter.scoring.sparse_dictionary import SparseDictionary, write_dictionary
from training.arguments import positive
from training.errors import LensError
from training.interpretability.runs.rows import DICTIONARIES, FEATURES, Run, open_run, write_card
from training.interpretability.train_autoencoder import Recipe, train

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sae train`."""
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}
    parser.add_argument("run", type=Path, metavar="RUN", help="directory that `sae collect` wrote")
    parser.add_argument(
        "--kind",
        choices=("batch_top_k", "published"),
        default=defaults["kind"],
        help="autoencoder: BatchTopK, or as published by Kissane et al. 2024 (default: %(default)s)",
    )
    parser.add_argument("--features", type=positive, help="number of features (default: 2 x the dimensions of a row)")
    parser.add_argument(
        "--active",
        type=float,
        default=defaults["active"],
        help="mean number of active features per row, for batch_top_k (default: %(default)s)",
    )
    parser.add_argument(
        "--sparsity",
        type=float,
        default=defaults["sparsity"],
        help="coefficient of the L1 penalty, for published (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive, default=defaults["steps"], help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=positive, default=defaults["batch"], help="rows per step (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=defaults["learning_rate"],
        help="peak learning rate of Adam; fewer steps need a higher one (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=positive, default=5, help="number of dictionaries, with the seeds 1, 2, ... (default: 5)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Train the dictionaries that the run lacks. Raises LensError if it has dictionaries of another recipe."""
    torch.set_num_threads(arguments.threads)
    opened = open_run(arguments.run)
    recipe = Recipe(
        kind=arguments.kind,
        features=arguments.features or 2 * opened.card.heads * opened.card.d_head,
        active=arguments.active,
        sparsity=arguments.sparsity,
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
    )
    trained = train_run(opened, recipe, range(1, arguments.seeds + 1))
    print(f"{trained.directory}: {len(trained.card.seeds)} dictionaries of {recipe.features} features")


def train_run(opened: Run, recipe: Recipe, seeds: range) -> Run:
    """Train the dictionaries of the `seeds` that a run lacks, and return the run with them.

    Raises LensError if the run has dictionaries of another recipe.
    """
    directory, card = opened.directory, opened.card
    if card.recipe is not None and card.recipe != recipe and (directory / DICTIONARIES).exists():
        raise LensError(
            f"{directory}: has dictionaries of another recipe ({card.recipe}): give the same options, collect another "
            f"run, or remove {DICTIONARIES} and {FEATURES} from it"
        )
    done = card.seeds if (directory / DICTIONARIES).exists() else ()
    rows = opened.rows.training
    for seed in seeds:
        if seed in done:
            continue
        log.info("seed %d: %d rows, %s", seed, len(rows), recipe)
        (directory / DICTIONARIES).mkdir(exist_ok=True)
        # A run that is killed has the recipe of its checkpoints and dictionaries in its card.
        write_card(directory, card := card.model_copy(update={"recipe": recipe, "seeds": done}))
        dictionary: SparseDictionary = train(rows, recipe, seed, directory / DICTIONARIES / f"{seed}.ckpt")
        write_dictionary(directory / DICTIONARIES / str(seed), dictionary, opened.source)
        done = (*done, seed)
        write_card(directory, card := card.model_copy(update={"seeds": done}))
    return Run(directory, card)
