"""What to measure, and on what. Imports nothing heavy: the command line offers the parts by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ALONE = ("stages", "archive", "memory")
THROUGH_BROKER = ("kafka", "startup", "scaling", "latency", "burst")
PARTS = (*ALONE, *THROUGH_BROKER)
"""In the order in which they are measured: an idle broker is not quite idle."""

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Options:
    """`inputs`: of ZTF packets; simulated ones without any. `models`: bundles; naive loop and floors compete with the
    first. `alerts`: how many go through archive and broker. `bootstrap_servers`: a running cluster; without any, Apache
    Kafka of KAFKA_HOME is started, or else the embedded broker.
    """

    inputs: Sequence[Path]
    models: Sequence[str]
    parts: Sequence[str]
    device: Device
    alerts: int
    repetitions: int
    bootstrap_servers: str | None
