"""Files that change on disk: when they are read again, and what is kept if they are broken."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from broker_filter.sky import tracked
from broker_filter.sky.files import SkyFiles
from broker_filter.sky.tracked import SkyFileError
from tests.sky.conftest import cone


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(file: Path, names: str, age_s: float = 60) -> None:
    """Replace a list of targets, by an atomic rename, with one that was written `age_s` ago."""
    new = file.with_suffix(".new")
    new.write_text("".join(["name,ra,dec\n", *(f"{name},{i},0\n" for i, name in enumerate(names))]))
    written = new.stat().st_mtime - age_s
    os.utime(new, (written, written))
    new.rename(file)


def looked(files: SkyFiles, clock: Clock, seconds: float = 1.0) -> bool:
    clock.now += seconds
    return files.look()


def test_changed_file_is_read_again_at_most_once_a_second(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, targets = Clock(), tmp_path / "targets.csv"
    write(targets, "ab")
    files = SkyFiles(tmp_path, clock)
    file = files.watchlist("targets.csv")
    assert files.watchlist("targets.csv") is file
    first = file.sha256
    write(targets, "abc")
    assert not looked(files, clock, 0.9)
    assert len(file.content) == 2
    with caplog.at_level(logging.INFO):
        assert looked(files, clock, 0.1)
    assert file.content.names.to_pylist() == ["a", "b", "c"]
    assert caplog.messages == [f"{targets} has changed and was read again: 3 targets"]
    assert file.sha256 != first
    write(targets, "ab")
    looked(files, clock)
    assert file.sha256 == first
    before = file.content
    looked(files, clock)
    assert file.content is before


def test_file_that_is_being_written_is_read_when_it_stays_the_same(tmp_path: Path) -> None:
    clock, targets = Clock(), tmp_path / "targets.csv"
    write(targets, "ab")
    files = SkyFiles(tmp_path, clock)
    file = files.watchlist("targets.csv")
    write(targets, "abc", age_s=0)
    looked(files, clock)
    write(targets, "abcd", age_s=0)
    looked(files, clock)
    assert len(file.content) == 2
    looked(files, clock)
    assert len(file.content) == 4


def test_broken_file_keeps_the_content_until_it_is_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, targets = Clock(), tmp_path / "targets.csv"
    write(targets, "ab")
    cone(10, 20, 2).save(tmp_path / "moc.fits", format="fits")
    files = SkyFiles(tmp_path, clock)
    lists, region = files.watchlist("targets.csv"), files.region("moc.fits", None)
    at = np.array([10.0]), np.array([20.0])
    first = lists.sha256
    targets.write_text("name,ra,dec\na,1\n")
    (tmp_path / "moc.fits").unlink()
    for _ in range(5):
        looked(files, clock)
    assert files.failed == {str(targets): True, str(tmp_path / "moc.fits"): True}
    assert (len(lists.content), lists.sha256, region.content.contains(*at).tolist()) == (2, first, [True])
    assert len(caplog.messages) == 2  # once for each file
    assert "moc.fits: no such file; the filters keep its earlier content" in caplog.text
    assert "targets.csv: not a readable table of targets" in caplog.text
    write(targets, "abc")
    cone(10, 25, 2).save(tmp_path / "moc.fits", format="fits")
    for _ in range(2):
        looked(files, clock)
    assert files.failed == {str(targets): False, str(tmp_path / "moc.fits"): False}
    assert (len(lists.content), region.content.contains(*at).tolist()) == (3, [False])


def test_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SkyFiles(tmp_path)
    for name, message in (("none.csv", "no such file"), (".", "not a regular file"), ("a\0b", "no such file|null")):
        with pytest.raises(SkyFileError, match=message):
            files.watchlist(name)
        with pytest.raises(SkyFileError, match=message):
            files.region(name, 0.9)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SkyFileError, match="pipe: not a regular file"):
        files.watchlist("pipe")
    monkeypatch.setattr(tracked, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "large.csv").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(SkyFileError, match=r"large.csv: more than 1 MiB; keep only the rows"):
        files.watchlist("large.csv")


def test_absolute_name_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "targets.csv", "ab")
    assert len(SkyFiles(Path("/nowhere")).watchlist(str(tmp_path / "targets.csv")).content) == 2
