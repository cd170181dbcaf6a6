"""Sets of stars in the two published layouts, subsets capped by class, and refusal of other layouts."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from training.astrom3.model.lamost import read_spectrum
from training.astrom3.model.network import CLASSES
from training.astrom3.model.preprocess import (
    METADATA_COLUMNS,
    PHOTOMETRY_FEATURES,
    prepare_light_curve,
    prepare_spectrum,
)
from training.astrom3.simulate import SHARES, write_stars
from training.astrom3.stars import ShownStars, StarSet, class_cap, class_capped, read_stars
from training.errors import DatasetError

from .conftest import COUNTS, SEED

Rows = Mapping[str, list[Any]]
RAW: Rows = {
    "photometry": [[[1.0, 10.0, 0.1], [2.0, 12.0, 0.1], [4.0, 11.0, 0.2]]],
    "spectra": [[[3700.0, 1.0, 4.0], [6000.0, 2.0, 4.0], [9100.0, 3.0, 4.0]]],
    "metadata": [
        {
            "meta_cols": {name: 0.1 * i for i, name in enumerate(METADATA_COLUMNS)},
            "photo_cols": dict.fromkeys(PHOTOMETRY_FEATURES, 0.5),
        }
    ],
    "label": ["EW"],
}
PREPARED: Rows = {
    "photometry": [[[0.1] * 9] * 4],
    "spectra": [[[0.2] * 2575] * 3],
    "metadata": [[0.3] * 34],
    "label": [2],
}


def write(directory: Path, rows: Rows) -> Path:
    """Write the rows as the training split of `full_0`."""
    (directory / "full_0").mkdir(exist_ok=True)
    parquet.write_table(pa.table(dict(rows)), directory / "full_0" / "train-00000-of-00001.parquet")
    return directory


@pytest.fixture(scope="module")
def simulated(stars: Path) -> StarSet:
    return read_stars(stars, "full", SEED, "train")


def test_a_simulated_set_is_complete_and_standardised(stars: Path, simulated: StarSet) -> None:
    assert len(simulated) == COUNTS["train"]
    assert {light_curve.shape[1] for light_curve in simulated.light_curves} == {9}
    assert simulated.spectra.shape == (60, 3, 2575)
    assert simulated.metadata.shape == (60, 34)
    counted = dict(zip(CLASSES, np.bincount(simulated.label, minlength=10).tolist(), strict=True))
    assert counted == {kind: pytest.approx(60 * share, abs=1) for kind, share in SHARES.items()}
    features = np.array([light_curve[0, 3:7] for light_curve in simulated.light_curves])
    for values in (simulated.metadata, features):  # standardised
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-5)
    test = read_stars(stars, "full", SEED, "test")
    assert 0 < np.abs(test.metadata.mean(0)).max() < 2  # with the scales of the training stars


def test_a_simulated_set_is_reproducible(stars: Path, tmp_path: Path) -> None:
    write_stars(tmp_path, SEED, {"train": COUNTS["train"]})
    file = Path(f"full_{SEED}") / "train.parquet"
    assert (tmp_path / file).read_bytes() == (stars / file).read_bytes()


def test_a_raw_row_is_preprocessed(tmp_path: Path) -> None:
    stars = read_stars(write(tmp_path, RAW), "full", 0, "train")
    expected = prepare_light_curve(np.array(RAW["photometry"][0]), np.full(4, 0.5))
    np.testing.assert_array_equal(stars.light_curves[0], expected)
    np.testing.assert_array_equal(stars.spectra[0], prepare_spectrum(np.array(RAW["spectra"][0])))
    np.testing.assert_allclose(stars.metadata[0], 0.1 * np.arange(34), rtol=1e-6)
    assert CLASSES[stars.label[0]] == "EW"
    assert stars.padding == "repeated"


def test_metadata_may_be_in_one_group(tmp_path: Path) -> None:
    flat = {**RAW["metadata"][0]["photo_cols"], **RAW["metadata"][0]["meta_cols"]}
    one, other = write(tmp_path, RAW), tmp_path / "flat"
    other.mkdir()
    write(other, {**RAW, "metadata": [flat]})
    for stars in (read_stars(directory, "full", 0, "train") for directory in (one, other)):
        np.testing.assert_allclose(stars.metadata[0, :3], [0, 0.1, 0.2], rtol=1e-6)
        np.testing.assert_array_equal(stars.light_curves[0][0, 3:7], 0.5)


def test_a_preprocessed_set_is_read_unchanged(simulated: StarSet, tmp_path: Path) -> None:
    some = simulated[np.arange(8)]
    rows = {
        "photometry": [light_curve.tolist() for light_curve in some.light_curves],
        "spectra": some.spectra.tolist(),
        "metadata": some.metadata.tolist(),
        "label": some.label.tolist(),
    }
    read = read_stars(write(tmp_path, rows), "full", 0, "train")
    for ours, theirs in zip(some.light_curves, read.light_curves, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(some.spectra, read.spectra)
    np.testing.assert_array_equal(some.metadata, read.metadata)
    np.testing.assert_array_equal(some.label, read.label)
    assert read.padding == "zero"


@pytest.mark.shared
def test_real_stars_in_the_published_layout_are_read(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "lamost" / "lamost_176_spectra_fits.tar.xz") as archive:
        members = [member for member in archive if member.name.endswith(".fits")][:3]
        archive.extractall(tmp_path, members, filter="data")
    spectra = [read_spectrum(tmp_path / member.name) for member in members]
    light_curves = []
    with tarfile.open(shared_data / "lightcurves" / "ztf_bts_snIa_2289_sdss_rrlyr_483.tar.xz") as archive:
        for name in [name for name in archive.getnames() if name.startswith("RRLyrae/light-curves/")][1:4]:
            stream = archive.extractfile(name)
            assert stream is not None
            rows = [row for row in csv.DictReader(io.TextIOWrapper(stream)) if row["band"] == "g"]
            magnitude = np.array([float(row["mag"]) for row in rows])
            flux = 10 ** (-0.4 * (magnitude - 15))
            error = flux * np.array([float(row["magerr"]) for row in rows]) / 1.0857
            light_curves.append(np.stack([np.array([float(row["time"]) for row in rows]), flux, error], axis=1))
    rows_written = {
        "photometry": [light_curve.tolist() for light_curve in light_curves],
        "spectra": [spectrum.tolist() for spectrum in spectra],
        "metadata": 3 * RAW["metadata"],
        "label": 3 * ["RRAB"],
    }
    stars = read_stars(write(tmp_path, rows_written), "full", 0, "train")
    for read, light_curve in zip(stars.light_curves, light_curves, strict=True):
        np.testing.assert_array_equal(read, prepare_light_curve(light_curve, np.full(4, 0.5)))
    for prepared, spectrum in zip(stars.spectra, spectra, strict=True):
        np.testing.assert_array_equal(prepared, prepare_spectrum(spectrum))


def test_light_curves_are_cut_at_random_in_training_and_in_the_middle_otherwise(simulated: StarSet) -> None:
    rows = list(range(20))
    whole = ShownStars(simulated, 40)
    photometry, mask, spectra, metadata, label = whole.__getitems__(rows)
    assert (photometry.shape, mask.shape) == ((20, 40, 9), (20, 40))
    assert (spectra.shape, metadata.shape, label.shape) == ((20, 3, 2575), (20, 34), (20,))
    assert (whole.__getitems__(rows)[0] == photometry).all()
    cut = ShownStars(simulated, 40, seed=1)
    assert (cut.__getitems__(rows)[0] == cut.__getitems__(rows)[0]).all()
    assert (cut.__getitems__(rows)[0] != cut.__getitems__(rows[::-1])[0].flip(0)).any()  # a batch of another epoch


@pytest.mark.parametrize(
    ("counts", "goal", "cap"),
    [
        ([100, 3, 10], 50, 37),  # the rare classes complete, the rest from the most frequent one
        ([100, 3, 10], 20, 8),
        ([100, 3, 10, 0], 5, 1),
        ([5, 5], 100, 5),
    ],
)
def test_the_cap_keeps_rare_classes_complete(counts: list[int], goal: int, cap: int) -> None:
    assert class_cap(counts, goal) == cap


def test_a_subset_is_capped_by_class_and_reproducible() -> None:
    label = np.repeat(np.arange(4), (500, 300, 150, 50))
    chosen = class_capped(label, 4, seed=3)
    assert np.bincount(label[chosen]).tolist() == [66, 66, 66, 50]
    assert len(set(chosen.tolist())) == len(chosen)
    np.testing.assert_array_equal(chosen, class_capped(label, 4, seed=3))
    assert (chosen != class_capped(label, 4, seed=4)).any()


def test_a_subset_has_its_own_folder_or_is_drawn(stars: Path, simulated: StarSet, tmp_path: Path) -> None:
    drawn = read_stars(stars, "sub50", SEED, "train")
    assert np.bincount(drawn.label).max() < np.bincount(simulated.label).max()
    write_stars(tmp_path, SEED, {"train": COUNTS["train"]}, ["sub50"])
    written = read_stars(tmp_path, "sub50", SEED, "train")
    np.testing.assert_array_equal(drawn.metadata, written.metadata)
    np.testing.assert_array_equal(drawn.label, written.label)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({**RAW, "photometry": [[[1.0, 2.0]]]}, "photometry has rows of 2 values, not 3"),
        ({**RAW, "photometry": [[1.0, 2.0]]}, "photometry is double, not a list of numbers"),
        ({**RAW, "spectra": [[[1.0] * 4]]}, "spectra has rows of 4 values, not 3"),
        ({**RAW, "label": ["CEP"]}, "row 0: label 'CEP' is not one of DSCT, EA"),
        ({**RAW, "metadata": [{"l": 1.0}]}, "row 0: a light curve needs finite amplitude, period"),
        ({**RAW, "metadata": [{"photo_cols": RAW["metadata"][0]["photo_cols"]}]}, "row 0: metadata values mean_vmag"),
        ({**RAW, "label": [None]}, "label is missing"),
        ({**PREPARED, "photometry": [[[0.1] * 8]]}, "photometry has rows of 8 values, not 9"),
        ({**PREPARED, "spectra": [[[0.2] * 2574] * 3]}, "spectra has rows of 2574 values, not 2575"),
        ({**PREPARED, "spectra": [[[0.2] * 2575] * 2]}, "a spectrum has 2 channels, not 3"),
        ({**PREPARED, "metadata": [[0.3] * 38]}, "metadata has rows of 38 values, not 34"),
        ({**PREPARED, "label": [10]}, "a label is not between 0 and 9"),
        ({name: values for name, values in RAW.items() if name != "spectra"}, "no column spectra"),
    ],
)
def test_rows_of_another_layout_are_refused(tmp_path: Path, rows: Rows, complaint: str) -> None:
    with pytest.raises(DatasetError, match=rf"train-00000-of-00001.parquet: .*{complaint}"):
        read_stars(write(tmp_path, rows), "full", 0, "train")


def test_missing_folders_and_stars_are_refused(stars: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"full_8: there is no train\*.parquet"):
        read_stars(stars, "full", 8, "train")
    with pytest.raises(DatasetError, match=r"full_7: sub10 would contain none of the 20 stars of validation"):
        read_stars(stars, "sub10", SEED, "validation")
    (tmp_path / "full_0").mkdir()
    (tmp_path / "full_0" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"train.parquet: cannot be read as Parquet"):
        read_stars(tmp_path, "full", 0, "train")
