"""Reads published weights files, and loads them into networks.

A file may hold named tensors and nothing else: a pickle that would execute code is refused. Every name and shape is
checked before a network is modified.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from broker_filter.errors import BrokerFilterError

MAX_WEIGHTS_BYTES = 2**31
"""No network that is fast enough for a stream comes near it."""


class WeightsError(BrokerFilterError):
    """A weights file cannot be used. The message says which file, what is wrong with it and what to do."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors, on the CPU, of a `.safetensors` file or of a file that `torch.save` wrote.

    Raises WeightsError if the file is missing, incomplete or too large, or holds anything but named, finite tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise WeightsError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes, the limit for a weights file")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: it is truncated, or holds more than tensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"{path}: holds more than named tensors; save the network's state dict alone")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise WeightsError(f"{path}: {broken[0]} holds NaN or infinite weights")
    return tensors


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], where: str, their_name: Callable[[str], str] = str
) -> None:
    """Load `weights` into the network; names and shapes must be exactly those of its state dict.

    `their_name`: maps a tensor name of the network to the name in `weights`. Raises WeightsError, with a message that
    begins with `where`.
    """
    ours = network.state_dict()
    expected = {their_name(name): tuple(tensor.shape) for name, tensor in ours.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [
        f"{len(names)} {problem} (the first: {names[0]})"
        for problem, names in (
            ("missing", [name for name in expected if name not in found]),
            ("unexpected", [name for name in found if name not in expected]),
            (
                "of wrong shape",
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
        raise WeightsError(f"{where}: the tensors do not fit this network: {'; '.join(problems)}")
    network.load_state_dict({name: weights[their_name(name)] for name in ours})
