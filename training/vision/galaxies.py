"""Images of galaxies with what is known of their shapes: Galaxy Zoo's, from a folder and a table, and simulated ones.

Answers are shares between 0 and 1, NaN where a question was not asked. Images are made as alerts' cutouts are: one band
to a channel, of the size that the network takes.
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
"""The column of Galaxy Zoo's tables that says which image a row is of; only its name within the folder is used."""
SHARE = "_fraction"
"""Suffix of a column of vote fractions in Galaxy Zoo's tables."""
MAX_IMAGE_PIXELS = 4096**2
"""Larger files are no cutouts of a galaxy, and a decompression bomb may claim any size."""

QUESTIONS = ("bulge", "edge_on", "knots", "companion", "extended")
"""Of a simulated galaxy: the bulge's share of its light; 1 - cosine of the disc's inclination; the knots' share of the
disc's light; a companion's light, of the galaxy's; the disc's half-light radius, of the largest that is drawn."""
PIXEL = 1.01
"""arcsec; ZTF's."""
SEEING = (1.5, 3.0)
"""arcsec, full width at half maximum; ZTF's."""
PSF_BETA = 3.0
"""Of Moffat's profile."""
LARGEST_RADIUS = 8.0
"""arcsec, at half light; the smallest is a tenth of it, and unresolved."""
COMPANIONS = 0.3
"""Share of galaxies that have one."""
BULGE_INDEX, COMPANION_INDEX = 4.0, 2.0
"""Sersic's; 4 is de Vaucouleurs's profile."""
DISC_THICKNESS = 0.15
"""Axis ratio of a disc seen edge-on."""
KNOTS = 30
"""Regions of star formation in a disc."""
BULGE_REDNESS = (1.3, 1.0, 0.7)
"""How bright bulges are for their share of the light, in each band from red to blue."""
SIGNAL_TO_NOISE = (15.0, 300.0)
"""Of all the light in a band."""


@dataclass(frozen=True, slots=True)
class Galaxies:
    """N images of galaxies and Q answers about each."""

    images: NDArray[np.float32]  # [N, 3, S, S]
    answers: NDArray[np.float32]  # [N, Q] from 0 to 1, NaN where not known
    questions: tuple[str, ...]  # Q
    source: str
    """Where they come from, for the card."""

    def __len__(self) -> int:
        return len(self.images)


def read_galaxies(images: Path, table: Path, questions: tuple[str, ...] = (), size: int = 63) -> Galaxies:
    """The images of a folder that a table (.csv or .parquet) describes, scaled to `size` pixels.

    `questions`: columns of shares; without, every `*_fraction`. Rows whose image is not there are left out. Raises
    DatasetError where a column or every image is missing, an image cannot be read or a share is none.
    """
    try:
        rows = dataset.dataset(table, format=table.suffix.removeprefix("."))
        questions = questions or tuple(name for name in rows.schema.names if name.endswith(SHARE))
        if missing := {FILE, *questions} - set(rows.schema.names):
            raise DatasetError(f"{table}: no column {', '.join(sorted(missing))}")
        if not questions:
            raise DatasetError(f"{table}: no column of vote fractions (*{SHARE}), and none was named")
        columns = rows.to_table(columns=[FILE, *questions])
        answers = np.stack([columns[name].to_numpy() for name in questions], axis=1).astype(np.float32)
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise DatasetError(f"{table}: neither a .csv nor a .parquet that can be read: {error}") from error
    if ((answers < 0) | (answers > 1)).any():
        raise DatasetError(f"{table}: shares must be from 0 to 1")
    files = [images / Path(str(name)).name for name in columns[FILE].to_pylist()]
    there = np.array([file.is_file() for file in files])
    if not there.any():
        raise DatasetError(f"{images}: none of the {len(files)} images that {table} describes is there")
    if unknown := [name for name, known in zip(questions, answers[there].T, strict=True) if np.isnan(known).all()]:
        raise DatasetError(f"{table}: no image that is there has an answer of {', '.join(unknown)}")
    with progress("Reading galaxies", int(there.sum()), "images") as advance:
        pixels = np.empty((int(there.sum()), 3, size, size), np.float32)
        for i, row in enumerate(np.flatnonzero(there).tolist()):
            pixels[i] = _read_image(files[row], size)
            advance(1)
    return Galaxies(pixels, answers[there], questions, f"{len(pixels)} real galaxies of {table.name}")


def _read_image(file: Path, size: int) -> NDArray[np.float32]:
    """[3, size, size]; red, green, blue: the reddest band first."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DatasetError(f"{file}: {image.width} x {image.height} px is no cutout of a galaxy")
            scaled = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise DatasetError(f"{file}: not an image that can be read: {error}") from error
    return np.asarray(scaled, np.float32).transpose(2, 0, 1)


def simulate_galaxies(n: int, seed: int, size: int = 63) -> Galaxies:
    """`n` galaxies of a bulge and a disc, with knots and companions, in three bands, with ZTF's pixels and seeing.

    Their answers are the parameters that they were drawn with (see `QUESTIONS`): no person ever looked at them.
    """
    images = np.empty((n, 3, size, size), np.float32)
    answers = np.empty((n, len(QUESTIONS)), np.float32)
    with progress("Simulating", n, "galaxies") as advance:
        for i in range(n):
            images[i], answers[i] = _simulate(np.random.default_rng([seed, i]), size)
            advance(1)
    return Galaxies(images, answers, QUESTIONS, f"{n} galaxies simulated with GalSim (bulge, disc, knots, companions)")


def _simulate(rng: Generator, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """An image [3, size, size] and the answers [Q]."""
    bulge, knots, cos_inclination = rng.uniform(0, 1), rng.beta(1, 3), rng.uniform(0, 1)
    radius = LARGEST_RADIUS * rng.uniform(0.1, 1)
    companion = rng.uniform(0.1, 1) if rng.random() < COMPANIONS else 0.0
    turn, direction = rng.uniform(0, 2 * np.pi, 2)

    spheroid = galsim.Sersic(BULGE_INDEX, half_light_radius=0.5 * radius, trunc=5 * radius)
    face_on = galsim.Exponential(half_light_radius=radius)
    knotty = galsim.RandomKnots(KNOTS, profile=face_on, rng=galsim.BaseDeviate(int(rng.integers(2**31))))
    # An oblate spheroid in projection (Hubble 1926): as flat as the disc is thick when seen edge-on.
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
