"""The options of the benchmark. Imports nothing heavy, because `--help` lists the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ALONE = ("stages", "lsst", "archive", "rows", "lens", "sky", "memory")
THROUGH_BROKER = ("kafka", "startup", "scaling", "latency", "burst")
PARTS = (*ALONE, *THROUGH_BROKER)
"""All parts in the order in which they are measured: first those without a broker, which uses some CPU even if idle."""

OF_LSST = ("lsst", "burst")
"""The parts that use LSST packets alone."""
OF_BOTH = ("rows",)
"""The parts that use packets of both surveys; all others use ZTF packets alone."""
WITHOUT_NAIVE_LOOP = (*OF_LSST, "rows", "lens", "sky")
"""The parts that use no naive loop over a model, and so measure with any bundle."""
VISIT = 10_000
"""Alerts of one visit of Rubin, on average; some have more than 40,000."""

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a run.

    `inputs`: files of ZTF packets; if empty, packets are simulated. `models`: bundles; the naive loop and the floors
    are compared with the first. `alerts`: number of alerts sent through the archive and the broker.
    `bootstrap_servers`: a running cluster; if None, Apache Kafka is started from KAFKA_HOME, or else the embedded
    broker. `schema_registry`: where the schemas of LSST packets in `inputs` are; if None, the parts OF_LSST and
    OF_BOTH simulate their LSST packets. `visit`: number of alerts that arrive together in the part `burst`.
    """

    inputs: Sequence[Path]
    models: Sequence[str]
    parts: Sequence[str]
    device: Device
    alerts: int
    repetitions: int
    bootstrap_servers: str | None
    schema_registry: str | None = None
    visit: int = VISIT
