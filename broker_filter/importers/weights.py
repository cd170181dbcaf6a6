"""Files of weights that others published, and networks that take them.

A file holds named tensors and nothing else: what would run code when it is unpickled is refused. Every name and shape
is checked before a network is touched.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

MAX_WEIGHTS_BYTES = 2**31
"""No network that keeps up with a stream comes near it."""


class WeightsError(Exception):
    """A file of weights that cannot be used: which, what is wrong with it, what to do."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of one that `torch.save` wrote; on the CPU.

    Raises WeightsError where it is not whole, is too large, or holds anything else.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise WeightsError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes, which no file of weights may be")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: cut short, or not a file of tensors alone") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"{path}: holds more than named tensors; save the network's state dict alone")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise WeightsError(f"{path}: {broken[0]} holds NaN or infinite weights")
    return tensors


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], where: str, their_name: Callable[[str], str] = str
) -> None:
    """Gives the network `weights`, which must be all of its own and no other.

    `their_name`: what the weights call one of the network's tensors. Raises WeightsError, beginning with `where`.
    """
    ours = network.state_dict()
    expected = {their_name(name): tuple(tensor.shape) for name, tensor in ours.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [
        f"{len(names)} {problem}, first {names[0]}"
        for problem, names in (
            ("missing", [name for name in expected if name not in found]),
            ("that it does not have", [name for name in found if name not in expected]),
            (
                "of another shape",
                [
                    f"{name}: {found[name]} instead of {shape}"
                    for name, shape in expected.items()
                    if found.get(name, shape) != shape
                ],
            ),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{where}: not the tensors of this network: {'; '.join(problems)}")
    network.load_state_dict({name: weights[their_name(name)] for name in ours})
