"""An alert is a duplicate if its id was seen at another position, and not if it is read again from the same one."""

from collections.abc import Callable

import numpy as np
import pytest

from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.streaming import duplicates
from broker_filter.streaming.duplicates import DuplicateWindow

MakeAlerts = Callable[..., AlertBatch]


def mark(window: DuplicateWindow, alerts: AlertBatch, taken: list[bool] | None = None) -> list[bool]:
    everything = [True] * len(alerts)
    return window.mark(alerts, np.array(taken or everything, dtype=np.bool_)).tolist()


def test_an_id_at_a_second_position_is_a_duplicate(make_alerts: MakeAlerts) -> None:
    window = DuplicateWindow(10)
    assert mark(window, make_alerts([1, 2, 1])) == [False, False, True]
    assert mark(window, make_alerts([2, 3], offset=3)) == [True, False]


def test_batch_that_is_read_again_gets_the_same_marks(make_alerts: MakeAlerts) -> None:
    window = DuplicateWindow(10)
    alerts = make_alerts([1, 2, 1])
    assert mark(window, alerts) == mark(window, alerts) == [False, False, True]


def test_the_same_offset_of_another_partition_is_another_position(make_alerts: MakeAlerts) -> None:
    window = DuplicateWindow(10)
    mark(window, make_alerts([1]))
    assert mark(window, make_alerts([1], partition=1)) == [True]


def test_two_surveys_may_use_one_id(make_alerts: MakeAlerts) -> None:
    window = DuplicateWindow(10)
    mark(window, make_alerts([7], survey=Survey.ZTF))
    assert mark(window, make_alerts([7], offset=1, survey=Survey.LSST)) == [False]


def test_keys_of_ids_and_surveys_do_not_collide(make_alerts: MakeAlerts) -> None:
    window = DuplicateWindow(100)
    mark(window, make_alerts(list(range(-20, 20)), survey=Survey.ZTF))
    assert mark(window, make_alerts(list(range(-20, 20)), offset=50, survey=Survey.LSST)) == [False] * 40


def test_alerts_that_no_model_takes_are_neither_marked_nor_remembered(make_alerts: MakeAlerts) -> None:
    window = DuplicateWindow(10)
    assert mark(window, make_alerts([1, 1]), taken=[False, True]) == [False, False]
    assert mark(window, make_alerts([1], offset=2), taken=[False]) == [False]


def test_the_oldest_ids_are_forgotten_first(make_alerts: MakeAlerts) -> None:
    window = DuplicateWindow(2)
    mark(window, make_alerts([1, 2, 3]))
    assert mark(window, make_alerts([2, 3], offset=10)) == [True, True]
    assert mark(window, make_alerts([1], offset=20)) == [False]


def test_window_of_size_zero_marks_nothing(make_alerts: MakeAlerts) -> None:
    assert mark(DuplicateWindow(0), make_alerts([1, 1])) == [False, False]


@pytest.mark.parametrize("settle", [1, 2, 7, 1000])
@pytest.mark.parametrize("size", [0, 1, 5, 40, 1000])
def test_marks_equal_those_of_a_simple_list_of_the_latest_ids(
    make_alerts: MakeAlerts, monkeypatch: pytest.MonkeyPatch, size: int, settle: int
) -> None:
    monkeypatch.setattr(duplicates, "SETTLE", settle)
    draw = np.random.default_rng(size)
    window, latest = DuplicateWindow(size), list[int]()
    for batch in range(40):
        ids = draw.integers(-5, 60, draw.integers(1, 9)).tolist()
        expected = []
        for each in ids:
            expected.append(each in latest[-size:] if size else False)
            if not expected[-1]:
                latest.append(each)
        assert mark(window, make_alerts(ids, offset=10 * batch)) == expected


@pytest.mark.parametrize("settle", [1, 8192])
def test_alert_that_was_not_published_is_not_a_duplicate_later(
    make_alerts: MakeAlerts, monkeypatch: pytest.MonkeyPatch, settle: int
) -> None:
    monkeypatch.setattr(duplicates, "SETTLE", settle)
    window = DuplicateWindow(10)
    alerts = make_alerts([1, 2, 3])
    mark(window, alerts)
    window.forget(alerts, [1])
    assert mark(window, make_alerts([1, 2, 3, 2], offset=10)) == [True, False, True, True]
    assert mark(window, make_alerts([2], offset=11)) == [False]
