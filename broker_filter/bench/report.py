"""The figures that a run of the benchmark measured. `targets` computes and judges the ratios between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker_filter.bench.measure import Contest, Spread


@dataclass(slots=True)
class Report:
    """The figures of the parts that were measured; the fields of other parts are empty."""

    processor: str
    cores: int
    python: str
    libraries: dict[str, str]
    models: dict[str, str]
    """Version and execution provider of each model by name; the naive loop and the floors run the first."""
    packets: int
    """Number of distinct packets; the archive and the topic hold `alerts` packets, which repeat them."""
    alerts: int
    repetitions: int
    broker: str | None = None
    stages: dict[str, Contest] = field(default_factory=dict)
    """Contests by stage, on one thread unless the competitor's name says otherwise."""
    wholes: dict[str, Contest] = field(default_factory=dict)
    """Contests of whole runs: archives on one thread unless the name says otherwise, Kafka to Kafka on all cores."""
    scaling: dict[str, Contest] = field(default_factory=dict)
    """Contests by number of partitions, between different numbers of instances."""
    quantities: dict[str, Spread] = field(default_factory=dict)
    """Other figures; each name contains the unit."""
