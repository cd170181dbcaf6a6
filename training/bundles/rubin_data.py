"""The data of `train-rubin`: LSST alerts, earlier detections of their objects, ZTF alerts and simulated alerts.

All images are prepared as the bundle serves them, so that a network sees the same units from both surveys. ZTF's pixels
of 1 arcsec are interpolated to half that size, because its PSF then has about as many pixels as Rubin's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from broker_filter.packets.batch import PLANES, PSF_SIZE, AlertBatch, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.alerts import RawAlerts, raw_alerts
from broker_filter.scoring.bundle import WEIGHTS, ImageInput, Inputs, MetadataColumn, Part, PsfInput
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.networks.snrnet import FLAGGED, METADATA, SIZE
from broker_filter.scoring.preprocess import prepare, prepare_images, prepare_psf
from broker_filter.simulate import REAL, SCHEMAS
from broker_filter.streaming.archives import read_packets
from training.bundles.distil import run_over
from training.bundles.train_default import published_score
from training.data.datasets import PACKETS_AT_ONCE, load_alerts, no_plane
from training.data.detection_tables import integers, numbers
from training.data.simulated import KINDS, SimulatedNight
from training.errors import DatasetError

INPUTS = Inputs(
    images=ImageInput(size=SIZE, order=("science", "template", "difference"), normalisation="snr", padding=0),
    metadata=tuple(MetadataColumn(name=name, fill=0, flag=name in FLAGGED) for name in METADATA),
    psf=PsfInput(size=SIZE, order=("difference",), normalisation="peak", fallback_fwhm={"lsst": 5.0}),
)
"""The inputs of the bundle. The difference image's PSF is centred; a PSF of 5 px (1 arcsec) stands for an absent
one."""
DECODED_SIZE = 63
"""Side of the decoded cutouts in pixels: what the bundle `default` needs, with which the new one is compared."""
ZTF_CROP = 17
"""Side of the centre of a ZTF stamp, in pixels, that becomes SIZE half-size pixels."""
ZTF_FWHM = 4.0
"""Full width at half maximum, in half-size pixels, of the Gaussian that stands for ZTF's PSF, which packets lack."""
LSSTCAM_VISIT = 10**12
"""Ids of LSSTCam's visits have 13 digits: the date and five digits. Simulated ones begin with 70 instead of 20."""
SIMULATED_DAY = 3 * 10**12
OF_LSSTCAM = f"visit > {LSSTCAM_VISIT} and visit < {SIMULATED_DAY}"
"""The filter expression that selects alerts of LSSTCam."""
HSC_VISIT = 10**5
"""Ids of HSC's visits have at most 5 digits."""
CLASSES = ("asteroid", "agn", "variable", "transient", "bogus")
CLASS_OF_KIND = {"asteroid": 0, "agn": 1, "variable_star": 2, "supernova": 3}
"""The class of each kind of simulated alert that is real; all other kinds are bogus."""
BOGUS_CLASS = CLASSES.index("bogus")
RATES = {
    "variable_star": 0.14,
    "asteroid": 0.14,
    "agn": 0.13,
    "supernova": 0.13,
    "noise": 0.08,
    "residual": 0.10,
    "dipole": 0.05,
    "refraction": 0.05,
    "cosmic_ray": 0.03,
    "bad_pixels": 0.03,
    "bleed_trail": 0.02,
    "satellite": 0.02,
    "diffraction_spike": 0.02,
    "ghost": 0.02,
    "template_edge": 0.02,
    "edge": 0.02,
}
"""The frequencies of the kinds of simulated alerts in training: half bogus, and no kind too rare to learn."""


@dataclass(frozen=True, slots=True)
class Seen:
    """N alerts as the network takes them: what it sees, and its targets."""

    images: Tensor  # [N, 4, SIZE, SIZE] the cutouts and the PSF of the difference
    metadata: Tensor  # [N, F] metadata and flags
    real: Tensor  # [N] probability that the alert is real: reliability, drb or the truth
    kind: NDArray[np.int64]  # [N] index into KINDS for simulated alerts, else -1
    visit: NDArray[np.int64]  # [N] 0 where there is none
    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    detections: NDArray[np.float64]  # [N] detections of the object so far, this one included; NaN where not decoded

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: NDArray[np.bool_]) -> Seen:
        chosen = torch.from_numpy(rows)
        return Seen(
            self.images[chosen],
            self.metadata[chosen],
            self.real[chosen],
            self.kind[rows],
            self.visit[rows],
            self.alert_id[rows],
            self.object_id[rows],
            self.detections[rows],
        )

    @property
    def of_lsstcam(self) -> NDArray[np.bool_]:
        """Whether an alert is of LSSTCam on the sky, bool[N]."""
        return (self.visit > LSSTCAM_VISIT) & (self.visit < SIMULATED_DAY)

    @property
    def of_hsc(self) -> NDArray[np.bool_]:
        """Whether an alert is of HSC, processed by Rubin's pipeline, bool[N]."""
        return (self.visit > 0) & (self.visit < HSC_VISIT)


@dataclass(frozen=True, slots=True)
class Detections:
    """N detections without images: the metadata of LSSTCam's earlier diaSources, and their reliability."""

    metadata: Tensor  # [N, F] metadata and flags
    real: Tensor  # [N] reliability
    visit: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N] diaObjectId

    def __len__(self) -> int:
        return len(self.real)


def load_lsst(inputs: Sequence[Path], schemas: str | None) -> tuple[Seen, RawAlerts]:
    """Return all LSST alerts that have a reliability, each alert id once.

    `inputs` are files, folders and archives. The second result holds the same alerts as decoded, with cutouts of
    DECODED_SIZE. Raises DatasetError if no alert is of LSSTCam.
    """
    decoder = Decoder(
        open_registry(schemas), cutout_size=DECODED_SIZE, columns=(*METADATA, "visit", "reliability"), planes=PLANES
    )
    packets = read_packets(inputs, wanted=decoder.fields)
    batches: list[tuple[RawAlerts, NDArray[np.int64], NDArray[np.str_]]] = []
    known: set[int] = set()
    for batch, _ in decoder.decode_batches(packets.batches(PACKETS_AT_ONCE)):
        reliability = batch.metadata[:, batch.columns.index("reliability")]
        wanted = (batch.survey == Survey.LSST) & np.isfinite(reliability)
        for n in np.flatnonzero(wanted).tolist():
            wanted[n] = int(batch.alert_id[n]) not in known
            known.add(int(batch.alert_id[n]))
        batches.append((raw_alerts(batch)[wanted], batch.alert_id[wanted], np.array(batch.object_id, np.str_)[wanted]))
    nothing = DatasetError(f"{', '.join(map(str, inputs))}: no alert of LSSTCam with a reliability could be decoded")
    if not batches:
        raise nothing
    raw = _joined([part for part, _, _ in batches])
    visit, reliability = (raw.metadata[:, raw.columns.index(name)] for name in ("visit", "reliability"))
    seen = Seen(
        *_as_seen(raw),
        real=torch.from_numpy(reliability.astype(np.float32)),
        kind=np.full(len(raw), -1),
        visit=np.nan_to_num(visit).astype(np.int64),
        alert_id=np.concatenate([alert_id for _, alert_id, _ in batches]),
        object_id=np.concatenate([object_id for _, _, object_id in batches]),
        detections=np.full(len(raw), np.nan),
    )
    if not seen.of_lsstcam.any():
        raise nothing
    return seen, raw


def _as_seen(raw: RawAlerts) -> tuple[Tensor, Tensor]:
    """Return the images with the PSF [N, 4, SIZE, SIZE], and the metadata [N, F], of alerts as decoded."""
    inputs = {name: torch.from_numpy(array) for name, array in prepare(raw, INPUTS).items()}
    return torch.cat([inputs["images"], inputs["psf"]], dim=1), inputs["metadata"]


def _joined(parts: Sequence[RawAlerts]) -> RawAlerts:
    def together(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(part, name) for part in parts])

    return RawAlerts(
        cutouts=together("cutouts"),  # type: ignore[arg-type]
        cutout_box=together("cutout_box"),  # type: ignore[arg-type]
        metadata=together("metadata"),  # type: ignore[arg-type]
        columns=parts[0].columns,
        variance=together("variance"),  # type: ignore[arg-type]
        psf=together("psf"),  # type: ignore[arg-type]
        survey=together("survey"),  # type: ignore[arg-type]
    )


def load_detections(tables: Sequence[Path]) -> Detections:
    """Return the diaSources of LSSTCam in Parquet files, each once.

    A row is a diaSource, or an alert whose column `prvDiaSources` lists them. Raises DatasetError if there is none.
    """
    ids: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.float64]] = []
    objects: list[NDArray[np.str_]] = []
    for file in tables:
        table = parquet.read_table(file)
        if "prvDiaSources" in table.column_names:
            listed = table["prvDiaSources"].combine_chunks()
            if not pa.types.is_struct(getattr(listed.type, "value_type", pa.null())):
                continue  # no alert of this file has a history
            table = pa.Table.from_struct_array(listed.flatten())
        if not {"reliability", "visit", "diaObjectId", "diaSourceId"} <= set(table.column_names):
            continue
        ids.append(np.stack([integers(table, name) for name in ("diaSourceId", "visit")]))
        columns.append(np.stack([numbers(table, name) for name in (*METADATA, "reliability")], axis=1))
        objects.append(integers(table, "diaObjectId").astype(np.str_))
    if not ids:
        raise DatasetError(f"{', '.join(map(str, tables))}: no table has diaSources with a reliability")
    (source, visit), values, object_id = np.concatenate(ids, axis=1), np.concatenate(columns), np.concatenate(objects)
    of_lsstcam = (visit > LSSTCAM_VISIT) & (visit < SIMULATED_DAY) & np.isfinite(values[:, -1])
    first = np.zeros(len(source), np.bool_)
    first[np.unique(source, return_index=True)[1]] = True
    rows = of_lsstcam & first
    missing = np.isnan(values[:, [METADATA.index(name) for name in FLAGGED]])
    metadata = np.concatenate([np.nan_to_num(values[:, :-1]), missing], axis=1)[rows]
    return Detections(
        torch.from_numpy(metadata.astype(np.float32)),
        torch.from_numpy(values[rows, -1].astype(np.float32)),
        visit[rows],
        object_id[rows],
    )


def load_ztf(inputs: Sequence[Path], teacher: Part) -> Seen:
    """Return ZTF alerts at half-size pixels, with their target.

    The target of an alert is its drb, or the score of `teacher` if drb is missing.
    """
    alerts = load_alerts(inputs, DECODED_SIZE, ("drb",))
    network = load_network(teacher.card.architecture, load_file(teacher.directory / WEIGHTS))
    score = run_over(network, teacher.card.inputs.images, alerts)[0][:, 0].sigmoid()
    drb = torch.from_numpy(published_score(alerts).astype(np.float32))
    images = prepare_images(
        alerts.cutouts, alerts.cutout_box, INPUTS.images.model_copy(update={"size": DECODED_SIZE}), alerts.raw.variance
    )
    start = DECODED_SIZE // 2 - ZTF_CROP // 2
    inner = torch.from_numpy(images[..., start : start + ZTF_CROP, start : start + ZTF_CROP])
    halved = interpolate(inner, size=2 * ZTF_CROP - 1, mode="bilinear", align_corners=True)[..., 1:-1, 1:-1]
    gaussian = PsfInput(size=SIZE, order=("difference",), normalisation="peak", fallback_fwhm={"ztf": ZTF_FWHM})
    psf = prepare_psf(no_plane(1, PSF_SIZE), np.array([Survey.ZTF], np.uint8), gaussian)
    n = len(alerts)
    return Seen(
        images=torch.cat([halved, torch.from_numpy(psf).expand(n, -1, -1, -1)], dim=1),
        metadata=torch.zeros(n, len(METADATA) + len(FLAGGED)),
        real=torch.where(drb.isfinite(), drb, score),
        kind=np.full(n, -1),
        visit=np.zeros(n, np.int64),
        alert_id=alerts.alert_id,
        object_id=alerts.object_id,
        detections=np.full(n, np.nan),
    )


def simulate(n: int, seed: int, rates: Mapping[str, float] = RATES) -> Seen:
    """Return `n` simulated LSST alerts with their truth. `rates`: the relative frequency of each kind."""
    night = SimulatedNight(n, seed, "lsst", rates)
    decoder = Decoder(open_registry(SCHEMAS), cutout_size=SIZE, columns=(*METADATA, "ndethist"), planes=PLANES)
    batches: list[AlertBatch] = [batch for batch, _ in decoder.decode_stream(night, PACKETS_AT_ONCE)]
    alert_id = np.concatenate([batch.alert_id for batch in batches])
    kinds = night.kinds(alert_id)
    images, metadata = _as_seen(_joined([raw_alerts(batch) for batch in batches]))
    return Seen(
        images,
        metadata,
        real=torch.from_numpy(np.isin(kinds, tuple(REAL)).astype(np.float32)),
        kind=np.array([KINDS.index(kind) for kind in kinds]),
        visit=np.zeros(len(kinds), np.int64),
        alert_id=alert_id,
        object_id=np.concatenate([np.array(batch.object_id, np.str_) for batch in batches]),
        detections=np.concatenate([batch.metadata[:, batch.columns.index("ndethist")] for batch in batches]),
    )


def simulated_classes(simulated: Seen) -> NDArray[np.int64]:
    """Return the class of each of N simulated alerts, an index into CLASSES, int64[N]."""
    return np.array([CLASS_OF_KIND.get(KINDS[kind], BOGUS_CLASS) for kind in simulated.kind.tolist()])
