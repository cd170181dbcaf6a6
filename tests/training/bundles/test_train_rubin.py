"""The bundle `rubin`: its network, the data that it learns from, and its evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from scipy.stats import spearmanr

from broker_filter.scoring.networks.snrnet import FLAGGED, METADATA, SIZE, SnrNet
from broker_filter.simulate import SCHEMAS, simulate_night
from training.bundles.rubin_data import CLASSES, Seen, load_detections, load_lsst, simulate, simulated_classes
from training.bundles.rubin_evaluation import FOLDS, correlation, evaluate_simulated, some_visits, unrelated
from training.bundles.train_rubin import (
    Learner,
    Recipe,
    augment,
    calibrate,
    chances,
    held_out,
    image_logit,
    pretrain,
    resumed,
    tune,
)
from training.errors import DatasetError
from training.evaluation.calibration import slope_and_intercept

COLUMNS = len(METADATA) + len(FLAGGED)
ALERTS = 60
"""Number of simulated alerts."""


@pytest.fixture(scope="module")
def network() -> SnrNet:
    """A network with random weights."""
    torch.manual_seed(1)
    return SnrNet(members=2, classes=3).eval()


@pytest.fixture(scope="module")
def simulated() -> Seen:
    """Simulated alerts."""
    return simulate(ALERTS, seed=3)


def test_the_orientation_of_an_alert_does_not_change_its_scores(network: SnrNet) -> None:
    images, metadata, psf = torch.randn(3, 3, SIZE, SIZE), torch.randn(3, COLUMNS), torch.rand(3, 1, SIZE, SIZE)
    with torch.inference_mode():
        as_seen, _ = network(images, metadata, psf)
        turned, _ = network(images.rot90(1, (-2, -1)).flip(-1), metadata, psf.rot90(1, (-2, -1)).flip(-1))
    torch.testing.assert_close(turned, as_seen)


def test_class_probabilities_sum_to_one(network: SnrNet) -> None:
    with torch.inference_mode():
        logits, _ = network(torch.randn(4, 3, SIZE, SIZE), torch.randn(4, COLUMNS), torch.rand(4, 1, SIZE, SIZE))
    torch.testing.assert_close(logits[:, 1:].sigmoid().sum(dim=1), torch.ones(4))


def test_no_metadata_value_makes_a_score_undefined(network: SnrNet) -> None:
    metadata = torch.zeros(5, COLUMNS)
    metadata[1], metadata[2], metadata[3], metadata[4] = 1e12, -1e12, 1e-30, -1e-30
    with torch.inference_mode():
        logits, _ = network(torch.zeros(5, 3, SIZE, SIZE), metadata, torch.zeros(5, 1, SIZE, SIZE))
    assert logits.isfinite().all()


def test_neither_reliability_nor_history_is_an_input() -> None:
    assert not set(METADATA) & {"reliability", "ndethist", "sso", "visit", "ra", "dec", "firstDiaSourceMjdTai"}


def test_no_visit_and_no_object_is_in_two_folds() -> None:
    rng = np.random.default_rng(2)
    visit, object_id = rng.integers(30, size=80), rng.integers(70, size=80).astype(np.str_)
    fold = unrelated(visit, object_id, seed=0)
    assert set(fold.tolist()) <= set(range(FOLDS))
    assert len(set(fold.tolist())) > 1
    for shared in (visit, object_id):
        for one in np.unique(shared):
            assert len(set(fold[shared == one].tolist())) == 1


def test_held_out_logits_are_calibrated() -> None:
    rng = np.random.default_rng(4)
    reliability = rng.random(2000)
    truth = reliability > 0.5
    logits = np.stack([3 * truth + rng.normal(0, 2, 2000), rng.normal(0, 1, 2000)], axis=1)
    _, calibrated = held_out(logits, reliability, np.arange(2000) % 5)
    slope, intercept = slope_and_intercept(calibrated, truth, np.ones(2000))
    assert float(slope) == pytest.approx(1, abs=0.1)
    assert float(intercept) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("informative", [0, 1])
def test_the_informative_logit_is_chosen(informative: int) -> None:
    rng = np.random.default_rng(6)
    reliability = rng.random(300)
    logits = rng.normal(0, 20, (300, 2))
    logits[:, informative] = 4 * reliability + rng.normal(0, 0.1, 300)
    weights, _ = calibrate(logits, reliability)
    assert weights[informative] > 0
    assert weights[1 - informative] == 0


def test_the_choice_for_a_fold_does_not_see_its_alerts() -> None:
    """Only in fold 0 does the second logit reproduce the reliability."""
    rng = np.random.default_rng(7)
    reliability, fold = rng.random(300), np.arange(300) % 3
    logits = np.stack([reliability + rng.normal(0, 0.1, 300), rng.normal(0, 20, 300)], axis=1)
    logits[fold == 0] = logits[fold == 0, ::-1]
    combined, _ = held_out(logits, reliability, fold)
    np.testing.assert_allclose(combined[fold == 0], logits[fold == 0, 0])


def test_simulated_artefacts_are_kept_in_the_tuning(simulated: Seen) -> None:
    """Bright artefacts stay bogus although the alerts of LSSTCam, whose images are the same, are called real."""
    recipe = Recipe(
        seed=1, steps=1, tuning_steps=40, tuning_images=32, tuning_simulated=32, simulated_weight=5, tuning_rate=1e-2
    )
    torch.manual_seed(1)
    learner = Learner().eval()
    real = simulated.real.numpy() > 0.5
    on_sky = replace(simulated, real=torch.ones(len(simulated)))
    kept, forgotten = (
        image_logit(tune(learner, on_sky, simulated, one, member=0), simulated.images)
        for one in (recipe, replace(recipe, simulated_weight=0))
    )
    assert kept[real].mean() - kept[~real].mean() > forgotten[real].mean() - forgotten[~real].mean() + 1
    assert (forgotten > 0).all()


def test_a_share_of_the_visits_is_whole_visits() -> None:
    visit = np.repeat(np.arange(20), 3)
    chosen = some_visits(visit, 0.25, seed=1)
    assert len(np.unique(visit[chosen])) == 5
    assert chosen.sum() == 15


def test_simulated_alerts_are_judged_by_their_truth(simulated: Seen) -> None:
    truth = simulated_classes(simulated)
    real = simulated.real.numpy() > 0.5
    right = np.concatenate([np.where(real, 3.0, -3.0)[:, None], np.eye(len(CLASSES))[truth]], axis=1)
    card = evaluate_simulated(simulated, right)
    assert card["simulated_alerts"] == len(simulated)
    assert card["simulated_bogus"] == (~real).sum()
    assert (card["simulated_roc_auc"], card["simulated_real_called_real"]) == (1, 1)
    assert card["simulated_bogus_called_real"] == 0
    recall = [value for name, value in card.items() if "_recall_" in name and not name.endswith("_95")]
    assert recall
    assert set(recall) == {1}
    wrong = evaluate_simulated(simulated, -right)
    assert (wrong["simulated_roc_auc"], wrong["simulated_bogus_called_real"]) == (0, 1)


def test_correlation_of_ranks_is_that_of_spearman() -> None:
    rng = np.random.default_rng(5)
    x = rng.permutation(50).astype(np.float64)
    y = rng.permutation(50) + x
    ranks = np.argsort(np.argsort(y, kind="stable")).astype(np.float64)
    assert float(correlation(x, ranks, np.ones(50))) == pytest.approx(spearmanr(x, ranks).statistic)
    repeated = np.repeat(np.arange(50), 2)
    assert float(correlation(x, y, np.full(50, 2.0))) == pytest.approx(np.corrcoef(x[repeated], y[repeated])[0, 1])


def test_bogus_alerts_are_drawn_as_often_as_the_recipe_says() -> None:
    real = np.array([0.1, 0.9, 0.8, 0.7], np.float32)
    assert chances(real, 0.4)[0] == pytest.approx(0.4)
    assert chances(real, 0.4).sum() == pytest.approx(1)


def source(
    source_id: int, visit: int, is_dipole: bool | None = None, ixx: float | None = None
) -> dict[str, float | bool | None]:
    row = {"diaSourceId": source_id, "visit": visit, "diaObjectId": 7, "reliability": 0.5, "snr": 6.0}
    return row | {"isDipole": is_dipole, "ixx": ixx}


def test_detections_are_those_of_lsstcam_each_once(tmp_path: Path) -> None:
    on_sky, simulated_visit, hsc = 2026022200116, 7024062600475, 59134
    rows = [source(1, on_sky, is_dipole=True), source(2, simulated_visit), source(3, hsc), source(4, on_sky, ixx=0.2)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "sources.parquet")
    alert = {"diaSource": {"diaSourceId": 9}, "prvDiaSources": [source(4, on_sky, ixx=0.2), source(5, on_sky)]}
    parquet.write_table(pa.Table.from_pylist([alert]), tmp_path / "alerts.parquet")
    nothing = {"diaSource": {"diaSourceId": 9}, "prvDiaSources": None}
    parquet.write_table(pa.Table.from_pylist([nothing]), tmp_path / "no_history.parquet")

    found = load_detections([tmp_path / f"{name}.parquet" for name in ("sources", "alerts", "no_history")])

    assert len(found) == 3
    assert set(found.object_id.tolist()) == {"7"}
    metadata = found.metadata.numpy()
    assert (metadata[:, METADATA.index("snr")] == 6).all()
    assert metadata[:, METADATA.index("isDipole")].tolist() == [1, 0, 0]
    assert metadata[:, len(METADATA) + FLAGGED.index("ixx")].tolist() == [1, 0, 1]


def test_tables_without_detections_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DatasetError, match="no table has diaSources with a reliability"):
        load_detections([tmp_path / "other.parquet"])


def test_simulated_alerts_have_noise_of_unit_variance_and_a_centred_psf(simulated: Seen) -> None:
    assert simulated.images.shape == (ALERTS, 4, SIZE, SIZE)
    assert simulated.metadata.shape == (ALERTS, COLUMNS)
    assert 0.5 < float(simulated.images[:, 2].sinh().abs().median()) < 1
    assert (simulated.images[:, 3].flatten(1).argmax(dim=1) == SIZE * (SIZE // 2) + SIZE // 2).all()
    assert 0 < float(simulated.real.mean()) < 1


def test_a_trained_part_is_read_again_unless_the_recipe_changed(simulated: Seen, tmp_path: Path) -> None:
    made: list[int] = []

    def train(recipe: Recipe) -> torch.Tensor:
        def make() -> dict[str, torch.Tensor]:
            made.append(recipe.seed)
            return pretrain(simulated, simulated, simulated, recipe, member=0)

        return resumed(tmp_path / "parts" / "member_0.safetensors", recipe, make)["real_head.weight"]

    short = Recipe(seed=1, steps=2, per_step=(4, 4, 4))
    first, again = train(short), train(short)
    assert torch.equal(first, again)
    assert not torch.equal(first, train(Recipe(seed=2, steps=2, per_step=(4, 4, 4))))
    assert made == [1, 2]


def test_augmented_images_keep_the_psf_and_the_background(simulated: Seen) -> None:
    torch.manual_seed(2)
    recipe = Recipe(seed=1, steps=1)
    seen = augment(simulated.images, recipe, np.random.default_rng(1))
    torch.testing.assert_close(seen[:, 3].sum(dim=(1, 2)), simulated.images[:, 3].sum(dim=(1, 2)))
    assert float(seen[:, 2].median()) == pytest.approx(float(simulated.images[:, 2].median()), abs=0.1)


def test_alerts_that_are_not_of_lsstcam_are_refused(tmp_path: Path) -> None:
    """Simulated LSST packets have no reliability."""
    with pytest.raises(DatasetError, match="no alert of LSSTCam with a reliability could be decoded"):
        load_lsst([tmp_path], None)
    for alert in simulate_night(3, seed=1, survey="lsst"):
        (tmp_path / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    with pytest.raises(DatasetError, match="no alert of LSSTCam with a reliability could be decoded"):
        load_lsst([tmp_path], str(SCHEMAS))


def test_real_alerts_are_told_apart_by_their_visits(shared_data: Path) -> None:
    seen, raw = load_lsst([shared_data / "lsst" / "ocf" / "lsst_v9_0"], None)
    assert len(seen) == len(raw) == 27
    assert (seen.of_lsstcam.sum(), seen.of_hsc.sum()) == (11, 16)
    assert ((seen.real >= 0) & (seen.real <= 1)).all()
