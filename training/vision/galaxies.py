"""Galaxy images with morphological labels: from Galaxy Zoo (a folder and a table), or simulated.

Answers are fractions between 0 and 1, NaN where a question was not asked. Images have the format of alert cutouts: one
band per channel, at the size that the network takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import galsim
import numpy as np
import pyarrow as pa
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pyarrow import dataset

from broker_filter.console import progress
from training.errors import DatasetError

FILE = "file_loc"
"""Column of Galaxy Zoo's tables with the path of the image; only the file name is used."""
SHARE = "_fraction"
"""Suffix of columns of vote fractions in Galaxy Zoo's tables."""
MAX_IMAGE_PIXELS = 4096**2
"""Largest number of pixels of an image file. Larger images are not cutouts of a galaxy, and may be decompression
bombs."""

QUESTIONS = ("bulge", "edge_on", "knots", "companion", "extended")
"""Parameters of a simulated galaxy: bulge-to-total light ratio; 1 - cos(inclination) of the disc; fraction of the
disc's light in knots; a companion's light relative to the galaxy's; half-light radius of the disc relative to
LARGEST_RADIUS."""
PIXEL = 1.01
"""Pixel scale of ZTF in arcsec."""
SEEING = (1.5, 3.0)
"""Range of ZTF's seeing (FWHM) in arcsec."""
PSF_BETA = 3.0
"""Beta of the Moffat profile."""
LARGEST_RADIUS = 8.0
"""Largest half-light radius in arcsec; the smallest is a tenth of it, and unresolved."""
COMPANIONS = 0.3
"""Fraction of galaxies with a companion."""
BULGE_INDEX, COMPANION_INDEX = 4.0, 2.0
"""Sersic indices; 4 is de Vaucouleurs's profile."""
DISC_THICKNESS = 0.15
"""Axis ratio of a disc seen edge-on."""
KNOTS = 30
"""Number of star-forming regions in a disc."""
BULGE_REDNESS = (1.3, 1.0, 0.7)
"""Factor of the bulge's light in each band, from red to blue."""
SIGNAL_TO_NOISE = (15.0, 300.0)
"""Range of the signal-to-noise ratio of all light in a band."""


@dataclass(frozen=True, slots=True)
class Galaxies:
    """N images of galaxies, and Q answers about each."""

    images: NDArray[np.float32]  # [N, 3, S, S]
    answers: NDArray[np.float32]  # [N, Q] 0 to 1, NaN where unknown
    questions: tuple[str, ...]  # Q
    source: str
    """Origin of the galaxies, for the card."""

    def __len__(self) -> int:
        return len(self.images)


def read_galaxies(images: Path, table: Path, questions: tuple[str, ...] = (), size: int = 63) -> Galaxies:
    """Read the images of a folder that a table (.csv or .parquet) lists, scaled to `size` pixels.

    `questions`: columns of vote fractions; empty: every `*_fraction`. Rows without an image file are skipped.

    Raises DatasetError if a column or every image is missing, if an image cannot be read, or if an answer is not a
    fraction.
    """
    try:
        rows = dataset.dataset(table, format=table.suffix.removeprefix("."))
        questions = questions or tuple(name for name in rows.schema.names if name.endswith(SHARE))
        if missing := {FILE, *questions} - set(rows.schema.names):
            raise DatasetError(f"{table}: no column {', '.join(sorted(missing))}")
        if not questions:
            raise DatasetError(f"{table}: has no column of vote fractions (*{SHARE}); name columns in `questions`")
        columns = rows.to_table(columns=[FILE, *questions])
        answers = np.stack([columns[name].to_numpy() for name in questions], axis=1).astype(np.float32)
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise DatasetError(f"{table}: cannot be read as .csv or .parquet: {error}") from error
    if ((answers < 0) | (answers > 1)).any():
        raise DatasetError(f"{table}: vote fractions must be between 0 and 1")
    files = [images / Path(str(name)).name for name in columns[FILE].to_pylist()]
    there = np.array([file.is_file() for file in files])
    if not there.any():
        raise DatasetError(f"{images}: contains none of the {len(files)} images that {table} lists")
    if unknown := [name for name, known in zip(questions, answers[there].T, strict=True) if np.isnan(known).all()]:
        raise DatasetError(f"{table}: no available image has an answer of {', '.join(unknown)}")
    with progress("Reading galaxies", int(there.sum()), "images") as advance:
        pixels = np.empty((int(there.sum()), 3, size, size), np.float32)
        for i, row in enumerate(np.flatnonzero(there).tolist()):
            pixels[i] = _read_image(files[row], size)
            advance(1)
    return Galaxies(pixels, answers[there], questions, f"{len(pixels)} real galaxies of {table.name}")


def _read_image(file: Path, size: int) -> NDArray[np.float32]:
    """Return an image float32[3, size, size] with the reddest band first."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DatasetError(f"{file}: {image.width} x {image.height} px is too large for a cutout of a galaxy")
            scaled = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as an image: {error}") from error
    return np.asarray(scaled, np.float32).transpose(2, 0, 1)


def simulate_galaxies(n: int, seed: int, size: int = 63) -> Galaxies:
    """Simulate `n` galaxies with bulge, disc, knots and companions, in three bands, with ZTF's pixel scale and seeing.

    The answers are the parameters of the simulation (see QUESTIONS); no person has classified these images.
    """
    images = np.empty((n, 3, size, size), np.float32)
    answers = np.empty((n, len(QUESTIONS)), np.float32)
    with progress("Simulating", n, "galaxies") as advance:
        for i in range(n):
            images[i], answers[i] = _simulate(np.random.default_rng([seed, i]), size)
            advance(1)
    return Galaxies(images, answers, QUESTIONS, f"{n} galaxies simulated with GalSim (bulge, disc, knots, companions)")


def _simulate(rng: Generator, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return an image float32[3, size, size] and its answers float32[Q]."""
    bulge, knots, cos_inclination = rng.uniform(0, 1), rng.beta(1, 3), rng.uniform(0, 1)
    radius = LARGEST_RADIUS * rng.uniform(0.1, 1)
    companion = rng.uniform(0.1, 1) if rng.random() < COMPANIONS else 0.0
    turn, direction = rng.uniform(0, 2 * np.pi, 2)

    spheroid = galsim.Sersic(BULGE_INDEX, half_light_radius=0.5 * radius, trunc=5 * radius)
    face_on = galsim.Exponential(half_light_radius=radius)
    knotty = galsim.RandomKnots(KNOTS, profile=face_on, rng=galsim.BaseDeviate(int(rng.integers(2**31))))
    # Projected axis ratio of an oblate spheroid (Hubble 1926).
    axis_ratio = np.hypot(cos_inclination, DISC_THICKNESS) / np.hypot(1, DISC_THICKNESS)
    disc = ((1 - knots) * face_on + knots * knotty).shear(q=axis_ratio, beta=turn * galsim.radians)
    distance = rng.uniform(1, 3) * radius
    neighbour = galsim.Sersic(COMPANION_INDEX, half_light_radius=0.5 * radius, trunc=5 * radius)
    neighbour = neighbour.shift(distance * np.cos(direction), distance * np.sin(direction))
    psf = galsim.Moffat(beta=PSF_BETA, fwhm=rng.uniform(*SEEING))

    signal_to_noise = np.exp(rng.uniform(*np.log(SIGNAL_TO_NOISE)))
    pixels = np.empty((3, size, size), np.float32)
    for band, redness in enumerate(BULGE_REDNESS):
        share = bulge * redness / (bulge * redness + 1 - bulge)
        galaxy = galsim.Convolve(share * spheroid + (1 - share) * disc + companion * neighbour, psf)
        image = galaxy.drawImage(nx=size, ny=size, scale=PIXEL).array
        noise = np.sqrt((image**2).sum()) / signal_to_noise
        pixels[band] = image + rng.normal(0, noise, image.shape)
    return pixels, np.array([bulge, 1 - cos_inclination, knots, companion, radius / LARGEST_RADIUS], np.float32)
