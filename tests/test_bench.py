"""The benchmark measures what it says, on every way through the service; no figure of it is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker_filter.bench.measure import Spread, interleave
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

    def contestant(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    figures = interleave({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, repetitions=3)

    assert turns == ["a", "b"] * 3
    assert figures == {"a": Spread(3, 1, 5), "b": Spread(4, 2, 6)}


def test_bench_measures_stages_archive_and_broker(
    kafka_bootstrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "bench.json"
    options = ["--alerts", "512", "--repetitions", "1", "--out", str(figures)]

    assert main(["bench", "--bootstrap-servers", kafka_bootstrap, *options]) == 0

    report = json.loads(figures.read_text())
    assert (report["alerts"], report["repetitions"]) == (512, 1)
    assert set(report["stages"]) == {"decode", "score", "encode", "together"}
    assert set(report["throughput"]) == {"archive -> scores", "Kafka -> scores -> Kafka"}
    for contest in [*report["stages"].values(), *report["throughput"].values()]:
        for contestant in ("naive", "service"):
            spread = contest[contestant]
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
    assert set(report["ratios"]) == {*report["stages"], *report["throughput"]}
    assert "CPU microseconds an alert" in capsys.readouterr().out
