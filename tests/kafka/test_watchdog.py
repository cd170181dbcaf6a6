"""A stage is busy from the beginning of a piece of work to its end or its latest beat."""

from __future__ import annotations

import threading

import pytest

from broker_filter.kafka import watchdog
from broker_filter.kafka.watchdog import Stage
from broker_filter.metrics import Metrics


class Clock:
    """A clock that moves when a test says so."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def test_a_stage_that_does_not_work_is_not_busy(clock: Clock) -> None:
    stage = Stage("score", Metrics())
    with stage.watched():
        clock.now += 7
        assert stage.busy_s() == 7
    clock.now += 60
    assert stage.busy_s() == 0


def test_work_that_fails_has_ended(clock: Clock) -> None:
    stage = Stage("score", Metrics())
    with pytest.raises(ValueError, match="broken"), stage.working():
        raise ValueError("broken")
    clock.now += 60
    assert stage.busy_s() == 0


def test_a_beat_restarts_the_time_of_its_own_thread_alone(clock: Clock) -> None:
    stage = Stage("decode", Metrics())
    started, end = threading.Event(), threading.Event()

    def work() -> None:
        with stage.watched():
            started.set()
            end.wait(20)

    other = threading.Thread(target=work)
    other.start()
    assert started.wait(20)
    clock.now += 5
    with stage.watched():
        clock.now += 3
        stage.beat()
        assert stage.busy_s() == 8, "the other thread has not beaten"
        end.set()
        other.join()
        clock.now += 1
        assert stage.busy_s() == 1
