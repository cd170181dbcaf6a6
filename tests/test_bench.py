"""The benchmark measures what it says, on every way through the service; no figure of it is asserted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from broker_filter.bench.measure import Run, Spread, compete
from broker_filter.bench.naive import NaiveBroker
from broker_filter.cli import main
from broker_filter.config import Runtime
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.registry import open_registry
from broker_filter.scoring.bundle import load_bundle
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import simulate_night


def test_naive_loop_gives_the_services_scores() -> None:
    """A baseline that computes something else would be no baseline."""
    packets = [alert.packet for alert in simulate_night(32, seed=1)]
    scorer = open_scorer(["default"], Runtime())
    decoder = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=scorer.columns)
    alerts, _ = decoder.decode([Packet(packet, FilePosition("night", record=i)) for i, packet in enumerate(packets)])
    scores = scorer.score(alerts).columns()["default.real"]

    naive = NaiveBroker(load_bundle("default"))
    for i, packet in enumerate(alerts.packets[k] for k in alerts.packet_index):
        _, alert = naive.decode(packet.data)
        assert naive.score(naive.cutouts(alert))["real"] == pytest.approx(scores[i], abs=1e-5)


def test_contestants_take_turns() -> None:
    turns: list[str] = []

    def contestant(name: str) -> Run:
        turns.append(name)
        return Run(alerts_per_second=len(turns), cpu_microseconds=len(turns))

    contest = compete(lambda: contestant("naive"), lambda: contestant("service"), repetitions=3)

    assert turns == ["naive", "service"] * 3
    assert contest.naive.alerts_per_second == Spread(median=3, lowest=1, highest=5)
    assert contest.service.cpu_microseconds == Spread(median=4, lowest=2, highest=6)
    assert (contest.throughput_ratio, contest.cpu_ratio) == (4 / 3, 3 / 4)


def test_bench_measures_stages_archive_and_broker(
    kafka_bootstrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "bench.json"
    options = ["--alerts", "256", "--repetitions", "1", "--out", str(figures)]

    assert main(["bench", "--bootstrap-servers", kafka_bootstrap, *options]) == 0

    report = json.loads(figures.read_text())
    assert (report["alerts"], report["repetitions"]) == (256, 1)
    assert set(report["stages"]) == {"decode", "score", "encode", "all stages"}
    assert set(report["wholes"]) == {"archive -> scores", "Kafka -> scores -> Kafka"}
    contests = report["stages"] | report["wholes"]
    for contest, contestant in itertools.product(contests.values(), ("naive", "service")):
        for spread in contest[contestant].values():
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
    assert set(report["ratios"]) == set(contests)
    assert "CPU microseconds an alert" in capsys.readouterr().out
