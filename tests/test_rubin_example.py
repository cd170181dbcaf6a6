"""The service file for Rubin in the documentation works on real alerts: its reference, filters and anomalies."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from broker_filter.anomalies.reference import read_reference
from broker_filter.cli import main
from broker_filter.config import Registry, Runtime, Service
from broker_filter.packets.batch import Survey
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_stream
from broker_filter.streaming.generation import open_generation
from broker_filter.streaming.resolved import resolve

CONNECT_PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "connect.md"
LARGE_ENOUGH = 100
"""Smallest number of real LSSTCam alerts for which the fractions below are meaningful."""


def example() -> str:
    """Return the service file for Rubin."""
    files = re.findall(r"```yaml\n(input:.*?)```", CONNECT_PAGE.read_text(), re.DOTALL)
    [rubin] = [text for text in files if "lsst-alerts" in text]
    return str(rubin)


@pytest.fixture(scope="module")
def nights(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of real LSSTCam alerts. Those published in Parquet are Avro files, because each test reads them again."""
    published, folder = shared_data / "lsst" / "more", tmp_path_factory.mktemp("nights")
    for i, packet in enumerate(read_packets([published / "parquet"])):
        (folder / f"{i}.avro").write_bytes(packet.data)
    return [folder, published / "wire"]


def test_example_names_the_brokers_of_the_survey() -> None:
    file = Service.model_validate(yaml.safe_load(example()))
    assert file.input.bootstrap_servers == "rubin-alert-stream-bootstrap.slac.stanford.edu:9094"
    assert file.input.topics == ["lsst-alerts-v11"]
    assert file.input.schema_registry == Registry(url="https://rubin-alert-schemas.slac.stanford.edu/schema-registry")
    assert file.input.sasl is not None
    assert file.input.sasl.mechanism == "SCRAM-SHA-512"
    assert file.input.group_id.startswith(file.input.sasl.username)


@pytest.mark.shared
def test_the_example_works_on_real_alerts(
    nights: list[Path],
    lsst_schemas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SURVEY_PASSWORD", "secret")
    Path("service.yaml").write_text(example())
    service = Service.model_validate(yaml.safe_load(example()))
    assert service.anomalies is not None
    out = str(service.anomalies.reference)
    built = main(["reference", "build", *map(str, nights), "--out", out, "--schema-registry", str(lsst_schemas)])
    assert built == 0
    assert main(["config", "check", "service.yaml"]) == 0
    counts = read_reference(Path(out)).card.surveys["lsst"]
    assert counts.read > LARGE_ENOUGH
    assert counts.passed > 0.5 * counts.read

    of_cpu = service.model_copy(update={"runtime": Runtime(device="cpu")})
    made = open_generation(resolve(of_cpu), open_registry(str(lsst_schemas)))
    records: Counter[str] = Counter()
    judged = 0
    window = DuplicateWindow(1000)
    for scored in score_stream(
        read_packets(nights), made.decoder, made.scorer, window, batch_size=64, threads=1, judge=made.judge
    ):
        assert (scored.alerts.survey == Survey.LSST).all()
        assert scored.anomalies is not None
        judged += int(scored.anomalies.judged.sum())
        records.update(
            record.topic.removeprefix("me.") for record in made.router.route(made.filters.apply(scored)).records
        )
    assert judged >= counts.passed
    assert records["scored"] >= counts.read
    for rule in service.filters:
        assert 0.05 * records["scored"] < records[rule.name] < 0.9 * records["scored"], rule.name


@pytest.mark.shared
def test_reference_selects_real_alerts_by_the_survey_score(
    nights: list[Path], lsst_schemas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedder's `real` was trained on ZTF only: a cut on it kept 3 of 98 LSST alerts."""
    file = tmp_path / "lsst.safetensors"
    arguments = ["reference", "build", *map(str, nights), "--schema-registry", str(lsst_schemas), "--out", str(file)]
    assert main(arguments) == 0
    built = read_reference(file)
    counts = built.card.surveys["lsst"]
    assert built.card.where == "embedder.real > 0.5 or survey == 'lsst' and reliability > 0.5"
    assert counts.read > counts.passed > 0.5 * counts.read
    assert len(built.surveys[Survey.LSST].alerts) == counts.kept
    said = f"lsst: {counts.read} alerts read, {counts.passed} passed, {counts.kept} kept, calibrated on"
    printed = capsys.readouterr()
    assert said in printed.out
    assert "lsst: only" not in printed.err
    assert main(["reference", "show", str(file)]) == 0
    assert f"{counts.read} alerts read" in capsys.readouterr().out

    assert main([*arguments, "--where", "embedder.real > 0.5"]) == 1  # `real` is null for LSST alerts
    assert f"lsst: only 0 of {counts.read} alerts" in capsys.readouterr().err
