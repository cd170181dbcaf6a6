"""Simulates the events that cause alerts, one function per kind: real changes in the sky, and bogus detections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from broker_filter.simulate import artefacts, light_curves
from broker_filter.simulate.images import Conditions, Galaxy, Image, Point, TemplateEdge
from broker_filter.simulate.light_curves import LightCurve

GALAXY_SHAPES = 64
"""The number of different galaxy shapes that are drawn."""


class Edge(NamedTuple):
    """The nearest edge of the detector.

    `distance`: to the edge, in pixels. `axis`: 0 for y, 1 for x. `towards`: the direction of the edge, -1 or +1.
    """

    distance: int
    axis: int
    towards: int


@dataclass(frozen=True, slots=True)
class Circumstances:
    """The observing conditions, time and position of an event.

    `offset`: the (x, y) offset of the source from the centre of the central pixel, in pixels.
    """

    conditions: Conditions
    mjd: float
    offset: tuple[float, float]
    edge: Edge


@dataclass(frozen=True, slots=True)
class Event:
    """An event: the sources in the images, the light curve of the first one, and errors of camera and pipeline.

    `trail`: the motion (x, y) of the first point during the exposure, in pixels. `artefact`: an image to add to the
    science image. `misalignment`: the offset (x, y) of the template, in pixels. `mismatch`: the error (xx, yy, xy) of
    the second moments of the matched PSF of the template, in square pixels. `template_edge`: where the template ends.
    """

    curve: LightCurve
    points: tuple[Point, ...] = ()
    galaxies: tuple[Galaxy, ...] = ()
    trail: tuple[float, float] = (0.0, 0.0)
    artefact: Image | None = None
    misalignment: tuple[float, float] = (0.0, 0.0)
    mismatch: tuple[float, float, float] = (0.0, 0.0, 0.0)
    template_edge: TemplateEdge | None = None


def supernova(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a new point source in or near a galaxy."""
    instrument = at.conditions.instrument
    magnitude = _magnitude(at, rng, brightest=15.5)
    counts = instrument.counts(magnitude)
    curve = light_curves.supernova(at.mjd, at.conditions.band, counts * instrument.nanojansky, rng)
    host = instrument.counts(float(np.clip(magnitude + rng.normal(-1.0, 1.2), instrument.brightest + 1, 21.5)))
    away = _polar(rng.exponential(2.0) / instrument.pixel_scale, rng)
    galaxy = Galaxy(_shape(rng), at.offset[0] + away[0], at.offset[1] + away[1], host)
    return Event(curve, (Point(*at.offset, counts, 0.0),), (galaxy,))


def variable_star(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a star that is brighter or fainter than in the template."""
    counts = _sign(rng) * at.conditions.instrument.counts(_magnitude(at, rng))
    unit = at.conditions.instrument.nanojansky
    curve = light_curves.pulsating_star(at.mjd, at.conditions.band, counts * unit, rng)
    template = curve.template / unit
    return Event(curve, (Point(*at.offset, template + counts, template),))


def agn(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate the nucleus of a galaxy that is brighter or fainter than in the template."""
    counts = _sign(rng) * at.conditions.instrument.counts(_magnitude(at, rng, brightest=16.5))
    unit = at.conditions.instrument.nanojansky
    curve = light_curves.active_nucleus(at.mjd, at.conditions.band, counts * unit, rng)
    template = curve.template / unit
    galaxy = Galaxy(_shape(rng), *at.offset, template * float(rng.uniform(1, 5)))
    return Event(curve, (Point(*at.offset, template + counts, template),), (galaxy,))


def asteroid(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a main-belt asteroid, or in 5 % of cases a near-Earth asteroid, which leaves a trail."""
    instrument = at.conditions.instrument
    counts = instrument.counts(_magnitude(at, rng))
    motion = rng.uniform(0.1, 0.4) if rng.random() < 0.95 else rng.uniform(1.0, 6.0)  # arcsec in 30 s
    trail = _polar(motion / instrument.pixel_scale, rng)
    return Event(light_curves.never_before(at.mjd), (Point(*at.offset, counts, 0.0),), trail=trail)


def dipole(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a bright constant star in an image that is misaligned with its template."""
    counts = _star(at, rng, brighter_by=3.5)
    direction = _polar(1.0, rng)
    amount = float(rng.uniform(0.35, 1.1))
    # The positive lobe is at the centre, so the star is beside it, in the direction of the template's displacement.
    lobe = 0.6 * at.conditions.fwhm
    star = Point(lobe * direction[0], lobe * direction[1], counts, counts)
    misalignment = (amount * direction[0], amount * direction[1])
    return Event(light_curves.never_before(at.mjd), (star,), misalignment=misalignment)


def cosmic_ray(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate the track of a charged particle (cosmic ray)."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.cosmic_ray(at.conditions, rng))


def bad_pixels(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a bad column or hot pixels."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.bad_pixels(at.conditions, rng))


def diffraction_spike(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a diffraction spike of a bright star."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.diffraction_spike(at.conditions, rng))


def ghost(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a reflection of a bright star."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.ghost(at.conditions, rng))


def edge(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a glow at the edge of the detector."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.edge_glow(at.conditions, rng, *at.edge))


def noise(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a peak of the noise above the detection threshold.

    White noise around such a peak has the mean shape of the PSF, so only its faintness tells it from a transient.
    """
    counts = at.conditions.flux_error * (5.0 + rng.exponential(0.25))
    return Event(light_curves.never_before(at.mjd), (Point(*at.offset, counts, 0.0),))


def residual(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a bright constant star whose PSF the kernel of the subtraction matches badly.

    An error of the second moments leaves a ring or a quadrupole, as in public LSSTCam alerts of poor image quality.
    """
    conditions = at.conditions
    star = _star(at, rng, brighter_by=3.0)
    sigma2 = (conditions.fwhm / 2.355) ** 2
    snr = 6.0 + rng.exponential(15.0)
    # The residual of an error w is flux x w / (2 sigma^2), times a factor near 1 for its shape.
    size = float(np.clip(2 * sigma2 * snr * conditions.flux_error / star, 0.0, 0.4 * sigma2))
    angle = float(rng.uniform(0, np.pi))
    elongation, widening = size * rng.uniform(0.3, 1.0), size * rng.uniform(-1.0, 1.0)
    # The alert is at a lobe: at the centre if the template is wider, and beside it if it is narrower.
    lobe = 1.2 * conditions.fwhm / 2.355 * float(rng.random() < 0.6)
    place = lobe * np.cos(angle), lobe * np.sin(angle)
    twice = elongation * np.array((np.cos(2 * angle), np.sin(2 * angle)))
    return Event(
        light_curves.never_before(at.mjd),
        (Point(float(place[0]), float(place[1]), star, star),),
        mismatch=(float(widening - twice[0]), float(widening + twice[0]), float(-twice[1])),
    )


CHROMATIC_SHIFT_ARCSEC: Mapping[str, float] = {"u": 0.12, "g": 0.08, "r": 0.03, "i": 0.015, "z": 0.01, "y": 0.01}
"""The typical displacement of a star by atmospheric refraction, relative to stars of mean colour, at an airmass of 1.4:
a tenth of the refraction across the band (Meyers & Burchat 2015, ApJ 807, 182)."""


def refraction(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a bright constant star that refraction displaces relative to other stars and to the template.

    Differential chromatic refraction depends on the colour of the star, so its neighbours are subtracted well.
    """
    conditions = at.conditions
    sigma = conditions.fwhm / 2.355
    shift = CHROMATIC_SHIFT_ARCSEC.get(conditions.band, 0.05) / conditions.instrument.pixel_scale
    shift *= float(rng.lognormal(0.3, 0.5))
    # The lobes of the pair are sqrt(2) sigma from the star, with a signal of 0.43 flux x shift / sigma.
    snr = 6.0 + rng.exponential(10.0)
    wanted = snr * conditions.flux_error * sigma / (0.43 * shift)
    counts = min(wanted, conditions.instrument.counts(conditions.instrument.brightest - 0.5))
    direction = _polar(1.0, rng)
    lobe = float(np.sqrt(2)) * sigma
    x, y = -lobe * direction[0], -lobe * direction[1]
    moved = Point(float(x + shift * direction[0]), float(y + shift * direction[1]), counts, 0.0)
    return Event(light_curves.never_before(at.mjd), (moved, Point(x, y, 0.0, counts)))


def bleed_trail(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate the charge that a very bright, saturated star spreads along the columns of the detector."""
    counts = at.conditions.instrument.counts(rng.uniform(11.0, 13.0))
    distance = float(rng.choice((-1.0, 1.0)) * rng.uniform(8.0, 25.0))
    return Event(light_curves.never_before(at.mjd), (Point(0.0, distance, counts, counts),))


def satellite(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate the trail of a satellite."""
    return Event(light_curves.never_before(at.mjd), artefact=artefacts.satellite_trail(at.conditions, rng))


def template_edge(at: Circumstances, rng: np.random.Generator) -> Event:
    """Simulate a constant star at the border of the area that the template covers."""
    counts = _star(at, rng, brighter_by=2.5)
    border = TemplateEdge(float(rng.uniform(1.0, 4.0)), float(rng.uniform(0, 2 * np.pi)))
    return Event(light_curves.never_before(at.mjd), (Point(*at.offset, counts, counts),), template_edge=border)


SimulateEvent = Callable[[Circumstances, np.random.Generator], Event]
REAL: Mapping[str, SimulateEvent] = {f.__name__: f for f in (variable_star, asteroid, agn, supernova)}
"""The kinds of real events by name."""
BOGUS: Mapping[str, SimulateEvent] = {
    f.__name__: f
    for f in (
        cosmic_ray,
        bad_pixels,
        dipole,
        diffraction_spike,
        ghost,
        edge,
        noise,
        residual,
        refraction,
        bleed_trail,
        satellite,
        template_edge,
    )
}
"""The kinds of bogus events by name."""
KINDS: Mapping[str, SimulateEvent] = {**REAL, **BOGUS}
"""All kinds of events by name."""


def _magnitude(at: Circumstances, rng: np.random.Generator, brightest: float = -np.inf) -> float:
    """Return a magnitude of the difference flux.

    The number of alerts grows fourfold per 2.5 mag up to the limiting one.
    """
    faintest = at.conditions.limiting_magnitude - at.conditions.instrument.faintest
    return float(max(faintest - rng.exponential(1.7), at.conditions.instrument.brightest, brightest))


def _star(at: Circumstances, rng: np.random.Generator, brighter_by: float) -> float:
    """Return the counts of a star that is at least `brighter_by` magnitudes brighter than the limiting magnitude."""
    instrument = at.conditions.instrument
    brightest = instrument.brightest + 1
    return instrument.counts(rng.uniform(brightest, max(at.conditions.limiting_magnitude - brighter_by, brightest)))


def _sign(rng: np.random.Generator) -> float:
    """Return the sign of the difference flux, slightly more often positive, as in published alerts."""
    return float(rng.choice((1.0, -1.0), p=(0.55, 0.45)))


def _polar(length: float, rng: np.random.Generator) -> tuple[float, float]:
    """Return a vector (x, y) of this length in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return float(length * np.cos(angle)), float(length * np.sin(angle))


def _shape(rng: np.random.Generator) -> int:
    return int(rng.integers(GALAXY_SHAPES))
