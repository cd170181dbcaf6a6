"""A store that was filled with made output records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

import pytest

pytest.importorskip("galsim", reason="simulated packets need the extra `demo`")

from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.simulate import SCHEMAS
from broker_filter.watch.feed import Feed
from broker_filter.watch.reading import AlertReader
from broker_filter.watch.store import AlertStore

Fill = Callable[..., tuple[AlertStore, Feed]]


@pytest.fixture
def fill() -> Iterator[Fill]:
    """Return a function that reads records into a new store, in the feed's own thread, and waits for its end."""

    stores = ExitStack()

    def fill_store(records: Sequence[bytes], keep: int = 1000, only: Sequence[int] = ()) -> tuple[AlertStore, Feed]:
        store, packets = stores.enter_context(closing(AlertStore(keep))), [Packet(record) for record in records]
        feed = Feed([[packets]], AlertReader(open_registry(SCHEMAS)), store, only=only, stop=threading.Event())
        feed.start()
        feed.join(60)
        return store, feed

    with stores:
        yield fill_store
