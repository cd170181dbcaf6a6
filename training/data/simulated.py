"""Simulated alerts and the kind of each, which is the truth of the simulation: the labels of trainings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


class SimulatedNight:
    """Packets of a simulated night, in order of time, and the true kinds of the alerts in them.

    Iterate over it once: this simulates `n` alerts, with the arguments of `simulate_night`.
    """

    def __init__(
        self, n: int, seed: int, survey: Literal["ztf", "lsst"], rates: Mapping[str, float] | None = None
    ) -> None:
        self._survey = survey
        self._alerts = simulate_night(n, seed, survey, rates)
        self._kind_of: dict[int, str] = {}

    def __iter__(self) -> Iterator[Packet]:
        for alert in self._alerts:
            self._kind_of[alert.alert_id] = alert.kind
            yield Packet(alert.packet, FilePosition(f"simulated {self._survey} {alert.alert_id}"))

    def kinds(self, alert_id: NDArray[np.int64]) -> NDArray[np.str_]:
        """Return the kinds [N] of alerts whose packets have been simulated, by their ids int64[N]."""
        return np.array([self._kind_of[one] for one in alert_id.tolist()], np.str_)


def simulate_cutouts(
    n: int, seed: int, survey: Literal["ztf", "lsst"], size: int
) -> tuple[NDArray[np.float32], NDArray[np.int16], NDArray[np.str_]]:
    """Simulate `n` alerts of a survey, and return them as the decoder delivers them for slots of `size` pixels.

    Returns the cutouts [n, 3, size, size], their boxes [n, 3, 4] (see `AlertBatch`) and the kind of each alert [n].
    """
    decoder = Decoder(open_registry(SCHEMAS), cutout_size=size, columns=())
    cutouts, boxes, kinds = [], [], []
    night = SimulatedNight(n, seed, survey, RATES)
    for batch, _ in decoder.decode_stream(night, PACKETS_AT_ONCE):
        cutouts.append(batch.cutouts)
        boxes.append(batch.cutout_box)
        kinds.append(night.kinds(batch.alert_id))
    return np.concatenate(cutouts), np.concatenate(boxes), np.concatenate(kinds)
