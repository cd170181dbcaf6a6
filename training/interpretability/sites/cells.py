"""The attention of timm's image networks as sites: MobileViT and MaxViT.

Both networks let a token attend to a group of tokens of the same alert only: MobileViT to those at the same position
within their patches, MaxViT to those in the same window or in the same strided grid. Here the tokens of an alert are
all cells of its feature map, row by row from the top left, and the pattern is 0 between cells of different groups.
Convolutions before the site mix the pixels, so a cell is no part of the stamp with sharp edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.byobnet import ByobNet
from timm.models.maxxvit import MaxxVit, MaxxVitBlock, PartitionAttentionCl, grid_partition, window_partition
from timm.models.mobilevit import MobileVitBlock
from torch import Tensor, nn

from broker_filter.scoring.networks.fusion import FusionNetwork
from broker_filter.scoring.networks.timm_network import TimmEncoder
from training.interpretability.sites.attention import Attention, Box

STAGES = "stages"
"""The part of a timm backbone that has the attention layers."""


def cell_sites(network: FusionNetwork) -> list[str]:
    """Return the names of the timm blocks whose attention can be opened, from the input on."""
    if not isinstance(network.encoder, TimmEncoder):
        return []
    return [f"{name}.{path}" for name, layer in _layers(network.encoder.backbone) for path in _attention_blocks(layer)]


class CellSite:
    """A block with attention of a MobileViT or MaxViT backbone. Queries and source tokens are all cells of its map."""

    def __init__(self, network: FusionNetwork, name: str) -> None:
        """Open the site `name`, one of `cell_sites`."""
        assert isinstance(network.encoder, TimmEncoder)
        self.name = name
        self.network = network
        self.encoder = network.encoder
        layers = _layers(network.encoder.backbone)
        number = next(i for i, (path, _) in enumerate(layers) if name.startswith(f"{path}."))
        modules = [layer for _, layer in layers]
        self._before, self._layer, self._after = modules[:number], modules[number], modules[number + 1 :]
        self._block: Any = network.encoder.backbone.get_submodule(name)
        self._attention: Any = self._block.attn
        self.output: nn.Linear = self._attention.proj
        self.heads: int = self._attention.num_heads
        self.d_head = self.output.in_features // self.heads

    def attend(self, inputs: Mapping[str, Tensor]) -> Attention:
        """Return the attention; see Site."""
        x = self.encoder.resize(self.network.channels(inputs["images"], *_others(inputs)))
        for layer in self._before:
            x = layer(x)
        rest = {"map": x} | {name: inputs[name] for name in ("metadata",) if name in inputs}
        with _inputs_of(self._attention) as seen, _inputs_of(self.output) as found:
            self._layer(x)
        count = x.shape[0]
        cells = self._cells(found[0].numel() // (count * self.output.in_features), x.device)
        by_cell = cells.flatten().argsort()
        pattern, values = _pattern_and_values(self._attention, seen[0].flatten(1, -2))  # [N * groups, H, ...]
        total = cells.numel()
        whole = pattern.new_zeros(count, self.heads, total, total)
        whole[:, :, cells[:, :, None], cells[:, None, :]] = pattern.reshape(count, -1, *pattern.shape[1:]).transpose(
            1, 2
        )
        existing = torch.ones(count, total, dtype=torch.bool, device=x.device)
        return Attention(
            z=found[0].reshape(count, total, -1)[:, by_cell],
            pattern=whole,
            values=values.reshape(count, -1, *values.shape[1:]).transpose(1, 2).flatten(2, 3)[:, :, by_cell],
            queries=existing,
            sources=existing,
            rest=rest,
        )

    def resume(self, rest: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return logits and embedding with `z`; see Site."""
        in_groups = z[:, self._cells(z.shape[1], z.device).flatten()]
        with _input_replaced(self.output, in_groups):
            x = self._layer(rest["map"])
        for layer in self._after:
            x = layer(x)
        return self.network.join(x, *_others(rest))

    def splice(self, inputs: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return logits and embedding with `z` in place of the block's own; see Site."""
        return self.resume(self.attend(inputs).rest, z)

    def where(self, sources: int, stamp: int) -> list[Box]:
        """Return the Box of each cell: as wide as the distance of cells, around the centre of what the cell sees.

        The convolutions are padded by half their width, so the first cell's centre is the first pixel, and the boxes
        of the border are cut at the border. MaxViT's shortcuts are pooled, which moves what a cell sees by up to half a
        cell down and to the right; the box leaves this out.
        """
        side = math.isqrt(sources)
        fed = self.encoder.image_size or stamp
        reductions = [each["reduction"] for each in self.encoder.backbone.feature_info]
        stride = reductions[int(self.name.split(".")[1]) - len(self.encoder.backbone.stages)]
        mapped = math.ceil(fed / stride)  # cells before MobileViT interpolates to a whole number of patches
        width = stride * mapped / side
        edges = []
        for cell in range(side):
            centre = 0.5 + stride * ((cell + 0.5) * mapped / side - 0.5)
            edges.append(
                [min(max(edge * stamp / fed, 0.0), stamp) for edge in (centre - width / 2, centre + width / 2)]
            )
        return [Box(top, left, bottom, right) for top, bottom in edges for left, right in edges]

    def _cells(self, total: int, device: torch.device) -> Tensor:
        """Return the number of the cell of each token of each group, int64 [groups, tokens], for `total` cells."""
        side = math.isqrt(total)
        numbers = torch.arange(total, device=device)
        if isinstance(self._layer, MobileVitBlock):
            height, width = self._layer.patch_size
            patches = numbers.reshape(side // height, height, side // width, width)
            return patches.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)  # one group for each position within a patch
        partition = window_partition if self._block.partition_block else grid_partition
        groups: Tensor = partition(numbers.reshape(1, side, side, 1), self._block.partition_size)
        return groups.flatten(1)


def _layers(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers of a MobileViT or MaxViT in the order in which images pass through them, and their names.

    Other backbones have no such order: returns no layer.
    """
    if not isinstance(backbone, ByobNet | MaxxVit):
        return []
    layers: list[tuple[str, nn.Module]] = []
    for name, child in backbone.named_children():  # stem, stages, a last layer, and the head that pools
        if name == STAGES:
            layers += [
                (path, block)
                for path, block in child.named_modules(prefix=name)
                if path.count(".") == (2 if isinstance(backbone, ByobNet) else 3)
            ]
        else:
            layers.append((name, child))
    return layers


def _attention_blocks(layer: nn.Module) -> list[str]:
    """Return the paths within a layer of the blocks with an attention whose pattern can be computed."""
    if isinstance(layer, MobileVitBlock):
        return [f"transformer.{i}" for i in range(len(layer.transformer))]
    if isinstance(layer, MaxxVitBlock) and isinstance(layer.attn_grid, PartitionAttentionCl):
        return ["attn_block", "attn_grid"] if layer.attn_block is not None else ["attn_grid"]
    return []


def _pattern_and_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return pattern [G, H, T, T] and values [G, H, T, d_head] of a timm attention for its inputs [G, T, width]."""
    heads = attention.num_heads
    if getattr(attention, "head_first", False):
        query, key, value = attention.qkv(x).unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
    else:
        query, key, value = attention.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = (query * attention.scale) @ key.transpose(2, 3)
    if getattr(attention, "rel_pos", None) is not None:
        logits = logits + attention.rel_pos.get_bias()
    return logits.softmax(3), value


def _others(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the inputs of a FusionNetwork besides the images, in its order."""
    return [tensors[name] for name in ("metadata", "psf") if name in tensors]


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list that gets the input of each call of the module while the context is open."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _input_replaced(module: nn.Module, values: Tensor) -> Iterator[None]:
    """Replace the values of the module's input, whose shape may group them otherwise, while the context is open."""
    hook = module.register_forward_pre_hook(lambda _, arguments: (values.reshape(arguments[0].shape),))
    try:
        yield
    finally:
        hook.remove()
