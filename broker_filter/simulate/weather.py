"""Draws the band, the weather and the template of an exposure at random, in the manner of each survey."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from broker_filter.simulate.instruments import LSST_BANDS, Instrument


@dataclass(frozen=True, slots=True)
class Weather:
    """The circumstances of an exposure, and of the template that is subtracted from it.

    `seeing`, `template_seeing`: full width at half maximum of the PSF, arcsec. `shear`, `template_shear`: the two
    components of the shear of the PSF. `sky`: counts per pixel. `gain`: electrons per count. `noise`,
    `template_noise`: 1-sigma noise of the sky, counts per pixel.
    """

    band: str
    seeing: float
    template_seeing: float
    shear: tuple[float, float]
    template_shear: tuple[float, float]
    sky: float
    gain: float
    noise: float
    template_noise: float
    template_exposures: int


def draw_weather(instrument: Instrument, rng: np.random.Generator) -> Weather:
    """Draw the weather of one exposure of ZTF or LSST."""
    return _draw_ztf(instrument, rng) if instrument.keeps_sky else _draw_lsst(instrument, rng)


def _draw_ztf(instrument: Instrument, rng: np.random.Generator) -> Weather:
    # A template is stacked from the better half of many nights. Nights are more often dark than moonlit.
    seeing = instrument.seeing * float(np.clip(rng.lognormal(0.0, 0.16), 0.8, 1.8))
    template_seeing = instrument.seeing * float(np.clip(rng.lognormal(-0.06, 0.08), 0.8, 1.2))
    sky = instrument.sky[0] + (instrument.sky[1] - instrument.sky[0]) * float(rng.beta(1.1, 2.0))
    exposures = int(rng.integers(*instrument.exposures_per_template, endpoint=True))
    noise = float(np.sqrt(sky / instrument.gain + (instrument.read_noise / instrument.gain) ** 2))
    shears = [(float(first), float(second)) for first, second in rng.normal(0, 0.02, (2, 2))]
    return Weather(
        band=str(rng.choice(instrument.bands)),
        seeing=seeing,
        template_seeing=template_seeing,
        shear=shears[0],
        template_shear=shears[1],
        sky=sky,
        gain=instrument.gain,
        noise=noise,
        template_noise=noise / float(np.sqrt(exposures)),
        template_exposures=exposures,
    )


def _draw_lsst(instrument: Instrument, rng: np.random.Generator) -> Weather:
    """Draw the weather of a visit of LSSTCam.

    The distributions are those of the 33 visits of 2025-09 to 2026-06 in public alerts: seeing 0.67 to 2.4 arcsec with
    a median of 1.12, of templates 0.72 to 1.17 with a median of 1.05; ellipticities of the PSF (Ixx - Iyy, 2 Ixy over
    Ixx + Iyy) with a median of 0.09, of templates 0.05; noise from that of a dark sky to four times as much.
    """
    band = str(rng.choice(instrument.bands))
    throughput = LSST_BANDS[band]
    brightening = float(np.clip(rng.lognormal(0.7, 0.6), 1.0, 12.0))  # of the sky by moon and twilight
    exposures = int(np.clip(rng.lognormal(2.7, 0.5), *instrument.exposures_per_template))
    noise, usual_noise = (
        float(np.sqrt(throughput.dark_sky * factor + instrument.read_noise**2)) / throughput.gain
        for factor in (brightening, 1.5)  # exposures in a template were rarely taken near the moon
    )
    ellipticity, template_ellipticity = 0.045 * rng.standard_normal(2), 0.022 * rng.standard_normal(2)
    return Weather(
        band=band,
        seeing=float(np.clip(1.12 * rng.lognormal(0.0, 0.3), 0.65, 2.4)),
        template_seeing=float(np.clip(0.95 * rng.lognormal(0.0, 0.13), 0.65, 1.2)),
        shear=(float(ellipticity[0]), float(ellipticity[1])),
        template_shear=(float(template_ellipticity[0]), float(template_ellipticity[1])),
        sky=throughput.dark_sky * brightening / throughput.gain,
        gain=throughput.gain,
        noise=noise,
        template_noise=usual_noise / float(np.sqrt(exposures)),
        template_exposures=exposures,
    )
