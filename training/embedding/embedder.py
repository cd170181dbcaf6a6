"""Training of the alert embedder by contrastive learning between its modalities. Needs no labels.

The trunk is frozen, so its features are computed once for every symmetry of each alert's images. A batch holds alerts
of one survey only: the network must distinguish alerts, not telescopes. The same alerts and recipe give the same
network.
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
from broker_filter.scoring.networks.alert_embedder import MODALITIES, AlertEmbedder, JoinedModalities, projection
from broker_filter.scoring.preprocess import prepare
from training.astrom3.model.galspecnet import GalSpecNet, GalSpecNetArguments
from training.bundles.distil import schedule
from training.checkpoint import Checkpoint, Part
from training.embedding.contrast import Contrast
from training.learner import SYMMETRIES

AT_ONCE = 64
"""Number of alerts that the trunk takes at a time."""
LOG_EVERY = 100
CHECKPOINT_EVERY = 50
"""Number of steps between checkpoints, about ten seconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of the embedder's training, chosen by cross-validation on training objects."""

    steps: int = 600
    seed: int = 1
    batch: int = 192
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.05
    """Fraction of the steps in which the learning rate rises linearly to its peak, before a cosine decay."""
    lost_columns: float = 0.15
    """Fraction of the metadata values that are masked in a view."""
    longest_gradient: float = 1.0


@dataclass(frozen=True, slots=True)
class Shown:
    """N preprocessed alerts, with the trunk's features in place of the images, and spectra if there are any."""

    features: Tensor  # [N, SYMMETRIES, T]; NaN for alerts without images, which only training may have
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
    """The three random number generators of a training: for alerts, for augmentation, and torch's own for dropout."""

    def __init__(self, seed: int) -> None:
        self.alerts = np.random.default_rng(seed)
        self.views = Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators for a checkpoint."""
        alerts = json.dumps(self.alerts.bit_generator.state)
        return {"alerts": alerts, "views": self.views.get_state(), "dropout": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore the states that `state_dict` returned."""
        self.alerts.bit_generator.state = json.loads(state_dict["alerts"])
        self.views.set_state(state_dict["views"])
        torch.set_rng_state(state_dict["dropout"])


class SpectrumEncoder(nn.Module):
    """An encoder of spectra [N, 3, S] into vectors [N, size] in the embedder's space.

    It is AstroM3's network. It only supports the training of the other modalities and is not served, because alerts
    contain no spectra.
    """

    def __init__(self, size: int, hidden: int = 128) -> None:
        super().__init__()
        arguments = GalSpecNetArguments()
        self.encoder = GalSpecNet(arguments)
        self.projection = projection(arguments.features, hidden, size)

    def forward(self, spectra: Tensor) -> Tensor:
        """Return vectors float32[N, size] of length 1, or 0 where a spectrum [N, 3, S] contains NaN."""
        there = spectra.isfinite().all(dim=2).all(dim=1)
        vectors = normalize(self.projection(self.encoder(spectra.nan_to_num(0.0))), dim=1)
        return vectors * there.unsqueeze(1)


def show(network: AlertEmbedder, alerts: RawAlerts, inputs: Inputs, symmetries: int = SYMMETRIES) -> Shown:
    """Return the preprocessed alerts and the trunk's features for `symmetries` orientations.

    Both are computed as in serving.
    """
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
    network: JoinedModalities,
    groups: Sequence[tuple[Shown, float]],
    recipe: Recipe,
    spectrum: SpectrumEncoder | None = None,
    checkpoint: Path | None = None,
    of: str = "",
) -> None:
    """Train all parameters of `network` except the trunk's, in place.

    `groups`: alerts of one survey each, with their share of the batches; `spectrum`: trained as well if alerts have
    spectra. `checkpoint`: a file to save progress in, and to resume from if it exists; `of`: a text that identifies the
    alerts, so that a checkpoint of other alerts is refused.

    The caller seeds torch before making the network, whose initial parameters are kept. Raises TrainingError if the
    checkpoint is incomplete, or of another training.
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


def embed(network: JoinedModalities, alerts: Shown) -> Tensor:
    """Return the modalities [N, M, size] of unmodified alerts."""
    with torch.inference_mode():
        return network.see(alerts.features[:, 0], alerts.metadata, alerts.light_curve, alerts.light_curve_mask)


def _see(
    network: JoinedModalities, spectrum: SpectrumEncoder | None, alerts: Shown, recipe: Recipe, generator: Generator
) -> Tensor:
    """Return an augmented view of the alerts in every modality, [N, M, size].

    Images are rotated, metadata columns are masked, and points of light curves are dropped.
    """
    n = len(alerts)
    symmetry = torch.randint(alerts.features.shape[1], (n,), generator=generator)
    features = alerts.features[torch.arange(n), symmetry]
    lost = torch.rand(alerts.metadata.shape, generator=generator) < recipe.lost_columns
    metadata = alerts.metadata.masked_fill(lost, NO_VALUE)
    mask = _forget(alerts.light_curve_mask, generator)
    pictured = features.isfinite().all(1)
    vectors = network.see(features.nan_to_num(0.0), metadata, alerts.light_curve, mask)
    vectors = torch.cat([vectors[:, :1] * pictured[:, None, None], vectors[:, 1:]], dim=1)
    if spectrum is None:
        return vectors
    assert alerts.spectra is not None
    return torch.cat([vectors, spectrum(alerts.spectra).unsqueeze(1)], dim=1)


def _forget(mask: Tensor, generator: Generator) -> Tensor:
    """Drop a random fraction (0 to 1) of the points in each mask [N, L].

    The last point, which is the alert itself, is always kept.
    """
    left = torch.rand(mask.shape, generator=generator) < torch.rand(len(mask), 1, generator=generator)
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)
    return mask * (left | last)
