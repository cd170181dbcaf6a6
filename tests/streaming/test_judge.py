"""Anomalies: outliers are flagged at the requested rate, with a reason."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fastavro
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from broker_filter import config
from broker_filter.anomalies.reference import Measure, Reference, ReferenceSetError, SurveyCounts, read_reference
from broker_filter.config import Runtime, Service
from broker_filter.metrics import Metrics
from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.scorer import Model, open_scorer
from broker_filter.streaming.account import account_packets
from broker_filter.streaming.build_reference import build_reference
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_stream
from broker_filter.streaming.judge import AnomalyJudge, open_judge
from broker_filter.streaming.resolved import resolve
from broker_filter.streaming.routing import open_router

from .conftest import PASSES, Scored, ordinary, two_surveys


def test_outliers_that_pass_the_cut_are_flagged_with_a_reason(make_embedded: Scored, reference: Reference) -> None:
    judge = AnomalyJudge(reference, 0.01, PASSES)
    strange = -ordinary(3, 5)
    anomalies = judge.judge(make_embedded(np.concatenate([ordinary(5, 6), strange]), [0.9] * 6 + [0.1, np.nan]))
    assert anomalies.flag.tolist() == [False] * 5 + [True, False, False]
    assert anomalies.judged.tolist() == [True] * 6 + [False, False]  # one is bogus, one of another survey
    assert list(anomalies.reasons) == [5]
    neighbours = anomalies.reasons[5].neighbours
    assert len(neighbours) == 5
    assert {one.alert_id for one in neighbours} < set(reference.surveys[Survey.ZTF].alerts.alert_id.tolist())
    assert neighbours[0].distance > 1
    assert judge.columns == ("magpsf",)


def test_thresholds_go_on_in_a_judge_with_the_same_reference_and_rate(
    make_embedded: Scored, reference: Reference
) -> None:
    batches = [make_embedded(ordinary(100, 50 + seed), first_id=10_000 + 100 * seed) for seed in range(4)]
    alone, first = AnomalyJudge(reference, 0.01, None), AnomalyJudge(reference, 0.01, None)
    expected = [alone.judge(batch).threshold for batch in batches]
    found = [first.judge(batch).threshold for batch in batches[:1]]
    same, other_rate = AnomalyJudge(reference, 0.01, PASSES), AnomalyJudge(reference, 0.02, None)
    same.continue_from(first)
    other_rate.continue_from(first)
    found.append(first.judge(batches[1]).threshold)  # the earlier judge finishes its batches
    found += [same.judge(batch).threshold for batch in batches[2:]]
    np.testing.assert_array_equal(found, expected)
    start = AnomalyJudge(reference, 0.02, None).judge(batches[2]).threshold
    np.testing.assert_array_equal(other_rate.judge(batches[2]).threshold, start)


def test_alerts_of_a_survey_without_reference_are_not_judged(make_embedded: Scored, reference: Reference) -> None:
    """Telescopes differ more than alerts: all alerts of another survey would be flagged."""
    both = make_embedded(-ordinary(4, 5), survey=[Survey.ZTF, Survey.LSST] * 2)
    anomalies = AnomalyJudge(reference, 0.01, None).judge(both)
    assert anomalies.judged.tolist() == anomalies.flag.tolist() == [True, False] * 2


def test_each_survey_is_compared_with_its_own_reference_at_the_same_rate(
    make_embedded: Scored, model_of_both: Model
) -> None:
    batches = [two_surveys(make_embedded, seed, 90, 10) for seed in range(20)]
    reference = build_reference(batches, model_of_both, None, limit=2000)
    assert reference.card.surveys["lsst"].read == reference.card.surveys["lsst"].passed == 200
    judge = AnomalyJudge(reference, 0.02, None)
    judged = [two_surveys(make_embedded, seed, 250, 250) for seed in range(100, 120)]
    flags = np.concatenate([judge.judge(scored).flag for scored in judged]).reshape(20, 2, 250)
    np.testing.assert_allclose(flags.mean(axis=(0, 2)), [0.02, 0.02], atol=0.006)


def test_scores_of_a_survey_do_not_depend_on_other_surveys_in_the_reference(
    make_embedded: Scored, model_of_both: Model
) -> None:
    both = build_reference([two_surveys(make_embedded, 3, 300, 300)], model_of_both, None, limit=2000)
    alone = build_reference([make_embedded(ordinary(300, 3), first_id=1800)], model_of_both, None, limit=2000)
    asked = make_embedded(ordinary(20, 9))
    first, second = (AnomalyJudge(reference, 0.1, None).judge(asked) for reference in (both, alone))
    np.testing.assert_array_equal(first.score, second.score)
    np.testing.assert_array_equal(first.flag, second.flag)


def test_survey_with_too_few_reference_alerts_is_not_judged_with_a_warning(
    make_embedded: Scored, model_of_both: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [two_surveys(make_embedded, 0, 300, 2)]
    reference = build_reference(batches, model_of_both, None, limit=1000)
    assert "lsst: 2 ordinary alerts" in caplog.text
    assert "its alerts are not judged" in caplog.text
    assert list(reference.surveys) == [Survey.ZTF]
    assert reference.card.surveys["lsst"] == SurveyCounts(read=2, passed=2, kept=0, held_out=0)
    file = tmp_path / "mixed.safetensors"
    reference.write(file)
    caplog.clear()
    scorer = open_scorer([config.Model(bundle="default", also=["lsst"])], Runtime())
    scored = two_surveys(make_embedded, 7, 10, 10)
    anomalies = open_judge(scorer, file, 0.001).judge(scored)
    assert "alerts of lsst are not judged" in caplog.text
    assert anomalies.judged.tolist() == [True] * 10 + [False] * 10
    assert not anomalies.flag[10:].any()
    metrics = Metrics(CollectorRegistry())
    metrics.commit(account_packets(replace(scored, anomalies=anomalies)), Counter(), "me.dead-letter")
    exposed = metrics.exposition().decode()
    assert 'broker_filter_unjudged_alerts_total{survey="lsst"} 10.0' in exposed
    assert 'broker_filter_unjudged_alerts_total{survey="ztf"} 0.0' in exposed
    assert "broker_filter_judged_alerts_total 10.0" in exposed


@pytest.mark.parametrize("measure", ["mahalanobis", "neighbours"])
def test_stream_of_ordinary_alerts_is_flagged_at_the_requested_rate(
    make_embedded: Scored, default_model: Model, measure: Measure
) -> None:
    batches = [make_embedded(ordinary(100, seed), first_id=100 * seed) for seed in range(20)]
    judge = AnomalyJudge(build_reference(batches, default_model, None, 1500, measure), 0.02, None)
    flags = np.concatenate([judge.judge(make_embedded(ordinary(500, seed))).flag for seed in range(100, 120)])
    assert flags.mean() == pytest.approx(0.02, rel=0.2)


def test_flags_do_not_depend_on_the_size_of_batches(make_embedded: Scored, reference: Reference) -> None:
    stream = ordinary(300, 8)
    whole = AnomalyJudge(reference, 0.05, None).judge(make_embedded(stream))
    judge = AnomalyJudge(reference, 0.05, None)
    parts = [judge.judge(make_embedded(part)) for part in np.split(stream, [1, 60, 61, 290])]
    np.testing.assert_array_equal(np.concatenate([part.flag for part in parts]), whole.flag)
    np.testing.assert_allclose(np.concatenate([part.score for part in parts]), whole.score, atol=1e-6)


def test_duplicates_are_flagged_but_do_not_move_the_threshold(make_embedded: Scored, reference: Reference) -> None:
    judge = AnomalyJudge(reference, 0.01, None)
    scored = replace(make_embedded(-ordinary(4, 5)), duplicate=np.array([False, True, True, False]))
    anomalies = judge.judge(scored)
    assert anomalies.flag.all()
    assert anomalies.threshold[1] == anomalies.threshold[2] == anomalies.threshold[3] > anomalies.threshold[0]
    accounts = account_packets(replace(scored, anomalies=anomalies))
    assert [(account.judged, account.anomalous) for account in accounts] == [(1, 1), (0, 0), (0, 0), (1, 1)]


def test_judge_uses_the_cut_of_the_reference_by_default(
    reference: Reference, tmp_path: Path, reference_file: Path
) -> None:
    file = tmp_path / "own.safetensors"
    reference.write(file)
    scorer = open_scorer(["default"], Runtime())
    assert open_judge(scorer, file, 0.001).columns == ("magpsf",)
    assert open_judge(scorer, file, 0.001, compile_filter("fwhm < 5", FIELDS, scorer.outputs)).columns == ("fwhm",)
    assert open_judge(scorer, reference_file, 0.001).columns == ()
    card = read_reference(file).card.model_copy(update={"bundle": "other"})
    replace(reference, card=card).write(file)
    with pytest.raises(ReferenceSetError, match=r"other, which is not among the configured models \(default\)"):
        open_judge(scorer, file, 0.001)


def test_anomalies_among_real_packets_are_published_with_embedding_and_reason(
    ztf_packets: list[tuple[int, bytes]], embedding_bundle: Path, tmp_path: Path
) -> None:
    """The whole path from packets to output records, as in the service."""
    packets = [Packet(data, KafkaPosition("c", "ztf", 0, i)) for i, (_, data) in enumerate(ztf_packets[:400])]
    file, section = tmp_path / "ordinary.safetensors", {"bundle": str(embedding_bundle)}
    scorer = open_scorer([config.Model.model_validate(section)], Runtime())
    [looks] = scorer.models
    decoder, window = Decoder(open_registry(None), cutout_size=63, columns=()), DuplicateWindow(1000)
    batches = list(score_stream(packets[:250], decoder, scorer, window, batch_size=64, threads=1))
    build_reference(batches, looks, None, limit=1000).write(file)
    service = Service.model_validate(
        {
            "input": {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]},
            "output": {"prefix": "me", "payload": "scores"},
            "models": [section],
            "anomalies": {"reference": str(file), "rate": 0.05, "where": "looks.real > 0.5"},
        }
    )
    assert service.anomalies is not None
    resolved, records, accounts = resolve(service), [], []
    router = open_router(resolved)
    judge = open_judge(scorer, service.anomalies.reference, service.anomalies.rate, resolved.judged)
    for scored in score_stream(packets, decoder, scorer, DuplicateWindow(0), batch_size=50, threads=1, judge=judge):
        records += router.route(scored).records
        accounts += account_packets(scored)
    anomalous = [record for record in records if record.topic == "me.anomalies"]
    assert 5 < len(anomalous) < 60
    assert sum(account.anomalous for account in accounts) == len(anomalous)
    assert sum(account.judged for account in accounts) <= 400
    for record in anomalous:
        [alert] = fastavro.reader(io.BytesIO(record.value))
        assert isinstance(alert, dict)
        anomaly, [model] = alert["broker_filter"]["anomaly"], alert["broker_filter"]["models"]
        assert anomaly["score"] > anomaly["threshold"]
        assert (anomaly["model"], len(model["embedding"])) == ("looks", looks.bundle.embedding)
        assert len(anomaly["reason"]["neighbours"]) == 5
        far = anomaly["reason"]["modalities"]
        assert set(far) <= {"science", "template", "difference"}  # some packets have no template cutout
        assert far[anomaly["reason"]["most_unlike"]] == max(far.values())
