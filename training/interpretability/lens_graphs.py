"""A network before and after one of its sites, as ONNX graphs: a lens needs no torch.

The graphs are traced from the torch network through its site, and must reproduce the network before they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from broker_filter.importers.write_bundle import to_onnx
from broker_filter.scoring.bundle import Part
from broker_filter.scoring.lens_files import ANOMALY_SCORE, FROM_Z, KNOWN, TO_Z
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.errors import LensError
from training.interpretability.sites.open_site import LightCurveSite, Site

GRAPH_TOLERANCE = 1e-5
"""Allowed deviation of the part after the site from the whole network: both are float32 in torch."""


class ToZ(nn.Module):
    """The network's inputs -> z, attention pattern, values, and which queries and sources exist."""

    def __init__(self, network: nn.Module, site: Site, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network  # registers the parameters that the site uses
        self.site = site
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Take the network's inputs in the order of `names`."""
        seen = self.site.attend(dict(zip(self.names, inputs, strict=True)))
        return seen.z, seen.pattern, seen.values, seen.queries, seen.sources


class LightCurveFromZ(nn.Module):
    """The network's inputs and z -> the vector of the modality `light_curve` [N, size], which alone moves with z."""

    def __init__(self, site: LightCurveSite, names: Sequence[str]) -> None:
        super().__init__()
        self.network = site.network
        self.site = site
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Take the network's inputs in the order of `names`, then z [N, Q, d]."""
        *given, z = inputs
        named, site = dict(zip(self.names, given, strict=True)), self.site
        mask = named["light_curve_mask"]
        tokens = site.layer.add(site.encoder.queries(site.number, site.enter(named)), z)
        encoded = site.encoder.read(tokens, site.encoder.existing(mask), site.number + 1)
        vector = normalize(self.network.projections["light_curve"](encoded), dim=1)
        return vector * mask.amax(1).unsqueeze(1)


class ProbabilitiesFromZ(nn.Module):
    """The network's inputs and z -> the probabilities [N, labels]."""

    def __init__(self, network: nn.Module, site: Site, names: Sequence[str], activation: str) -> None:
        super().__init__()
        self.network = network
        self.site = site
        self.names = tuple(names)
        self.activation = nn.Sigmoid() if activation == "sigmoid" else nn.Softmax(dim=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Take the network's inputs in the order of `names`, then z [N, Q, d]."""
        *given, z = inputs
        logits, *_ = self.site.splice(dict(zip(self.names, given, strict=True)), z)
        return self.activation(logits)  # type: ignore[no-any-return]


def write_graphs(
    lens: Path, part: Part, network: nn.Module, site: Site, dictionary: SparseDictionary
) -> tuple[str, str, tuple[tuple[int, int, int, int], ...]]:
    """Write both graphs and the test vector; return the modality, what effects are on, and the cells of an image."""
    inputs, outputs = part.card.inputs, part.card.outputs
    examples = {name: torch.from_numpy(array) for name, array in prepare(part.test_vector(), inputs).items()}
    names = tuple(examples)
    to_z = ToZ(network, site, names).eval()
    with torch.inference_mode():
        seen = site.attend(examples)
        spliced = site.splice(examples, seen.z)
    from_z: nn.Module
    cells: tuple[tuple[int, int, int, int], ...] = ()
    if isinstance(site, LightCurveSite):
        modality, effect_on = "light_curve", ANOMALY_SCORE
        from_z = LightCurveFromZ(site, names).eval()
        expected = spliced[2][:, outputs.modalities.index(modality)]
    else:
        modality, effect_on = "image", outputs.labels[0]
        from_z = ProbabilitiesFromZ(network, site, names, outputs.activation).eval()
        expected = from_z.activation(spliced[0])
        boxes = site.where(seen.sources.shape[1], inputs.images.size)
        cells = tuple(_cell(*box) for box in boxes if isinstance(box, tuple))
    z = seen.z.clone()
    with torch.inference_mode():
        moved = from_z(*examples.values(), z)
    if (off := float((moved - expected).abs().max())) > GRAPH_TOLERANCE:
        raise LensError(f"{part.directory}: the part after {site.name} is off by {off:.2g} from the whole network")
    graph = to_onnx(to_z, examples, ("z", "pattern", "values", "queries", "sources"))
    (lens / TO_Z).write_bytes(_without_unused_inputs(graph))
    (lens / FROM_Z).write_bytes(_without_unused_inputs(to_onnx(from_z, {**examples, "z": z}, ("moved",))))
    rows = seen.z.flatten(0, 1).numpy()
    known = {"z": seen.z.numpy(), "pre_activations": dictionary.pre_activations(rows), "moved": moved.numpy()}
    save_file({name: np.ascontiguousarray(array) for name, array in known.items()}, lens / KNOWN)
    return modality, effect_on, cells


def _cell(top: float, left: float, bottom: float, right: float) -> tuple[int, int, int, int]:
    """Return (y0, x0, height, width) in whole pixels."""
    y0, x0 = round(top), round(left)
    return y0, x0, round(bottom) - y0, round(right) - x0


def _without_unused_inputs(graph: bytes) -> bytes:
    """Return the graph without inputs that no node reads, so that a lens asks only for what it needs."""
    model = onnx.load_model_from_string(graph)
    read = {name for node in model.graph.node for name in node.input}
    kept = [node for node in model.graph.input if node.name in read]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return bytes(model.SerializeToString())
