"""Network architectures: one self-contained file each, with source and licence in the header.

A network takes its inputs in the order of `Inputs.shapes` (images, metadata, light curve, light-curve mask, PSF images;
those that the card has) and returns logits [N, C] and the embedding [N, D] in one pass. A network that joins M
modalities also returns them, [N, M, D / M]. Importing this package imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from broker_filter.scoring.bundle import Architecture, BundleError, Outputs
from broker_filter.scoring.networks.acai import ACAI
from broker_filter.scoring.networks.alert_embedder import AlertEmbedder
from broker_filter.scoring.networks.btsbot_cnn import btsbot_cnn
from broker_filter.scoring.networks.curve_classes import CurveClasses
from broker_filter.scoring.networks.embedding_head import HEADS
from broker_filter.scoring.networks.fusion import FusionNetwork
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder
from broker_filter.scoring.networks.snrnet import SnrNet
from broker_filter.scoring.networks.snrnet_fused import FusedSnrNet
from broker_filter.scoring.networks.stampnet import StampNet
from broker_filter.scoring.networks.stampnet_classes import StampNetClasses
from broker_filter.scoring.networks.timm_network import timm_network
from broker_filter.scoring.networks.vgg6 import VGG6

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "acai": ACAI,
    "alert_embedder": AlertEmbedder,
    "btsbot_cnn": btsbot_cnn,
    "curve_classes": CurveClasses,
    "snr_embedder": SnrEmbedder,
    "snrnet": SnrNet,
    "stampnet": StampNet,
    "stampnet_classes": StampNetClasses,
    "timm": timm_network,
    "vgg6": VGG6,
    **HEADS,
}
"""Architectures by the name used in cards."""


class ServedNetwork(nn.Module):
    """A network with its activation: returns the outputs of `Outputs.shapes`, in that order."""

    def __init__(self, network: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.network = network
        self.activation = nn.Sigmoid() if outputs.activation == "sigmoid" else nn.Softmax(dim=1)
        self.given = len(outputs.shapes())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take the network's inputs and return the outputs that the card lists."""
        logits, *others = self.network(*inputs)
        return (self.activation(logits), *others)[: self.given]


def for_onnx(network: nn.Module) -> nn.Module:
    """Return the network that is exported as the ONNX graph of `network`.

    It gives equal outputs up to rounding errors, and its graph takes less time on a CPU. For most architectures it is
    the network itself.
    """
    return FusedSnrNet(network) if isinstance(network, SnrNet) else network


def build_network(architecture: Architecture) -> nn.Module:
    """Return the network that a card names, with initial parameters.

    Raises BundleError for an unknown name or bad arguments.
    """
    if architecture.name not in NETWORKS:
        raise BundleError(f"no network is called {architecture.name!r}; known networks: {', '.join(NETWORKS)}")
    given, taken = set(architecture.arguments), arguments_of(architecture.name)
    if unknown := sorted(given - taken.keys()):
        raise BundleError(
            f"network {architecture.name!r} does not take {', '.join(unknown)}: its arguments are {', '.join(taken)}"
        )
    if absent := [name for name, needed in taken.items() if needed and name not in given]:
        raise BundleError(
            f"network {architecture.name!r} does not take {architecture.arguments}: it needs {', '.join(absent)} too"
        )
    try:
        return NETWORKS[architecture.name](**architecture.arguments)
    except ModuleNotFoundError as error:
        raise BundleError(
            f"network {architecture.name!r} in torch needs {error.name}: pip install 'broker-filter[gpu]'"
        ) from error
    except Exception as error:  # torch and timm raise exceptions of any type for bad values
        reason = str(error).partition("\n")[0]
        raise BundleError(f"network {architecture.name!r} does not take {architecture.arguments}: {reason}") from error


def arguments_of(network: str) -> dict[str, bool]:
    """Return the argument names of one of NETWORKS, and whether each argument is required."""
    parameters = dict(signature(NETWORKS[network]).parameters)
    if parameters.pop("heads", None) is not None:  # keyword arguments that are passed on to FusionNetwork
        parameters |= {name: each for name, each in signature(FusionNetwork).parameters.items() if name != "encoder"}
    return {name: each.default is Parameter.empty for name, each in parameters.items()}


def load_network(architecture: Architecture, weights: dict[str, Tensor]) -> nn.Module:
    """Return the network with `weights`, in evaluation mode.

    Raises BundleError if names, shapes or dtypes do not fit.
    """
    with torch.device("meta"):  # allocate no memory before the shapes are checked
        network = build_network(architecture)
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in network.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise BundleError(
            f"{len(wrong)} tensors do not fit the network {architecture.name!r}; the first is {wrong[0]!r}: "
            f"{found.get(wrong[0])} instead of {expected.get(wrong[0])}"
        )
    network = build_network(architecture)  # built again: buffers computed by the constructor have no values on `meta`
    network.load_state_dict(weights)
    return network.eval()
