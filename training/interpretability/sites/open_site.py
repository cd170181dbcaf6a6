"""The sites of a network: which attention layers can be opened, and opening one."""

from __future__ import annotations

from torch import nn

from broker_filter.scoring.networks.alert_embedder import AlertEmbedder
from broker_filter.scoring.networks.fusion import FusionNetwork
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder
from training.astrom3.model.informer import PhotometryClassifier
from training.astrom3.model.network import AstroM3Classifier
from training.errors import LensError
from training.interpretability.sites.attention import TOKEN, Attention, Box, Site
from training.interpretability.sites.cells import CellSite, cell_sites
from training.interpretability.sites.informer import InformerSite, informer_sites
from training.interpretability.sites.light_curve import LightCurveSite, light_curve_sites

__all__ = ["TOKEN", "Attention", "Box", "CellSite", "InformerSite", "LightCurveSite", "Site", "open_site", "site_names"]


def site_names(network: nn.Module) -> list[str]:
    """Return the names of the network's sites, from the input on; none for a network without attention."""
    if isinstance(network, AlertEmbedder | SnrEmbedder):
        return light_curve_sites(network)
    if isinstance(network, PhotometryClassifier | AstroM3Classifier):
        return informer_sites(network)
    return cell_sites(network) if isinstance(network, FusionNetwork) else []


def open_site(network: nn.Module, name: str) -> Site:
    """Return a site of the network.

    Raises LensError if the network has no attention, or no site of that name.
    """
    names = site_names(network)
    if not names:
        raise LensError(
            f"{type(network).__name__} has no attention layer that can be opened: choose a bundle with a light-curve "
            "transformer or with an attention image network"
        )
    if name not in names:
        raise LensError(f"{type(network).__name__} has no site {name!r}; its sites are {', '.join(names)}")
    if isinstance(network, AlertEmbedder | SnrEmbedder):
        return LightCurveSite(network, name)
    if isinstance(network, PhotometryClassifier | AstroM3Classifier):
        return InformerSite(network, name)
    assert isinstance(network, FusionNetwork)
    return CellSite(network, name)
