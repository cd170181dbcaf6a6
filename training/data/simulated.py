"""Simulated alerts, decoded, with the kind of each: its label is the truth of the simulation."""

from __future__ import annotations

from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.simulate import BOGUS, REAL, SCHEMAS, simulate_night

KINDS = (*REAL, *BOGUS)
"""The kinds of simulated alerts; those of REAL come first."""
RATES = dict.fromkeys(KINDS, 1.0)
"""All kinds are equally frequent, so that the rare kinds of a real night are learnt as well."""
PACKETS_AT_ONCE = 256


def simulate_cutouts(
    n: int, seed: int, survey: Literal["ztf", "lsst"], size: int
) -> tuple[NDArray[np.float32], NDArray[np.int16], NDArray[np.str_]]:
    """Simulate `n` alerts of a survey, and return them as the decoder delivers them for slots of `size` pixels.

    Returns the cutouts [n, 3, size, size], their boxes [n, 3, 4] (see `AlertBatch`) and the kind of each alert [n].
    """
    decoder = Decoder(open_registry(SCHEMAS), cutout_size=size, columns=())
    cutouts, boxes, kinds = [], [], []
    night = simulate_night(n, seed, survey, RATES)
    while some := list(islice(night, PACKETS_AT_ONCE)):
        kind_of = {alert.alert_id: alert.kind for alert in some}
        batch, _ = decoder.decode([Packet(alert.packet, FilePosition("")) for alert in some])
        cutouts.append(batch.cutouts)
        boxes.append(batch.cutout_box)
        kinds += [kind_of[alert_id] for alert_id in batch.alert_id.tolist()]
    return np.concatenate(cutouts), np.concatenate(boxes), np.array(kinds, np.str_)
