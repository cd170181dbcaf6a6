"""`make sae-parity`: sae-lens loads the dictionaries that this project writes, and encodes equally.

sae-lens brings transformers and other heavy packages, so it has an environment of its own, in which this project is not
installed: `write` runs in the environment of the tests, and `check` in the other one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

TOLERANCE = 1e-5
"""Largest difference, as a fraction of the largest absolute value."""
KNOWN = "known.safetensors"
LENS = Path(__file__).parents[1] / "broker_filter" / "lenses" / "embedder"


def write(directory: Path) -> None:
    """Write trained dictionaries and the one of the shipped lens, each with rows and the activations of the rows."""
    from broker_filter.scoring.sparse_dictionary import DictionarySource, read_dictionary, write_dictionary
    from training.interpretability.known_answers.planted import plant
    from training.interpretability.train_autoencoder import Recipe, train

    shutil.rmtree(directory, ignore_errors=True)
    source = DictionarySource(
        bundle="planted", version="1", weights_sha256="0" * 64, site="planted", heads=4, d_head=6, split="train"
    )
    planted = plant(5000, d=24, features=40, active=3, seed=1)
    rows = {}
    for recipe in (Recipe(features=48, steps=300), Recipe(kind="published", features=48, steps=300)):
        write_dictionary(directory / recipe.kind, train(planted.rows, recipe, seed=1), source)
        rows[recipe.kind] = planted.rows[:1000]
    dictionary, card = read_dictionary(LENS)
    write_dictionary(directory / "lens", dictionary, card.metadata)
    spread = np.random.default_rng(1).normal(size=(1000, card.d_in)).astype(np.float32)
    rows["lens"] = dictionary.b_dec + spread * np.float32(dictionary.threshold.mean() + 1)
    for name, z in rows.items():
        dictionary, _ = read_dictionary(directory / name)
        activations = dictionary.encode(z)
        known = {"z": z, "activations": activations, "reconstruction": dictionary.decode(activations)}
        save_file(known, directory / name / KNOWN)


def check(directory: Path) -> bool:
    """Print how far sae-lens deviates from the known answers, and return whether all are within TOLERANCE."""
    import torch
    from sae_lens import SAE

    agree = True
    for known in sorted(directory.glob(f"*/{KNOWN}")):
        answers = load_file(known)
        autoencoder = SAE.load_from_disk(known.parent)
        with torch.inference_mode():
            activations = autoencoder.encode(torch.from_numpy(answers["z"]))
            found = {"activations": activations.numpy(), "reconstruction": autoencoder.decode(activations).numpy()}
        for name, array in found.items():
            deviation = float(np.abs(array - answers[name]).max() / np.abs(answers[name]).max())
            active = float((answers["activations"] > 0).mean())
            print(f"{known.parent.name}: {name} {array.shape}, deviation {deviation:.1e}, {active:.1%} active")
            agree &= deviation <= TOLERANCE and 0 < active < 1
        site = autoencoder.cfg.metadata.site
        print(f"{known.parent.name}: {type(autoencoder).__name__}, site {site!r} in its metadata")
        agree &= site is not None
    return agree


if __name__ == "__main__":
    action, place = sys.argv[1], Path(sys.argv[2])
    if action == "write":
        write(place)
    else:
        sys.exit(0 if check(place) else "sae-lens does not agree with this project")
