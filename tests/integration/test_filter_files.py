"""A running service whose filter reads a list of targets: matches, a list that changes, and a list that breaks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from broker_filter.packets.batch import AlertIdentity
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.simulate import simulate_night

from .conftest import MakePipeline, alert


def replace_list(file: Path, text: str) -> None:
    """Replace a file, by an atomic rename, with one that was written long ago."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.utime(new, (1e9, 1e9))
    new.rename(file)


def list_of(name: str, identity: AlertIdentity) -> str:
    assert identity.ra is not None
    assert identity.dec is not None
    return f"name,ra,dec\n{name},{identity.ra!r},{identity.dec + 0.5 / 3600!r}\n"


def result(record: Any) -> tuple[int, list[Any], str]:
    """Return alert id, matches, and the revision of the filter of an output record."""
    annotation = alert(record.value())["broker_filter"]
    [tried] = annotation["filters"]
    return alert(record.value())["alert_id"], annotation["matches"], tried["revision"]


@pytest.mark.kafka
def test_list_that_changes_or_breaks_while_the_service_runs(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    packets = [one.packet for one in simulate_night(4, seed=2, survey="ztf")]
    alerts, _ = Decoder().decode([Packet(packet) for packet in packets])
    first, second, other = (alerts.identity(i) for i in (0, 1, 2))
    targets = tmp_path / "targets.csv"
    replace_list(targets, list_of("first", first))
    pipeline = make_pipeline(packets, partitions=1)
    service = pipeline.start(filters=[{"name": "mine", "where": f'near("{targets}", 2)'}])
    published = f'published_records_total{{topic="{pipeline.prefix}.mine"}}'
    failed = f'filter_file_failed{{file="{targets}"}}'
    service.wait_consumed(4)
    assert service.metric(failed) == 0
    assert f"file of a filter: {targets}: 1 target" in service.log

    replace_list(targets, list_of("second", second))
    # No alert arrives here: the service looks at its files also while it waits for alerts.
    service.wait_until(lambda: "targets.csv has changed and was read again" in service.log)
    targets.write_text("no list")
    service.wait_until(lambda: "the filters keep its earlier content" in service.log)
    pipeline.send(packets[:3])
    service.wait_until(lambda: service.metric(published) == 2)
    assert service.metric(failed) == 1
    assert service.end() == 0

    records = [result(record) for record in pipeline.read("mine", expected=2)]
    found = {alert_id: (matches, revision) for alert_id, matches, revision in records}
    assert set(found) == {first.alert_id, second.alert_id}
    (before, old), (after, new) = found[first.alert_id], found[second.alert_id]
    assert [(one["list"], one["name"]) for one in (*before, *after)] == [
        (str(targets), "first"),
        (str(targets), "second"),
    ]
    assert before[0]["separation"] == pytest.approx(0.5, abs=1e-4)
    assert old != new
    scored = [result(record) for record in pipeline.read("scored", expected=7)]
    assert {revision for alert_id, matches, revision in scored if alert_id == other.alert_id and not matches} == {
        old,
        new,
    }
