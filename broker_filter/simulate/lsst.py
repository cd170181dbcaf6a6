"""Encodes an observation as an LSST alert packet, schema 10.0, in Confluent wire format (schema id 1000).

Each cutout is a FITS file with three images: the pixels in nanojansky, their variance, and the PSF. Measurements follow
the survey's definitions. Fields that only the survey's own pipeline can fill (reliability, errors of moments) are null.
"""

from __future__ import annotations

import datetime
import json
import math
import struct
from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.framing.ocf import container_header, encode_block
from broker_filter.simulate.avro import compile_writer
from broker_filter.simulate.fits import CardValue, image_extension, primary_hdu
from broker_filter.simulate.images import Conditions, Image, Stamps
from broker_filter.simulate.instruments import AB_ZERO_POINT_NJY, LSST
from broker_filter.simulate.measurements import (
    PSF_SIZE,
    Footprint,
    Moments,
    adaptive_moments,
    aperture_flux,
    extendedness,
    find_footprint,
    fit_dipole,
    fit_psf,
    trail_length,
)
from broker_filter.simulate.night import EXPOSURE_INTERVAL_DAYS, Observation

SCHEMA_FILE = "lsst.v10_0.alert.avsc"
SCHEMA_ID = 1000
"""The schema id: 100 x major + minor version, as the survey numbers its schemas."""
SMALLEST_STAMP = 30
"""The side of most stamps, in pixels. A detection with a larger footprint has a stamp as large as its footprint."""
LARGEST_STAMP = 102
"""The side of the largest stamps and footprints, in pixels."""
TEMPLATE_PSF_SHAPES = (
    *((47, 47),) * 46, *((49, 49),) * 46, *((55, 55),) * 43, *((53, 53),) * 18, *((51, 51),) * 4, *((53, 51),) * 4,
    *((45, 45),) * 3, *((47, 49),) * 3, *((39, 39),) * 3, *((41, 41),) * 2, *((43, 43),) * 2, (43, 41), (37, 37),
)  # fmt: skip
"""The sizes of the PSF images of the templates in 176 public LSSTCam alerts. Those of science image and difference have
PSF_SIZE."""
MJD_ZERO = datetime.date(1858, 11, 17).toordinal()
TAI_MINUS_UTC_DAYS = 37 / 86400
PROCESSING_DAYS = 60 / 86400
"""The time from the end of the exposure to the alert."""
FIRST_SOURCE_ID = 170_094_456_000_000_000
FIRST_OBJECT_ID = 313_897_383_000_000_000
FIRST_BODY_ID = 21_163_611_000_000_000
"""The ids of the first simulated alert: arbitrary numbers with as many digits as the survey's ids."""

Record = dict[str, Any]


def alert_id(observation: Observation) -> int:
    """Return the diaSourceId."""
    return FIRST_SOURCE_ID + observation.index


def object_id(observation: Observation) -> str:
    """Return the diaObjectId; for a body of the solar system, the ssObjectId."""
    return str((FIRST_BODY_ID if _is_body(observation) else FIRST_OBJECT_ID) + observation.index)


def encode(observation: Observation) -> bytes:
    """Return the packet in wire format."""
    return struct.pack(">bI", 0, SCHEMA_ID) + encode_body(observation)


def encode_container(observation: Observation) -> bytes:
    """Return the packet as an Avro container file, as archives and brokers store it."""
    sync = b"broker-filter/s\n"  # any 16 bytes
    return container_header(_schema_text(), sync) + encode_block(1, encode_body(observation), sync)


def encode_body(observation: Observation) -> bytes:
    """Return the Avro record of the packet, without framing."""
    planes = _planes(observation)
    source = _source(observation, planes)
    size = max(source["bboxSize"], SMALLEST_STAMP)
    corner = _corner(observation, size)
    cards = _cards(observation, corner)
    previous = _previous_sources(observation, source)
    template_shape = TEMPLATE_PSF_SHAPES[observation.rng.integers(len(TEMPLATE_PSF_SHAPES))]
    # The survey publishes the PSF of the science image as that of the difference.
    psfs = (planes.psf_science, _centre(planes.psf_template, template_shape), planes.psf_science)
    science, template, difference = (
        _cutout(observation, image, variance, psf, corner, size, cards)
        for image, variance, psf in zip(planes.images, planes.variances, psfs, strict=True)
    )
    record: Record = {
        "diaSourceId": source["diaSourceId"],
        "observation_reason": "simulated",
        "target_name": "simulated",
        "diaSource": source,
        "prvDiaSources": previous or None,
        "prvDiaForcedSources": _forced_sources(observation, source) or None,
        "diaObject": None if _is_body(observation) else _object(observation, source, len(previous)),
        "ssSource": _body(observation, source) if _is_body(observation) else None,
        "mpc_orbits": None,
        "cutoutDifference": difference,
        "cutoutScience": science,
        "cutoutTemplate": template,
    }
    return _encoder()(record)


@cache
def _schema_text() -> bytes:
    return files("broker_filter.simulate").joinpath("schemas", SCHEMA_FILE).read_bytes()


@cache
def _encoder() -> Callable[[Record], bytes]:
    return compile_writer(json.loads(_schema_text()))


def _is_body(observation: Observation) -> bool:
    return observation.kind == "asteroid"


class _Planes(NamedTuple):
    """The pixels that the survey publishes and measures; unusable pixels are NaN with a variance of +inf.

    `images`, `variances`: of science image, template and difference, float32[grid, grid], nJy and nJy^2.
    `psf_science`: float64[PSF_SIZE, PSF_SIZE]; `psf_template`: float64[grid, grid].
    """

    images: Stamps
    variances: tuple[Image, Image, Image]
    psf_science: NDArray[np.float64]
    psf_template: NDArray[np.float64]


def _planes(observation: Observation) -> _Planes:
    conditions, middle = observation.exposure.conditions, LSST.grid // 2
    columns, rows = (np.arange(LSST.grid) - middle + at for at in (observation.x, observation.y))
    outside = np.logical_or.outer(
        (rows < 0) | (rows >= LSST.detector[1]), (columns < 0) | (columns >= LSST.detector[0])
    )
    science, template, difference = (image.copy() for image in observation.stamps)
    for image in (science, difference):  # a template has no detector, and is complete
        image[outside] = np.nan
    # The survey computes the variance from the noisy pixels, so that it fluctuates with them.
    least = (LSST.read_noise / conditions.gain) ** 2
    spread = np.maximum(conditions.noise**2 + science / np.float32(conditions.gain), least)
    gain = conditions.gain * conditions.template_exposures
    template_spread = np.maximum(conditions.template_noise**2 + template / np.float32(gain), least / gain)
    variances = [spread, template_spread, spread + template_spread]
    for variance, image in zip(variances, (science, template, difference), strict=True):
        variance[~np.isfinite(image)] = np.inf
    psf_science, psf_template = (
        np.fft.fftshift(np.fft.irfft2(psf)).astype(np.float64)
        for psf in (conditions.psf_science, conditions.psf_template)
    )
    return _Planes(
        Stamps(science, template, difference),
        (variances[0].astype(np.float32), variances[1].astype(np.float32), variances[2].astype(np.float32)),
        _centre(psf_science, (PSF_SIZE, PSF_SIZE)),
        psf_template,
    )


def _centre(image: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return the central part of an image with an odd number of rows and columns, float64[shape], with the sum 1."""
    middle = len(image) // 2
    rows, columns = (slice(middle - side // 2, middle + side // 2 + 1) for side in shape)
    part = image[rows, columns]
    return np.asarray(part / part.sum())


def _corner(observation: Observation, size: int) -> tuple[int, int]:
    """Return the first column and row, on the detector, of the stamp of `size` pixels centred on the source."""
    return (
        round(observation.x + observation.offset[0] - (size - 1) / 2),
        round(observation.y + observation.offset[1] - (size - 1) / 2),
    )


def _cards(observation: Observation, corner: tuple[int, int]) -> dict[str, CardValue]:
    """Return the header of the pixels of a cutout."""
    scale = LSST.pixel_scale / 3600
    return {
        "EXTEND": True,
        "CUTMINX": corner[0] - 1,  # one less than the first column, as in the survey's packets
        "CUTMINY": corner[1] - 1,
        "ROTPA": 0.0,
        "BUNIT": "nJy",
        "WCSAXES": 2,
        "CRPIX1": observation.x + observation.offset[0] - corner[0] + 1,
        "CRPIX2": observation.y + observation.offset[1] - corner[1] + 1,
        "PC1_1": -scale,
        "PC2_2": scale,
        "CDELT1": 1.0,
        "CDELT2": 1.0,
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CRVAL1": observation.ra,
        "CRVAL2": observation.dec,
    }


def _cutout(
    observation: Observation,
    image: Image,
    variance: Image,
    psf: NDArray[np.float64],
    corner: tuple[int, int],
    size: int,
    cards: dict[str, CardValue],
) -> bytes:
    """Return the FITS file of a cutout with sides of `size` pixels from `corner` on."""
    column, row = (
        LSST.grid // 2 + first - at for first, at in zip(corner, (observation.x, observation.y), strict=True)
    )
    box = slice(row, row + size), slice(column, column + size)
    return (
        primary_hdu(image[box], cards)
        + image_extension(variance[box], "UNCERT", {"UTYPE": "VarianceUncertainty"})
        + image_extension(psf, "PSFIMAGE")
    )


def _source(observation: Observation, planes: _Planes) -> Record:
    """Return the diaSource record of the detection."""
    conditions, offset = observation.exposure.conditions, observation.offset
    time = observation.exposure.mjd + TAI_MINUS_UTC_DAYS
    difference, variance = planes.images.difference, planes.variances[2]
    psf_shape = _moments_of_psf(conditions)
    width = psf_shape.radius
    profile = conditions.profile(conditions.psf_science, *offset)
    fit = fit_psf(difference, variance, profile)
    footprint = find_footprint(difference, variance, conditions.psf_science, width)
    aperture, aperture_error, truncated = aperture_flux(difference, variance, *offset)
    science = fit_psf(planes.images.science, planes.variances[0], profile)
    template_profile = conditions.profile(conditions.psf_template, *offset)
    template = fit_psf(planes.images.template, planes.variances[1], template_profile)
    at_edge = fit.n_data < PSF_SIZE**2
    shape = None if at_edge else adaptive_moments(difference * np.sign(np.float32(fit.flux)), *offset, width)
    position_error = math.sqrt(2) * width / footprint.snr  # of a Gaussian in white noise, pixels
    return {
        "diaSourceId": alert_id(observation),
        "visit": _visit(observation.exposure.mjd),
        "detector": observation.exposure.detector,
        "diaObjectId": None if _is_body(observation) else FIRST_OBJECT_ID + observation.index,
        "ssObjectId": FIRST_BODY_ID + observation.index if _is_body(observation) else None,
        "parentDiaSourceId": 0,
        "midpointMjdTai": time,
        "ra": observation.ra,
        "raErr": position_error * LSST.pixel_scale / 3600,
        "dec": observation.dec,
        "decErr": position_error * LSST.pixel_scale / 3600,
        "ra_dec_Cov": 0.0,
        "x": observation.x + offset[0],
        "xErr": position_error,
        "y": observation.y + offset[1],
        "yErr": position_error,
        "centroid_flag": False,
        "apFlux": aperture,
        "apFluxErr": aperture_error,
        "apFlux_flag": truncated,
        "apFlux_flag_apertureTruncated": truncated,
        "isNegative": fit.flux < 0,
        "snr": footprint.snr,
        "psfFlux": fit.flux,
        "psfFluxErr": fit.flux_error,
        "psfChi2": fit.chi2,
        "psfNdata": fit.n_data,
        "psfFlux_flag": at_edge,
        "psfFlux_flag_edge": at_edge,
        "psfFlux_flag_noGoodPixels": fit.n_data == 0,
        **_trail(observation, planes, shape),
        **_dipole(observation, planes, footprint),
        "scienceFlux": science.flux,
        "scienceFluxErr": science.flux_error,
        "forced_PsfFlux_flag": at_edge,
        "forced_PsfFlux_flag_edge": at_edge,
        "forced_PsfFlux_flag_noGoodPixels": science.n_data == 0,
        "templateFlux": template.flux,
        "templateFluxErr": template.flux_error,
        "ixx": _square_arcsec(shape.xx) if shape else None,
        "iyy": _square_arcsec(shape.yy) if shape else None,
        "ixy": _square_arcsec(shape.xy) if shape else None,
        "ixxPSF": _square_arcsec(psf_shape.xx),
        "iyyPSF": _square_arcsec(psf_shape.yy),
        "ixyPSF": _square_arcsec(psf_shape.xy),
        "shape_flag": shape is None,
        "shape_flag_no_pixels": False,
        "shape_flag_not_contained": False,
        "shape_flag_parent_source": False,
        "extendedness": extendedness(shape, psf_shape) if shape else None,
        "band": conditions.band,
        "timeProcessedMjdTai": time + PROCESSING_DAYS,
        "bboxSize": min(footprint.size, LARGEST_STAMP),
        **_pixel_flags(observation, planes, footprint),
        "glint_trail": False,
    }


def _trail(observation: Observation, planes: _Planes, shape: Moments | None) -> Record:
    """Return the fields of the trail, with the angle as that on the sky, from north through east."""
    if shape is None:
        return {"trail_flag_edge": False}
    conditions = observation.exposure.conditions
    length, angle = trail_length(shape)
    profile = conditions.profile(
        conditions.psf_science, *observation.offset, trail=(length * math.cos(angle), length * math.sin(angle))
    )
    return {
        "trailFlux": fit_psf(planes.images.difference, planes.variances[2], profile).flux,
        "trailRa": observation.ra,
        "trailDec": observation.dec,
        "trailLength": length * LSST.pixel_scale,
        "trailAngle": math.degrees(math.atan2(-math.cos(angle), math.sin(angle))),
        "trail_flag_edge": False,
    }


def _dipole(observation: Observation, planes: _Planes, footprint: Footprint) -> Record:
    """Return the fields of the dipole, which the survey fits to footprints with positive and negative pixels."""
    conditions, images = observation.exposure.conditions, planes.images
    profile = partial(conditions.profile, conditions.psf_science)
    dipole = None
    if footprint.has_both_signs:
        dipole = fit_dipole(images.science, images.difference, planes.variances[2], profile, footprint)
    if dipole is None:
        return {"isDipole": False, "dipoleFitAttempted": footprint.has_both_signs, "dipoleNdata": 0}
    flux_error = fit_psf(images.science, planes.variances[0], profile(dipole.x, dipole.y)).flux_error
    return {
        "isDipole": True,
        "dipoleFitAttempted": True,
        "dipoleMeanFlux": dipole.flux,
        "dipoleMeanFluxErr": flux_error,
        "dipoleFluxDiff": 0.0,
        "dipoleFluxDiffErr": 2 * flux_error,
        "dipoleLength": math.hypot(dipole.dx, dipole.dy) * LSST.pixel_scale,
        "dipoleAngle": math.degrees(math.atan2(-dipole.dx, dipole.dy)),
        "dipoleChi2": dipole.chi2,
        "dipoleNdata": dipole.n_data,
    }


def _pixel_flags(observation: Observation, planes: _Planes, footprint: Footprint) -> Record:
    """Return the flags of the pixels in the footprint, and of the central 3 x 3 pixels."""
    conditions, middle = observation.exposure.conditions, LSST.grid // 2
    centre = (slice(middle - 1, middle + 2),) * 2
    saturated = observation.stamps.science >= 0.99 * LSST.saturation * LSST.gain / conditions.gain
    no_data = observation.stamps.difference == 0
    flags = {
        "edge": bool((footprint.pixels & np.isnan(planes.images.difference)).any()),
        "nodata": bool((footprint.pixels & no_data).any()),
        "nodataCenter": bool(no_data[centre].any()),
        "saturated": bool((footprint.pixels & saturated).any()),
        "saturatedCenter": bool(saturated[centre].any()),
    }
    unset = ("bad", "cr", "crCenter", "interpolated", "interpolatedCenter", "offimage", "suspect", "suspectCenter",
             "streak", "streakCenter")  # fmt: skip
    return {"pixelFlags": False} | {f"pixelFlags_{name}": flags.get(name, False) for name in (*flags, *unset)}


def _square_arcsec(square_pixels: float) -> float:
    return square_pixels * LSST.pixel_scale**2


@lru_cache(maxsize=2 * LSST.weathers)
def _moments_of_psf(conditions: Conditions) -> Moments:
    """Return the second moments of the PSF of the science image, in square pixels."""
    moments = adaptive_moments(conditions.profile(conditions.psf_science, 0.0, 0.0), 0.0, 0.0, conditions.fwhm / 2.355)
    assert moments is not None, "a PSF has second moments"
    return moments


def _earlier_visit(observation: Observation, source: Record, i: int) -> Record:
    """Return the fields that records of detections and of forced photometry share.

    `i`: the index of the visit in the history.
    """
    history = observation.history
    mjd = float(history.mjd[i])
    return {
        **{key: source[key] for key in ("detector", "diaObjectId", "ra", "dec")},
        "visit": _visit(mjd),
        "midpointMjdTai": mjd + TAI_MINUS_UTC_DAYS,
        "timeProcessedMjdTai": mjd + TAI_MINUS_UTC_DAYS + PROCESSING_DAYS,
        "band": history.band[i],
        "psfFlux": float(history.flux[i]),
        "psfFluxErr": float(history.flux_error[i]),
    }


def _previous_sources(observation: Observation, source: Record) -> list[Record]:
    """Return the prvDiaSources records: the object's earlier detections of the last year."""
    history = observation.history
    return [
        {
            **_earlier_visit(observation, source, i),
            **{key: source[key] for key in ("x", "y")},
            "diaSourceId": source["diaSourceId"] - (i + 1) * 10**9,
            "snr": float(abs(history.flux[i]) / history.flux_error[i]),
            "isNegative": bool(history.flux[i] < 0),
        }
        for i in np.flatnonzero(history.detected).tolist()
    ]


def _forced_sources(observation: Observation, source: Record) -> list[Record]:
    """Return the prvDiaForcedSources records: forced photometry of all earlier visits.

    The list is empty without an earlier detection.
    """
    history = observation.history
    if not history.detected.any():
        return []
    return [
        {
            **_earlier_visit(observation, source, i),
            "diaForcedSourceId": source["diaSourceId"] - (i + 1) * 10**9,
        }
        for i in range(len(history.mjd))
    ]


def _object(observation: Observation, source: Record, n_previous: int) -> Record:
    """Return the diaObject record."""
    first = observation.first_detection_mjd if n_previous else observation.exposure.mjd
    return {
        **{key: source[key] for key in ("diaObjectId", "ra", "raErr", "dec", "decErr", "ra_dec_Cov")},
        "validityStartMjdTai": source["timeProcessedMjdTai"],
        "firstDiaSourceMjdTai": first + TAI_MINUS_UTC_DAYS,
        "lastDiaSourceMjdTai": source["midpointMjdTai"],
        "nDiaSources": n_previous + 1,
    }


def _body(observation: Observation, source: Record) -> Record:
    """Return the ssSource record of an asteroid, at its predicted position."""
    magnitude = AB_ZERO_POINT_NJY - 2.5 * np.log10(abs(source["psfFlux"]))
    return {
        "diaSourceId": source["diaSourceId"],
        "ssObjectId": source["ssObjectId"],
        "designation": f"sim {observation.index}",
        "eclLambda": 0.0,
        "eclBeta": 0.0,
        "galLon": 0.0,
        "galLat": 0.0,
        "ephRa": source["ra"],
        "ephDec": source["dec"],
        "ephVmag": float(magnitude),
        "ephOffset": 0.1,
    }


def _visit(mjd: float) -> int:
    """Return the id of the visit at this time: the date (YYYYMMDD), and five digits of the visit within the day."""
    date = datetime.date.fromordinal(MJD_ZERO + int(mjd))
    return int(date.strftime("%Y%m%d")) * 10**5 + round(mjd % 1 / EXPOSURE_INTERVAL_DAYS)
