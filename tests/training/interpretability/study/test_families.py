"""The families of features, on attributions whose family is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, Measurement
from training.interpretability.study.families import (
    PointSources,
    effective_sources,
    family_of_cells,
    family_of_points,
    normalised,
)

G, R = BANDS.index("g"), BANDS.index("r")
ROWS = 5
DAYS = np.array([0, 0, 1, 2, 5, 10, 15, 20, 30], float)
"""Days before the alert of the learnt token, whose time means nothing, the alert and seven earlier points."""


def family(attribution: list[float], band: int | list[int] = G, kind: int | list[int] = Measurement.DETECTION) -> str:
    shape = (ROWS, len(DAYS))

    def repeated(values: object) -> NDArray[np.generic]:
        return np.broadcast_to(np.asarray(values), shape)

    return family_of_points(
        PointSources(
            normalised(repeated(np.array(attribution, float))),  # type: ignore[arg-type]
            repeated(np.arange(len(DAYS)) == 0),  # type: ignore[arg-type]
            repeated(DAYS),  # type: ignore[arg-type]
            repeated(band),  # type: ignore[arg-type]
            repeated(kind),  # type: ignore[arg-type]
        )
    )


@pytest.mark.parametrize(
    ("attribution", "expected"),
    [
        ([9, 1, 1, 1, 1, 1, 1, 1, 1], "token-only"),
        ([1, -9, 1, 1, 1, 1, 1, 1, 1], "alert-only"),
        ([0, 1, 0, 0, 0, 0, 3, 0, -3], "few-epoch"),
        ([0, 1, 2, 2, 1, 0.2, 0.2, 0.2, 0.2], "short-range"),
        ([1, 1, 1, 1, 1, 1, 1, 1, 1], "whole-history"),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0], "none"),
    ],
)
def test_family_follows_from_where_the_attribution_lies(attribution: list[float], expected: str) -> None:
    assert family(attribution) == expected


def test_band_specific_only_where_other_bands_exist() -> None:
    of_r = [0, 0.1, 3, 0.1, 3, 0.1, 3, 0.1, 3]
    assert family(of_r, band=[G, G, R, G, R, G, R, G, R]) == "band-specific r"
    assert family(of_r, band=R) != "band-specific r"


def test_kind_specific_names_the_kind() -> None:
    limit, detection = Measurement.UPPER_LIMIT, Measurement.DETECTION
    kinds = [detection, detection, limit, detection, limit, detection, limit, detection, limit]
    assert family([0, 0.1, 3, 0.1, 3, 0.1, 3, 0.1, 3], kind=kinds) == "kind-specific upper limit"  # type: ignore[arg-type]


def test_effective_number_of_sources() -> None:
    assert effective_sources(np.array([[1.0, 0, 0, 0]])) == pytest.approx(1)
    assert effective_sources(np.full((3, 4), 0.25)) == pytest.approx(4)


def test_families_of_cells() -> None:
    distance = np.array([3.0, 3, 20, 20, 25, 25, 30, 30])
    assert family_of_cells(normalised(np.array([[5, 5, 1, 1, 1, 1, 1, 1.0]])), distance) == "central"
    assert family_of_cells(normalised(np.array([[0, 0, 5, 0, 5, 0, 0, 0.0]])), distance) == "few-cell"
    assert family_of_cells(normalised(np.ones((1, 8))), distance) == "whole-stamp"
    assert family_of_cells(np.zeros((1, 8)), distance) == "none"
