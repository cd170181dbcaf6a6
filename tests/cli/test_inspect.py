"""`broker-filter inspect` prints exactly what the input contains."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fastavro
import numpy as np
import pytest
from confluent_kafka import Producer

from broker_filter.cli import main
from broker_filter.cli.packet_summary import PICTURE_SIZE, picture

NIGHT = Path("ztf/archives/ztf_public_20180819_mod1000.tar.gz")


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Return the exit status, and the printed lines with repeated spaces joined."""
    status = main(["inspect", *map(str, arguments)])
    return status, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_archive_is_counted_and_its_first_alert_shown(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = inspect(capsys, shared_data / NIGHT)
    assert status == 0
    assert lines[0] == f"{shared_data / NIGHT}: 30 readable alerts in 30 packets, 2.1 MB"
    assert "ztf 3.0 container file, codec null readable 30" in lines
    assert "first alert: ztf 595147624915010001 of object ZTF18abcecyc" in lines
    assert "position ra 222.987195 deg, dec +0.274643 deg" in lines
    assert "magpsf 16.4025 mag AB magnitude of the absolute PSF flux in the difference image" in lines
    assert "light curve 2 detections (1 r, 1 g) over 13.0 days" in lines
    assert "science 63 x 63 px 36.088 92.854 1901.1 DN 942" in lines


def test_every_reject_reason_is_counted_with_an_example(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wire = shared_data / "lsst" / "wire"
    status, lines = inspect(capsys, wire, "--schema-registry", shared_data / "lsst" / "schemas")
    assert status == 0
    assert "lsst 7.4 wire format, schema id 704 readable 5" in lines
    assert "? ? wire format, schema id 12345 unknown_schema_id 1" in lines
    assert any(line.startswith("unknown_schema_id, for example ") for line in lines)
    counts = [re.search(r"schema id \d+ \w+ (\d+)$", line) for line in lines]
    assert sum(int(count[1]) for count in counts if count) == len(list(wire.iterdir()))


@pytest.mark.parametrize("piped", [True, False])
def test_standard_input_gives_the_same_result_as_a_file(shared_data: Path, piped: bool) -> None:
    command = [sys.executable, "-m", "broker_filter", "inspect", "-"]
    with (shared_data / NIGHT).open("rb") as night:
        content = {"input": night.read()} if piped else {"stdin": night}
        done = subprocess.run(command, check=True, capture_output=True, **content)
    assert done.stdout.startswith(b"-: 30 readable alerts in 30 packets, 2.1 MB")
    assert b"<stdin>::" in done.stdout


def test_closed_output_pipe_ends_with_status_0(shared_data: Path) -> None:
    command = [sys.executable, "-m", "broker_filter", "inspect", str(shared_data / NIGHT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_input_without_a_readable_alert_ends_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("the telescope was closed")
    status, lines = inspect(capsys, tmp_path)
    assert status == 1
    assert "? ? unknown not_avro 1" in lines


def test_no_more_than_the_limit_is_read(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = inspect(capsys, shared_data / NIGHT, "--limit", 7)
    assert status == 0
    assert "7 readable alerts in 7 packets" in lines[0]
    assert "only the first 7 packets were read: --limit 0 reads all" in lines


@pytest.mark.parametrize("limit", ["-1", "some"])
def test_limit_must_be_a_number_of_packets(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["inspect", "night.tar.gz", f"--limit={limit}"])
    assert end.value.code == 2
    assert f"{limit} is not a number of packets" in capsys.readouterr().err


def test_topic_gives_the_same_result_as_an_archive(
    ztf_packets: list[tuple[int, bytes]],
    kafka_bootstrap: str,
    unique_name: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    topic = unique_name("inspect")
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    for candid, data in ztf_packets[:5]:
        producer.produce(topic, data, key=str(candid))
    producer.produce(topic, None)
    assert producer.flush(30) == 0
    status, lines = inspect(capsys, f"kafka://{kafka_bootstrap}/{topic}")
    assert status == 0
    assert "5 readable alerts in 6 packets" in lines[0]
    assert "? ? unknown empty 1" in lines


def test_missing_topic_gives_one_error_line(
    kafka_bootstrap: str, unique_name: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    topic = unique_name("absent")
    assert main(["inspect", f"kafka://{kafka_bootstrap}/{topic}"]) == 1
    assert f"topic {topic}" in capsys.readouterr().err
    assert main(["inspect", "kafka://nowhere"]) == 2


def test_control_characters_of_a_packet_are_not_printed(
    ztf_packets: list[tuple[int, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = fastavro.reader(io.BytesIO(ztf_packets[0][1]))
    alert = {**next(reader), "objectId": "ZTF\x1b[2J[red]:star:"}
    alert["candidate"]["jd"] = 1e30
    with (tmp_path / "packet").open("wb") as file:
        fastavro.writer(file, reader.writer_schema, [alert])
    assert main(["inspect", str(tmp_path / "packet")]) == 0
    out = capsys.readouterr().out
    assert "of object ZTF?[2J[red]:star:" in out
    assert "\x1b" not in out


def test_picture_shows_the_source_at_its_position() -> None:
    image = np.zeros((63, 63))
    image[52:, :20] = 100.0  # high rows of a FITS image are at the top
    image[0, 0] = np.nan
    lines = picture([image, image, image]).split("\n")
    assert [len(line) for line in lines] == [3 * (PICTURE_SIZE + 2)] * (PICTURE_SIZE // 2)
    assert str(lines[0].spans[0].style) == "rgb(255,255,255) on rgb(255,255,255)"
    assert str(lines[-1].spans[0].style) == "rgb(0,0,0) on rgb(0,0,0)"
