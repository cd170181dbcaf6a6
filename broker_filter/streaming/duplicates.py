"""Alerts whose id was seen before. Marks them and forgets the oldest; what becomes of them is decided elsewhere."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch, Survey


class DuplicateWindow:
    """The latest `size` alert ids that were scored, each with the position where it was first seen.

    Invariant: a packet read again from its own position (after a rebalance, or when a transaction is tried again) is
    not a duplicate, so that marking a batch twice gives the same marks. A second packet with the id, at another
    position, is one. Lives in one process: ids seen before a restart, or by another instance, are not known.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._first_seen: dict[int, int] = {}
        self._oldest_first: deque[int] = deque()

    def mark(self, alerts: AlertBatch, taken: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the `taken` rows repeat an id, bool[N]; remembers those that do not. Other rows are passed over."""
        duplicate = np.zeros(len(alerts), dtype=np.bool_)
        ids, surveys = alerts.alert_id.tolist(), alerts.survey.tolist()
        packet_index, record_index = alerts.packet_index.tolist(), alerts.record_index.tolist()
        for i in np.flatnonzero(taken).tolist():
            # Plain integers in place of tuples and positions: a third of the memory, for the million ids of a night.
            # Two places with the same 64-bit hash would leave a duplicate unmarked, nothing worse.
            identity = ids[i] * len(Survey) + surveys[i]
            place = hash((alerts.packets[packet_index[i]].position, record_index[i]))
            if identity in self._first_seen:
                duplicate[i] = self._first_seen[identity] != place
            else:
                self._remember(identity, place)
        return duplicate

    def _remember(self, identity: int, place: int) -> None:
        self._first_seen[identity] = place
        self._oldest_first.append(identity)
        if len(self._oldest_first) > self._size:
            del self._first_seen[self._oldest_first.popleft()]
