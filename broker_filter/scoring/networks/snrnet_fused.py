"""SnrNet with fewer and larger operations, for ONNX: equal outputs up to rounding errors, in less time on a CPU.

`SnrNet` turns the images into each orientation and runs each image network on them. Here the images stay as they are
and the filters are turned instead; a layer of all image networks, in all orientations with the same flips, is one
grouped convolution. Nothing is trained in this form. The graph turns the filters, so that the file holds each of them
once; onnxruntime does so when it loads the graph.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, max_pool2d, pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from broker_filter.scoring.networks.snrnet import SnrNet

BLOCK = 16
"""onnxruntime's fast grouped convolution needs a multiple of this number of channels in each group (with AVX-512)."""
MAP_SIZE = 7
"""Pixels per side of the map that the last layer of an image network takes."""


class Orientation(NamedTuple):
    """A symmetry of the square: images are flipped along some axes, then possibly transposed."""

    flips: tuple[int, ...]
    transposed: bool

    def turn(self, filters: Tensor) -> Tensor:
        """Return `filters` [..., K, K] that see in an image what the given ones see in the image turned so."""
        filters = filters.transpose(-2, -1) if self.transposed else filters
        return filters.flip(self.flips) if self.flips else filters


ORIENTATIONS = tuple(
    Orientation(flips, transposed) for flips in ((), (-2, -1), (-1,), (-2,)) for transposed in (False, True)
)
"""The symmetries of the square, in the order of `snrnet.orient`."""


class FusedSnrNet(nn.Module):
    """Images [N, 3, 31, 31], metadata [N, F] and PSF [N, 1, 31, 31] -> logits and features, those of SnrNet."""

    def __init__(self, network: SnrNet) -> None:
        """Take over the trained weights of `network`."""
        super().__init__()
        self.network = network
        self.orientations = ORIENTATIONS[: network.orientations]
        layers = zip(*(_filters(cast(nn.Sequential, net)) for net in network.image_nets), strict=True)
        self.weights, self.biases = (
            nn.ParameterList(torch.stack(each) for each in kind)
            for kind in zip(*(zip(*layer, strict=True) for layer in layers), strict=True)
        )

    def forward(self, images: Tensor, metadata: Tensor, psf: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits float32[N, 1 + classes] and features float32[N, D]."""
        seen = torch.cat([images, psf], dim=1)
        of_flips = [
            self._features(seen, flips, [each for each in self.orientations if each.flips == flips])
            for flips in dict.fromkeys(each.flips for each in self.orientations)
        ]
        features = [sum(of_net[1:], of_net[0]) / len(self.orientations) for of_net in zip(*of_flips, strict=True)]
        return self.network.logits_of(features, metadata)

    def _features(self, images: Tensor, flips: tuple[int, ...], turned: list[Orientation]) -> list[Tensor]:
        """Return the features [N, FEATURES] of each image network, summed over `turned`, which have these `flips`."""
        groups = len(self.network.image_nets) * len(turned)

        def filters(layer: int) -> tuple[Tensor, Tensor]:
            """Return weights and biases of a layer, of each image network in each of the orientations."""
            weight, bias = self.weights[layer], self.biases[layer]
            weights = torch.stack([each.turn(weight) for each in turned], dim=1)
            return weights.flatten(0, 1), bias.repeat_interleave(len(turned), dim=0)

        def convolve(x: Tensor, layer: int, **how: int) -> Tensor:
            weights, biases = filters(layer)
            return conv2d(x, weights.flatten(0, 1), biases.flatten(), **how).relu()

        x = convolve(images, 0, stride=2, padding=1)
        # The pooling leaves out the last row and column of a turned image: do not compute them.
        edges = [edge for axis in (-1, -2) for edge in ((0, 1) if axis in flips else (1, 0))]
        x = max_pool2d(convolve(pad(x, edges), 1, groups=groups), 2)
        x = convolve(x, 2, padding=1, groups=groups)
        x = convolve(x, 3, groups=groups)
        seen = [
            linear(each.flatten(1), weight.flatten(1), bias).relu()
            for each, weight, bias in zip(x.chunk(groups, dim=1), *filters(4), strict=True)
        ]
        of_nets = [seen[start : start + len(turned)] for start in range(0, groups, len(turned))]
        return [sum(of_net[1:], of_net[0]) for of_net in of_nets]


def _filters(net: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
    """Return the weight and bias of each layer of an image network, with its batch normalisation folded in.

    The weight of the last layer is [FEATURES, C, MAP_SIZE, MAP_SIZE]. C is a multiple of BLOCK, for which channels of
    zeros are added to the layer before.
    """
    layers = list(copy.deepcopy(net).double())  # float64: folding adds a single rounding error
    folded = [
        fuse_conv_bn_eval(layer, after)
        for layer, after in pairwise(layers)
        if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
    ]
    (last,) = (layer for layer in layers if isinstance(layer, nn.Linear))
    *before, (narrow, bias) = [(layer.weight.float(), cast(Tensor, layer.bias).float()) for layer in folded]
    added = -len(narrow) % BLOCK
    maps = last.weight.float().reshape(-1, len(narrow), MAP_SIZE, MAP_SIZE)
    return [
        *before,
        (pad(narrow, (0, 0, 0, 0, 0, 0, 0, added)), pad(bias, (0, added))),
        (pad(maps, (0, 0, 0, 0, 0, added)), last.bias.float()),
    ]
