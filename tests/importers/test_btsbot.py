"""BTSbot in the btsbot package and in the service: the same scores for the same packets.

The package (PyPI, MIT) contains code but no weights, so random weights are saved in the layout in which its authors
publish theirs. It is installed without its dependencies; only the parts that need none of them are imported.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import fastavro
import numpy as np
import pytest
import torch
from astropy.io import fits
from numpy.typing import NDArray
from timm.models.maxxvit import model_cfgs
from torch import Tensor, nn

from broker_filter.cli import main
from broker_filter.config import Runtime
from broker_filter.importers.btsbot import import_btsbot, read_btsbot
from broker_filter.importers.published import TRIPLET
from broker_filter.importers.weights import WeightsError
from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.bundle import BundleError, open_bundle
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import open_scorer

pytestmark = pytest.mark.filterwarnings("ignore:Found a SIMPLE card:astropy.io.fits.verify.VerifyWarning")

COLUMNS = [
    *("sgscore1", "distpsnr1", "sgscore2", "distpsnr2", "fwhm", "magpsf", "sigmapsf", "chipsf", "ra", "dec"),
    *("diffmaglim", "ndethist", "nmtchps", "age", "days_since_peak", "days_to_peak", "peakmag_so_far", "new_drb"),
    *("ncovhist", "nnotdet", "chinr", "sharpnr", "scorr", "sky", "maxmag_so_far"),
]
HEAD = {"fc1_neurons": 32, "fc2_neurons": 8, "dropout": 0.7}
METADATA = {"metadata_cols": COLUMNS, "meta_fc1_neurons": 24, "meta_fc2_neurons": 16, "meta_dropout": 0.25}
COMBINED = {"comb_fc1_neurons": 20, "comb_fc2_neurons": 8, "comb_dropout": 0.2}
CONVNEXT = {"model_name": "ConvNeXt", "model_kind": "test_convnext.r160_in1k", "pretrained": False, **HEAD}
MAXVIT = {"model_name": "MaxViT", "model_kind": "maxvit_tiny_rw_224.sw_in1k", "pretrained": False, **HEAD}
CNN = {"model_name": "um_cnn", "conv1_channels": 8, "conv2_channels": 12, "conv_kernel": 5, **HEAD}
CNN |= {"conv_dropout1": 0.5, "conv_dropout2": 0.55}


def frozen_fusion(image: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_name": "frozen_fusion",
        "image_model_config": image,
        "meta_model_config": {"model_name": "um_nn", **METADATA},
        # btsbot's class reads these keys, although it loads nothing from them
        "image_model_dir": "",
        "meta_model_dir": "",
        "skip_load_state": True,
        "metadata_cols": COLUMNS,
        **COMBINED,
    }


CONFIGURATIONS = {
    "ConvNeXt": CONVNEXT,
    "ConvNeXt frozen_fusion": frozen_fusion(CONVNEXT),
    "mm_ConvNeXt": {**CONVNEXT, **METADATA, **COMBINED, "model_name": "mm_ConvNeXt", "train_data_version": "v11"},
    "MaxViT": MAXVIT,
    "MaxViT frozen_fusion": frozen_fusion(MAXVIT),
    "um_cnn": CNN,
    "mm_cnn": {**CNN, **METADATA, **COMBINED, "model_name": "mm_cnn"},
}


EXPORTED = ["ConvNeXt", "ConvNeXt frozen_fusion", "MaxViT frozen_fusion"]
"""The configurations that are imported as bundles. The others are read only, because each export takes seconds."""


def _file_of_btsbot(name: str) -> Path:
    package = find_spec("btsbot")
    if package is None or package.origin is None:
        pytest.skip("needs the code of btsbot: pip install --no-deps btsbot")
    return Path(package.origin).with_name(name)


@pytest.fixture(scope="session")
def architectures() -> ModuleType:
    """btsbot's networks, imported without the rest of the package."""
    spec = spec_from_file_location("btsbot_architectures", _file_of_btsbot("architectures.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_triplet() -> Callable[[dict[str, Any]], tuple[NDArray[np.float64], bool]]:
    """btsbot's preprocessing function, extracted because its module imports a database client."""
    source = ast.parse(_file_of_btsbot("alert_utils.py").read_text())
    source.body = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "make_triplet"]
    # stands for bson: a stamp is encoded and decoded again
    names: dict[str, Any] = {"np": np, "io": io, "gzip": gzip, "fits": fits, "loads": list, "dumps": list}
    exec(compile(source, "alert_utils.py", "exec"), names)
    return names["make_triplet"]


@pytest.fixture
def shallow_maxvit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network with two of its eleven blocks, on both sides; exporting the full one takes a minute."""
    whole = model_cfgs["maxvit_tiny_rw"]
    monkeypatch.setitem(
        model_cfgs,
        "maxvit_tiny_rw",
        replace(whole, embed_dim=(32, 64), depths=(1, 1), block_type=("M", "M"), stem_width=16),
    )


class Sample(NamedTuple):
    """Real packets, decoded by fastavro and by the service."""

    records: list[dict[str, Any]]
    alerts: AlertBatch

    def metadata(self) -> NDArray[np.float32]:
        """Return metadata as in btsbot's training, including -999; derived columns are tested with the decoder."""
        added = {name: self.alerts.column(name) for name in COLUMNS if name not in self.records[0]["candidate"]}
        added["new_drb"] = np.nan_to_num(added["new_drb"], nan=0.5)
        return np.array(
            [
                [added[name][i] if name in added else record["candidate"][name] for name in COLUMNS]
                for i, record in enumerate(self.records)
            ],
            np.float32,
        )


def read(packets: list[bytes]) -> Sample:
    alerts, rejects = Decoder(open_registry(None), cutout_size=63, columns=COLUMNS).decode(
        [Packet(data, FilePosition("test")) for data in packets]
    )
    assert not rejects
    return Sample([next(fastavro.reader(io.BytesIO(data))) for data in packets], alerts)


@pytest.fixture(scope="session")
def sample(ztf_packets: list[tuple[int, bytes]]) -> Sample:
    """The sample contains an incomplete stamp, NaN pixels, and alerts without catalogue match or drb."""
    sample = read([data for _, data in ztf_packets[10::120]])
    assert (sample.alerts.cutout_box[..., 2:] < 63).any()
    assert np.isnan(sample.alerts.cutouts).any()
    assert np.isnan(sample.alerts.column("sgscore2")).any()
    assert np.isnan(sample.alerts.column("new_drb")).any()
    return sample


def save(network: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """Write the folder in the layout of btsbot's to_HF."""
    folder.mkdir()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    (folder / "train_config.json").write_text(json.dumps(config))
    return folder


class Reference(NamedTuple):
    """A network of btsbot: its published folder, its inputs, and its scores [N]."""

    folder: Path
    inputs: list[Tensor]
    scores: Tensor


def make_decided(network: nn.Module, inputs: list[Tensor]) -> None:
    """Set random weights whose scores differ between alerts, as those of a trained network do."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):  # normalises the raw columns
            module.running_mean, module.running_var = inputs[1].mean(0), inputs[1].var(0)
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.inference_mode():
        logits = network(*inputs)
        last.bias -= logits.mean()
        for parameter in last.parameters():
            parameter /= logits.std()


def test_images_are_those_of_make_triplet(
    ztf_packets: list[tuple[int, bytes]],
    make_triplet: Callable[[dict[str, Any]], tuple[NDArray[np.float64], bool]],
) -> None:
    records, alerts = read([data for _, data in ztf_packets[::5]])
    assert (alerts.cutout_box[..., 2:] < 63).any()
    assert np.isnan(alerts.cutouts).any()
    assert (np.abs(alerts.cutouts) > 1e38).any()
    with np.errstate(over="ignore"):
        triplets, dropped = zip(*map(make_triplet, records), strict=True)
    ours, theirs = prepare_images(alerts.cutouts, alerts.cutout_box, TRIPLET), np.stack(triplets).transpose(0, 3, 1, 2)
    # For an alert with an all-zero image, make_triplet reports that the result is unusable.
    np.testing.assert_array_equal((ours == 0).all(axis=(2, 3)).any(axis=1), dropped)
    kept = ~np.array(dropped)
    np.testing.assert_allclose(ours[kept], theirs[kept], rtol=2e-6, atol=0)


@pytest.fixture
def reference(
    request: pytest.FixtureRequest,
    architectures: ModuleType,
    make_triplet: Callable[[dict[str, Any]], tuple[NDArray[np.float64], bool]],
    sample: Sample,
    shallow_maxvit: None,
    tmp_path: Path,
) -> Reference:
    """btsbot's network for the parametrised configuration, saved, and its scores for the sample."""
    config = CONFIGURATIONS[request.param]
    triplets = np.stack([make_triplet(record)[0] for record in sample.records])
    inputs = [torch.from_numpy(triplets.transpose(0, 3, 1, 2)).float()]
    if "metadata_cols" in config:
        inputs.append(torch.from_numpy(sample.metadata()))
    torch.manual_seed(8)
    network = getattr(architectures, config["model_name"])(config).eval()
    make_decided(network, inputs)
    with torch.inference_mode():
        scores = network(*inputs)[:, 0].sigmoid()
    assert scores.std() > 0.1
    return Reference(save(network, config, tmp_path / "BTSbot"), inputs, scores)


@pytest.mark.parametrize("reference", EXPORTED, indirect=True)
def test_the_service_gives_the_scores_of_the_package(reference: Reference, sample: Sample, tmp_path: Path) -> None:
    bundle = tmp_path / "bts"
    assert main(["models", "import", "btsbot", str(reference.folder), "--name", "bts", "--out", str(bundle)]) == 0
    scores = open_scorer([str(bundle)], Runtime(engine="onnxruntime", device="cpu")).score(sample.alerts).columns()
    np.testing.assert_allclose(scores["bts.bts"], reference.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reference", sorted(CONFIGURATIONS.keys() - EXPORTED), indirect=True)
def test_further_networks_of_the_package_are_read_as_well(reference: Reference) -> None:
    _, network = read_btsbot(reference.folder)
    with torch.inference_mode():
        logits, _ = network(*reference.inputs)
    torch.testing.assert_close(logits[:, 0].sigmoid(), reference.scores, rtol=0, atol=1e-5)


@pytest.fixture
def folder(architectures: ModuleType, tmp_path: Path) -> Path:
    """The folder of a small network with metadata, for tests that damage it."""
    config = frozen_fusion(CNN)
    return save(architectures.frozen_fusion(config), config, tmp_path / "BTSbot")


def test_the_card_describes_the_inputs_of_the_network(folder: Path, tmp_path: Path) -> None:
    import_btsbot(folder, "bts", tmp_path / "bts")
    card = open_bundle(tmp_path / "bts").parts[0].card
    assert [column.name for column in card.inputs.metadata] == COLUMNS
    assert {column.fill for column in card.inputs.metadata} == {-999, 0.5}
    assert (card.surveys, card.outputs.labels, card.licence) == (("ztf",), ("bts",), "MIT")
    assert (card.inputs.images.normalisation, card.inputs.images.padding) == ("l2_image", 1e-9)
    assert card.version == "BTSbot"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_name": "VGG16"}, "model_name: Input should be"),
        ({"model_name": "um_nn"}, "um_nn is not an image network"),
        ({"metadata_cols": [*COLUMNS[1:], COLUMNS[0]]}, "metadata_cols has another order"),
        ({"comb_fc1_neurons": None}, "the keys comb_fc1_neurons, which frozen_fusion needs, are missing"),
        ({"comb_fc1_neurons": 10**12}, "comb_fc1_neurons: Input should be less"),
        ({"meta_model_config": None}, "the keys meta_model_config, which frozen_fusion needs"),
        ({"image_model_config": {**CONVNEXT, "model_kind": "local-dir:/tmp"}}, "no backbone named 'tmp'"),
        ({"train_data_version": "v11_LS"}, "Legacy Surveys"),
        ({**METADATA, **CNN, "model_name": "mm_cnn", "metadata_cols": ["fwhm", "fwhm"]}, "fwhm more than once"),
        ({**METADATA, **CNN, "model_name": "mm_cnn", "metadata_cols": ["colour"]}, "unknown metadata columns: colour"),
    ],
)
def test_a_configuration_of_another_network_is_refused(folder: Path, change: dict[str, Any], complaint: str) -> None:
    path = folder / "train_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=complaint):
        read_btsbot(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"combined_head.0.bias": None}, r"1 missing \(the first: combined_head\.0\.bias\)"),
        ({"combined_head.9.bias": torch.zeros(3)}, r"1 unexpected \(the first: combined_head\.9\.bias\)"),
        (
            {"meta_branch.network.0.weight": torch.ones(24)},
            r"1 of wrong shape \(the first: meta_branch\.network\.0\.weight: \(24,\) instead of \(25,\)\)",
        ),
        ({"combined_head.0.bias": torch.full((20,), torch.nan)}, r"combined_head\.0\.bias holds NaN"),
        ({"combined_head.0.bias": 3.0}, "holds more than named tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, change: dict[str, Any], complaint: str) -> None:
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True) | change
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    with pytest.raises(WeightsError, match=complaint):
        read_btsbot(folder)


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda _: b"",
        lambda _: b"PK\x03\x04",
        lambda _: pickle.dumps(Malicious(), protocol=2),
    ],
    ids=["half-written", "empty", "head alone", "code"],
)
def test_a_file_that_holds_more_than_tensors_is_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: cannot be read: it is truncated, or"):
        read_btsbot(folder)


@pytest.mark.parametrize("missing", ["pytorch_model.bin", "train_config.json"])
def test_a_folder_without_a_file_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises((BundleError, WeightsError), match=f"{missing}: no such file"):
        read_btsbot(folder)
