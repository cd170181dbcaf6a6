"""Alerts whose id was seen before. Marks them and forgets the oldest; what becomes of them is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch

SETTLE = 8_192
"""Ids that are gathered before they are put among the others, which moves all of those: some 20 ms for a million."""

FORGOTTEN = np.iinfo(np.int64).min
"""The number of an id that is in no window, however large that is."""


class DuplicateWindow:
    """The latest `size` alert ids that were scored, each with the position where it was first seen.

    Invariant: a packet read again from its own position (after a rebalance, or when a transaction is tried again) is
    not a duplicate, so that marking a batch twice gives the same marks. A second packet with the id, at another
    position, is one. Lives in one process: ids seen before a restart, or by another instance, are not known.

    An id takes 24 bytes; in a dictionary of integers it would take 140, most of what a process grows by in a night.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._remembered = 0  # ids so far; those numbered from `_remembered - _size` on are in the window
        self._latest: dict[int, tuple[int, int]] = {}  # number and place by identity, of ids that have not settled
        self._identities = np.empty(0, np.uint64)  # of those that have, in order
        self._numbers = np.empty(0, np.int64)
        self._places = np.empty(0, np.int64)

    def mark(self, alerts: AlertBatch, taken: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the `taken` rows repeat an id, bool[N]; remembers those that do not. Other rows are passed over."""
        duplicate = np.zeros(len(alerts), dtype=np.bool_)
        identities = _identities(alerts)
        settled = self._find(identities)
        packet_index, record_index = alerts.packet_index.tolist(), alerts.record_index.tolist()
        for i, identity in enumerate(identities.tolist()):
            if not taken[i]:
                continue
            # Two places with the same 64-bit hash would leave a duplicate unmarked, nothing worse.
            place = hash((alerts.packets[packet_index[i]].position, record_index[i]))
            first = self._latest.get(identity) or settled.get(identity)
            if first is not None and first[0] >= self._remembered - self._size:
                duplicate[i] = first[1] != place
            else:
                self._latest[identity] = self._remembered, place
                self._remembered += 1
        if len(self._latest) >= SETTLE:
            self._settle()
        return duplicate

    def forget(self, alerts: AlertBatch, rows: Iterable[int]) -> None:
        """Takes back that some rows were seen: alerts that were not published, and are new when they come again."""
        identities = _identities(alerts)
        for i in rows:
            self._latest.pop(int(identities[i]), None)
            at = np.searchsorted(self._identities, identities[i])
            if at < len(self._identities) and self._identities[at] == identities[i]:
                self._numbers[at] = FORGOTTEN

    def _find(self, identities: NDArray[np.uint64]) -> dict[int, tuple[int, int]]:
        """Number and place by identity, of those that have settled."""
        at = np.searchsorted(self._identities, identities)
        at = at[at < len(self._identities)]
        at = at[np.isin(self._identities[at], identities)]
        found = zip(self._numbers[at].tolist(), self._places[at].tolist(), strict=True)
        return dict(zip(self._identities[at].tolist(), found, strict=True))

    def _settle(self) -> None:
        """Puts the latest ids among the others, and drops those that have left the window."""
        identities = np.fromiter(self._latest, np.uint64, len(self._latest))
        numbers, places = np.array(list(self._latest.values()), np.int64).T
        self._latest.clear()
        order = np.argsort(identities)
        stays = self._numbers >= self._remembered - self._size
        at = np.searchsorted(self._identities[stays], identities[order])
        self._identities = np.insert(self._identities[stays], at, identities[order])
        self._numbers = np.insert(self._numbers[stays], at, numbers[order])
        self._places = np.insert(self._places[stays], at, places[order])


def _identities(alerts: AlertBatch) -> NDArray[np.uint64]:
    """What tells alerts apart, uint64[N]: the id, and the survey in the highest bit, which no survey's ids use."""
    return alerts.alert_id.view(np.uint64) ^ (alerts.survey.astype(np.uint64) << np.uint64(63))
