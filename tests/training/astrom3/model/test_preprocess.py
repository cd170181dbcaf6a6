"""AstroM3's preprocessing of real LAMOST spectra and real light curves, and of observations that cannot be
normalised."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from training.astrom3.model.lamost import read_spectrum
from training.astrom3.model.preprocess import (
    METADATA_COLUMNS,
    WAVELENGTHS,
    ObservationsError,
    prepare_light_curve,
    prepare_metadata,
    prepare_spectrum,
    to_length,
)

FEATURES = np.zeros(4)


def light_curve(n: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.uniform(0, 1000, n)), rng.normal(10, 1, n), rng.uniform(0.1, 0.2, n)], axis=1)


@pytest.fixture(scope="module")
def lamost_files(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("lamost")
    with tarfile.open(shared_data / "lamost" / "lamost_176_spectra_fits.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return sorted(folder.rglob("*.fits"))


def test_every_real_spectrum_is_preprocessed(lamost_files: list[Path]) -> None:
    assert len(lamost_files) == 176
    for path in lamost_files:
        spectrum = read_spectrum(path)
        flux, weight, scale = prepare_spectrum(spectrum)
        assert flux.shape == WAVELENGTHS.shape == (2575,)
        assert abs(flux.mean()) < 1e-3
        if spectrum[:, 1].all():  # unobserved wavelengths do not count for the scale
            assert np.median(np.abs(flux - np.median(flux))) == pytest.approx(1, abs=1e-3)
        assert (weight >= 0).all()
        assert np.ptp(scale) == 0


def test_balmer_alpha_is_at_its_vacuum_wavelength(lamost_files: list[Path]) -> None:
    """Most of these stars are of types A, F and G, with absorption at Balmer alpha."""
    h_alpha, width = 6564.6, 10
    depths = []
    for path in lamost_files:
        flux = prepare_spectrum(read_spectrum(path))[0]
        line = np.abs(WAVELENGTHS - h_alpha) < width
        beside = (np.abs(WAVELENGTHS - h_alpha) < 8 * width) & ~line
        depths.append(np.median(flux[beside]) - flux[line].min())
    assert np.mean(np.array(depths) > 0) > 0.9


def test_real_rr_lyrae_light_curves_are_preprocessed(shared_data: Path) -> None:
    with tarfile.open(shared_data / "lightcurves" / "ztf_bts_snIa_2289_sdss_rrlyr_483.tar.xz") as archive:
        member = next(m for m in archive if m.name.startswith("RRLyrae/light-curves/") and m.name.endswith(".csv"))
        stream = archive.extractfile(member)
        assert stream is not None
        rows = list(csv.DictReader(io.TextIOWrapper(stream)))
    band = [row for row in rows if row["band"] == "r"]
    magnitude = np.array([float(row["mag"]) for row in band])
    error = np.array([float(row["magerr"]) for row in band])
    flux = 10 ** (-0.4 * (magnitude - 22.5))
    observations = np.stack([np.array([float(row["time"]) for row in band]), flux, flux * error / 1.0857], axis=1)
    photometry, mask = to_length(prepare_light_curve(observations, FEATURES), 200)
    observed = photometry[mask == 1]
    assert len(observed) == len(np.unique(observations, axis=0))
    assert (observed[0, 0], observed[-1, 0]) == (0, 1)
    assert np.median(np.abs(observed[:, 1] - np.median(observed[:, 1]))) == pytest.approx(1, abs=1e-3)
    assert photometry[0, 7] == pytest.approx(np.log10(np.median(np.abs(flux - np.median(flux)))), abs=1e-4)


def test_order_and_repetition_of_observations_have_no_influence() -> None:
    observations = light_curve(50)
    shuffled = np.random.default_rng(1).permutation(np.concatenate([observations, observations[:20]]))
    np.testing.assert_array_equal(prepare_light_curve(shuffled, FEATURES), prepare_light_curve(observations, FEATURES))


def test_the_flux_unit_changes_only_the_scale() -> None:
    observations = light_curve(50)
    brighter = observations * [1, 1000, 1000]
    one, other = prepare_light_curve(observations, FEATURES), prepare_light_curve(brighter, FEATURES)
    np.testing.assert_allclose(one[:, [0, 1, 2, 8]], other[:, [0, 1, 2, 8]], atol=1e-5)
    np.testing.assert_allclose(other[:, 7] - one[:, 7], 3, atol=1e-5)


def test_a_long_light_curve_is_cut_at_the_middle_or_at_random() -> None:
    whole = prepare_light_curve(light_curve(301), FEATURES)
    middle, mask = to_length(whole, 200)
    np.testing.assert_array_equal(middle, whole[50:250])
    assert mask.all()
    rng = np.random.default_rng(2)
    starts = {float(to_length(whole, 200, rng)[0][0, 0]) for _ in range(2000)}
    assert starts == set(whole[:102, 0].tolist())


def test_padding_repeats_the_constant_channels_or_is_zero() -> None:
    short = prepare_light_curve(light_curve(20), np.array([1.0, 2.0, 3.0, 4.0]))
    repeated, mask = to_length(short, 200)
    np.testing.assert_array_equal(repeated[20:, 3:], np.tile(short[0, 3:], (180, 1)))
    assert not repeated[20:, :3].any()
    assert mask.sum() == 20
    zero, _ = to_length(short, 200, padding="zero")
    assert not zero[20:].any()


@pytest.mark.parametrize(
    ("observations", "complaint"),
    [
        (np.zeros((0, 3)), "two or more times"),
        (light_curve(1), "two or more times"),
        (light_curve(30) * [0, 1, 1], "two or more times"),
        (light_curve(30) * [1, 0, 1], "flux has a median absolute deviation of 0"),
        (light_curve(30) * [1, np.nan, 1], "not finite"),
        (light_curve(30)[:, :2], r"shape \[n, 3\], not \[30, 2\]"),
    ],
)
def test_a_light_curve_without_span_or_spread_is_refused(observations: NDArray[np.float64], complaint: str) -> None:
    with pytest.raises(ObservationsError, match=complaint):
        prepare_light_curve(observations, FEATURES)


def test_a_light_curve_without_its_features_is_refused() -> None:
    with pytest.raises(ObservationsError, match="finite amplitude, period"):
        prepare_light_curve(light_curve(30), np.array([1, np.nan, 0, 0]))


@pytest.mark.parametrize(
    ("spectrum", "complaint"),
    [
        (np.stack([WAVELENGTHS[::-1], WAVELENGTHS, WAVELENGTHS], 1), "increasing"),
        (np.stack([WAVELENGTHS, np.ones(2575), WAVELENGTHS], 1), "flux has a median absolute deviation of 0"),
        (np.stack([WAVELENGTHS, np.zeros(2575), WAVELENGTHS], 1), "flux has a median absolute deviation of 0"),
        (np.stack([WAVELENGTHS, np.full(2575, np.inf), WAVELENGTHS], 1), "not finite"),
    ],
)
def test_a_spectrum_that_cannot_be_normalised_is_refused(spectrum: NDArray[np.float64], complaint: str) -> None:
    with pytest.raises(ObservationsError, match=complaint):
        prepare_spectrum(spectrum)


def test_metadata_are_ordered_by_name() -> None:
    values = {name: float(i) for i, name in enumerate(METADATA_COLUMNS)}
    backwards = dict(reversed(values.items())) | {"unknown": 1.0}
    np.testing.assert_array_equal(prepare_metadata(backwards), np.arange(34, dtype=np.float32))
    with pytest.raises(ObservationsError, match="metadata values parallax are missing"):
        prepare_metadata(values | {"parallax": np.nan})


def test_a_file_that_is_not_a_spectrum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.fits").write_bytes(b"SIMPLE")
    with pytest.raises(ObservationsError, match=r"x.fits: not a LAMOST spectrum"):
        read_spectrum(tmp_path / "x.fits")
