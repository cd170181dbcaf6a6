"""`fit`: a bundle whose scores are the predictions, and interrupted, damaged and misconfigured runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from broker_filter.config import Runtime
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import WEIGHTS, Architecture, BundleError, ImageInput, PsfInput, open_bundle
from broker_filter.scoring.distribution import QUANTITIES
from broker_filter.scoring.labels import Labels, read_labels
from broker_filter.scoring.networks import build_network, load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.scorer import open_model
from broker_filter.simulate import SCHEMAS, SimulatedAlert, simulate_night
from training.data.build_dataset import build_dataset
from training.data.datasets import Dataset
from training.errors import DatasetError, TrainingError
from training.learner import BEST, LAST, Learner, orient, read_checkpoint
from training.recipe import PUBLISHED_IMAGES, Fit, Hardware, Recipe, read_configuration
from training.vision.classifier import Classifier, ShownAlerts, class_weights, corrupt
from training.vision.fit import BUNDLE, RELIABILITY, fit
from training.vision.frozen_fusion import MetadataClassifier

TINY = Architecture(name="btsbot_cnn", arguments={"channels": (4, 8), "kernel": 3, "hidden": (16, 8)})
TIMM = Architecture(name="timm", arguments={"backbone": "test_convnext", "image_size": 63, "hidden": (16, 8)})
SNR_IMAGES = ImageInput(size=31, order=("science", "template", "difference"), normalisation="snr", padding=0)
PSF = PsfInput(size=31, order=("difference",), normalisation="peak", fallback_fwhm={"lsst": 5.0, "ztf": 2.0})
ONE_CORE = Hardware(accelerator="cpu", devices=1, threads=1)


@pytest.fixture(scope="module")
def config(night_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fit]:
    """The configuration of a tiny network with three short epochs; `changes`: other values of keys."""
    runs = tmp_path_factory.mktemp("runs")

    def make(name: str, **changes: object) -> Fit:
        recipe = Recipe(epochs=3, warm_up_epochs=1, batch=16, learning_rate=3e-3, seed=1)
        keys = {"dataset": night_dataset.directory, "out": runs / name, "architecture": TINY, "recipe": recipe}
        return Fit(name=name, hardware=ONE_CORE, **{**keys, **changes})

    return make


@pytest.fixture(scope="module")
def lsst_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Simulated alerts of LSST with their planes, labelled by truth."""
    directory = tmp_path_factory.mktemp("lsst")
    alerts = list(simulate_night(60, seed=3, survey="lsst"))
    for alert in alerts:
        (directory / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    table = directory / "labels.csv"
    rows = (f"{alert.alert_id},{'real' if alert.is_real else 'bogus'}\n" for alert in alerts)
    table.write_text("alert_id,truth\n" + "".join(rows))
    return build_dataset(
        sorted(directory.glob("*.avro")),
        read_labels(table, "truth"),
        directory / "set",
        cutout_size=31,
        planes=("variance", "psf"),
        schema_registry=str(SCHEMAS),
    )


@pytest.fixture(scope="module")
def fitted(config: Callable[..., Fit]) -> Fit:
    """A finished fit, with metadata and every kind of log."""
    wanted = config("fitted", metadata=("magpsf", "distnr"), logs=("csv", "tensorboard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.record_distribution.LEAST_RECORDED", 20)  # the night is small
        fit(wanted)
    return wanted


def weights(config: Fit) -> dict[str, torch.Tensor]:
    return load_file(config.out / BUNDLE / WEIGHTS)


def test_fit_writes_a_bundle_and_its_predictions_on_the_test_split(fitted: Fit, night_dataset: Dataset) -> None:
    model = open_model(str(fitted.out / BUNDLE), Runtime(engine="torch", device="cpu", inference_threads=1))
    test = night_dataset["test"].read()
    scores = model.parts[0].run(RawAlerts(test.cutouts, test.cutout_box, test.metadata, test.columns))["probabilities"]
    predictions = parquet.read_table(fitted.out / "predictions.parquet")
    assert predictions["alert_id"].to_pylist() == test.alert_id.tolist()
    assert predictions["probability.real"].to_numpy() == pytest.approx(scores[:, 0], abs=1e-5)
    card = open_bundle(fitted.out / BUNDLE).parts[0].card
    assert card.training.evaluation["dataset_sha256"] == night_dataset.card.sha256
    assert (card.training.evaluation["seed"], card.training.evaluation["regimen"]) == (1, "random")
    assert [(column.fill, column.flag) for column in card.inputs.metadata] == [(-999, False)] * 2


def test_fit_records_the_distribution_of_its_training_alerts(fitted: Fit, night_dataset: Dataset) -> None:
    [part] = open_model(str(fitted.out / BUNDLE), Runtime(engine="onnxruntime", device="cpu")).bundle.parts
    distribution = part.distribution()
    assert distribution
    assert night_dataset.card.sha256 in distribution.of
    recorded, train = distribution.surveys["ztf"], night_dataset["train"]
    assert recorded.alerts == len(train)
    assert set(recorded.quantities) == set(QUANTITIES["ztf"]) & set(night_dataset.card.columns)
    bins = recorded.quantities["magpsf"]
    counts, _ = np.histogram(train.metadata(["magpsf"]), [-np.inf, *bins.edges, np.inf])
    assert bins.counts == (*counts.tolist(), 0)


def test_a_network_of_three_classes_is_fitted_and_has_no_threshold(
    config: Callable[..., Fit], alerts_of_the_night: list[SimulatedAlert], night_packets: Path, tmp_path: Path
) -> None:
    table, names = tmp_path / "labels.csv", ("first", "second", "third")
    rows = (f"{alert.alert_id},{names[i % 3]}\n" for i, alert in enumerate(alerts_of_the_night))
    table.write_text("candid,turn\n" + "".join(rows))
    dataset = build_dataset([night_packets], read_labels(table, "turn"), tmp_path / "set")
    wanted = config("three_classes", dataset=dataset.directory)
    fit(wanted)
    card = open_bundle(wanted.out / BUNDLE).parts[0].card
    assert (card.outputs.labels, card.outputs.activation, card.outputs.thresholds) == (names, "softmax", {})
    predictions = parquet.read_table(wanted.out / "predictions.parquet")
    total = sum(predictions[f"probability.{name}"].to_numpy() for name in names)
    assert len(predictions) == len(dataset["test"])
    assert total == pytest.approx(1, abs=1e-5)


def test_the_weights_with_the_lowest_validation_loss_are_served(fitted: Fit) -> None:
    rows = next((fitted.out / "log").rglob("metrics.csv")).read_text().splitlines()
    place = rows[0].split(",").index("val_loss")
    losses = [float(row.split(",")[place]) for row in rows[1:] if row.split(",")[place]]
    evaluation = open_bundle(fitted.out / BUNDLE).parts[0].card.training.evaluation
    assert len(losses) == 3
    assert evaluation["epoch"] == int(np.argmin(losses)) + 1
    assert evaluation["validation_loss"] == pytest.approx(min(losses), abs=1e-5)
    best = read_checkpoint(fitted.out / BEST)["state_dict"]
    calibrated = {"head.5.weight", "head.5.bias"}
    served = weights(fitted)
    assert calibrated < served.keys()
    assert all(torch.equal(served[name], best[f"network.{name}"]) for name in served.keys() - calibrated)
    assert list((fitted.out / "tensorboard").rglob("events.*"))


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_the_served_network_gives_calibrated_probabilities(fitted: Fit, night_dataset: Dataset, engine: str) -> None:
    runtime = Runtime.model_validate({"engine": engine, "device": "cpu", "inference_threads": 1})
    model = open_model(str(fitted.out / BUNDLE), runtime)
    validation = night_dataset["validation"].read()
    served = model.parts[0].run(validation.raw)["probabilities"][:, 0]
    card = model.parts[0].bundle.card
    trained = build_network(card.architecture)
    best = read_checkpoint(fitted.out / BEST)["state_dict"]
    trained.load_state_dict({name.removeprefix("network."): best[name] for name in best if "network." in name})
    inputs = [torch.from_numpy(array) for array in prepare(validation.raw, card.inputs).values()]
    with torch.inference_mode():
        logit = trained.eval()(*inputs)[0][:, 0].double().numpy()
    evaluation = card.training.evaluation
    train = night_dataset["train"].label
    assert evaluation["unweighted_real"] == pytest.approx(np.log((train == 1).sum() / (train == 0).sum()), abs=1e-4)
    unweighted, scale, shift = (
        float(evaluation[name]) for name in ("unweighted_real", "calibration_scale", "calibration_shift_real")
    )
    expected = 1 / (1 + np.exp(-(scale * (logit + unweighted) + shift)))
    assert served == pytest.approx(expected, abs=1e-3)
    assert (
        abs(served.mean() - (validation.label == 1).mean()) < 0.1
    )  # the mean calibrated probability is the fraction of real alerts
    assert (
        (served > card.outputs.thresholds["real"]) == (logit > 0)
    ).mean() > 0.99  # the decisions are those of the network as trained
    assert {"calibration_slope_95", "calibration_intercept_95", "ece_95", "ece_if_calibrated"} <= evaluation.keys()


def test_fit_draws_the_reliability_of_the_validation_alerts_and_the_card_holds_it(
    fitted: Fit, night_dataset: Dataset
) -> None:
    assert "<svg" in (fitted.out / RELIABILITY).read_text()
    evaluation = open_bundle(fitted.out / BUNDLE).parts[0].card.training.evaluation
    bins = [str(text) for name, text in evaluation.items() if name.startswith("reliability_")]
    alerts = sum(int(text.partition(" alerts, predicted ")[0]) for text in bins)
    assert alerts == len(night_dataset["validation"])
    assert all(", observed " in text for text in bins)


def test_a_killed_run_gives_the_same_result(config: Callable[..., Fit], kill_training: Callable[..., None]) -> None:
    """The run is killed after an epoch that is not the best; it must not resume from the best one."""
    # The first epoch has a hundredth of this learning rate; the full rate then makes the network worse.
    recipe = Recipe(epochs=4, warm_up_epochs=1, batch=16, learning_rate=0.3, seed=1)
    whole, killed = config("whole", recipe=recipe), config("killed", recipe=recipe)
    fit(whole)
    kill_training(Learner, lambda learner, i: learner.current_epoch == 2 and i == 1, lambda: fit(killed))
    assert (read_checkpoint(killed.out / BEST)["epoch"], read_checkpoint(killed.out / LAST)["epoch"]) == (0, 1)
    fit(killed)
    for file in (BEST, LAST):
        expected, found = (read_checkpoint(run.out / file) for run in (whole, killed))
        assert found["epoch"] == expected["epoch"]
        assert all(torch.equal(tensor, expected["state_dict"][name]) for name, tensor in found["state_dict"].items())


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_truncated_checkpoint_is_refused(config: Callable[..., Fit], fitted: Fit, share: float) -> None:
    wanted = config(f"half_{share}".replace(".", "_"))
    wanted.out.mkdir()
    whole = (fitted.out / LAST).read_bytes()
    (wanted.out / LAST).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(TrainingError, match=r"last\.ckpt: not a complete checkpoint .* remove it to start again"):
        fit(wanted)


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": Runtime}, tmp_path / "evil.ckpt")
    with pytest.raises(TrainingError, match="not a complete checkpoint"):
        read_checkpoint(tmp_path / "evil.ckpt")


def test_frozen_fusion_trains_the_branches_separately_and_then_only_the_head(config: Callable[..., Fit]) -> None:
    frozen = Architecture(name=TINY.name, arguments={**TINY.arguments, "fusion": "frozen", "metadata_hidden": (8, 4)})
    wanted = config("frozen", architecture=frozen, metadata=("magpsf", "distnr"))
    fit(wanted)
    served = weights(wanted)
    for directory, ours, theirs in (
        ("image_branch", "encoder", "encoder"),
        ("metadata_branch", "metadata_branch", "branch"),
    ):
        branch = read_checkpoint(wanted.out / directory / BEST)["state_dict"]
        names = [name for name in served if name.startswith(f"{ours}.")]
        assert names
        assert all(torch.equal(served[name], branch[f"network.{theirs}{name.removeprefix(ours)}"]) for name in names)
    assert served["head.0.weight"].shape == (16, 8 * 7 * 7 + 4)
    with pytest.raises(TrainingError, match="needs a network with two branches"):
        fit(config("no_metadata", architecture=frozen))


def test_frozen_fusion_that_is_killed_between_branches_gives_the_same_result(
    config: Callable[..., Fit], kill_training: Callable[..., None]
) -> None:
    frozen = Architecture(name=TINY.name, arguments={**TINY.arguments, "fusion": "frozen", "metadata_hidden": (8, 4)})
    of_both = {"architecture": frozen, "metadata": ("magpsf", "distnr")}
    whole, killed = config("whole_fusion", **of_both), config("killed_fusion", **of_both)
    fit(whole)
    kill_training(Learner, lambda learner, _: isinstance(learner.network, MetadataClassifier), lambda: fit(killed))
    fit(killed)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(killed).items())


def test_psf_images_are_seen_in_training_and_in_serving(config: Callable[..., Fit], lsst_dataset: Dataset) -> None:
    wanted = config(
        "psf",
        dataset=lsst_dataset.directory,
        architecture=TIMM,
        images=SNR_IMAGES,
        psf=PSF,
        metadata=("snr",),
    )
    fit(wanted)
    model = open_model(str(wanted.out / BUNDLE), Runtime(engine="onnxruntime", device="cpu", inference_threads=1))
    part = model.parts[0]
    card = part.bundle.card
    assert (card.inputs.psf, card.architecture.arguments["psf"]) == (PSF, 1)
    network = load_network(card.architecture, weights(wanted))
    validation = lsst_dataset["validation"]
    images, metadata, _ = ShownAlerts(validation, card.inputs).__getitems__(range(len(validation)))
    assert images.shape[1:] == (4, 31, 31)
    raw = validation.read().raw
    assert raw.psf is not None
    unknown = replace(raw, psf=np.full_like(raw.psf, np.nan))  # a Gaussian of 5 px takes its place
    served, other = (
        [torch.from_numpy(array) for array in prepare(alerts, card.inputs).values()] for alerts in (raw, unknown)
    )
    with torch.inference_mode():
        (logits, embedding), (_, of_served), (_, of_other) = (
            network(*inputs) for inputs in ((images, metadata), served, other)
        )
    torch.testing.assert_close(embedding, of_served)
    assert part.run(raw)["probabilities"] == pytest.approx(logits.sigmoid().numpy(), abs=1e-5)
    assert (of_other - of_served).abs().max() > 100 * (embedding - of_served).abs().max()


def test_a_network_without_metadata_takes_psf_images_after_the_cutouts() -> None:
    network = build_network(Architecture(name="timm", arguments={**TIMM.arguments, "psf": 2})).eval()
    cutouts, psf = torch.rand(2, 3, 31, 31), torch.rand(2, 2, 31, 31)
    with torch.inference_mode():
        together, apart = network(torch.cat([cutouts, psf], dim=1))[0], network(cutouts, psf)[0]
    torch.testing.assert_close(together, apart)


def test_an_epoch_with_too_small_an_improvement_is_not_kept(config: Callable[..., Fit]) -> None:
    """BTSbot's code requires an improvement of 0.5 %; this test requires one of nearly the whole loss."""
    recipe = Recipe(epochs=6, warm_up_epochs=1, batch=16, learning_rate=3e-3, seed=1, patience=2, least_improvement=0.9)
    wanted = config("patient", recipe=recipe)
    fit(wanted)
    rows = next((wanted.out / "log").rglob("metrics.csv")).read_text().splitlines()
    place = rows[0].split(",").index("val_loss")
    losses = [float(row.split(",")[place]) for row in rows[1:] if row.split(",")[place]]
    evaluation = open_bundle(wanted.out / BUNDLE).parts[0].card.training.evaluation
    assert evaluation["epoch"] == 1
    assert evaluation["validation_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert len(losses) == 3  # the first epoch and two epochs without an improvement


def test_alerts_with_corrupt_cutouts_are_dropped_on_request(
    night_packets: Path, night_labels: Labels, tmp_path: Path
) -> None:
    dataset = build_dataset([night_packets], night_labels, tmp_path / "set")
    view = dataset["train"]
    assert not corrupt(view).any()
    shard = dataset._arrays[0]  # change the pixels in memory instead of in a file
    cutouts = shard["cutouts"].copy()
    blank, infinite, half, nan = view.rows[:4].tolist()
    cutouts[blank, 1] = 0
    cutouts[infinite, 0] = np.inf
    cutouts[half, 2, :20] = np.inf  # its median is finite
    cutouts[nan, 0] = np.nan
    dataset._arrays[0] = {**shard, "cutouts": cutouts}
    assert np.flatnonzero(corrupt(view)).tolist() == [0, 1, 3]


def test_frozen_branches_are_in_training_mode_on_request() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    classifier = Classifier(network, Recipe(), torch.ones(2), [network[0], network[1]], "training").train()
    before = network[0].weight.clone()
    network(torch.randn(20, 3) + 5).sum().backward()
    assert network[1].training
    assert (network[0].running_mean > 0.1).all()
    assert network[0].weight.grad is None
    assert torch.equal(network[0].weight, before)
    assert not classifier.eval().network[1].training


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch warns about the kernel of size 0
def test_wrong_configurations_are_refused(config: Callable[..., Fit], fitted: Fit, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="was started with another configuration"):
        fit(fitted.model_copy(update={"recipe": Recipe(epochs=4)}))
    with pytest.raises(DatasetError, match="the metadata columns nonsense are missing"):
        fit(config("columns", metadata=("nonsense",)))
    with pytest.raises(DatasetError, match="its cutouts have 63 px, but the network takes 64"):
        fit(config("large", images=PUBLISHED_IMAGES.model_copy(update={"size": 64})))
    with pytest.raises(TrainingError, match="no training alert has a value of reliability"):
        fit(config("empty", metadata=("reliability",)))
    with pytest.raises(TrainingError, match=r"'vgg6' takes no metadata: omit `metadata`, or choose one of .*timm"):
        fit(config("vgg6", architecture=Architecture(name="vgg6"), metadata=("magpsf",)))
    with pytest.raises(TrainingError, match="'btsbot_cnn' takes no psf: omit `psf`, or choose one of timm"):
        fit(config("no_psf_here", images=SNR_IMAGES, psf=PSF))
    with pytest.raises(TrainingError, match="'acai' cannot be fitted to labels: choose one of btsbot_cnn"):
        fit(config("acai", architecture=Architecture(name="acai"), metadata=("magpsf",)))
    with pytest.raises(BundleError, match="'vgg6' does not take depth: its arguments are labels"):
        fit(config("depth", architecture=Architecture(name="vgg6", arguments={"depth": 3})))
    with pytest.raises(BundleError, match=r"'btsbot_cnn' does not take .*: float division by zero"):
        fit(config("kernel", architecture=Architecture(name="btsbot_cnn", arguments={"kernel": 0})))
    with pytest.raises(TrainingError, match=r"hardware: 999 devices on a CPU mean 999 processes"):
        fit(config("devices").model_copy(update={"hardware": Hardware(accelerator="cpu", devices=999)}))
    narrow = PUBLISHED_IMAGES.model_copy(update={"size": 31})
    two = PUBLISHED_IMAGES.model_copy(update={"order": ("science", "difference")})
    for name, changes in (("narrow", {"images": narrow}), ("two", {"images": two})):
        with pytest.raises(TrainingError, match=r"cannot take images \(\d, \d\d, \d\d\): ") as refused:
            fit(config(name, **changes))
        assert "\n" not in str(refused.value)
    file = tmp_path / "fit.yaml"
    file.write_text("name: x\nepochs: 3\nrecipe: {warm_up_epochs: 30}\n")
    with pytest.raises(
        TrainingError,
        match=r"dataset: Field required.*warm_up_epochs \(30\) must be fewer than epochs \(25\).*epochs: Extra inputs",
    ):
        read_configuration(Fit, file)
    for changes, problem in (
        ({"psf": PSF}, r"psf\.size \(31\) must be images\.size \(63\)"),
        ({"psf": PSF, "images": SNR_IMAGES, "encoder": {"regimen": "x", "source": "y"}}, "psf cannot be used with enc"),
    ):
        with pytest.raises(ValidationError, match=problem):
            config("psf", **changes)
    file.write_text("recipe: {betas: [0.9, 1]}\nhardware: {devices: 0}\n")
    with pytest.raises(TrainingError, match=r"recipe\.betas\.1: .*less than 1; hardware\.devices\..*greater than 0"):
        read_configuration(Fit, file)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error(config: Callable[..., Fit]) -> None:
    wanted = config("gpu").model_copy(update={"hardware": Hardware(accelerator="gpu", devices=2)})
    with pytest.raises(TrainingError, match="hardware: No supported gpu backend found"):
        fit(wanted)


def test_a_configuration_that_failed_before_training_can_be_corrected_in_place(config: Callable[..., Fit]) -> None:
    wrong, right = config("mended", metadata=("nonsense",)), config("mended", metadata=("magpsf",))
    with pytest.raises(DatasetError, match="the metadata columns nonsense are missing"):
        fit(wrong)
    fit(right)
    with pytest.raises(TrainingError, match="was started with another configuration"):
        fit(wrong)


def test_a_diverged_run_is_an_error(config: Callable[..., Fit]) -> None:
    recipe = Recipe(epochs=2, warm_up_epochs=0, batch=16, learning_rate=1e30)
    with pytest.raises(TrainingError, match="validation loss was NaN or infinite in every epoch; try a lower"):
        fit(config("diverged", recipe=recipe))


def test_rotations_and_flips_only_permute_pixels() -> None:
    torch.manual_seed(0)
    image = torch.arange(2 * 5 * 5, dtype=torch.float32).reshape(1, 2, 5, 5)
    oriented = orient(image.expand(400, 2, 5, 5))
    kinds = {tuple(one.flatten().tolist()) for one in oriented}
    assert len(kinds) == 8
    assert tuple(image.flatten().tolist()) in kinds
    assert all(torch.equal(one.sort().values, image.flatten().sort().values) for one in oriented.flatten(1)[:20])


def test_balanced_classes_have_the_same_total_weight() -> None:
    label = np.array([0] * 30 + [1] * 10)
    weight = class_weights(label, 2, balance=True)
    assert float(weight[0] * 30) == pytest.approx(float(weight[1] * 10))
    assert class_weights(label, 2, balance=False).tolist() == [1, 1]
    logits = nn.Linear(1, 1)
    loss = Classifier(logits, Recipe(), weight).loss
    assert float(loss.pos_weight) == pytest.approx(3)


def test_frozen_modules_keep_their_weights_and_statistics() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    classifier = Classifier(network, Recipe(), torch.ones(2), frozen=[network[0]]).train()
    network(torch.randn(20, 3) + 5).sum().backward()
    assert network[0].running_mean.tolist() == [0, 0, 0]
    assert network[0].weight.grad is None
    assert network[1].weight.grad is not None
    assert classifier.training
