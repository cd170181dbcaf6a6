"""Measures a source in the images of an LSST alert, by the definitions of the columns of the survey's packets.

The survey's pipeline is public (github.com/lsst: meas_base, meas_extensions_shapeHSM, meas_extensions_trailedSources,
ip_diffim). Lengths are in pixels, fluxes in the unit of the image, second moments in square pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.simulate.images import Image, Spectrum

PSF_SIZE = 41
"""The side of the square in which a PSF is fitted, and of the published PSF of science image and difference."""
APERTURE_RADIUS = 12.0
"""The radius of the aperture of apFlux (slot ApFlux)."""
THRESHOLD = 5.0
"""The detection threshold in the image convolved with its PSF, in units of its noise."""
GROWTH = 2.4
"""The radius by which detected regions grow, in units of the width (sigma) of the PSF."""
NEAR = 4
"""The maximum distance of the alert from the detected region that it belongs to, along each axis, in pixels."""
MOMENT_ITERATIONS = 100
MOMENT_TOLERANCE = 1e-3
"""The change of the moments, in square pixels, at which the iteration ends."""
SHORTEST_TRAIL = 1e-3
"""The shortest trail in units of 2 sqrt(2 (Ixx + Iyy)): the lower bound of the root finder."""


DIPOLE_ITERATIONS = 20
SMALL_SHIFT = 0.1
"""The shift, in pixels, of the images from which the derivatives of the PSF are computed."""
DIPOLE_TOLERANCE = 0.01
"""The step of the star's position, in pixels, at which the fit of a dipole ends. A step is at most one pixel."""
STAR_WITHIN = 6.0
"""The maximum distance of the star of a dipole from the alert, in pixels. In 176 public LSSTCam alerts, the stars of
dipoles are within 1.5 pixels; alerts with both signs that the survey does not call dipoles have none within 8 pixels,
with two exceptions."""


class Moments(NamedTuple):
    """The second moments of a source under an elliptical Gaussian of the same shape."""

    xx: float
    yy: float
    xy: float

    @property
    def size2(self) -> float:
        """The trace of the moments."""
        return self.xx + self.yy

    @property
    def radius(self) -> float:
        """The determinant radius: the sigma of a round Gaussian of the same area."""
        return float((self.xx * self.yy - self.xy**2) ** 0.25)


class Fit(NamedTuple):
    """The fit of a PSF. `n_data`: the number of pixels used."""

    flux: float
    flux_error: float
    chi2: float
    n_data: int


class Trail(NamedTuple):
    """The line that would have the second moments of the source.

    `angle`: radians from the x axis towards the y axis.
    """

    flux: float
    length: float
    angle: float


class Dipole(NamedTuple):
    """A pair of a positive and a negative image of one source, each with the flux `flux`.

    `x`, `y`: the mean position, as an offset from the central pixel. `dx`, `dy`: the position of the positive image
    minus that of the negative one. `n_data`: the number of pixels used, in three images.
    """

    x: float
    y: float
    dx: float
    dy: float
    flux: float
    chi2: float
    n_data: int


class Footprint(NamedTuple):
    """The pixels of a detection.

    `size`: the longer side of their bounding box, in pixels. `snr`: the highest absolute signal-to-noise ratio.
    `highest`, `lowest`: the offsets (x, y) of the extreme pixels from the central pixel.
    """

    pixels: NDArray[np.bool_]
    size: int
    snr: float
    highest: tuple[int, int]
    lowest: tuple[int, int]
    has_both_signs: bool


def fit_psf(image: Image, variance: Image, psf: Image) -> Fit:
    """Fit the PSF, an image of the same size centred on the source, with equal weights (meas_base, PsfFlux)."""
    box = _box(image, PSF_SIZE // 2)
    good = np.isfinite(image[box]) & np.isfinite(variance[box])
    pixels, spread, profile = (plane[box][good].astype(np.float64) for plane in (image, variance, psf))
    norm = max(float(profile @ profile), 1e-12)
    flux = float(pixels @ profile) / norm
    return Fit(
        flux,
        math.sqrt(float(spread @ profile**2)) / norm,
        float(((pixels - flux * profile) ** 2 / spread).sum()),
        len(pixels),
    )


def aperture_flux(image: Image, variance: Image, x: float, y: float) -> tuple[float, float, bool]:
    """Return the flux within APERTURE_RADIUS, its 1-sigma error, and whether unusable pixels are in the aperture."""
    half = int(APERTURE_RADIUS) + 1
    box = _box(image, half)
    up, right = np.mgrid[-half : half + 1, -half : half + 1]
    inside = (right - x) ** 2 + (up - y) ** 2 < APERTURE_RADIUS**2
    good = inside & np.isfinite(image[box]) & np.isfinite(variance[box])
    flux, spread = (float(plane[box][good].sum(dtype=np.float64)) for plane in (image, variance))
    return flux, math.sqrt(spread), bool((inside & ~good).any())


def adaptive_moments(image: Image, x: float, y: float, width: float) -> Moments | None:
    """Return the adaptive second moments of a positive source near (x, y), or None if there is no solution.

    The moments are those of the elliptical Gaussian that matches the source best (Hirata & Seljak 2003, MNRAS 343,
    459; the shape of shapeHSM). `width`: the sigma to start from.
    """
    terms = _monomials(PSF_SIZE // 2)
    pixels = np.nan_to_num(image[_box(image, PSF_SIZE // 2)]).ravel().astype(np.float64)
    xx = yy = width**2
    xy = 0.0
    for _ in range(MOMENT_ITERATIONS):
        determinant = xx * yy - xy * xy
        if not (determinant > 0 and 0 < xx + yy < PSF_SIZE**2 and max(abs(x), abs(y)) < PSF_SIZE // 4):
            return None
        a, b, c = yy / determinant, -xy / determinant, xx / determinant
        exponent = np.array(
            (a * x * x + 2 * b * x * y + c * y * y, -2 * (a * x + b * y), -2 * (b * x + c * y), a, 2 * b, c)
        )
        total, *sums = (terms @ (np.exp(-0.5 * (exponent @ terms)) * pixels)).tolist()
        if total <= 0:
            return None
        mean_x, mean_y, mean_xx, mean_xy, mean_yy = (value / total for value in sums)
        before = xx, yy, xy
        # A Gaussian under a Gaussian weight of the same shape has half its second moments.
        xx = 2 * (mean_xx - 2 * x * mean_x + x * x)
        yy = 2 * (mean_yy - 2 * y * mean_y + y * y)
        xy = 2 * (mean_xy - x * mean_y - y * mean_x + x * y)
        x, y = mean_x, mean_y
        if max(abs(xx - before[0]), abs(yy - before[1]), abs(xy - before[2])) < MOMENT_TOLERANCE:
            return Moments(xx, yy, xy) if xx * yy > xy * xy and xx > 0 else None
    return None


def extendedness(source: Moments, psf: Moments) -> float:
    """Return the measure of a source being larger or smaller than the PSF, from 0 to 1.

    It is 1 - exp(-chi2 / 2), chi2 = (T_source - T_psf)^2 / T_psf, T = Ixx + Iyy in square pixels (meas_base,
    ClassificationSizeExtendedness).
    """
    return 1 - math.exp(-0.5 * (source.size2 - psf.size2) ** 2 / psf.size2)


def trail_length(source: Moments) -> tuple[float, float]:
    """Return the length and the angle (radians from the x axis) of a line with these adaptive moments.

    The length follows from the ratio of the axes (meas_extensions_trailedSources, Naive).
    """
    spread = math.hypot(source.xx - source.yy, 2 * source.xy)
    ratio = 2 * (source.size2 + spread) / (source.size2 * math.sqrt(math.pi))
    low, high = SHORTEST_TRAIL, 1.0
    for _ in range(40):  # bisection
        middle = (low + high) / 2
        if math.erf(middle) < ratio * middle * math.exp(-(middle**2)):
            low = middle
        else:
            high = middle
    angle = 0.5 * math.atan2(2 * source.xy, source.xx - source.yy)
    return 2 * low * math.sqrt(2 * source.size2), angle


def find_footprint(image: Image, variance: Image, psf: Spectrum, width: float) -> Footprint:
    """Return the pixels of the detection at the centre of `image`.

    Pixels above or below the threshold, in the image convolved with the PSF (`psf` is its spectrum), are grown by
    GROWTH x `width`, and those that touch belong together.
    """
    middle = len(image) // 2
    usable = np.isfinite(image) & np.isfinite(variance)
    profile = np.fft.irfft2(psf, image.shape)
    noise2 = np.fft.irfft2(
        np.fft.rfft2(np.where(usable, variance, np.median(variance[usable]))) * np.fft.rfft2(profile**2).conj()
    )
    smooth = np.fft.irfft2(np.fft.rfft2(np.where(usable, image, 0.0)) * psf.conj())
    significance = smooth / np.sqrt(np.maximum(noise2, 1e-12))
    near = (slice(middle - NEAR, middle + NEAR + 1),) * 2
    at = int(np.abs(significance[near]).argmax())
    row, column = middle - NEAR + at // (2 * NEAR + 1), middle - NEAR + at % (2 * NEAR + 1)
    detected = np.abs(significance) > THRESHOLD
    detected[row, column] = True
    grown = np.fft.irfft2(np.fft.rfft2(detected) * _disk(len(image), round(GROWTH * width))) > 0.5
    pixels = _connected(grown, row, column)
    inside = np.where(pixels, significance, 0.0)
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    extremes = [divmod(int(flat), len(image)) for flat in (inside.argmax(), inside.argmin())]
    (top, right), (bottom, left) = extremes
    return Footprint(
        pixels,
        int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1,
        float(abs(significance[row, column])),
        (right - middle, top - middle),
        (left - middle, bottom - middle),
        bool(inside.max() > THRESHOLD and inside.min() < -THRESHOLD),
    )


def fit_dipole(
    science: Image, difference: Image, variance: Image, profile: Callable[[float, float], Image], footprint: Footprint
) -> Dipole | None:
    """Fit a star with another position in each of the two images, to the pixels of the footprint.

    The survey fits science image, matched template and difference together, with equal fluxes and a plane as background
    (ip_diffim, DipoleFitTask). The matched template is the science image minus the difference, so the mean of both
    gives flux and position, and the difference the displacement.

    `variance`: that of the difference. `profile(x, y)`: the PSF at an offset from the central pixel. Returns None if
    there is no star within STAR_WITHIN pixels of the central pixel.
    """
    good = footprint.pixels & np.isfinite(science) & np.isfinite(difference) & np.isfinite(variance)
    mean, subtracted = (science - 0.5 * difference)[good], difference[good].astype(np.float64)
    up, right = (axis - len(science) // 2 for axis in np.nonzero(good))
    x, y = ((high + low) / 2 for high, low in zip(footprint.highest, footprint.lowest, strict=True))
    for _ in range(DIPOLE_ITERATIONS):
        # The change of the star's image per pixel of displacement, along x and y.
        slopes = np.stack(
            [
                (profile(x + dx, y + dy) - profile(x - dx, y - dy))[good] / (2 * SMALL_SHIFT)
                for dx, dy in ((SMALL_SHIFT, 0.0), (0.0, SMALL_SHIFT))
            ],
            axis=1,
        )
        terms = np.column_stack([profile(x, y)[good], slopes, np.ones(len(mean)), right, up]).astype(np.float64)
        flux, flux_x, flux_y = np.linalg.lstsq(terms, mean, rcond=None)[0][:3].tolist()
        if flux <= 0:
            return None
        step_x, step_y = (float(np.clip(moment / flux, -1, 1)) for moment in (flux_x, flux_y))
        x, y = x + step_x, y + step_y
        if max(abs(step_x), abs(step_y)) < DIPOLE_TOLERANCE:
            break
    if math.hypot(x, y) > STAR_WITHIN:
        return None
    (dx, dy), *_ = np.linalg.lstsq(flux * slopes, subtracted, rcond=None)
    residual = subtracted - flux * slopes @ np.array((dx, dy))
    chi2 = float((residual**2 / variance[good]).sum())
    return Dipole(x, y, float(dx), float(dy), flux, chi2, 3 * len(mean))


def _box(image: Image, half: int) -> tuple[slice, slice]:
    middle = len(image) // 2
    return (slice(middle - half, middle + half + 1),) * 2


@cache
def _monomials(half: int) -> NDArray[np.float64]:
    """Return 1, x, y, x^2, x y, y^2 of the pixels of a square, float64[6, (2 half + 1)^2]."""
    y, x = (axis.ravel().astype(np.float64) for axis in np.mgrid[-half : half + 1, -half : half + 1])
    return np.stack((np.ones_like(x), x, y, x * x, x * y, y * y))


@lru_cache(maxsize=64)
def _disk(grid: int, radius: int) -> NDArray[np.complexfloating]:
    """Return the spectrum of a disk around the first pixel."""
    place = np.fft.fftfreq(grid, 1 / grid)
    return np.fft.rfft2((place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64))


def _connected(mask: NDArray[np.bool_], row: int, column: int) -> NDArray[np.bool_]:
    """Return the part of `mask` that is connected with a pixel of it."""
    part = np.zeros_like(mask)
    part[row, column] = True
    size = 0
    while (count := int(part.sum())) > size:
        size = count
        part[1:] |= part[:-1]
        part[:-1] |= part[1:]
        part[:, 1:] |= part[:, :-1]
        part[:, :-1] |= part[:, 1:]
        part &= mask
    return part
