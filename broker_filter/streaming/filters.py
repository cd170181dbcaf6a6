"""The filters of a service file, each tried once on every batch."""

from __future__ import annotations

from collections.abc import Sequence

from broker_filter.streaming.expressions import Expression
from broker_filter.streaming.scored import FilterOutcome, ScoredBatch


class Filters:
    """The compiled filters of a service file."""

    def __init__(self, filters: Sequence[tuple[str, Expression]]) -> None:
        """Hold the filters. `filters`: name and expression of each filter."""
        self._filters = tuple(filters)

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that the filters read, and that must be decoded."""
        return tuple(dict.fromkeys(column for _, expression in self._filters for column in expression.columns))

    def outcomes(self, scored: ScoredBatch) -> tuple[FilterOutcome, ...]:
        """Return for each filter which alerts of a batch pass it, in the configured order."""
        return tuple(
            FilterOutcome(name, expression.revision, expression.evaluate(scored)) for name, expression in self._filters
        )
