"""Reference sets: written and read back unchanged, refused if they do not fit, and anomaly scores from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file

from broker_filter.packets.batch import Survey
from broker_filter.scoring.anomaly import AnomalyScorer, Cloud, Mahalanobis, anomaly_scores
from broker_filter.scoring.bundle import WEIGHTS, Bundle, Card, open_bundle
from broker_filter.scoring.neighbours import normalise
from broker_filter.scoring.reference import (
    CARD,
    Measure,
    Reference,
    ReferenceAlerts,
    ReferenceSetError,
    SurveyCounts,
    SurveyReference,
    check_made_with,
    make_reference,
    read_card,
    read_reference,
)

MODALITIES = ("image", "light_curve")


def bundle_with(card: Card) -> Bundle:
    """Return a bundle of one network with this card."""
    part = open_bundle("default").part("ztf")
    return Bundle(part.directory, card, (replace(part, card=card),))


def bundle_with_modalities(modalities: tuple[str, ...]) -> Bundle:
    """Return a bundle whose embedding consists of these modalities."""
    shipped = open_bundle("default").part("ztf").card
    outputs = shipped.outputs.model_copy(update={"embedding": 8, "modalities": modalities})
    return bundle_with(shipped.model_copy(update={"outputs": outputs}))


@pytest.fixture
def bundle() -> Bundle:
    return bundle_with_modalities(MODALITIES)


@pytest.fixture
def part() -> SurveyReference:
    rng = np.random.default_rng(1)
    modalities = normalise(rng.standard_normal((50, 2, 4)))
    modalities[3, 1] = 0  # has no light curve
    alerts = ReferenceAlerts(
        normalise(modalities.reshape(50, 8)),
        np.arange(50) - 7,
        np.array([f"ZTF26aaé{i}" for i in range(50)]),
        np.full(50, Survey.ZTF, np.uint8),
    )
    usual = np.array([[2.8, 0.3], [1.7, 0.4], [1.7, 0.4]], np.float32)
    apart = np.array([[0.5, 0.1], [0.4, 0.2]], np.float32)
    scores, label = np.linspace(0.1, 0.5, 30, dtype=np.float32), np.arange(50) % 3 - 1
    return SurveyReference(alerts, scores, usual, apart, label)


@pytest.fixture
def reference(bundle: Bundle, part: SurveyReference) -> Reference:
    """A reference of two different surveys."""
    few = np.arange(40)
    lsst = replace(
        part,
        alerts=replace(part.alerts[few], survey=np.full(40, Survey.LSST, np.uint8)),
        label=part.label[few],
        usual=part.usual * 2,
    )
    counts = SurveyCounts(read=200, passed=80, kept=50, held_out=30)
    return make_reference(
        bundle,
        "default.real > 0.5",
        {Survey.ZTF: part, Survey.LSST: lsst},
        {Survey.ZTF: counts, Survey.LSST: counts},
        "mahalanobis",
        ("VS", "SN"),
    )


@pytest.fixture
def file(reference: Reference, tmp_path: Path) -> Path:
    reference.write(tmp_path / "ordinary.safetensors")
    return tmp_path / "ordinary.safetensors"


def test_a_reference_is_read_back_unchanged(reference: Reference, file: Path) -> None:
    again = read_reference(file)
    assert again.card == reference.card == read_card(file)
    assert list(again.surveys) == [Survey.ZTF, Survey.LSST]
    for survey, written in reference.surveys.items():
        read = again.surveys[survey]
        for name in ("embedding", "alert_id", "object_id", "survey"):
            np.testing.assert_array_equal(getattr(read.alerts, name), getattr(written.alerts, name))
        for name in ("scores", "usual", "apart", "label"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_reference_of_another_bundle_is_refused(reference: Reference, file: Path, bundle: Bundle) -> None:
    check_made_with(file, reference.card, [bundle])
    card = bundle.parts[0].card
    others = {
        "not among the configured models": bundle_with(card.model_copy(update={"name": "other"})),
        r"default another\b": bundle_with(card.model_copy(update={"version": "another"})),
        "000000000000": bundle_with(card.model_copy(update={"files": card.files | {WEIGHTS: "0" * 64}})),
        "build the reference again": open_bundle("default"),  # without modalities
    }
    for message, other in others.items():
        with pytest.raises(ReferenceSetError, match=message):
            check_made_with(file, reference.card, [other])


def test_damage_is_found(file: Path) -> None:
    arrays, metadata = load_file(file), {CARD: read_card(file).model_dump_json()}
    damaged = {
        "sha256 of its arrays is not the one in its card": arrays | {"lsst.embedding": arrays["lsst.embedding"] * 2},
        "its card requires": arrays | {"ztf.alert_id": arrays["ztf.alert_id"][:-1]},
        "build the reference again": {"ztf.embedding": arrays["ztf.embedding"]},
    }
    for message, some in damaged.items():
        save_file(some, file, metadata=metadata)
        with pytest.raises(ReferenceSetError, match=message):
            read_reference(file)
    narrow = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch_save_file(narrow | {"ztf.embedding": narrow["ztf.embedding"].bfloat16()}, file, metadata=metadata)
    with pytest.raises(ReferenceSetError, match="BF16"):  # numpy has no such dtype
        read_reference(file)
    save_file(arrays, file, metadata={CARD: '{"format": 1}'})
    with pytest.raises(ReferenceSetError, match=r"another version of broker-filter in format 1.*; build the"):
        read_reference(file)
    save_file(arrays, file)
    with pytest.raises(ReferenceSetError, match="not a reference set"):
        read_reference(file)
    file.write_bytes(b"nonsense" * 10)
    with pytest.raises(ReferenceSetError, match="not a safetensors file"):
        read_reference(file)
    with pytest.raises(ReferenceSetError, match="No such file"):
        read_reference(file.with_name("absent"))


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "embedding": lambda values: np.where(np.arange(len(values))[:, None] == 5, np.float32(np.nan), values),
        "scores": lambda values: values[::-1].copy(),
        "usual": lambda values: values * np.float32(0),
        "apart": lambda values: -values,
        "label": lambda values: values + 1,
    }.items(),
)
def test_arrays_that_would_flag_nothing_are_refused(
    reference: Reference, file: Path, name: str, change: Callable[[NDArray[np.generic]], NDArray[np.generic]]
) -> None:
    """A single NaN in the reference would make every score NaN, so that no alert would ever be flagged."""
    part = reference.surveys[Survey.LSST]
    if name == "embedding":
        changed = replace(part, alerts=replace(part.alerts, embedding=change(part.alerts.embedding)))
    else:
        changed = replace(part, **{name: change(getattr(part, name))})
    rewrite(reference, changed, file)
    with pytest.raises(ReferenceSetError, match=f"ordinary.safetensors: survey lsst: .*{name}.*; build the reference"):
        read_reference(file)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_reference_of_one_alert_is_refused(reference: Reference, file: Path, kept: int) -> None:
    """One alert has no spread, and one score gives no threshold."""
    part = reference.surveys[Survey.LSST]
    one = replace(part, alerts=part.alerts[np.arange(1)], label=part.label[:1])
    rewrite(reference, one if kept else replace(part, scores=part.scores[:1]), file)
    with pytest.raises(ReferenceSetError, match="build the reference again"):
        read_reference(file)


def test_identical_alerts_are_refused(part: SurveyReference) -> None:
    same = np.repeat(part.alerts.embedding[:1], 50, axis=0)
    with pytest.raises(ReferenceSetError, match="have the same embedding"):
        Cloud(same, len(MODALITIES), "mahalanobis", part.label)


def rewrite(reference: Reference, lsst: SurveyReference, file: Path) -> None:
    """Write the reference with changed arrays of a survey, and with their sha256 in the card."""
    card = reference.card
    made = make_reference(
        bundle_with_modalities(card.modalities),
        card.where,
        {**reference.surveys, Survey.LSST: lsst},
        {Survey[name.upper()]: counts for name, counts in card.surveys.items()},
        card.measure,
        card.classes,
    )
    made.write(file)


def test_an_alert_of_the_reference_is_its_own_nearest_neighbour(reference: Reference, part: SurveyReference) -> None:
    scorer = AnomalyScorer(reference.card, part)
    for i, named in enumerate(scorer.nearest(3 * part.alerts.embedding, 2)):
        assert (named[0].alert_id, named[0].object_id) == (i - 7, f"ZTF26aaé{i}")
        assert named[0].distance == pytest.approx(0, abs=1e-6)


def test_a_score_does_not_depend_on_what_else_is_scored(reference: Reference, part: SurveyReference) -> None:
    scorer, asked = (
        AnomalyScorer(reference.card, part),
        np.random.default_rng(2).standard_normal((60, 8)).astype(np.float32),
    )
    alone = np.concatenate([scorer.score(one[None]) for one in asked])
    np.testing.assert_allclose(scorer.score(asked), alone, atol=1e-6)


@pytest.mark.parametrize("measure", get_args(Measure))
def test_an_outlier_scores_higher(reference: Reference, part: SurveyReference, measure: Measure) -> None:
    scorer = AnomalyScorer(reference.card.model_copy(update={"measure": measure}), part)
    embedding = part.alerts.embedding[[10, 10, 3]]
    embedding[1, 4:] = embedding[1, 4:][::-1] - part.alerts.embedding[:, 4:].mean(axis=0) * 20  # far from all
    like, unlike, lacking = scorer.score(embedding)
    assert like < unlike
    assert np.isfinite(lacking)


def test_the_reason_names_the_modality_that_is_an_outlier(reference: Reference, part: SurveyReference) -> None:
    ordinary = normalise(np.eye(1, 4) + 0.2 * np.random.default_rng(4).standard_normal((50, 2, 4)))
    alerts = replace(part.alerts, embedding=normalise(ordinary.reshape(50, 8)))
    asked = alerts.embedding[[10, 10, 10]]
    asked[1, 4:] *= -1
    asked[2, 4:] = 0
    reasons = AnomalyScorer(reference.card, replace(part, alerts=alerts)).explain(asked)
    assert reasons[1].most_unlike == "light_curve"
    assert reasons[1].modalities["light_curve"] > reasons[0].modalities["light_curve"]
    assert [len(reason.neighbours) for reason in reasons] == [5, 5, 5]
    assert set(reasons[2].modalities) == {"image"}  # a missing modality is not a reason


def test_a_reason_measures_distances_from_the_neighbours_that_it_names(
    reference: Reference, part: SurveyReference
) -> None:
    scorer, known = AnomalyScorer(reference.card, part), part.alerts
    asked = normalise(np.random.default_rng(3).standard_normal((20, 8)))
    asked[4, :4] = 0
    row_of = {alert_id: row for row, alert_id in enumerate(known.alert_id.tolist())}
    for own, reason in zip(asked, scorer.explain(asked), strict=True):
        theirs = known.embedding[[row_of[one.alert_id] for one in reason.neighbours]]
        expected = {}
        for m, name in enumerate(MODALITIES):
            axes = slice(4 * m, 4 * m + 4)
            with_it = theirs[theirs[:, axes].any(axis=1), axes]
            if own[axes].any():
                distance = (1 - normalise(with_it) @ normalise(own[axes])).mean()
                expected[name] = (distance - part.apart[m, 0]) / part.apart[m, 1]
        assert reason.modalities == pytest.approx(expected, abs=1e-4)
        assert reason.most_unlike == max(expected, key=expected.__getitem__)


def test_distances_use_the_covariance_of_the_ordinary_alerts() -> None:
    """A given step is a larger distance in a direction in which ordinary alerts hardly vary."""
    rng = np.random.default_rng(1)
    ordinary = (rng.standard_normal((2000, 3)) * [1, 0.1, 1]).astype(np.float32)
    steps = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    np.testing.assert_allclose(Mahalanobis(ordinary)(steps), [0, 1, 10], atol=0.8)


def test_neighbours_and_centroids_give_the_documented_distances(part: SurveyReference) -> None:
    """For the whole and for each modality; the fourth alert lacks a modality."""
    known, label, asked = part.alerts.embedding, part.label, part.alerts.embedding[2:5]
    near = Cloud(known, 2, "neighbours", label).distances(asked)
    far = Cloud(known, 2, "centroids", label).distances(asked)
    for column, axes in enumerate((slice(0, 8), slice(0, 4), slice(4, 8))):
        there = known[:, axes].any(axis=1)
        cosine = normalise(asked[:, axes]) @ normalise(known[:, axes]).T
        nearest = np.sort(1 - cosine[:, there], axis=1)[:, :5].mean(axis=1)
        middles = [normalise(normalise(known[:, axes])[there & (label == c)].mean(axis=0)) for c in (0, 1)]
        to_nearest = 1 - (normalise(asked[:, axes]) @ np.stack(middles).T).max(axis=1)
        rows = [0, 2] if column == 2 else [0, 1, 2]
        np.testing.assert_allclose(near[rows, column], nearest[rows], atol=1e-6)
        np.testing.assert_allclose(far[rows, column], to_nearest[rows], atol=1e-6)
    assert np.isnan(near[1, 2])
    assert np.isnan(far[1, 2])


def test_the_distance_of_each_modality_is_standardised(part: SurveyReference) -> None:
    embedding = part.alerts.embedding[:20]
    distances = Cloud(part.alerts.embedding, 2, "mahalanobis", part.label).distances(embedding)
    usual = np.array([[0, 1], [0.2, 0.1], [0.02, 0.01]], np.float32)
    expected = np.nanmean((distances - [0, 0.2, 0.02]) / [1, 0.1, 0.01], axis=1)
    np.testing.assert_allclose(anomaly_scores(distances, usual), expected, rtol=1e-5)
    assert np.isnan(distances[3, 2])
    assert np.isfinite(distances[3, :2]).all()
