"""Lenses in the stream: flagged alerts get features, and only where the lens's modality is what is strange."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import Reference, ReferenceAlerts, SurveyCounts, make_reference
from broker_filter.anomalies.score import AnomalyScorer
from broker_filter.config import Runtime, Service
from broker_filter.config_file import ConfigError, load_service
from broker_filter.packets.batch import Survey
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.explanation import Verdict
from broker_filter.scoring.labels import UNLABELLED
from broker_filter.scoring.lens_files import LensError
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.simulate import simulate_night
from broker_filter.streaming.build_reference import calibrate
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.explain import open_lenses
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.judge import AnomalyJudge
from broker_filter.streaming.scored import ScoredBatch

N = 30
COPIES = 8
"""Ordinary alerts near each simulated one."""


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return open_scorer(["embedder"], Runtime())


@pytest.fixture(scope="module")
def scored(scorer: Scorer) -> ScoredBatch:
    packets = [Packet(alert.packet, FilePosition(str(i))) for i, alert in enumerate(simulate_night(N, seed=6))]
    return score_packets(packets, scorer.decoder(), scorer, DuplicateWindow(0))


@pytest.fixture(scope="module")
def reference(scorer: Scorer, scored: ScoredBatch) -> Reference:
    """Ordinary alerts near those of the batch, but for the light curves of its first half."""
    [model] = scored.scores.models
    assert model.embedding is not None
    rng, around = np.random.default_rng(0), np.repeat(model.embedding[N // 2 :], COPIES, axis=0)
    embedding = normalise(around + 0.05 * rng.standard_normal(around.shape))
    n = len(embedding)
    alerts = ReferenceAlerts(embedding, np.arange(n), np.array([f"ZTF{i}" for i in range(n)]), np.zeros(n, np.uint8))
    part = calibrate(alerts, np.full(n, UNLABELLED), 3, "mahalanobis")
    counts = SurveyCounts(read=n, passed=n, kept=len(part.alerts), held_out=len(part.scores))
    [one] = scorer.models
    return make_reference(one.bundle, None, {Survey.ZTF: part}, {Survey.ZTF: counts}, "mahalanobis")


def with_light_curves(scored: ScoredBatch, vectors: float) -> ScoredBatch:
    """Return the batch with the same vector in the place of every light curve, or as it is if `vectors` is 0."""
    [model] = scored.scores.models
    assert model.embedding is not None
    modalities = model.embedding.reshape(len(model.embedding), 3, -1).copy()
    if vectors:
        modalities[:, 1] = vectors
    model = replace(model, embedding=normalise(modalities.reshape(len(modalities), -1)))
    return replace(scored, scores=replace(scored.scores, models=(model,)))


def test_only_flagged_alerts_are_explained_and_nothing_else_changes(
    scorer: Scorer, scored: ScoredBatch, reference: Reference
) -> None:
    lenses = open_lenses(["embedder"], scorer, reference.card)
    plain = AnomalyJudge(reference, 0.1, None).judge(scored)
    anomalies = AnomalyJudge(reference, 0.1, None, lenses).judge(scored)
    np.testing.assert_array_equal(plain.score, anomalies.score)
    np.testing.assert_array_equal(plain.flag, anomalies.flag)
    assert anomalies.flag.any()
    assert list(anomalies.reasons) == np.flatnonzero(anomalies.flag).tolist()
    assert not any(reason.explanations for reason in plain.reasons.values())
    for row, reason in anomalies.reasons.items():
        assert replace(reason, explanations=()) == plain.reasons[row]
        [explanation] = reason.explanations
        usual = reason.modalities.get("light_curve", np.inf) < 2
        assert (explanation.verdict is Verdict.USUAL) == usual
        if explanation.verdict is Verdict.EXPLAINED:
            assert all(feature.effect is not None and feature.effect >= 0.01 for feature in explanation.features)


def test_strange_light_curve_gets_features_and_a_usual_one_does_not(
    scorer: Scorer, scored: ScoredBatch, reference: Reference
) -> None:
    [lens] = open_lenses(["embedder"], scorer, reference.card)
    judge = AnomalyJudge(reference, 0.1, None, [lens])
    strange = judge.judge(with_light_curves(scored, 1.0))
    assert strange.flag.sum() > N / 2
    said = [explanation.verdict for reason in strange.reasons.values() for explanation in reason.explanations]
    assert len(said) == strange.flag.sum()
    assert Verdict.USUAL not in said


def test_effect_is_the_share_of_the_anomaly_score_that_disappears(
    scorer: Scorer, scored: ScoredBatch, reference: Reference
) -> None:
    """A lens's unchanged vector gives the alert's own score."""
    [lens] = open_lenses(["embedder"], scorer, reference.card)
    judge = AnomalyScorer(reference.card, reference.surveys[Survey.ZTF])
    [model] = scored.scores.models
    assert model.embedding is not None
    inputs = prepare(raw_alerts(scored.alerts), scorer.models[0].parts[0].inputs)
    seen = lens.lens.see(inputs)
    for row in range(5):
        one = {name: array[row : row + 1] for name, array in inputs.items()}
        vector = lens.lens._moved(seen.z[row : row + 1], one)
        [same] = judge.score_variants(model.embedding[row], "light_curve", vector)
        assert same == pytest.approx(float(judge.score(model.embedding[row : row + 1])[0]), abs=1e-3)


def test_lens_without_its_model_or_with_a_reference_of_another_bundle_is_refused(
    scorer: Scorer, reference: Reference
) -> None:
    with pytest.raises(LensError, match=r"which is not among the models \(default\); add it"):
        open_lenses(["embedder"], open_scorer(["default"], Runtime()), None)
    other = reference.card.model_copy(update={"bundle": "other"})
    with pytest.raises(LensError, match="the reference set was made with other"):
        open_lenses(["embedder"], scorer, other)


def test_config_check_names_a_lens_that_cannot_be_used(reference: Reference, tmp_path: Path) -> None:
    reference.write(tmp_path / "ordinary.safetensors")
    document = {
        "input": {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]},
        "output": {"prefix": "me"},
        "models": ["embedder"],
        "anomalies": {"reference": str(tmp_path / "ordinary.safetensors"), "lens": "embedder"},
    }
    file = tmp_path / "service.yaml"

    def load(**anomalies: object) -> Service:
        file.write_text(yaml.safe_dump(document | {"anomalies": document["anomalies"] | anomalies}))  # type: ignore[operator]
        return load_service(file, {}).config

    anomalies = load().anomalies
    assert anomalies is not None
    assert anomalies.lens == ["embedder"]
    anomalies = load(lens=["embedder"]).anomalies
    assert anomalies is not None
    assert anomalies.lens == ["embedder"]
    with pytest.raises(ConfigError, match=r"anomalies\.lens: none: not a lens"):
        load(lens="none")
    document["models"] = ["default"]
    with pytest.raises(ConfigError, match=r"anomalies\.lens: .*which is not among the models \(default\)"):
        load()
