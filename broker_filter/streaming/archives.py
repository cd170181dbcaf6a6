"""Reads files, folders, archives and standard input as one forward stream of Packets, also if archives are nested.

The bytes of a file decide its format, never its name. Memory does not grow with the size of an input: nothing is
extracted to disk, and no archive is held as a whole. Data that this module does not understand become a Packet, which
decoding rejects.
"""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Protocol, cast

import pyarrow as pa

from broker_filter.errors import USAGE, BrokerFilterError, without_credentials
from broker_filter.packets.alert_rows import AlertRows
from broker_filter.packets.framing import ocf, parquet
from broker_filter.packets.packet import FilePosition, Packet

MAX_PACKET_BYTES = 16 * 2**20
"""Largest packet in bytes; real packets have up to 0.2 MB. The service uses `config.Input.max_packet_bytes` instead."""
MAX_DEPTH = 8
"""Largest nesting of archives: an `.avro.gz` in a `.tar.gz` in a `.tar.gz` has depth 5. A bomb may nest without end."""
MAX_EXTENDED_HEADER_BYTES = 64 * 2**10
"""Largest size of a tar member's long name or pax attributes, which tarfile would hold in memory at any size."""
MAX_MEMBER_BYTES = 2**40
"""Largest size of a tar member with its headers, ten times a night. Beyond the end of an archive, tarfile would go on
in steps of 10 kB."""

MAX_TRAILING_BYTES = 64 * 2**20
"""Largest padding after the end of a tar; real archives have 10 kB. More padding counts as a decompression bomb."""
_EXPANSION_ALLOWANCE = 16 * 2**20
"""Size in bytes up to which the compression ratio is not checked, because a tar of few alerts is mostly padding."""
STDIN = "-"
"""The name that stands for standard input among the inputs."""
_STDIN_DESCRIPTOR = 0
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_FILE_BUFFER = 256 * 1024
_PACKET_BUFFER = 64 * 1024
_PIECE = 32 * 1024
"""Number of bytes that are decompressed at once. Up to this number may be lost before a damaged place."""
_WHOLE_MEMBER = 2**20
"""A tar member up to this size is read at once, without a buffer that would copy its bytes three times."""
_EXTENDED_HEADERS = frozenset((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE))
_PLAIN_HEADER = re.compile(
    rb"([^\0]+)\0*"  # name; the other fields leave 100 bytes for it
    rb"(?:(?:[0-7]{7}\0|[0-7]{6} \0)){3}([0-7]{11})[ \0][0-7]{11}[ \0]"  # mode, owner and group; size; time
    rb"([0-7]{6})\0 0.{172}"  # checksum; type (a file); link, format, names of owner and group
    rb"(?:[0-7]{7}\0|\0{8}){2}\0.{166}",  # device; no prefix of the name
    re.DOTALL,
)
"""The usual header of a tar member, which is parsed here. Any other header is left to tarfile."""
_TAR_ENDS = (tarfile.EOFHeaderError, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
"""Errors at the end marker of a tar, and at the end of a tar without a marker, such as real night archives."""

_OF_MACOS = re.compile(r"(.*/)?(\._[^/]*|\.DS_Store|__MACOSX/.*)", re.DOTALL)
"""Names of files that macOS adds to archives."""

_Items = Iterator[Packet | AlertRows]

log = logging.getLogger(__name__)


class InputError(BrokerFilterError, OSError):
    """The system cannot read an input. The message names the input."""


class NoInputError(InputError):
    """An input does not exist or is of an unsupported kind. The message names the input and says what to do."""

    exit_status = USAGE


def read_packets(
    inputs: str | Path | Sequence[str | Path],
    *,
    max_packet_bytes: int = MAX_PACKET_BYTES,
    wanted: Collection[str] = (),
    skip: Collection[Path] = (),
) -> Packets:
    """Iterate over the packets of archived alerts, in flat memory.

    `inputs`: a file, a folder (read recursively, in the order of the names), `-` for standard input, or several of
    these. Avro files, Parquet files, tar archives, and files compressed with gzip, xz, bzip2, zstd or lz4 are
    recognised by their bytes, also inside each other. A file or an archive member is one Packet, except that each block
    of an Avro container with several alerts is one Packet, and each row of a Parquet file. At most a little more than
    `max_packet_bytes` of a file is read as one packet; the decoder rejects a packet that is too large. `wanted`: dotted
    paths of fields; a warning names those that a Parquet file stores in a type that cannot be read. `skip`: files that
    are not read although they lie in a folder of the inputs.

    Damage loses the packets behind it and no other. A packet that is cut off has the bytes that are there. A damaged
    tar or Parquet file ends with an empty Packet for the lost part, and a sparse member of a tar is an empty Packet.
    The decoder rejects these packets, and the log says why.

    Raises NoInputError at once for an input that does not exist. The iteration raises InputError if the system refuses
    to read a file.

    >>> from broker_filter import read_packets
    >>> packet = next(read_packets("night.tar"))
    >>> print(packet.position, packet.data[:3])
    night.tar::0.avro b'Obj'
    """
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    check_inputs(inputs)
    return Packets(inputs, max_packet_bytes, wanted, skip)


def check_inputs(inputs: Sequence[str | Path]) -> None:
    """Raise NoInputError if an input does not exist or is of an unsupported kind."""
    for i, given in enumerate(inputs):
        if _is_stdin(given):
            if any(map(_is_stdin, inputs[:i])):
                raise NoInputError(f"{STDIN}: standard input can only be read once")
        elif match := _URL.match(str(given)):
            url = without_credentials(str(given))
            raise NoInputError(f"{url}: {_fetch(match[1], url)}")
        elif not Path(given).exists():
            raise NoInputError(f"{without_credentials(str(given))}: no such file or folder")


def _is_stdin(given: str | Path) -> bool:
    return str(given) == STDIN


def _fetch(scheme: str, url: str) -> str:
    """Return what to do about an input that is a URL."""
    if scheme == "kafka":
        return "a topic is read by `run`, `inspect` and `replay` only"
    fetch = f"aws s3 cp {url} -" if scheme == "s3" else f"curl -L {url}"
    return (
        f"{scheme}:// is not supported: fetch the file first, or pipe it: {fetch} | broker-filter COMMAND {STDIN} ..."
    )


class Packets(Iterator[Packet]):
    """An iterator over the packets of inputs: see `read_packets`."""

    def __init__(
        self, inputs: Sequence[str | Path], max_packet_bytes: int, wanted: Collection[str], skip: Collection[Path]
    ) -> None:
        self._inputs = inputs
        self._skipped_names = {path.name for path in skip}
        self._skipped_files = {path.resolve() for path in skip}
        self._limit = max_packet_bytes
        self._wanted = wanted
        self._told: set[str] = set()
        self._read_bytes = 0  # of the files that were read to their ends
        self._current: io.FileIO | None = None
        self._as_rows = False
        self._packets = chain.from_iterable(map(self._read_file, self._files()))

    def __next__(self) -> Packet:
        return cast(Packet, next(self._packets))  # a packet, because `_as_rows` is False

    def batches(self, size: int) -> Iterator[Sequence[Packet]]:
        """Yield all packets in order, at most `size` at a time; rows of Parquet as AlertRows, with the wanted columns.

        Use either this method or the iteration over single packets.
        """
        self._as_rows = True
        batch: list[Packet] = []
        for item in self._packets:
            if isinstance(item, AlertRows):
                if batch:
                    yield batch
                    batch = []
                yield item
            else:
                batch.append(item)
                if len(batch) == size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def share_read(self) -> float | None:
        """Return the fraction of the inputs' bytes that was read, from 0 to 1.

        The result is None if the total is unknown, as for pipes.

        Only the reading thread may call this. The first call reads the sizes of all files.
        """
        if self._total_bytes is None:
            return None
        current = 0 if self._current is None else self._current.tell()
        return min(1.0, (self._read_bytes + current) / max(1, self._total_bytes))

    @cached_property
    def _total_bytes(self) -> int | None:
        total = 0
        for file in self._files():
            status = os.fstat(_STDIN_DESCRIPTOR) if _is_stdin(file) else Path(file).stat()
            if not stat.S_ISREG(status.st_mode):
                return None
            total += status.st_size
        return total

    def _files(self) -> Iterator[str | Path]:
        """Return the files of all inputs, without the files in `skip`."""
        for file in chain.from_iterable(map(_files, self._inputs)):
            is_skipped = Path(file).name in self._skipped_names and Path(file).resolve() in self._skipped_files
            if not is_skipped:
                yield file

    def _read_file(self, file: str | Path) -> _Items:
        name = "<stdin>" if _is_stdin(file) else str(file)
        readable_name = name.encode(errors="replace").decode()  # names on disk may be invalid Unicode
        try:
            raw = io.FileIO(_STDIN_DESCRIPTOR, closefd=False) if _is_stdin(file) else io.FileIO(file)
            with io.BufferedReader(raw, _FILE_BUFFER) as stream:
                self._current = raw if raw.seekable() else None
                yield from self._read_stream(stream, FilePosition(readable_name))
                self._read_bytes += os.fstat(raw.fileno()).st_size
        except OSError as error:
            raise InputError(f"{readable_name}: {error.strerror or error}") from error
        finally:
            self._current = None

    def _read_stream(self, stream: io.BufferedReader[Any], position: FilePosition, depth: int = 0) -> _Items:
        """Yield the packets in a file or member. Its first bytes decide its format."""
        start = stream.peek(tarfile.BLOCKSIZE)[: tarfile.BLOCKSIZE]
        if start.startswith(ocf.MAGIC):
            yield from self._read_container(stream, position)
        elif (compression := _compression_of(start)) and depth < MAX_DEPTH:
            yield from self._read_compressed(compression, stream, position, depth)
        elif start.startswith(parquet.MAGIC):
            yield from self._read_parquet(stream, position)
        elif _is_tar(start) and depth < MAX_DEPTH:
            yield from self._read_tar(stream, position, depth)
        elif not _is_of_macos(position.member or position.path, start):
            yield Packet(_read_up_to(self._limit + 1, stream), position)

    def _read_container(self, stream: io.BufferedReader[Any], position: FilePosition) -> Iterator[Packet]:
        data = _read_up_to(self._limit + 1, stream)
        if _is_packet(data, self._limit):
            yield Packet(data, position)
            return
        record = 0
        for container in ocf.split_container(cast(BinaryIO, _Continued(data, stream)), self._limit):
            yield Packet(container, replace(position, record=record))
            record += ocf.count_records(container)

    def _read_compressed(
        self, compression: _Compression, stream: io.BufferedReader[Any], position: FilePosition, depth: int
    ) -> _Items:
        inflated = _Inflated(compression.open(stream))
        yield from self._read_stream(io.BufferedReader(inflated, _FILE_BUFFER), position, depth + 1)
        if inflated.damage:
            log.warning("%s: damaged %s, read up to the damage: %s", position, compression.name, inflated.damage)

    def _read_parquet(self, stream: io.BufferedReader[Any], position: FilePosition) -> _Items:
        file: IO[bytes] = stream
        if not stream.seekable():  # a file in an archive or a pipe; reading Parquet starts at its end
            data = _read_up_to(self._limit + 1, stream)
            if len(data) > self._limit:
                log.warning(
                    "%s: Parquet of more than %d bytes is only read if it is a file, not in an archive or a pipe",
                    position,
                    self._limit,
                )
                yield Packet(data, position)
                return
            file = io.BytesIO(data)
        row = 0
        try:
            rows = parquet.Rows(file)
            self._tell_left_out(rows.left_out, position)
            if self._as_rows:
                for batch, schema in rows.batches(self._wanted):
                    yield AlertRows(batch, schema, replace(position, record=row))
                    row += len(batch)
            else:
                for row, container in enumerate(rows):
                    yield Packet(container, replace(position, record=row))
        except parquet.ParquetError as error:
            log.warning("%s: damaged Parquet, read up to the damage: %s", position, error)
            yield Packet(b"", replace(position, record=row))

    def _tell_left_out(self, left_out: Mapping[str, object], position: FilePosition) -> None:
        """Warn of wanted columns that cannot be read, once for all files with the same columns."""
        columns = [
            f"{path} ({kind})"
            for path, kind in left_out.items()
            if any(field == path or field.startswith(f"{path}.") for field in self._wanted)
        ]
        text = ", ".join(columns)
        if columns and text not in self._told:
            self._told.add(text)
            log.warning(
                "%s: columns that cannot be read count as missing: %s; write them as numbers, strings or bytes",
                position,
                text,
            )

    def _read_tar(self, stream: io.BufferedReader[Any], position: FilePosition, depth: int) -> _Items:
        try:
            mode: Literal["r:", "r|"] = "r:" if stream.seekable() else "r|"
            with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Member, errors="replace") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # they would need a gigabyte for a night
                    if not member.isfile():  # a folder or a link
                        continue
                    place = FilePosition(position.path, f"{position.member}/{member.name}".lstrip("/"), position.record)
                    if member.issparse():
                        log.warning("%s: sparse members of a tar are not read; pack it without --sparse", place)
                        yield Packet(b"", place)
                    else:
                        yield from self._read_member(cast(IO[bytes], archive.fileobj), member.size, place, depth + 1)
            trailing = 0  # bytes of padding; the padding is read because a gzip checksum follows it
            while trailing <= MAX_TRAILING_BYTES and (padding := stream.read(_FILE_BUFFER)):
                trailing += len(padding)
            damage = getattr(stream.raw, "damage", None)
            if trailing > MAX_TRAILING_BYTES:
                damage = tarfile.ReadError(f"more than {MAX_TRAILING_BYTES} bytes after its end")
        except tarfile.ReadError as error:
            damage = error
        if damage:
            log.warning("%s: damaged tar, read up to the damage: %s", position, damage)
            yield Packet(b"", position)

    def _read_member(self, archive: IO[bytes], size: int, position: FilePosition, depth: int) -> _Items:
        """Yield the packets in the tar member of `size` bytes that begins at the position of `archive`."""
        if size > _WHOLE_MEMBER:
            stored = io.BufferedReader(_Stored(archive, size), _PACKET_BUFFER)
            yield from self._read_stream(stored, position, depth)
            return
        data = archive.read(size)
        if data.startswith(ocf.MAGIC) and _is_packet(data, self._limit):
            yield Packet(data, position)
        else:
            yield from self._read_stream(io.BufferedReader(io.BytesIO(data)), position, depth)


def _files(given: str | Path) -> Iterator[str | Path]:
    """Yield the files of an input."""
    if _is_stdin(given) or not Path(given).is_dir():
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


def _is_of_macos(name: str, start: bytes) -> bool:
    """Return whether macOS has added this file to an archive. Such a file is empty or begins with a zero byte."""
    return start[:1] in (b"", b"\0") and _OF_MACOS.fullmatch(name) is not None


def _is_packet(container: bytes, limit: int) -> bool:
    """Return whether a container holds at most one alert and is not too large, so that it need not be divided."""
    return len(container) <= limit and ocf.count_records(container) <= 1


def _read_up_to(size: int, stream: io.BufferedReader[Any]) -> bytes:
    """Read at most `size` bytes. Unlike `read(size)`, it does not allocate `size` bytes first."""
    pieces = []
    while size > 0 and (piece := stream.read(min(size, _FILE_BUFFER))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


class _Continued:
    """A stream whose beginning was read already."""

    def __init__(self, beginning: bytes, rest: io.BufferedReader[Any]) -> None:
        self._beginning = io.BytesIO(beginning)
        self._rest = rest

    def read(self, size: int) -> bytes:
        return self._beginning.read(size) or self._rest.read(size)


class _Reader(Protocol):
    """A compressed stream's content."""

    def read1(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and no bytes at the end. Raises one of `_DAMAGE`."""
        ...


_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, pa.ArrowException, OSError)
"""Errors that damaged data cause. An OSError with an error number comes from the system instead."""


class _Inflated(io.RawIOBase):
    """The content of a compressed stream up to its first damaged place. `damage` is the error there."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self.damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        filled = 0
        while filled < len(buffer) and self.damage is None:
            try:
                piece = self._reader.read1(len(buffer) - filled)
            except _DAMAGE as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                self.damage = error
                break
            if not piece:
                break
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled


class _Source(io.RawIOBase):
    """A stream of compressed bytes that counts how many bytes were read."""

    def __init__(self, stream: io.BufferedReader[Any]) -> None:
        self._stream = stream
        self.taken = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self.taken += len(data)
        return data


class _Bounded:
    """A reader that raises EOFError if the content is more than `ocf.GREATEST_RATIO` times its compressed size."""

    def __init__(self, source: _Source, read: Callable[[int], bytes]) -> None:
        self._source = source
        self._read = read
        self._given = 0

    def read1(self, size: int, /) -> bytes:
        piece = self._read(min(size, _PIECE))
        self._given += len(piece)
        if self._given > _EXPANSION_ALLOWANCE + ocf.GREATEST_RATIO * self._source.taken:
            raise EOFError(f"it expands to more than {ocf.GREATEST_RATIO} times its size: a decompression bomb")
        return piece


_Decompressor = lzma.LZMADecompressor | bz2.BZ2Decompressor
"""The decompressor of one stream."""


class _Streams:
    """The content of a file with several compressed streams in a row, as xz and bzip2 allow."""

    def __init__(self, source: _Source, new: Callable[[], _Decompressor]) -> None:
        self._source = source
        self._new = new
        self._stream = new()

    def read(self, size: int) -> bytes:
        while True:
            if self._stream.eof:
                # xz allows zeros as padding between streams.
                data = self._stream.unused_data.lstrip(b"\0") or self._source.read(_FILE_BUFFER).lstrip(b"\0")
                if not data:
                    return b""
                self._stream = self._new()
            else:
                data = self._source.read(_FILE_BUFFER) if self._stream.needs_input else b""
                if self._stream.needs_input and not data:
                    raise EOFError("the compressed stream ends early")
            if piece := self._stream.decompress(data, size):
                return piece


@dataclass(frozen=True, slots=True)
class _Compression:
    """A compression format: its name, the first bytes of its files, and a function that opens a file."""

    name: str
    beginning: bytes
    open: Callable[[io.BufferedReader[Any]], _Reader]


def _open_gzip(stream: io.BufferedReader[Any]) -> _Reader:
    return gzip.GzipFile(fileobj=stream)


def _open_bzip2(stream: io.BufferedReader[Any]) -> _Reader:
    source = _Source(stream)
    return _Bounded(source, _Streams(source, bz2.BZ2Decompressor).read)


def _open_xz(stream: io.BufferedReader[Any]) -> _Reader:
    source = _Source(stream)
    return _Bounded(source, _Streams(source, partial(lzma.LZMADecompressor, memlimit=ocf.XZ_MEMORY)).read)


def _open_by_arrow(codec: str, stream: io.BufferedReader[Any]) -> _Reader:
    source = _Source(stream)
    return _Bounded(source, pa.CompressedInputStream(pa.PythonFile(source, mode="r"), codec).read)


_COMPRESSIONS = (
    _Compression("gzip", b"\x1f\x8b\x08", _open_gzip),
    _Compression("xz", b"\xfd7zXZ\x00", _open_xz),
    _Compression("bzip2", b"BZh", _open_bzip2),
    _Compression("zstd", b"\x28\xb5\x2f\xfd", partial(_open_by_arrow, "zstd")),
    _Compression("zstd", b"\x50\x2a\x4d\x18", partial(_open_by_arrow, "zstd")),  # pzstd begins with an empty frame
    _Compression("lz4", b"\x04\x22\x4d\x18", partial(_open_by_arrow, "lz4")),
)


def _compression_of(start: bytes) -> _Compression | None:
    """Return the compression format of a file that begins with `start`, or None."""
    return next((known for known in _COMPRESSIONS if start.startswith(known.beginning)), None)


class _Stored(io.RawIOBase):
    """The content of a tar member. If the archive ends inside the member, its present bytes are still read."""

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
    """The header of a tar member.

    A damaged header raises ReadError; tarfile would mistake it for the end of the archive.
    """

    @classmethod
    def fromtarfile(cls, archive: Any) -> _Member:
        """Read the next member of an open archive at the position of its file. Faster than tarfile, same result."""
        header = archive.fileobj.read(tarfile.BLOCKSIZE)
        start = archive.fileobj.tell() - len(header)
        try:
            member = cls._of_plain_file(header) or cls.frombuf(header, archive.encoding, archive.errors)
            member.offset = start
            member = member._proc_member(archive)
        except (OSError, *_TAR_ENDS):
            raise
        except Exception as error:  # errors of arithmetic or nesting in tarfile
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0 or not 0 < archive.offset - start <= MAX_MEMBER_BYTES:  # pax attributes can claim any size
            raise tarfile.ReadError(f"impossible size {member.size}")
        return member

    @classmethod
    def _of_plain_file(cls, header: bytes) -> _Member | None:
        """Parse name and size of a usual header. Returns None if the header is unusual or damaged."""
        plain = _PLAIN_HEADER.fullmatch(header)
        if not plain or not header.isascii():
            return None
        name, size, checksum = plain.groups()
        # The checksum counts its own 8 bytes as blanks. The lower half of Adler-32 is 1 + the sum of the bytes modulo
        # 65521, and the sum of 512 ASCII characters is smaller than that.
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
