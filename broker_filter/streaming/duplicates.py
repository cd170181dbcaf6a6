"""Marks alerts whose id was seen before. Whether such an alert is published is decided by the router."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch

SETTLE = 8_192
"""Number of new ids that are collected before they are merged into the sorted array of ids. One merge copies the array,
which takes about 20 ms for a million ids."""

FORGOTTEN = np.iinfo(np.int64).min
"""Sequence number of an id that is no longer remembered, whatever the size of the window is."""


class DuplicateWindow:
    """The latest `size` alert ids that were scored, each with the position at which it was first seen.

    Invariant: a packet that is read again from its own position (after a rebalance, or when a transaction is repeated)
    is not a duplicate, so that marking a batch twice gives the same marks. A packet with the same id at another
    position is a duplicate. The window is in memory: ids seen before a restart, or by another instance, are unknown.

    An id needs 24 bytes. In a dictionary of integers it would need 140 bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._remembered = 0  # sequence number of the next id; ids from `_remembered - _size` on are in the window
        self._latest: dict[int, tuple[int, int]] = {}  # ids not merged yet: identity to sequence number and place
        self._identities = np.empty(0, np.uint64)  # merged ids, sorted; the two arrays below belong to it
        self._numbers = np.empty(0, np.int64)
        self._places = np.empty(0, np.int64)

    def mark(self, alerts: AlertBatch, taken: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which rows repeat an id, bool[N], and remember the new ids.

        Rows that are not `taken` are ignored.
        """
        duplicate = np.zeros(len(alerts), dtype=np.bool_)
        identities = _identities(alerts)
        settled = self._find(identities)
        packet_index, record_index = alerts.packet_index.tolist(), alerts.record_index.tolist()
        for i, identity in enumerate(identities.tolist()):
            if not taken[i]:
                continue
            # If two places have the same 64-bit hash, a duplicate stays unmarked. There is no other consequence.
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
        """Forget the ids of some rows.

        These alerts were not published, so they are not duplicates when they come again.
        """
        identities = _identities(alerts)
        for i in rows:
            self._latest.pop(int(identities[i]), None)
            at = np.searchsorted(self._identities, identities[i])
            if at < len(self._identities) and self._identities[at] == identities[i]:
                self._numbers[at] = FORGOTTEN

    def _find(self, identities: NDArray[np.uint64]) -> dict[int, tuple[int, int]]:
        """Return the sequence number and place of each identity that is in the sorted array, by identity."""
        at = np.searchsorted(self._identities, identities)
        at = at[at < len(self._identities)]
        at = at[np.isin(self._identities[at], identities)]
        found = zip(self._numbers[at].tolist(), self._places[at].tolist(), strict=True)
        return dict(zip(self._identities[at].tolist(), found, strict=True))

    def _settle(self) -> None:
        """Merge the latest ids into the sorted array, and drop ids that have left the window."""
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
    """Return a key for each of N alerts, uint64[N]: the id, with the survey in the highest bit, which no id uses."""
    return alerts.alert_id.view(np.uint64) ^ (alerts.survey.astype(np.uint64) << np.uint64(63))
