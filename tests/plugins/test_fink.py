"""The functions of the plugin for Fink, on columns of pandas as Spark passes them; without Spark.

`test_fink_science.py` runs the science modules in Spark.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from broker_filter.plugins.fink import ColumnError, open_rubin, open_ztf, real_bogus_rubin, real_bogus_ztf

from ..engines.conftest import expected, fink_lsst, fink_ztf, lsst, ztf

__all__ = ["expected", "fink_lsst", "fink_ztf", "lsst", "ztf"]
STAMPS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")


def ztf_columns(table: pa.Table) -> list[pd.Series]:
    return [pd.Series([stamp["stampData"] for stamp in table[name].to_pylist()], dtype=object) for name in STAMPS]


def rubin_columns(table: pa.Table) -> tuple[pd.DataFrame, list[pd.Series]]:
    sources = pa.Table.from_struct_array(table["diaSource"]).to_pandas()
    return sources, [pd.Series(table[name].to_pylist(), dtype=object) for name in STAMPS]


def scores(table: pa.Table) -> np.ndarray:
    return table["default__real"].to_numpy()


def test_ztf_scores_are_those_of_whole_alerts(fink_ztf: pa.Table, expected: dict[str, pa.Table]) -> None:
    found = open_ztf()(*ztf_columns(fink_ztf))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.to_numpy(), scores(expected["ztf"]))


def test_rubin_scores_are_those_of_whole_alerts(fink_lsst: pa.Table, expected: dict[str, pa.Table]) -> None:
    found = open_rubin()(*(columns := rubin_columns(fink_lsst))[:1], *columns[1])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.to_numpy(), scores(expected["lsst"]))


def test_rows_with_nulls_in_any_ztf_column_have_no_score_and_harm_no_other(fink_ztf: pa.Table) -> None:
    columns = ztf_columns(fink_ztf)
    whole = real_bogus_ztf(*columns)
    bad = [column.copy() for column in columns]
    for row, column in enumerate(bad):
        column[row] = None
    bad[0][3], bad[1][4], bad[2][5] = b"", b"no FITS", bad[2][5][:99]
    found = real_bogus_ztf(*bad)
    assert found[:6].isna().all()
    np.testing.assert_array_equal(found[6:], whole[6:])


def test_rows_with_nulls_in_any_rubin_column_have_no_score_and_harm_no_other(fink_lsst: pa.Table) -> None:
    sources, columns = rubin_columns(fink_lsst)
    whole = real_bogus_rubin(sources, *columns)
    bad = [column.copy() for column in columns]
    for row, column in enumerate(bad):
        column[row] = None
    bad[0][3], bad[1][4] = b"", b"no FITS"
    structs = fink_lsst["diaSource"].to_pylist()
    structs[5] = None
    found = real_bogus_rubin(pd.DataFrame([s or dict.fromkeys(structs[0]) for s in structs]), *bad)
    assert found[:6].isna().all()
    np.testing.assert_array_equal(found[6:], whole[6:])


@pytest.mark.parametrize("rows", [0, 3])
def test_columns_of_nulls_give_a_column_of_nulls_of_equal_length(fink_lsst: pa.Table, rows: int) -> None:
    nothing = pd.Series([None] * rows, dtype=object)
    assert real_bogus_ztf(nothing, nothing, nothing).isna().tolist() == [True] * rows
    sources = pd.DataFrame(dict.fromkeys(fink_lsst["diaSource"].type.names, nothing))
    assert real_bogus_rubin(sources, nothing, nothing, nothing).isna().tolist() == [True] * rows


def test_a_wrong_column_is_one_clear_error(fink_lsst: pa.Table) -> None:
    numbers, texts = pd.Series([1.5, 2.5]), pd.Series(["a", "b"])
    for wrong, name in ((numbers, "float"), (texts, "str"), (pd.Series([[1], [2]]), "list")):
        with pytest.raises(ColumnError, match=f"of type {name}, not bytes: pass the column"):
            real_bogus_ztf(wrong, wrong, wrong)
    sources, columns = rubin_columns(fink_lsst)
    for wrong in (numbers, sources.drop(columns="diaSourceId")):
        with pytest.raises(ColumnError, match="not the struct diaSource"):
            real_bogus_rubin(wrong, *columns)
    with pytest.raises(ColumnError, match="not bytes: pass the column"):
        real_bogus_rubin(sources, sources["psfFlux"], *columns[1:])


@pytest.mark.parametrize("call", ["open_ztf", "open_rubin"])
def test_a_missing_model_fails_when_a_science_module_is_imported(call: str, tmp_path: Path) -> None:
    program = f"""
from broker_filter.scoring import bundle
bundle.SHIPPED = bundle.Path({str(tmp_path)!r})
from broker_filter.plugins.fink import {call}
{call}()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "NoBundleError: default: not a bundle" in done.stderr.splitlines()[-1]
