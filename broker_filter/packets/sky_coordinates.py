"""Galactic and ecliptic coordinates of positions in ICRS: rotations of unit vectors, for whole batches.

The rows of a matrix are the axes of the new frame in ICRS. Both matrices are those that astropy 8.0 applies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.photometry import Values

GALACTIC = np.array(
    [
        [-0.05487565771259163, -0.8734370519556159, -0.48383507361671546],
        [0.4941094371927268, -0.44482972122329517, 0.7469821839866676],
        [-0.8676661375596576, -0.19807633727300059, 0.45598381368730156],
    ]
)
"""ICRS to galactic (IAU 1958): astropy's `Galactic`."""
ECLIPTIC = np.array(
    [
        [9.9999999999999412e-01, -7.0783689548483219e-08, 8.0562139837364203e-08],
        [3.2897004077419646e-08, 9.1748212991495837e-01, 3.9777699944404793e-01],
        [-1.0207044725484355e-07, -3.9777699944404304e-01, 9.1748212991495559e-01],
    ]
)
"""ICRS to the mean ecliptic and equinox of J2000 (IAU 2006): ERFA's `ecm06`, astropy's `BarycentricMeanEcliptic`."""


def unit_vectors(longitude: Values, latitude: Values) -> Values:
    """Return the unit vectors of N directions, float64[N, 3]; NaN where a coordinate is. Arguments: degrees [N]."""
    lon, lat = np.radians(longitude), np.radians(latitude)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def longitude(frame: NDArray[np.float64], ra: Values, dec: Values) -> Values:
    """Return longitudes in `frame` (GALACTIC or ECLIPTIC) in degrees, 0 to 360. `ra`, `dec`: ICRS, in degrees."""
    x, y, _ = _rotated(frame, ra, dec)
    return np.asarray(np.degrees(np.arctan2(y, x)) % 360.0)


def latitude(frame: NDArray[np.float64], ra: Values, dec: Values) -> Values:
    """Return latitudes in `frame` (GALACTIC or ECLIPTIC) in degrees, -90 to 90. `ra`, `dec`: ICRS, in degrees."""
    x, y, z = _rotated(frame, ra, dec)
    return np.asarray(np.degrees(np.arctan2(z, np.hypot(x, y))))


def _rotated(frame: NDArray[np.float64], ra: Values, dec: Values) -> list[Values]:
    """Return the three components of each position's unit vector in `frame`.

    A matrix product would round the same position differently in batches of different sizes.
    """
    x, y, z = unit_vectors(ra, dec).T
    return [axis[0] * x + axis[1] * y + axis[2] * z for axis in frame]
