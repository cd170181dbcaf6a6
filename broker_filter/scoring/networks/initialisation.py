"""Keras's default initialisation, for architectures that were designed in Keras.

The pixels of an image with L2 norm 1 are of the order of 0.01. torch's default weights shrink them from layer to layer
until the random biases dominate, and a network as deep as VGG6 then does not start to learn.
"""

from __future__ import annotations

from torch import nn


def initialise_as_keras(network: nn.Module) -> None:
    """Set convolution and dense weights to Glorot uniform (Glorot & Bengio 2010, AISTATS, eq. 16), biases to zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
