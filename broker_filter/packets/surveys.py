"""The field names of ZTF and LSST: how a survey is recognised, its ids, and the table of metadata columns.

This module holds only tables and formulae. It must never state the position of a field in a packet, because fields are
found by name (see `plan`).

Sources: ZTF alert schema 4.02 (https://zwickytransientfacility.github.io/ztf-avro-alert/schema.html); LSST alert
schemas 7.0 to 11.1 (https://github.com/lsst/alert_packet).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.photometry import (
    LIMIT_SIGMAS,
    MAGNITUDES_PER_E,
    MJD_EPOCH,
    NO_VALUE,
    DetectionsSoFar,
    Points,
    Values,
    ab_magnitude,
    flag,
    letter_band,
    lsst_detections,
    lsst_forced,
    nanojansky,
    sign,
    ztf_band,
    ztf_detections,
    ztf_detections_so_far,
    ztf_filter,
    ztf_forced,
)
from broker_filter.packets.sky_coordinates import ECLIPTIC, GALACTIC, latitude, longitude

UNVERSIONED = "unversioned"
"""The schema version of alerts that have none: ZTF alerts of early 2018, and some redistributed LSST alerts."""
TEMPLATE_MATCH_ARCSEC = 1.4
"""The greatest distance from a ZTF alert at which ALeRCE takes the nearest source in the template for the source of the
alert before its variation (Förster et al. 2021, AJ 161, 242; `DISTANCE_THRESHOLD` in its code `lc_correction`)."""
SOLAR_SYSTEM_MATCH_ARCSEC = 5.0
"""ZTF lists the nearest known solar-system object within 30 arcsec. As in Fink, an object within this distance is taken
for the source of the alert."""


LSST_NIGHT_START = 0.5
"""The time of day, as a fraction in UTC, at which a night of LSST begins."""


@dataclass(frozen=True, slots=True)
class Field:
    """A numeric field of a packet.

    `paths`: the dotted paths under which schemas have it; the first path that a schema has is read. `missing`: the
    survey's sentinel value, which is read as NaN, as null is. `letter`: a string is read as the code of its first byte.
    """

    paths: tuple[str, ...]
    missing: float | None = None
    letter: bool = False


@dataclass(frozen=True, slots=True)
class SoFar:
    """A number computed from the packet's history up to the time of the alert: a column of `DetectionsSoFar`."""

    name: Literal["first_jd", "peak_jd", "peak_magnitude", "faintest_magnitude"]


@dataclass(frozen=True, slots=True)
class TextColumn:
    """A text in the packets: its name, its meaning, and the fields that hold it in each survey.

    The first field that a schema has is read. Unlike a `Column`, it is not a number, so no model can use it.
    """

    name: str
    meaning: str
    ztf: tuple[str, ...]
    lsst: tuple[str, ...]

    def paths(self, survey: Survey) -> tuple[str, ...]:
        """Return the dotted paths of the fields in packets of `survey`."""
        return self.ztf if survey is Survey.ZTF else self.lsst


CurveColumn = Literal[
    "first_mjd",
    "peak_mjd",
    "peak_flux",
    "peak_band",
    "faintest_flux",
    "nights",
    "band_peak_flux",
    "amplitude",
    "rise_mag_rate",
    "rise_mag_rate_err",
    "decline_mag_rate",
    "decline_mag_rate_err",
    "u_g",
    "g_r",
    "r_i",
    "i_z",
    "z_y",
    "rise_rate",
    "nondetections",
    "days_since_nondetection",
    "nondetection_maglim",
    "days_since_early_nondetection",
    "early_nondetection_maglim",
]
"""The names of the columns of `CurveSummary`."""


@dataclass(frozen=True, slots=True)
class OfCurve:
    """A number computed from the light curve up to the time of the alert: a column of `CurveSummary`."""

    name: CurveColumn


@dataclass(frozen=True, slots=True)
class Derived:
    """A column computed from other numbers: `formula` takes the values of `fields`, float64[N] each."""

    formula: Callable[..., Values]
    fields: tuple[Field | SoFar | OfCurve, ...]


Source = Field | SoFar | OfCurve | Derived


@dataclass(frozen=True, slots=True)
class Column:
    """A metadata column: its name, unit and meaning, and its source in the packets of each survey.

    A column without a source for a survey is NaN for all alerts of that survey.
    """

    name: str
    unit: str
    meaning: str
    ztf: Source | None = None
    lsst: Source | None = None

    def source(self, survey: Survey) -> Source | None:
        """Return the source of the column in packets of `survey`; None if the survey does not publish it."""
        return self.ztf if survey is Survey.ZTF else self.lsst


PointsOf = Callable[[NDArray[np.int64], Sequence[Values]], Points]
"""A function that makes light-curve points from row numbers of alerts, int64[M], and one float64[M] array per field."""


@dataclass(frozen=True, slots=True)
class Table:
    """An array of records in the packet, each item of which is a light-curve point. `fields`: paths within an item."""

    name: str
    fields: tuple[Field, ...]
    points: PointsOf


@dataclass(frozen=True, slots=True)
class SurveyFormat:
    """How a survey writes its alerts. All fields are named by their dotted paths.

    `signature`: the fields that a schema must have to be recognised as the survey's. `alert_ids`: fields of the alert's
    id; the first one that a record has is used. `object_ids`: fields of a numeric object id, used in the same way if
    the record has no `object_name` (text); 0 means that there is no object. `version`: the field of the schema version.
    `reliability_version`: the text field of the version of the survey's own real-bogus score; None if there is none.
    `known_versions`: the schema versions whose fields this module was written for; None if versions are not compared.
    `night_start`: the time of day at which a night begins, as a fraction of a day in the time scale of the survey.
    `place`: sources of MJD (d), right ascension (deg), declination (deg) and the index of the band. `cutouts`: the
    cutout fields in the order of `CUTOUTS`. `stamp`: the field inside a cutout that holds the FITS bytes; None if the
    cutout field itself holds the bytes. `stamps_centred`: whether a stamp smaller than its slot is centred in it.
    `own_fields`: the measurement of the alert itself, of which `own_points` makes a light-curve point. `tables`: the
    arrays that hold the other points. `detections_so_far`: computes the columns of `DetectionsSoFar` from the alert's
    own measurement and the first table; None if the survey has no such columns.
    """

    survey: Survey
    signature: frozenset[str]
    alert_ids: tuple[str, ...]
    object_ids: tuple[str, ...]
    object_name: str | None
    version: str
    reliability_version: str | None
    known_versions: frozenset[str] | None
    night_start: float
    place: tuple[Field | Derived, Field | Derived, Field | Derived, Field | Derived]
    cutouts: tuple[str, str, str]
    stamp: str | None
    stamps_centred: bool
    own_fields: tuple[Field, ...]
    own_points: PointsOf
    tables: tuple[Table, ...]
    detections_so_far: Callable[[Sequence[Values], NDArray[np.int64], Sequence[Values]], DetectionsSoFar] | None = None


def _ztf(name: str, missing: float | None = None, letter: bool = False) -> Field:
    return Field((f"candidate.{name}",), missing, letter)


def _lsst(*names: str) -> Field:
    return Field(tuple(f"diaSource.{name}" for name in names))


def _flag(*names: str) -> Derived:
    return Derived(flag, (Field(tuple(f"diaSource.{name}" for name in names), letter=True),))


ZTF_JD = _ztf("jd")
ZTF_FID = _ztf("fid", letter=True)
ZTF_RA = _ztf("ra", NO_VALUE)
ZTF_DEC = _ztf("dec", NO_VALUE)
ZTF_MAGPSF = _ztf("magpsf", NO_VALUE)
ZTF_SIGMAPSF = _ztf("sigmapsf", NO_VALUE)
ZTF_ISDIFFPOS = _ztf("isdiffpos", letter=True)
ZTF_DIFFMAGLIM = _ztf("diffmaglim", NO_VALUE)
ZTF_SSDISTNR = _ztf("ssdistnr", NO_VALUE)
ZTF_DRB = _ztf("drb", NO_VALUE)
ZTF_DISTNR = _ztf("distnr", NO_VALUE)
ZTF_MAGNR = _ztf("magnr", NO_VALUE)
ZTF_SIGMAGNR = _ztf("sigmagnr", NO_VALUE)
ZTF_NDETHIST = _ztf("ndethist")
ZTF_NCOVHIST = _ztf("ncovhist")
ZTF_JDSTARTHIST = _ztf("jdstarthist", NO_VALUE)
LSST_MJD = _lsst("midpointMjdTai")
LSST_RA = _lsst("ra")
LSST_DEC = _lsst("dec")
LSST_BAND = Field(("diaSource.band",), letter=True)
LSST_FLUX = _lsst("psfFlux")
LSST_FLUX_ERR = _lsst("psfFluxErr")

LSST_FIRST_MJD = Field(("diaObject.firstDiaSourceMjdTai",))
LSST_TEMPLATE_FLUX = _lsst("templateFlux")
LSST_SCIENCE_FLUX = _lsst("scienceFlux")
LSST_SCIENCE_FLUX_ERR = _lsst("scienceFluxErr")

_SS_OBJECT = Field(("ssSource.ssObjectId", "ssObject.ssObjectId"))
_SS_OBJECT_OF_SOURCE = _lsst("ssObjectId")


def _ztf_flux(magnitude: Values, isdiffpos: Values) -> Values:
    return sign(isdiffpos) * nanojansky(magnitude)


def _ztf_flux_err(magnitude: Values, error: Values) -> Values:
    return nanojansky(magnitude) * error / MAGNITUDES_PER_E


def _magnitude(flux: Values) -> Values:
    return ab_magnitude(np.abs(flux))


def _magnitude_err(flux: Values, error: Values) -> Values:
    return MAGNITUDES_PER_E * error / np.abs(flux)


def _ztf_sso(distance: Values) -> Values:
    return np.asarray((distance >= 0) & (distance <= SOLAR_SYSTEM_MATCH_ARCSEC), dtype=np.float64)


def _lsst_sso(match: Values, of_source: Values) -> Values:
    return np.asarray((np.nan_to_num(match) != 0) | (np.nan_to_num(of_source) != 0), dtype=np.float64)


def _age(time: Values, start: Values, first: Values) -> Values:
    return time - np.fmin(start, first)


def _ztf_nights(time: Values, start: Values, first: Values) -> Values:
    """Return the number of nights since the first detection. A night in California has one date in UTC."""
    return np.floor(time - MJD_EPOCH) - np.floor(np.fmin(start, first) - MJD_EPOCH)


def _lsst_nights(time: Values, start: Values, first: Values) -> Values:
    """Return the number of nights since the first detection. As for `day_obs`, a night in Chile begins at 12:00 UTC."""
    return np.floor(time - LSST_NIGHT_START) - np.floor(np.fmin(start, first) - LSST_NIGHT_START)


def _since_last_limit(days_since: Values, time: Values, start: Values, first: Values) -> Values:
    """Return the time from a non-detection, `days_since` days ago, to the first detection; NaN if it is later."""
    gap = days_since - _age(time, start, first)
    return np.where(gap > 0, gap, np.nan)


def _limit_before_first(limit: Values, days_since: Values, time: Values, start: Values, first: Values) -> Values:
    """Return `limit`, the depth of a non-detection, where `_since_last_limit` knows the time of the non-detection."""
    return np.where(np.isnan(_since_last_limit(days_since, time, start, first)), np.nan, limit)


def _ztf_apparent_flux(magnitude: Values, isdiffpos: Values, reference: Values, distance: Values) -> Values:
    """Return the flux of the difference plus that of the template's source, in nJy; NaN if there is no such source."""
    total = nanojansky(reference) + _ztf_flux(magnitude, isdiffpos)
    return np.where((distance < TEMPLATE_MATCH_ARCSEC) & (total > 0), total, np.nan)


def _ztf_apparent(magnitude: Values, isdiffpos: Values, reference: Values, distance: Values) -> Values:
    return ab_magnitude(_ztf_apparent_flux(magnitude, isdiffpos, reference, distance))


def _ztf_apparent_err(
    magnitude: Values, error: Values, isdiffpos: Values, reference: Values, reference_error: Values, distance: Values
) -> Values:
    """Return the 1-sigma uncertainty of `_ztf_apparent`; NaN if the template's uncertainty is the larger one.

    The variance of the template is subtracted, because the difference image holds the template's noise too.
    """
    variance = (nanojansky(magnitude) * error) ** 2 - (nanojansky(reference) * reference_error) ** 2
    return np.sqrt(variance) / _ztf_apparent_flux(magnitude, isdiffpos, reference, distance)


def _limiting_magnitude(error: Values) -> Values:
    return ab_magnitude(LIMIT_SIGMAS * error)


def _positive_magnitude(flux: Values) -> Values:
    return ab_magnitude(np.where(flux > 0, flux, np.nan))


def _positive_magnitude_err(flux: Values, error: Values) -> Values:
    return MAGNITUDES_PER_E * error / np.where(flux > 0, flux, np.nan)


def _positive(flux: Values) -> Values:
    return np.where(np.isnan(flux), np.nan, flux >= 0)


def _of_curve(name: CurveColumn) -> tuple[OfCurve, OfCurve]:
    """Return the source of a column that is computed in the same way for both surveys."""
    return OfCurve(name), OfCurve(name)


ZTF_START = (ZTF_JD, ZTF_JDSTARTHIST, SoFar("first_jd"))
LSST_START = (LSST_MJD, LSST_FIRST_MJD, OfCurve("first_mjd"))
"""The times from which `_age` is computed: that of the alert, the survey's first detection, the packet's first one."""

_EARLY_LIMIT = (OfCurve("early_nondetection_maglim"), OfCurve("days_since_early_nondetection"))
_OF_SAME_SIGN = "and with the sign of its flux"
_COLOUR = (
    "latest colour {0}-{1} of detections with the sign of the alert's flux, at most a day apart: of the latest one in "
    "each filter the earlier, and the nearest in time in the other filter"
)

COLUMNS: tuple[Column, ...] = (
    # Columns of both surveys, so that one filter expression works for both.
    Column(
        "magpsf",
        "mag",
        "AB magnitude of the absolute PSF flux in the difference image",
        ZTF_MAGPSF,
        Derived(_magnitude, (LSST_FLUX,)),
    ),
    Column(
        "sigmapsf",
        "mag",
        "1-sigma uncertainty of magpsf",
        ZTF_SIGMAPSF,
        Derived(_magnitude_err, (LSST_FLUX, LSST_FLUX_ERR)),
    ),
    Column(
        "psfFlux",
        "nJy",
        "PSF flux in the difference image",
        Derived(_ztf_flux, (ZTF_MAGPSF, ZTF_ISDIFFPOS)),
        LSST_FLUX,
    ),
    Column(
        "psfFluxErr",
        "nJy",
        "1-sigma uncertainty of psfFlux",
        Derived(_ztf_flux_err, (ZTF_MAGPSF, ZTF_SIGMAPSF)),
        LSST_FLUX_ERR,
    ),
    Column(
        "apparent_mag",
        "mag",
        "AB magnitude of the whole source, not of its difference from the template (ZTF: the difference added to the "
        "nearest source in the template, as by ALeRCE, null if that is 1.4 arcsec away or more; LSST: of scienceFlux)",
        Derived(_ztf_apparent, (ZTF_MAGPSF, ZTF_ISDIFFPOS, ZTF_MAGNR, ZTF_DISTNR)),
        Derived(_positive_magnitude, (LSST_SCIENCE_FLUX,)),
    ),
    Column(
        "apparent_mag_err",
        "mag",
        "1-sigma uncertainty of apparent_mag for a point source (ZTF: null if the uncertainty of the template's source "
        "exceeds that of the difference)",
        Derived(_ztf_apparent_err, (ZTF_MAGPSF, ZTF_SIGMAPSF, ZTF_ISDIFFPOS, ZTF_MAGNR, ZTF_SIGMAGNR, ZTF_DISTNR)),
        Derived(_positive_magnitude_err, (LSST_SCIENCE_FLUX, LSST_SCIENCE_FLUX_ERR)),
    ),
    Column(
        "snr",
        "",
        "signal-to-noise ratio of the detection",
        Derived(lambda error: MAGNITUDES_PER_E / error, (ZTF_SIGMAPSF,)),
        _lsst("snr"),
    ),
    Column(
        "isdiffpos",
        "1 or 0",
        "1 if the source is brighter than in the template, 0 if fainter",
        Derived(flag, (ZTF_ISDIFFPOS,)),
        Derived(_positive, (LSST_FLUX,)),
    ),
    Column(
        "sso",
        "1 or 0",
        "1 if the source is a known solar-system object (ZTF: if one is listed within 5 arcsec), else 0",
        Derived(_ztf_sso, (ZTF_SSDISTNR,)),
        Derived(_lsst_sso, (_SS_OBJECT, _SS_OBJECT_OF_SOURCE)),
    ),
    Column(
        "ndethist",
        "",
        "number of detections at this position (ZTF) or of this object (LSST) so far",
        ZTF_NDETHIST,
        Field(("diaObject.nDiaSources",)),
    ),
    Column("ra", "deg", "right ascension (ICRS)", ZTF_RA, LSST_RA),
    Column("dec", "deg", "declination (ICRS)", ZTF_DEC, LSST_DEC),
    *(
        Column(
            name,
            "deg",
            meaning,
            Derived(partial(coordinate, frame), (ZTF_RA, ZTF_DEC)),
            Derived(partial(coordinate, frame), (LSST_RA, LSST_DEC)),
        )
        for name, meaning, coordinate, frame in (
            ("galactic_l", "galactic longitude, 0 to 360", longitude, GALACTIC),
            ("galactic_b", "galactic latitude, -90 to 90", latitude, GALACTIC),
            ("ecliptic_l", "ecliptic longitude, 0 to 360 (mean ecliptic and equinox of J2000)", longitude, ECLIPTIC),
            ("ecliptic_b", "ecliptic latitude, -90 to 90 (mean ecliptic of J2000)", latitude, ECLIPTIC),
        )
    ),
    Column("xpos", "px", "x position of the source on the detector", _ztf("xpos"), _lsst("x")),
    Column("ypos", "px", "y position of the source on the detector", _ztf("ypos"), _lsst("y")),
    # ZTF: the survey's scores.
    Column("drb", "0 to 1", "real-bogus score of ZTF's neural network (braai)", ZTF_DRB),
    Column("rb", "0 to 1", "real-bogus score of ZTF's random forest", _ztf("rb", NO_VALUE)),
    Column("classtar", "0 to 1", "star (1) or galaxy (0) score of SExtractor", _ztf("classtar", NO_VALUE)),
    # ZTF: the exposure.
    Column("fid", "", "filter: 1 is g, 2 is r, 3 is i", Derived(ztf_filter, (ZTF_FID,))),
    Column("programid", "", "observing programme: 1 is public, 2 is partnership, 3 is Caltech", _ztf("programid")),
    Column("field", "", "number of the field in ZTF's sky grid", _ztf("field")),
    Column("rcid", "", "number of the readout channel, 0 to 63", _ztf("rcid")),
    Column(
        "exptime",
        "s",
        "exposure time (LSST: effective; published since schema 11.1)",
        _ztf("exptime", NO_VALUE),
        _lsst("exposureTime"),
    ),
    Column(
        "diffmaglim",
        "mag",
        "5-sigma limiting magnitude of the difference image (LSST: at the source, from psfFluxErr)",
        ZTF_DIFFMAGLIM,
        Derived(_limiting_magnitude, (LSST_FLUX_ERR,)),
    ),
    Column("magzpsci", "mag", "photometric zero point of the science image", _ztf("magzpsci", NO_VALUE)),
    Column("magzpsciunc", "mag", "1-sigma uncertainty of magzpsci", _ztf("magzpsciunc", NO_VALUE)),
    Column("magzpscirms", "mag", "RMS scatter of the calibrators about magzpsci", _ztf("magzpscirms", NO_VALUE)),
    Column("nmatches", "", "number of Pan-STARRS calibrators that were used", _ztf("nmatches", NO_VALUE)),
    Column("clrcoeff", "", "colour coefficient of the photometric calibration", _ztf("clrcoeff", NO_VALUE)),
    Column("clrcounc", "", "1-sigma uncertainty of clrcoeff", _ztf("clrcounc", NO_VALUE)),
    Column("zpclrcov", "", "covariance of magzpsci and clrcoeff", _ztf("zpclrcov", NO_VALUE)),
    Column("zpmed", "mag", "photometric zero point from the median of the calibrators", _ztf("zpmed", NO_VALUE)),
    Column(
        "clrmed", "mag", "median colour of the calibrators: g-r for fid 1 and 2, r-i for 3", _ztf("clrmed", NO_VALUE)
    ),
    Column("clrrms", "mag", "RMS scatter of the colours of the calibrators", _ztf("clrrms", NO_VALUE)),
    # ZTF: the source in the difference image.
    Column("chipsf", "", "reduced chi-square of the PSF fit", _ztf("chipsf", NO_VALUE)),
    Column(
        "magap",
        "mag",
        "aperture magnitude (aperture diameter 14 px; 8 px in early schemas)",
        _ztf("magap", NO_VALUE),
    ),
    Column("sigmagap", "mag", "1-sigma uncertainty of magap", _ztf("sigmagap", NO_VALUE)),
    Column("magapbig", "mag", "aperture magnitude (aperture diameter 18 px)", _ztf("magapbig", NO_VALUE)),
    Column("sigmagapbig", "mag", "1-sigma uncertainty of magapbig", _ztf("sigmagapbig", NO_VALUE)),
    Column("magdiff", "mag", "difference magap - magpsf", _ztf("magdiff", NO_VALUE)),
    Column("magfromlim", "mag", "difference diffmaglim - magap", _ztf("magfromlim", NO_VALUE)),
    Column("sky", "DN", "local sky background", _ztf("sky", NO_VALUE)),
    Column("fwhm", "px", "full width at half maximum of the source, for a Gaussian core", _ztf("fwhm", NO_VALUE)),
    Column("seeratio", "", "ratio of the FWHM of the difference image's PSF to fwhm", _ztf("seeratio", NO_VALUE)),
    Column("aimage", "px", "RMS of the source's profile along its major axis", _ztf("aimage", NO_VALUE)),
    Column("bimage", "px", "RMS of the source's profile along its minor axis", _ztf("bimage", NO_VALUE)),
    Column("aimagerat", "", "ratio aimage / fwhm", _ztf("aimagerat", NO_VALUE)),
    Column("bimagerat", "", "ratio bimage / fwhm", _ztf("bimagerat", NO_VALUE)),
    Column("elong", "", "elongation: ratio aimage / bimage", _ztf("elong", NO_VALUE)),
    Column("mindtoedge", "px", "distance to the nearest edge of the image", _ztf("mindtoedge", NO_VALUE)),
    Column("nneg", "", "number of negative pixels in the central 5 x 5 pixels", _ztf("nneg", NO_VALUE)),
    Column("nbad", "", "number of bad pixels in the central 5 x 5 pixels", _ztf("nbad", NO_VALUE)),
    Column(
        "sumrat",
        "",
        "ratio of the sum of the central 5 x 5 pixels to the sum of their absolute values",
        _ztf("sumrat", NO_VALUE),
    ),
    Column("scorr", "", "peak signal-to-noise ratio in the matched-filter image (ZOGY)", _ztf("scorr")),
    Column("dsnrms", "", "difference image at the source, over its standard deviation", _ztf("dsnrms")),
    Column(
        "ssnrms",
        "",
        "difference image convolved with its PSF at the source, over its standard deviation",
        _ztf("ssnrms"),
    ),
    Column("dsdiff", "", "difference dsnrms - ssnrms", _ztf("dsdiff")),
    Column("tooflag", "1 or 0", "1 if the exposure was for a target of opportunity, else 0", _ztf("tooflag")),
    # ZTF: the history at this position.
    Column("ncovhist", "", "number of exposures of this position so far", ZTF_NCOVHIST),
    Column("jdstarthist", "d", "Julian date of the first detection that ndethist counts", ZTF_JDSTARTHIST),
    Column("jdendhist", "d", "Julian date of the last detection that ndethist counts", _ztf("jdendhist", NO_VALUE)),
    # ZTF: BTSbot's features of the history (Rehemtulla et al. 2024, arXiv:2401.15167; `prep_alerts` in its code).
    # BTSbot is trained on all alerts of an object; a packet has those of the last 30 days, and `jdstarthist`. LSST's
    # packets have the detections of the last year; the time of the first detection is often null there.
    Column(
        "nnotdet",
        "",
        "number of exposures of this position without a detection so far (ZTF: ncovhist - ndethist; LSST: earlier "
        "forced photometry in the packet with an absolute flux below 3 sigma)",
        Derived(np.subtract, (ZTF_NCOVHIST, ZTF_NDETHIST)),
        OfCurve("nondetections"),
    ),
    Column(
        "age",
        "d",
        "time since the first detection (jdstarthist or firstDiaSourceMjdTai, or an earlier detection in the packet)",
        Derived(_age, ZTF_START),
        Derived(_age, LSST_START),
    ),
    Column(
        "nights_since_first",
        "",
        "number of nights since the night of the first detection: 0 in the first night (see age; nights are divided at "
        "0 h UTC for ZTF, at 12 h for LSST)",
        Derived(_ztf_nights, ZTF_START),
        Derived(_lsst_nights, LSST_START),
    ),
    Column(
        "days_since_peak",
        "d",
        "time since the brightest detection in the packet not later than the alert",
        Derived(np.subtract, (ZTF_JD, SoFar("peak_jd"))),
        Derived(np.subtract, (LSST_MJD, OfCurve("peak_mjd"))),
    ),
    Column(
        "days_to_peak",
        "d",
        "time from the first to the brightest detection: age - days_since_peak",
        Derived(_age, (SoFar("peak_jd"), ZTF_JDSTARTHIST, SoFar("first_jd"))),
        Derived(_age, (OfCurve("peak_mjd"), LSST_FIRST_MJD, OfCurve("first_mjd"))),
    ),
    Column(
        "peakmag_so_far",
        "mag",
        "magnitude, in any filter, of the brightest detection in the packet not later than the alert",
        SoFar("peak_magnitude"),
        Derived(_magnitude, (OfCurve("peak_flux"),)),
    ),
    Column(
        "maxmag_so_far",
        "mag",
        "magnitude, in any filter, of the faintest detection in the packet not later than the alert",
        SoFar("faintest_magnitude"),
        Derived(_magnitude, (OfCurve("faintest_flux"),)),
    ),
    # The light curve in the packet, up to the time of the alert.
    Column(
        "peak_flux",
        "nJy",
        "difference flux of the detection in the packet, not later than the alert, with the largest absolute flux",
        OfCurve("peak_flux"),
        OfCurve("peak_flux"),
    ),
    Column(
        "peak_band",
        "0 to 5",
        "filter of the detection of peak_flux: 0 is u, 1 is g, 2 is r, 3 is i, 4 is z, 5 is y",
        OfCurve("peak_band"),
        OfCurve("peak_band"),
    ),
    Column(
        "rise_rate",
        "nJy/d",
        "difference flux of the alert minus that of the latest measurement in the same filter that is at least half a "
        "day older (detection or forced photometry), over the time between: positive while the flux grows",
        OfCurve("rise_rate"),
        OfCurve("rise_rate"),
    ),
    Column(
        "peakmag_in_band",
        "mag",
        "magnitude of the brightest detection in the packet, not later than the alert, in the filter of the alert "
        f"{_OF_SAME_SIGN}",
        Derived(_magnitude, (OfCurve("band_peak_flux"),)),
        Derived(_magnitude, (OfCurve("band_peak_flux"),)),
    ),
    Column(
        "amplitude",
        "mag",
        "half the difference between the faintest and the brightest magnitude in the packet, not later than the "
        f"alert, in the filter of the alert {_OF_SAME_SIGN}; 0 if the alert is the only such detection",
        *_of_curve("amplitude"),
    ),
    Column(
        "rise_mag_rate",
        "mag/d",
        "rate at which the source brightens up to the peak: minus the slope of a line, fitted by weighted least "
        "squares to the magnitudes up to the brightest one, in the filter of the alert "
        f"{_OF_SAME_SIGN}; null if these detections span less than half a day",
        *_of_curve("rise_mag_rate"),
    ),
    Column("rise_mag_rate_err", "mag/d", "1-sigma uncertainty of rise_mag_rate", *_of_curve("rise_mag_rate_err")),
    Column(
        "decline_mag_rate",
        "mag/d",
        "rate at which the source fades from the peak on: the slope of a line, fitted by weighted least squares to "
        f"the magnitudes from the brightest one on, in the filter of the alert {_OF_SAME_SIGN}; null if these "
        "detections span less than half a day",
        *_of_curve("decline_mag_rate"),
    ),
    Column(
        "decline_mag_rate_err", "mag/d", "1-sigma uncertainty of decline_mag_rate", *_of_curve("decline_mag_rate_err")
    ),
    Column("u_g", "mag", _COLOUR.format("u", "g"), lsst=OfCurve("u_g")),
    Column("g_r", "mag", _COLOUR.format("g", "r"), *_of_curve("g_r")),
    Column("r_i", "mag", _COLOUR.format("r", "i"), *_of_curve("r_i")),
    Column("i_z", "mag", _COLOUR.format("i", "z"), lsst=OfCurve("i_z")),
    Column("z_y", "mag", _COLOUR.format("z", "y"), lsst=OfCurve("z_y")),
    Column(
        "nights",
        "",
        "number of nights with a detection in the packet, not later than the alert (ZTF: UTC days; LSST: days from "
        "12 h to 12 h UTC)",
        *_of_curve("nights"),
    ),
    Column(
        "days_since_nondet",
        "d",
        "time since the last non-detection in the packet before the alert: an upper limit, or forced photometry with "
        "an absolute flux below 3 sigma",
        OfCurve("days_since_nondetection"),
        OfCurve("days_since_nondetection"),
    ),
    Column(
        "nondet_maglim",
        "mag",
        "5-sigma limiting magnitude of the non-detection of days_since_nondet",
        OfCurve("nondetection_maglim"),
        OfCurve("nondetection_maglim"),
    ),
    Column(
        "days_nondet_to_first",
        "d",
        "time from the last non-detection before the first detection to the first detection; null if the packet has "
        "none, as in LSST's packets of 2026, whose forced photometry begins at the first detection",
        Derived(_since_last_limit, (OfCurve("days_since_early_nondetection"), *ZTF_START)),
        Derived(_since_last_limit, (OfCurve("days_since_early_nondetection"), *LSST_START)),
    ),
    Column(
        "maglim_before_first",
        "mag",
        "5-sigma limiting magnitude of the non-detection of days_nondet_to_first",
        Derived(_limit_before_first, (*_EARLY_LIMIT, *ZTF_START)),
        Derived(_limit_before_first, (*_EARLY_LIMIT, *LSST_START)),
    ),
    # BTSbot was trained on a rerun of braai d6_m9, which packets do not hold. Brokers that run BTSbot use drb instead.
    Column("new_drb", "0 to 1", "the same as drb, under the name that BTSbot uses", ZTF_DRB),
    # ZTF: the template.
    Column("distnr", "arcsec", "distance to the nearest source in the template", ZTF_DISTNR),
    Column("magnr", "mag", "magnitude of the nearest source in the template", ZTF_MAGNR),
    Column("sigmagnr", "mag", "1-sigma uncertainty of magnr", ZTF_SIGMAGNR),
    Column("chinr", "", "DAOPhot chi of the nearest source in the template", _ztf("chinr", NO_VALUE)),
    Column("sharpnr", "", "DAOPhot sharpness of the nearest source in the template", _ztf("sharpnr", NO_VALUE)),
    Column("ranr", "deg", "right ascension of the nearest source in the template", _ztf("ranr", NO_VALUE)),
    Column("decnr", "deg", "declination of the nearest source in the template", _ztf("decnr", NO_VALUE)),
    Column("jdstartref", "d", "Julian date of the template's first exposure", _ztf("jdstartref", NO_VALUE)),
    Column("jdendref", "d", "Julian date of the template's last exposure", _ztf("jdendref", NO_VALUE)),
    Column("nframesref", "", "number of exposures in the template", _ztf("nframesref", NO_VALUE)),
    # ZTF: catalogues.
    Column(
        "ssdistnr",
        "arcsec",
        "distance to the nearest known solar-system object within 30 arcsec (LSST: to the associated object)",
        ZTF_SSDISTNR,
        Field(("ssSource.ephOffset",)),
    ),
    Column(
        "ssmagnr",
        "mag",
        "predicted magnitude of the nearest known solar-system object within 30 arcsec (LSST: of the associated "
        "object, in V)",
        _ztf("ssmagnr", NO_VALUE),
        Field(("ssSource.ephVmag",), missing=0.0),
    ),
    *(
        Column(f"{name}{rank}", unit, f"{meaning} of Pan-STARRS source {rank}", _ztf(f"{name}{rank}", NO_VALUE))
        for rank in (1, 2, 3)
        for name, unit, meaning in (
            ("distpsnr", "arcsec", "distance to the alert"),
            ("sgscore", "0 to 1", "star (1) or galaxy (0) score"),
            ("sgmag", "mag", "g magnitude"),
            ("srmag", "mag", "r magnitude"),
            ("simag", "mag", "i magnitude"),
            ("szmag", "mag", "z magnitude"),
        )
    ),
    Column("nmtchps", "", "number of Pan-STARRS sources within 30 arcsec", _ztf("nmtchps", NO_VALUE)),
    Column("neargaia", "arcsec", "distance to the nearest Gaia source within 90 arcsec", _ztf("neargaia", NO_VALUE)),
    Column(
        "neargaiabright",
        "arcsec",
        "distance to the nearest Gaia source brighter than 14 mag within 90 arcsec",
        _ztf("neargaiabright", NO_VALUE),
    ),
    Column("maggaia", "mag", "G magnitude of the nearest Gaia source", _ztf("maggaia", NO_VALUE)),
    Column(
        "maggaiabright",
        "mag",
        "G magnitude of the nearest Gaia source brighter than 14 mag",
        _ztf("maggaiabright", NO_VALUE),
    ),
    # LSST.
    Column(
        "reliability",
        "0 to 1",
        "real-bogus score of LSST's neural network; `reliability_version` names the network",
        lsst=_lsst("reliability"),
    ),
    Column("extendedness", "0 to 1", "point-like (0) or extended (1) source", lsst=_lsst("extendedness")),
    Column(
        "isNegative",
        "1 or 0",
        "1 if the source was detected as significantly negative, else 0",
        lsst=_flag("isNegative", "is_negative"),
    ),
    Column("visit", "", "id of the visit (exposure)", lsst=_lsst("visit")),
    Column("detector", "", "number of the detector, 0 to 188", lsst=_lsst("detector")),
    Column("apFlux", "nJy", "flux in an aperture of radius 12 px in the difference image", lsst=_lsst("apFlux")),
    Column("apFluxErr", "nJy", "1-sigma uncertainty of apFlux", lsst=_lsst("apFluxErr")),
    Column("scienceFlux", "nJy", "forced PSF flux in the science image", lsst=LSST_SCIENCE_FLUX),
    Column("scienceFluxErr", "nJy", "1-sigma uncertainty of scienceFlux", lsst=LSST_SCIENCE_FLUX_ERR),
    Column("templateFlux", "nJy", "forced PSF flux in the template", lsst=LSST_TEMPLATE_FLUX),
    Column("templateFluxErr", "nJy", "1-sigma uncertainty of templateFlux", lsst=_lsst("templateFluxErr")),
    Column(
        "templatemag",
        "mag",
        "AB magnitude of templateFlux, the star or host at the source; null if that flux is not positive",
        lsst=Derived(_positive_magnitude, (LSST_TEMPLATE_FLUX,)),
    ),
    Column("bboxSize", "px", "side of the square around the detection's footprint", lsst=_lsst("bboxSize")),
    Column("centroid_flag", "1 or 0", "1 if the centroid fit failed, else 0", lsst=_flag("centroid_flag")),
    Column("psfFlux_flag", "1 or 0", "1 if the PSF fit failed, else 0", lsst=_flag("psfFlux_flag")),
    Column("shape_flag", "1 or 0", "1 if the measurement of the moments failed, else 0", lsst=_flag("shape_flag")),
    Column("psfChi2", "", "chi-square of the PSF fit", lsst=_lsst("psfChi2")),
    Column("psfNdata", "", "number of pixels in the PSF fit", lsst=_lsst("psfNdata")),
    Column("ixx", "arcsec^2", "adaptive second moment xx of the source", lsst=_lsst("ixx")),
    Column("iyy", "arcsec^2", "adaptive second moment yy of the source", lsst=_lsst("iyy")),
    Column("ixy", "arcsec^2", "adaptive second moment xy of the source", lsst=_lsst("ixy")),
    Column("ixxPSF", "arcsec^2", "adaptive second moment xx of the PSF", lsst=_lsst("ixxPSF")),
    Column("iyyPSF", "arcsec^2", "adaptive second moment yy of the PSF", lsst=_lsst("iyyPSF")),
    Column("ixyPSF", "arcsec^2", "adaptive second moment xy of the PSF", lsst=_lsst("ixyPSF")),
    Column("trailLength", "arcsec", "length in the trailed-source fit", lsst=_lsst("trailLength")),
    Column("trailFlux", "nJy", "flux in the trailed-source fit", lsst=_lsst("trailFlux")),
    Column(
        "trailAlgorithm",
        "",
        "algorithm that measured the trail: 1 is SDSSShape, 2 is HSMShape (published since schema 11.1)",
        lsst=_lsst("trailAlgorithm"),
    ),
    Column(
        "trail_flag",
        "1 or 0",
        "1 if the trailed-source fit failed, else 0 (published since schema 11.1)",
        lsst=_flag("trail_flag"),
    ),
    Column(
        "trail_flag_edge",
        "1 or 0",
        "1 if the trailed source extends onto or past the edge of the image, else 0",
        lsst=_flag("trail_flag_edge"),
    ),
    Column("dipoleLength", "arcsec", "separation of the lobes in the dipole fit", lsst=_lsst("dipoleLength")),
    Column(
        "dipoleMeanFlux", "nJy", "mean absolute flux of the two lobes in the dipole fit", lsst=_lsst("dipoleMeanFlux")
    ),
    Column("isDipole", "1 or 0", "1 if a dipole fits the source well, else 0", lsst=_flag("isDipole")),
    Column("glint_trail", "1 or 0", "1 if the source is part of a glint trail, else 0", lsst=_flag("glint_trail")),
    Column(
        "pixelFlags",
        "1 or 0",
        "1 if setting the pixel flags failed, so that some may be wrongly 0, else 0",
        lsst=_flag("pixelFlags"),
    ),
    Column(
        "pixelFlags_edge",
        "1 or 0",
        "1 if a part of the source is outside the usable image, else 0",
        lsst=_flag("pixelFlags_edge"),
    ),
    Column("pixelFlags_bad", "1 or 0", "1 if the source covers a bad pixel, else 0", lsst=_flag("pixelFlags_bad")),
    Column("pixelFlags_cr", "1 or 0", "1 if the source covers a cosmic ray, else 0", lsst=_flag("pixelFlags_cr")),
    Column(
        "pixelFlags_saturated",
        "1 or 0",
        "1 if the source covers a saturated pixel, else 0",
        lsst=_flag("pixelFlags_saturated"),
    ),
    Column(
        "pixelFlags_streak",
        "1 or 0",
        "1 if the source covers a satellite streak, else 0",
        lsst=_flag("pixelFlags_streak"),
    ),
    Column(
        "firstDiaSourceMjdTai",
        "d",
        "MJD (TAI) of the first detection of this object",
        lsst=LSST_FIRST_MJD,
    ),
    Column(
        "lastDiaSourceMjdTai",
        "d",
        "MJD (TAI) of the last detection of this object",
        lsst=Field(("diaObject.lastDiaSourceMjdTai",)),
    ),
)
"""All metadata columns. A value that is null in the packet is NaN, and so is the sentinel `missing` of the `Field`."""

DESIGNATION = TextColumn(
    "designation",
    "designation of a known solar-system object, as written in the packet: of the nearest one within 30 arcsec, at the "
    "distance ssdistnr (ZTF); of the associated one (LSST)",
    ztf=("candidate.ssnamenr",),
    lsst=("ssSource.designation", "mpc_orbits.designation", "MPCORB.mpcDesignation"),
)
"""A column of text, which a Decoder delivers as `AlertBatch.designation` if its name is among the wanted columns."""
NO_DESIGNATION = ("", "null")
"""Designations that stand for none; ZTF writes null as text."""

DEFAULT_COLUMNS: tuple[str, ...] = tuple(column.name for column in COLUMNS)
"""The columns that a Decoder delivers by default: all numbers."""

_COLUMN = {column.name: column for column in COLUMNS}


def select_columns(names: Iterable[str]) -> tuple[Column, ...]:
    """Return the columns with these names, in the same order.

    Raises ValueError, which lists the names that do not exist.
    """
    names = tuple(names)
    unknown = [name for name in names if name not in _COLUMN]
    if unknown:
        raise ValueError(f"unknown metadata columns: {', '.join(unknown)}; surveys.COLUMNS lists the columns")
    return tuple(_COLUMN[name] for name in names)


ZTF = SurveyFormat(
    survey=Survey.ZTF,
    # Other surveys reuse the other field names of ZTF; only ZTF has a readout channel (rcid).
    signature=frozenset({"objectId", *(f"candidate.{name}" for name in ("jd", "fid", "rcid", "ra", "dec", "magpsf"))}),
    alert_ids=("candid", "candidate.candid"),
    object_ids=(),
    object_name="objectId",
    version="schemavsn",
    reliability_version=None,
    known_versions=None,
    night_start=0.0,  # UTC midnight is 4 pm at Palomar
    place=(Derived(lambda jd: jd - MJD_EPOCH, (ZTF_JD,)), ZTF_RA, ZTF_DEC, Derived(ztf_band, (ZTF_FID,))),
    cutouts=("cutoutScience", "cutoutTemplate", "cutoutDifference"),
    stamp="stampData",
    stamps_centred=False,
    own_fields=(ZTF_JD, ZTF_FID, ZTF_MAGPSF, ZTF_SIGMAPSF, ZTF_ISDIFFPOS, ZTF_DIFFMAGLIM),
    own_points=ztf_detections,
    tables=(
        Table(
            "prv_candidates",
            (
                Field(("jd",)),
                Field(("fid",), letter=True),
                Field(("magpsf",)),
                Field(("sigmapsf",)),
                Field(("isdiffpos",), letter=True),
                Field(("diffmaglim",)),
            ),
            ztf_detections,
        ),
        Table(
            "fp_hists",
            (
                Field(("jd",)),
                Field(("fid",), letter=True),
                Field(("forcediffimflux",)),
                Field(("forcediffimfluxunc",)),
                Field(("magzpsci",)),
            ),
            ztf_forced,
        ),
    ),
    detections_so_far=ztf_detections_so_far,
)

LSST_VERSIONS = frozenset(
    {UNVERSIONED, "7.0", "7.1", "7.2", "7.3", "7.4", "8.0", "9.0", "10.0", "10.1", "11.0", "11.1"}
)
"""The schema versions of LSST that the columns were written for. An alert of another version is decoded by its own
schema: a field that was renamed in it is then missing."""

_LSST_POINT = (
    Field(("midpointMjdTai",)),
    Field(("band",), letter=True),
    Field(("psfFlux",)),
    Field(("psfFluxErr",)),
)

LSST = SurveyFormat(
    survey=Survey.LSST,
    signature=frozenset({f"diaSource.{name}" for name in ("diaSourceId", "midpointMjdTai", "ra", "dec", "psfFlux")}),
    alert_ids=("diaSourceId", "diaSource.diaSourceId", "alertId"),
    object_ids=(
        "diaObject.diaObjectId",
        "diaSource.diaObjectId",
        "ssSource.ssObjectId",
        "ssObject.ssObjectId",
        "diaSource.ssObjectId",
    ),
    object_name=None,
    version="lsst_schema_version",
    reliability_version="diaSource.reliabilityVersion",
    known_versions=LSST_VERSIONS,
    night_start=LSST_NIGHT_START,
    place=(LSST_MJD, LSST_RA, LSST_DEC, Derived(letter_band, (LSST_BAND,))),
    cutouts=("cutoutScience", "cutoutTemplate", "cutoutDifference"),
    stamp=None,
    stamps_centred=True,
    own_fields=(LSST_MJD, LSST_BAND, LSST_FLUX, LSST_FLUX_ERR),
    own_points=lsst_detections,
    tables=(
        Table("prvDiaSources", _LSST_POINT, lsst_detections),
        Table("prvDiaForcedSources", _LSST_POINT, lsst_forced),
    ),
)


FORMATS: tuple[SurveyFormat, ...] = (ZTF, LSST)
"""The formats of all surveys that can be decoded."""

_KNOWN_VERSIONS = {survey_format.survey: survey_format.known_versions for survey_format in FORMATS}


def rows_of_unknown_version(alerts: AlertBatch) -> list[int]:
    """Return the rows of the alerts whose schema version is not among the `known_versions` of their survey."""
    versions = list(zip(alerts.survey.tolist(), alerts.schema_version, strict=True))
    unknown = {
        (survey, version)
        for survey, version in set(versions)
        if (known := _KNOWN_VERSIONS[Survey(survey)]) is not None and version not in known
    }
    return [row for row, pair in enumerate(versions) if pair in unknown] if unknown else []


def recognise(paths: Collection[str]) -> SurveyFormat | None:
    """Return the survey format whose signature is among `paths`, or None for an unknown survey.

    `paths`: see `plan.field_paths`.
    """
    return next((known for known in FORMATS if known.signature <= set(paths)), None)


_WITHOUT_CUTOUTS = {
    "Babamul (BOOM)": (
        frozenset({"candid", "objectId", "candidate.diaSourceId", "candidate.midpointMjdTai", "properties"}),
        frozenset({"candid", "objectId", "candidate.dia_source", "properties"}),
    )
}
"""Brokers whose LSST alerts have other fields than the survey's and no cutouts, each with the fields by which its
alerts are recognised (https://github.com/boom-astro/boom)."""


def broker_without_cutouts(paths: Collection[str]) -> str | None:
    """Return the name of the broker that wrote an LSST alert without cutouts, or None if no known broker did.

    `paths`: the fields of the alert; see `plan.field_paths`.
    """
    if any(path.startswith("cutout") for path in paths):
        return None
    return next(
        (broker for broker, forms in _WITHOUT_CUTOUTS.items() if any(form <= set(paths) for form in forms)), None
    )


CATALOGUE_COLUMNS = {
    "diaSource": frozenset({"diaSourceId", "ra", "dec"}),
    "diaObject": frozenset({"diaObjectId", "ra", "dec"}),
}
"""The columns by which a catalogue of LSST sources or objects is recognised, by the record of an alert that holds them.

Rubin's HATS catalogues hold objects with nested sources (`dia_object_lc`), and no cutouts
(https://github.com/lsst-sitcom/linccf, dash_doc).
"""


def catalogue_of(columns: Collection[str]) -> str | None:
    """Return the record of an LSST alert, a key of CATALOGUE_COLUMNS, whose fields are the columns of a catalogue.

    Returns None if the columns are those of no known catalogue.
    """
    return next((record for record, known in CATALOGUE_COLUMNS.items() if known <= set(columns)), None)
