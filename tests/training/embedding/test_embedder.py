"""Training of the embedder: modalities identify each other even if some are missing, and inputs are those of
serving."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.bundle import LIGHT_CURVE_FEATURES, ImageInput, Inputs, LightCurveInput, MetadataColumn
from broker_filter.scoring.networks.alert_embedder import AlertEmbedder
from broker_filter.scoring.preprocess import prepare
from training.astrom3.model.preprocess import WAVELENGTHS
from training.embedding.embedder import Recipe, Shown, SpectrumEncoder, embed, show, train
from training.errors import TrainingError
from training.evaluation.served_speed import noise

ALERTS, POINTS, COLUMNS, SIZE = 300, 6, 5, 16
TRAINED = np.arange(ALERTS) < 200


def make_embedder() -> AlertEmbedder:
    torch.manual_seed(5)
    return AlertEmbedder("stampnet", COLUMNS, SIZE, width=16, layers=1, hidden=32)


@pytest.fixture
def shown() -> Shown:
    """Alerts of three hidden numbers, which every modality encodes differently; some alerts lack a modality."""
    draw = torch.Generator().manual_seed(6)
    truth = torch.randn(ALERTS, 3, generator=draw)

    def seen_as(*shape: int) -> Tensor:
        made: Tensor = (truth @ torch.randn(3, int(np.prod(shape)), generator=draw)).reshape(ALERTS, *shape)
        return made + 0.1 * torch.randn(made.shape, generator=draw)

    mask = (torch.arange(POINTS) < torch.randint(POINTS + 1, (ALERTS, 1), generator=draw)).float()
    metadata = seen_as(COLUMNS)
    metadata[::10] = NO_VALUE
    return Shown(
        features=seen_as(8, AlertEmbedder("stampnet", COLUMNS).trunk.features),
        metadata=metadata,
        light_curve=seen_as(POINTS, LIGHT_CURVE_FEATURES) * mask.unsqueeze(2),
        light_curve_mask=mask,
    )


def found(vectors: Tensor, i: int, j: int) -> float:
    """Return the fraction of alerts whose modality i is closer to their own modality j than to 90 % of the others."""
    both = vectors[~TRAINED][(vectors[~TRAINED][:, [i, j]] != 0).any(2).all(1)]
    cosine = both[:, i] @ both[:, j].T
    return float(((cosine > cosine.diagonal()[:, None]).float().mean(1) < 0.1).float().mean())


def test_modalities_of_held_out_alerts_identify_each_other(shown: Shown) -> None:
    network = make_embedder()
    before = embed(network.eval(), shown)
    trunk = {name: tensor.clone() for name, tensor in network.trunk.state_dict().items()}
    train(network, [(shown[TRAINED], 1.0)], Recipe(steps=150, batch=64))
    after = embed(network, shown)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert found(after, i, j) > max(0.5, 2 * found(before, i, j))
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in network.trunk.state_dict().items())
    lacks_metadata = (shown.metadata == NO_VALUE).all(1)
    assert (after[lacks_metadata, 2] == 0).all()


def test_the_same_seed_gives_the_same_network(shown: Shown) -> None:
    vectors = []
    for _ in range(2):
        network = make_embedder()
        train(network, [(shown[TRAINED], 0.7), (shown[~TRAINED], 0.3)], Recipe(steps=5, batch=32))
        vectors.append(embed(network, shown))
    assert torch.equal(*vectors)


def test_spectra_are_trained_if_there_are_any(shown: Shown) -> None:
    """One alert in three has a spectrum: these train the spectrum encoder, and all alerts train the rest."""
    spectra = torch.full((ALERTS, 3, len(WAVELENGTHS)), torch.nan)
    spectra[::3] = torch.randn(len(spectra[::3]), 3, 1) * torch.ones(len(WAVELENGTHS))
    with_spectra = Shown(shown.features, shown.metadata, shown.light_curve, shown.light_curve_mask, spectra)
    torch.manual_seed(7)
    spectrum = SpectrumEncoder(SIZE)
    begun = [parameter.clone() for parameter in spectrum.parameters()]
    network = make_embedder()
    train(network, [(with_spectra[TRAINED], 1.0)], Recipe(steps=3, batch=24), spectrum)
    assert all(not torch.equal(*pair) for pair in zip(begun, spectrum.parameters(), strict=True))
    with torch.inference_mode():
        vectors = spectrum.eval()(spectra[:6])
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0, 0, 0, 1, 0, 0]))
    assert embed(network, shown).isfinite().all()


def test_training_inputs_are_those_of_serving() -> None:
    """Precomputed features of the trunk give the outputs of the whole network, for rotated images as well."""
    network, n = make_embedder().eval(), 5
    inputs = Inputs(
        images=ImageInput(size=63, order=("science", "template", "difference"), normalisation="l2_row", padding=0),
        metadata=tuple(MetadataColumn(name=f"column{i}", fill=NO_VALUE) for i in range(COLUMNS)),
        light_curve=LightCurveInput(points=POINTS, flux_scale=100, time_scale=1),
    )
    alerts = noise(n, inputs)
    alerts.metadata[1, 2] = np.nan
    shown = show(network, alerts, inputs)
    assert shown.features.shape[:2] == (n, 8)
    with torch.inference_mode():
        for symmetry, turned in ((0, alerts.cutouts), (2, alerts.cutouts[..., ::-1, ::-1])):
            prepared = prepare(replace(alerts, cutouts=np.ascontiguousarray(turned)), inputs)
            _, _, expected = network(*map(torch.from_numpy, prepared.values()))
            features = shown.features[:, symmetry]
            found = network.see(features, shown.metadata, shown.light_curve, shown.light_curve_mask)
            torch.testing.assert_close(found, expected, atol=1e-4 if symmetry else 1e-6, rtol=1e-5)


class Stopping(Shown):
    """Alerts that raise KeyboardInterrupt in the fourth batch."""

    asked = 0

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Shown:
        Stopping.asked += 1
        if Stopping.asked == 4:
            raise KeyboardInterrupt
        return super().__getitem__(rows)


@pytest.mark.parametrize("with_spectra", [False, True])
def test_an_interrupted_training_gives_the_same_result(
    shown: Shown, with_spectra: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.embedding.embedder.CHECKPOINT_EVERY", 2)
    recipe = Recipe(steps=5, batch=4)
    if with_spectra:
        shown = replace(shown, spectra=torch.randn(ALERTS, 3, len(WAVELENGTHS)))

    def trained(alerts: Shown, checkpoint: Path | None) -> dict[str, Tensor]:
        network = make_embedder()
        spectrum = SpectrumEncoder(SIZE) if with_spectra else None  # its dropout draws random numbers as well
        train(network, [(alerts, 1.0)], recipe, spectrum, checkpoint, of="these")
        return network.state_dict()

    whole = trained(shown, None)
    checkpoint = tmp_path / "last.ckpt"
    monkeypatch.setattr(Stopping, "asked", 0)
    stopping = Stopping(**{field.name: getattr(shown, field.name) for field in fields(shown)})
    with pytest.raises(KeyboardInterrupt):
        trained(stopping, checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    torch.manual_seed(99)  # another process starts with other random numbers
    resumed = trained(shown, checkpoint)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    with pytest.raises(TrainingError, match="belongs to a training with other arguments"):
        train(make_embedder(), [(shown, 1.0)], recipe, None, checkpoint, of="others")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(TrainingError, match="not a complete checkpoint: remove it to start again"):
        train(make_embedder(), [(shown, 1.0)], recipe, None, checkpoint, of="these")
