"""Preprocessing: from alerts to network inputs. Serving and training both use this module.

It never modifies its arguments, and processes every alert independently of the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, CUTOUTS, LightCurves, Measurement, Survey
from broker_filter.packets.compiled import IMPLEMENTATION
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import (
    LIGHT_CURVE_FEATURES,
    ImageInput,
    Inputs,
    LightCurveInput,
    MetadataColumn,
    PsfInput,
)
from broker_filter.scoring.snr import SUBTRACTED, snr_numpy

SIGMAS_PER_FWHM = 2 * np.sqrt(2 * np.log(2))
"""The full width at half maximum of a Gaussian in units of its standard deviation."""


def prepare(alerts: RawAlerts, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
    """Return the network's inputs: float32 arrays [N, ...] by the names, and in the order, of `inputs.shapes()`.

    Raises ValueError if the cutouts are too small, and KeyError if metadata, light curves or planes are needed but
    absent.
    """
    prepared = {"images": prepare_images(alerts.cutouts, alerts.cutout_box, inputs.images, alerts.variance)}
    if inputs.metadata:
        prepared["metadata"] = prepare_metadata(alerts.metadata, alerts.columns, inputs.metadata, alerts.survey)
    if inputs.light_curve is not None:
        if alerts.mjd is None or alerts.light_curves is None:
            raise KeyError("the model needs light curves, but they were not decoded")
        prepared["light_curve"], prepared["light_curve_mask"] = prepare_light_curves(
            alerts.light_curves, alerts.mjd, inputs.light_curve
        )
    if inputs.psf is not None:
        if alerts.psf is None or alerts.survey is None:
            raise KeyError("the model needs PSF images, but they were not decoded")
        prepared["psf"] = prepare_psf(alerts.psf, alerts.survey, inputs.psf)
    return prepared


def prepare_images(
    cutouts: NDArray[np.float32],
    cutout_box: NDArray[np.int16],
    images: ImageInput,
    variance: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return the image input of a network, float32[N, C, size, size].

    `cutouts`: raw, [N, 3, S, S]. `cutout_box`: [N, 3, 4], see `AlertBatch`. The images are cropped to `size`; each row
    or image is divided by its L2 norm; pixels outside the stamp are set to `padding`. If the norm is not finite, NaN is
    first replaced by 0 and infinities by the largest float32. All arithmetic is in float32, as in the code that
    computed ZTF's published `drb` (`make_triplet` in https://github.com/dmitryduev/braai): there, too, a row with a
    pixel of 3.4e38 has an infinite norm and becomes 0. The normalisation `snr` needs `variance` [N, 3, S, S] (NaN where
    it is unknown); see the module `snr`.

    Raises ValueError if S < size, and KeyError if the normalisation is `snr` and `variance` is None.
    """
    if images.normalisation != "snr":
        variance = None
    elif variance is None:
        raise KeyError("the model needs the variance planes, but they were not decoded")
    if images.order != CUTOUTS:
        chosen = [CUTOUTS.index(name) for name in images.order]
        cutouts = cutouts[:, chosen]
        variance = None if variance is None else variance[:, chosen]
        cutout_box = cutout_box[:, chosen]
    if cutouts.shape[-1] != images.size:
        start, box = _crop_box(cutouts.shape[-1], cutout_box, images.size)
        variance = None if variance is None else _crop(variance, start, images.size)
        cutouts, cutout_box = _crop(cutouts, start, images.size), box
    prepared = np.empty(cutouts.shape, np.float32)
    if variance is not None:
        normalise_snr(
            np.ascontiguousarray(cutouts).reshape(-1, images.size, images.size),
            np.ascontiguousarray(variance).reshape(-1, images.size, images.size),
            np.ascontiguousarray(cutout_box).reshape(-1, 4),
            np.tile(np.isin(images.order, SUBTRACTED), len(cutouts)),
            images.padding,
            prepared.reshape(-1, images.size, images.size),
        )
        return prepared
    length = images.size if images.normalisation == "l2_row" else images.size**2
    normalise(np.ascontiguousarray(cutouts), prepared, length)
    _pad(prepared, cutout_box, images.padding)
    return prepared


def prepare_psf(psf: NDArray[np.float32], survey: NDArray[np.uint8], wanted: PsfInput) -> NDArray[np.float32]:
    """Return the PSF input float32[N, len(order), size, size].

    `psf` float32[N, 3, P, P] is cropped to its centre and divided by its sum or maximum. A Gaussian of the width that
    the card gives for the alert's `survey` uint8[N] stands for an image that is NaN, or whose positive pixels do not
    outweigh the negative ones three times.
    """
    start = psf.shape[-1] // 2 - wanted.size // 2
    inner = slice(start, start + wanted.size)
    images = psf[:, [CUTOUTS.index(name) for name in wanted.order], inner, inner].astype(np.float64)
    usable = images.sum(axis=(2, 3)) > np.abs(images).sum(axis=(2, 3)) / 2  # false for NaN
    offset = np.arange(wanted.size) - wanted.size // 2
    widths = {str(name): fwhm for name, fwhm in wanted.fallback_fwhm.items()}
    for known in Survey:
        sigma = widths.get(str(known), next(iter(widths.values()))) / SIGMAS_PER_FWHM
        profile = np.exp(-(offset**2) / (2 * sigma**2))
        images[(survey == known)[:, None] & ~usable] = np.outer(profile, profile)
    scale = images.sum(axis=(2, 3)) if wanted.normalisation == "sum" else images.max(axis=(2, 3))
    prepared: NDArray[np.float32] = (images / scale[:, :, None, None]).astype(np.float32)
    return prepared


def prepare_metadata(
    metadata: NDArray[np.float64],
    columns: Sequence[str],
    wanted: Sequence[MetadataColumn],
    survey: NDArray[np.uint8] | None = None,
) -> NDArray[np.float32]:
    """Return the metadata input float32[N, F]: the values of the `wanted` columns in order, then the flags.

    Missing values are filled. A flag is 1 where the value is missing, else 0; only columns with `flag` have one.
    `metadata`: float64[N, len(columns)], NaN where missing. `survey` uint8[N]: values of a column that names other
    `surveys` count as missing; without it, no value does.

    Raises KeyError, with the names, if `columns` lacks a wanted column.
    """
    if missing := {column.name for column in wanted} - set(columns):
        raise KeyError(f"metadata columns {', '.join(sorted(missing))} are needed, but were not decoded")
    chosen = metadata[:, [columns.index(column.name) for column in wanted]]
    for place, column in enumerate(wanted):  # `chosen` is a copy
        if survey is not None and column.surveys is not None:
            known = [Survey[name.upper()] for name in column.surveys]
            chosen[~np.isin(survey, known), place] = np.nan
    absent = np.isnan(chosen)
    filled = np.where(absent, np.array([column.fill for column in wanted]), chosen)
    flagged = [i for i, column in enumerate(wanted) if column.flag]
    return np.concatenate([filled, absent[:, flagged]], axis=1, dtype=np.float32)


def prepare_light_curves(
    light_curves: LightCurves, mjd: NDArray[np.float64], wanted: LightCurveInput
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return features float32[N, points, LIGHT_CURVE_FEATURES] and mask float32[N, points] (1: point, 0: padding).

    Points later than the alert's `mjd` float64[N] are dropped; of the others the latest `wanted.points` are kept, in
    time order, padded with zeros at the end. An unknown flux error becomes 0.
    """
    n = len(mjd)
    seen, alert, place = kept_points(light_curves, mjd, wanted.points)
    features = np.zeros((n, wanted.points, LIGHT_CURVE_FEATURES), np.float32)
    mask = np.zeros((n, wanted.points), np.float32)
    mask[alert, place] = 1
    before, flux, flux_err, one_hot = 0, 1, 2, 3
    features[alert, place, before] = np.log1p((mjd[alert] - light_curves.mjd[seen]) / wanted.time_scale)
    features[alert, place, flux] = np.arcsinh(light_curves.flux[seen] / wanted.flux_scale)
    error = light_curves.flux_err[seen]
    features[alert, place, flux_err] = np.arcsinh(np.where(np.isfinite(error), error, 0) / wanted.flux_scale)
    band, kind = light_curves.band[seen], light_curves.kind[seen]
    known = band < len(BANDS)
    features[alert[known], place[known], one_hot + band[known]] = 1
    features[alert, place, one_hot + len(BANDS) + kind] = 1
    return features, mask


def detections_seen(light_curves: LightCurves, mjd: NDArray[np.float64], wanted: LightCurveInput) -> NDArray[np.int64]:
    """Return how many of the points that the network sees are detections, int64[N], for the alerts' `mjd` [N]."""
    seen, alert, _ = kept_points(light_curves, mjd, wanted.points)
    detected = light_curves.kind[seen] == Measurement.DETECTION
    counts: NDArray[np.int64] = np.bincount(alert[detected], minlength=len(mjd))
    return counts


def kept_points(
    light_curves: LightCurves, mjd: NDArray[np.float64], points: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return which light-curve points the network sees, and where: point, alert and place in the input, int64[K] each.

    These are the latest `points` of each alert that are not later than the alert's `mjd` float64[N], in time order.
    """
    n, counts = len(mjd), np.diff(light_curves.offsets)
    alert = np.repeat(np.arange(n), counts)
    seen = np.flatnonzero(light_curves.mjd <= mjd[alert])  # some redistributed packets hold later points
    alert = alert[seen]
    counts = np.bincount(alert, minlength=n)
    place = np.arange(len(seen)) - np.repeat(np.cumsum(counts) - counts, counts)
    place -= np.maximum(counts - points, 0)[alert]
    kept = place >= 0
    return seen[kept], alert[kept], place[kept]


def normalise_numpy(images: NDArray[np.float32], normalised: NDArray[np.float32], length: int) -> None:
    """Divide every `length` pixels of `images` by their L2 norm, and write the result into `normalised`.

    `length`: the number of pixels of a row or of an image. Both arrays are C-contiguous float32 of the same shape. If
    the norm is NaN or infinite, NaN pixels are first replaced by 0 and infinities by the largest float32. A norm of 0
    is replaced by 1.
    """
    rows, out = images.reshape(-1, length), normalised.reshape(-1, length)
    with np.errstate(over="ignore", invalid="ignore"):
        norm = _norm(rows)
        unclean = ~np.isfinite(norm[:, 0])
        np.divide(rows, norm, out=out)
        if unclean.any():
            clean = np.nan_to_num(rows[unclean])
            out[unclean] = clean / _norm(clean)


def _norm(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    # numpy's pairwise summation, as in the published training code; another order of sums changes `drb` by up to 1e-6.
    norm: NDArray[np.float32] = np.sqrt(np.square(rows).sum(axis=-1, keepdims=True))
    norm[norm == 0] = 1
    return norm


def _crop_box(slot: int, cutout_box: NDArray[np.int16], size: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Return the first pixel int16[N, C, 2] of a crop of slots to `size` pixels, and the boxes within the crop.

    Stamps are placed as in `packets.stamps.decode_stamp`, so that a model's scores do not depend on the size that other
    models need: the crop is what the decoder delivers for slots of that size. Raises ValueError if slot < size.
    """
    if slot < size:
        raise ValueError(f"cutouts of {slot} px are too small for a network that takes {size} px")
    corner, extent = cutout_box[..., :2], cutout_box[..., 2:]
    start = np.where(extent > size, corner + extent // 2 - size // 2, np.minimum(corner, slot // 2 - size // 2))
    box = np.concatenate([np.maximum(corner - start, 0), np.minimum(extent, size)], axis=-1).astype(np.int16)
    return start, box


def _crop(slots: NDArray[np.float32], start: NDArray[np.int16], size: int) -> NDArray[np.float32]:
    """Return the pixels [N, C, size, size] of slots [N, C, S, S] from the pixels `start`; see `_crop_box`."""
    if len(slots) and (start == start[0, 0]).all():  # the usual case, in which numpy copies whole rows
        y, x = start[0, 0].tolist()
        return slots[..., y : y + size, x : x + size]
    n, channel = np.ogrid[: slots.shape[0], : slots.shape[1]]
    windows = sliding_window_view(slots, (size, size), axis=(2, 3))
    return windows[n, channel, start[..., 0], start[..., 1]]


def _pad(images: NDArray[np.float32], box: NDArray[np.int16], padding: float) -> None:
    size = images.shape[-1]
    for n, channel in np.argwhere((box[..., 2:] < size).any(axis=-1)):
        y0, x0, height, width = (int(edge) for edge in box[n, channel])
        image = images[n, channel]
        image[:y0] = image[y0 + height :] = padding
        image[:, :x0] = image[:, x0 + width :] = padding


normalise: Callable[[NDArray[np.float32], NDArray[np.float32], int], None] = normalise_numpy
normalise_snr: Callable[..., None] = snr_numpy
if IMPLEMENTATION == "c":
    with suppress(ImportError):  # the extension was not built, or was built from an earlier version
        from broker_filter.scoring._normalise import normalise, snr  # type: ignore[import-not-found, no-redef]

        normalise_snr = snr
