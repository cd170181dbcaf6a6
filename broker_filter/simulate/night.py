"""Simulates a night of a survey: exposures with their weather, and the real and bogus detections in each of them.

Alert i of a night depends only on the seed and on i, not on the number of requested alerts. `ztf` and `lsst` encode the
observations as packets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from broker_filter.simulate.events import GALAXY_SHAPES, KINDS, REAL, Circumstances, Edge
from broker_filter.simulate.images import (
    Conditions,
    Galaxy,
    Photometry,
    Point,
    Scene,
    Spectrum,
    Stamps,
    draw_conditions,
    draw_galaxies,
    expose,
    measure,
)
from broker_filter.simulate.instruments import AB_ZERO_POINT_NJY, Instrument
from broker_filter.simulate.light_curves import LightCurve

RATES: Mapping[str, float] = {
    "variable_star": 0.46,
    "asteroid": 0.24,
    "agn": 0.07,
    "supernova": 0.05,
    "cosmic_ray": 0.04,
    "bad_pixels": 0.03,
    "dipole": 0.05,
    "diffraction_spike": 0.03,
    "ghost": 0.01,
    "edge": 0.02,
}
"""The fraction of each kind among the alerts of a night: roughly that of ZTF, with more supernovae."""

LSST_RATES: Mapping[str, float] = {
    "variable_star": 0.22,
    "asteroid": 0.26,
    "agn": 0.08,
    "supernova": 0.08,
    "noise": 0.08,
    "residual": 0.12,
    "dipole": 0.03,
    "refraction": 0.03,
    "cosmic_ray": 0.02,
    "bad_pixels": 0.02,
    "bleed_trail": 0.01,
    "satellite": 0.01,
    "diffraction_spike": 0.01,
    "ghost": 0.01,
    "template_edge": 0.01,
    "edge": 0.01,
}
"""The fraction of each kind among the alerts of LSST. Of 176 public LSSTCam alerts, 43 % are of known asteroids and
35 % have a reliability below 0.5: most are empty stamps or residuals of bright sources."""

FIRST_NIGHT_MJD = 61096.1
"""The start of the first night: dusk of 2026-02-25 (UTC) in California, an arbitrary choice."""
EXPOSURES_PER_NIGHT = 720
EXPOSURE_INTERVAL_DAYS = 40 / 86400
SURVEY_BEGAN_MJD = 58200.0

DETECTION_SNR = 5.0
"""The minimum signal-to-noise ratio of a published detection."""
ATTEMPTS = 20
"""The maximum number of draws of an event until it exceeds DETECTION_SNR; then the last one is used."""


@dataclass(frozen=True, slots=True, eq=False)
class Exposure:
    """One exposure of one detector."""

    number: int
    mjd: float
    field: int
    detector: int
    ra: float  # of the centre of the detector, degrees
    dec: float  # of the centre of the detector, degrees
    stars_per_stamp: float
    conditions: Conditions


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A source of the reference catalogue near an alert.

    `x`, `y`: pixels to the right of and above the central pixel of the stamp. `is_star`: otherwise it is a galaxy.
    """

    x: float
    y: float
    magnitude: float
    is_star: bool

    @property
    def distance(self) -> float:
        """The distance from the central pixel, in pixels."""
        return float(np.hypot(self.x, self.y))


@dataclass(frozen=True, slots=True)
class History:
    """Forced photometry of n earlier visits, in order of time; fluxes in nanojansky."""

    mjd: NDArray[np.float64]  # [n]
    band: list[str]
    flux: NDArray[np.float64]
    flux_error: NDArray[np.float64]

    @property
    def detected(self) -> NDArray[np.bool_]:
        """Whether each visit was published as a detection, bool[n]."""
        return np.asarray(np.abs(self.flux) > DETECTION_SNR * self.flux_error)

    @property
    def limiting_magnitude(self) -> NDArray[np.float64]:
        """The limiting AB magnitude of each visit, float64[n], at a signal-to-noise ratio of DETECTION_SNR."""
        return np.asarray(AB_ZERO_POINT_NJY - 2.5 * np.log10(DETECTION_SNR * self.flux_error))


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """A simulated alert that is not yet encoded as a packet.

    `x`, `y`: the pixel of the alert on the detector. `offset`: the (x, y) offset of the source from the centre of that
    pixel, in pixels. `ra`, `dec`: degrees.
    """

    kind: str
    index: int
    exposure: Exposure
    stamps: Stamps  # [grid, grid] each; NaN for pixels that were not read out
    photometry: Photometry
    ra: float
    dec: float
    x: int
    y: int
    offset: tuple[float, float]
    neighbours: list[Neighbour]  # nearest first
    history: History
    earlier_detections: int  # in the whole survey, including those of `history`
    earlier_visits: int  # in the whole survey, including those of `history`
    first_detection_mjd: float
    trail: tuple[float, float]  # pixels
    rng: np.random.Generator

    @property
    def number(self) -> int:
        """The index of the alert within its exposure."""
        return self.index % self.exposure.conditions.instrument.alerts_per_exposure


class Night:
    """The data that all alerts of a night share: the instrument, the observing conditions and the galaxy shapes."""

    def __init__(self, instrument: Instrument, seed: int, rates: Mapping[str, float] = RATES) -> None:
        """`rates`: the relative frequency of each kind, a key of KINDS. Raises ValueError for an unknown kind."""
        if unknown := set(rates) - set(KINDS):
            raise ValueError(f"unknown kinds of alert: {', '.join(sorted(unknown))}; known kinds: {', '.join(KINDS)}")
        self._instrument = instrument
        self._seed = seed
        self._kinds = list(rates)
        self._probabilities = np.array(list(rates.values())) / sum(rates.values())
        rng = np.random.default_rng([seed, 0])
        self._weathers = [draw_conditions(instrument, rng) for _ in range(instrument.weathers)]
        self._galaxies: list[Spectrum] = draw_galaxies(instrument, GALAXY_SHAPES, rng)
        self._exposure = lru_cache(maxsize=1)(self._draw_exposure)

    def observations(self, n: int) -> Iterator[Observation]:
        """Return the first `n` alerts of the night, in order of time."""
        return (self.observe(index) for index in range(n))

    def observe(self, index: int) -> Observation:
        """Return the alert with this index."""
        rng = np.random.default_rng([self._seed, 2, index])
        exposure = self._exposure(index // self._instrument.alerts_per_exposure)
        kind = str(rng.choice(self._kinds, p=self._probabilities))
        conditions = exposure.conditions
        x, y = self._place_on_detector(kind, rng)
        offset = (float(rng.uniform(-0.5, 0.5)), float(rng.uniform(-0.5, 0.5)))
        circumstances = Circumstances(conditions, exposure.mjd, offset, self._nearest_edge(x, y))
        for _ in range(ATTEMPTS):
            event = KINDS[kind](circumstances, rng)
            stars, galaxies = self._draw_surroundings(exposure, rng)
            scene = Scene((*event.points, *stars), (*event.galaxies, *galaxies), event.trail)
            stamps = expose(
                scene,
                conditions,
                self._galaxies,
                rng,
                artefact=event.artefact,
                misalignment=event.misalignment,
                mismatch=event.mismatch,
                template_edge=event.template_edge,
            )
            self._blank_unread(stamps, rng)
            photometry = measure(stamps, conditions, *(offset if kind in REAL else (0.0, 0.0)))
            if photometry.snr > DETECTION_SNR:
                break
        history = self._look_back(exposure, event.curve, rng)
        earlier, first = _earlier_detections(exposure, event.curve, history, rng)
        scale = self._instrument.pixel_scale / 3600
        dec = exposure.dec + (y - self._instrument.detector[1] / 2) * scale
        return Observation(
            kind=kind,
            index=index,
            exposure=exposure,
            stamps=stamps,
            photometry=photometry,
            ra=float((exposure.ra - (x - self._instrument.detector[0] / 2) * scale / np.cos(np.radians(dec))) % 360),
            dec=float(dec),
            x=x,
            y=y,
            offset=offset,
            neighbours=self._catalogue(scene),
            history=history,
            earlier_detections=earlier,
            earlier_visits=len(history.mjd) + int(rng.integers(100, 2000)),
            first_detection_mjd=first,
            trail=event.trail,
            rng=rng,
        )

    def _draw_exposure(self, number: int) -> Exposure:
        rng = np.random.default_rng([self._seed, 1, number])
        night, within = divmod(number, EXPOSURES_PER_NIGHT)
        return Exposure(
            number=number,
            mjd=FIRST_NIGHT_MJD + night + within * EXPOSURE_INTERVAL_DAYS,
            field=int(rng.integers(245, 880)),
            detector=int(rng.integers(0, 64)),
            ra=float(rng.uniform(0, 360)),
            dec=float(np.degrees(np.arcsin(rng.uniform(-0.45, 0.95)))),
            stars_per_stamp=float(rng.lognormal(*self._instrument.stars)),
            conditions=self._weathers[int(rng.integers(self._instrument.weathers))],
        )

    def _place_on_detector(self, kind: str, rng: np.random.Generator) -> tuple[int, int]:
        """Return the pixel (x, y) of an alert.

        Some are so near to an edge of the detector that their stamps are truncated.
        """
        columns, rows = self._instrument.detector
        x, y = int(rng.integers(40, columns - 40)), int(rng.integers(40, rows - 40))
        if kind == "edge" or rng.random() < 0.01:
            distance = int(rng.integers(2, 7) if kind == "edge" else rng.integers(8, 30))
            x, y = ((distance, y), (columns - 1 - distance, y), (x, distance), (x, rows - 1 - distance))[
                rng.integers(4)
            ]
        return x, y

    def _nearest_edge(self, x: int, y: int) -> Edge:
        columns, rows = self._instrument.detector
        return min(Edge(y, 0, -1), Edge(rows - 1 - y, 0, 1), Edge(x, 1, -1), Edge(columns - 1 - x, 1, 1))

    def _draw_surroundings(self, exposure: Exposure, rng: np.random.Generator) -> tuple[list[Point], list[Galaxy]]:
        """Return random field stars and galaxies, unrelated to the alert."""
        instrument, half = self._instrument, self._instrument.grid / 2
        deepest = exposure.conditions.limiting_magnitude + 2
        points, galaxies = [], []
        for _ in range(rng.poisson(exposure.stars_per_stamp)):
            counts = instrument.counts(max(deepest - rng.exponential(1.6), instrument.brightest))
            points.append(Point(float(rng.uniform(-half, half)), float(rng.uniform(-half, half)), counts, counts))
        for _ in range(rng.poisson(instrument.galaxies)):
            counts = instrument.counts(max(deepest - rng.exponential(1.0), instrument.brightest))
            place = float(rng.uniform(-half, half)), float(rng.uniform(-half, half))
            galaxies.append(Galaxy(int(rng.integers(GALAXY_SHAPES)), *place, counts))
        return points, galaxies

    def _blank_unread(self, stamps: Stamps, rng: np.random.Generator) -> None:
        """Set some blocks of pixels to NaN in all three images, in the fraction `unread` of the alerts.

        No block is at the centre.
        """
        if rng.random() > self._instrument.unread:
            return
        grid = self._instrument.grid
        for _ in range(int(rng.integers(1, 4))):
            row, column = rng.integers(grid // 2 - 30, grid // 2 + 24, 2)
            if max(abs(row + 3 - grid // 2), abs(column + 3 - grid // 2)) > 12:
                for image in stamps:
                    image[row : row + 7, column : column + 7] = np.nan

    def _catalogue(self, scene: Scene) -> list[Neighbour]:
        """Return the sources in the stamp that a deep catalogue lists, nearest first.

        A nucleus is part of its galaxy.
        """
        sources = [(g.x, g.y, g.counts, False) for g in scene.galaxies]
        for point in scene.points:
            host = next((i for i, (x, y, *_) in enumerate(sources) if np.hypot(x - point.x, y - point.y) < 0.5), None)
            if host is not None:
                x, y, counts, is_star = sources[host]
                sources[host] = (x, y, counts + point.template, is_star)
            elif point.template > 0:
                sources.append((point.x, point.y, point.template, True))
        listed = [
            Neighbour(x, y, float(self._instrument.zero_point - 2.5 * np.log10(counts)), is_star)
            for x, y, counts, is_star in sources
        ]
        return sorted(listed, key=lambda neighbour: neighbour.distance)

    def _look_back(self, exposure: Exposure, curve: LightCurve, rng: np.random.Generator) -> History:
        """Return the earlier visits of the same position: of the last 30 nights for ZTF, of the last year for LSST."""
        bands = self._instrument.bands
        span, visited, per_visit = (30, 0.45, 2) if len(bands) == 2 else (365, 0.08, 1)
        nights = np.flatnonzero(rng.random(span) < visited)
        mjd = np.sort(
            exposure.mjd - 1 - np.repeat(nights, per_visit) + rng.uniform(-0.15, 0.15, per_visit * len(nights))
        )
        band = [bands[i] for i in rng.integers(len(bands), size=len(mjd))]
        difference = curve.difference(mjd, band)
        depth = exposure.conditions.flux_error * self._instrument.nanojansky * rng.lognormal(0.05, 0.25, len(mjd))
        noise = depth / self._instrument.quoted_error * rng.standard_normal(len(mjd))
        return History(mjd, band, difference + noise, np.hypot(depth, self._instrument.calibration_error * difference))


def _earlier_detections(
    exposure: Exposure, curve: LightCurve, history: History, rng: np.random.Generator
) -> tuple[int, float]:
    """Return the number of earlier detections of the object, and the MJD of the first one."""
    recent = int(history.detected.sum())
    if curve.began is None:
        fraction = recent / max(len(history.mjd), 1)
        return recent + int(rng.poisson(600 * fraction)), float(SURVEY_BEGAN_MJD + rng.uniform(0, 200))
    return recent, float(history.mjd[history.detected][0]) if recent else exposure.mjd
