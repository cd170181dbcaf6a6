"""The parameters of the telescopes whose alerts are simulated.

The values are chosen so that stamps resemble published ones in background, noise and PSF. They are not a calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AB_ZERO_POINT_NJY = 31.4
"""The AB magnitude of one nanojansky."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """A camera and its image-subtraction pipeline. The unit of counts is DN for ZTF and nanojansky for LSST."""

    bands: tuple[str, ...]
    pixel_scale: float
    """arcsec per pixel"""
    detector: tuple[int, int]
    """number of columns and rows of the detector"""
    grid: int
    """side of the simulated square in pixels; stamps are cut from its centre, away from its edges"""
    zero_point: float
    """AB magnitude of one count"""
    gain: float
    """electrons per count; for LSST of a mean band, see LSST_BANDS"""
    read_noise: float
    """electrons"""
    sky: tuple[float, float]
    """counts per pixel of a dark and of a moonlit sky; unused for LSST, see LSST_BANDS"""
    keeps_sky: bool
    """whether the published images still have their sky background"""
    seeing: float
    """median full width at half maximum of the PSF, arcsec"""
    psf: Literal["moffat", "kolmogorov"]
    """the profile of the PSF of a science image. Templates, stacked from images of different seeing, have a Moffat
    profile."""
    saturation: float
    """counts at which a pixel saturates"""
    bleeds: bool
    """whether the charge of saturated pixels spreads along the columns"""
    aureole: float
    """fraction of the light of a star, within the simulated square, that is scattered far from the core of the PSF"""
    resampling: float
    """weight, relative to the central pixel, of the two neighbours in the noise of resampled and stacked exposures"""
    quoted_error: float
    """ratio of the published flux uncertainty to that from pixel noise alone"""
    calibration_error: float
    """relative flux uncertainty from the calibration, the minimum for a bright source"""
    fit_radius: int
    """radius within which the PSF is fitted to a source, in pixels"""
    weathers: int
    """number of distinct observing conditions of a night. Drawing a PSF costs as much time as several alerts"""
    alerts_per_exposure: int
    faintest: float
    """faintest events, in magnitudes above the limiting magnitude"""
    stars: tuple[float, float]
    """mean and standard deviation of the natural logarithm of the number of field stars in the simulated square"""
    galaxies: float
    """mean number of field galaxies in the simulated square"""
    unread: float
    """fraction of the alerts with blocks of NaN"""
    exposures_per_template: tuple[int, int]
    """minimum and maximum number of exposures in a template"""
    brightest: float
    """AB magnitude of the brightest alerts; brighter sources saturate"""

    def counts(self, magnitude: float) -> float:
        """Return the counts of a source with this AB magnitude."""
        return float(10 ** (0.4 * (self.zero_point - magnitude)))

    @property
    def nanojansky(self) -> float:
        """The flux of one count in nanojansky."""
        return float(10 ** (0.4 * (AB_ZERO_POINT_NJY - self.zero_point)))


ZTF = Instrument(
    bands=("g", "r"),
    pixel_scale=1.01,
    detector=(3072, 3080),
    grid=80,
    zero_point=26.28,
    gain=6.2,
    read_noise=10.0,
    sky=(90.0, 320.0),
    keeps_sky=True,
    seeing=2.0,
    psf="moffat",
    saturation=50_000.0,
    bleeds=False,
    aureole=0.0,
    resampling=0.5,
    quoted_error=1.8,
    calibration_error=0.02,
    fit_radius=4,
    weathers=24,
    alerts_per_exposure=60,
    faintest=0.2,
    stars=(1.0, 0.7),
    galaxies=0.8,
    unread=0.08,
    exposures_per_template=(15, 40),
    brightest=13.0,
)
"""ZTF: the medians of background, noise and zero point of public stamps; the camera as in Bellm et al. 2019 (PASP 131,
018002). The ratio of the flux uncertainties is scorr x sigmapsf / 1.086 of public alerts."""


@dataclass(frozen=True, slots=True)
class LsstBand:
    """A band of LSST in a visit of 30 s. `gain`: electrons per nJy. `dark_sky`: electrons per pixel of a dark sky."""

    gain: float
    dark_sky: float


def _lsst_band(zero_point: float, sky: float) -> LsstBand:
    """Return the band from the AB magnitude of one electron per second and that of one square arcsecond of sky."""
    exposure, pixel_area = 30.0, 0.2**2
    return LsstBand(
        gain=exposure * 10 ** (0.4 * (zero_point - AB_ZERO_POINT_NJY)),
        dark_sky=exposure * pixel_area * 10 ** (0.4 * (zero_point - sky)),
    )


LSST_BANDS: Mapping[str, LsstBand] = {
    "u": _lsst_band(26.52, 23.05),
    "g": _lsst_band(28.51, 22.24),
    "r": _lsst_band(28.36, 21.20),
    "i": _lsst_band(28.17, 20.47),
    "z": _lsst_band(27.78, 19.60),
    "y": _lsst_band(26.82, 18.63),
}
"""Throughput and dark sky of LSST (Jones 2016, SMTN-002). The variance planes of public LSSTCam alerts imply gains that
differ from these by less than 11 % in g, r, i and z."""

LSST = Instrument(
    bands=tuple(LSST_BANDS),
    pixel_scale=0.2,
    detector=(4072, 4000),
    grid=112,
    zero_point=AB_ZERO_POINT_NJY,
    gain=LSST_BANDS["i"].gain,
    read_noise=9.0,
    sky=(0.0, 0.0),
    keeps_sky=False,
    seeing=1.12,
    psf="kolmogorov",
    saturation=65_000.0,
    bleeds=True,
    aureole=0.02,
    resampling=0.13,
    quoted_error=1.0,
    calibration_error=0.0,
    fit_radius=20,
    weathers=48,
    alerts_per_exposure=10,
    faintest=0.0,
    stars=(1.6, 1.1),
    galaxies=4.0,
    unread=0.0,
    exposures_per_template=(4, 60),
    brightest=16.5,
)
"""LSST: a visit of 30 s with LSSTCam (Ivezic et al. 2019, ApJ 873, 111, table 2). A pixel holds about 100,000
electrons. The measured values (noise of templates, PSF, seeing) are those of public LSSTCam alerts."""
