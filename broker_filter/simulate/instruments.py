"""The parameters of the telescopes whose alerts are simulated.

The values are chosen so that stamps resemble published ones in background, noise and PSF width. They are not a
calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """electrons per count"""
    read_noise: float
    """electrons"""
    sky: tuple[float, float]
    """counts per pixel of a dark and of a moonlit sky"""
    keeps_sky: bool
    """whether the published images still have their sky background"""
    seeing: float
    """median full width at half maximum of the PSF, arcsec"""
    saturation: float
    """counts at which a pixel saturates"""
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
    saturation=50_000.0,
    exposures_per_template=(15, 40),
    brightest=13.0,
)
"""ZTF: the medians of background, noise and zero point of public stamps; the camera as in Bellm et al. 2019 (PASP 131,
018002)."""

LSST = Instrument(
    bands=("u", "g", "r", "i", "z", "y"),
    pixel_scale=0.2,
    detector=(4072, 4000),
    grid=112,
    zero_point=AB_ZERO_POINT_NJY,
    gain=1.7,
    read_noise=9.0,
    sky=(250.0, 900.0),
    keeps_sky=False,
    seeing=0.85,
    saturation=180_000.0,
    exposures_per_template=(4, 12),
    brightest=16.5,
)
"""LSST: a visit of two 15-second exposures in r under a median sky (Ivezic et al. 2019, ApJ 873, 111, table 2)."""
