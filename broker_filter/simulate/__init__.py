"""Valid alert packets of skies that nobody saw: for the demonstration, for load tests, and where no survey data are.

Seeded: the same seed gives the same bytes. Must never be mistaken for data: packets and schemas say "simulated". Needs
GalSim (the extra `demo`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from broker_filter.simulate import lsst, ztf
from broker_filter.simulate.events import BOGUS, REAL
from broker_filter.simulate.instruments import LSST, ZTF
from broker_filter.simulate.night import RATES, Night

__all__ = ["BOGUS", "RATES", "REAL", "SCHEMAS", "SimulatedAlert", "simulate_night"]

SCHEMAS = Path(str(files(__name__))) / "schemas"
"""A directory that stands in for a schema registry: it holds the schema of the simulated LSST packets (id 1000)."""


@dataclass(frozen=True, slots=True)
class SimulatedAlert:
    """A packet as the survey would have sent it, and what it truly shows: `kind` is a key of RATES."""

    packet: bytes
    kind: str
    alert_id: int
    object_id: str
    survey: Literal["ztf", "lsst"]

    @property
    def is_real(self) -> bool:
        """Whether something in the sky changed."""
        return self.kind in REAL


def simulate_night(
    n: int, seed: int, survey: Literal["ztf", "lsst"] = "ztf", rates: Mapping[str, float] = RATES
) -> Iterator[SimulatedAlert]:
    """The first `n` alerts of a night, in order of time.

    ZTF packets are container files (schemavsn 4.02), LSST's are Confluent wire format (schema id 1000, see SCHEMAS).
    `rates`: relative frequencies of kinds. Raises ValueError for an unknown kind.
    """
    packets = {"ztf": ztf, "lsst": lsst}[survey]
    night = Night({"ztf": ZTF, "lsst": LSST}[survey], seed, rates)
    for observation in night.observations(n):
        yield SimulatedAlert(
            packets.encode(observation),
            observation.kind,
            packets.alert_id(observation),
            packets.object_id(observation),
            survey,
        )
