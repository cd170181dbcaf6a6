"""The benchmark measures what it claims, for every path through the service; no measured figure is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from broker_filter.bench import benchmark, measure, sky
from broker_filter.bench.measure import Run, Spread, compete, timed
from broker_filter.bench.naive import NaiveBroker
from broker_filter.bench.runs import kafka_io
from broker_filter.bench.sample import in_batches
from broker_filter.cli import main
from broker_filter.config import Runtime
from broker_filter.packets.decode import Decoder
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.scorer import open_scorer


def test_naive_loop_and_service_give_the_same_scores(packets: list[bytes]) -> None:
    """A baseline must compute the same as the service."""
    scorer = open_scorer(["default"], Runtime())
    decoder = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=scorer.columns)
    alerts, _ = decoder.decode(in_batches(packets, len(packets))[0])
    scores = scorer.score(alerts).columns()["default.real"]

    naive = NaiveBroker(open_bundle("default").part("ztf"))
    for i, packet in enumerate(alerts.packets[k] for k in alerts.packet_index):
        _, alert = naive.decode(packet.data)
        assert naive.score(naive.cutouts(alert))["real"] == pytest.approx(scores[i], abs=1e-5)


def test_packets_from_files_are_measured_without_the_simulation_extra() -> None:
    """A serving machine, for example one with a GPU, has no GalSim; the benchmark must run there on archived alerts."""
    program = "import sys; sys.modules['galsim'] = None; import broker_filter.bench.benchmark"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_competitors_take_turns() -> None:
    turns: list[str] = []

    def competitor(name: str) -> Run:
        turns.append(name)
        return Run(alerts_per_second=len(turns), cpu_microseconds=len(turns))

    contest = compete({"naive": lambda: competitor("naive"), "service": lambda: competitor("service")}, repetitions=3)

    assert turns == ["naive", "service"] * 3
    assert contest["naive"].alerts_per_second == Spread(median=3, lowest=1, highest=5)
    assert contest["service"].cpu_microseconds == Spread(median=4, lowest=2, highest=6)
    assert contest["service"].broker_microseconds is None


def test_short_work_is_repeated_until_it_can_be_measured() -> None:
    calls = []
    run = timed(lambda: calls.append(1), alerts=10)
    assert len(calls) > 1
    assert run.alerts_per_second > 0


def test_bench_measures_stages_archive_and_broker(
    kafka_bootstrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LEAST_S", 0.0)
    monkeypatch.setattr(benchmark, "STAGE_PACKETS", 8)
    monkeypatch.setattr(benchmark, "DISTINCT_PACKETS", 64)
    monkeypatch.setattr(kafka_io, "PUBLISHED", 64)
    figures, expected = tmp_path / "bench.json", tmp_path / "ratios.json"
    expected.write_text(json.dumps({"decode: naive / service": {"ratio": 1e9, "tolerance": 0.1}}))
    options = ["--parts", "stages,archive,kafka,startup", "--alerts", "256", "--repetitions", "1"]
    files = ["--out", str(figures), "--check", str(expected)]

    assert main(["bench", "--bootstrap-servers", kafka_bootstrap, *options, *files]) == 1

    printed = capsys.readouterr()
    assert "decode: naive / service is" in printed.err
    assert "CPU microseconds per alert, by stage" in printed.out
    report = json.loads(figures.read_text())
    assert (report["alerts"], report["repetitions"], report["scaling"]) == (256, 1, {})
    assert {"frame", "Avro", "stamps", "decode", "normalise", "score: default", "encode"} < set(report["stages"])
    assert {"Kafka in", "Kafka out"} < set(report["stages"])
    assert set(report["wholes"]) == {"archive -> scores", "Kafka -> scores -> Kafka: default"}
    for contest in {**report["stages"], **report["wholes"]}.values():
        for figure in contest.values():
            for spread in (figure["alerts_per_second"], figure["cpu_microseconds"]):
                assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
    assert report["targets"]["decode: naive / service"]["met"] in (True, False)
    # The processes of a given cluster cannot be observed, so the upper limit of the throughput is unknown.
    assert "Kafka: service / floors" not in report["ratios"]


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.shared)])
def test_bench_measures_the_decoding_of_lsst_packets_with_any_model(
    real: bool, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LEAST_S", 0.0)
    monkeypatch.setattr(benchmark, "STAGE_PACKETS", 8)
    figures = tmp_path / "bench.json"
    options = ["--model", "embedder", "--parts", "lsst", "--repetitions", "1", "--out", str(figures)]
    if real:
        wire = request.getfixturevalue("shared_data") / "lsst" / "more" / "wire"
        options += ["--schema-registry", str(request.getfixturevalue("lsst_schemas")), str(wire)]

    assert main(["bench", *options]) == 0

    report = json.loads(figures.read_text())
    assert set(report["stages"]) == {"decode: LSST"}
    assert set(report["stages"]["decode: LSST"]) == {"naive", "service", "service, 2 threads", "parse"}
    assert set(report["ratios"]) == {"decode LSST: naive / service", "decode LSST: service / parse"}


def test_bench_measures_what_a_lens_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST_S", 0.0)
    monkeypatch.setattr(benchmark, "DISTINCT_PACKETS", 96)
    figures = tmp_path / "bench.json"

    options = ["--model", "embedder", "--parts", "lens", "--alerts", "256", "--repetitions", "1"]
    assert main(["bench", *options, "--out", str(figures)]) == 0

    report = json.loads(figures.read_text())
    [(name, contest)] = report["wholes"].items()
    assert name == "packets -> anomaly scores: embedder, lens embedder"
    assert list(contest) == ["no lens", "one alert of 1,000 explained", "every alert explained"]
    assert list(report["quantities"]) == ["lens embedder, CPU us for an explained alert"]


def test_bench_measures_lists_and_maps_of_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST_S", 0.0)
    monkeypatch.setattr(sky, "TARGETS", 1000)
    assert [(name, figure.median > 0) for name, figure in sky.measure_sky(tmp_path, 1).items()] == [
        ("CPU ms to read a list of 1,000 targets", True),
        ('near("targets.csv", 2), CPU us for an alert', True),
        ("CPU ms to read a map of probabilities", True),
        ('in_moc("event.fits", 0.9), CPU us for an alert', True),
    ]


def test_bench_measures_rows_of_parquet_beside_packets_of_both_surveys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LEAST_S", 0.0)
    monkeypatch.setattr(benchmark, "DISTINCT_PACKETS", 8)
    monkeypatch.setattr(benchmark, "BURST_DISTINCT", 8)
    figures = tmp_path / "bench.json"
    assert main(["bench", "--parts", "rows", "--repetitions", "1", "--out", str(figures)]) == 0
    report = json.loads(figures.read_text())
    assert list(report["wholes"]) == ["archive of ZTF -> scores, by format", "archive of LSST -> scores, by format"]
    assert all(list(contest) == ["packets", "rows of Parquet"] for contest in report["wholes"].values())
    assert set(report["ratios"]) == {"archive of ZTF: rows / packets", "archive of LSST: rows / packets"}


@pytest.mark.parametrize("parts", ["stages,nothing", ""])
def test_unknown_parts_are_refused(parts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--parts", parts])
    assert "unknown part" in capsys.readouterr().err


def test_a_benchmark_without_torch_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench"]) == 2
    assert "(torch): pip install 'broker-filter[bench]'" in capsys.readouterr().err


def test_missing_gpu_is_an_error_and_never_replaced_by_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["bench", "--device", "cuda"]) == 1
    assert "cuda" in capsys.readouterr().err.lower()
