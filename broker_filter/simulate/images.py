"""Simulates the science, template and difference images of an alert, and the photometry on the difference image.

Sources are drawn in Fourier space, where a shift is a phase and a convolution is a product, so an alert costs half a
dozen small transforms. GalSim draws the point spread functions (PSFs) and the galaxies once, for all alerts. Images are
in counts, with the alert at the central pixel (grid // 2, grid // 2). This module must not depend on packets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.simulate.instruments import Instrument
from broker_filter.simulate.weather import Weather, draw_weather

Image = NDArray[np.float32]  # [grid, grid]
Spectrum = NDArray[np.complex64]  # [grid, grid // 2 + 1], as from numpy.fft.rfft2, with the central pixel as the origin

Subtraction = tuple[Spectrum, Spectrum, Spectrum]
"""The kernels that are applied to science image and template, and the PSF of the difference."""

MOFFAT_BETA = 3.0
"""The Moffat index of the PSF of ZTF and of the templates of LSST. Turbulence alone (Kolmogorov) would give a steeper
4.8."""
PSF_ERROR_PX2 = 0.006
"""The 1-sigma error of the squared PSF width in the subtraction, in square pixels: bright stars leave a residual."""
REGISTRATION_ERROR_PX = 0.035
"""The 1-sigma misalignment of science image and template along each axis, in pixels."""
FLUX_SCALE_ERROR = 0.004
"""The 1-sigma relative error of the flux scale of the template."""
SMALLEST_RESPONSE = 1e-4
"""The lower bound of the denominator in the subtraction, relative to the noise: at the finest scales the transforms of
the PSFs are only rounding errors."""
WIDEST_APERTURE = 9
"""The radius of the wider aperture, in pixels."""
UNMASKED_PX = 2.0
"""How far the difference image reaches beyond the border of the template, in pixels."""
AUREOLE_CORE_PX = 2.0
"""The radius within which the aureole of a star is flat, in pixels."""
MATCHING_FLOOR = 3e-3
"""The lower bound of the response of the template, relative to its maximum, in the kernel that matches its PSF."""


class Point(NamedTuple):
    """A point source: a star, a galactic nucleus or a transient.

    `x`, `y`: pixels to the right of and above the image centre. `science`, `template`: its counts in these images.
    """

    x: float
    y: float
    science: float
    template: float


class Galaxy(NamedTuple):
    """A galaxy. `shape`: index of the drawn shape. `x`, `y`: pixels to the right of and above the image centre."""

    shape: int
    x: float
    y: float
    counts: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The sources in the sky. `trail`: the motion (x, y) of the first point during the exposure, in pixels."""

    points: Sequence[Point]
    galaxies: Sequence[Galaxy] = ()
    trail: tuple[float, float] = (0.0, 0.0)


class TemplateEdge(NamedTuple):
    """The border of a template: `distance` pixels from the image centre, in the direction `angle` (radians)."""

    distance: float
    angle: float


class Stamps(NamedTuple):
    """The three images of an alert, in counts."""

    science: Image
    template: Image
    difference: Image


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """The band, weather and template of an exposure, and the kernels for its subtraction."""

    instrument: Instrument
    band: str
    fwhm: float  # of the PSF of the science image, pixels
    template_fwhm: float
    sky: float  # counts per pixel
    gain: float  # electrons per count
    template_exposures: int
    noise: float  # 1-sigma sky noise of the science image, counts per pixel
    template_noise: float
    psf_science: Spectrum
    psf_template: Spectrum
    science_kernel: Spectrum  # difference = science_kernel * science - template_kernel * template
    template_kernel: Spectrum
    psf_difference: Spectrum
    flux_error: float  # published 1-sigma uncertainty of the PSF flux of a faint source in the difference, counts

    @property
    def limiting_magnitude(self) -> float:
        """The 5-sigma limiting AB magnitude of the difference image."""
        return float(self.instrument.zero_point - 2.5 * np.log10(5 * self.flux_error))

    def profile(self, psf: Spectrum, x: float, y: float, trail: tuple[float, float] = (0.0, 0.0)) -> Image:
        """Return the image of a source with a flux of one count, `x` pixels to the right of and `y` above the centre.

        `psf`: the PSF of the image. `trail`: the motion (x, y) of the source during the exposure, in pixels.
        """
        grid = self.instrument.grid
        spectrum = psf * _shift(grid, x, y)
        if any(trail):
            spectrum = spectrum * _streak(grid, *trail)
        return np.fft.fftshift(np.fft.irfft2(spectrum)).astype(np.float32)


def draw_conditions(instrument: Instrument, rng: np.random.Generator) -> Conditions:
    """Draw the band, the weather and the template of one exposure at random."""
    weather = draw_weather(instrument, rng)
    science = _draw_psf(instrument, instrument.psf, weather.seeing, weather.shear)
    template = _draw_psf(instrument, "moffat", weather.template_seeing, weather.template_shear)
    science_kernel, template_kernel, psf_difference = (
        _subtract_as_ztf(science, template, weather)
        if instrument.keeps_sky
        else _subtract_as_lsst(science, template, weather, instrument.resampling)
    )
    # The noise of the difference is white, so the uncertainty of a PSF fit is sigma divided by the norm of the PSF (by
    # Parseval's theorem, in which the half plane counts twice).
    twice = np.full(instrument.grid // 2 + 1, 2.0)
    twice[[0, -1]] = 1.0
    norm = float(np.sqrt((np.abs(psf_difference) ** 2 * twice).sum())) / instrument.grid
    return Conditions(
        instrument=instrument,
        band=weather.band,
        fwhm=weather.seeing / instrument.pixel_scale,
        template_fwhm=weather.template_seeing / instrument.pixel_scale,
        sky=weather.sky,
        gain=weather.gain,
        template_exposures=weather.template_exposures,
        noise=weather.noise,
        template_noise=weather.template_noise,
        psf_science=science,
        psf_template=template,
        science_kernel=science_kernel.astype(np.complex64),
        template_kernel=template_kernel.astype(np.complex64),
        psf_difference=psf_difference.astype(np.complex64),
        flux_error=instrument.quoted_error * float(np.hypot(weather.noise, weather.template_noise)) / norm,
    )


def _subtract_as_ztf(science: Spectrum, template: Spectrum, weather: Weather) -> Subtraction:
    """Return the kernels of proper subtraction.

    Zackay, Ofek & Gal-Yam 2016 (ApJ 830, 27), equations 13 and 14, for images with the same flux scale, which the
    result also has. Their new image is the science image, their reference image the template.
    """
    noise, template_noise = weather.noise, weather.template_noise
    spread = np.sqrt(np.abs(science * template_noise) ** 2 + np.abs(template * noise) ** 2)
    scale = np.hypot(noise, template_noise) / np.maximum(spread, SMALLEST_RESPONSE * noise)
    return scale * template, scale * science, scale * science * template


def _subtract_as_lsst(science: Spectrum, template: Spectrum, weather: Weather, resampling: float) -> Subtraction:
    """Return the kernels of a subtraction whose noise is made white.

    The template is convolved so that it has the PSF of the science image (Alard & Lupton 1998, ApJ 503, 325). The
    difference is then convolved so that its noise is white again (Reiss & Lupton 2016, DMTN-021).
    """
    match = science * np.conj(template) / (np.abs(template) ** 2 + MATCHING_FLOOR**2)
    correlation = _response_of_resampling(len(science), resampling)
    power = weather.noise**2 + np.abs(weather.template_noise * correlation * match) ** 2
    whiten = np.sqrt((weather.noise**2 + weather.template_noise**2) / power)
    return whiten.astype(np.complex64), whiten * match, whiten * science


def draw_galaxies(instrument: Instrument, n: int, rng: np.random.Generator) -> list[Spectrum]:
    """Draw `n` galaxies at the image centre: Sersic profiles with a flux of one count, not convolved with a PSF."""
    import galsim

    grid, shapes = instrument.grid, []
    for _ in range(n):
        sersic = float(rng.choice((1.0, 2.0, 4.0), p=(0.55, 0.2, 0.25)))
        radius = float(np.clip(1.5 * rng.lognormal(0.0, 0.5), 0.5, 6.0))  # half-light radius, arcsec
        flattest = 0.25 if sersic < 3 else 0.6
        profile = galsim.Sersic(sersic, half_light_radius=min(radius / instrument.pixel_scale, grid / 12)).shear(
            q=float(rng.uniform(flattest, 1.0)), beta=float(rng.uniform(0, np.pi)) * galsim.radians
        )
        plane = profile.drawKImage(nx=grid, ny=grid, scale=2 * np.pi / grid).array
        shapes.append(np.fft.ifftshift(plane)[:, : grid // 2 + 1].astype(np.complex64))
    return shapes


def _draw_psf(
    instrument: Instrument, profile: Literal["moffat", "kolmogorov"], seeing: float, shear: tuple[float, float]
) -> Spectrum:
    """Draw a PSF whose full width at half maximum is `seeing` arcsec."""
    import galsim

    grid = instrument.grid
    optics = galsim.Moffat(beta=MOFFAT_BETA, fwhm=seeing) if profile == "moffat" else galsim.Kolmogorov(fwhm=seeing)
    # GalSim draws at the true centre, which for an even number of pixels is the corner of four pixels.
    image = (
        optics.shear(g1=shear[0], g2=shear[1])
        .drawImage(nx=grid, ny=grid, scale=instrument.pixel_scale, offset=(0.5, 0.5))
        .array
    )
    spectrum = np.fft.rfft2(np.fft.ifftshift(image / image.sum()))
    return (spectrum * np.outer(_taper(np.fft.fftfreq(grid)), _taper(np.fft.rfftfreq(grid)))).astype(np.complex64)


def _taper(frequency: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return a low-pass filter for N frequencies in cycles per pixel, float64[N]: 1 at 0, falling to 0 at Nyquist.

    It prevents ringing of shifted images.
    """
    start = 0.3
    return np.asarray(np.cos(0.5 * np.pi * np.clip((np.abs(frequency) - start) / (0.5 - start), 0, 1)) ** 2)


def expose(
    scene: Scene,
    conditions: Conditions,
    galaxies: Sequence[Spectrum],
    rng: np.random.Generator,
    *,
    artefact: Image | None = None,
    misalignment: tuple[float, float] = (0.0, 0.0),
    mismatch: tuple[float, float, float] = (0.0, 0.0, 0.0),
    template_edge: TemplateEdge | None = None,
) -> Stamps:
    """Simulate the science image and the template of `scene`, and subtract them.

    `galaxies`: the shapes from `draw_galaxies`. `artefact`: an image in counts that is added to the science image.
    `misalignment`: the offset (x, y) of the template in pixels, in addition to REGISTRATION_ERROR_PX. `mismatch`: the
    error (xx, yy, xy) of the second moments of the matched PSF, in square pixels. `template_edge`: the difference is 0
    where the template ends.
    """
    instrument, grid = conditions.instrument, conditions.instrument.grid
    science_sky, template_sky = _draw(scene, conditions, galaxies)
    template_sky *= _shift(grid, *rng.normal(misalignment, REGISTRATION_ERROR_PX))
    pedestal = np.float32(conditions.sky if instrument.keeps_sky else 0.0)
    full = instrument.saturation * instrument.gain / conditions.gain - pedestal

    counts = np.fft.irfft2(science_sky)
    sigma = np.sqrt(conditions.noise**2 + np.maximum(counts, 0) / conditions.gain)
    science = counts + sigma * rng.standard_normal(counts.shape, dtype=np.float32)
    if artefact is not None:
        science += np.fft.ifftshift(artefact)
    science = np.asarray(_bleed(science, float(full)) if instrument.bleeds else np.minimum(science, full))

    counts = np.fft.irfft2(template_sky)
    gain = conditions.gain * conditions.template_exposures
    sigma = np.sqrt(conditions.template_noise**2 + np.maximum(counts, 0) / gain)
    noise = _as_if_resampled(sigma * rng.standard_normal(counts.shape, dtype=np.float32), instrument.resampling)
    template = np.minimum(counts + noise, full)

    # Errors of the subtraction: the width of the PSF and the flux scale.
    width, scale = rng.normal(0, (PSF_ERROR_PX2, FLUX_SCALE_ERROR)).astype(np.float32)
    mistake = np.exp(-0.5 * width * _wavenumber2(grid)) * (1 + scale)
    if any(mismatch):
        rows, columns = (2 * np.pi * frequency for frequency in _frequencies(grid))
        xx, yy, xy = mismatch
        exponent = xx * columns**2 + yy * rows[:, None] ** 2 + 2 * xy * rows[:, None] * columns
        mistake = mistake * np.exp(-0.5 * np.clip(exponent, -4, None)).astype(np.float32)
    matched = template if template_edge is None else np.where(_beyond(grid, template_edge) > 0, 0, template)
    difference = np.fft.irfft2(
        conditions.science_kernel * np.fft.rfft2(science) - conditions.template_kernel * mistake * np.fft.rfft2(matched)
    )
    if template_edge is not None:
        difference[_beyond(grid, template_edge) > UNMASKED_PX] = 0
    images = (science + pedestal, template + pedestal, difference)
    return Stamps(*(np.fft.fftshift(image).astype(np.float32) for image in images))


def _draw(scene: Scene, conditions: Conditions, galaxies: Sequence[Spectrum]) -> tuple[Spectrum, Spectrum]:
    """Return the spectra of the science image and the template without noise."""
    grid = conditions.instrument.grid
    points = np.array(scene.points, dtype=np.float64).reshape(-1, 4)
    v, u = _frequencies(grid)
    rows, columns = np.exp(-2j * np.pi * np.outer(v, points[:, 1])), np.exp(-2j * np.pi * np.outer(points[:, 0], u))
    science, template = ((rows * counts) @ columns for counts in (points[:, 2], points[:, 3]))
    if any(scene.trail):
        science = science + points[0, 2] * np.outer(rows[:, 0], columns[0]) * (_streak(grid, *scene.trail) - 1)
    if conditions.instrument.aureole:
        wings = _aureole(grid, conditions.instrument.aureole)
        science, template = science * wings, template * wings
    for galaxy in scene.galaxies:
        light = galaxy.counts * galaxies[galaxy.shape] * _shift(grid, galaxy.x, galaxy.y)
        science, template = science + light, template + light
    return science.astype(np.complex64) * conditions.psf_science, template.astype(
        np.complex64
    ) * conditions.psf_template


@cache
def _aureole(grid: int, fraction: float) -> NDArray[np.floating]:
    """Return the factor, float32[grid, grid // 2 + 1], that scatters a fraction of the light of stars far away.

    The surface brightness of this aureole falls with the square of the distance (King 1971, PASP 83, 199). It is
    neither in the published PSF nor in that of the subtraction.
    """
    place = np.fft.fftfreq(grid, 1 / grid)
    halo = 1 / (place[:, None] ** 2 + place**2 + AUREOLE_CORE_PX**2)
    spectrum = np.fft.rfft2(halo / halo.sum()).real
    return np.asarray(1 - fraction + fraction * spectrum, dtype=np.float32)


def _bleed(image: NDArray[np.floating], full: float) -> NDArray[np.floating]:
    """Return the image [grid, grid] with at most `full` counts in a pixel; the excess fills neighbours in its column.

    The excess charge spreads equally up and down, until it has filled pixels or leaves the image.
    """
    excess = np.maximum(image - full, 0).sum(axis=0)
    image = np.minimum(image, full)
    grid = len(image)
    for column in np.flatnonzero(excess).tolist():
        # The image has its origin in the first pixel; the distance is that along the column from the brightest pixel.
        start = int(image[:, column].argmax())
        away = np.abs((np.arange(grid) - start + grid // 2) % grid - grid // 2)
        nearest = np.argsort(away, kind="stable")
        room = np.maximum(full - image[nearest, column], 0)
        filled = np.cumsum(room) <= excess[column]
        image[nearest[filled], column] = full
    return image


def _beyond(grid: int, edge: TemplateEdge) -> NDArray[np.float64]:
    """Return how far each pixel lies beyond the border, in pixels, float64[grid, grid] with the origin first."""
    place = np.fft.fftfreq(grid, 1 / grid)
    return np.asarray(place[:, None] * np.sin(edge.angle) + place * np.cos(edge.angle) - edge.distance)


def _shift(grid: int, x: float, y: float) -> Spectrum:
    """Return the factor that shifts the spectrum of an image by `x` pixels to the right and `y` pixels up."""
    rows, columns = _frequencies(grid)
    return np.outer(np.exp(-2j * np.pi * rows * y), np.exp(-2j * np.pi * columns * x)).astype(np.complex64)


def _streak(grid: int, x: float, y: float) -> NDArray[np.float64]:
    """Return the factor, float64[grid, grid // 2 + 1], that smears the spectrum of an image evenly along a line.

    The line goes `x` pixels to the right and `y` pixels up.
    """
    rows, columns = _frequencies(grid)
    return np.sinc(rows[:, None] * y + columns * x)


@cache
def _frequencies(grid: int) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the frequencies of a spectrum in cycles per pixel: of its rows [grid] and its columns [grid // 2 + 1]."""
    return np.fft.fftfreq(grid), np.fft.rfftfreq(grid)


@cache
def _wavenumber2(grid: int) -> NDArray[np.float32]:
    rows, columns = _frequencies(grid)
    return ((2 * np.pi) ** 2 * (rows[:, None] ** 2 + columns**2)).astype(np.float32)


def _as_if_resampled(noise: NDArray[np.floating], weight: float) -> NDArray[np.floating]:
    """Return white noise [grid, grid], correlated as in stacks of resampled exposures, with the same variance.

    Along each axis, a pixel is mixed with its two neighbours, whose weight relative to its own is `weight`.
    """
    for axis in (0, 1):
        noise = noise + weight * np.roll(noise, 1, axis) + weight * np.roll(noise, -1, axis)
    return noise / (1 + 2 * weight**2)  # the square root of the gain in variance along each axis, for both axes


def _response_of_resampling(grid: int, weight: float) -> NDArray[np.floating]:
    """Return the factor, float64[grid, grid // 2 + 1], of the spectrum of noise under `_as_if_resampled`."""
    rows, columns = (1 + 2 * weight * np.cos(2 * np.pi * frequency) for frequency in _frequencies(grid))
    return np.asarray(rows[:, None] * columns / (1 + 2 * weight**2))


@dataclass(frozen=True, slots=True)
class Photometry:
    """Measurements of the source in the difference image; fluxes in counts, lengths in pixels."""

    flux: float  # PSF fit
    flux_error: float  # 1-sigma uncertainty, as a survey would publish it
    chi2: float  # of the fit, per degree of freedom
    aperture_flux: float  # within 4 pixels
    wide_aperture_flux: float  # within 9 pixels
    fwhm: float
    major: float  # second-moment axes
    minor: float
    n_negative: int  # negative pixels among the central 5 x 5
    n_bad: int  # bad pixels among the central 5 x 5
    sum_ratio: float  # the sum of the central 5 x 5 pixels over the sum of their absolute values

    @property
    def snr(self) -> float:
        """The absolute signal-to-noise ratio of the PSF flux."""
        return abs(self.flux) / self.flux_error


def measure(stamps: Stamps, conditions: Conditions, x: float, y: float) -> Photometry:
    """Measure a source in the difference image, `x` pixels to the right of and `y` pixels above the image centre.

    NaN pixels count as zero.
    """
    grid = conditions.instrument.grid
    fit_radius = conditions.instrument.fit_radius
    half = max(WIDEST_APERTURE, fit_radius)
    box = slice(grid // 2 - half, grid // 2 + half + 1)
    cut = stamps.difference[box, box]
    good = np.isfinite(cut)
    pixels = np.where(good, cut, np.float32(0))
    psf = np.fft.fftshift(np.fft.irfft2(conditions.psf_difference * _shift(grid, x, y)))[box, box]
    up, right = np.mgrid[-half : half + 1, -half : half + 1]
    radius2 = (right - x) ** 2 + (up - y) ** 2
    sigma2 = conditions.noise**2 + conditions.template_noise**2

    core = (radius2 < fit_radius**2) & good
    flux = float((pixels * psf)[core].sum() / max((psf * psf)[core].sum(), 1e-12))
    residual = (pixels - flux * psf)[core]
    if conditions.instrument.keeps_sky:
        shot = abs(flux) / conditions.gain * float((psf**3).sum() / (psf**2).sum() ** 2)
    else:  # the sources in the science image, such as a host or a variable star, contribute to the noise
        light = np.maximum(np.nan_to_num(stamps.science[box, box]), 0)
        shot = float((light * psf**2).sum() / (psf**2).sum() ** 2) / conditions.gain

    # Second moments under a Gaussian window (SExtractor's *WIN parameters), corrected for the width of the window.
    width = 0.6 * conditions.fwhm
    window = np.exp(-0.5 * radius2 / width**2) * np.sign(flux or 1.0) * pixels
    weight = max(float(window.sum()), 1e-6)
    moments = [float((window * p).sum()) / weight for p in ((right - x) ** 2, (up - y) ** 2, (right - x) * (up - y))]
    half_sum, half_difference = (moments[0] + moments[1]) / 2, np.hypot((moments[0] - moments[1]) / 2, moments[2])
    axes = [_without_window(half_sum + sign * half_difference, width) for sign in (1, -1)]

    centre = slice(half - 2, half + 3)
    middle = pixels[centre, centre]
    return Photometry(
        flux=flux,
        flux_error=float(
            np.sqrt(conditions.flux_error**2 + shot + (conditions.instrument.calibration_error * flux) ** 2)
        ),
        chi2=float((residual**2).sum() / sigma2 / max(core.sum() - 1, 1)),
        aperture_flux=float(pixels[radius2 < 16].sum()),
        wide_aperture_flux=float(pixels[radius2 < WIDEST_APERTURE**2].sum()),
        fwhm=float(2.355 * np.sqrt(axes[0] * axes[1])),
        major=axes[0],
        minor=axes[1],
        n_negative=int((middle * np.sign(flux or 1.0) < 0).sum()),
        n_bad=int((~good[centre, centre]).sum()),
        sum_ratio=float(abs(middle.sum()) / max(float(np.abs(middle).sum()), 1e-6)),
    )


def _without_window(variance: float, window: float) -> float:
    """Return the standard deviation of a Gaussian whose second moment under a Gaussian window is `variance`."""
    variance = float(np.clip(variance, 0.1, 0.8 * window**2))
    return float(np.sqrt(1 / (1 / variance - 1 / window**2)))
