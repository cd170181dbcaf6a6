"""The commands for operators, `positions` and `redrive`, against real brokers: what they show, change and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import Producer

from broker_filter.cli import main
from broker_filter.config_file import load_service
from broker_filter.kafka.client import KafkaSetupError
from broker_filter.kafka.positions import StoredPositions
from broker_filter.local_kafka import free_ports
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.simulate import SCHEMAS, simulate_night

from .conftest import PATIENCE_S, MakePipeline, Packets, alert, headers, inputs
from .test_lost_input import recreate
from .test_outages import schema_registry

pytestmark = pytest.mark.kafka

CHAOS = Path(__file__).resolve().parents[1] / "redrive_chaos.py"
FIRST_MS, STEP_MS = 1000 * int(time.time() - 86_400), 60_000
"""Time of the first message of each partition in Unix milliseconds, and the time between two messages. Kafka deletes
messages that are older than a week."""
PER_PARTITION = 20

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `broker-filter positions`, checks the exit status and returns what was printed."""
    return command_runner("positions", capsys)


@pytest.fixture
def redrive(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `broker-filter redrive`, checks the exit status and returns what was printed."""
    return command_runner("redrive", capsys)


def command_runner(name: str, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object, status: int = 0) -> str:
        ended = main([name, *(one.isoformat() if isinstance(one, datetime) else str(one) for one in arguments)])
        captured = capsys.readouterr()
        assert ended == status, captured.err
        return captured.out + captured.err

    return command


def test_positions_are_moved_before_a_service_starts_and_kept_while_it_runs(
    make_pipeline: MakePipeline, output_bootstrap: str, packets: Packets, tmp_path: Path, run: Run
) -> None:
    pipeline = make_pipeline(target=output_bootstrap)
    send_at_times(pipeline.source, pipeline.topic, packets)
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(pipeline.config))
    config = ("--config", file)

    run("set", *config, "--offset", "end", "--yes")
    before = time_of(12) - timedelta(milliseconds=1)
    assert "2 positions change: messages to read again: 16, to skip: 0" in run(
        "rewind", *config, "--to", before, "--dry-run"
    )
    assert [one["position"] for one in shown(run("show", *config, "--json"))] == [PER_PARTITION] * 2
    assert "stored" in run("rewind", *config, "--to", before, "--yes")
    assert run("rewind", *config, "--to", time_of(12)) == "no position changes\n"
    expected = {"position": 12, "beginning": 0, "end": 20, "lag": 8, "time": time_of(12).isoformat()}
    moved = shown(run("show", *config, "--json"))
    assert [one | expected for one in moved] == moved
    table = run("show", *config, "--topic", pipeline.topic)
    assert table.splitlines()[-1].split()[1:6] == ["1", "12", "0", "20", "8"]

    positions = StoredPositions(load_service(file).config)
    service = pipeline.start()
    service.wait_consumed(16)
    refusal = run("set", *config, "--offset", "beginning", "--yes", status=1)
    assert "has live members (1)" in refusal
    assert "(2 partitions)" in refusal

    # The same after the command has looked up the members: as if the service started between the two steps.
    if output_bootstrap == pipeline.source["bootstrap.servers"]:
        with pytest.raises(KafkaSetupError, match="did the service start"):
            positions.store({(pipeline.topic, 0): 15})
        repeated = range(0)
    else:  # the partition is taken over: the service notices it at its next commit, and reads the new position
        positions.store({(pipeline.topic, 0): 15})
        repeated = range(15, PER_PARTITION)
    positions.close()
    pipeline.send(packets[:4])
    records = pipeline.read("scored", "dead-letter", expected=20 + len(repeated))
    counts = {tuple(map(int, key.split("/")[1:])): n for key, n in inputs(records).items()}
    assert counts == {
        (p, offset): 2 if p == 0 and offset in repeated else 1
        for p in (0, 1)
        for offset in range(12, PER_PARTITION + 2)
    }
    assert service.end() == 0


def test_offsets_and_partitions_that_do_not_exist_are_refused_with_the_range(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = make_pipeline(packets[:4])
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(pipeline.config))
    one = ("--config", file, "--topic", pipeline.topic, "--partition")

    assert "give an offset from 0 to 2 (the end)" in run("set", *one, 0, "--offset", 3, "--yes", status=2)
    assert "has no partition 7" in run("set", *one, 7, "--offset", 0, "--yes", status=2)
    unknown = run("show", "--config", file, "--topic", "other", status=2)
    assert f"other is not an existing topic of `input.topics` ({pipeline.topic})" in unknown
    assert "give --topic and --partition too" in run("set", "--config", file, "--offset", 1, status=2)
    assert "give --yes" in run("set", *one, 0, "--offset", "end", status=2)
    assert [partition["position"] for partition in shown(run("show", *one, 0, "--json"))] == [None]
    with pytest.raises(SystemExit):
        run("rewind", "--config", file, "--to", "yesterday")
    assert "a duration before now such as" in capsys.readouterr().err


def test_position_of_a_deleted_topic_is_shown_and_replaced(
    make_pipeline: MakePipeline,
    kafka_bootstrap: str,
    second_kafka_bootstrap: str,
    packets: Packets,
    tmp_path: Path,
    run: Run,
) -> None:
    # On one cluster, Kafka deletes the group's offsets together with the topic.
    pipeline = make_pipeline(packets[:4], partitions=1, target=second_kafka_bootstrap)
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump(pipeline.config))
    run("set", "--config", file, "--offset", "end", "--yes")
    recreate(kafka_bootstrap, pipeline.topic, packets[:3])

    assert run("show", "--config", file).splitlines()[-1].split()[2:] == ["4", "0", "3", "deleted", "topic", "-"]
    assert "belongs to a deleted topic" in run("rewind", "--config", file, "--to", "1d", "--yes", status=2)
    run("set", "--config", file, "--offset", "beginning", "--yes")
    (now,) = shown(run("show", "--config", file, "--json"))
    assert (now["position"], now["lag"], now["deleted_topic"]) == (0, 3, False)


def test_dead_letters_are_scored_again_once_beside_the_running_service(
    make_pipeline: MakePipeline,
    packets: Packets,
    tmp_path: Path,
    redrive: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lsst = [one.packet for one in simulate_night(4, seed=7, survey="lsst")]
    pipeline = make_pipeline([*packets[:3], packets[3][:1000], *lsst])
    service = pipeline.start()
    service.wait_consumed(8)
    letters = pipeline.read("dead-letter", expected=5)
    assert sorted(headers(letter)["reason"] for letter in letters) == ["truncated", *["unknown_schema_id"] * 4]
    file, (port,) = tmp_path / "service.yaml", free_ports(1)
    pipeline.config["input"]["schema_registry"] = f"http://127.0.0.1:{port}"
    file.write_text(yaml.safe_dump(pipeline.config))
    unknown = ("--config", file, "--reason", "unknown_schema_id")

    counted = redrive(*unknown, "--dry-run").splitlines()
    assert [line.split() for line in counted[1:3]] == [["truncated", "0", "1"], ["unknown_schema_id", "4", "0"]]
    assert "schema registry http://127.0.0.1" in redrive(*unknown, status=1)
    ids = tmp_path / "registry" / "schemas" / "ids"
    ids.mkdir(parents=True)
    schema_id = int.from_bytes(lsst[0][1:5])
    definition = open_registry(SCHEMAS).get(schema_id).definition
    (ids / str(schema_id)).write_text(json.dumps({"schema": json.dumps(definition)}))
    with schema_registry(tmp_path / "registry", port):
        summary = redrive(*unknown)
    assert "4 dead letters scored again: 4 alerts published, 0 rejected again; 1 dead letters not selected" in summary

    assert "1 dead letters scored again: 0 alerts published, 1 rejected again (truncated 1)" in redrive(
        "--config", file
    )
    assert redrive("--config", file, "--max-tries", 1).startswith("0 dead letters scored again")
    letters = pipeline.read("dead-letter", expected=6)
    failed = [headers(letter) for letter in letters if headers(letter)["reason"] == "truncated"]
    assert {one.get("tries") for one in failed} == {None, "1"}
    assert len(letters) == 6
    assert len({(one["input"], one["detail"]) for one in failed}) == 1

    pipeline.send(packets[4:6])
    service.wait_consumed(10)
    records = pipeline.read("scored", expected=9)
    assert set(inputs(records).values()) == {1}
    again = [record for record in records if "redriven" in headers(record)]
    assert [alert(record.value())["broker_filter"]["redriven"] for record in again] == [1] * 4
    positions = {headers(letter)["input"] for letter in letters if headers(letter)["reason"] == "unknown_schema_id"}
    assert {headers(record)["input"] for record in again} == positions
    assert len(records) == 9
    assert service.end() == 0


def test_kills_of_redrive_neither_lose_nor_repeat_letters(kafka_bootstrap: str) -> None:
    command = [sys.executable, str(CHAOS), "--letters", "200", "--kills", "1", "--bootstrap-servers", kafka_bootstrap]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 missing, 0 repeated" in done.stdout


def time_of(offset: int) -> datetime:
    """Return the time of a message that `send_at_times` sent."""
    return datetime.fromtimestamp((FIRST_MS + offset * STEP_MS) / 1000, UTC)


def shown(text: str) -> list[dict[str, Any]]:
    """Return the partitions that `show --json` printed."""
    partitions: list[dict[str, Any]] = json.loads(text)["partitions"]
    return partitions


def send_at_times(properties: Mapping[str, str], topic: str, packets: Packets) -> None:
    """Send PER_PARTITION messages to each of two partitions, with the times FIRST_MS, FIRST_MS + STEP_MS, ..."""
    producer = Producer({**properties, "enable.idempotence": True})  # retried messages keep their order
    for i, packet in enumerate(packets[: 2 * PER_PARTITION]):
        producer.produce(topic, packet, partition=i % 2, timestamp=FIRST_MS + i // 2 * STEP_MS)
    assert producer.flush(PATIENCE_S) == 0
