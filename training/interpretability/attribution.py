"""Which heads and source tokens a feature's pre-activation comes from: direct feature attribution (DFA).

Source: Kissane et al. 2024, arXiv:2406.17759, section 2: z is linear in the values, given the attention pattern, so a
pre-activation (z - b_dec) w_enc + b_enc is a sum over heads and source tokens, and two constants. Recursive DFA goes on
into the residual stream of the source tokens: see `recursive_attribution`. All sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from broker_filter.scoring.networks.alert_embedder import Layer, LightCurveEncoder
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.interpretability.sites.attention import Attention
from training.interpretability.sites.light_curve import attention_pattern

LEAST_NORM = 1e-12
"""Smallest sum of absolute terms or norms that something is divided by."""


def direct_attribution(
    attention: Attention, dictionary: SparseDictionary, alerts: Tensor, queries: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the DFA of n (alert, query token, feature) triples by head and source token, and the constants.

    `alerts`, `queries`, `features`: int64 [n], indices into `attention` and `dictionary`. Returns float64 [n, H, P],
    and float64 [n, 2] with -b_dec w_enc and b_enc. Both together sum to the pre-activation.
    """
    w_enc = torch.from_numpy(dictionary.w_enc).double()
    b_dec, b_enc = torch.from_numpy(dictionary.b_dec).double(), torch.from_numpy(dictionary.b_enc).double()
    heads, d_head = attention.values.shape[1], attention.values.shape[3]
    directions = w_enc.T[features]  # [n, d]
    pattern, values = attention.pattern[alerts, :, queries].double(), attention.values[alerts].double()
    by_source = pattern * torch.einsum("nhpd,nhd->nhp", values, directions.reshape(-1, heads, d_head))
    return by_source, torch.stack([-directions @ b_dec, b_enc[features]], 1)


def completeness_error(terms: Tensor, sums: Tensor) -> Tensor:
    """Return how far n sums are from the sums of their terms, as a share of the sums of the terms' absolute values.

    `terms`: [n, ...]; `sums`: [n]. Returns float64 [n].
    """
    terms = terms.double().flatten(1)
    return (terms.sum(1) - sums.double()).abs() / terms.abs().sum(1).clamp(min=LEAST_NORM)


def head_shares_by_weights(dictionary: SparseDictionary, heads: int) -> NDArray[np.float64]:
    """Return the share of each head in each feature's decoder direction, float64 [F, H]: norms, divided by their sum.

    Source: Kissane et al. 2024 (arXiv:2406.17759), section 3. Heads with many small outputs and heads with few large
    ones look alike here; `head_shares` tells them apart.
    """
    w_dec = dictionary.w_dec.astype(np.float64)
    norms: NDArray[np.float64] = np.linalg.norm(w_dec.reshape(len(w_dec), heads, -1), axis=2)
    shares: NDArray[np.float64] = norms / np.maximum(norms.sum(1, keepdims=True), LEAST_NORM)
    return shares


def head_shares(by_source: Tensor) -> Tensor:
    """Return the share of each head in DFA [n, H, P], float64 [n, H]: absolute sums over tokens, divided by their sum.

    It is 0 for all heads if all terms are 0.
    """
    by_head = by_source.double().sum(2).abs()
    return by_head / by_head.sum(1, keepdim=True).clamp(min=LEAST_NORM)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One term of a recursive attribution.

    `kind`: `embedding` is what the token is before the first layer; `feature`, `error` and `constant` are the parts of
    an earlier layer's attention output (a feature's activation, what the dictionary does not reconstruct, and the
    biases); `perceptron` is the output of an earlier layer's perceptron. `constant` without a layer are the biases of
    the attributed layer. `value`: the part of the pre-activation, over all heads. `source`: the source token.
    `via`: the earlier feature through which the term reaches the pre-activation. `layer`, `source`, `feature` and `via`
    are None where they mean nothing.
    """

    kind: Literal["embedding", "feature", "error", "constant", "perceptron"]
    value: float
    layer: int | None = None
    source: int | None = None
    feature: int | None = None
    via: Leaf | None = None


class RecursiveAttribution:
    """Recursive DFA in one light curve, through the layers of a light-curve transformer.

    The attention pattern and the scale of each LayerNorm are held fixed. Then a value is linear in the residual stream
    of its source token, which is a sum: the embedding of the token and, for each earlier layer, the output of the
    attention (features, error and biases) and of the perceptron.
    """

    def __init__(
        self,
        encoder: LightCurveEncoder,
        dictionaries: Mapping[int, SparseDictionary],
        light_curve: Tensor,
        light_curve_mask: Tensor,
    ) -> None:
        """Run the encoder in float64 on a light curve [L, LIGHT_CURVE_FEATURES] with its mask [L].

        `dictionaries`: by layer. An earlier layer without a dictionary has no features: all its output is error.
        """
        self._encoder = deepcopy(encoder).double()
        self._dictionaries = dictionaries
        self._there = self._encoder.existing(light_curve_mask[None])
        self._parts: list[_Parts] = []
        with torch.no_grad():
            x = self._encoder.tokens(light_curve[None].double())
            self._embedding = x[0]
            for number, layer in enumerate(self._encoder.layers):
                assert isinstance(layer, Layer)
                parts = _Parts.of(layer, x, self._encoder.queries(number, x), self._there)
                self._parts.append(parts)
                x = parts.after

    def pre_activation(self, layer: int, query: int, feature: int) -> float:
        """Return the pre-activation of a feature of `layer` at a query token."""
        dictionary = self._dictionaries[layer]
        z = self._parts[layer].z[query].numpy() - dictionary.b_dec
        return float(z @ dictionary.w_enc[:, feature].astype(np.float64) + dictionary.b_enc[feature])

    @torch.no_grad()
    def leaves(self, layer: int, query: int, feature: int, depth: int = 0) -> list[Leaf]:
        """Return the terms that sum to the pre-activation of a feature of `layer` at a query token.

        With `depth` d, features of earlier layers are replaced d times by their own terms, which is exact, since an
        activation is the pre-activation. Their `via` is the feature that was replaced.
        """
        module, parts, dictionary = self._encoder.layers[layer], self._parts[layer], self._dictionaries[layer]
        assert isinstance(module, Layer)
        direction = torch.from_numpy(dictionary.w_enc[:, feature]).double()
        by_head = direction.reshape(module.heads, -1)
        _, w_value = module.key_value.weight.chunk(2)
        _, b_value = module.key_value.bias.chunk(2)
        read = torch.einsum("hdw,hd->hw", w_value.reshape(module.heads, -1, w_value.shape[1]), by_head)
        sensitive = read * module.norm.weight
        sensitive = sensitive - sensitive.mean(1, keepdim=True)  # LayerNorm subtracts the mean of the residual stream
        reads = (parts.pattern[:, query] / parts.scale).T @ sensitive  # [P, width]: what is read from each token
        constant = (read @ module.norm.bias).sum() + direction @ b_value + dictionary.b_enc[feature].item()
        constant = constant - direction @ torch.from_numpy(dictionary.b_dec).double()
        leaves = [Leaf("constant", float(constant)), *self._leaves("embedding", None, reads * self._embedding)]
        for number in range(layer):
            earlier = self._encoder.layers[number]
            assert isinstance(earlier, Layer)
            w_output, b_output = earlier.output.weight, earlier.output.bias
            z = self._parts[number].z
            active, w_dec, b_dec = _active(z, self._dictionaries.get(number))
            error = z - active @ w_dec - b_dec
            leaves += self._leaves("error", number, reads * (error @ w_output.T))
            leaves += self._leaves("constant", number, reads * (b_dec @ w_output.T + b_output))
            leaves += self._leaves("perceptron", number, reads * self._parts[number].perceptron)
            terms = active * (reads @ w_output @ w_dec.T)  # [P, F]
            for source, other in (active * self._there[0, :, None]).nonzero().tolist():
                leaf = Leaf("feature", float(terms[source, other]), number, source, other)
                leaves += self._expanded(leaf, depth) if depth else [leaf]
        return leaves

    def _leaves(
        self, kind: Literal["embedding", "error", "constant", "perceptron"], layer: int | None, terms: Tensor
    ) -> list[Leaf]:
        """Return one leaf for each source token that exists, of terms [P, width] that are summed."""
        by_source = terms.sum(1).tolist()
        return [Leaf(kind, by_source[source], layer, source) for source in self._there[0].nonzero().flatten().tolist()]

    def _expanded(self, leaf: Leaf, depth: int) -> list[Leaf]:
        """Return the terms of an earlier feature, scaled so that they sum to the leaf's value."""
        assert leaf.layer is not None
        assert leaf.source is not None
        assert leaf.feature is not None
        terms = self.leaves(leaf.layer, leaf.source, leaf.feature, depth - 1)
        share = leaf.value / math.fsum(term.value for term in terms)
        return [replace(term, value=share * term.value, via=term.via or leaf) for term in terms]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer computes for one light curve, in float64; see Attention and RecursiveAttribution."""

    z: Tensor  # [Q, d]
    pattern: Tensor  # [H, Q, P]
    scale: Tensor  # [P]: the standard deviation that LayerNorm divides each source token by
    perceptron: Tensor  # [Q, width]
    after: Tensor  # [1, Q, width]: the residual stream after the layer

    @staticmethod
    def of(layer: Layer, x: Tensor, residual: Tensor, there: Tensor) -> _Parts:
        query, key, values = layer.split(x, residual.shape[1])
        pattern = attention_pattern(query, key, there)
        z = (pattern @ values).transpose(1, 2).flatten(2)
        after = layer.add(residual, z)
        return _Parts(
            z=z[0],
            pattern=pattern[0],
            scale=(x[0].var(1, correction=0) + layer.norm.eps).sqrt(),
            perceptron=(after - residual - layer.output(z))[0],
            after=after,
        )


def _active(z: Tensor, dictionary: SparseDictionary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activations [Q, F] of z [Q, d], w_dec [F, d] and b_dec [d], in float64.

    Without a dictionary, F is 0.
    """
    if dictionary is None:
        return z.new_zeros(len(z), 0), z.new_zeros(0, z.shape[1]), z.new_zeros(z.shape[1])
    w_enc, b_enc, w_dec, b_dec, threshold = (
        torch.from_numpy(array).double()
        for array in (dictionary.w_enc, dictionary.b_enc, dictionary.w_dec, dictionary.b_dec, dictionary.threshold)
    )
    pre = (z - b_dec) @ w_enc + b_enc
    return pre * (pre > threshold), w_dec, b_dec
