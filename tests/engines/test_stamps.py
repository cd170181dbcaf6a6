"""Real-bogus scores from cutouts alone are those of whole alerts."""

from __future__ import annotations

import gzip

import numpy as np
import pyarrow as pa
import pytest

from broker_filter.engines.stamps import real_bogus
from broker_filter.streaming.filtering import BATCH_SIZE

CUTOUTS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")


def stamps(table: pa.Table) -> list[list[bytes]]:
    return [[stamp["stampData"] for stamp in table[name].to_pylist()] for name in CUTOUTS]


def test_the_scores_are_those_of_whole_alerts(fink_ztf: pa.Table, expected: dict[str, pa.Table]) -> None:
    scores = real_bogus(*stamps(fink_ztf))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected["ztf"]["default__real"].to_numpy())


def test_a_bad_stamp_gives_nan_and_harms_no_other_alert(fink_ztf: pa.Table) -> None:
    science, template, difference = stamps(fink_ztf)
    whole = real_bogus(science, template, difference)
    bad = [None, b"", b"no FITS", science[3][:100], gzip.compress(b"no FITS"), gzip.decompress(science[5])]
    scores = real_bogus([*bad, *science[6:]], template, difference)
    assert np.isnan(scores[: len(bad)]).all()
    np.testing.assert_array_equal(scores[len(bad) :], whole[len(bad) :])


def test_more_alerts_than_a_batch_keep_their_order(fink_ztf: pa.Table) -> None:
    columns = stamps(fink_ztf)
    repeats = BATCH_SIZE // len(fink_ztf) + 2
    many = real_bogus(*(column * repeats for column in columns))
    np.testing.assert_array_equal(many, np.tile(real_bogus(*columns), repeats))
    assert real_bogus([], [], []).shape == (0,)


def test_stamps_of_lsst_have_no_score(fink_lsst: pa.Table) -> None:
    assert np.isnan(real_bogus(*(fink_lsst[name].to_pylist() for name in CUTOUTS))).all()


def test_a_column_that_holds_no_bytes_is_an_error() -> None:
    with pytest.raises(TypeError, match="of type str, not bytes"):
        real_bogus(["stamp"], ["stamp"], ["stamp"])
