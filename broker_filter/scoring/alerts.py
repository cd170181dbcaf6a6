"""The fields of alerts that models use, from an `AlertBatch`, a data set or a bundle's test vector.

The values are raw, as the decoder delivers them; `preprocess` turns them into network inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch, LightCurves


@dataclass(frozen=True, slots=True)
class RawAlerts:
    """The model-relevant fields of N alerts; `alerts[rows]` selects a subset. The columns are those of `AlertBatch`.

    `mjd`, `light_curves`, `variance`, `psf` and `survey` are None if no model needs them.
    """

    cutouts: NDArray[np.float32]  # [N, 3, S, S]
    cutout_box: NDArray[np.int16]  # [N, 3, 4]
    metadata: NDArray[np.float64]  # [N, F] NaN where missing
    columns: tuple[str, ...]  # F
    mjd: NDArray[np.float64] | None = None  # [N]
    light_curves: LightCurves | None = None  # of the N alerts
    variance: NDArray[np.float32] | None = None  # [N, 3, S, S]
    psf: NDArray[np.float32] | None = None  # [N, 3, PSF_SIZE, PSF_SIZE]
    survey: NDArray[np.uint8] | None = None  # [N] Survey

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
            None if self.variance is None else self.variance[rows],
            None if self.psf is None else self.psf[rows],
            None if self.survey is None else self.survey[rows],
        )


def raw_alerts(batch: AlertBatch) -> RawAlerts:
    """Return the fields of a decoded batch that models use, as views: nothing is copied."""
    return RawAlerts(
        batch.cutouts,
        batch.cutout_box,
        batch.metadata,
        batch.columns,
        batch.mjd,
        batch.light_curves,
        batch.variance,
        batch.psf,
        batch.survey,
    )
