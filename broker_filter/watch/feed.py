"""Reads the sources of a page into its store, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from broker_filter.errors import BrokerFilterError
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject
from broker_filter.packets.schemas.registry_client import RegistryUnavailable
from broker_filter.watch.reading import AlertReader
from broker_filter.watch.store import AlertStore, Content, Facts

RETRY_S = 2.0
"""Time until a schema is asked for again at a registry that did not answer."""

log = logging.getLogger(__name__)


class Feed:
    """The thread that reads. `problem`: why it ended early, or why nothing arrives at present; empty if all is well."""

    def __init__(
        self,
        sources: Sequence[Iterable[Sequence[Packet]]],
        reader: AlertReader,
        store: AlertStore,
        *,
        only: Collection[int] = (),
        stop: threading.Event,
    ) -> None:
        """Prepare the thread, which `start` starts.

        `sources`: each yields batches of packets, and an empty one when it has caught up with a topic.

        `only`: ids of the alerts to keep; all alerts are kept if it is empty. `stop`: ends the thread when it is set.
        """
        self._sources = sources
        self._reader = reader
        self._store = store
        self._only = only
        self._stop = stop
        self.is_reading = True
        self.packets = 0
        self.unreadable: Counter[str] = Counter()
        """Packets that cannot be shown, by the reason."""
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="watch-feed", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def report(self, problem: str) -> None:
        """Show why nothing arrives at present; an empty text says that it was mended."""
        self.problem = problem

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            for source in self._sources:
                for packets in source:
                    self.is_reading = bool(packets)
                    self._take(packets)
                    if self._stop.is_set():
                        return
        except (BrokerFilterError, OSError) as error:
            self.problem = str(error)
            log.error("%s", error)
        except Exception:
            self.problem = "a fault of the program stopped the reading; the log has the details"
            log.exception("the reading stopped; please report this")
        finally:
            self.is_reading = False

    def _take(self, packets: Sequence[Packet]) -> None:
        self.packets += len(packets)
        if not packets:
            return
        for found in self._read(packets):
            if isinstance(found, Reject):
                self.unreadable[str(found.reason)] += 1
                log.debug("%s: %s: %s", found.packet.position, found.reason, found.detail)
            elif not self._only or found[0].alert_id in self._only:
                self._store.add(*found)

    def _read(self, packets: Sequence[Packet]) -> list[tuple[Facts, Content] | Reject]:
        """Return what the reader makes of packets; waits as long as a schema registry does not answer."""
        unanswered = ""
        while True:
            try:
                found = list(self._reader.read(packets))
            except RegistryUnavailable as error:
                log.warning("%s; trying again in %.0f s", error, RETRY_S)
                self.problem = unanswered = str(error)
                if self._stop.wait(RETRY_S):
                    return []
            else:
                if self.problem == unanswered:
                    self.problem = ""
                return found
