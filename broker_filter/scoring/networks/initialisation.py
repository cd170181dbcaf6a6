"""How Keras initialises layers, for the networks that were made with it: torch's own way leaves them dead.

Pixels of an image whose L2 norm is 1 are some hundredths. torch's weights shrink them from layer to layer below its
random biases, and such a network of VGG6's depth does not begin to learn.
"""

from __future__ import annotations

from torch import nn


def initialise_as_keras(network: nn.Module) -> None:
    """Weights of convolutions and dense layers uniform as in Glorot & Bengio 2010 (AISTATS, eq. 16), biases zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
