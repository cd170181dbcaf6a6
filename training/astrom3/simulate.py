"""`astrom3-simulate`: simulates sets of variable stars in the layout of AstroM3Dataset, which `astrom3` reads.

A seed always gives the same set, and sets of different seeds share no star.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from broker_filter.console import progress
from training import arguments as kinds
from training.astrom3.model.network import CLASSES
from training.astrom3.model.preprocess import METADATA_COLUMNS, PHOTOMETRY_FEATURES
from training.astrom3.simulation import SimulatedStar, simulate_star
from training.astrom3.stars import DIVISORS, Split, Subset, class_capped
from training.atomic_write import write_whole

SHARES: Mapping[str, float] = {
    "EW": 0.28,
    "SR": 0.20,
    "EA": 0.13,
    "RRAB": 0.10,
    "EB": 0.08,
    "ROT": 0.07,
    "RRC": 0.05,
    "HADS": 0.03,
    "M": 0.03,
    "DSCT": 0.03,
}
"""Fraction of each class, in the order of AstroM3Dataset. The classes are about as unbalanced as there, but the rarest
ones have more stars."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ABSOLUTE = [name for name in METADATA_COLUMNS if name.endswith("mag") and not name.startswith("e_")]
"""Columns that are published as absolute magnitudes, derived from the parallax."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `astrom3-simulate`."""
    parser.add_argument("out", type=Path, metavar="DIRECTORY", help="directory for the folders of the sets")
    parser.add_argument(
        "--stars",
        type=kinds.positive,
        nargs=3,
        default=(2000, 400, 2000),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="number of stars in each split (default: 2000 400 2000)",
    )
    parser.add_argument(
        "--seed", type=kinds.seed, nargs="+", default=[42], help="seeds, one for each set (default: 42)"
    )
    parser.add_argument(
        "--subset", choices=DIVISORS, nargs="+", default=["full"], help="subsets to write (default: full)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Simulate the sets that do not exist yet."""
    counts = dict(zip(SPLITS, arguments.stars, strict=True))
    for seed in arguments.seed:
        write_stars(arguments.out, seed, counts, arguments.subset)
    print(f"{arguments.out}: sets of seeds {', '.join(map(str, arguments.seed))}")


def write_stars(directory: Path, seed: int, counts: Mapping[Split, int], subsets: Sequence[Subset] = ("full",)) -> None:
    """Write `{subset}_{seed}/{split}.parquet` with `counts` stars in each split, and fewer in smaller subsets.

    Metadata are transformed and standardised over the training stars, as published. Existing files are not changed,
    even if they were written with other counts.
    """
    files = {
        (subset, split): directory / f"{subset}_{seed}" / f"{split}.parquet" for subset in subsets for split in counts
    }
    if all(file.exists() for file in files.values()):
        return
    scale: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    for number, (split, count) in enumerate(counts.items()):
        kinds = np.repeat(list(SHARES), _shares(count))
        with progress(f"Simulating {split}", count, "stars") as advance:
            stars = []
            for i, kind in enumerate(np.random.default_rng([seed, number]).permutation(kinds).tolist()):
                stars.append(simulate_star(kind, np.random.default_rng([seed, number, i])))
                advance(1)
        catalogue = np.stack([_transformed(star) for star in stars])
        scale = scale or (catalogue.mean(0), catalogue.std(0))
        table = _table(stars, (catalogue - scale[0]) / scale[1])
        label = np.array([CLASSES.index(star.truth.kind) for star in stars])
        for subset in subsets:
            path = files[subset, split]
            path.parent.mkdir(parents=True, exist_ok=True)
            part = table.take(class_capped(label, DIVISORS[subset], seed))
            write_whole(path, lambda file, part=part: parquet.write_table(part, file, compression="zstd"))  # type: ignore[misc]


def _shares(count: int) -> NDArray[np.int64]:
    """Return the number of stars of each class, int64[classes], which sum to `count`.

    Numbers are rounded by the largest remainder; each class has at least one star if `count` allows.
    """
    exact = np.array(list(SHARES.values())) * count
    whole: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: count - whole.sum()]] += 1
    return whole


def _transformed(star: SimulatedStar) -> NDArray[np.float64]:
    """Return METADATA_COLUMNS and PHOTOMETRY_FEATURES transformed as published, before standardisation: float64[38].

    https://github.com/MeriDK/AstroM3, dev/notebooks/054: absolute magnitudes from the parallax (1 mas if it is not
    positive); cosine of the galactic longitude, sine of the latitude; log10 of the period.
    """
    values = star.metadata | star.features
    parallax = values["parallax"] if values["parallax"] > 0 else 1.0
    values |= {name: values[name] - 10 + 5 * np.log10(parallax) for name in ABSOLUTE}
    values |= {"l": np.cos(np.radians(values["l"])), "b": np.sin(np.radians(values["b"]))}
    values["period"] = np.log10(values["period"])
    return np.array([values[name] for name in (*METADATA_COLUMNS, *PHOTOMETRY_FEATURES)])


def _table(stars: Sequence[SimulatedStar], catalogue: NDArray[np.float64]) -> pa.Table:
    """Return rows in the layout of AstroM3Dataset. `catalogue`: standardised values [N, 38]."""
    rows = pa.list_(pa.list_(pa.float32()))
    exact = pa.list_(pa.list_(pa.float64()))  # float32 is too imprecise for Julian days
    columns = [pa.array(column) for column in catalogue.T]
    groups = [
        pa.StructArray.from_arrays(columns[: len(METADATA_COLUMNS)], list(METADATA_COLUMNS)),
        pa.StructArray.from_arrays(columns[len(METADATA_COLUMNS) :], list(PHOTOMETRY_FEATURES)),
    ]
    return pa.table(
        {
            "photometry": _lists([star.photometry for star in stars], exact),
            "spectra": _lists([star.spectrum.astype(np.float32) for star in stars], rows),
            "metadata": pa.StructArray.from_arrays(groups, ["meta_cols", "photo_cols"]),
            "label": [star.truth.kind for star in stars],
        }
    )


def _lists(matrices: Sequence[NDArray[np.floating]], kind: pa.ListType) -> pa.Array:
    """Return matrices [n, 3], with different n, as an Arrow column of lists of lists."""
    flat = np.concatenate(matrices)
    width = flat.shape[1]
    inner = pa.ListArray.from_arrays(np.arange(len(flat) + 1, dtype=np.int32) * width, pa.array(flat.ravel()))
    ends = np.cumsum([0, *(len(matrix) for matrix in matrices)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, inner).cast(kind)
