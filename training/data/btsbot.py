"""Reads the training set of BTSbot in the layout that its authors publish (Zenodo 10839690).

For each split there are `{split}_triplets_{version}.npy` and `{split}_cand_{version}.csv`, row by row of the same
alerts; a version is for example `v11`, or `v11_N100` with at most 100 alerts of a source. The layout is that of
`make_triplet`, `prep_alerts` and `train_val_test_split.py` in https://github.com/nabeelre/BTSbot: each cutout is
divided by its L2 norm, with 0 for missing pixels; a stamp at the edge of an image is filled up at the end of its axes.

The files are untrusted: nothing is unpickled, the pixels are memory-mapped, and shapes and sizes are checked first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute, csv

from broker_filter.packets.batch import CUTOUTS
from broker_filter.packets.photometry import NO_VALUE
from training.data.datasets import SPLITS, Split
from training.errors import DatasetError

COLUMNS = (
    "sgscore1",
    "distpsnr1",
    "sgscore2",
    "distpsnr2",
    "fwhm",
    "magpsf",
    "sigmapsf",
    "chipsf",
    "ra",
    "dec",
    "diffmaglim",
    "ndethist",
    "nmtchps",
    "age",
    "days_since_peak",
    "days_to_peak",
    "peakmag_so_far",
    "new_drb",
    "ncovhist",
    "nnotdet",
    "chinr",
    "sharpnr",
    "scorr",
    "sky",
    "maxmag_so_far",
)
"""The metadata columns of BTSbot in its order; `packets.surveys` has columns of the same names and units."""
CLASSES = ("not_bts", "bts")
"""Names of the labels 0 and 1."""
FILE_NAMES: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
"""The names of the splits in the names of files."""
OBJECT, TARGET, ALERT = "objectId", "label", "candid"
SIZE = 63
"""Pixels per side of a cutout."""
PADDING = np.float32(1e-9)
"""Value of the pixels with which a stamp at the edge of an image is filled up."""
NORM_ERROR = 1e-3
"""Largest deviation of the L2 norm of a normalised cutout from 1. Rounding to float32 gives about 1e-6."""
MAX_ALERTS = 10_000_000
"""Largest number of alerts in a split, about ten times the published number; their metadata are held in memory."""
MAX_TABLE_BYTES = 2**33
"""Largest table, about 1 kB for each of 8 million alerts."""


@dataclass(frozen=True, slots=True)
class PublishedSplit:
    """The N alerts of a published split. The pixels stay on disk until `cutouts` reads some of them."""

    split: Split
    file: Path  # of the triplets
    triplets: NDArray[np.floating]  # [N, 63, 63, 3] memory-mapped
    alert_id: NDArray[np.int64] | None  # [N]; None if the table has no exact alert ids
    object_id: NDArray[np.str_]  # [N]
    label: NDArray[np.int64]  # [N] index into CLASSES
    metadata: NDArray[np.float64]  # [N, 25] NaN where missing

    def __len__(self) -> int:
        return len(self.label)

    def cutouts(self, rows: slice) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Return cutouts float32[n, 3, 63, 63], zero outside the stamps, and boxes int16[n, 3, 4] of consecutive rows.

        Raises DatasetError if a cutout is not normalised. A cutout without any usable pixel has no norm, and is kept.
        """
        with np.errstate(over="ignore"):
            cutouts = np.ascontiguousarray(np.moveaxis(self.triplets[rows], -1, 1), np.float32)
        norm = np.sqrt(np.square(cutouts, dtype=np.float64).sum(axis=(2, 3)))
        wrong = np.argwhere((np.abs(norm - 1) > NORM_ERROR) & (norm > 0))
        if len(wrong):
            n, c = wrong[0].tolist()
            raise DatasetError(
                f"{self.file}: the {CUTOUTS[c]} cutout of row {rows.start + n} has the L2 norm {norm[n, c]:.6g}, but "
                "the published cutouts are divided by their norm: use the published file, or build from packets"
            )
        filled = cutouts == PADDING
        box = np.zeros((*cutouts.shape[:2], 4), np.int16)
        box[..., 2] = _length(filled.all(axis=3))
        box[..., 3] = _length(filled.all(axis=2))
        inside = np.arange(SIZE) < box[..., 2:, None]  # [n, 3, 2, 63]
        cutouts[~(inside[:, :, 0, :, None] & inside[:, :, 1, None, :])] = 0
        return cutouts, box


def open_published(folder: Path, version: str) -> list[PublishedSplit]:
    """Open the three splits of a version of the set, in the order of SPLITS.

    Raises DatasetError if a file is absent or cannot be read, if an array has another shape or type, if a table lacks a
    column or holds another label than 0 and 1, if array and table have different lengths, or if a split is empty.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder; name the folder with BTSbot's {FILE_NAMES['train']}_triplets_*")
    return [_open_split(folder, split, version) for split in SPLITS]


def rows_of(splits: Sequence[PublishedSplit], at_once: int) -> Iterator[tuple[PublishedSplit, slice]]:
    """Yield the alerts of all splits in order, as slices of at most `at_once` rows of a split."""
    for part in splits:
        for start in range(0, len(part), at_once):
            yield part, slice(start, min(start + at_once, len(part)))


def _length(filled: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of pixels before the trailing filled ones, along the last axis.

    It is the length of the axis if all pixels are filled.
    """
    trailing = np.argmin(filled[..., ::-1], axis=-1)
    return np.asarray(filled.shape[-1] - trailing)


def _open_split(folder: Path, split: Split, version: str) -> PublishedSplit:
    array = folder / f"{FILE_NAMES[split]}_triplets_{version}.npy"
    table = folder / f"{FILE_NAMES[split]}_cand_{version}.csv"
    if absent := [file for file in (array, table) if not file.is_file()]:
        there = sorted(
            file.stem.partition("_triplets_")[2] for file in folder.glob(f"{FILE_NAMES[split]}_triplets_*.npy")
        )
        raise DatasetError(
            f"{absent[0]}: no such file. Versions of the split {FILE_NAMES[split]} in this folder: "
            f"{', '.join(there) or 'none'}"
        )
    triplets = _map_triplets(array)
    alerts = _read_table(table)
    if len(triplets) != len(alerts):
        raise DatasetError(
            f"{array}: holds {len(triplets)} triplets, but {table.name} has {len(alerts)} rows: both must be of the "
            "same alerts; download them again"
        )
    label = alerts[TARGET].to_numpy()
    if not np.isin(label, (0, 1)).all():
        row = int(np.flatnonzero(~np.isin(label, (0, 1)))[0])
        raise DatasetError(f"{table}: the {TARGET} of row {row} is {label[row]:g}, not 0 or 1")
    if alerts[OBJECT].null_count or compute.any(compute.equal(alerts[OBJECT], "")).as_py():
        raise DatasetError(f"{table}: a row has no {OBJECT}, without which its source is unknown")
    metadata = np.stack([alerts[name].to_numpy() for name in COLUMNS], axis=1)
    metadata[metadata == NO_VALUE] = np.nan
    return PublishedSplit(
        split,
        array,
        triplets,
        _alert_ids(alerts),
        alerts[OBJECT].to_numpy(zero_copy_only=False).astype(np.str_),
        label.astype(np.int64),
        metadata,
    )


def _map_triplets(file: Path) -> NDArray[np.floating]:
    """Return the memory-mapped array of a file. Raises DatasetError if it is no array of triplets."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OverflowError, EOFError, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as an array of numbers: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray) or array.shape[1:] != (SIZE, SIZE, len(CUTOUTS)):
        shape = list(array.shape) if isinstance(array, np.ndarray) else type(array).__name__
        raise DatasetError(f"{file}: holds {shape}, not triplets of the shape [N, {SIZE}, {SIZE}, {len(CUTOUTS)}]")
    if array.dtype.kind != "f" or array.dtype.itemsize < np.dtype(np.float32).itemsize:
        raise DatasetError(
            f"{file}: holds {array.dtype}; triplets of alerts are float32 or float64, and images of other surveys "
            "cannot be used"
        )
    if not 0 < len(array) <= MAX_ALERTS:
        raise DatasetError(f"{file}: holds {len(array)} triplets; there must be from 1 to {MAX_ALERTS}")
    return array


def _read_table(file: Path) -> pa.Table:
    """Return the needed columns of a table. Raises DatasetError if one is absent or not of its type."""
    if (size := file.stat().st_size) > MAX_TABLE_BYTES:
        raise DatasetError(f"{file}: has {size} bytes; a table may have at most {MAX_TABLE_BYTES}")
    kinds = {OBJECT: pa.string(), TARGET: pa.float64(), ALERT: pa.string(), **dict.fromkeys(COLUMNS, pa.float64())}
    try:
        with csv.open_csv(file) as opened:
            names = opened.schema.names
        if missing := [name for name in (OBJECT, TARGET, *COLUMNS) if name not in names]:
            raise DatasetError(f"{file}: no column {', '.join(missing)}; BTSbot's tables have them")
        wanted = [name for name in kinds if name in names]
        return csv.read_csv(file, convert_options=csv.ConvertOptions(column_types=kinds, include_columns=wanted))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as a table: {' '.join(str(error).split())}") from error


def _alert_ids(alerts: pa.Table) -> NDArray[np.int64] | None:
    """Return the alert ids int64[N]; None if the table has none, or rounded ones such as 2.46644e+18."""
    if ALERT not in alerts.column_names:
        return None
    try:
        return np.asarray(alerts[ALERT].cast(pa.int64()).to_numpy())
    except (pa.ArrowInvalid, ValueError):
        return None
