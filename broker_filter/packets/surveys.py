"""What ZTF and LSST call things: by which fields a survey is known, its ids, and the table of metadata columns.

Tables and formulae only. Must never say where a field stands in a packet: packets are read by name (see `plan`).

Sources: ZTF alert schema 4.02 (https://zwickytransientfacility.github.io/ztf-avro-alert/schema.html); LSST alert
schemas 7.0 to 11.0 (https://github.com/lsst/alert_packet).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import Survey
from broker_filter.packets.photometry import (
    AB_ZERO_POINT,
    MAGNITUDES_PER_E,
    MJD_EPOCH,
    NO_VALUE,
    DetectionsSoFar,
    Points,
    Values,
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

SOLAR_SYSTEM_MATCH_ARCSEC = 5.0
"""ZTF lists known solar-system objects up to 30 arcsec away; as in Fink, within 5 it is the alert's source."""


@dataclass(frozen=True, slots=True)
class Field:
    """A number in a packet: the dotted paths that it goes by, of which the schema's first is read.

    `missing` is the survey's sentinel, read as NaN besides null; `letter`: a string is read as its first byte's code.
    """

    paths: tuple[str, ...]
    missing: float | None = None
    letter: bool = False


@dataclass(frozen=True, slots=True)
class SoFar:
    """A number that the packet's history up to the alert comes to: a column of `DetectionsSoFar`."""

    name: Literal["first_jd", "peak_jd", "peak_magnitude", "faintest_magnitude"]


@dataclass(frozen=True, slots=True)
class Derived:
    """A column computed from fields and histories: `formula` takes their values, [N] each."""

    formula: Callable[..., Values]
    fields: tuple[Field | SoFar, ...]


Source = Field | SoFar | Derived


@dataclass(frozen=True, slots=True)
class Column:
    """A metadata column: its name, unit and meaning, and where each survey has it (None: NaN for that survey)."""

    name: str
    unit: str
    meaning: str
    ztf: Source | None = None
    lsst: Source | None = None

    def source(self, survey: Survey) -> Source | None:
        """Where `survey` has it."""
        return self.ztf if survey is Survey.ZTF else self.lsst


PointsOf = Callable[[NDArray[np.int64], Sequence[Values]], Points]
"""Makes points of the alerts' rows and the values of the fields it is declared with."""


@dataclass(frozen=True, slots=True)
class Table:
    """An array of records in the packet whose items are points of the light curve."""

    name: str
    fields: tuple[Field, ...]  # paths within the item
    points: PointsOf


@dataclass(frozen=True, slots=True)
class SurveyFormat:
    """How a survey writes its alerts.

    `signature`: the fields by which its schema is known. Of `alert_ids` the first that the record has is taken, and
    so of `object_ids` (numbers, 0 being none) where there is no `object_name` (text). `version`: where the record
    itself says it. `place`: MJD, right ascension, declination (degrees) and the band's index. `cutouts`: field names
    in the order of `CUTOUTS`; `stamp`: the field inside them that holds the FITS bytes, None where they are the bytes
    themselves. `own_fields`: the alert's own measurement, a point of its light curve besides those of `tables`.
    `detections_so_far`: sums it and the first table up, where the survey has such columns.
    """

    survey: Survey
    signature: frozenset[str]
    alert_ids: tuple[str, ...]
    object_ids: tuple[str, ...]
    object_name: str | None
    version: str
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
ZTF_NDETHIST = _ztf("ndethist")
ZTF_NCOVHIST = _ztf("ncovhist")
ZTF_JDSTARTHIST = _ztf("jdstarthist", NO_VALUE)
LSST_MJD = _lsst("midpointMjdTai")
LSST_RA = _lsst("ra")
LSST_DEC = _lsst("dec")
LSST_BAND = Field(("diaSource.band",), letter=True)
LSST_FLUX = _lsst("psfFlux")
LSST_FLUX_ERR = _lsst("psfFluxErr")

_SS_OBJECT = Field(("ssSource.ssObjectId", "ssObject.ssObjectId"))
_SS_OBJECT_OF_SOURCE = _lsst("ssObjectId")


def _ztf_flux(magnitude: Values, isdiffpos: Values) -> Values:
    return sign(isdiffpos) * nanojansky(magnitude)


def _ztf_flux_err(magnitude: Values, error: Values) -> Values:
    return nanojansky(magnitude) * error / MAGNITUDES_PER_E


def _magnitude(flux: Values) -> Values:
    return AB_ZERO_POINT - 2.5 * np.log10(np.abs(flux))


def _magnitude_err(flux: Values, error: Values) -> Values:
    return MAGNITUDES_PER_E * error / np.abs(flux)


def _ztf_sso(distance: Values) -> Values:
    return np.asarray((distance >= 0) & (distance <= SOLAR_SYSTEM_MATCH_ARCSEC), dtype=np.float64)


def _lsst_sso(match: Values, of_source: Values) -> Values:
    return np.asarray((np.nan_to_num(match) != 0) | (np.nan_to_num(of_source) != 0), dtype=np.float64)


def _age(jd: Values, start: Values, first: Values) -> Values:
    return jd - np.fmin(start, first)


def _positive(flux: Values) -> Values:
    return np.where(np.isnan(flux), np.nan, flux >= 0)


COLUMNS: tuple[Column, ...] = (
    # Both surveys, so that one filter serves both.
    Column(
        "magpsf", "mag", "PSF magnitude of the absolute difference flux", ZTF_MAGPSF, Derived(_magnitude, (LSST_FLUX,))
    ),
    Column("sigmapsf", "mag", "its error", ZTF_SIGMAPSF, Derived(_magnitude_err, (LSST_FLUX, LSST_FLUX_ERR))),
    Column("psfFlux", "nJy", "PSF difference flux", Derived(_ztf_flux, (ZTF_MAGPSF, ZTF_ISDIFFPOS)), LSST_FLUX),
    Column("psfFluxErr", "nJy", "its error", Derived(_ztf_flux_err, (ZTF_MAGPSF, ZTF_SIGMAPSF)), LSST_FLUX_ERR),
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
        "brighter (1) or fainter (0) than the template",
        Derived(flag, (ZTF_ISDIFFPOS,)),
        Derived(_positive, (LSST_FLUX,)),
    ),
    Column(
        "sso",
        "1 or 0",
        "is a known solar-system object (ZTF: one is listed within 5 arcsec)",
        Derived(_ztf_sso, (ZTF_SSDISTNR,)),
        Derived(_lsst_sso, (_SS_OBJECT, _SS_OBJECT_OF_SOURCE)),
    ),
    Column("ndethist", "", "detections at this position so far", ZTF_NDETHIST, Field(("diaObject.nDiaSources",))),
    Column("ra", "deg", "right ascension (ICRS)", ZTF_RA, LSST_RA),
    Column("dec", "deg", "declination (ICRS)", ZTF_DEC, LSST_DEC),
    Column("xpos", "px", "position on the detector", _ztf("xpos"), _lsst("x")),
    Column("ypos", "px", "position on the detector", _ztf("ypos"), _lsst("y")),
    # ZTF: the survey's scores.
    Column("drb", "0 to 1", "real-bogus score of the survey's network (braai)", ZTF_DRB),
    Column("rb", "0 to 1", "real-bogus score of the survey's random forest", _ztf("rb", NO_VALUE)),
    Column("classtar", "0 to 1", "star/galaxy score of SExtractor", _ztf("classtar", NO_VALUE)),
    # ZTF: the exposure.
    Column("fid", "", "filter: 1 g, 2 r, 3 i", Derived(ztf_filter, (ZTF_FID,))),
    Column("programid", "", "1 public, 2 partnership, 3 Caltech", _ztf("programid")),
    Column("field", "", "field of the sky grid", _ztf("field")),
    Column("rcid", "", "readout channel, 0 to 63", _ztf("rcid")),
    Column("exptime", "s", "exposure time", _ztf("exptime", NO_VALUE)),
    Column("diffmaglim", "mag", "5-sigma limit of the difference image", ZTF_DIFFMAGLIM),
    Column("magzpsci", "mag", "photometric zero point", _ztf("magzpsci", NO_VALUE)),
    Column("magzpsciunc", "mag", "its error", _ztf("magzpsciunc", NO_VALUE)),
    Column("magzpscirms", "mag", "scatter about the calibration", _ztf("magzpscirms", NO_VALUE)),
    Column("nmatches", "", "stars in the calibration", _ztf("nmatches", NO_VALUE)),
    Column("clrcoeff", "", "colour coefficient of the calibration", _ztf("clrcoeff", NO_VALUE)),
    Column("clrcounc", "", "its error", _ztf("clrcounc", NO_VALUE)),
    Column("zpclrcov", "", "covariance of zero point and colour coefficient", _ztf("zpclrcov", NO_VALUE)),
    Column("zpmed", "mag", "median zero point", _ztf("zpmed", NO_VALUE)),
    Column("clrmed", "mag", "median colour of the calibrators", _ztf("clrmed", NO_VALUE)),
    Column("clrrms", "mag", "scatter of their colours", _ztf("clrrms", NO_VALUE)),
    # ZTF: the source in the difference image.
    Column("chipsf", "", "reduced chi-square of the PSF fit", _ztf("chipsf", NO_VALUE)),
    Column("magap", "mag", "aperture magnitude, 8 px", _ztf("magap", NO_VALUE)),
    Column("sigmagap", "mag", "its error", _ztf("sigmagap", NO_VALUE)),
    Column("magapbig", "mag", "aperture magnitude, 18 px", _ztf("magapbig", NO_VALUE)),
    Column("sigmagapbig", "mag", "its error", _ztf("sigmagapbig", NO_VALUE)),
    Column("magdiff", "mag", "magap - magpsf", _ztf("magdiff", NO_VALUE)),
    Column("magfromlim", "mag", "diffmaglim - magap", _ztf("magfromlim", NO_VALUE)),
    Column("sky", "DN", "local background", _ztf("sky", NO_VALUE)),
    Column("fwhm", "px", "full width at half maximum", _ztf("fwhm", NO_VALUE)),
    Column("seeratio", "", "fwhm over the image's seeing", _ztf("seeratio", NO_VALUE)),
    Column("aimage", "px", "windowed major axis", _ztf("aimage", NO_VALUE)),
    Column("bimage", "px", "windowed minor axis", _ztf("bimage", NO_VALUE)),
    Column("aimagerat", "", "aimage / fwhm", _ztf("aimagerat", NO_VALUE)),
    Column("bimagerat", "", "bimage / fwhm", _ztf("bimagerat", NO_VALUE)),
    Column("elong", "", "aimage / bimage", _ztf("elong", NO_VALUE)),
    Column("mindtoedge", "px", "distance to the nearest edge", _ztf("mindtoedge", NO_VALUE)),
    Column("nneg", "", "negative pixels in 5 x 5", _ztf("nneg", NO_VALUE)),
    Column("nbad", "", "bad pixels in 5 x 5", _ztf("nbad", NO_VALUE)),
    Column("sumrat", "", "sum over sum of absolutes of the stamp's pixels", _ztf("sumrat", NO_VALUE)),
    Column("scorr", "", "peak of the match-filtered image (ZOGY)", _ztf("scorr")),
    Column("dsnrms", "", "difference of S/N over its scatter", _ztf("dsnrms")),
    Column("ssnrms", "", "sum of S/N over its scatter", _ztf("ssnrms")),
    Column("dsdiff", "", "dsnrms - ssnrms", _ztf("dsdiff")),
    Column("tooflag", "1 or 0", "target of opportunity", _ztf("tooflag")),
    # ZTF: the history at this position.
    Column("ncovhist", "", "exposures of this position so far", ZTF_NCOVHIST),
    Column("jdstarthist", "d", "Julian date of the first detection", ZTF_JDSTARTHIST),
    Column("jdendhist", "d", "Julian date of the last detection", _ztf("jdendhist", NO_VALUE)),
    # ZTF: what BTSbot makes of the history (Rehemtulla et al. 2024, arXiv:2401.15167; `prep_alerts` in its code). It is
    # trained on all the alerts of an object: a packet has the last 30 days, and `jdstarthist` of the rest.
    Column(
        "nnotdet",
        "",
        "exposures of this position without a detection so far: ncovhist - ndethist",
        Derived(np.subtract, (ZTF_NCOVHIST, ZTF_NDETHIST)),
    ),
    Column(
        "age",
        "d",
        "since the first detection: jdstarthist, or an earlier one in the packet",
        Derived(_age, (ZTF_JD, ZTF_JDSTARTHIST, SoFar("first_jd"))),
    ),
    Column(
        "days_since_peak",
        "d",
        "since the brightest detection in the packet, up to and including the alert",
        Derived(np.subtract, (ZTF_JD, SoFar("peak_jd"))),
    ),
    Column(
        "days_to_peak",
        "d",
        "from the first detection to the brightest: age - days_since_peak",
        Derived(_age, (SoFar("peak_jd"), ZTF_JDSTARTHIST, SoFar("first_jd"))),
    ),
    Column("peakmag_so_far", "mag", "brightest of the same detections, in any filter", SoFar("peak_magnitude")),
    Column("maxmag_so_far", "mag", "faintest of them", SoFar("faintest_magnitude")),
    # Trained on a rerun of braai d6_m9, which no packet holds: brokers that run BTSbot give it the packet's drb, too.
    Column("new_drb", "0 to 1", "the survey's drb, by the name that BTSbot has for it", ZTF_DRB),
    # ZTF: the template.
    Column("distnr", "arcsec", "nearest source in the template", _ztf("distnr", NO_VALUE)),
    Column("magnr", "mag", "its magnitude", _ztf("magnr", NO_VALUE)),
    Column("sigmagnr", "mag", "its error", _ztf("sigmagnr", NO_VALUE)),
    Column("chinr", "", "its DAOPhot chi", _ztf("chinr", NO_VALUE)),
    Column("sharpnr", "", "its DAOPhot sharpness", _ztf("sharpnr", NO_VALUE)),
    Column("ranr", "deg", "its right ascension", _ztf("ranr", NO_VALUE)),
    Column("decnr", "deg", "its declination", _ztf("decnr", NO_VALUE)),
    Column("jdstartref", "d", "first exposure of the template", _ztf("jdstartref", NO_VALUE)),
    Column("jdendref", "d", "last exposure of the template", _ztf("jdendref", NO_VALUE)),
    Column("nframesref", "", "exposures in the template", _ztf("nframesref", NO_VALUE)),
    # ZTF: catalogues.
    Column("ssdistnr", "arcsec", "nearest known solar-system object within 30", ZTF_SSDISTNR),
    Column("ssmagnr", "mag", "its predicted magnitude", _ztf("ssmagnr", NO_VALUE)),
    *(
        Column(f"{name}{rank}", unit, f"{meaning} of Pan-STARRS source {rank}", _ztf(f"{name}{rank}", NO_VALUE))
        for rank in (1, 2, 3)
        for name, unit, meaning in (
            ("distpsnr", "arcsec", "distance"),
            ("sgscore", "0 to 1", "star (1) or galaxy (0) score"),
            ("sgmag", "mag", "g magnitude"),
            ("srmag", "mag", "r magnitude"),
            ("simag", "mag", "i magnitude"),
            ("szmag", "mag", "z magnitude"),
        )
    ),
    Column("nmtchps", "", "Pan-STARRS sources within 30 arcsec", _ztf("nmtchps", NO_VALUE)),
    Column("neargaia", "arcsec", "nearest Gaia source", _ztf("neargaia", NO_VALUE)),
    Column("neargaiabright", "arcsec", "nearest Gaia source brighter than 14 mag", _ztf("neargaiabright", NO_VALUE)),
    Column("maggaia", "mag", "G of the nearest Gaia source", _ztf("maggaia", NO_VALUE)),
    Column("maggaiabright", "mag", "G of the nearest bright one", _ztf("maggaiabright", NO_VALUE)),
    # LSST.
    Column("reliability", "0 to 1", "real-bogus score of the survey's network", lsst=_lsst("reliability")),
    Column("extendedness", "0 to 1", "point-like (0) or extended (1)", lsst=_lsst("extendedness")),
    Column("isNegative", "1 or 0", "detected as a negative source", lsst=_flag("isNegative", "is_negative")),
    Column("visit", "", "exposure", lsst=_lsst("visit")),
    Column("detector", "", "detector, 0 to 188", lsst=_lsst("detector")),
    Column("apFlux", "nJy", "aperture difference flux", lsst=_lsst("apFlux")),
    Column("apFluxErr", "nJy", "its error", lsst=_lsst("apFluxErr")),
    Column("scienceFlux", "nJy", "PSF flux on the science image", lsst=_lsst("scienceFlux")),
    Column("scienceFluxErr", "nJy", "its error", lsst=_lsst("scienceFluxErr")),
    Column("templateFlux", "nJy", "PSF flux on the template", lsst=_lsst("templateFlux")),
    Column("templateFluxErr", "nJy", "its error", lsst=_lsst("templateFluxErr")),
    Column("psfChi2", "", "chi-square of the PSF fit", lsst=_lsst("psfChi2")),
    Column("psfNdata", "", "pixels in the PSF fit", lsst=_lsst("psfNdata")),
    Column("ixx", "px^2", "second moment of the source", lsst=_lsst("ixx")),
    Column("iyy", "px^2", "second moment of the source", lsst=_lsst("iyy")),
    Column("ixy", "px^2", "second moment of the source", lsst=_lsst("ixy")),
    Column("ixxPSF", "px^2", "second moment of the PSF", lsst=_lsst("ixxPSF")),
    Column("iyyPSF", "px^2", "second moment of the PSF", lsst=_lsst("iyyPSF")),
    Column("ixyPSF", "px^2", "second moment of the PSF", lsst=_lsst("ixyPSF")),
    Column("trailLength", "arcsec", "length of the trail fitted", lsst=_lsst("trailLength")),
    Column("trailFlux", "nJy", "flux of the trail fitted", lsst=_lsst("trailFlux")),
    Column("dipoleLength", "arcsec", "separation of the dipole fitted", lsst=_lsst("dipoleLength")),
    Column("dipoleMeanFlux", "nJy", "mean flux of its lobes", lsst=_lsst("dipoleMeanFlux")),
    Column("isDipole", "1 or 0", "is a dipole", lsst=_flag("isDipole")),
    Column("glint_trail", "1 or 0", "belongs to a trail of glints", lsst=_flag("glint_trail")),
    Column("pixelFlags", "1 or 0", "pixel flags could not be read", lsst=_flag("pixelFlags")),
    Column("pixelFlags_edge", "1 or 0", "reaches off the detector", lsst=_flag("pixelFlags_edge")),
    Column("pixelFlags_bad", "1 or 0", "covers bad pixels", lsst=_flag("pixelFlags_bad")),
    Column("pixelFlags_cr", "1 or 0", "covers a cosmic ray", lsst=_flag("pixelFlags_cr")),
    Column("pixelFlags_saturated", "1 or 0", "covers saturated pixels", lsst=_flag("pixelFlags_saturated")),
    Column("pixelFlags_streak", "1 or 0", "covers a satellite's streak", lsst=_flag("pixelFlags_streak")),
    Column("firstDiaSourceMjdTai", "d", "MJD of the first detection", lsst=Field(("diaObject.firstDiaSourceMjdTai",))),
    Column("lastDiaSourceMjdTai", "d", "MJD of the last detection", lsst=Field(("diaObject.lastDiaSourceMjdTai",))),
)
"""Every metadata column there is. Null is NaN; so is -999 where the column's source says so."""

DEFAULT_COLUMNS: tuple[str, ...] = tuple(column.name for column in COLUMNS)
"""What a Decoder delivers unless told otherwise: all of them."""

_COLUMN = {column.name: column for column in COLUMNS}


def select_columns(names: Iterable[str]) -> tuple[Column, ...]:
    """The columns called `names`. Raises ValueError naming those that do not exist."""
    names = tuple(names)
    unknown = [name for name in names if name not in _COLUMN]
    if unknown:
        raise ValueError(f"no such metadata columns: {', '.join(unknown)}")
    return tuple(_COLUMN[name] for name in names)


ZTF = SurveyFormat(
    survey=Survey.ZTF,
    # The readout channel is ZTF's own: other surveys took over the rest of its names.
    signature=frozenset({"objectId", *(f"candidate.{name}" for name in ("jd", "fid", "rcid", "ra", "dec", "magpsf"))}),
    alert_ids=("candid", "candidate.candid"),
    object_ids=(),
    object_name="objectId",
    version="schemavsn",
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
"""The surveys that are understood."""


def recognise(paths: Collection[str]) -> SurveyFormat | None:
    """The survey whose alerts have fields at `paths` (see `plan.field_paths`), None for an unknown one."""
    return next((known for known in FORMATS if known.signature <= set(paths)), None)
