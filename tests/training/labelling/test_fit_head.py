"""A classifier of few labels on an embedding, and its bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.labels import Labels, parse_rule
from broker_filter.scoring.scorer import Scorer
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.filtering import score_stream
from training.__main__ import main
from training.errors import DatasetError
from training.labelling.embedded import EmbeddedAlerts, embed_archives
from training.labelling.fit_head import fit_head
from training.labelling.linear import fit_linear


@pytest.fixture(scope="module")
def embedded(night_packets: Path) -> EmbeddedAlerts:
    return embed_archives([night_packets], ["default"], "embedder", "ztf", None)


def test_bundle_gives_the_probabilities_of_the_fitted_classifier_and_its_embedding(
    night_packets: Path, night_table: Path, night_labels: Labels, embedded: EmbeddedAlerts, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rules = [option for rule in night_labels.rules for option in ("--class", str(rule))]
    inputs = [str(night_packets), "--labels", str(night_table), "--label", "truth", *rules]
    assert main(["fit-head", *inputs, "--name", "mine", "--out", str(tmp_path / "mine")]) == 0
    assert "roc_auc: " in capsys.readouterr().out

    label = night_labels.of(embedded.alert_id, embedded.object_id)
    head = fit_linear(embedded.embedding, label, embedded.object_id, night_labels.classes)
    expected = dict(zip(embedded.alert_id.tolist(), head.probabilities(embedded.embedding)[:, 0].tolist(), strict=True))
    scorer = Scorer.open([tmp_path / "mine"])
    (scored,) = score_stream(read_packets([night_packets]), scorer.decoder(), scorer)
    given = scored.scores.columns()[f"mine.{night_labels.classes[1]}"]
    wanted = [expected[alert] for alert in scored.alerts.alert_id.tolist()]
    np.testing.assert_allclose(given, wanted, atol=1e-4)

    card = open_bundle(str(tmp_path / "mine")).part("ztf").card
    assert card.training
    assert f"{len(embedded)} labelled alerts" in card.training.data
    assert 0 <= card.training.evaluation["roc_auc"] <= 1  # type: ignore[operator]


def test_classes_are_learnt_and_an_object_is_never_in_both_folds() -> None:
    rng = np.random.default_rng(1)
    label = np.repeat([0, 1, 2], 40)
    embedding = (np.eye(8)[label] + rng.normal(0, 0.2, (120, 8))).astype(np.float32)
    objects = np.array([f"object{i // 4}" for i in range(120)])
    head = fit_linear(embedding, label, objects, ("a", "b", "c"))
    assert (head.probabilities(embedding).argmax(axis=1) == label).mean() > 0.95
    assert (head.crossed.argmax(axis=1) == label).mean() > 0.9
    # The label of an object cannot be known from its own alerts: with labels by object and no signal, it is chance.
    alike = rng.normal(0, 1, (30, 8)).repeat(4, axis=0).astype(np.float32)
    by_object = rng.permutation(np.repeat([0, 1], 15)).repeat(4)
    blind = fit_linear(alike, by_object, objects, ("a", "b"))
    assert ((blind.crossed[:, 0] > 0.5) == by_object).mean() < 0.75


def test_too_few_objects_of_a_class_and_labels_of_other_alerts_are_refused(
    embedded: EmbeddedAlerts, tmp_path: Path
) -> None:
    label = np.zeros(len(embedded), np.int64)
    label[0] = 1
    with pytest.raises(DatasetError, match="each class needs at least 2 labelled objects, but rare has 1"):
        fit_linear(embedded.embedding, label, embedded.object_id, ("common", "rare"))
    others = Labels(tmp_path / "l.csv", "0" * 64, "label", "candid", (parse_rule("a=a"), parse_rule("b=b")), {"1": 0})
    with pytest.raises(DatasetError, match="labels none of the 60 alerts"):
        fit_head(embedded, others, open_bundle("embedder"), "mine", "1", tmp_path / "mine")
