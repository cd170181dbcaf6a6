"""The service: threads that read, decode, score and commit, with short queues between them.

One thread reads, several decode, one scores and routes, and one commits.

No error loses an alert: if a thread fails or is stuck, the process ends with a message, and the next start continues
from the committed positions.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from queue import Empty, Full, Queue
from typing import NoReturn, TypeVar

from confluent_kafka import KafkaException

from broker_filter.errors import is_fault
from broker_filter.health import Health, serve
from broker_filter.kafka.client import KafkaSetupError, explain, pauses
from broker_filter.kafka.connect import Endpoints, connect
from broker_filter.kafka.sink import KafkaSink, divide
from broker_filter.kafka.source import Delivery
from broker_filter.kafka.transactions import Work
from broker_filter.kafka.watchdog import Stage
from broker_filter.metrics import Metrics, Network
from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.compiled import IMPLEMENTATION, why_python
from broker_filter.packets.rejects import Reject
from broker_filter.packets.schemas.registry import RegistryUnavailable
from broker_filter.reload import Reloader, ServiceFile
from broker_filter.scoring.runtimes import available_cores
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_alerts
from broker_filter.streaming.generation import Generation, open_generation, open_input_schemas
from broker_filter.streaming.resolved import ResolvedService
from broker_filter.streaming.shadow import counterpart

SCORED_BATCHES = 4
"""Length of the queue of scored batches, which fills while a transaction commits."""
TICK_S = 0.5
"""Longest time until a waiting thread notices that the service ends."""
ROOM_S = 1.0
"""Time that the reading thread waits for room in the queue before it pauses its partitions and polls."""
OBSERVE_INTERVAL_S = 2.0
"""Time between two updates of lag and health."""
DRAIN_TIMEOUT_S = 25.0
"""Longest time from SIGTERM to the end. Kubernetes kills a pod after 30 s by default."""
END_TIMEOUT_S = 10.0
"""Time for the other threads to end after one thread has failed."""
EXIT_FAILED = 1

log = logging.getLogger(__name__)

Decoded = tuple[AlertBatch, list[Reject]]
Sent = tuple[Delivery, Generation, Future[Decoded]]
"""A batch on its way through the stages, with the generation that decodes, scores and routes it."""
Routed = tuple[list[Work], bool]
"""Work for the committing thread, and whether it is the last part of the batch that was read together."""
T = TypeVar("T")


class EndedError(Exception):
    """Ends a thread because another thread has failed."""


def _fault(failure: BaseException | None) -> BaseException | None:
    """Return a fault of the program, whose traceback is logged; None for an error that a user can mend."""
    return failure if failure and is_fault(failure) and not isinstance(failure, KafkaException) else None


class FilterService:
    """The stages of the service and their threads. `run` works until the service is stopped."""

    def __init__(self, service: ResolvedService, stop: threading.Event, file: ServiceFile | None = None) -> None:
        """Load the models and the reference. Their errors are raised here, before anything is read.

        Once `stop` is set, no more messages are read, and the packets in flight are committed. `file`: the file from
        which the configuration can be reloaded.
        """
        self._config = config = service.config
        self._stop = stop
        self._metrics = Metrics()
        self._health = Health()
        self._health.unhealthy_reason = self._unhealthy_reason
        self._health.set("group", "not joined yet")
        self._reloader = Reloader(file, service, self._metrics, self._health) if file else None
        self._failed = threading.Event()
        self._failure: BaseException | None = None
        self._reading, self._decoding, self._scoring, self._shadowing, self._routing, self._committing = stages = [
            Stage(name, self._metrics) for name in ("read", "decode", "score", "shadow", "route", "commit")
        ]
        self._stages = stages
        schemas = open_input_schemas(config.input, self._decoding.beat)
        # Only the keys that cannot change without a restart are read from `_config`. The other keys, and all that they
        # make, are read from `_generation`, which a reload replaces as a whole.
        self._open = partial(open_generation, registry=schemas, waiting=self._routing.beat)
        self._generation = self._open(service)
        self._window = DuplicateWindow(config.duplicate_window)
        threads = config.runtime.decode_threads or available_cores()
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._decoded: Queue[Sent | None] = Queue(threads + 1)
        self._routed: Queue[Routed | None] = Queue(SCORED_BATCHES)
        self._observed = -math.inf
        self._set_out = 0  # number of batches that were read; only the reading thread changes it
        self._describe_process()
        self._describe_generation(self._generation)

    def run(self) -> None:
        """Work until `stop` is set.

        Raises the error of a thread that failed, and KafkaSetupError for an error of Kafka.

        If a thread is stuck, it ends the process with exit status EXIT_FAILED.
        """
        http = self._config.http
        with serve(self._health, self._metrics, http.host, http.port) as port:
            log.info("metrics and health on http://%s:%d", http.host, port)
            try:
                endpoints = connect(self._config, self._metrics, self._health, self._committing, self._stop)
                if endpoints:
                    self._work(endpoints)
            except KafkaException as error:
                raise KafkaSetupError(explain(error.args[0])) from error

    # -- the stages, in the order in which data pass them

    def _read(self, endpoints: Endpoints, committer: threading.Thread) -> None:
        source = endpoints.source
        try:
            while not self._stop.is_set():
                self._check()
                with self._reading.watched():
                    batch = self._generation.config.batch
                    delivery = source.take(batch.max_size, batch.max_wait_ms / 1000)
                self._observe(endpoints)
                if delivery:
                    self._set_out += 1
                    self._metrics.batch_alerts.observe(len(delivery.packets))
                    self._send(delivery, self._generation, endpoints)
            log.info("stopping: committing the messages in flight")
            self._offer(None, endpoints)
            while committer.is_alive():
                self._serve_group(endpoints)
                committer.join(TICK_S)
            endpoints.report_positions(wait=True)
        finally:
            source.close()

    def _send(self, delivery: Delivery, generation: Generation, endpoints: Endpoints) -> None:
        decoded = self._decoders.submit(self._decode, delivery, generation)
        self._offer((delivery, generation, decoded), endpoints)
        delivery.set_out()

    def _decode(self, delivery: Delivery, generation: Generation) -> Decoded:
        with self._decoding.working():
            return self._retry(lambda: generation.decoder.decode_some(delivery.packets), self._decoding)

    def _score(self) -> None:
        while self._score_next():
            pass
        self._put(None)

    def _score_next(self) -> bool:
        """Score and route the next batch. Returns whether there was one.

        Between two calls, the thread holds no batch and no generation in memory.
        """
        if (item := self._next(self._decoded, idle=lambda: self._look_at_files(self._generation))) is None:
            return False
        delivery, generation, decoded = item
        while not wait([decoded], TICK_S).done:
            self._check()
        alerts, rejects = decoded.result()
        self._look_at_files(generation)
        while True:
            part, delivery = delivery.split(len(alerts.packets))
            with self._scoring.working():
                scored = score_alerts(
                    alerts, rejects, generation.scorer, self._window, generation.judge, generation.filters
                )
                generation.drift.count(scored)
            if generation.shadows.models:
                with self._shadowing.working():
                    scored, outcomes = generation.shadows.score(scored)
                for outcome in outcomes:
                    self._metrics.count_shadow(outcome)
            with self._routing.working():
                routed = self._retry(lambda: generation.router.route(scored), self._routing)  # noqa: B023 -- called at once
                self._window.forget(alerts, [i for i in routed.refused if not scored.duplicate[i]])
                works = divide(part, scored, routed)
            self._put((works, not delivery.packets))
            if not delivery.packets:
                return True
            # To bound the memory, the decoder returned only a part of the batch. The rest is decoded now.
            alerts, rejects = self._decode(delivery, generation)

    def _look_at_files(self, generation: Generation) -> None:
        """Read the filters' files again if they have changed. Only the scoring thread may call this."""
        with self._scoring.watched():
            if generation.files.look():
                self._metrics.set_filter_files(generation.files.failed)

    def _commit(self, sink: KafkaSink) -> None:
        arrived = 0
        try:
            while True:
                try:
                    item = self._routed.get(timeout=min(TICK_S, sink.seconds_left(idle=arrived == self._set_out)))
                except Empty:
                    self._check()
                else:
                    if item is None:
                        break
                    works, whole = item
                    with self._committing.watched():
                        sink.put(works)
                    arrived += whole
                sink.commit(idle=arrived == self._set_out)
            sink.commit_everything()
        finally:
            sink.close()

    # -- another configuration

    def _reload(self, endpoints: Endpoints) -> None:
        if not self._reloader:
            return

        def build(service: ResolvedService) -> Generation:
            generation = self._open(service, before=self._generation)
            names, present = service.config.output_topics, self._generation.config.output_topics
            if new := [name for name in names if name not in present]:
                endpoints.topics.add(service.config.output, new)
            return generation

        def install(generation: Generation) -> None:
            self._describe_generation(generation)
            self._generation = generation  # for the next batch that the reading thread takes

        while not self._stop.is_set():
            self._check()
            self._reloader.run_once(TICK_S, build, install)

    # -- between the stages

    def _offer(self, item: Sent | None, endpoints: Endpoints) -> None:
        """Put a batch into the queue to the scorer. While the queue is full, it polls, to stay in the group."""
        while True:
            try:
                self._decoded.put(item, timeout=ROOM_S)
            except Full:
                self._serve_group(endpoints)
            else:
                return

    def _serve_group(self, endpoints: Endpoints) -> None:
        self._check()
        with self._reading.watched():
            endpoints.source.pause()
        self._observe(endpoints)

    def _put(self, routed: Routed | None) -> None:
        while True:
            try:
                self._routed.put(routed, timeout=TICK_S)
            except Full:
                self._check()
            else:
                return

    def _next(self, queue: Queue[T], idle: Callable[[], None] = lambda: None) -> T:
        """Return the next item of a queue, and call `idle` from time to time while there is none."""
        while True:
            try:
                return queue.get(timeout=TICK_S)
            except Empty:
                self._check()
                idle()

    def _retry(self, call: Callable[[], T], stage: Stage) -> T:
        """Repeat a call until the schema registry answers, and return the result of the call.

        An outage of the registry never rejects an alert, however long it lasts.
        """
        failed = False
        for pause in pauses():
            try:
                answer = call()
            except RegistryUnavailable as error:
                failed = True
                self._health.set("schema registry", str(error))
                log.warning("%s; trying again in %.1f s", error, pause)
                self._check()
                stage.rest(pause)
            else:
                if failed:  # a call that needed no new schema says nothing about the registry
                    self._health.set("schema registry", None)
                return answer
        raise AssertionError("pauses() does not end")

    # -- the threads and their end

    def _work(self, endpoints: Endpoints) -> None:
        committer = self._thread("commit", lambda: self._commit(endpoints.sink))
        scorer = self._thread("score", self._score)
        reader = self._thread("read", lambda: self._read(endpoints, committer))
        threads = [committer, scorer, reader]
        reloader = self._thread("reload", lambda: self._reload(endpoints))
        for thread in (*threads, reloader):
            thread.start()
        deadline = None
        while any(thread.is_alive() for thread in threads) or self._decoding.busy_s():
            if stuck := self._unhealthy_reason():
                self._end_at_once(stuck)
            if deadline is None and (self._stop.is_set() or self._failed.is_set()):
                deadline = time.monotonic() + (END_TIMEOUT_S if self._failed.is_set() else DRAIN_TIMEOUT_S)
            if deadline is not None and time.monotonic() > deadline:
                self._end_at_once("messages in flight were not committed in time; the next start reads them again")
            self._failed.wait(TICK_S)
        reloader.join(END_TIMEOUT_S)  # it may be loading a model, and libraries must not work while the process ends
        if self._failure:
            raise self._failure

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except EndedError:
                pass
            except BaseException as error:
                log.debug("%s failed", name, exc_info=True)
                if self._failure and (fault := _fault(error)):  # `run` raises the first failure alone
                    log.critical("thread %s failed as well: %s", name, fault, exc_info=fault)
                self._failure = self._failure or error
                self._failed.set()

        return threading.Thread(target=guarded, name=name, daemon=True)

    def _check(self) -> None:
        if self._failed.is_set():
            raise EndedError

    def _unhealthy_reason(self) -> str | None:
        for stage in self._stages:
            if (busy := stage.busy_s()) > self._config.stall_timeout_s:
                return f"stage {stage.name} is stuck: it has worked on one batch for {busy:.0f} s"
        return None

    def _end_at_once(self, reason: str) -> NoReturn:
        """End the process at once with the threads' stacks on stderr, even if a thread does not return."""
        log.critical("%s", self._failure or reason, exc_info=_fault(self._failure))
        faulthandler.dump_traceback(all_threads=True)
        logging.shutdown()
        os._exit(EXIT_FAILED)

    # -- metrics and health

    def _describe_process(self) -> None:
        if why_python:
            log.warning("%s", why_python)
        self._metrics.describe_build(IMPLEMENTATION)
        self._metrics.queue_depth.labels("score").set_function(self._decoded.qsize)
        self._metrics.queue_depth.labels("commit").set_function(self._routed.qsize)

    def _describe_generation(self, generation: Generation) -> None:
        log.info("configuration %s", generation.revision)
        self._metrics.describe_configuration(generation.revision)
        self._metrics.expect(topics=generation.config.output_topics, filters=generation.filters.names)
        self._metrics.set_filter_files(generation.files.failed)
        for file in generation.files:
            log.info("file of a filter: %s: %s", file.path, file.content)
        self._metrics.set_filters(generation.filters.states())
        networks: dict[str, list[Network]] = {"model": [], "shadow model": []}
        served = [("model", model) for model in generation.scorer.models]
        on_trial = [("shadow model", model) for model in generation.shadows.models]
        for kind, model in (*served, *on_trial):
            for part in model.parts:
                surveys, provider = ",".join(map(str, part.surveys)), part.network.provider
                networks[kind].append((model.name, model.version, provider, surveys))
                network = "" if len(model.parts) == 1 else f" by the network {part.bundle.card.title}"
                log.info("%s %s %s on %s, for %s%s", kind, model.name, model.version, provider, surveys, network)
        self._metrics.describe_models(networks["model"], networks["shadow model"])
        labels = {model.name: model.labels for model in generation.scorer.models}
        for model in generation.shadows.models:
            compared = [label for label in model.labels if counterpart(model.name, label, labels)]
            self._metrics.expect_shadow(model.name, model.version, compared)

    def _observe(self, endpoints: Endpoints) -> None:
        """Update lag, rates and health every OBSERVE_INTERVAL_S, also while no alerts arrive or the queue is full."""
        if time.monotonic() - self._observed < OBSERVE_INTERVAL_S:
            return
        self._observed = time.monotonic()
        lags = endpoints.source.lags()
        self._metrics.set_partitions(lags)
        self._metrics.set_filters(self._generation.filters.states())
        self._metrics.set_drift(*self._generation.drift.read())
        self._health.set("group", endpoints.source.waits_for)
        self._health.set("output", endpoints.sink.trouble(lags.keys()))
        endpoints.report_positions()
