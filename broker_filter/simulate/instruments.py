"""The telescopes whose alerts are simulated: the numbers that decide what their images look like.

Chosen so that stamps resemble published ones in background, noise and width of the point spread; no calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

AB_ZERO_POINT_NJY = 31.4
"""AB magnitude of one nanojansky."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """A camera and its image-subtraction pipeline. Images are in counts: DN for ZTF, nanojansky for LSST."""

    bands: tuple[str, ...]
    pixel_scale: float
    """arcsec per pixel"""
    detector: tuple[int, int]
    """columns and rows of the detector's readout"""
    grid: int
    """side in pixels of the square that is drawn and subtracted; stamps are cut from its middle, clear of its edges"""
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
    """median full width at half maximum of the point spread, arcsec"""
    saturation: float
    """counts at which a pixel is full"""
    exposures_per_template: tuple[int, int]
    brightest: float
    """magnitude; brighter sources saturate and raise no alert"""

    def counts(self, magnitude: float) -> float:
        """Counts of a source of an AB magnitude."""
        return float(10 ** (0.4 * (self.zero_point - magnitude)))

    @property
    def nanojansky(self) -> float:
        """Nanojansky per count."""
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
"""Median background, noise and zero point of public ZTF stamps; Bellm et al. 2019 (PASP 131, 018002) for the camera."""

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
"""Two 15-second snaps in r under a median sky; Ivezic et al. 2019 (ApJ 873, 111), table 2."""
