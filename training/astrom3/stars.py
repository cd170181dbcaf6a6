"""Sets of stars in the two layouts that are published on Hugging Face, read from local Parquet files.

`AstroM3Dataset`: raw photometry (N, 3), spectra (M, 3), metadata by name, and the label by name. `AstroM3Processed`:
the same preprocessed: photometry (N, 9), spectra (3, 2575), 34 metadata values, and the label by number. The columns
reveal the layout. The directory has a folder for each subset and seed, with the splits: `full_42/train*.parquet`,
`validation*`, `test*`. Nothing is downloaded. Data that do not have the shapes of a layout are refused with file and
row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import compute, parquet
from torch import Tensor

from training.astrom3.model.network import CLASSES
from training.astrom3.model.preprocess import (
    CHANNELS,
    METADATA_COLUMNS,
    PHOTOMETRY_FEATURES,
    WAVELENGTHS,
    ObservationsError,
    Padding,
    prepare_light_curve,
    prepare_metadata,
    prepare_spectrum,
    to_length,
)
from training.errors import DatasetError

Split = Literal["train", "validation", "test"]
Subset = Literal["full", "sub50", "sub25", "sub10"]
DIVISORS: dict[Subset, int] = {"full": 1, "sub50": 2, "sub25": 4, "sub10": 10}
"""Factor by which a subset is smaller than the full set."""
COLUMNS = ("photometry", "spectra", "metadata", "label")
SPECTRUM_CHANNELS = 3
ROWS_AT_ONCE = 512
"""Number of rows that are read and preprocessed together; a row of the raw layout has 100 kB."""

Shown = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A batch of N stars: photometry [N, L, 9], mask [N, L], spectra [N, 3, 2575], metadata [N, 34], float32; labels
int64[N]."""


@dataclass(frozen=True, slots=True)
class StarSet:
    """N preprocessed stars in memory (31 kB each, and the light curves); `stars[rows]` selects a subset."""

    light_curves: Sequence[NDArray[np.float32]]  # N arrays [n, 9], not yet cut
    spectra: NDArray[np.float32]  # [N, 3, 2575]
    metadata: NDArray[np.float32]  # [N, 34]
    label: NDArray[np.int64]  # [N] index into CLASSES
    padding: Padding
    """The padding of the layout: see `preprocess.Padding`."""

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: NDArray[np.int64]) -> StarSet:
        light_curves = [self.light_curves[row] for row in rows.tolist()]
        return replace(
            self,
            light_curves=light_curves,
            spectra=self.spectra[rows],
            metadata=self.metadata[rows],
            label=self.label[rows],
        )


class ShownStars(torch.utils.data.Dataset[Shown]):
    """A torch data set of stars in batches. Light curves longer than `length` are cut about their middle.

    For training, with a `seed`, they are cut at random places, which depend on the seed and the stars of the batch:
    places change from epoch to epoch, and a resumed training has the same places as an uninterrupted one.
    """

    def __init__(self, stars: StarSet, length: int, seed: int | None = None) -> None:
        self.stars = stars
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return len(self.stars)

    def __getitems__(self, rows: Sequence[int]) -> Shown:
        """Return the batch of these rows; called by torch's DataLoader."""
        stars = self.stars[np.array(rows)]
        rng = None if self.seed is None else np.random.default_rng([self.seed, *rows])
        cut = [to_length(light_curve, self.length, rng, stars.padding) for light_curve in stars.light_curves]
        photometry, mask = (np.stack(parts) for parts in zip(*cut, strict=True))
        arrays = (photometry, mask, stars.spectra, stars.metadata)
        return *(torch.from_numpy(array) for array in arrays), torch.from_numpy(stars.label)  # type: ignore[return-value]


def read_stars(directory: Path, subset: Subset, seed: int, split: Split) -> StarSet:
    """Return a split of a subset of the stars.

    A subset that has no folder of its own is drawn from the full set with `seed`. Raises DatasetError if the full set
    is missing as well, or if a file has neither layout.
    """
    folder = directory / f"{subset}_{seed}"
    drawn = not folder.is_dir()
    if drawn:
        folder = directory / f"full_{seed}"
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise DatasetError(f"{folder}: there is no {split}*.parquet; each subset and seed needs a folder")
    parts = [part for file in files for part in _read(file)]
    if not parts:
        raise DatasetError(f"{folder}: {split}*.parquet contain no stars")
    stars = StarSet(
        [light_curve for part in parts for light_curve in part.light_curves],
        np.concatenate([part.spectra for part in parts]),
        np.concatenate([part.metadata for part in parts]),
        np.concatenate([part.label for part in parts]),
        parts[0].padding,
    )
    if drawn:
        rows = class_capped(stars.label, DIVISORS[subset], seed)
        if not len(rows):
            raise DatasetError(
                f"{folder}: {subset} would contain none of the {len(stars)} stars of {split}: give more stars"
            )
        stars = stars[rows]
    return stars


def class_capped(label: NDArray[np.int64], divisor: int, seed: int) -> NDArray[np.int64]:
    """Return the rows of a subset `divisor` times smaller, int64[n], ascending.

    The subset has at most a fixed number of stars of each class (see `class_cap`), chosen at random with `seed`.
    """
    cap = class_cap(np.bincount(label).tolist(), len(label) // divisor)
    order = np.random.default_rng(seed).permutation(len(label))
    by_class = order[np.argsort(label[order], kind="stable")]
    ordered = label[by_class]
    rank = np.arange(len(label)) - np.searchsorted(ordered, ordered)
    return np.sort(by_class[rank < cap])


def class_cap(counts: Sequence[int], goal: int) -> int:
    """Return the largest number of stars of each class in a subset of `goal` stars, so that rare classes stay complete.

    As published, the rarest class is always treated as complete, even if that is wrong: the cap for 17,063 / 10 stars
    is 166, not 170.
    """
    ascending = sorted(count for count in counts if count)
    whole = 0
    for i, count in enumerate(ascending[:-1], 1):
        whole += count
        if whole + (len(ascending) - i) * ascending[i] >= goal:
            return (goal - whole) // (len(ascending) - i)
    return ascending[-1]


def _read(file: Path) -> list[StarSet]:
    """Return the preprocessed stars of a file, in parts.

    Only one part at a time is held in memory before its preprocessing: unprocessed stars take several times the memory.
    """
    parts, first = [], 0
    try:
        table = parquet.ParquetFile(file)
        if absent := [name for name in COLUMNS if name not in table.schema_arrow.names]:
            raise DatasetError(f"{file}: no column {', '.join(absent)}")
        prepare = _prepare if pa.types.is_struct(table.schema_arrow.field("metadata").type) else _prepared
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=list(COLUMNS)):
            if without := [name for name in COLUMNS if batch.column(name).null_count]:
                raise DatasetError(f"{file}: {without[0]} is missing in a row from {first} on")
            parts.append(prepare(batch, f"{file}: row ", first))
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as Parquet: {error}") from error
    return parts


def _prepare(batch: pa.RecordBatch, where: str, first: int) -> StarSet:
    """Preprocess rows of `AstroM3Dataset`."""
    observations = _matrices(batch.column("photometry"), 3, f"{where}{first} on: photometry")
    spectra = _matrices(batch.column("spectra"), 3, f"{where}{first} on: spectra")
    light_curves, prepared, metadata, label = [], [], [], []
    described = zip(batch.column("metadata").to_pylist(), batch.column("label").to_pylist(), strict=True)
    for i, (values, name) in enumerate(described):
        try:
            named = _flat(values)
            features = np.array([named.get(feature, np.nan) for feature in PHOTOMETRY_FEATURES])
            light_curves.append(prepare_light_curve(observations[i].astype(np.float64), features))
            prepared.append(prepare_spectrum(spectra[i].astype(np.float64)))
            metadata.append(prepare_metadata(named))
            label.append(CLASSES.index(name))
        except ObservationsError as error:
            raise DatasetError(f"{where}{first + i}: {error}") from error
        except ValueError as error:
            raise DatasetError(f"{where}{first + i}: label {name!r} is not one of {', '.join(CLASSES)}") from error
    return StarSet(light_curves, np.stack(prepared), np.stack(metadata), np.array(label), "repeated")


def _prepared(batch: pa.RecordBatch, where: str, first: int) -> StarSet:
    """Return rows of `AstroM3Processed`."""
    where = f"{where}{first} on: "
    light_curves = _matrices(batch.column("photometry"), CHANNELS, f"{where}photometry")
    spectra = _matrices(batch.column("spectra"), len(WAVELENGTHS), f"{where}spectra")
    label = np.asarray(batch.column("label"), np.int64)
    if wrong := [len(spectrum) for spectrum in spectra if len(spectrum) != SPECTRUM_CHANNELS]:
        raise DatasetError(f"{where}a spectrum has {wrong[0]} channels, not {SPECTRUM_CHANNELS}")
    if not ((label >= 0) & (label < len(CLASSES))).all():
        raise DatasetError(f"{where}a label is not between 0 and {len(CLASSES) - 1}")
    metadata = _numbers(batch.column("metadata"), len(METADATA_COLUMNS), f"{where}metadata")
    return StarSet(light_curves, np.stack(spectra), metadata, label, "zero")


def _matrices(column: pa.Array, width: int, what: str) -> list[NDArray[np.float32]]:
    """Return a column of lists of `width` numbers as arrays [n, width], one per row.

    Raises DatasetError for other columns.
    """
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DatasetError(f"{what} is {column.type}, not a list of lists of numbers")
    rows = _numbers(column.flatten(), width, what)
    return np.split(rows, np.cumsum(compute.list_value_length(column).to_numpy())[:-1])


def _numbers(column: pa.Array, width: int, what: str) -> NDArray[Any]:
    """Return a column of `width` numbers per row as an array [n, width]. Raises DatasetError for other columns."""
    if not hasattr(column, "flatten") or pa.types.is_struct(column.type):
        raise DatasetError(f"{what} is {column.type}, not a list of numbers")
    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        raise DatasetError(f"{what} has rows of {lengths[lengths != width][0]:g} values, not {width}")
    numbers: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return numbers


def _flat(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return values by name; published rows hold them in two groups, for the metadata and the photometry encoder."""
    groups = [value for value in metadata.values() if isinstance(value, Mapping)]
    return {name: value for group in groups or [metadata] for name, value in group.items() if value is not None}
