"""Reads LAMOST's low-resolution spectra from FITS files, for `preprocess.prepare_spectrum`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from training.astrom3.model.preprocess import ObservationsError

MAX_FILE_BYTES = 16 * 2**20
"""Largest file that is read; a spectrum has about 100 kB."""
FLUX, INVERSE_VARIANCE, WAVELENGTH = 0, 1, 2
"""Indices of the rows of the image (data releases up to 6), or of the columns of the table (later releases)."""


def read_spectrum(path: Path) -> NDArray[np.float64]:
    """Return wavelength in angstrom (vacuum), flux and inverse variance of the flux, float64[m, 3], of a LAMOST file.

    `AstroM3Dataset` has the inverse variance in place of the error, and the published weights were trained with it.
    Raises ObservationsError if the file is not such a spectrum.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ObservationsError(f"{path}: larger than {MAX_FILE_BYTES} bytes, the limit for a LAMOST spectrum")
    try:
        with fits.open(path) as hdus:
            if len(hdus) == 1:
                header, rows = hdus[0].header, hdus[0].data
                wavelength = 10 ** (header["COEFF0"] + header["COEFF1"] * np.arange(rows.shape[1]))
                columns = [wavelength, rows[FLUX], rows[INVERSE_VARIANCE]]
            else:
                table = hdus[1].data[0]
                columns = [table[WAVELENGTH], table[FLUX], table[INVERSE_VARIANCE]]
            return np.stack(columns, axis=1).astype(np.float64)
    except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ObservationsError(f"{path}: not a LAMOST spectrum: {error}") from error
