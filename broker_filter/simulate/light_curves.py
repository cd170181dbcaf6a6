"""Simulates light curves: the difference flux as a function of time and band, equal to the alert's flux at its time.

Fluxes are in nanojansky, negative if the source is fainter than in the template. This module must not depend on images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]  # [n] days
Bands = Sequence[str]  # n names
Fluxes = NDArray[np.float64]  # [n] nJy

COLOUR = {"u": 0.6, "g": 1.0, "r": 1.1, "i": 1.1, "z": 1.0, "y": 0.9}
"""The flux of a warm source in each band, relative to g."""
PULSATION = {"u": 1.1, "g": 1.0, "r": 0.7, "i": 0.55, "z": 0.5, "y": 0.5}
"""The amplitude, in magnitudes, of a pulsating star in each band, relative to g. The star is hotter when brighter."""
SUPERNOVA_FALL_DAYS = {"u": 10.0, "g": 14.0, "r": 24.0, "i": 30.0, "z": 30.0, "y": 30.0}
"""The e-folding time of the decline in each band; red light fades more slowly."""
SUPERNOVA_RISE_DAYS = 3.5
"""The time scale of the rise."""
SUPERNOVA_EXPLOSION_DAYS = -20.0
"""The time of the explosion relative to the peak; the flux is zero before."""


@dataclass(frozen=True, slots=True)
class LightCurve:
    """The light curve of a source.

    `difference`: a function of times (MJD) and bands, which returns difference fluxes in nJy. `template`: the flux of
    the source in the template, in nJy, in the band of the alert. `began`: the MJD at which the source appeared; None
    for a source that has always varied.
    """

    difference: Callable[[Times, Bands], Fluxes]
    template: float
    began: float | None


def never_before(mjd: float) -> LightCurve:
    """Simulate the light curve of a source that is in no earlier image, such as a moving body or an artefact."""
    return LightCurve(lambda times, _: np.zeros(len(times)), 0.0, mjd)


def supernova(mjd: float, band: str, flux: float, rng: np.random.Generator) -> LightCurve:
    """Simulate the rise and decline of a supernova at a random phase: Bazin et al. 2009 (A&A 499, 653), equation 1.

    `flux`: the difference flux (nJy) of the alert at time `mjd` in `band`.
    """
    phase = float(rng.uniform(-12.0, 45.0))

    def shape(days: Times, bands: Bands) -> Fluxes:
        fall = np.array([SUPERNOVA_FALL_DAYS[b] for b in bands])
        colour = np.array([COLOUR[b] for b in bands])
        light = colour * np.exp(-days / fall) / (1 + np.exp(-np.clip(days / SUPERNOVA_RISE_DAYS, -50, 50)))
        return np.where(days > SUPERNOVA_EXPLOSION_DAYS, light, 0.0)

    amplitude = flux / shape(np.array([phase]), [band])[0]
    return LightCurve(
        lambda times, bands: amplitude * shape(times - mjd + phase, bands), 0.0, mjd - phase + SUPERNOVA_EXPLOSION_DAYS
    )


def pulsating_star(mjd: float, band: str, flux: float, rng: np.random.Generator) -> LightCurve:
    """Simulate a pulsating star with a fast rise and a slow decline.

    The period is that of a delta Scuti star (hours), an RR Lyrae star (half a day) or a Mira (months). `flux`: the
    difference flux (nJy) of the alert at time `mjd` in `band`.
    """
    period = float(
        10 ** rng.choice((rng.uniform(-1.2, -0.7), rng.uniform(-0.4, -0.1), rng.uniform(1.5, 2.5)), p=(0.2, 0.6, 0.2))
    )
    amplitude = float(rng.uniform(0.2, 0.7))  # half of the magnitude range in g

    def relative(times: Times, bands: Bands, epoch: float | NDArray[np.float64]) -> Fluxes:
        """Return the difference flux relative to the template flux."""
        turns = 2 * np.pi * (((times - mjd) / period + epoch) % 1.0)
        wave = sum(np.sin(k * turns) / k for k in (1, 2, 3)) / 1.5  # approximates a sawtooth
        half_range = amplitude * np.array([PULSATION[b] for b in bands])
        return np.asarray(10 ** (-0.4 * half_range * wave) - 1)

    # A phase at which the flux difference has the sign of the alert and is large enough to cause one.
    phases = np.linspace(0, 1, 40, endpoint=False)
    contrast = relative(np.full(len(phases), mjd), [band] * len(phases), phases)
    right = phases[contrast * np.sign(flux) > 0.4 * (contrast * np.sign(flux)).max()]
    epoch = float(rng.choice(right))
    mean = flux / float(relative(np.array([mjd]), [band], epoch)[0])

    def difference(times: Times, bands: Bands) -> Fluxes:
        colour = np.array([COLOUR[b] for b in bands]) / COLOUR[band]
        return mean * colour * relative(times, bands, epoch)

    return LightCurve(difference, mean, None)


def active_nucleus(mjd: float, band: str, flux: float, rng: np.random.Generator) -> LightCurve:
    """Simulate an active nucleus: a damped random walk in magnitude.

    The model is that of Kelly et al. 2009 (ApJ 698, 895) and MacLeod et al. 2010 (ApJ 721, 1014).

    `flux`: the difference flux (nJy) of the alert at time `mjd` in `band`.
    """
    tau = float(rng.lognormal(np.log(200.0), 0.4))  # days
    sigma = float(rng.uniform(0.15, 0.35))  # asymptotic standard deviation, mag
    now = float(-np.sign(flux) * rng.uniform(0.5, 2.0) * sigma)
    mean = flux / (10 ** (-0.4 * now) - 1)
    seed = int(rng.integers(2**32))

    def difference(times: Times, bands: Bands) -> Fluxes:
        steps = np.random.default_rng(seed).standard_normal(len(times))
        walk, last, then = np.empty(len(times)), now, mjd
        for i in np.argsort(-times):  # backwards in time: the process is symmetric
            memory = np.exp(-abs(then - times[i]) / tau)
            last = memory * last + sigma * np.sqrt(1 - memory**2) * steps[i]
            walk[i], then = last, times[i]
        colour = np.array([COLOUR[b] for b in bands]) / COLOUR[band]
        return np.asarray(mean * colour * (10 ** (-0.4 * walk) - 1))

    return LightCurve(difference, mean, None)
