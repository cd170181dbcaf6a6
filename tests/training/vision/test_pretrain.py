"""Pre-training: galaxies and their answers, an encoder that learns them, and a fit that starts from it."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("galsim", reason="simulated galaxies need the extra `demo`")
pytest.importorskip("timm", reason="timm's networks need the extra `train`")

import training.vision.pretrain
from broker_filter.importers.encoders import load_encoder_weights
from broker_filter.importers.weights import WeightsError
from broker_filter.scoring.bundle import Architecture, open_bundle
from broker_filter.scoring.networks import build_network
from broker_filter.simulate import REAL
from training.data.datasets import Dataset
from training.data.simulated import KINDS
from training.errors import DatasetError, TrainingError
from training.recipe import (
    ENCODER_CARD,
    ENCODER_WEIGHTS,
    PUBLISHED_IMAGES,
    Encoder,
    Fit,
    Hardware,
    Optimisation,
    Recipe,
    read_configuration,
)
from training.vision.fit import BUNDLE, fit
from training.vision.galaxies import (
    GALAXY_ZOO_1,
    QUESTIONS,
    AnsweredImages,
    equal,
    read_galaxies,
    read_galaxy_zoo_1,
    simulate_galaxies,
)
from training.vision.pretrain import (
    GalaxyZoo,
    GalaxyZoo1,
    MorphologyLearner,
    Pretraining,
    Simulated,
    SimulatedAlerts,
    combine,
    pretrain,
)
from training.vision.simulated_alerts import simulate_alerts

RECIPES = Path(training.vision.pretrain.__file__).with_name("studies")
TINY = Architecture(name="btsbot_cnn", arguments={"channels": (4, 8), "kernel": 3, "hidden": (16, 8)})
TIMM = Architecture(name="timm", arguments={"backbone": "test_convnext"})
ONE_CORE = Hardware(accelerator="cpu", devices=1, threads=1)


@pytest.fixture(scope="module")
def galaxies() -> AnsweredImages:
    return simulate_galaxies(40, seed=3)


@pytest.fixture
def galaxy_zoo(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of three images, and a table in Galaxy Zoo's format that lists them and a missing one."""
    for i in range(3):
        Image.fromarray(np.full((128, 128, 3), (60 * i, 100, 200), np.uint8)).save(tmp_path / f"{i}.png")
    rows = [f"elsewhere/{i}.png,{0.1 * i},{'' if i == 1 else 0.5},1" for i in range(4)]
    table = tmp_path / "galaxies.csv"
    table.write_text("\n".join(["file_loc,edge-on_yes_fraction,spiral_yes_fraction,ring", *rows]))
    return tmp_path, table


def test_simulated_galaxies_agree_with_their_answers(galaxies: AnsweredImages) -> None:
    """Extended galaxies are wider, edge-on ones flatter; a seed gives the same galaxies for any number."""
    answers = dict(zip(galaxies.questions, galaxies.answers.T, strict=True))
    y, x = np.mgrid[-31:32, -31:32]
    light = np.clip(galaxies.images[:, 0], 0, None) * (np.hypot(x, y) < 15)
    total = light.sum(axis=(1, 2))
    width = np.sqrt((light * (x**2 + y**2)).sum(axis=(1, 2)) / total)
    alone = answers["companion"] == 0
    assert np.corrcoef(width[alone], answers["extended"][alone])[0, 1] > 0.3
    xx, yy, xy = ((light * moment).sum(axis=(1, 2)) / total for moment in (x * x, y * y, x * y))
    flattening = np.hypot(xx - yy, 2 * xy) / (xx + yy)
    discs = alone & (answers["bulge"] < 0.5) & (answers["extended"] > 0.4)
    assert np.corrcoef(flattening[discs], answers["edge_on"][discs])[0, 1] > 0.3
    assert galaxies.questions == QUESTIONS
    assert np.array_equal(simulate_galaxies(3, seed=3).images, galaxies.images[:3])


def test_format_of_galaxy_zoo_is_read(galaxy_zoo: tuple[Path, Path]) -> None:
    found = read_galaxies(*galaxy_zoo, size=21)
    assert found.questions == ("edge-on_yes_fraction", "spiral_yes_fraction")
    assert found.images.shape == (3, 3, 21, 21)
    assert found.images[:, 0].mean(axis=(1, 2)).tolist() == [0, 60, 120]
    assert np.allclose(found.answers, [[0, 0.5], [0.1, np.nan], [0.2, 0.5]], equal_nan=True)
    assert read_galaxies(*galaxy_zoo, questions=("ring",)).answers.tolist() == [[1], [1], [1]]


def test_unusable_galaxies_are_refused(galaxy_zoo: tuple[Path, Path]) -> None:
    folder, table = galaxy_zoo
    with pytest.raises(DatasetError, match="no column nonsense"):
        read_galaxies(folder, table, questions=("nonsense",))
    with pytest.raises(DatasetError, match="none of the 4 images"):
        read_galaxies(folder / "nowhere", table)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"1\.png: cannot be read as an image"):
        read_galaxies(folder, table)
    for content, message in (
        ("file_loc,votes_fraction\n0.png,3\n", "vote fractions must be between 0 and 1"),
        ("file_loc,votes_fraction\n0.png,yes\n", "could not convert string to float: 'yes'"),
        ("file_loc,votes_fraction\n0.png,\n", "no available image has an answer of votes_fraction"),
        ("file_loc,votes\n0.png,3\n", "no column of vote fractions"),
        ("file_loc,votes_fraction\n0,0.5\n", "none of the 1 images"),
    ):
        table.write_text(content)
        with pytest.raises(DatasetError, match=message):
            read_galaxies(folder, table)


def test_a_decompression_bomb_is_refused(galaxy_zoo: tuple[Path, Path]) -> None:
    folder, table = galaxy_zoo
    whole = (folder / "0.png").read_bytes()
    header = whole[12:16] + struct.pack(">II", 60_000, 60_000) + whole[24:29]
    (folder / "0.png").write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    with pytest.raises(DatasetError, match=r"0\.png: .*decompression bomb"):
        read_galaxies(folder, table)


@pytest.mark.shared
def test_real_galaxies_are_read(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "galaxies" / "decals_rings_470_jpg128.tar") as archive:
        members = archive.getmembers()[:5]
        archive.extractall(tmp_path, members, filter="data")
    found = read_galaxies(tmp_path, shared_data / "galaxies" / "example_ring_catalog_basic.csv")
    assert len(found) == len([member for member in members if member.isfile()])
    assert len(found.questions) == 3
    assert found.images.std() > 5


@pytest.fixture
def galaxy_zoo_1(tmp_path: Path) -> tuple[Path, Path]:
    """An archive of six images, and the table that gives the classes of five; the fifth image is an error page."""
    names = ("elliptical", "elliptical", "elliptical", "spiral_acw", "elliptical")
    rows = [f"{i},{name},{int(i == 4)}" for i, name in enumerate(names)]
    table = tmp_path / "gz1.csv"
    table.write_text("\n".join(["sdss_objid,class_name,error_image", *rows]))
    archive = tmp_path / "gz1.tar"
    with tarfile.open(archive, "w") as tar:
        for i in range(6):
            add(tar, f"{i}.jpg", jpeg(np.full((128, 128, 3), 40 * i, np.uint8)))
    return archive, table


def jpeg(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "jpeg")
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_classes_of_galaxy_zoo_1_have_the_same_total_weight(galaxy_zoo_1: tuple[Path, Path]) -> None:
    found = read_galaxy_zoo_1(*galaxy_zoo_1, size=21)
    assert found.images.shape == (4, 3, 21, 21)  # neither the error page nor the galaxy without a class
    assert np.allclose(found.images.mean(axis=(1, 2, 3)), [0, 40, 80, 120], atol=1)
    assert found.questions == GALAXY_ZOO_1
    assert found.answers.argmax(axis=1).tolist() == [0, 0, 0, 1]
    assert np.allclose(found.weight, [2 / 3, 2 / 3, 2 / 3, 2])


def test_an_unusable_archive_of_galaxies_is_refused(
    galaxy_zoo_1: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, table = galaxy_zoo_1
    with monkeypatch.context() as patch:
        patch.setattr("training.vision.galaxies.MAX_IMAGE_BYTES", 100)
        with pytest.raises(DatasetError, match=r"0\.jpg: \d+ bytes are too many"):
            read_galaxy_zoo_1(archive, table)
    with tarfile.open(archive, "w") as tar:
        add(tar, "2.jpg", b"<html>no such galaxy</html>")
    with pytest.raises(DatasetError, match=r"gz1\.tar: 2\.jpg: cannot be read as an image"):
        read_galaxy_zoo_1(archive, table)
    archive.write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="cannot be read as a tar archive"):
        read_galaxy_zoo_1(archive, table)
    table.write_text("sdss_objid,class_name,error_image\n1,lenticular,0\n")
    with pytest.raises(DatasetError, match="unknown class 'lenticular'; known classes: dont_know"):
        read_galaxy_zoo_1(archive, table)
    table.write_text("sdss_objid,error_image\n1,0\n")
    with pytest.raises(DatasetError, match="columns sdss_objid, class_name and error_image"):
        read_galaxy_zoo_1(archive, table)


@pytest.mark.shared
def test_the_images_of_galaxy_zoo_1_are_read(shared_data: Path) -> None:
    folder = shared_data / "galaxies"
    found = read_galaxy_zoo_1(folder / "gz1_sdss_6664_jpg128.tar", folder / "gz1_labels.csv", size=15)
    count = dict(zip(GALAXY_ZOO_1, found.answers.sum(axis=0).tolist(), strict=True))
    assert len(found) == 6663  # one is an error page
    assert count["edge_on"] + count["spiral"] + count["merger"] + count["dont_know"] == pytest.approx(2019, abs=1)
    assert np.allclose(found.weight @ found.answers, 6663 / 5)


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_simulated_alerts_are_labelled_by_truth(survey: Literal["ztf", "lsst"]) -> None:
    found = simulate_alerts(40, 3, survey, size=31)
    answers = dict(zip(found.questions, found.answers.T, strict=True))
    assert found.images.shape == (40, 3, 31, 31)
    of_kind = np.stack([answers[f"alert_{kind}"] for kind in KINDS])
    assert (of_kind.sum(axis=0) == 1).all()
    assert (answers["alert_real"] == of_kind[: len(REAL)].sum(axis=0)).all()
    assert 0 < answers["alert_real"].sum() < 40


def test_unanswered_questions_do_not_contribute_to_the_loss(galaxies: AnsweredImages) -> None:
    few = AnsweredImages(
        galaxies.images[:2], galaxies.box[:2], np.array([[1.0], [0.0]], np.float32), ("ring",), "others", equal(2)
    )
    both = combine([galaxies, few])
    assert both.questions == (*QUESTIONS, "ring")
    assert np.isnan(both.answers[:40, 5]).all()
    assert np.isnan(both.answers[40:, :5]).all()
    learner = MorphologyLearner(torch.nn.Flatten(), Optimisation())
    said, nan = torch.tensor([[0.0, 100.0]]), float("nan")
    one = torch.ones(1)
    assert learner.loss_of((said, torch.tensor([[0.5, nan]]), one)).item() == 0
    assert learner.loss_of((said, torch.tensor([[0.0, 1.0]]), one)).item() == pytest.approx(0.125)


def test_an_encoder_learns_and_a_fit_starts_from_it(
    galaxy_zoo: tuple[Path, Path], galaxy_zoo_1: tuple[Path, Path], night_dataset: Dataset, tmp_path: Path
) -> None:
    folder, table = galaxy_zoo
    archive, classes = galaxy_zoo_1
    sources = (
        GalaxyZoo(kind="galaxy_zoo", images=folder, table=table),
        Simulated(kind="simulated", galaxies=40),
        GalaxyZoo1(kind="galaxy_zoo_1", archive=archive, table=classes),
        SimulatedAlerts(kind="simulated_alerts", alerts=30, survey="lsst"),
    )
    recipe = Optimisation(epochs=6, warm_up_epochs=1, batch=8, learning_rate=1e-2, seed=1)
    out = tmp_path / "encoder"
    card = pretrain(
        Pretraining(out=out, architecture=TINY, galaxies=sources, dropout=0.1, recipe=recipe, hardware=ONE_CORE)
    )
    losses = [float(value) for value in (card["validation_loss"], card["baseline_loss"])]
    assert losses[0] < 1.1 * losses[1], losses  # nearly as good as the mean answers
    written = yaml.safe_load((out / ENCODER_CARD).read_text())
    assert "3 real galaxies of galaxies.csv; 40 galaxies simulated with GalSim" in written["galaxies"]
    assert "30 simulated alerts of LSST, labelled by truth" in written["galaxies"]

    source = str(out / ENCODER_WEIGHTS)
    frozen = Recipe(epochs=2, warm_up_epochs=1, batch=16, learning_rate=1e-12, weight_decay=0, seed=1)
    begun = Fit(
        name="begun",
        dataset=night_dataset.directory,
        out=tmp_path / "begun",
        architecture=TINY,
        encoder=Encoder(regimen="galaxies", source=source),
        recipe=frozen,
        hardware=ONE_CORE,
    )
    fit(begun)
    pretrained, served = load_file(source), load_file(tmp_path / "begun" / BUNDLE / "weights.safetensors")
    assert len(pretrained) == 8
    assert all(torch.allclose(served[f"encoder.{name}"], tensor, atol=1e-6) for name, tensor in pretrained.items())
    training = open_bundle(tmp_path / "begun" / BUNDLE).parts[0].card.training
    assert training.evaluation["regimen"] == "galaxies"
    assert "40 galaxies simulated with GalSim" in training.method
    with pytest.raises(WeightsError, match="nowhere"):
        fit(begun.model_copy(update={"encoder": Encoder(regimen="x", source="nowhere"), "out": tmp_path / "lost"}))


def test_a_pretraining_may_begin_with_a_pretrained_encoder(tmp_path: Path) -> None:
    sources = (Simulated(kind="simulated", galaxies=8),)
    first = Pretraining(
        out=tmp_path / "first",
        architecture=TIMM,
        galaxies=sources,
        recipe=Optimisation(epochs=2, warm_up_epochs=1, batch=4, learning_rate=1e-2),
        hardware=ONE_CORE,
    )
    assert pretrain(first)["began_with"] == "random weights"
    source = str(tmp_path / "first" / ENCODER_WEIGHTS)
    hardly = Optimisation(epochs=2, warm_up_epochs=1, batch=4, learning_rate=1e-12, weight_decay=0, seed=9)
    then = {"out": tmp_path / "second", "encoder": Encoder(regimen="galaxies", source=source), "recipe": hardly}
    assert pretrain(first.model_copy(update=then))["began_with"] == "galaxies"
    begun, ended = load_file(source), load_file(tmp_path / "second" / ENCODER_WEIGHTS)
    assert all(torch.allclose(ended[name], tensor, atol=1e-6) for name, tensor in begun.items())
    lost = {"out": tmp_path / "lost", "encoder": Encoder(regimen="x", source="nowhere")}
    with pytest.raises(WeightsError, match="nowhere"):
        pretrain(first.model_copy(update=lost))


def test_a_timm_encoder_is_saved_with_the_names_of_timm(tmp_path: Path) -> None:
    recipe = Optimisation(epochs=2, warm_up_epochs=1, batch=4)
    sources = (Simulated(kind="simulated", galaxies=8),)
    pretrain(Pretraining(out=tmp_path, architecture=TIMM, galaxies=sources, recipe=recipe, hardware=ONE_CORE))
    network = build_network(TIMM)
    load_encoder_weights(network, str(tmp_path / ENCODER_WEIGHTS))
    expected = load_file(tmp_path / ENCODER_WEIGHTS)
    assert {name: tensor.shape for name, tensor in expected.items()} == {
        name: tensor.shape for name, tensor in network.encoder.backbone.state_dict().items()
    }
    assert torch.equal(network.encoder.backbone.stem[0].weight, expected["stem.0.weight"])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*_*_*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_of_the_studies_are_valid(file: Path) -> None:
    architecture = read_configuration(Pretraining, file).architecture
    with torch.device("meta"):
        assert hasattr(build_network(architecture), "encoder")


def test_a_network_without_an_encoder_is_refused(tmp_path: Path) -> None:
    sources = (Simulated(kind="simulated", galaxies=4),)
    assert not hasattr(build_network(Architecture(name="vgg6")), "encoder")
    with pytest.raises(TrainingError, match="'vgg6' has no encoder"):
        pretrain(Pretraining(out=tmp_path / "vgg6", architecture=Architecture(name="vgg6"), galaxies=sources))
    alone = (Simulated(kind="simulated", galaxies=1),)
    with pytest.raises(DatasetError, match="1 galaxy: training and validation need at least one each"):
        pretrain(Pretraining(out=tmp_path / "alone", architecture=TINY, galaxies=alone))
    narrow = PUBLISHED_IMAGES.model_copy(update={"size": 31})
    with pytest.raises(TrainingError, match="cannot take images"):
        pretrain(Pretraining(out=tmp_path / "narrow", architecture=TINY, galaxies=sources, images=narrow))
