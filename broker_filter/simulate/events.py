"""What raises alerts, one function a kind: things in the sky that changed, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from broker_filter.simulate import artefacts, light_curves
from broker_filter.simulate.images import Conditions, Galaxy, Image, Point
from broker_filter.simulate.light_curves import LightCurve

GALAXY_SHAPES = 64
"""How many galaxies are drawn to choose from."""


class Edge(NamedTuple):
    """The detector's nearest edge: pixels to it, along y (axis 0) or x (1), downwards (-1) or upwards (1)."""

    distance: int
    axis: int
    towards: int


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Where and when something happens. `offset`: of the source from the middle pixel's middle."""

    conditions: Conditions
    mjd: float
    offset: tuple[float, float]
    edge: Edge


@dataclass(frozen=True, slots=True)
class Event:
    """What happened: the sources, how the first of them has varied, and what went wrong in the camera or after it.

    `trail`: pixels that the first point moved during the exposure. `misalignment`: pixels by which the template is off.
    """

    curve: LightCurve
    points: tuple[Point, ...] = ()
    galaxies: tuple[Galaxy, ...] = ()
    trail: tuple[float, float] = (0.0, 0.0)
    artefact: Image | None = None
    misalignment: tuple[float, float] = (0.0, 0.0)


def supernova(at: Circumstances, rng: np.random.Generator) -> Event:
    """A new point of light within or near a galaxy."""
    instrument = at.conditions.instrument
    magnitude = _magnitude(at, rng, brightest=15.5)
    counts = instrument.counts(magnitude)
    curve = light_curves.supernova(at.mjd, at.conditions.band, counts * instrument.nanojansky, rng)
    host = instrument.counts(float(np.clip(magnitude + rng.normal(-1.0, 1.2), instrument.brightest + 1, 21.5)))
    away = _polar(rng.exponential(2.0) / instrument.pixel_scale, rng)
    galaxy = Galaxy(_shape(rng), at.offset[0] + away[0], at.offset[1] + away[1], host)
    return Event(curve, (Point(*at.offset, counts, 0.0),), (galaxy,))


def variable_star(at: Circumstances, rng: np.random.Generator) -> Event:
    """A star of the template that became brighter or fainter."""
    counts = _sign(rng) * at.conditions.instrument.counts(_magnitude(at, rng))
    unit = at.conditions.instrument.nanojansky
    curve = light_curves.pulsating_star(at.mjd, at.conditions.band, counts * unit, rng)
    template = curve.template / unit
    return Event(curve, (Point(*at.offset, template + counts, template),))


def agn(at: Circumstances, rng: np.random.Generator) -> Event:
    """The nucleus of a galaxy that became brighter or fainter."""
    counts = _sign(rng) * at.conditions.instrument.counts(_magnitude(at, rng, brightest=16.5))
    unit = at.conditions.instrument.nanojansky
    curve = light_curves.active_nucleus(at.mjd, at.conditions.band, counts * unit, rng)
    template = curve.template / unit
    galaxy = Galaxy(_shape(rng), *at.offset, template * float(rng.uniform(1, 5)))
    return Event(curve, (Point(*at.offset, template + counts, template),), (galaxy,))


def asteroid(at: Circumstances, rng: np.random.Generator) -> Event:
    """A body of the main belt, or now and then one that passes near the Earth and leaves a trail."""
    instrument = at.conditions.instrument
    counts = instrument.counts(_magnitude(at, rng))
    motion = rng.uniform(0.1, 0.4) if rng.random() < 0.95 else rng.uniform(1.0, 6.0)  # arcsec in 30 s
    trail = _polar(motion / instrument.pixel_scale, rng)
    return Event(light_curves.never_before(at.mjd), (Point(*at.offset, counts, 0.0),), trail=trail)


def dipole(at: Circumstances, rng: np.random.Generator) -> Event:
    """A bright star that did not change, in an image that was not aligned with its template."""
    instrument = at.conditions.instrument
    counts = instrument.counts(rng.uniform(instrument.brightest + 1, at.conditions.limiting_magnitude - 3.5))
    direction = _polar(1.0, rng)
    amount = float(rng.uniform(0.35, 1.1))
    # The positive lobe is at the middle, so the star is beside it, towards where the template is displaced.
    lobe = 0.6 * at.conditions.fwhm
    star = Point(lobe * direction[0], lobe * direction[1], counts, counts)
    misalignment = (amount * direction[0], amount * direction[1])
    return Event(light_curves.never_before(at.mjd), (star,), misalignment=misalignment)


def cosmic_ray(at: Circumstances, rng: np.random.Generator) -> Event:
    """The track of a charged particle."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.cosmic_ray(at.conditions, rng))


def bad_pixels(at: Circumstances, rng: np.random.Generator) -> Event:
    """A bad column or hot pixels."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.bad_pixels(at.conditions, rng))


def diffraction_spike(at: Circumstances, rng: np.random.Generator) -> Event:
    """A spike of a bright star."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.diffraction_spike(at.conditions, rng))


def ghost(at: Circumstances, rng: np.random.Generator) -> Event:
    """A reflection of a bright star."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.ghost(at.conditions, rng))


def edge(at: Circumstances, rng: np.random.Generator) -> Event:
    """Light at the detector's edge."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.edge_glow(at.conditions, rng, *at.edge))


Happen = Callable[[Circumstances, np.random.Generator], Event]
REAL: Mapping[str, Happen] = {f.__name__: f for f in (variable_star, asteroid, agn, supernova)}
BOGUS: Mapping[str, Happen] = {f.__name__: f for f in (cosmic_ray, bad_pixels, dipole, diffraction_spike, ghost, edge)}
KINDS: Mapping[str, Happen] = {**REAL, **BOGUS}
"""What happens, by its name; real in the sky, bogus, and all."""


def _magnitude(at: Circumstances, rng: np.random.Generator, brightest: float = -np.inf) -> float:
    """Of the difference: four times as many alerts with every two and a half magnitudes, up to the limit."""
    faintest = at.conditions.limiting_magnitude - 0.2
    return float(max(faintest - rng.exponential(1.7), at.conditions.instrument.brightest, brightest))


def _sign(rng: np.random.Generator) -> float:
    """Surveys publish slightly more that became brighter."""
    return float(rng.choice((1.0, -1.0), p=(0.55, 0.45)))


def _polar(length: float, rng: np.random.Generator) -> tuple[float, float]:
    """A step of some length in any direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return float(length * np.cos(angle)), float(length * np.sin(angle))


def _shape(rng: np.random.Generator) -> int:
    return int(rng.integers(GALAXY_SHAPES))
