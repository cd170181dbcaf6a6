"""What a run of the benchmark found, as it was measured. What it amounts to is said in `targets`."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker_filter.bench.measure import Contest, Spread


@dataclass(slots=True)
class Report:
    """The figures of the parts that were measured; the others are empty."""

    processor: str
    cores: int
    python: str
    libraries: dict[str, str]
    models: dict[str, str]
    """By name, what really runs each; the naive loop and the floors compete with the first."""
    packets: int
    """Distinct ones; archive and broker hold `alerts`, which repeat them."""
    alerts: int
    repetitions: int
    broker: str | None = None
    stages: dict[str, Contest] = field(default_factory=dict)
    """On one thread where nothing else is said."""
    wholes: dict[str, Contest] = field(default_factory=dict)
    """Archives on one thread where nothing else is said; through the broker on all cores."""
    scaling: dict[str, Contest] = field(default_factory=dict)
    """By partitions; the competitors differ in instances."""
    quantities: dict[str, Spread] = field(default_factory=dict)
    """Their names say the unit."""
