"""Pixels in units of their noise: alike for every survey, finite for any input, and the same compiled and in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.scoring.preprocess import normalise_snr, prepare_images
from broker_filter.scoring.snr import arcsinh, snr_numpy
from tests.scoring.test_preprocess import FLT_MAX, WHOLE, boxes, lsst_alerts, snr_spec


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize(("noise", "sky"), [(40, 0), (5, 100), (1e-3, 1), (1e6, -1e7)])
def test_snr_gives_noise_the_same_units_from_every_survey(planes: bool, noise: float, sky: float) -> None:
    cutouts, variance = lsst_alerts(20, noise=noise, sky=sky)
    cutouts[:, 2] -= np.float32(sky)  # the difference image has no sky
    cutouts[:, :, 14:17, 14:17] += np.float32(1000 * noise)
    variance = variance if planes else np.full_like(variance, np.nan)
    images = prepare_images(cutouts, boxes(20, (0, 0, 31, 31)), snr_spec(), variance)
    ratio = np.sinh(images.astype(np.float64))
    quiet = np.ones((31, 31), bool)
    quiet[14:17, 14:17] = False
    np.testing.assert_allclose(ratio[..., quiet].std(axis=2), 1, atol=0.15)
    np.testing.assert_allclose(ratio[..., quiet].mean(axis=2), 0, atol=0.2)
    np.testing.assert_allclose(ratio[:, :, 15, 15], 1000, rtol=0.15)


def test_arcsinh_agrees_with_numpy_and_is_odd() -> None:
    values = np.concatenate([[0], np.geomspace(1e-12, 1e9, 200_001)]).astype(np.float32)
    np.testing.assert_allclose(arcsinh(values), np.arcsinh(values.astype(np.float64)), rtol=2e-7, atol=2e-7)
    assert np.array_equal(arcsinh(-values), -arcsinh(values))
    assert (np.diff(arcsinh(values)) >= 0).all()


def test_snr_divides_by_the_variance_plane_where_it_is_good_and_by_the_robust_noise_elsewhere() -> None:
    cutouts, variance = lsst_alerts(1, noise=10)
    variance[:] = 400
    variance[0, 2, :4, 0] = 0, -1, np.inf, np.nan
    images = np.sinh(prepare_images(cutouts, boxes(1, (0, 0, 31, 31)), snr_spec(), variance)[0, 2].astype(np.float64))
    np.testing.assert_allclose(images[4:, 4:], cutouts[0, 2, 4:, 4:] / 20, rtol=1e-5, atol=1e-6)
    robust = cutouts[0, 2, :4, 0] / images[:4, 0]
    np.testing.assert_allclose(robust, 10, rtol=0.15)
    assert len(set(np.round(robust, 3))) == 1


def test_snr_leaves_the_zero_of_the_difference_image() -> None:
    cutouts = np.full((1, 3, 31, 31), 60, np.float32)
    images = prepare_images(cutouts, boxes(1, (0, 0, 31, 31)), snr_spec(), np.full_like(cutouts, 100))
    np.testing.assert_allclose(images[0, :, 15, 15], [0, 0, np.arcsinh(6)], rtol=1e-6)


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, FLT_MAX, -FLT_MAX, 1e30, 1e29, 1e-45, -1e-45, 0, -0.0, 3.0], ids=str
)
@pytest.mark.parametrize("known", [np.nan, np.inf, -np.inf, 0, -1, 1e-45, FLT_MAX, 4.0], ids=str)
@pytest.mark.parametrize("box", [(0, 0, 31, 31), (15, 15, 1, 1), (10, 3, 7, 25)], ids=str)
def test_snr_is_always_finite(value: float, known: float, box: tuple[int, int, int, int]) -> None:
    y, x, height, width = box
    cutouts = np.zeros((3, 3, 31, 31), np.float32)
    inside = cutouts[:, :, y : y + height, x : x + width]
    inside[0] = value
    inside[1] = np.random.default_rng(0).normal(size=inside[1].shape)
    inside[1, :, :1] = value
    inside[2] = np.random.default_rng(0).normal(size=inside[1].shape)
    inside[2, :, -1, -1] = value
    variance = np.full_like(cutouts, known)
    images = prepare_images(cutouts, boxes(3, box), snr_spec(padding=0.5), variance)
    assert np.isfinite(images).all()
    assert (np.abs(images) < 22).all()
    if not abs(value) < 1e30:
        assert (images[0, :, y : y + height, x : x + width] == 0).all()
    outside = np.ones((31, 31), bool)
    outside[y : y + height, x : x + width] = False
    assert (images[..., outside] == 0.5).all()


def test_snr_of_an_alert_does_not_depend_on_its_batch_or_slot() -> None:
    cutouts, variance = lsst_alerts(9, 63)
    variance[3] = np.nan
    cutouts[4, 1, 20:40, 30] = np.nan
    small = boxes(9, WHOLE)
    small[5:] = 10, 12, 40, 30
    together = prepare_images(cutouts, small, snr_spec(), variance)
    for i in range(9):
        alone = prepare_images(cutouts[i : i + 1], small[i : i + 1], snr_spec(), variance[i : i + 1])
        assert np.array_equal(alone[0], together[i])
    centre = slice(16, 47)
    cropped = prepare_images(
        cutouts[:5, :, centre, centre], boxes(5, (0, 0, 31, 31)), snr_spec(), variance[:5, :, centre, centre]
    )
    assert np.array_equal(cropped, together[:5])


def test_snr_takes_the_cutouts_in_the_networks_order() -> None:
    cutouts, variance = lsst_alerts(2, 63)
    whole = prepare_images(cutouts, boxes(2, WHOLE), snr_spec(), variance)
    chosen = prepare_images(cutouts, boxes(2, WHOLE), snr_spec(order=("difference", "science")), variance)
    assert np.array_equal(chosen, whole[:, [2, 0]])


def test_snr_does_not_modify_the_alerts() -> None:
    cutouts, variance = lsst_alerts(2)
    before = cutouts.copy(), variance.copy()
    prepare_images(cutouts, boxes(2, (0, 0, 31, 31)), snr_spec(), variance)
    assert np.array_equal(cutouts, before[0])
    assert np.array_equal(variance, before[1])


SPECIAL = np.array(
    [0, -0.0, np.nan, np.inf, -np.inf, FLT_MAX, -FLT_MAX, 1e30, 9.9e29, -9.9e29, 1e-45, -1e-45, 1e-38, 1, -1],
    np.float32,
)
compiled_only = pytest.mark.skipif(normalise_snr is snr_numpy, reason="the compiled normalisation is not built")


@compiled_only
@pytest.mark.parametrize("seed", range(300))
def test_compiled_snr_is_bit_identical_to_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, size = int(rng.integers(5)), int(rng.choice([1, 2, 3, 7, 16, 31, 40]))
    scale = 10.0 ** (rng.uniform(-40, 36) if seed % 3 == 0 else rng.uniform(-3, 5))
    shape = m, size, size
    with np.errstate(over="ignore", under="ignore"):
        pixels = (rng.normal(size=shape) * scale + rng.normal() * scale * rng.choice([0, 1, 100])).astype(np.float32)
        variance = (rng.uniform(0.1, 2, shape) * scale**2).astype(np.float32)
    for array in (pixels, variance):
        chosen = rng.random(shape) < rng.choice([0, 0.01, 0.5, 1])
        array[chosen] = rng.choice(SPECIAL, chosen.sum())
    if seed % 7 == 0:
        pixels = np.round(pixels)  # many equal pixels
    corner = rng.integers(size, size=(m, 2))
    extent = rng.integers(1, size + 1 - corner)
    box = np.concatenate([corner, extent], axis=1).astype(np.int16)
    subtracted = rng.random(m) < 0.5
    expected, found = np.full_like(pixels, 7), np.full_like(pixels, 7)
    snr_numpy(pixels, variance, box, subtracted, 0.25, expected)
    normalise_snr(pixels, variance, box, subtracted, 0.25, found)
    assert found.tobytes() == expected.tobytes()


@compiled_only
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        (0, np.zeros((2, 5, 4), np.float32)),
        (0, np.zeros((2, 5, 5), np.float64)),
        (1, np.zeros((2, 4, 4), np.float32)),
        (2, np.zeros((2, 3), np.int16)),
        (2, np.array([[0, 0, 5, 5], [0, 1, 5, 5]], np.int16)),
        (2, np.array([[0, 0, 5, 5], [-1, 0, 5, 5]], np.int16)),
        (3, np.zeros(3, np.bool_)),
        (5, np.zeros((3, 5, 5), np.float32)),
    ],
)
def test_compiled_snr_refuses_arrays_that_do_not_fit(argument: int, wrong: NDArray[np.generic]) -> None:
    pixels = np.ones((2, 5, 5), np.float32)
    box = np.tile(np.array([0, 0, 5, 5], np.int16), (2, 1))
    arguments = [pixels, pixels.copy(), box, np.zeros(2, np.bool_), 0.0, np.empty_like(pixels)]
    normalise_snr(*arguments)
    arguments[argument] = wrong
    with pytest.raises(ValueError, match=r"an array has a wrong shape or type|snr: "):
        normalise_snr(*arguments)
