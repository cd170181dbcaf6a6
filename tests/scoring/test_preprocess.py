"""Preprocessing: the same as for ZTF's network, for each alert independently of its slot and batch."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, CUTOUTS, PSF_SIZE, UNKNOWN_BAND, LightCurves, Measurement, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    LIGHT_CURVE_FEATURES,
    ImageInput,
    Inputs,
    LightCurveInput,
    MetadataColumn,
    PsfInput,
)
from broker_filter.scoring.preprocess import (
    normalise,
    normalise_numpy,
    prepare,
    prepare_images,
    prepare_light_curves,
    prepare_metadata,
    prepare_psf,
)

FLT_MAX = np.finfo(np.float32).max
PADDING = 1e-9


def spec(size: int = 63, normalisation: str = "l2_row", order: tuple[str, ...] = CUTOUTS) -> ImageInput:
    return ImageInput.model_validate({"size": size, "order": order, "normalisation": normalisation, "padding": PADDING})


def random_cutouts(n: int, size: int = 63) -> NDArray[np.float32]:
    return np.random.default_rng(size).normal(100, 30, (n, 3, size, size)).astype(np.float32)


def boxes(n: int, box: tuple[int, int, int, int]) -> NDArray[np.int16]:
    return np.tile(np.array(box, np.int16), (n, 3, 1))


WHOLE = (0, 0, 63, 63)


def test_l2_row_gives_every_row_unit_norm() -> None:
    images = prepare_images(random_cutouts(5), boxes(5, WHOLE), spec())
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 1, rtol=1e-6)


def test_l2_image_gives_every_image_unit_norm() -> None:
    images = prepare_images(random_cutouts(5), boxes(5, WHOLE), spec(normalisation="l2_image"))
    np.testing.assert_allclose(np.linalg.norm(images, axis=(-2, -1)), 1, rtol=1e-6)


def test_preprocessing_agrees_with_plain_arithmetic_bit_for_bit() -> None:
    cutouts = random_cutouts(3)
    expected = cutouts / np.sqrt((cutouts**2).sum(axis=-1, keepdims=True))
    assert np.array_equal(prepare_images(cutouts, boxes(3, WHOLE), spec()), expected)


@pytest.mark.skipif(normalise is normalise_numpy, reason="the compiled normalisation is not built")
@pytest.mark.parametrize("length", [1, 7, 8, 15, 16, 63, 128, 129, 255, 63 * 63])
def test_compiled_normalisation_is_bit_identical_to_numpy(length: int) -> None:
    rows = np.random.default_rng(length).normal(100, 1000, (16, length)).astype(np.float32)
    rows[:8, length // 2] = [0, np.nan, np.inf, -np.inf, FLT_MAX, -FLT_MAX, 1e-40, 1e25]
    rows[8], rows[9], rows[10] = 0, np.nan, 1e-30
    expected, found = np.empty_like(rows), np.empty_like(rows)
    normalise_numpy(rows, expected, length)
    normalise(rows, found, length)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.skipif(normalise is normalise_numpy, reason="the compiled normalisation is not built")
def test_compiled_normalisation_refuses_wrong_arrays() -> None:
    rows = np.ones((4, 6), np.float32)
    for images, normalised, length in [
        (rows, rows[:2].copy(), 6),
        (rows.astype(np.float64), rows.astype(np.float64), 6),
        (rows, np.empty_like(rows), 0),
        (rows, np.empty_like(rows), 7),
    ]:
        with pytest.raises(ValueError, match="must be float32, of one size"):
            normalise(images, normalised, length)


def test_nan_pixels_count_as_zero_and_do_not_spread() -> None:
    cutouts = random_cutouts(2)
    clean = cutouts.copy()
    cutouts[1, 2, 5, 7] = np.nan
    clean[1, 2, 5, 7] = 0
    expected = prepare_images(clean, boxes(2, WHOLE), spec())
    assert np.array_equal(prepare_images(cutouts, boxes(2, WHOLE), spec()), expected)


@pytest.mark.parametrize("pixel", [FLT_MAX, -FLT_MAX, np.inf, -np.inf])
def test_a_row_with_a_huge_pixel_becomes_zero(pixel: float) -> None:
    cutouts = random_cutouts(1)
    cutouts[0, 0, 10, 20] = pixel
    images = prepare_images(cutouts, boxes(1, WHOLE), spec())
    assert not images[0, 0, 10].any()
    assert images[0, 0, 9].all()
    assert np.isfinite(images).all()


def test_blank_rows_stay_zero() -> None:
    cutouts = random_cutouts(1)
    cutouts[0, 1, 3] = 0
    images = prepare_images(cutouts, boxes(1, WHOLE), spec())
    assert not images[0, 1, 3].any()
    assert np.isfinite(images).all()


def test_short_stamps_are_normalised_and_then_padded_below_and_to_the_right() -> None:
    cutouts = random_cutouts(2)
    cutouts[1, :, 48:] = 0
    cutouts[1, :, :, 55:] = 0
    box = boxes(2, WHOLE)
    box[1] = (0, 0, 48, 55)
    images = prepare_images(cutouts, box, spec())
    np.testing.assert_allclose(np.linalg.norm(images[1, :, :48, :55], axis=-1), 1, rtol=1e-6)
    assert (images[1, :, 48:] == np.float32(PADDING)).all()
    assert (images[1, :, :, 55:] == np.float32(PADDING)).all()
    assert (images[0] != np.float32(PADDING)).all()


def test_preprocessing_does_not_modify_the_alerts() -> None:
    cutouts = random_cutouts(2)
    cutouts[0, 0, 0, 0] = np.nan
    before = cutouts.copy()
    prepare_images(cutouts, boxes(2, WHOLE), spec())
    assert np.array_equal(cutouts, before, equal_nan=True)


@pytest.mark.parametrize("normalisation", ["l2_row", "l2_image"])
def test_an_alert_gives_the_same_input_in_any_batch(normalisation: str) -> None:
    cutouts = random_cutouts(17)
    cutouts[3, 1, 30, 30] = FLT_MAX
    cutouts[5, 2, :, :9] = np.nan
    together = prepare_images(cutouts, boxes(17, WHOLE), spec(normalisation=normalisation))
    alone = [prepare_images(cutouts[i : i + 1], boxes(1, WHOLE), spec(normalisation=normalisation)) for i in range(17)]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("slot", [63, 64, 72, 101])
@pytest.mark.parametrize("size", [32, 51, 63])
@pytest.mark.parametrize("stamp", [30, 31, 51, 62, 63])
@pytest.mark.parametrize("centred", [True, False])
def test_the_size_of_the_slot_has_no_influence(slot: int, size: int, stamp: int, centred: bool) -> None:
    """A model gets the images that the decoder would make for it alone."""

    def decoded(width: int) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        # The decoder puts pixel n // 2 on pixel S // 2 if centred or too large, else the stamp at the top left.
        pixels = random_cutouts(1, stamp)
        if stamp > width:
            first = stamp // 2 - width // 2
            return pixels[..., first : first + width, first : first + width], boxes(1, (0, 0, width, width))
        first = width // 2 - stamp // 2 if centred else 0
        slots = np.zeros((1, 3, width, width), np.float32)
        slots[..., first : first + stamp, first : first + stamp] = pixels
        return slots, boxes(1, (first, first, stamp, stamp))

    assert np.array_equal(prepare_images(*decoded(slot), spec(size)), prepare_images(*decoded(size), spec(size)))


def test_images_have_the_order_of_the_network() -> None:
    cutouts = random_cutouts(2)
    images = prepare_images(cutouts, boxes(2, WHOLE), spec(order=("difference", "science")))
    assert np.array_equal(images, prepare_images(cutouts, boxes(2, WHOLE), spec())[:, [2, 0]])


def test_slots_smaller_than_the_network_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="cutouts of 51 px are too small for a network that takes 63 px"):
        prepare_images(random_cutouts(1, 51), boxes(1, (0, 0, 51, 51)), spec())


def test_no_alerts_give_no_images() -> None:
    assert prepare_images(random_cutouts(0), boxes(0, WHOLE), spec()).shape == (0, 3, 63, 63)


def test_a_flag_says_which_values_are_missing() -> None:
    metadata = np.array([[0.69, 0.0], [np.nan, 3.0], [np.nan, np.nan]])
    wanted = [
        MetadataColumn(name="nmtchps", fill=8, flag=True),
        MetadataColumn(name="magpsf", fill=-999),
        MetadataColumn(name="distpsnr1", fill=0.5, flag=True),
    ]
    columns = ("distpsnr1", "nmtchps", "magpsf")
    prepared = prepare_metadata(np.concatenate([metadata, np.full((3, 1), 18)], axis=1), columns, wanted)
    assert prepared.dtype == np.float32
    expected = [[0, 18, 0.69, 0, 0], [3, 18, 0.5, 0, 1], [8, 18, 0.5, 1, 1]]
    np.testing.assert_allclose(prepared, expected, rtol=1e-6)
    inputs = Inputs(images=spec(), metadata=tuple(wanted))
    assert inputs.shapes()["metadata"] == prepared.shape[1:]


def test_metadata_has_the_order_and_fill_values_of_the_network() -> None:
    metadata = np.array([[1.0, 2.0, 3.0], [4.0, np.nan, np.nan]])
    wanted = [MetadataColumn(name="c", fill=-1), MetadataColumn(name="a", fill=0)]
    prepared = prepare_metadata(metadata, ("a", "b", "c"), wanted)
    assert prepared.dtype == np.float32
    assert np.array_equal(prepared, np.array([[3, 1], [-1, 4]], np.float32))


def test_a_value_of_a_survey_that_the_network_was_not_trained_with_counts_as_missing() -> None:
    metadata = np.array([[1.0, 2.0], [3.0, 4.0]])
    wanted = [MetadataColumn(name="a", fill=-1, flag=True, surveys=("ztf",)), MetadataColumn(name="b", fill=-2)]
    survey = np.array([Survey.ZTF, Survey.LSST], np.uint8)
    prepared = prepare_metadata(metadata, ("a", "b"), wanted, survey)
    assert np.array_equal(prepared, np.array([[1, 2, 0], [-1, 4, 1]], np.float32))
    assert np.array_equal(prepare_metadata(metadata, ("a", "b"), wanted)[:, 0], [1, 3])
    assert metadata[1, 0] == 3


def test_missing_metadata_columns_are_named() -> None:
    with pytest.raises(KeyError, match="sgscore1"):
        prepare_metadata(np.zeros((1, 1)), ("a",), [MetadataColumn(name="sgscore1", fill=0)])


LIGHT_CURVE = LightCurveInput(points=4, flux_scale=100, time_scale=2)
NOW = 61000.0


def history(*counts: int) -> LightCurves:
    """Return light curves of random points, one per day, up to NOW."""
    rng, m = np.random.default_rng(sum(counts)), sum(counts)
    return LightCurves(
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        mjd=np.concatenate([NOW - np.arange(count)[::-1] for count in counts]),
        band=rng.integers(len(BANDS), size=m, dtype=np.uint8),
        flux=rng.normal(0, 1e4, m).astype(np.float32),
        flux_err=rng.uniform(1, 1e3, m).astype(np.float32),
        kind=rng.integers(len(Measurement), size=m, dtype=np.uint8),
    )


def test_the_latest_points_are_kept_in_order_of_time() -> None:
    light_curves = history(6, 2)
    features, mask = prepare_light_curves(light_curves, np.full(2, NOW), LIGHT_CURVE)
    assert features.shape == (2, 4, LIGHT_CURVE_FEATURES)
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    np.testing.assert_allclose(features[0, :, 0], np.log1p(np.array([3, 2, 1, 0]) / 2), rtol=1e-6)
    np.testing.assert_allclose(features[0, :, 1], np.arcsinh(light_curves.flux[2:6] / 100), rtol=1e-6)
    np.testing.assert_allclose(features[0, :, 2], np.arcsinh(light_curves.flux_err[2:6] / 100), rtol=1e-6)
    assert (features[1, 2:] == 0).all()


def test_band_and_kind_of_a_point_are_one_hot() -> None:
    light_curves = history(3)
    light_curves.band[:] = [1, UNKNOWN_BAND, 5]
    light_curves.kind[:] = [Measurement.DETECTION, Measurement.UPPER_LIMIT, Measurement.FORCED]
    features, _ = prepare_light_curves(light_curves, np.array([NOW]), LIGHT_CURVE)
    assert features[0, :3, 3:].argmax(axis=1).tolist() == [1, 7, 5]
    assert features[0, :3, 3:9].sum(axis=1).tolist() == [1, 0, 1]
    assert features[0, :3, 9:].argmax(axis=1).tolist() == [0, 1, 2]


def test_points_after_the_alert_are_dropped() -> None:
    light_curves = history(6)
    features, mask = prepare_light_curves(light_curves, np.array([NOW - 3]), LIGHT_CURVE)
    assert mask.sum() == 3
    np.testing.assert_allclose(features[0, :3, 1], np.arcsinh(light_curves.flux[:3] / 100), rtol=1e-6)


def test_an_unknown_flux_error_is_zero() -> None:
    light_curves = history(2)
    light_curves.flux_err[:] = [np.nan, np.inf]
    features, _ = prepare_light_curves(light_curves, np.array([NOW]), LIGHT_CURVE)
    assert (features[0, :, 2] == 0).all()


def test_a_light_curve_does_not_depend_on_the_rest_of_the_batch() -> None:
    light_curves = history(6, 0, 2, 9)
    together, mask = prepare_light_curves(light_curves, np.full(4, NOW), LIGHT_CURVE)
    for i in range(4):
        alone, its_mask = prepare_light_curves(light_curves[i : i + 1], np.array([NOW]), LIGHT_CURVE)
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_array_equal(its_mask[0], mask[i])
    some = np.array([3, 0])
    np.testing.assert_array_equal(
        prepare_light_curves(light_curves[some], np.full(2, NOW), LIGHT_CURVE)[0], together[some]
    )


def test_light_curves_that_were_not_decoded_are_an_error() -> None:
    inputs = Inputs(images=spec(), light_curve=LIGHT_CURVE)
    with pytest.raises(KeyError, match="the model needs light curves"):
        prepare(RawAlerts(random_cutouts(2), boxes(2, WHOLE), np.empty((2, 0)), ()), inputs)


def test_inputs_have_the_names_order_and_shapes_of_the_card() -> None:
    columns = (MetadataColumn(name="magpsf", fill=0),)
    inputs = Inputs(images=spec(size=51), metadata=columns, light_curve=LIGHT_CURVE)
    alerts = RawAlerts(
        random_cutouts(3), boxes(3, WHOLE), np.ones((3, 1)), ("magpsf",), np.full(3, NOW), history(1, 5, 0)
    )
    prepared = prepare(alerts, inputs)
    assert [(name, array.shape[1:]) for name, array in prepared.items()] == list(inputs.shapes().items())
    for name, array in prepare(alerts[np.array([False, True, False])], inputs).items():
        np.testing.assert_array_equal(array, prepared[name][1:2])


def snr_spec(size: int = 31, order: tuple[str, ...] = CUTOUTS, padding: float = 0) -> ImageInput:
    return ImageInput.model_validate({"size": size, "order": order, "normalisation": "snr", "padding": padding})


def lsst_alerts(
    n: int, size: int = 31, noise: float = 40, sky: float = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cutouts of noise over a sky, and their variance planes, both float32[n, 3, size, size]."""
    rng = np.random.default_rng(n + size)
    variance = noise**2 * rng.uniform(0.8, 1.2, (n, 3, size, size))
    return (sky + np.sqrt(variance) * rng.normal(size=variance.shape)).astype(np.float32), variance.astype(np.float32)


def test_planes_that_were_not_decoded_are_an_error() -> None:
    cutouts, variance = lsst_alerts(2)
    alerts = RawAlerts(cutouts, boxes(2, (0, 0, 31, 31)), np.empty((2, 0)), ())
    with pytest.raises(KeyError, match="the model needs the variance planes"):
        prepare(alerts, Inputs(images=snr_spec()))
    with pytest.raises(KeyError, match="the model needs PSF images"):
        prepare(replace(alerts, variance=variance), Inputs(images=snr_spec(), psf=PSF))


PSF = PsfInput(size=15, order=("science", "difference"), normalisation="sum", fallback_fwhm={"lsst": 5, "ztf": 2})


@pytest.mark.parametrize(("normalisation", "norm"), [("sum", np.sum), ("peak", np.max)])
def test_psf_images_are_cropped_to_their_centre_and_normalised(normalisation: str, norm: Any) -> None:
    psf = np.random.default_rng(0).uniform(size=(2, 3, PSF_SIZE, PSF_SIZE)).astype(np.float32)
    wanted = PSF.model_copy(update={"normalisation": normalisation})
    images = prepare_psf(psf, np.full(2, Survey.LSST, np.uint8), wanted)
    centre = psf[:, [0, 2], 8:23, 8:23].astype(np.float64)
    np.testing.assert_allclose(images, centre / norm(centre, axis=(2, 3), keepdims=True), rtol=1e-6)
    assert Inputs(images=spec(), psf=wanted).shapes()["psf"] == images.shape[1:]


def test_a_gaussian_of_the_survey_stands_for_an_unusable_psf_image() -> None:
    psf = np.full((4, 3, PSF_SIZE, PSF_SIZE), np.nan, np.float32)
    psf[2] = 0
    psf[3] = FLT_MAX
    psf[3, :, ::2] = -FLT_MAX
    survey = np.array([Survey.ZTF, Survey.LSST, Survey.LSST, Survey.LSST], np.uint8)
    images = prepare_psf(psf, survey, PSF.model_copy(update={"normalisation": "peak"}))
    assert (images[:, :, 7, 7] == 1).all()
    np.testing.assert_allclose(images[0, :, 7, 8], 0.5, rtol=1e-6)  # half the width of ZTF's: 1 px
    assert (images[1, :, 7, 9] > 0.5).all()
    assert (images[1, :, 7, 10] < 0.5).all()
    assert np.array_equal(images[1], images[2])
    assert np.array_equal(images[1], images[3])
    only_lsst = PSF.model_copy(update={"fallback_fwhm": {"lsst": 5}, "normalisation": "peak"})
    assert np.array_equal(prepare_psf(psf, survey, only_lsst)[0], images[1])


@pytest.mark.shared
@pytest.mark.parametrize("points", [64, 1024])
def test_of_real_histories_of_a_thousand_points_the_latest_are_kept(
    shared_data: Path, lsst_schemas: Path, points: int
) -> None:
    packets = [Packet(path.read_bytes()) for path in sorted((shared_data / "lsst" / "more" / "wire").iterdir())]
    alerts, rejects = Decoder(lsst_schemas, columns=()).decode(packets)
    assert not rejects
    assert np.diff(alerts.light_curves.offsets).max() > 1024
    wanted = LightCurveInput(points=points, flux_scale=100, time_scale=2)
    features, mask = prepare_light_curves(alerts.light_curves, alerts.mjd, wanted)
    assert features.shape == (len(alerts), points, LIGHT_CURVE_FEATURES)
    for i in range(len(alerts)):
        held = alerts.records[i]
        schema = fastavro.parse_schema(held.schema.definition)
        record = fastavro.schemaless_reader(io.BytesIO(held.body), schema, None)
        assert isinstance(record, dict)
        own = record["diaSource"]
        rows = [own, *(record["prvDiaSources"] or []), *(record["prvDiaForcedSources"] or [])]
        times = sorted(row["midpointMjdTai"] for row in rows if row["midpointMjdTai"] <= own["midpointMjdTai"])
        latest = np.array(times[-points:])
        assert mask[i].tolist() == [1] * len(latest) + [0] * (points - len(latest))
        expected = np.log1p((own["midpointMjdTai"] - latest) / 2)
        np.testing.assert_allclose(features[i, : len(latest), 0], expected, rtol=1e-6)
        assert not features[i, len(latest) :].any()
        last = len(latest) - 1
        same_time = {row["psfFlux"] for row in rows if row["midpointMjdTai"] == times[-1]}
        assert np.isclose(np.sinh(features[i, last, 1]) * 100, list(same_time), rtol=1e-3).any()
