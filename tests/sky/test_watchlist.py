"""The nearest target of a list against brute force, the formats of lists, and errors of files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from astropy.io.votable.tree import VOTableFile
from astropy.table import MaskedColumn, Table
from pyarrow import parquet
from threadpoolctl import threadpool_limits

from broker_filter.sky import target_tables
from broker_filter.sky.tracked import SkyFileError
from broker_filter.sky.watchlist import NO_TARGET, Watchlist, read_watchlist
from tests.sky.conftest import separation

ARCSEC = 1 / 3600


def watchlist(path: Path) -> Watchlist:
    return read_watchlist(path, path.read_bytes())


def write_csv(path: Path, ra: np.ndarray, dec: np.ndarray) -> Path:
    rows = (f"T{i},{a!r},{d!r}" for i, (a, d) in enumerate(zip(ra.tolist(), dec.tolist(), strict=True)))
    path.write_text("\n".join(["name,ra,dec", *rows]) + "\n")
    return path


def closest(position: tuple[float, float], ra: np.ndarray, dec: np.ndarray) -> int:
    """Return the index of the nearest of many positions, by haversines of all of them."""
    haversine = (
        np.sin(np.radians(dec - position[1]) / 2) ** 2
        + np.cos(np.radians(dec)) * np.cos(np.radians(position[1])) * np.sin(np.radians(ra - position[0]) / 2) ** 2
    )
    return int(haversine.argmin())


def test_nearest_target_is_that_of_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    n = 100_000
    ra, dec = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    ra[:4], dec[:4] = [0.0, 359.9999, 0.0001, 17.0], [90.0, 10.0, 20.0, -90.0]
    found = watchlist(write_csv(tmp_path / "targets.csv", ra, dec))
    assert (len(found), str(found)) == (n, "100,000 targets")
    chosen = rng.integers(0, n, 60)
    near_ra = np.concatenate([ra[chosen] + rng.normal(0, 3 * ARCSEC, 60), [123.0, 0.0, 359.99995, 250.0]]) % 360
    near_dec = np.concatenate([dec[chosen] + rng.normal(0, 3 * ARCSEC, 60), [89.9996, 10.0, 20.0, -89.9995]])
    near_dec = np.clip(near_dec, -90, 90)
    best = np.array([closest(position, ra, dec) for position in zip(near_ra, near_dec, strict=True)])
    apart = separation(near_ra, near_dec, ra[best], dec[best]) * 3600
    for radius in (2.0, 300.0):
        nearest = found.nearest(near_ra, near_dec, radius)
        within = apart <= radius
        assert 3 < within.sum() < len(within) or radius > 2
        np.testing.assert_array_equal(nearest.row, np.where(within, best, NO_TARGET))
        np.testing.assert_allclose(nearest.separation, np.where(within, apart, np.nan), atol=1e-8, rtol=0)
    assert [found.name(row) for row in (0, 17, n - 1)] == ["T0", "T17", f"T{n - 1}"]


def test_search_leaves_the_number_of_threads_of_other_libraries(tmp_path: Path) -> None:
    found = watchlist(write_csv(tmp_path / "targets.csv", np.arange(3.0), np.zeros(3)))
    with threadpool_limits(limits=3, user_api="openmp"):
        before = found.openmp.info()
        found.nearest(np.zeros(300), np.zeros(300), 4.0)
        assert [one["num_threads"] for one in before] == [one["num_threads"] for one in found.openmp.info()]
        assert {one["num_threads"] for one in before} == {3}


@pytest.mark.parametrize("n", [1, 2, 17])
def test_short_list_and_empty_batch(n: int, tmp_path: Path) -> None:
    found = watchlist(write_csv(tmp_path / "targets.csv", np.arange(n) * 1.0, np.zeros(n)))
    assert found.nearest(np.array([0.0, 0.001, 180.0]), np.zeros(3), 4.0).row.tolist() == [0, 0, NO_TARGET]
    assert found.nearest(np.empty(0), np.empty(0), 4.0).row.shape == (0,)


NAMES = ["SN 2026abc", "M31, nucleus", "blazar Ä"]
RA = [10.6847083, 10.0, 359.5]
DEC = [41.26875, -5.25, 0.0]


def table(**renamed: str) -> Table:
    made = Table({"mag": [1.0, 2.0, 3.0], "name": NAMES, "ra": RA, "dec": DEC})
    for old, new in renamed.items():
        made.rename_column(old, new)
    return made


def ecsv(path: Path, delimiter: str = " ") -> None:
    made = table()
    made["ra"].unit = made["dec"].unit = "deg"
    made.write(path, format="ascii.ecsv", delimiter=delimiter)


def fits_table(path: Path) -> None:
    made = table(name="OBJNAME", ra="RA", dec="DEC")
    made["OBJNAME"] = [name.replace("Ä", "A") for name in NAMES]  # FITS has only ASCII
    made["RA"].unit = "deg"
    made.write(path, format="fits")


def votable(path: Path, form: str = "tabledata") -> None:
    made = table(ra="_RAJ2000", dec="_DEJ2000", name="main_id")
    made["_RAJ2000"].unit = "deg"
    made["RAJ2000"] = ["00 42 44.3", "00 40 00.0", "23 58 00.0"]
    VOTableFile.from_table(made).to_xml(str(path), tabledata_format=form)


CSV = 'name,ra,dec\nSN 2026abc,10.6847083,41.26875\n"M31, nucleus",10,-5.25\nblazar Ä,359.5,0\n'


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text(CSV),
        lambda path: path.write_text("\ufeff" + CSV.replace("\n", "\r\n")),
        lambda path: path.write_text("# from the survey\n# of 2026\n" + CSV.replace("ra,dec", " RA_deg , DEC_deg")),
        lambda path: path.write_text(CSV.replace("M31, nucleus", "M31; nucleus").replace(",", "\t")),
        lambda path: path.write_text(CSV.replace(', nucleus"', '@ nucleus"').replace(",", ";")),
        lambda path: path.write_text(CSV.replace("name,ra,dec", "name,ra,dec,ra")
                                     .replace("75\n", "75,x\n").replace("25\n", "25,y\n").replace("5,0\n", "5,0,z\n")),
        ecsv,
        lambda path: ecsv(path, ","),
        fits_table,
        votable,
        lambda path: votable(path, "binary"),
        lambda path: votable(path, "binary2"),
        lambda path: table().write(path, format="parquet"),
        lambda path: parquet.write_table(
            pa.table({"Target": pa.array(NAMES).dictionary_encode(), "raj2000": RA, "dej2000": DEC}), path
        ),
    ],
)  # fmt: skip
def test_list_is_read_from_each_format(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "targets")
    found = watchlist(tmp_path / "targets")
    assert [name[:3] for name in found.names.to_pylist()] == [name[:3] for name in NAMES]
    nearest = found.nearest(np.array(RA), np.array(DEC), 0.001)
    assert nearest.row.tolist() == [0, 1, 2]


def test_targets_without_a_name_are_named_by_row(tmp_path: Path) -> None:
    file = tmp_path / "targets.csv"
    file.write_text("ra,dec\n1,2\n3,4\n")
    assert watchlist(file).names.to_pylist() == ["row 1", "row 2"]
    file.write_text("id,ra,dec\n4611686018427387905,2,2\n,4,4\n NA ,5,5\n")
    assert watchlist(file).names.to_pylist() == ["4611686018427387905", "row 2", "NA"]


def in_radians(path: Path) -> None:
    made = table()["ra", "dec"]
    made["ra"].unit = "rad"
    made.write(path, format="fits")


def masked(path: Path) -> None:
    made = table()
    made["dec"] = MaskedColumn(DEC, mask=[False, True, False])
    VOTableFile.from_table(made).to_xml(str(path))


def edited(path: Path, old: str, new: str) -> None:
    votable(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "must name the columns, and it is empty"),
        (lambda path: path.write_text("ra,dec\n10:20:30,+20:10:00\n"), "coordinates must be numbers in degrees"),
        (lambda path: path.write_text("name,ra,dec\n"), "no targets|not a readable table"),
        (lambda path: path.write_text("name,x,dec\na,1,2\n"), "ascension .*; the columns are: name, x, dec"),
        (lambda path: path.write_text("name,ra,y\na,1,2\n"), r"no column of declination \(`dec`\)"),
        (lambda path: path.write_text("name,ra,dec\na,1,2\nb,12:34:56.7,1\n"), "invalid value '12:34:56.7'"),
        (lambda path: path.write_text("name,ra,dec\na,1,2\nb,400,1\n"), r"row 2: \(400.0, 1.0\) is no position"),
        (lambda path: path.write_text("name,ra,dec\na,1,2\nb,4,-91\n"), r"row 2: \(4.0, -91.0\) is no position"),
        (lambda path: path.write_text("name,ra,dec\na,1,2\nb,,1\n"), r"row 2: \(nan, 1.0\) is no position"),
        (lambda path: path.write_text("name,ra,dec\na,1,2,3\n"), "Expected 3 columns, got 4"),
        (lambda path: path.write_text(f"name,ra,dec\n{'a' * 201},1,2\n"), "row 1: a name of more than 200 characters"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08\xff\xfe"), "nor UTF-8 text"),
        (lambda path: path.write_bytes(b"PAR1" + b"x" * 100), "not a readable table"),
        (lambda path: path.write_bytes(b"# %ECSV 1.0\n# ---\n# x: [\nname ra dec\na 1 2\n"), "not a readable table"),
        (lambda path: path.write_text("<VOTABLE><RESOURCE>"), "not a readable table"),
        (in_radians, "the column ra is in rad; give it in degrees"),
        (masked, r"row 2: \(10.0, nan\) is no position"),
        (lambda path: edited(path, "<TABLEDATA>", '<BINARY><STREAM x=">" href="http://x/"/></BINARY>'), "a URL"),
        (lambda path: edited(path, "<VOTABLE", '<!DOCTYPE a [<!ENTITY b "c">]><VOTABLE'), "document type declaration"),
        (lambda path: edited(path, "<TABLE", '<TABLE nrows="99999999999"'), "99,999,999,999 rows"),
        (lambda path: parquet.write_table(pa.table({"ra": ["1h"], "dec": [1.0]}), path), "holds string, not numbers"),
    ],
)  # fmt: skip
def test_file_that_is_no_list_is_an_error_that_names_it(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "targets"
    write(file)
    with pytest.raises(SkyFileError, match=message) as caught:
        watchlist(file)
    assert str(file) in str(caught.value)


def test_number_of_targets_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_tables, "MAX_TARGETS", 2)
    for write in (lambda path: path.write_text(CSV), fits_table, votable, table().write):
        file = tmp_path / f"targets{time.monotonic_ns()}.parquet"
        write(file)
        with pytest.raises(SkyFileError, match="3 rows; a list has at most 2 targets"):
            watchlist(file)
