"""Data sets on disk: alerts as the service decodes them, with labels, split so that no source is in two splits.

A data set is a directory: `shards/*.arrow` (raw cutouts, boxes, metadata columns and ids, memory-mapped),
`index.parquet` (one row per alert: ids, label, split) and `dataset.yaml` (the card; it is written last, so a directory
without it is incomplete). Reading modifies nothing and loads only what is requested. `build_dataset` writes data sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from pyarrow import parquet
from pydantic import Field, ValidationError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from broker_filter.config import Section
from broker_filter.packets.alert_rows import in_batches
from broker_filter.packets.batch import CUTOUTS, PSF_SIZE, SURVEYS_WITH_PLANES, LightCurves, Plane, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    POINT_COLUMNS,
    POINTS,
    FileName,
    ImageInput,
    Inputs,
    ModelName,
    Sha256,
    describe_problems,
)
from broker_filter.streaming.archives import read_packets
from training.errors import DatasetError

CARD = "dataset.yaml"
INDEX = "index.parquet"
SHARDS = "shards"
LIGHT_CURVES = "light_curves"
"""Column of a shard: lists of light-curve points."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""Names of the splits; the index's column `split` holds positions in this tuple."""


class Shard(Section):
    """A file in `shards`, and its expected contents."""

    file: FileName
    alerts: int = Field(gt=0)
    bytes: int = Field(gt=0, description="Size of the file; it reveals a truncated copy.")
    sha256: Sha256 = Field(description="sha256 of the bytes of the arrays in order, not of the file.")


class SplitRule(Section):
    """The split of sources: these fractions of each class for validation and test, the rest for training."""

    validation: float = Field(default=0.09, gt=0, lt=0.5)
    test: float = Field(default=0.10, gt=0, lt=0.5)
    seed: int = 0


PUBLISHED_SPLIT = SplitRule()
"""The published split: 81 % training, 9 % validation, 10 % test (Rehemtulla et al. 2024, arXiv:2401.15167)."""


class DatasetCard(Section):
    """The contents of `dataset.yaml`."""

    format: Literal[1] = 1
    surveys: tuple[Literal["ztf", "lsst"], ...]
    cutout_size: int = Field(gt=0, description="Pixels per side of the decoded cutouts.")
    columns: tuple[str, ...] = Field(description="Metadata columns, in order.")
    planes: tuple[Plane, ...] = Field(default=(), description="Planes that were decoded besides the cutouts.")
    classes: tuple[ModelName, ...] = Field(min_length=2)
    labels: str = Field(description="Source of the labels, and the values of each class.")
    where: str | None = Field(default=None, description="Filter that alerts had to pass; null: no filter.")
    normalised: Literal["l2_image"] | None = Field(
        default=None,
        description="Normalisation that the stored cutouts have; null: pixels as the survey published them.",
    )
    split: SplitRule | None = Field(description="Rule of the split; null: the split of a published set.")
    counts: dict[str, dict[str, int]] = Field(description="Alerts by class and split.")
    shards: tuple[Shard, ...]
    index_sha256: Sha256
    sha256: Sha256 = Field(description="sha256 of all keys above: the version of the data set.")


@dataclass(frozen=True, slots=True)
class LabelledAlerts:
    """N alerts in memory, with the columns of `AlertBatch`, and their labels."""

    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    label: NDArray[np.int64]  # [N] index into the card's classes
    cutouts: NDArray[np.float32]  # [N, 3, S, S] science, template, difference, as the card's `normalised` says
    cutout_box: NDArray[np.int16]  # [N, 3, 4] y0, x0, height, width
    metadata: NDArray[np.float64]  # [N, F] NaN where missing
    columns: tuple[str, ...]  # F
    mjd: NDArray[np.float64] | None  # [N]
    light_curves: LightCurves | None  # None, like `mjd`, in older data sets, which lack them
    survey: NDArray[np.uint8]  # [N] Survey
    variance: NDArray[np.float32] | None  # [N, 3, S, S]; None in a data set with LSST alerts but without the plane
    psf: NDArray[np.float32] | None  # [N, 3, PSF_SIZE, PSF_SIZE], as `variance`

    def __len__(self) -> int:
        return len(self.alert_id)

    @property
    def raw(self) -> RawAlerts:
        """The fields that models use."""
        return RawAlerts(
            self.cutouts,
            self.cutout_box,
            self.metadata,
            self.columns,
            self.mjd,
            self.light_curves,
            self.variance,
            self.psf,
            self.survey,
        )


class Dataset:
    """An open data set. `dataset["train"]` is one of its splits."""

    def __init__(self, directory: Path, card: DatasetCard, index: pa.Table) -> None:
        self.directory = directory
        self.card = card
        self.alert_id: NDArray[np.int64] = index["alert_id"].to_numpy()
        self.object_id: NDArray[np.str_] = index["object_id"].to_numpy().astype(np.str_)
        self.label: NDArray[np.int64] = index["label"].to_numpy()
        self.split: NDArray[np.int64] = index["split"].to_numpy()
        self._starts = np.cumsum([0, *(shard.alerts for shard in card.shards)])

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open a data set. Raises DatasetError if it is absent, incomplete or damaged."""
        path = directory / CARD
        if not path.is_file():
            half = (directory / SHARDS).is_dir()
            why = (
                f"incomplete: it has no {CARD} yet; run the same build-dataset again"
                if half
                else f"not a data set: there is no {CARD}"
            )
            raise DatasetError(f"{directory}: {why}")
        try:
            card = DatasetCard.model_validate(yaml.safe_load(path.read_bytes()))
            index = parquet.read_table(directory / INDEX)
        except (yaml.YAMLError, pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{directory}: cannot be read: {' '.join(str(error).split())}") from error
        except ValidationError as error:
            raise DatasetError(f"{path}: {describe_problems(error)}") from error
        for shard in card.shards:
            file = directory / SHARDS / shard.file
            size = file.stat().st_size if file.exists() else 0
            if size != shard.bytes:
                raise DatasetError(f"{file}: has {size} bytes instead of {shard.bytes}: copy the data set again")
        if len(index) != sum(shard.alerts for shard in card.shards):
            raise DatasetError(
                f"{directory / INDEX}: its {len(index)} rows do not fit the shards: copy the data set again"
            )
        dataset = cls(directory, card, index)
        if sha256_of(dataset.alert_id, dataset.object_id, dataset.label, dataset.split) != card.index_sha256:
            raise DatasetError(f"{directory / INDEX}: its sha256 is not the one in {path}: copy the data set again")
        return dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset.open, (self.directory,)  # worker processes get the path, not the pixels

    def __getitem__(self, split: Split) -> View:
        return View(self, np.flatnonzero(self.split == SPLITS.index(split)))

    def read(self, rows: NDArray[np.int64]) -> LabelledAlerts:
        """Return the alerts in `rows` int64[n] of the index, in that order, copied into memory."""
        return LabelledAlerts(
            self.alert_id[rows],
            self.object_id[rows],
            self.label[rows],
            self.column("cutouts", rows),
            self.column("cutout_box", rows),
            self.column("metadata", rows),
            self.card.columns,
            self.column("mjd", rows) if self.has_light_curves else None,
            self.light_curves(rows) if self.has_light_curves else None,
            self.column("survey", rows),
            self._plane("variance", rows),
            self._plane("psf", rows),
        )

    def check_pixels(self, images: ImageInput) -> None:
        """Raise DatasetError if the stored cutouts cannot be prepared as the `images` of a network.

        Division by an L2 norm, of an image or of a row, gives the same for a cutout that was divided by its norm
        before, apart from rounding. Noise cannot be estimated any more where missing pixels have become 0.
        """
        if self.card.normalised and not images.normalisation.startswith("l2"):
            raise DatasetError(
                f"{self.directory}: its cutouts were published divided by their L2 norm, but the network has the "
                f"normalisation {images.normalisation}, which needs the pixels of the survey: choose l2_image, or "
                "build a data set from packets"
            )

    @property
    def has_light_curves(self) -> bool:
        """Whether the data set holds light curves; older data sets do not."""
        return all(f"{POINTS}offsets" in arrays for arrays in self._arrays)

    def missing_planes(self, inputs: Inputs) -> tuple[Plane, ...]:
        """Return the planes that a network with these inputs needs and that the data set lacks.

        Planes that no survey of the data set publishes are not counted.
        """
        published = set(self.card.surveys) & {str(survey) for survey in SURVEYS_WITH_PLANES}
        return tuple(plane for plane in inputs.planes if published and plane not in self.card.planes)

    def column(
        self,
        name: Literal["cutouts", "cutout_box", "metadata", "mjd", "survey", "variance", "psf"],
        rows: NDArray[np.int64],
    ) -> NDArray[Any]:
        """Return one array of the shards for the alerts in `rows` int64[n], in the order of `rows`.

        The array [n, ...] is a copy in memory.
        """
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        first = self._arrays[0][name]
        values = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for shard in np.unique(shard_of).tolist():
            here = shard_of == shard
            values[here] = self._arrays[shard][name][rows[here] - self._starts[shard]]
        return values

    def _plane(self, plane: Plane, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        if plane in self.card.planes:
            return self.column(plane, rows)
        if not set(self.card.surveys) & {str(survey) for survey in SURVEYS_WITH_PLANES}:
            return no_plane(len(rows), self.card.cutout_size if plane == "variance" else PSF_SIZE)
        return None

    def light_curves(self, rows: NDArray[np.int64]) -> LightCurves:
        """Return the light curves of the alerts in `rows` int64[n], in the order of `rows`."""
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        parts, places = [], []
        for shard in np.unique(shard_of).tolist():
            here = np.flatnonzero(shard_of == shard)
            columns = {name: self._arrays[shard][f"{POINTS}{name}"] for name in ("offsets", *POINT_COLUMNS)}
            parts.append(LightCurves(**columns)[rows[here] - self._starts[shard]])
            places.append(here)
        return LightCurves.join(parts)[np.argsort(np.concatenate(places))]

    @cached_property
    def _arrays(self) -> list[dict[str, NDArray[Any]]]:
        """The memory-mapped arrays of every shard."""
        return [open_shard(self.directory / SHARDS / shard.file) for shard in self.card.shards]


class View:
    """A subset of a data set: ids and labels are in memory, the rest is read on request."""

    def __init__(self, dataset: Dataset, rows: NDArray[np.int64]) -> None:
        self.dataset = dataset
        self.rows = rows
        self.alert_id = dataset.alert_id[rows]  # [N]
        self.object_id = dataset.object_id[rows]  # [N]
        self.label = dataset.label[rows]  # [N]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> View:
        return View(self.dataset, self.rows[chosen])

    def read(self) -> LabelledAlerts:
        """Return the whole subset, copied into memory."""
        return self.dataset.read(self.rows)

    def metadata(self, columns: Sequence[str]) -> NDArray[np.float64]:
        """Return the columns named `columns`, float64[N, F], NaN where a value is missing.

        Raises DatasetError if a column is absent.
        """
        known = self.dataset.card.columns
        if missing := [name for name in columns if name not in known]:
            raise DatasetError(f"{self.dataset.directory}: the metadata columns {', '.join(missing)} are missing")
        metadata: NDArray[np.float64] = self.dataset.column("metadata", self.rows)
        return metadata[:, [known.index(name) for name in columns]]

    def batches(self, size: int) -> Iterator[LabelledAlerts]:
        """Yield the subset in order, `size` alerts at a time."""
        for start in range(0, len(self), size):
            yield self.dataset.read(self.rows[start : start + size])


def sources_by_class(
    object_id: NDArray[np.str_], label: NDArray[np.int64], n_classes: int, seed: int
) -> list[NDArray[np.str_]]:
    """Return the objects of each class, in a random order that depends only on `seed` and the objects' names.

    `object_id` [N] and `label` int64[N] belong to N alerts. An object with alerts of several classes belongs to the
    class with the fewest objects.
    """
    names, name_of = np.unique(object_id, return_inverse=True)
    per_class = np.bincount(np.unique(np.stack([name_of, label]), axis=1)[1], minlength=n_classes)
    rarest_first = np.argsort(per_class, kind="stable")
    rarity = np.argsort(rarest_first)
    rarest = np.full(len(names), n_classes)
    np.minimum.at(rarest, name_of, rarity[label])
    draw = [hashlib.blake2b(f"{seed} {name}".encode()).digest() for name in names.tolist()]
    order = np.array(sorted(range(len(names)), key=draw.__getitem__))
    return [names[order][rarest_first[rarest[order]] == c] for c in range(n_classes)]


def sha256_of(*arrays: NDArray[Any]) -> str:
    """Return the sha256 of the bytes of the values; strings are joined by newlines and encoded in UTF-8."""
    digest = hashlib.sha256()
    for array in arrays:
        if array.dtype.kind in "OU":
            digest.update("\n".join(array.tolist()).encode())
        else:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def open_shard(file: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a shard by name, read-only and memory-mapped.

    Light curves are stored under POINTS, as in `LightCurves`. Raises DatasetError if the file is truncated.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{file}: not a complete shard: {error}; remove it and run build-dataset again") from error
    arrays = {name: _as_array(batch.column(name)) for name in batch.schema.names if name != LIGHT_CURVES}
    if LIGHT_CURVES in batch.schema.names:
        points = batch.column(LIGHT_CURVES)
        arrays[f"{POINTS}offsets"] = points.offsets.to_numpy()
        arrays |= {f"{POINTS}{name}": points.values.field(name).to_numpy() for name in POINT_COLUMNS}
    return arrays


def _as_array(column: pa.Array) -> NDArray[Any]:
    """Return a column of numbers or of fixed-size arrays without a copy; strings are copied."""
    if isinstance(column, pa.FixedShapeTensorArray):
        return column.to_numpy_ndarray()  # type: ignore[no-any-return]
    return np.asarray(column)


PACKETS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Alerts:
    """N ZTF alerts in memory, with the columns of `AlertBatch`; `alerts[rows]` selects a subset."""

    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    cutouts: NDArray[np.float32]  # [N, 3, S, S]
    cutout_box: NDArray[np.int16]  # [N, 3, 4]
    metadata: NDArray[np.float64]  # [N, F] NaN where missing
    columns: tuple[str, ...]  # F

    def __len__(self) -> int:
        return len(self.alert_id)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Alerts:
        return Alerts(
            self.alert_id[rows],
            self.object_id[rows],
            self.cutouts[rows],
            self.cutout_box[rows],
            self.metadata[rows],
            self.columns,
        )

    @property
    def raw(self) -> RawAlerts:
        """The fields that models use."""
        n, size = len(self), self.cutouts.shape[-1]
        return RawAlerts(
            self.cutouts,
            self.cutout_box,
            self.metadata,
            self.columns,
            variance=no_plane(n, size),
            psf=no_plane(n, PSF_SIZE),
            survey=np.full(n, Survey.ZTF, np.uint8),
        )


def no_plane(n: int, size: int) -> NDArray[np.float32]:
    """Return the planes of n alerts of ZTF, which publishes none.

    The array is NaN of shape [n, 3, size, size], read-only, and takes no memory.
    """
    return np.broadcast_to(np.float32(np.nan), (n, len(CUTOUTS), size, size))


def load_alerts(inputs: Sequence[Path], cutout_size: int, columns: Sequence[str]) -> Alerts:
    """Read every ZTF alert of files, folders and archives as `decode_alerts` does.

    Raises DatasetError if there is no ZTF alert.
    """
    return decode_alerts(read_packets(inputs), ", ".join(map(str, inputs)), cutout_size, columns)


def decode_alerts(packets: Iterable[Packet], source: str, cutout_size: int, columns: Sequence[str]) -> Alerts:
    """Return every ZTF alert of the packets by ascending id, each id once; packets that cannot be decoded are skipped.

    Raises DatasetError, which names the packets' `source`, if there is no ZTF alert.
    """
    decoder = Decoder(open_registry(None), cutout_size=cutout_size, columns=columns)
    batches = []
    for batch, _ in decoder.decode_batches(in_batches(packets, PACKETS_AT_ONCE)):
        objects = np.array(batch.object_id, np.str_)
        alerts = Alerts(batch.alert_id, objects, batch.cutouts, batch.cutout_box, batch.metadata, batch.columns)
        batches.append(alerts[batch.survey == Survey.ZTF])
    if not sum(map(len, batches)):
        raise DatasetError(f"{source}: no ZTF alert could be decoded")
    everything = Alerts(
        np.concatenate([alerts.alert_id for alerts in batches]),
        np.concatenate([alerts.object_id for alerts in batches]),
        np.concatenate([alerts.cutouts for alerts in batches]),
        np.concatenate([alerts.cutout_box for alerts in batches]),
        np.concatenate([alerts.metadata for alerts in batches]),
        tuple(columns),
    )
    return everything[np.unique(everything.alert_id, return_index=True)[1]]


def held_out(object_id: NDArray[np.str_], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return a mask bool[N]: True for the alerts that are held out from training.

    They are all alerts of a random `fraction` of the objects.
    """
    objects = np.unique(object_id)
    chosen = np.random.default_rng(seed).permutation(objects)[: round(fraction * len(objects))]
    return np.isin(object_id, chosen)


def connected(first: NDArray[np.generic], second: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return the group of each of N alerts, int64[N].

    Alerts with an equal value in `first` or in `second` (objects and visits, for example) are in one group, also if
    only other alerts link them.
    """
    if not len(first):
        return np.empty(0, np.int64)
    values, of_first = np.unique(first, return_inverse=True)
    others, of_second = np.unique(second, return_inverse=True)
    nodes = len(values) + len(others)
    links = coo_array((np.ones(len(first)), (of_first, len(values) + of_second)), (nodes, nodes))
    group: NDArray[np.int64] = connected_components(links, directed=False)[1][of_first].astype(np.int64)
    return group
