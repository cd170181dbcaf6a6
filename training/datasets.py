"""Alerts to train on, decoded as the service decodes them, and split so that no object is on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.registry import open_registry
from broker_filter.streaming.archives import read_packets

PACKETS_AT_ONCE = 256
NO_DRB = 0.0
"""Stands, besides null, in packets of the weeks before ZTF had the network: exactly 0, and an empty drbversion."""


@dataclass(frozen=True, slots=True)
class Alerts:
    """N alerts in memory; `alerts[rows]` are some of them."""

    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    cutouts: NDArray[np.float32]  # [N, 3, S, S] as in AlertBatch
    cutout_box: NDArray[np.int16]  # [N, 3, 4]
    drb: NDArray[np.float64]  # [N] the survey's own real/bogus score, NaN where the packet carries none

    def __len__(self) -> int:
        return len(self.alert_id)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Alerts:
        return Alerts(
            self.alert_id[rows], self.object_id[rows], self.cutouts[rows], self.cutout_box[rows], self.drb[rows]
        )


def load_alerts(inputs: Sequence[Path], cutout_size: int) -> Alerts:
    """Every ZTF alert of files, folders and archives, each alert id once; what does not decode is left out."""
    decoder = Decoder(open_registry(None), cutout_size=cutout_size, columns=("drb",))
    packets = read_packets(inputs)
    parts = []
    while some := list(islice(packets, PACKETS_AT_ONCE)):
        batch, _ = decoder.decode(some)
        drb = batch.column("drb")
        parts.append(
            Alerts(
                batch.alert_id,
                np.array(batch.object_id, np.str_),
                batch.cutouts,
                batch.cutout_box,
                np.where(drb == NO_DRB, np.nan, drb),
            )[batch.survey == Survey.ZTF]
        )
    alerts = Alerts(
        np.concatenate([part.alert_id for part in parts]),
        np.concatenate([part.object_id for part in parts]),
        np.concatenate([part.cutouts for part in parts]),
        np.concatenate([part.cutout_box for part in parts]),
        np.concatenate([part.drb for part in parts]),
    )
    return alerts[np.unique(alerts.alert_id, return_index=True)[1]]


def held_out(object_id: NDArray[np.str_], fraction: float, seed: int) -> NDArray[np.bool_]:
    """True for the alerts [N] of a random `fraction` of the objects: those that training must never see."""
    objects = np.unique(object_id)
    chosen = np.random.default_rng(seed).permutation(objects)[: round(fraction * len(objects))]
    return np.isin(object_id, chosen)
