"""Simulates valid alert packets, for the demonstration, for load tests, and for tests without survey data.

The same seed gives the same bytes. Simulated alerts must never be mistaken for observed ones: packets and schemas
contain the word "simulated". This package needs GalSim (the extra `demo`).
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
from broker_filter.simulate.night import LSST_RATES, RATES, Night

__all__ = ["BOGUS", "LSST_RATES", "RATES", "REAL", "SCHEMAS", "SimulatedAlert", "simulate_night"]

SCHEMAS = Path(str(files(__name__))) / "schemas"
"""A directory that can be used as a schema registry: it holds the schema of the simulated LSST packets (id 1000)."""


@dataclass(frozen=True, slots=True)
class SimulatedAlert:
    """A simulated alert packet and its true nature.

    `packet`: the bytes of the Kafka message. `kind`: the simulated phenomenon, a key of REAL or BOGUS.
    """

    packet: bytes
    kind: str
    alert_id: int
    object_id: str
    survey: Literal["ztf", "lsst"]

    @property
    def is_real(self) -> bool:
        """Whether the alert shows a change in the sky; otherwise it is bogus."""
        return self.kind in REAL


def simulate_night(
    n: int, seed: int, survey: Literal["ztf", "lsst"] = "ztf", rates: Mapping[str, float] | None = None
) -> Iterator[SimulatedAlert]:
    """Yield the first `n` alerts of a night in order of time.

    ZTF packets are Avro container files (schemavsn 4.02); LSST packets are in Confluent wire format (schema id 1000,
    see SCHEMAS). `rates`: the relative frequencies of the kinds of alerts; by default RATES for ZTF and LSST_RATES for
    LSST. Raises ValueError for an unknown kind.
    """
    packets = {"ztf": ztf, "lsst": lsst}[survey]
    instrument, usual_rates = {"ztf": (ZTF, RATES), "lsst": (LSST, LSST_RATES)}[survey]
    night = Night(instrument, seed, usual_rates if rates is None else rates)
    for observation in night.observations(n):
        yield SimulatedAlert(
            packets.encode(observation),
            observation.kind,
            packets.alert_id(observation),
            packets.object_id(observation),
            survey,
        )
