"""A survey's night: exposures with their weather, and in each of them things that changed or seemed to.

Alert i of a night depends on the seed and on i alone, not on how many are asked for. What an alert looks like as a
packet is decided in `ztf` and `lsst`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from broker_filter.simulate import artefacts, light_curves
from broker_filter.simulate.images import (
    CALIBRATION_ERROR,
    QUOTED_ERROR,
    Conditions,
    Galaxy,
    Image,
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

REAL_RATES: Mapping[str, float] = {"variable_star": 0.46, "asteroid": 0.24, "agn": 0.07, "supernova": 0.05}
BOGUS_RATES: Mapping[str, float] = {
    "cosmic_ray": 0.04,
    "bad_pixels": 0.03,
    "dipole": 0.05,
    "diffraction_spike": 0.03,
    "ghost": 0.01,
    "edge": 0.02,
}
RATES: Mapping[str, float] = {**REAL_RATES, **BOGUS_RATES}
"""Fractions of a night's alerts; roughly a night of ZTF, with supernovae somewhat more common than they are."""

FIRST_NIGHT_MJD = 61096.1
"""Dusk of 2026-02-25 (UTC) over California, and an arbitrary choice."""
EXPOSURES_PER_NIGHT = 720
EXPOSURE_INTERVAL_DAYS = 40 / 86400
ALERTS_PER_EXPOSURE = 60
WEATHERS = 24
"""Distinct conditions that a night's exposures have: drawing a point spread costs as much as several alerts."""
GALAXY_SHAPES = 64
SURVEY_BEGAN_MJD = 58200.0

DETECTION_SNR = 5.0
"""Below it nothing is published."""
ATTEMPTS = 20
"""Draws of an artefact before its faintness is accepted."""


@dataclass(frozen=True, slots=True, eq=False)
class Exposure:
    """One pointing of the telescope as one detector saw it."""

    number: int
    mjd: float
    field: int
    detector: int
    ra: float  # of the detector's middle, degrees
    dec: float
    stars_per_stamp: float
    conditions: Conditions


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A source of the reference catalogue near an alert: pixels right of and above it, magnitude, star or galaxy."""

    x: float
    y: float
    magnitude: float
    is_star: bool

    @property
    def distance(self) -> float:
        """Pixels from the middle."""
        return float(np.hypot(self.x, self.y))


@dataclass(frozen=True, slots=True)
class History:
    """Forced photometry of earlier visits, in order of time; nanojansky."""

    mjd: NDArray[np.float64]  # [n]
    band: list[str]
    flux: NDArray[np.float64]
    flux_error: NDArray[np.float64]

    @property
    def detected(self) -> NDArray[np.bool_]:
        """Where the difference was published as a detection."""
        return np.asarray(np.abs(self.flux) > DETECTION_SNR * self.flux_error)

    @property
    def limiting_magnitude(self) -> NDArray[np.float64]:
        """5-sigma limits."""
        return np.asarray(AB_ZERO_POINT_NJY - 2.5 * np.log10(DETECTION_SNR * self.flux_error))


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """An alert before it is a packet. `x`, `y`: its pixel; `offset`: of the source from that pixel's middle."""

    kind: str
    index: int
    exposure: Exposure
    stamps: Stamps  # [grid, grid] each; NaN where nothing was read
    photometry: Photometry
    ra: float
    dec: float
    x: int
    y: int
    offset: tuple[float, float]
    neighbours: list[Neighbour]  # nearest first
    history: History
    earlier_detections: int  # of the whole survey, those of `history` among them
    earlier_visits: int
    first_detection_mjd: float
    trail: tuple[float, float]  # pixels
    rng: np.random.Generator

    @property
    def number(self) -> int:
        """Which alert of its exposure it is."""
        return self.index % ALERTS_PER_EXPOSURE


class Night:
    """Everything that a night's alerts share: the instrument, its weathers, the shapes of galaxies."""

    def __init__(self, instrument: Instrument, seed: int, rates: Mapping[str, float] = RATES) -> None:
        """`rates` maps kinds (keys of RATES) to relative frequencies. Raises ValueError for an unknown kind."""
        if unknown := set(rates) - set(RATES):
            raise ValueError(f"unknown kinds of alert: {', '.join(sorted(unknown))}; known are {', '.join(RATES)}")
        self._instrument = instrument
        self._seed = seed
        self._kinds = list(rates)
        self._probabilities = np.array(list(rates.values())) / sum(rates.values())
        rng = np.random.default_rng([seed, 0])
        self._weathers = [draw_conditions(instrument, rng) for _ in range(WEATHERS)]
        self._galaxies: list[Spectrum] = draw_galaxies(instrument, GALAXY_SHAPES, rng)
        self._exposure = lru_cache(maxsize=1)(self._draw_exposure)

    def observations(self, n: int) -> Iterator[Observation]:
        """The first `n` alerts, in order of time."""
        return (self.observe(index) for index in range(n))

    def observe(self, index: int) -> Observation:
        """Alert number `index`."""
        rng = np.random.default_rng([self._seed, 2, index])
        exposure = self._exposure(index // ALERTS_PER_EXPOSURE)
        kind = str(rng.choice(self._kinds, p=self._probabilities))
        conditions = exposure.conditions
        x, y = self._place_on_detector(kind, rng)
        offset = (float(rng.uniform(-0.5, 0.5)), float(rng.uniform(-0.5, 0.5)))
        for _ in range(ATTEMPTS):
            scene, curve, artefact, misalignment = self._draw_event(kind, exposure, (x, y), offset, rng)
            stamps = expose(scene, conditions, self._galaxies, rng, artefact=artefact, misalignment=misalignment)
            self._blank_unread(stamps, rng)
            at = offset if kind in REAL_RATES else (0.0, 0.0)
            photometry = measure(stamps.difference, conditions, *at)
            if photometry.snr > DETECTION_SNR:
                break
        history = self._look_back(exposure, curve, rng)
        earlier, first = _earlier_detections(exposure, curve, history, rng)
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
            trail=scene.trail,
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
            stars_per_stamp=float(rng.lognormal(1.0, 0.7)),
            conditions=self._weathers[int(rng.integers(WEATHERS))],
        )

    def _place_on_detector(self, kind: str, rng: np.random.Generator) -> tuple[int, int]:
        """The alert's pixel; some stand so near an edge that their stamps are cut short."""
        columns, rows = self._instrument.detector
        x, y = int(rng.integers(40, columns - 40)), int(rng.integers(40, rows - 40))
        if kind == "edge" or rng.random() < 0.01:
            distance = int(rng.integers(2, 7) if kind == "edge" else rng.integers(8, 30))
            x, y = ((distance, y), (columns - 1 - distance, y), (x, distance), (x, rows - 1 - distance))[
                rng.integers(4)
            ]
        return x, y

    def _draw_event(
        self,
        kind: str,
        exposure: Exposure,
        pixel: tuple[int, int],
        offset: tuple[float, float],
        rng: np.random.Generator,
    ) -> tuple[Scene, LightCurve, Image | None, tuple[float, float]]:
        """The scene around an alert, the light curve behind it, and what went wrong in the camera or after it."""
        conditions, instrument = exposure.conditions, self._instrument
        points, galaxies = self._draw_surroundings(exposure, rng)
        curve = light_curves.never_before(exposure.mjd)
        if kind in BOGUS_RATES:
            misalignment = (0.0, 0.0)
            if kind == "dipole":
                angle, amount = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 1.1)
                misalignment = (amount * np.cos(angle), amount * np.sin(angle))
                # The positive lobe is at the middle: the star is beside it, towards where the template is displaced.
                counts = instrument.counts(rng.uniform(instrument.brightest + 1, conditions.limiting_magnitude - 3.5))
                lobe = 0.6 * conditions.fwhm / amount
                points.insert(0, Point(lobe * misalignment[0], lobe * misalignment[1], counts, counts))
            artefact = self._draw_artefact(kind, pixel, conditions, rng)
            return Scene(points, galaxies), curve, artefact, misalignment

        # Counts of sources grow fourfold or so with every magnitude and a half, up to the limit.
        faintest = conditions.limiting_magnitude - 0.2
        magnitude = max(faintest - rng.exponential(1.7), instrument.brightest)
        counts, unit = instrument.counts(magnitude), instrument.nanojansky
        trail = (0.0, 0.0)
        if kind == "asteroid":
            # Arcsec in an exposure of 30 s: main belt, and now and then one that passes near the Earth.
            motion = (rng.uniform(0.1, 0.4) if rng.random() < 0.95 else rng.uniform(1.0, 6.0)) / instrument.pixel_scale
            angle = rng.uniform(0, 2 * np.pi)
            trail = (float(motion * np.cos(angle)), float(motion * np.sin(angle)))
        elif kind == "supernova":
            curve = light_curves.supernova(exposure.mjd, conditions.band, counts * unit, rng)
            away, angle = rng.exponential(2.0) / instrument.pixel_scale, rng.uniform(0, 2 * np.pi)
            host = instrument.counts(float(np.clip(magnitude + rng.normal(-1.0, 1.2), instrument.brightest + 1, 21.5)))
            shape = int(rng.integers(GALAXY_SHAPES))
            galaxies.insert(0, Galaxy(shape, offset[0] + away * np.cos(angle), offset[1] + away * np.sin(angle), host))
        else:
            counts *= rng.choice((1.0, -1.0), p=(0.55, 0.45))
            vary = light_curves.pulsating_star if kind == "variable_star" else light_curves.active_nucleus
            curve = vary(exposure.mjd, conditions.band, counts * unit, rng)
            if kind == "agn":
                galaxies.insert(
                    0, Galaxy(int(rng.integers(GALAXY_SHAPES)), *offset, curve.template / unit * rng.uniform(0.3, 2))
                )
        template = curve.template / unit
        points.insert(0, Point(*offset, template + counts, template))
        return Scene(points, galaxies, trail), curve, None, (0.0, 0.0)

    def _draw_surroundings(self, exposure: Exposure, rng: np.random.Generator) -> tuple[list[Point], list[Galaxy]]:
        """Field stars and galaxies that have nothing to do with the alert."""
        instrument, half = self._instrument, self._instrument.grid / 2
        deepest = exposure.conditions.limiting_magnitude + 2
        points, galaxies = [], []
        for _ in range(rng.poisson(exposure.stars_per_stamp)):
            counts = instrument.counts(max(deepest - rng.exponential(1.6), instrument.brightest))
            points.append(Point(float(rng.uniform(-half, half)), float(rng.uniform(-half, half)), counts, counts))
        for _ in range(rng.poisson(0.8)):
            counts = instrument.counts(max(deepest - rng.exponential(1.0), instrument.brightest))
            place = float(rng.uniform(-half, half)), float(rng.uniform(-half, half))
            galaxies.append(Galaxy(int(rng.integers(GALAXY_SHAPES)), *place, counts))
        return points, galaxies

    def _draw_artefact(
        self, kind: str, pixel: tuple[int, int], conditions: Conditions, rng: np.random.Generator
    ) -> Image | None:
        if kind == "dipole":
            return None
        if kind == "edge":
            columns, rows = self._instrument.detector
            distances = (pixel[1], rows - 1 - pixel[1], pixel[0], columns - 1 - pixel[0])
            nearest = int(np.argmin(distances))
            axis, towards = divmod(nearest, 2)
            return artefacts.edge_glow(
                conditions, rng, distance=distances[nearest], axis=axis, towards=1 if towards else -1
            )
        draw = {
            "cosmic_ray": artefacts.cosmic_ray,
            "bad_pixels": artefacts.bad_pixels,
            "diffraction_spike": artefacts.diffraction_spike,
            "ghost": artefacts.ghost,
        }[kind]
        return draw(conditions, rng)

    def _blank_unread(self, stamps: Stamps, rng: np.random.Generator) -> None:
        """Now and then some blocks of pixels, away from the middle, are NaN in all three images."""
        if rng.random() > 0.08:
            return
        grid = self._instrument.grid
        for _ in range(int(rng.integers(1, 4))):
            row, column = rng.integers(grid // 2 - 30, grid // 2 + 24, 2)
            if max(abs(row + 3 - grid // 2), abs(column + 3 - grid // 2)) > 12:
                for image in stamps:
                    image[row : row + 7, column : column + 7] = np.nan

    def _catalogue(self, scene: Scene) -> list[Neighbour]:
        """What a deep reference catalogue lists there, nearest first; a nucleus is part of its galaxy."""
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
        """Earlier visits of the same place: of the last 30 nights for ZTF, of the last year for LSST."""
        bands = self._instrument.bands
        span, visited, per_visit = (30, 0.45, 2) if len(bands) == 2 else (365, 0.08, 1)
        nights = np.flatnonzero(rng.random(span) < visited)
        mjd = np.sort(
            exposure.mjd - 1 - np.repeat(nights, per_visit) + rng.uniform(-0.15, 0.15, per_visit * len(nights))
        )
        band = [bands[i] for i in rng.integers(len(bands), size=len(mjd))]
        difference = curve.difference(mjd, band)
        depth = exposure.conditions.flux_error * self._instrument.nanojansky * rng.lognormal(0.05, 0.25, len(mjd))
        noise = depth / QUOTED_ERROR * rng.standard_normal(len(mjd))
        return History(mjd, band, difference + noise, np.hypot(depth, CALIBRATION_ERROR * difference))


def _earlier_detections(
    exposure: Exposure, curve: LightCurve, history: History, rng: np.random.Generator
) -> tuple[int, float]:
    """How often the object was detected before, and when for the first time."""
    recent = int(history.detected.sum())
    if curve.began is None:
        fraction = recent / max(len(history.mjd), 1)
        return recent + int(rng.poisson(600 * fraction)), float(SURVEY_BEGAN_MJD + rng.uniform(0, 200))
    return recent, float(history.mjd[history.detected][0]) if recent else exposure.mjd
