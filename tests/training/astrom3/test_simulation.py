"""Simulated variable stars have the properties of their classes, and agree with real stars where these are
available."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from training.astrom3.model.lamost import read_spectrum
from training.astrom3.model.network import CLASSES
from training.astrom3.model.preprocess import METADATA_COLUMNS, WAVELENGTHS, prepare_spectrum
from training.astrom3.simulation import SimulatedStar, simulate_star
from training.astrom3.simulation.photometry import features
from training.astrom3.simulation.spectra import observe_spectrum
from training.astrom3.simulation.variables import KINDS, draw, main_sequence

EACH = 12
Sample = Mapping[str, Sequence[SimulatedStar]]


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Stars of each class."""
    return {
        kind: [simulate_star(kind, np.random.default_rng([3, number, i])) for i in range(EACH)]
        for number, kind in enumerate(KINDS)
    }


def median(sample: Sample, kind: str, name: str) -> float:
    return float(np.median([(star.metadata | star.features)[name] for star in sample[kind]]))


def phased(kind: str, seed: int) -> NDArray[np.float64]:
    """Return V magnitudes over one period, without noise."""
    star = draw(kind, np.random.default_rng(seed))
    return star.curve(np.linspace(0, star.period, 500, endpoint=False))


def test_all_ten_classes_are_simulated() -> None:
    assert sorted(KINDS) == sorted(CLASSES)


def test_a_star_is_reproducible(sample: Sample) -> None:
    again = simulate_star("EW", np.random.default_rng([3, 0, 5]))
    star = sample["EW"][5]
    np.testing.assert_array_equal(again.photometry, star.photometry)
    np.testing.assert_array_equal(again.spectrum, star.spectrum)
    assert again.metadata == star.metadata


@pytest.mark.parametrize("kind", KINDS)
def test_observations_are_complete_and_finite(sample: Sample, kind: str) -> None:
    for star in sample[kind]:
        assert star.metadata.keys() == set(METADATA_COLUMNS)
        assert np.isfinite([*star.metadata.values(), *star.features.values()]).all()
        assert np.isfinite(star.photometry).all()
        assert (np.diff(star.photometry[:, 0]) > 0).all()
        assert (star.photometry[:, 2] > 0).all()
        assert (star.spectrum[:, 0].min(), star.spectrum[:, 0].max()) < (WAVELENGTHS[0], 1e5)
        assert star.spectrum[-1, 0] > WAVELENGTHS[-1]


@pytest.mark.parametrize("kind", ["EW", "RRAB", "RRC", "HADS", "M"])
def test_a_light_curve_folds_with_its_period(sample: Sample, kind: str) -> None:
    right = [features(star.photometry, star.truth.period) for star in sample[kind]]
    wrong = [features(star.photometry, 1.37 * star.truth.period) for star in sample[kind]]
    right_string, wrong_string = (np.median([f["lksl_statistic"] for f in each]) for each in (right, wrong))
    assert right_string < 0.6 * wrong_string
    assert np.median([f["rfr_score"] for f in right]) > 0.5


def test_pulsating_stars_brighten_quickly_and_eclipses_are_short() -> None:
    for seed in range(5):
        rising = np.mean(np.diff(phased("RRAB", seed)) < 0)
        assert rising < 0.35
        eclipse = phased("EA", seed)
        assert np.mean(eclipse > eclipse.min() + 0.5 * np.ptp(eclipse)) < 0.25
        contact = phased("EW", seed)
        assert (
            np.sum((contact > np.roll(contact, 1)) & (contact >= np.roll(contact, -1))) == 2
        )  # two minima of brightness


def test_periods_and_amplitudes_are_typical_of_the_classes(sample: Sample) -> None:
    periods = [
        np.median([star.truth.period for star in sample[kind]]) for kind in ("DSCT", "RRC", "RRAB", "EA", "SR", "M")
    ]
    assert periods == sorted(periods)
    assert median(sample, "DSCT", "amplitude") < median(sample, "HADS", "amplitude") < median(sample, "M", "amplitude")
    assert median(sample, "ROT", "amplitude") < 0.4
    assert median(sample, "M", "amplitude") > 1.5


def test_cool_stars_are_red_and_giants_are_distant(sample: Sample) -> None:
    colours = [median(sample, kind, "bp_rp") for kind in ("RRAB", "EW", "ROT", "SR", "M")]
    assert colours == sorted(colours)
    assert median(sample, "M", "w1_w2") > median(sample, "EW", "w1_w2") + 0.1  # dust
    assert median(sample, "SR", "parallax") < median(sample, "ROT", "parallax")


def test_a_precise_parallax_gives_the_luminosity(sample: Sample) -> None:
    good = [
        star for kind in ("EW", "ROT", "DSCT") for star in sample[kind] if star.metadata["parallax_over_error"] > 20
    ]
    assert len(good) > 10
    absolute = [s.metadata["mean_vmag"] - 10 + 5 * np.log10(s.metadata["parallax"]) for s in good]
    extinction_and_error = np.array(absolute) - [s.truth.absolute_magnitude for s in good]
    assert (extinction_and_error > -0.3).all()
    assert np.median(extinction_and_error) < 0.8


def test_spectra_show_the_features_of_the_classes(sample: Sample) -> None:
    def dip(star: SimulatedStar, centre: float, half_width: float = 8.0) -> float:
        wavelength, flux, _ = star.spectrum.T
        line = np.abs(wavelength - centre) < half_width
        beside = (np.abs(wavelength - centre) < 6 * half_width) & ~line
        return float(1 - np.median(flux[line]) / np.median(flux[beside]))

    h_beta, titanium = 4862.7, 7080.0
    hot, cool = sample["DSCT"], sample["M"]
    assert np.median([dip(star, h_beta) for star in hot]) > 0.1
    assert (
        np.median([dip(star, titanium, 20) for star in cool])
        > 0.2
        > np.median([dip(star, titanium, 20) for star in hot])
    )


@pytest.mark.shared
def test_real_spectra_are_most_similar_to_simulated_ones_of_the_same_temperature(
    shared_data: Path, tmp_path: Path
) -> None:
    with (shared_data / "lamost" / "lamost_3165_colour_table.csv").open() as file:
        temperature = {row["filename"]: float(row["teff"]) for row in csv.DictReader(file) if row["teff"]}
    with tarfile.open(shared_data / "lamost" / "lamost_176_spectra_fits.tar.xz") as archive:
        members = [member for member in archive if Path(member.name).name in temperature]
        archive.extractall(tmp_path, members, filter="data")
    grid = np.geomspace(3600, 9500, 15)
    star = draw("ROT", np.random.default_rng(0))
    dwarfs = [replace(star, temperature=t, absolute_magnitude=main_sequence(t), activity=0.0) for t in grid]
    simulated = [_form(observe_spectrum(dwarf, 10.0, 0.1, 0.0, np.random.default_rng(1))) for dwarf in dwarfs]
    true, found = [], []
    for member in members[::2]:
        real = _form(read_spectrum(tmp_path / member.name))
        found.append(grid[np.argmax([np.corrcoef(real, form)[0, 1] for form in simulated])])
        true.append(temperature[Path(member.name).name])
    assert len(true) > 50
    assert np.corrcoef(np.log(true), np.log(found))[0, 1] > 0.6
    assert np.median(np.abs(np.log(np.array(found) / true))) < 0.15


def _form(spectrum: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return flux in bins of 20 angstrom, where the noise of real spectra is small."""
    return prepare_spectrum(spectrum)[0, :2570].reshape(-1, 10).mean(1)


@pytest.mark.shared
def test_real_and_simulated_rr_lyrae_have_similar_statistics(shared_data: Path, sample: Sample) -> None:
    measured = []
    with tarfile.open(shared_data / "lightcurves" / "ztf_bts_snIa_2289_sdss_rrlyr_483.tar.xz") as archive:
        periods = {row["Num"]: row for row in _table(archive, "RRLyrae/periods.csv")}
        names = [name for name in archive.getnames() if name.startswith("RRLyrae/light-curves/")]
        for name in names[1:60]:
            period = periods[Path(name).stem]
            if period["Type"] != "ab":
                continue
            rows = [row for row in _table(archive, name) if row["band"] == "g"]
            time, magnitude = (np.array([float(row[column]) for row in rows]) for column in ("time", "mag"))
            observations = np.stack([time, 10 ** (-0.4 * (magnitude - 15)), np.zeros(len(time))], axis=1)
            measured.append(features(observations, float(period["Per"])))
    ours = [features(star.photometry, star.truth.period) for star in sample["RRAB"]]
    for name, tolerance in (("period", 0.1), ("amplitude", 0.4), ("lksl_statistic", 0.15)):
        real, simulated = (np.median([f[name] for f in each]) for each in (measured, ours))
        assert real == pytest.approx(simulated, abs=tolerance), name


def _table(archive: tarfile.TarFile, name: str) -> list[dict[str, str]]:
    stream = archive.extractfile(name)
    assert stream is not None
    return list(csv.DictReader(io.TextIOWrapper(stream)))
