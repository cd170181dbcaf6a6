"""Encodes an observation as an LSST alert packet, schema 10.0, in Confluent wire format (schema id 1000).

Each cutout is a FITS file with three images: the pixels in nanojansky, their variance, and the PSF. Fields that only
the survey's own pipeline can fill (reliability, most pixel flags) are null.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.ocf import container_header, encode_block
from broker_filter.simulate.avro import compile_writer
from broker_filter.simulate.fits import CardValue, image_extension, primary_hdu
from broker_filter.simulate.images import Spectrum
from broker_filter.simulate.instruments import AB_ZERO_POINT_NJY, LSST
from broker_filter.simulate.night import Observation

SCHEMA_FILE = "lsst.v10_0.alert.avsc"
SCHEMA_ID = 1000
"""The schema id: 100 x major + minor version, as the survey numbers its schemas."""
SMALLEST_STAMP = 30
"""The side of most stamps, in pixels."""
LARGEST_STAMP = 102
"""The side of the largest stamps, in pixels."""
PSF_SIZE = 41
"""The side of the published PSF image, in pixels."""
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
    source = _source(observation)
    conditions, stamps = observation.exposure.conditions, observation.stamps
    variance = conditions.noise**2, conditions.template_noise**2
    size = _stamp_size(observation)
    previous = _previous_sources(observation, source)
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
        "cutoutDifference": _cutout(observation, stamps.difference, sum(variance), conditions.psf_difference, size),
        "cutoutScience": _cutout(observation, stamps.science, variance[0], conditions.psf_science, size),
        "cutoutTemplate": _cutout(observation, stamps.template, variance[1], conditions.psf_template, size),
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


def _stamp_size(observation: Observation) -> int:
    """Return the side of a stamp in pixels.

    Most stamps have SMALLEST_STAMP pixels; some are larger, as for blended or trailed sources.
    """
    draw = observation.rng.random()
    if draw < 0.75:
        return SMALLEST_STAMP
    return LARGEST_STAMP if draw > 0.98 else int(observation.rng.integers(SMALLEST_STAMP, 64))


def _cutout(observation: Observation, image: NDArray[np.float32], variance: float, psf: Spectrum, size: int) -> bytes:
    """Return the FITS file of a cutout with sides of `size` pixels around the alert.

    Pixels outside the detector are NaN.
    """
    middle = LSST.grid // 2
    x0, y0 = observation.x - size // 2, observation.y - size // 2
    pixels = image[middle - size // 2 :, middle - size // 2 :][:size, :size].copy()
    columns, rows = np.arange(x0, x0 + size), np.arange(y0, y0 + size)
    pixels[(rows < 0) | (rows >= LSST.detector[1])] = np.nan
    pixels[:, (columns < 0) | (columns >= LSST.detector[0])] = np.nan
    scale = LSST.pixel_scale / 3600
    cards: dict[str, CardValue] = {
        "CUTMINX": x0,
        "CUTMINY": y0,
        "BUNIT": "nJy",
        "WCSAXES": 2,
        "CRPIX1": size // 2 + 1 + observation.offset[0],
        "CRPIX2": size // 2 + 1 + observation.offset[1],
        "CDELT1": -scale,
        "CDELT2": scale,
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CRVAL1": observation.ra,
        "CRVAL2": observation.dec,
    }
    spread = np.fft.fftshift(np.fft.irfft2(psf))
    box = slice(middle - PSF_SIZE // 2, middle + PSF_SIZE // 2 + 1)
    uncertainty = np.full_like(pixels, variance) + np.maximum(np.nan_to_num(pixels), 0) / np.float32(LSST.gain)
    return (
        primary_hdu(pixels, cards)
        + image_extension(uncertainty, "UNCERT", {"UTYPE": "VarianceUncertainty"})
        + image_extension((spread / spread.sum())[box, box].astype(np.float64), "PSFIMAGE")
    )


def _source(observation: Observation) -> Record:
    """Return the diaSource record of the detection."""
    photometry, conditions = observation.photometry, observation.exposure.conditions
    time = observation.exposure.mjd + TAI_MINUS_UTC_DAYS
    position_error = 0.5 * conditions.fwhm / photometry.snr  # pixels
    moments = 0.5 * (LSST.pixel_scale * np.array((photometry.major, photometry.minor))) ** 2
    psf_moment = (LSST.pixel_scale * conditions.fwhm / 2.355) ** 2
    trail = float(np.hypot(*observation.trail)) * LSST.pixel_scale
    return {
        "diaSourceId": alert_id(observation),
        "visit": 2026022500000 + observation.exposure.number,
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
        "x": observation.x + observation.offset[0],
        "xErr": position_error,
        "y": observation.y + observation.offset[1],
        "yErr": position_error,
        "centroid_flag": False,
        "apFlux": photometry.wide_aperture_flux,
        "apFluxErr": 1.8 * photometry.flux_error,
        "apFlux_flag": False,
        "isNegative": photometry.flux < 0,
        "snr": photometry.snr,
        "psfFlux": photometry.flux,
        "psfFluxErr": photometry.flux_error,
        "psfChi2": photometry.chi2 * PSF_SIZE**2,
        "psfNdata": PSF_SIZE**2,
        "psfFlux_flag": False,
        "trailLength": trail,
        "ixx": float(moments[0]),
        "iyy": float(moments[1]),
        "ixy": 0.0,
        "ixxPSF": psf_moment,
        "iyyPSF": psf_moment,
        "ixyPSF": 0.0,
        "shape_flag": False,
        "band": conditions.band,
        "isDipole": observation.kind == "dipole",
        "dipoleFitAttempted": observation.kind == "dipole",
        "timeProcessedMjdTai": time + PROCESSING_DAYS,
        "pixelFlags": False,
        "pixelFlags_edge": observation.kind == "edge",
    }


def _earlier_visit(observation: Observation, source: Record, i: int) -> Record:
    """Return the fields that the records of detections and of forced photometry share, for the visit `i` of the
    history."""
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
    """Return the id of the visit at this time: the day (MJD), and the number of the visit within the day."""
    return int(mjd) * 10**5 + int(mjd % 1 * 2000)
