"""CurveClasses: classes of transients from the detections in the light curve of an alert.

The architecture is this project's own (BSD-3-Clause): a perceptron on statistics of the light curve that are
meaningful for a handful of detections, in g, in r, and in all bands together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from broker_filter.packets.batch import BANDS, Measurement
from broker_filter.scoring.networks.alert_embedder import Standardise

BEFORE, FLUX, BAND = 0, 1, 3
"""Features of a point: the time before the alert, the flux, and the first of the bands; see LIGHT_CURVE_FEATURES."""
KIND = BAND + len(BANDS)
OF_BANDS = ("g", "r")
"""The bands of ZTF's public survey, which have statistics of their own."""
LONGEST_DAYS = 30.0
"""Times before the alert are limited to this number of days, the length of the history in ZTF's packets."""
UNIT_DAYS = 10.0
"""Unit of time of slopes and curvatures: they are then about as large as the other statistics."""
LEAST_SPREAD = 0.003
"""Value added to the mean square of times (in UNIT_DAYS^2) that a slope is divided by. Without it, a slope over the two
visits of one night would be the noise of the fluxes, divided by minutes."""
LEAST_SCATTER = 1e-4
"""Value added to a mean square of which the logarithm is taken."""
STATISTICS, COLOURS = 12, 6
"""Number of statistics of a set of points, and of colours."""


class Statistics(NamedTuple):
    """Statistics [N, STATISTICS] of a set of points of N alerts, and those [N] from which colours are made.

    `exists` is 1 if the set has a point. Fluxes are the features of the points: about the logarithm of the flux.
    """

    columns: Tensor
    exists: Tensor
    mean: Tensor
    latest: Tensor
    first: Tensor
    slope: Tensor
    peak: Tensor


class CurveClasses(nn.Module):
    """Images, light curves [N, L, LIGHT_CURVE_FEATURES] and mask [N, L] -> logits and standardised statistics.

    The logits are [N, classes], the statistics [N, 3 * STATISTICS + COLOURS]. The images are not used; every bundle has
    them as an input. Points that are no detections are not used either. An alert without detections has the statistics
    of an empty set, and its logits have no meaning.
    """

    def __init__(self, time_scale: float, classes: int, hidden: int) -> None:
        """Build the network with initial parameters.

        `time_scale`: that of the light-curve input, in days. `hidden`: the width of the hidden layer.
        """
        super().__init__()
        self.time_scale = time_scale
        width = (len(OF_BANDS) + 1) * STATISTICS + COLOURS
        self.standardise = Standardise(width)
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, _images: Tensor, light_curve: Tensor, light_curve_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, classes] and the standardised statistics of N alerts."""
        unit = self.standardise(self.statistics(light_curve, light_curve_mask))
        return self.head(unit), unit

    def statistics(self, points: Tensor, mask: Tensor) -> Tensor:
        """Return the statistics [N, 3 * STATISTICS + COLOURS]: of g, of r, of all bands, then the colours g - r."""
        before = (self.time_scale * points[..., BEFORE].expm1()).clamp(max=LONGEST_DAYS)
        detected = mask * points[..., KIND + Measurement.DETECTION]
        sets = [detected * points[..., BAND + BANDS.index(name)] for name in OF_BANDS]
        g, r, everything = (_statistics(before, points[..., FLUX], there) for there in (*sets, detected))
        both = g.exists * r.exists
        colours = [(ours - other) * both for ours, other in zip(g[2:], r[2:], strict=True)]
        return torch.cat([g.columns, r.columns, everything.columns, torch.stack([both, *colours], 1)], 1)


def _statistics(before: Tensor, flux: Tensor, there: Tensor) -> Statistics:
    """Return the statistics of the points where `there` [N, L] is 1; `before` [N, L] in days, `flux` [N, L].

    They are the number of points; the mean flux; slope, curvature and scatter of a parabola in time; the peak, its age,
    the age of the first and of the latest point; the change of flux from the peak to the latest point, and from the
    peak to the first one; and the spread of the times.
    """
    count = there.sum(1)
    exists = (count > 0).to(flux.dtype)

    def mean(values: Tensor) -> Tensor:
        return (there * values).sum(1) / count.clamp(min=1)

    def at(rank: Tensor, outside: float) -> tuple[Tensor, Tensor]:
        """Return time and flux, [N] each, of the point with the highest `rank` [N, L]."""
        place = torch.where(there > 0, rank, outside).argmax(1, keepdim=True)
        return before.gather(1, place)[:, 0], flux.gather(1, place)[:, 0]

    def along(curve: Tensor, values: Tensor) -> Tensor:
        """Return the coefficient of `curve` [N, L] in `values` [N, L], [N, 1]."""
        return (mean(curve * values) / (mean(curve.square()) + LEAST_SPREAD)).unsqueeze(1)

    middle, level = mean(before), mean(flux)
    time = (middle.unsqueeze(1) - before) * there / UNIT_DAYS
    spread = mean(time.square())
    rest = (flux - level.unsqueeze(1)) * there
    slope = along(time, rest)
    bend = (time.square() - spread.unsqueeze(1)) * there
    bend = bend - along(time, bend) * time
    rest = rest - slope * time
    curvature = along(bend, rest)
    scatter = mean((rest - curvature * bend).square())
    furthest = -2 * LONGEST_DAYS
    peak_age, peak = at(flux, torch.finfo(torch.float32).min)
    first_age, first = at(before, furthest)
    latest_age, latest = at(-before, furthest)
    columns = [
        count.log1p(),
        level,
        slope[:, 0],
        curvature[:, 0],
        (scatter + LEAST_SCATTER).log(),
        peak * exists,
        peak_age.log1p() * exists,
        first_age.log1p() * exists,
        latest_age.log1p() * exists,
        (latest - peak) * exists,
        (first - peak) * exists,
        (spread + LEAST_SCATTER).log(),
    ]
    return Statistics(torch.stack(columns, 1), exists, level, latest, first, slope[:, 0], peak)
