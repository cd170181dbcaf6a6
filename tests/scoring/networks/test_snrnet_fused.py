"""SnrNet as it is exported gives the outputs of SnrNet, whatever orientations are averaged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from broker_filter.scoring.networks.snrnet import FLAGGED, METADATA, SIZE, SnrNet
from broker_filter.scoring.networks.snrnet_fused import ORIENTATIONS, FusedSnrNet


def trained(members: int, orientations: int) -> SnrNet:
    """Return a network with random weights and random statistics of the batch normalisation."""
    generator = torch.Generator().manual_seed(orientations)
    network = SnrNet(members, classes=3, orientations=orientations).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert isinstance(tensor, Tensor)
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network


@pytest.mark.parametrize("orientations", [1, 4, len(ORIENTATIONS)])
@torch.inference_mode()
def test_the_fused_network_gives_the_outputs_of_the_network(orientations: int) -> None:
    generator = torch.Generator().manual_seed(3)
    images, psf = (torch.randn(5, n, SIZE, SIZE, generator=generator) for n in (3, 1))
    metadata = torch.randn(5, len(METADATA) + len(FLAGGED), generator=generator)
    network = trained(2, orientations)
    expected = network(images, metadata, psf)
    torch.testing.assert_close(FusedSnrNet(network).eval()(images, metadata, psf), expected)
