"""Galaxy images with morphological labels: from Galaxy Zoo (fractions of votes, or one class per galaxy), or simulated.

Answers are fractions between 0 and 1, NaN where a question was not asked. Images have the format of alert cutouts: one
band per channel, at the size that the network takes. Image files are untrusted: their sizes are checked before they are
decoded.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
MAX_IMAGE_BYTES = 2**22
"""Largest image file in an archive. Images of galaxies have some kilobytes."""
MAX_ARCHIVE_MEMBERS = 2**20
"""Largest number of members of an archive of images, as many as Galaxy Zoo has galaxies."""

GALAXY_ZOO_1 = ("elliptical", "spiral", "edge_on", "merger", "dont_know")
"""The classes of Galaxy Zoo 1 (Lintott et al. 2011, MNRAS 410, 166) as questions: 1 for the galaxy's class, 0 for the
others."""
SPIRALS = ("spiral_cw", "spiral_acw")
"""Names of the class `spiral` in the table: the direction in which the arms wind. A flipped image has the other one."""
GALAXY, CLASS, ERROR_PAGE = "sdss_objid", "class_name", "error_image"
"""Columns of the table of Galaxy Zoo 1: the galaxy's id, which is the name of its image; its class; 1 if the image file
is an error page of the server."""

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
class AnsweredImages:
    """N images of galaxies or alerts, and Q answers about each."""

    images: NDArray[np.float32]  # [N, 3, S, S]
    box: NDArray[np.int16]  # [N, 3, 4] the part of each image that has pixels; see `AlertBatch.cutout_box`
    answers: NDArray[np.float32]  # [N, Q] 0 to 1, NaN where unknown
    questions: tuple[str, ...]  # Q
    source: str
    """Origin of the images, for the card."""
    weight: NDArray[np.float32]  # [N] weight in the loss, 1 on average

    def __len__(self) -> int:
        return len(self.images)


def read_galaxies(images: Path, table: Path, questions: tuple[str, ...] = (), size: int = 63) -> AnsweredImages:
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
            pixels[i] = _read_image(files[row], str(files[row]), size)
            advance(1)
    source = f"{len(pixels)} real galaxies of {table.name}"
    return AnsweredImages(pixels, whole(len(pixels), size), answers[there], questions, source, equal(len(pixels)))


def whole(n: int, size: int) -> NDArray[np.int16]:
    """Return the boxes int16[n, 3, 4] of images of `size` pixels without missing parts."""
    return np.broadcast_to(np.array([0, 0, size, size], np.int16), (n, 3, 4))


def equal(n: int) -> NDArray[np.float32]:
    """Return the same weight for n images, float32[n]."""
    return np.ones(n, np.float32)


def read_galaxy_zoo_1(archive: Path, table: Path, size: int = 63) -> AnsweredImages:
    """Read the JPEG images of a tar archive, whose classes a table (.csv) lists, scaled to `size` pixels.

    The questions are GALAXY_ZOO_1. Classes have very different numbers of galaxies (4,645 elliptical ones, 56 "don't
    know"), so galaxies are weighted: each class has the same total weight. Members that the table does not list, and
    images of error pages, are skipped.

    Raises DatasetError if the table lacks a column or has an unknown class, if the archive contains none of its images,
    or if an image is too large or cannot be read.
    """
    class_of = _read_classes(table)
    images: list[NDArray[np.float32]] = []
    classes: list[int] = []
    try:
        with tarfile.open(archive) as tar, progress("Reading galaxies", len(class_of), "images") as advance:
            for i, member in enumerate(tar):
                if i >= MAX_ARCHIVE_MEMBERS:
                    raise DatasetError(f"{archive}: more than {MAX_ARCHIVE_MEMBERS} members are too many galaxies")
                galaxy = class_of.pop(Path(member.name).stem, None)
                if galaxy is None or not member.isfile():
                    continue
                where = f"{archive}: {member.name}"
                if member.size > MAX_IMAGE_BYTES:
                    raise DatasetError(f"{where}: {member.size} bytes are too many for a cutout of a galaxy")
                file = tar.extractfile(member)
                assert file is not None  # it is a regular file
                images.append(_read_image(io.BytesIO(file.read()), where, size))
                classes.append(galaxy)
                advance(1)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DatasetError(f"{archive}: cannot be read as a tar archive: {error}") from error
    if not images:
        raise DatasetError(f"{archive}: contains none of the images that {table} lists")
    answers = np.eye(len(GALAXY_ZOO_1), dtype=np.float32)[classes]
    count = np.bincount(classes, minlength=len(GALAXY_ZOO_1))
    weight = len(classes) / ((count > 0).sum() * count[classes])
    source = f"{len(images)} real galaxies of Galaxy Zoo 1 ({table.name})"
    boxes = whole(len(images), size)
    return AnsweredImages(np.stack(images), boxes, answers, GALAXY_ZOO_1, source, weight.astype(np.float32))


def _read_classes(table: Path) -> dict[str, int]:
    """Return the index in GALAXY_ZOO_1 of each galaxy's class, by the galaxy's id, without those of error pages."""
    try:
        rows = dataset.dataset(table, format="csv").to_table(columns=[GALAXY, CLASS, ERROR_PAGE])
    except (pa.ArrowInvalid, pa.ArrowKeyError, ValueError, OSError) as error:
        raise DatasetError(
            f"{table}: cannot be read as .csv with the columns {GALAXY}, {CLASS} and {ERROR_PAGE}: {error}"
        ) from error
    names = [str(name) for name in rows[CLASS].to_pylist()]
    names = ["spiral" if name in SPIRALS else name for name in names]
    if unknown := set(names) - set(GALAXY_ZOO_1):
        known = ", ".join(sorted({*GALAXY_ZOO_1, *SPIRALS}))
        raise DatasetError(f"{table}: unknown class {sorted(unknown)[0]!r}; known classes: {known}")
    return {
        str(galaxy): GALAXY_ZOO_1.index(name)
        for galaxy, name, error_page in zip(rows[GALAXY].to_pylist(), names, rows[ERROR_PAGE].to_pylist(), strict=True)
        if not error_page
    }


def _read_image(file: Path | BinaryIO, where: str, size: int) -> NDArray[np.float32]:
    """Return an image float32[3, size, size] with the reddest band first."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DatasetError(f"{where}: {image.width} x {image.height} px is too large for a cutout of a galaxy")
            scaled = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise DatasetError(f"{where}: cannot be read as an image: {error}") from error
    return np.asarray(scaled, np.float32).transpose(2, 0, 1)


def simulate_galaxies(n: int, seed: int, size: int = 63) -> AnsweredImages:
    """Simulate `n` galaxies with bulge, disc, knots and companions, in three bands, with ZTF's pixel scale and seeing.

    The answers are the parameters of the simulation (see QUESTIONS); no person has classified these images.
    """
    images = np.empty((n, 3, size, size), np.float32)
    answers = np.empty((n, len(QUESTIONS)), np.float32)
    with progress("Simulating", n, "galaxies") as advance:
        for i in range(n):
            images[i], answers[i] = _simulate(np.random.default_rng([seed, i]), size)
            advance(1)
    source = f"{n} galaxies simulated with GalSim (bulge, disc, knots, companions)"
    return AnsweredImages(images, whole(n, size), answers, QUESTIONS, source, equal(n))


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
