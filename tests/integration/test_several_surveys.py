"""One service reads alerts of ZTF and LSST: each is scored by its network, filtered, and judged as an anomaly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Message

from broker_filter.config import Runtime
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.build_reference import build_reference
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_stream

from .conftest import MakePipeline, MakeTopic, alert, headers

N = 40
"""Alerts of each survey."""
FILTER = "both.real > 0 and (survey == 'ztf' and magpsf < 19 and sgscore1 >= 0 or survey == 'lsst' and trailLength > 0)"
"""A filter with columns that only one survey has, and with one that both have."""


def packets_of(survey: str, seed: int) -> list[Packet]:
    night = simulate_night(N, seed, "lsst" if survey == "lsst" else "ztf")
    return [Packet(one.packet, FilePosition(str(one.alert_id))) for one in night]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference set of another night of each survey."""
    scorer = open_scorer(["embedder"], Runtime(device="cpu"))
    packets = [packet for survey in ("ztf", "lsst") for packet in packets_of(survey, seed=8)]
    scored = score_stream(packets, scorer.decoder(SCHEMAS), scorer, DuplicateWindow(0), batch_size=32, threads=1)
    file = tmp_path_factory.mktemp("reference") / "ordinary.safetensors"
    build_reference(scored, scorer.models[0], None, N).write(file)
    return file


@pytest.mark.kafka
def test_one_service_scores_filters_and_judges_alerts_of_both_surveys(
    make_pipeline: MakePipeline, make_topic: MakeTopic, both_surveys: Path, reference: Path
) -> None:
    sent = {survey: packets_of(survey, seed=7) for survey in ("ztf", "lsst")}
    pipeline = make_pipeline([packet.data for packet in sent["ztf"]])
    lsst_topic = make_topic(pipeline.source, [packet.data for packet in sent["lsst"]])
    pipeline.config["input"] |= {"topics": [pipeline.topic, lsst_topic], "schema_registry": str(SCHEMAS)}
    service = pipeline.start(
        models=[str(both_surveys), "embedder"],
        filters=[{"name": "chosen", "where": FILTER}],
        anomalies={"reference": str(reference), "rate": 0.1},
    )

    records = pipeline.read("scored", expected=2 * N)
    assert len(records) == 2 * N
    scorer = Scorer.open([both_surveys], device="cpu")
    selection = compile_filter(FILTER, FIELDS, scorer.outputs)
    expected, selected = {}, set()
    for survey, packets in sent.items():
        decoder = scorer.decoder(SCHEMAS, columns=selection.columns)
        [scored] = score_stream(packets, decoder, scorer, DuplicateWindow(0), batch_size=N, threads=1)
        real = scored.scores.columns()["both.real"]
        expected |= {(survey, int(scored.alerts.alert_id[i])): float(real[i]) for i in range(N)}
        chosen = np.flatnonzero(selection.evaluate(scored))
        assert 0 < len(chosen) < N
        selected |= {(survey, int(scored.alerts.alert_id[i])) for i in chosen}
    found = {}
    for record in records:
        both, embedder = alert(record.value())["broker_filter"]["models"]
        assert (both["model"], both["version"]) == ("both", "3.0")
        assert embedder["embedding"] is not None
        found[identity(record)] = both["outputs"]["real"]
        assert headers(record)["models"].startswith("both=3.0")
    assert found == pytest.approx(expected, abs=1e-6)

    assert {identity(record) for record in pipeline.read("chosen", expected=len(selected))} == selected
    anomalies = pipeline.read("anomalies", expected=1)
    assert {identity(record)[0] for record in anomalies} == {"ztf", "lsst"}

    service.wait_consumed(2 * N)
    networks = re.findall(r'model_info{model="(\w+)".*?surveys="([\w,]+)".*} 1', service.get("/metrics")[1])
    assert sorted(networks) == [("both", "lsst"), ("both", "ztf"), ("embedder", "ztf,lsst")]
    assert "model both 3.0 on onnxruntime/CPUExecutionProvider, for lsst by the network deep 1" in service.log
    assert service.end() == 0


def identity(record: Message) -> tuple[str, int]:
    """Return the survey and the alert id of an output record."""
    scores = alert(record.value())
    return scores["survey"], scores["alert_id"]


@pytest.mark.kafka
def test_alerts_of_a_survey_without_a_network_are_refused_with_the_surveys_that_the_bundle_has(
    make_pipeline: MakePipeline, lsst_network: Path
) -> None:
    pipeline = make_pipeline([packet.data for packet in packets_of("ztf", seed=7)[:3]])
    service = pipeline.start(models=[str(lsst_network)])
    records = pipeline.read("dead-letter", expected=3)
    assert [headers(record)["reason"] for record in records] == ["no_model_for_survey"] * 3
    assert headers(records[0])["detail"] == (
        "no configured model takes alerts of ztf (deep takes lsst): add a bundle for this survey, or ask for it with "
        "`also`"
    )
    assert service.end() == 0
