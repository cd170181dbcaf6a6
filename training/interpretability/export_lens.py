"""`python -m training sae export`: a run into a lens, the directory that the service and `broker-filter explain` open.

The graphs are made from the torch network through its site, and must reproduce it before the lens gets its card. The
directory is written atomically, and never replaces an existing one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from broker_filter.config import SurveyName
from broker_filter.importers.write_bundle import to_onnx
from broker_filter.scoring.bundle import WEIGHTS, Part
from broker_filter.scoring.explanation import unexplained_share
from broker_filter.scoring.lens import Lens
from broker_filter.scoring.lens_files import (
    ANOMALY_SCORE,
    FEATURES,
    FILES,
    FROM_Z,
    KNOWN,
    LENS_CARD,
    STATISTICS,
    TO_Z,
    LensBundle,
    LensCard,
    OrdinaryAlerts,
    open_files,
    sorted_activations,
)
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.sparse_dictionary import DictionarySource, SparseDictionary, write_dictionary
from training.errors import LensError, refuse_existing
from training.interpretability.sites import LightCurveSite, Site, open_site

COLUMNS = ("id", "name", "note", "stable", "family", "enriched_class")
"""Columns of the table of features in a lens; the first four are read when an alert is explained."""


@dataclass(frozen=True, slots=True)
class OrdinaryRows:
    """The activations of N ordinary alerts of one survey at a site."""

    z: NDArray[np.float32]  # [T, d] rows: the queries of all alerts
    alert: NDArray[np.int64]  # [T] index of a row's alert, ascending
    source: str

    def statistics(self, survey: SurveyName, dictionary: SparseDictionary) -> tuple[dict[str, NDArray[Any]], int]:
        """Return the arrays of OrdinaryFeatures by their names in the file, and N."""
        _, first = np.unique(self.alert, return_index=True)
        active, mean = dictionary.encode(self.z), self.z.mean(axis=0, dtype=np.float64).astype(np.float32)
        rebuilt = dictionary.decode(active)
        activations, offsets = sorted_activations(np.maximum.reduceat(active, first))
        bounds = [*first.tolist(), len(self.z)]
        unexplained = [unexplained_share(self.z[a:b], rebuilt[a:b], mean) for a, b in pairwise(bounds)]
        arrays = {
            f"{survey}.activations": activations,
            f"{survey}.offsets": offsets,
            f"{survey}.unexplained": np.sort(np.array(unexplained, np.float32)),
            f"{survey}.mean": mean,
        }
        return arrays, len(first)


def write_lens(
    directory: Path,
    part: Part,
    site: str,
    dictionary: SparseDictionary,
    ordinary: Mapping[SurveyName, OrdinaryRows],
    features: Sequence[Mapping[str, str]],
    *,
    name: str,
    version: str,
    split: str,
    worth: str,
    measures: Mapping[str, float | int | str],
) -> None:
    """Write a lens on a site of the network of `part` into the new `directory`.

    `features`: rows with the keys COLUMNS. `split`: the alerts that the dictionary was trained on. `worth`: how far the
    lens can be trusted, in a sentence. Raises LensError if the directory exists, if the network has no such site, or if
    the graphs do not reproduce the network.
    """
    refuse_existing(directory)
    network = load_network(part.card.architecture, load_file(part.directory / WEIGHTS))
    opened = open_site(network, site)
    source = DictionarySource(
        bundle=part.card.name,
        version=part.card.version,
        weights_sha256=part.card.files[WEIGHTS],
        site=site,
        heads=opened.heads,
        d_head=opened.d_head,
        split=split,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        lens = Path(scratch) / directory.name
        write_dictionary(lens, dictionary, source)
        (lens / FEATURES).write_text(_table(features), encoding="utf-8")
        statistics: dict[str, NDArray[Any]] = {}
        counts: dict[SurveyName, OrdinaryAlerts] = {}
        for survey, rows in ordinary.items():
            arrays, alerts = rows.statistics(survey, dictionary)
            statistics |= arrays
            counts[survey] = OrdinaryAlerts(alerts=alerts, source=rows.source)
        save_file(statistics, lens / STATISTICS)
        modality, effect_on, cells = _graphs(lens, part, network, opened, dictionary)
        card = LensCard(
            name=name,
            version=version,
            bundle=LensBundle(name=part.card.name, version=part.card.version, weights_sha256=part.card.files[WEIGHTS]),
            site=site,
            modality=modality,
            effect_on=effect_on,
            heads=opened.heads,
            d_head=opened.d_head,
            cells=cells,
            ordinary=counts,
            worth=worth,
            measures=dict(measures),
            files={file: hashlib.sha256((lens / file).read_bytes()).hexdigest() for file in FILES},
        )
        text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
        (lens / LENS_CARD).write_text(text, encoding="utf-8")
        Lens(open_files(lens), part)  # raises LensError if onnxruntime does not reproduce the test vector
        lens.rename(directory)


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


def _graphs(
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


GRAPH_TOLERANCE = 1e-5
"""Allowed deviation of the part after the site from the whole network: both are float32 in torch."""


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


def _table(features: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(features)
    return text.getvalue()
