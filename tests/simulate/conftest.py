"""A simulated night of each survey, shared by the tests of this folder."""

from __future__ import annotations

import pytest

pytest.importorskip("galsim", reason="simulated alerts need the extra `demo`")

from broker_filter.simulate import SimulatedAlert, simulate_night
from broker_filter.simulate.instruments import LSST, ZTF
from broker_filter.simulate.night import Night, Observation

N = 300
SEED = 20260225


@pytest.fixture(scope="session")
def ztf_night() -> list[SimulatedAlert]:
    return list(simulate_night(N, SEED, "ztf"))


@pytest.fixture(scope="session")
def lsst_night() -> list[SimulatedAlert]:
    return list(simulate_night(100, SEED, "lsst"))


@pytest.fixture(scope="session")
def ztf_observations() -> list[Observation]:
    """The observations that are encoded in the packets of `ztf_night`."""
    return list(Night(ZTF, SEED).observations(N))


@pytest.fixture(scope="session")
def lsst_observations() -> list[Observation]:
    return list(Night(LSST, SEED).observations(100))
