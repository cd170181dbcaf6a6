"""The alert embedder in training: what it is shown, and how its modalities are joined. Needs no labels.

The trunk stays as it is, so its features are computed once, of every symmetry of each alert's images. Surveys are never
mixed in a batch: what is to be told apart are alerts, not telescopes. The same alerts and recipe give the same network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import Inputs
from broker_filter.scoring.networks.alert_embedder import MODALITIES, AlertEmbedder, projection
from broker_filter.scoring.preprocess import prepare
from training.astrom3.model.galspecnet import GalSpecNet, GalSpecNetArguments
from training.bundles.distil import schedule
from training.checkpoint import Checkpoint, Part
from training.embedding.contrast import Contrast
from training.learner import SYMMETRIES

AT_ONCE = 64
"""Alerts to a run of the trunk."""
LOG_EVERY = 100
CHECKPOINT_EVERY = 50
"""Steps: some ten seconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What the embedder is trained with. Chosen by cross-validation on objects that it is trained on."""

    steps: int = 600
    seed: int = 1
    batch: int = 192
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.05
    """Share of the steps in which the learning rate rises to its peak; then it falls as a cosine."""
    lost_columns: float = 0.15
    """Share of the metadata that a view is not shown."""
    longest_gradient: float = 1.0


@dataclass(frozen=True, slots=True)
class Shown:
    """N alerts as the embedder takes them, the trunk's features in the place of images, and spectra where there are."""

    features: Tensor  # [N, SYMMETRIES, T]
    metadata: Tensor  # [N, F]
    light_curve: Tensor  # [N, L, LIGHT_CURVE_FEATURES]
    light_curve_mask: Tensor  # [N, L]
    spectra: Tensor | None = None  # [N, 3, S] as `astrom3.preprocess` makes them, NaN where an alert has none

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Shown:
        chosen = torch.from_numpy(np.flatnonzero(rows) if rows.dtype == bool else rows)
        spectra = None if self.spectra is None else self.spectra[chosen]
        return Shown(
            self.features[chosen],
            self.metadata[chosen],
            self.light_curve[chosen],
            self.light_curve_mask[chosen],
            spectra,
        )


class Draws:
    """The random numbers of a training: which alerts are shown, how they are turned and what they lose, and dropout's,
    which torch keeps itself."""

    def __init__(self, seed: int) -> None:
        self.alerts = np.random.default_rng(seed)
        self.views = Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        alerts = json.dumps(self.alerts.bit_generator.state)
        return {"alerts": alerts, "views": self.views.get_state(), "dropout": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Goes on where `state_dict` was taken."""
        self.alerts.bit_generator.state = json.loads(state_dict["alerts"])
        self.views.set_state(state_dict["views"])
        torch.set_rng_state(state_dict["dropout"])


class SpectrumEncoder(nn.Module):
    """Spectra [N, 3, S], NaN where there is none -> vectors of length 1 in the embedder's space, or 0, [N, size].

    AstroM3's network. It teaches the other modalities and is not served: alerts bring no spectra.
    """

    def __init__(self, size: int, hidden: int = 128) -> None:
        super().__init__()
        arguments = GalSpecNetArguments()
        self.encoder = GalSpecNet(arguments)
        self.projection = projection(arguments.features, hidden, size)

    def forward(self, spectra: Tensor) -> Tensor:
        """See the class."""
        there = spectra.isfinite().all(dim=2).all(dim=1)
        vectors = normalize(self.projection(self.encoder(spectra.nan_to_num(0.0))), dim=1)
        return vectors * there.unsqueeze(1)


def show(network: AlertEmbedder, alerts: RawAlerts, inputs: Inputs, symmetries: int = SYMMETRIES) -> Shown:
    """The alerts as the network takes them: through the preprocessing and the trunk that are served."""
    prepared = {name: torch.from_numpy(array) for name, array in prepare(alerts, inputs).items()}
    images, trunk = prepared["images"], network.trunk.eval()
    features = []
    with torch.inference_mode():
        for k in range(symmetries):
            turned = torch.rot90(images, k % 4, (-2, -1))
            oriented = turned.flip(-1) if k >= SYMMETRIES // 2 else turned
            chunks = [oriented[start : start + AT_ONCE] for start in range(0, len(oriented), AT_ONCE)]
            features.append(torch.cat([trunk(chunk)[1] for chunk in chunks]))
    return Shown(torch.stack(features, 1), prepared["metadata"], prepared["light_curve"], prepared["light_curve_mask"])


def train(
    network: AlertEmbedder,
    groups: Sequence[tuple[Shown, float]],
    recipe: Recipe,
    spectrum: SpectrumEncoder | None = None,
    checkpoint: Path | None = None,
    of: str = "",
) -> None:
    """Trains all of `network` but its trunk. `groups`: alerts of a survey each, and their share of the batches;
    `spectrum` joins in where alerts have spectra. `checkpoint`: a file to save progress in, and to continue from where
    it exists; `of` says what the alerts are, so that a file of others is refused.

    Its parameters are as they were made: seed torch before making it. Raises TrainingError where the checkpoint is not
    whole, or of another training.
    """
    network.features.fit(torch.cat([group.features.flatten(0, 1) for group, _ in groups]))
    network.metadata.fit(torch.cat([group.metadata for group, _ in groups]))
    network.train()
    network.trunk.requires_grad_(False).eval()
    contrast = Contrast(len(MODALITIES) + (spectrum is not None))
    modules: list[nn.Module] = [network, *([spectrum] if spectrum else [])]
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=recipe.weight_decay)
    optimizer.add_param_group({"params": list(contrast.parameters()), "weight_decay": 0.0})
    chance = np.array([share for _, share in groups]) / sum(share for _, share in groups)
    draws = Draws(recipe.seed)
    parts: dict[str, Part] = {"network": network, "contrast": contrast, "optimizer": optimizer, "draws": draws}
    parts |= {"spectrum": spectrum} if spectrum else {}
    progress = Checkpoint(checkpoint, f"{recipe} {of}", CHECKPOINT_EVERY, parts)
    for step in range(progress.resume(), recipe.steps):
        group = groups[draws.alerts.choice(len(groups), p=chance)][0]
        alerts = group[draws.alerts.choice(len(group), min(recipe.batch, len(group)), replace=False)]
        loss = contrast(_see(network, spectrum, alerts, recipe, draws.views))
        for parameters in optimizer.param_groups:
            parameters["lr"] = recipe.learning_rate * schedule(step / recipe.steps, recipe.warm_up)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.longest_gradient)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0:
            log.info("step %d of %d: loss %.3f", step + 1, recipe.steps, loss.item())
        progress.passed(step + 1, recipe.steps)
    network.eval()


def embed(network: AlertEmbedder, alerts: Shown) -> Tensor:
    """The modalities [N, M, size] of the alerts as they are."""
    with torch.inference_mode():
        return network.see(alerts.features[:, 0], alerts.metadata, alerts.light_curve, alerts.light_curve_mask)


def _see(
    network: AlertEmbedder, spectrum: SpectrumEncoder | None, alerts: Shown, recipe: Recipe, generator: Generator
) -> Tensor:
    """A view of the alerts in every modality, [N, M, size]: turned, some columns lost, some points forgotten."""
    n = len(alerts)
    symmetry = torch.randint(alerts.features.shape[1], (n,), generator=generator)
    features = alerts.features[torch.arange(n), symmetry]
    lost = torch.rand(alerts.metadata.shape, generator=generator) < recipe.lost_columns
    metadata = alerts.metadata.masked_fill(lost, NO_VALUE)
    mask = _forget(alerts.light_curve_mask, generator)
    vectors = network.see(features, metadata, alerts.light_curve, mask)
    if spectrum is None:
        return vectors
    assert alerts.spectra is not None
    return torch.cat([vectors, spectrum(alerts.spectra).unsqueeze(1)], dim=1)


def _forget(mask: Tensor, generator: Generator) -> Tensor:
    """Masks [N, L] with a random share of the points left, none to all; the alert's own, the last, always is."""
    left = torch.rand(mask.shape, generator=generator) < torch.rand(len(mask), 1, generator=generator)
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)
    return mask * (left | last)
