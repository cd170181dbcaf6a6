"""Replaces the configuration of a running service: after a signal, or when a file of the configuration has changed.

The next generation is built in a thread of its own while the present one works, and only one is built at a time. A
configuration that fails changes nothing: the present one stays in service.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaException

from broker_filter.config import Service
from broker_filter.errors import BrokerFilterError, is_fault
from broker_filter.file_stamp import Stamp, stamp
from broker_filter.health import Health
from broker_filter.kafka.client import explain
from broker_filter.metrics import Metrics
from broker_filter.scoring.bundle import CARD
from broker_filter.scoring.lens_files import FILES, LENS_CARD, lens_directory
from broker_filter.streaming.generation import Generation
from broker_filter.streaming.resolved import ResolvedService

LOOK_INTERVAL_S = 2.0
"""Time between two looks at the files. A change counts if two looks find the same: files are copied in that time."""
RETRY_INTERVAL_S = 60.0
"""With `reload: on_change`, time until a failed reload is tried again: its cause may lie in files that were never read,
or in the brokers."""

log = logging.getLogger(__name__)


class ChangedWhileReadError(BrokerFilterError):
    """Files of the configuration changed while they were read, so that the parts may not belong together."""


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """The service file of a running service, and how it is read again."""

    path: Path
    requested: threading.Event
    """Is set to request a reload. The reload clears it."""
    load_again: Callable[[Path, Service], ResolvedService]
    """Reads the file, to replace the given configuration. Raises BrokerFilterError with all errors of the file."""


class Reloader:
    """Builds generations from the service file, one at a time. One thread calls `run_once`."""

    def __init__(
        self,
        file: ServiceFile,
        service: ResolvedService,
        metrics: Metrics,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`service`: the present configuration, just loaded, so that later changes of its files are seen.

        `health`: says on /readyz that the last reload failed. `clock`: returns seconds.
        """
        self._file = file
        self._service = service
        self._metrics = metrics
        self._health = health
        self._clock = clock
        self._paths = (file.path, *_files(service))
        self._read = self._seen = self._stamps()
        self._looked = self._tried = clock()
        self._failed = False
        self._logged = ""

    def run_once(
        self, wait_s: float, build: Callable[[ResolvedService], Generation], install: Callable[[Generation], None]
    ) -> None:
        """Reload if a reload was requested, at the latest within `wait_s` seconds, or if a file has changed.

        `build`: makes a generation that can be used at once. `install`: puts it into service.
        """
        if self._file.requested.wait(wait_s):
            self._file.requested.clear()  # first: a request that comes during the reload leads to another one
            self._logged = ""
        elif not self._is_due():
            return
        self._reload(build, install)

    def _is_due(self) -> bool:
        now = self._clock()
        if self._service.config.reload != "on_change" or now - self._looked < LOOK_INTERVAL_S:
            return False
        self._looked, before, self._seen = now, self._seen, self._stamps()
        if self._seen != self._read and self._seen == before:
            log.info("%s, or a file that it names, has changed", self._file.path)
            self._logged = ""
            return True
        return self._failed and now - self._tried > RETRY_INTERVAL_S

    def _reload(self, build: Callable[[ResolvedService], Generation], install: Callable[[Generation], None]) -> None:
        self._read, self._tried = self._stamps(), self._clock()
        try:
            service = self._file.load_again(self._file.path, self._service.config)
            self._paths = (self._file.path, *_files(service))
            self._read = {**self._stamps(), **{path: self._read[path] for path in self._paths if path in self._read}}
            generation = build(service)
            self._refuse_changes()
            install(generation)
        except Exception as error:  # whatever is wrong with the new configuration, the present one must go on
            self._fail(error)
        else:
            self._service = service
            self._failed, self._health.note = False, ""
            self._metrics.count_reload(failed=False)
            log.info("%s was reloaded", self._file.path)

    def _refuse_changes(self) -> None:
        """Raise ChangedWhileReadError if a file of a bundle, reference or lens changed during the reload.

        The service file is not checked: it is read at once, so that its content belongs together.
        """
        changed = {path for path, now in self._stamps().items() if now != self._read[path]} - {self._file.path}
        if changed:
            raise ChangedWhileReadError(
                f"{', '.join(map(str, sorted(changed)))} changed during the reload: reload again when all files are in "
                "place"
            )

    def _fail(self, error: Exception) -> None:
        reason = explain(error.args[0]) if isinstance(error, KafkaException) else str(error) or repr(error)
        fault = error if is_fault(error) and not isinstance(error, KafkaException) else None
        if reason != self._logged:  # a reload that is tried again does not repeat the message
            log.error("the reload failed, and the earlier configuration stays in service: %s", reason, exc_info=fault)
        self._failed, self._logged = True, reason
        self._health.note = f"the last reload failed, and the earlier configuration stays in service: {reason}"
        self._metrics.count_reload(failed=True)

    def _stamps(self) -> dict[Path, Stamp | None]:
        return {path: stamp(path) for path in self._paths}


def _files(service: ResolvedService) -> Iterator[Path]:
    """Yield the files of bundles, reference and lenses. Files that filters read are looked at where they are used."""
    for bundle in (*service.bundles, *service.shadows):
        yield bundle.directory / CARD
        for part in bundle.parts:
            yield from (part.directory / name for name in (CARD, *part.card.files))
    if anomalies := service.config.anomalies:
        yield anomalies.reference
        for lens in anomalies.lens:
            yield from (lens_directory(lens) / name for name in (LENS_CARD, *FILES))
