"""Applies policies to a scored archive: each alert is judged with the earlier alerts of its object, without duplicates.

Policies are for archives only. They depend on all earlier alerts of an object, which a service does not have after a
restart or if several instances share the partitions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.streaming.scored import ScoredBatch
from broker_filter.tables.bts_policies import POLICIES, PolicyFilter

MAGNITUDE = "magpsf"


class PolicyError(BrokerFilterError, ValueError):
    """The policy does not exist, or no model has the output that the policy is to read."""

    exit_status = USAGE


class Policies:
    """The requested policies, each written as `POLICY=OUTPUT`."""

    def __init__(self, asked: Sequence[str], outputs: Sequence[str]) -> None:
        """Parse the requested policies. `outputs`: names of the models' outputs, `<model>.<label>`.

        Raises PolicyError for an unknown policy or output, or a policy that is requested twice.
        """
        self._filters: dict[str, tuple[str, PolicyFilter]] = {}
        for text in asked:
            name, _, output = text.partition("=")
            if name not in POLICIES:
                raise PolicyError(f"--policy {text}: unknown policy {name!r}; known policies: {', '.join(POLICIES)}")
            if output not in outputs:
                raise PolicyError(f"--policy {text}: unknown output {output!r}; known outputs: {', '.join(outputs)}")
            if name in self._filters:
                raise PolicyError(f"--policy {text}: {name} is requested twice")
            self._filters[name] = (output, PolicyFilter(POLICIES[name]))

    @property
    def names(self) -> list[str]:
        """The names of the policies."""
        return list(self._filters)

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that the policies read, and that must be decoded."""
        return (MAGNITUDE,) if self._filters else ()

    def judge(self, batch: ScoredBatch) -> dict[str, list[bool | None]]:
        """Return, for each policy, a list of N values: whether the object of the alert has passed the policy by then.

        The value is None for an alert that was not scored or is a duplicate. Call this once for each batch, in order.
        """
        rows = batch.scored[~batch.duplicate[batch.scored]]
        objects = [batch.alerts.object_id[i] for i in rows.tolist()]
        judged: dict[str, list[bool | None]] = {}
        for name, (output, policy) in self._filters.items():
            score, magpsf = batch.scores.columns()[output][rows], batch.alerts.column(MAGNITUDE)[rows]
            passed = np.full(len(batch.alerts), None, object)
            passed[rows] = policy.passed(objects, score, magpsf)
            judged[name] = passed.tolist()
        return judged
