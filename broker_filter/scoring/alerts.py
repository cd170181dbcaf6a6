"""Alerts as far as models look at them: columns of an `AlertBatch`, of a data set, of a bundle's test vector.

Raw, as the decoder delivers them: what networks take is made of them in `preprocess`. Decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch, LightCurves


@dataclass(frozen=True, slots=True)
class RawAlerts:
    """N alerts; `alerts[rows]` are some of them. The columns mean what they do in `AlertBatch`.

    Without `mjd` and `light_curves` they are for models that do not look at the past.
    """

    cutouts: NDArray[np.float32]  # [N, 3, S, S]
    cutout_box: NDArray[np.int16]  # [N, 3, 4]
    metadata: NDArray[np.float64]  # [N, F] NaN where missing
    columns: tuple[str, ...]  # F
    mjd: NDArray[np.float64] | None = None  # [N]
    light_curves: LightCurves | None = None  # of N

    def __len__(self) -> int:
        return len(self.cutouts)

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> RawAlerts:
        return RawAlerts(
            self.cutouts[rows],
            self.cutout_box[rows],
            self.metadata[rows],
            self.columns,
            None if self.mjd is None else self.mjd[rows],
            None if self.light_curves is None else self.light_curves[rows],
        )


def raw_alerts(batch: AlertBatch) -> RawAlerts:
    """What models look at of a decoded batch; nothing is copied."""
    return RawAlerts(batch.cutouts, batch.cutout_box, batch.metadata, batch.columns, batch.mjd, batch.light_curves)
