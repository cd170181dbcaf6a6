"""Policies over an archive that is scored: each alert with its object's past, alerts seen before left out.

For archives alone. What a policy says of an alert depends on every earlier one of the object, which a service that
starts again, or shares its partitions, has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.scoring.bts_policies import POLICIES, PolicyFilter
from broker_filter.streaming.scored import ScoredBatch

MAGNITUDE = "magpsf"


class PolicyError(BrokerFilterError, ValueError):
    """A policy that does not exist, or that is to read what no model gives."""

    exit_status = USAGE


class Policies:
    """The policies that were asked for, each `POLICY=OUTPUT`."""

    def __init__(self, asked: Sequence[str], outputs: Sequence[str]) -> None:
        """`outputs`: what the models give, `<model>.<label>`. Raises PolicyError."""
        self._filters: dict[str, tuple[str, PolicyFilter]] = {}
        for text in asked:
            name, _, output = text.partition("=")
            if name not in POLICIES:
                raise PolicyError(f"--policy {text}: no policy is called {name!r}; there are {', '.join(POLICIES)}")
            if output not in outputs:
                raise PolicyError(f"--policy {text}: no output is called {output!r}; there are {', '.join(outputs)}")
            if name in self._filters:
                raise PolicyError(f"--policy {text}: {name} has been asked for already")
            self._filters[name] = (output, PolicyFilter(POLICIES[name]))

    @property
    def names(self) -> list[str]:
        """The policies."""
        return list(self._filters)

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that they read, which must be decoded."""
        return (MAGNITUDE,) if self._filters else ()

    def judge(self, batch: ScoredBatch) -> dict[str, list[bool | None]]:
        """By policy whether the object of each of N alerts had passed by then; None of what was not scored or was seen
        before. Must be called once for each batch, in order."""
        rows = batch.scored[~batch.duplicate[batch.scored]]
        objects = [batch.alerts.object_id[i] for i in rows.tolist()]
        judged: dict[str, list[bool | None]] = {}
        for name, (output, policy) in self._filters.items():
            score, magpsf = batch.scores.columns()[output][rows], batch.alerts.column(MAGNITUDE)[rows]
            passed = np.full(len(batch.alerts), None, object)
            passed[rows] = policy.passed(objects, score, magpsf)
            judged[name] = passed.tolist()
        return judged
