"""INPUT... -> Packets: files, folders and archives, nested as they come, as one forward stream.

What a file holds is told from its bytes, never from its name. Memory stays flat whatever the size: nothing is extracted
to disk, and no archive is ever held whole. Decides nothing about alerts: what is not understood becomes a Packet as it
is, for decoding to reject.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, cast

from broker_filter.packets import ocf, parquet
from broker_filter.packets.packet import FilePosition, Packet

MAX_PACKET_BYTES = 16 * 2**20
"""Of a packet; real ones reach 0.2 MB. The service's is `config.Input.max_packet_bytes`."""
MAX_DEPTH = 8
"""Of archives within archives: an `.avro.gz` in a `.tar.gz` in a `.tar.gz` is 5 deep; a bomb may nest for ever."""
MAX_EXTENDED_HEADER_BYTES = 64 * 2**10
"""Of a tar member's long name or pax attributes, which tarfile holds in memory whatever size they claim."""
MAX_MEMBER_BYTES = 2**40
"""Of a tar's member with its headers, ten times a night: past an archive's end tarfile goes on in steps of 10 kB."""

_GZIP = b"\x1f\x8b\x08"
_FILE_BUFFER = 256 * 1024
_PACKET_BUFFER = 64 * 1024
_WHOLE_MEMBER = 2**20
"""Bytes of a tar's member that are read at once; packets are smaller, and a buffer would copy them three times."""
_EXTENDED_HEADERS = frozenset((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE))
_PLAIN_HEADER = re.compile(
    rb"([^\0]+)\0*"  # name, in the 100 bytes that the others leave
    rb"(?:(?:[0-7]{7}\0|[0-7]{6} \0)){3}([0-7]{11})[ \0][0-7]{11}[ \0]"  # mode, owner and group; size; time
    rb"([0-7]{6})\0 0.{172}"  # checksum; that it is a file; link, format, names of owner and group
    rb"(?:[0-7]{7}\0|\0{8}){2}\0.{166}",  # device; no beginning of a longer name
    re.DOTALL,
)
"""The header that nearly every member of an archive has; anything about it that is less usual is left to tarfile."""
_TAR_ENDS = (tarfile.EOFHeaderError, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
"""At the mark of a tar's end, and at the end of one without it: real night archives have none."""

log = logging.getLogger(__name__)


class InputError(OSError):
    """An input that is not there or cannot be read; the message names it."""


def read_packets(inputs: Sequence[str | Path], *, max_packet_bytes: int = MAX_PACKET_BYTES) -> Iterator[Packet]:
    """Yields the packets of every input in the order given; a folder's files, recursively, in the order of their names.

    A file or member is a Packet, except that each block of a container file of several alerts is one, and each row of a
    Parquet file. At most a little more than `max_packet_bytes` of it is read, so that one that is too large is known.

    Damage loses what comes after it and no more. The packet that is cut off has the bytes that are there; a damaged tar
    or Parquet file ends with an empty Packet for what is lost, and a tar's sparse member is one. Decoding rejects them,
    and the log says why.

    Raises `InputError`: at once where an input is not there, later where the system refuses to read one.
    """
    for given in inputs:
        if not Path(given).exists():
            raise InputError(f"{given}: no such file or folder")
    return chain.from_iterable(_read_file(path, max_packet_bytes) for given in inputs for path in _files(Path(given)))


def _files(given: Path) -> Iterator[Path]:
    if not given.is_dir():
        yield given
        return

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(given, onerror=refuse):
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():  # no sockets, pipes or dangling links
                yield path


def _read_file(path: Path, limit: int) -> Iterator[Packet]:
    readable_name = str(path).encode(errors="replace").decode()  # names on disk may be no Unicode, outputs must be
    try:
        with io.BufferedReader(io.FileIO(path), _FILE_BUFFER) as stream:
            yield from _read_stream(stream, FilePosition(readable_name), limit)
    except OSError as error:
        raise InputError(f"{readable_name}: {error.strerror or error}") from error


def _read_stream(
    stream: io.BufferedReader[Any], position: FilePosition, limit: int, depth: int = 0
) -> Iterator[Packet]:
    """The packets in a file or member, told by its first bytes."""
    start = stream.peek(tarfile.BLOCKSIZE)[: tarfile.BLOCKSIZE]
    if start.startswith(ocf.MAGIC):
        yield from _read_container(stream, position, limit)
    elif start.startswith(_GZIP) and depth < MAX_DEPTH:
        yield from _read_gzip(stream, position, limit, depth)
    elif start.startswith(parquet.MAGIC):
        yield from _read_parquet(stream, position, limit)
    elif _is_tar(start) and depth < MAX_DEPTH:
        yield from _read_tar(stream, position, limit, depth)
    else:
        yield Packet(_read_up_to(limit + 1, stream), position)


def _read_container(stream: io.BufferedReader[Any], position: FilePosition, limit: int) -> Iterator[Packet]:
    data = _read_up_to(limit + 1, stream)
    if _is_packet(data, limit):
        yield Packet(data, position)
        return
    record = 0
    for container in ocf.split_container(cast(BinaryIO, _Continued(data, stream)), limit):
        yield Packet(container, replace(position, record=record))
        record += ocf.count_records(container)


def _read_gzip(stream: io.BufferedReader[Any], position: FilePosition, limit: int, depth: int) -> Iterator[Packet]:
    inflated = _Inflated(stream)
    yield from _read_stream(io.BufferedReader(inflated, _FILE_BUFFER), position, limit, depth + 1)
    if inflated.damage:
        log.warning("%s: damaged gzip, read as far as it goes: %s", position, inflated.damage)


def _read_parquet(stream: io.BufferedReader[Any], position: FilePosition, limit: int) -> Iterator[Packet]:
    file: IO[bytes] = stream
    if not stream.seekable():  # in an archive; Parquet is read from its end
        data = _read_up_to(limit + 1, stream)
        if len(data) > limit:
            log.warning("%s: Parquet of more than %d bytes is only read from a file of its own", position, limit)
            yield Packet(data, position)
            return
        file = io.BytesIO(data)
    row = 0
    try:
        for row, container in enumerate(parquet.read_rows(file)):
            yield Packet(container, replace(position, record=row))
    except parquet.ParquetError as error:
        log.warning("%s: damaged Parquet, read as far as it goes: %s", position, error)
        yield Packet(b"", replace(position, record=row))


def _read_tar(stream: io.BufferedReader[Any], position: FilePosition, limit: int, depth: int) -> Iterator[Packet]:
    try:
        mode: Literal["r:", "r|"] = "r:" if stream.seekable() else "r|"
        with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Member, errors="replace") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # they would be a gigabyte in a night
                if not member.isfile():  # a folder or a link
                    continue
                place = FilePosition(position.path, f"{position.member}/{member.name}".lstrip("/"), position.record)
                if member.issparse():
                    log.warning("%s: sparse members of a tar are not read; pack it without --sparse", place)
                    yield Packet(b"", place)
                else:
                    yield from _read_member(cast(IO[bytes], archive.fileobj), member.size, place, limit, depth + 1)
        while stream.read(_FILE_BUFFER):  # padding: the checksum of a gzip around it stands behind that
            pass
        damage = getattr(stream.raw, "damage", None)
    except tarfile.ReadError as error:
        damage = error
    if damage:
        log.warning("%s: damaged tar, read as far as it goes: %s", position, damage)
        yield Packet(b"", position)


def _read_member(archive: IO[bytes], size: int, position: FilePosition, limit: int, depth: int) -> Iterator[Packet]:
    """The packets in a tar's member of `size` bytes, at which `archive` stands."""
    if size > _WHOLE_MEMBER:
        stored = io.BufferedReader(_Stored(archive, size), _PACKET_BUFFER)
        yield from _read_stream(stored, position, limit, depth)
        return
    data = archive.read(size)
    if data.startswith(ocf.MAGIC) and _is_packet(data, limit):
        yield Packet(data, position)
    else:
        yield from _read_stream(io.BufferedReader(io.BytesIO(data)), position, limit, depth)


def _is_packet(container: bytes, limit: int) -> bool:
    """Whether a container is a packet as it is, as nearly all are: of one alert at most, and not too large."""
    return len(container) <= limit and ocf.count_records(container) <= 1


def _read_up_to(size: int, stream: io.BufferedReader[Any]) -> bytes:
    """At most `size` bytes, without setting as many aside first, as `read(size)` does."""
    pieces = []
    while size > 0 and (piece := stream.read(min(size, _FILE_BUFFER))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


class _Continued:
    """A stream of which the beginning was read already."""

    def __init__(self, beginning: bytes, rest: io.BufferedReader[Any]) -> None:
        self._beginning = io.BytesIO(beginning)
        self._rest = rest

    def read(self, size: int) -> bytes:
        return self._beginning.read(size) or self._rest.read(size)


class _Inflated(io.RawIOBase):
    """A gzip's content up to where it is damaged, and how it is damaged: what stands before that is still read."""

    def __init__(self, stream: io.BufferedReader[Any]) -> None:
        self._gzip = gzip.GzipFile(fileobj=stream)
        self.damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        filled = 0
        while filled < len(buffer) and self.damage is None:
            try:
                piece = self._gzip.read1(len(buffer) - filled)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.damage = error
                break
            if not piece:
                break
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled


class _Stored(io.RawIOBase):
    """A tar member's content, or as much of it as there is: tarfile's own reader drops what is cut off."""

    def __init__(self, archive: IO[bytes], size: int) -> None:
        self._archive = archive
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._archive.read(min(len(buffer), self._left))
        self._left -= len(piece)
        buffer[: len(piece)] = piece
        return len(piece)


class _Member(tarfile.TarInfo):
    """A member's header, refused where it is damaged: tarfile takes damage for the archive's end, or fails of it."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> _Member:
        """The next member of an open archive, where its file stands: as tarfile does it, and quicker."""
        header = archive.fileobj.read(tarfile.BLOCKSIZE)
        start = archive.fileobj.tell() - len(header)
        try:
            member = cls._of_plain_file(header) or cls.frombuf(header, archive.encoding, archive.errors)
            member.offset = start
            member = member._proc_member(archive)
        except (OSError, *_TAR_ENDS):
            raise
        except Exception as error:  # of its arithmetic, or of nesting
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0 or not 0 < archive.offset - start <= MAX_MEMBER_BYTES:  # by its pax attributes
            raise tarfile.ReadError(f"impossible size {member.size}")
        return member

    @classmethod
    def _of_plain_file(cls, header: bytes) -> _Member | None:
        """Name and size, which is all that is looked at here; None where the header is less usual, or damaged."""
        plain = _PLAIN_HEADER.fullmatch(header)
        if not plain or not header.isascii():
            return None
        name, size, checksum = plain.groups()
        # It counts its own 8 bytes as blanks. Adler-32 has in its lower half 1 + the sum of bytes modulo 65521, which
        # that of 512 ASCII characters does not reach.
        counted = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
        if counted != int(checksum, 8):
            return None
        member = cls(name.decode())
        member.size = int(size, 8)
        return member

    def _proc_member(self, archive: tarfile.TarFile) -> _Member:
        if self.size < 0 or (self.type in _EXTENDED_HEADERS and self.size > MAX_EXTENDED_HEADER_BYTES):
            raise tarfile.ReadError(f"impossible size {self.size}")
        return cast(_Member, super()._proc_member(archive))  # type: ignore[misc]


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "replace")
    except tarfile.HeaderError:
        return False
    return True
