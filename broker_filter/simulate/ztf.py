"""Encodes an observation as a ZTF alert packet, schemavsn 4.02: an Avro object container file with embedded schema.

Fields that only the survey's own pipeline can fill (its scores, details of its calibration) are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import deflate
import numpy as np

from broker_filter.packets.framing.ocf import container_header, encode_block
from broker_filter.simulate.avro import compile_writer
from broker_filter.simulate.fits import primary_hdu
from broker_filter.simulate.instruments import AB_ZERO_POINT_NJY, ZTF
from broker_filter.simulate.night import Exposure, Neighbour, Observation

SCHEMA_FILE = "ztf.v4_02.alert.avsc"
STAMP_RADIUS = 31
"""Stamps have 63 x 63 pixels, and fewer at an edge of the detector."""
FILTER_ID = {"g": 1, "r": 2}
JD_MINUS_MJD = 2400000.5
NIGHT_ZERO_JD = 2457754.5
"""2017-01-01. The days since then, to five decimals, are the first digits of each pid and candid."""
NOT_MATCHED = -999.0
"""The survey's sentinel for a catalogue without a source nearby."""
MAGNITUDES_PER_E = float(2.5 / np.log(10))
SYNC = b"broker-filter/s\n"
"""The sync marker of the containers: any 16 bytes, fixed so that the same seed gives the same bytes."""
COMPRESSION_LEVEL = 1
"""The fastest level, because noise hardly compresses at any level."""

FAR_AWAY = Neighbour(30.0, 0.0, 23.0, is_star=True)
"""Used as the nearest source of a template if there is no source within the stamp."""

Record = dict[str, Any]


def object_id(observation: Observation) -> str:
    """Return the objectId: "ZTF", the year of the first detection (two digits), and seven letters."""
    year = 26 if observation.first_detection_mjd > 61041 else 18
    # The stride is coprime to 26, so each name is used once.
    number, letters = (observation.index * 14_348_909 + 2_460_375) % 26**7, ""
    for _ in range(7):
        number, letter = divmod(number, 26)
        letters = chr(ord("a") + letter) + letters
    return f"ZTF{year}{letters}"


def alert_id(observation: Observation) -> int:
    """Return the candid: the pid of the exposure, and the number of the alert within the exposure."""
    return _pid(_jd(observation.exposure.mjd), observation.exposure.detector) * 10**6 + 15_000 + observation.number


def encode(observation: Observation) -> bytes:
    """Return the packet, an Avro container file."""
    candid = alert_id(observation)
    record: Record = {
        "schemavsn": "4.02",
        "publisher": "broker-filter (simulated)",
        "objectId": object_id(observation),
        "candid": candid,
        "candidate": _candidate(observation, candid),
        "prv_candidates": _previous_candidates(observation),
        "fp_hists": _forced_photometry(observation) if observation.earlier_detections else None,
    }
    middle = ZTF.grid // 2
    rows, columns = (
        slice(middle - min(STAMP_RADIUS, at), middle + 1 + min(STAMP_RADIUS, size - 1 - at))
        for at, size in ((observation.y, ZTF.detector[1]), (observation.x, ZTF.detector[0]))
    )
    science, template, difference = observation.stamps
    # For a negative difference, ZTF publishes template minus science, so the candidate is always positive.
    difference = difference * np.float32(np.sign(observation.photometry.flux))
    for field, suffix, image in (
        ("cutoutScience", "targ_sci", science),
        ("cutoutTemplate", "ref", template),
        ("cutoutDifference", "targ_scimref", difference),
    ):
        record[field] = {
            "fileName": f"candid{candid}_{suffix}.fits.gz",
            "stampData": deflate.gzip_compress(primary_hdu(image[rows, columns], {"BUNIT": "DN"}), COMPRESSION_LEVEL),
        }
    header, encode_record = _format()
    return header + encode_block(1, encode_record(record), SYNC)


@cache
def _format() -> tuple[bytes, Callable[[Record], bytes]]:
    """Return the header of the containers, and the encoder of the record."""
    schema = files("broker_filter.simulate").joinpath("schemas", SCHEMA_FILE).read_bytes()
    return container_header(schema, SYNC), compile_writer(json.loads(schema))


def _candidate(observation: Observation, candid: int) -> Record:
    exposure, photometry, conditions = observation.exposure, observation.photometry, observation.exposure.conditions
    jd = _jd(exposure.mjd)
    seen = _difference_source(
        photometry.flux, photometry.flux_error, ZTF.zero_point, photometry.aperture_flux, photometry.wide_aperture_flux
    )
    limit = conditions.limiting_magnitude
    edge = min(observation.x, observation.y, ZTF.detector[0] - 1 - observation.x, ZTF.detector[1] - 1 - observation.y)
    is_known_body = observation.kind == "asteroid" and observation.rng.random() < 0.85
    return {
        **_visit(exposure, jd, conditions.band, limit),
        **seen,
        **_nearest(observation),
        **_catalogue(observation),
        "candid": candid,
        "tblid": observation.number,
        "xpos": observation.x + 1 + observation.offset[0],  # pixels are counted from 1
        "ypos": observation.y + 1 + observation.offset[1],
        "ra": observation.ra,
        "dec": observation.dec,
        "chipsf": photometry.chi2,
        "sky": 0.0,
        "fwhm": photometry.fwhm,
        "mindtoedge": float(edge),
        "magfromlim": limit - seen["magap"],
        "seeratio": photometry.fwhm / conditions.fwhm,
        "aimage": photometry.major,
        "bimage": photometry.minor,
        "aimagerat": photometry.major / photometry.fwhm,
        "bimagerat": photometry.minor / photometry.fwhm,
        "elong": photometry.major / photometry.minor,
        "nneg": photometry.n_negative,
        "nbad": photometry.n_bad,
        "sumrat": photometry.sum_ratio,
        "scorr": photometry.snr * ZTF.quoted_error,
        "ssdistnr": observation.rng.exponential(0.4) if is_known_body else NOT_MATCHED,
        "ssmagnr": seen["magpsf"] + observation.rng.normal(0, 0.15) if is_known_body else NOT_MATCHED,
        "ssnamenr": str(1000 + observation.index) if is_known_body else "null",
        "ndethist": observation.earlier_detections + 1,
        "ncovhist": observation.earlier_visits + 1,
        "jdstarthist": _jd(observation.first_detection_mjd),
        "jdendhist": jd,
        "tooflag": 0,
        "rfid": exposure.field * 10**6 + 120_000 + FILTER_ID[conditions.band],
        "jdstartref": NIGHT_ZERO_JD + 500,
        "jdendref": NIGHT_ZERO_JD + 700,
        "nframesref": conditions.template_exposures,
        "nmatches": 400,
        "exptime": 30.0,
        "drb": None,
        "drbversion": "simulated",
    }


def _visit(exposure: Exposure, jd: float, band: str, limit: float) -> Record:
    """Return the fields on the exposure, which a candidate and an earlier visit both have."""
    return {
        "jd": jd,
        "fid": FILTER_ID[band],
        "pid": _pid(jd, exposure.detector),
        "diffmaglim": limit,
        "programpi": "simulated",
        "programid": 1,
        "nid": int(jd - NIGHT_ZERO_JD),
        "rcid": exposure.detector,
        "field": exposure.field,
        "magzpsci": ZTF.zero_point,
        "magzpsciunc": 1e-5,
        "magzpscirms": 0.03,
        "clrcoeff": -0.05 if band == "g" else 0.1,
        "clrcounc": 1e-5,
        "rbversion": "simulated",
    }


def _difference_source(flux: float, error: float, zero_point: float, aperture: float, wide_aperture: float) -> Record:
    """Return the magnitude fields of a detection. `flux`, which may be negative, has the zero point `zero_point`."""
    relative = MAGNITUDES_PER_E * error / abs(flux)
    magnitude = _magnitude(flux, zero_point)
    sign = math.copysign(1.0, flux)
    # An aperture flux of zero or less has no magnitude; a tenth of the uncertainty is used instead.
    small, wide = (_magnitude(max(sign * counts, 0.1 * error), zero_point) for counts in (aperture, wide_aperture))
    return {
        "isdiffpos": "t" if flux > 0 else "f",
        "magpsf": magnitude,
        "sigmapsf": relative,
        "magap": small,
        "sigmagap": 1.2 * relative,
        "magapbig": wide,
        "sigmagapbig": 1.8 * relative,
        "magdiff": small - magnitude,
    }


def _nearest(observation: Observation) -> Record:
    """Return the fields on the nearest source in the template."""
    neighbour = observation.neighbours[0] if observation.neighbours else FAR_AWAY
    scale = ZTF.pixel_scale / 3600
    return {
        "distnr": neighbour.distance * ZTF.pixel_scale,
        "magnr": neighbour.magnitude,
        "sigmagnr": 0.02,
        "chinr": 0.6 if neighbour.is_star else 2.5,
        "sharpnr": 0.0 if neighbour.is_star else 0.5,
        "ranr": observation.ra - neighbour.x * scale / float(np.cos(np.radians(observation.dec))),
        "decnr": observation.dec + neighbour.y * scale,
    }


def _catalogue(observation: Observation) -> Record:
    """Return the fields on the three nearest Pan-STARRS sources and the nearest Gaia star."""
    near = [n for n in observation.neighbours if n.distance * ZTF.pixel_scale < 30]
    stars = [n for n in near if n.is_star and n.magnitude < 20.5]
    record: Record = {
        "nmtchps": len(near),
        "neargaia": stars[0].distance * ZTF.pixel_scale if stars else NOT_MATCHED,
        "maggaia": stars[0].magnitude if stars else NOT_MATCHED,
    }
    for rank in (1, 2, 3):
        neighbour = near[rank - 1] if rank <= len(near) else None
        record[f"objectidps{rank}"] = observation.index * 10 + rank if neighbour else 0
        record[f"distpsnr{rank}"] = neighbour.distance * ZTF.pixel_scale if neighbour else NOT_MATCHED
        record[f"sgscore{rank}"] = (0.98 if neighbour.is_star else 0.03) if neighbour else NOT_MATCHED
        for band, colour in (("sg", 0.4), ("sr", 0.0), ("si", -0.2), ("sz", -0.3)):
            record[f"{band}mag{rank}"] = neighbour.magnitude + colour if neighbour else NOT_MATCHED
    return record


def _earlier_visits(observation: Observation) -> list[Record]:
    """Return the fields on the exposures of the history."""
    history = observation.history
    limits = history.limiting_magnitude.tolist()
    return [
        _visit(observation.exposure, _jd(mjd), band, limit)
        for mjd, band, limit in zip(history.mjd.tolist(), history.band, limits, strict=True)
    ]


def _previous_candidates(observation: Observation) -> list[Record] | None:
    """Return the prv_candidates of the last 30 days; None if there are none.

    A visit without a detection gives an upper limit.
    """
    history, visits = observation.history, _earlier_visits(observation)
    nearest = _nearest(observation)
    for i in np.flatnonzero(history.detected):
        flux, error, visit = float(history.flux[i]), float(history.flux_error[i]), visits[i]
        visit |= _difference_source(flux, error, AB_ZERO_POINT_NJY, flux, flux) | nearest
        visit |= {"candid": visit["pid"] * 10**6 + 15_000, "ra": observation.ra, "dec": observation.dec}
        visit |= {"nneg": 2, "nbad": 0, "scorr": abs(flux) / error * ZTF.quoted_error}
    return visits or None


def _forced_photometry(observation: Observation) -> list[Record]:
    """Return the fp_hists: the forced flux for each visit of the last 30 days.

    The flux is measured at the position of the alert, in counts.
    """
    history, conditions = observation.history, observation.exposure.conditions
    shared = _nearest(observation) | {
        "sciinpseeing": conditions.fwhm,
        "scibckgnd": conditions.sky,
        "scisigpix": conditions.noise,
        "exptime": 30.0,
        "procstatus": "0",
    }
    fluxes, errors = ((values / ZTF.nanojansky).tolist() for values in (history.flux, history.flux_error))
    return [
        visit
        | shared
        | {
            "rfid": observation.exposure.field * 10**6 + 120_000 + visit["fid"],
            "forcediffimflux": flux,
            "forcediffimfluxunc": error,
        }
        for visit, flux, error in zip(_earlier_visits(observation), fluxes, errors, strict=True)
    ]


def _magnitude(flux: float, zero_point: float) -> float:
    return zero_point - 2.5 * math.log10(abs(flux))


def _jd(mjd: float) -> float:
    """Return the Julian date, rounded to seven decimals, as the survey does."""
    return round(mjd + JD_MINUS_MJD, 7)


def _pid(jd: float, detector: int) -> int:
    """Return the processing id of an exposure: days to five decimals, readout channel, and the constant 15."""
    return int((jd - NIGHT_ZERO_JD) * 10**5) * 10**4 + detector * 100 + 15
