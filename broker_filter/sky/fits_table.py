"""The first binary table of a FITS file that is untrusted input."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from broker_filter.sky.tracked import SkyFileError

if TYPE_CHECKING:
    from astropy.io import fits

FITS_MAGIC = b"SIMPLE  ="


@contextmanager
def open_table(path: Path, data: bytes) -> Iterator[fits.BinTableHDU]:
    """Open the first binary table in the bytes of a FITS file, and check that all of its rows are there.

    `path`: the name of the file for messages. Raises SkyFileError, also for an error of astropy within the block.
    """
    from astropy.io import fits

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # astropy warns of what is an error here, and of what is harmless
            with fits.open(io.BytesIO(data), memmap=False, disable_image_compression=True) as hdus:
                table = next((hdu for hdu in hdus if isinstance(hdu, fits.BinTableHDU)), None)
                if table is None:
                    raise SkyFileError(f"{path}: a FITS file without a binary table")
                needed = table.fileinfo()["datLoc"] + table.header["NAXIS1"] * table.header["NAXIS2"]
                if needed > len(data):
                    raise SkyFileError(f"{path}: cut off: {len(data)} bytes of at least {needed}")
                yield table
    except SkyFileError:
        raise
    except Exception as error:  # from damaged files, astropy raises errors of many kinds
        raise SkyFileError(f"{path}: not a readable FITS table: {error}") from None
