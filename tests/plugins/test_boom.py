"""`models export --for boom`: the exported graph in onnxruntime, with inputs made as BOOM's source makes them."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import replace
from pathlib import Path

import fastavro
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from broker_filter import AlertBatch, Decoder, Packet, Scorer
from broker_filter.cli import main
from broker_filter.importers.published import TRIPLET
from broker_filter.plugins.boom import COLUMNS, boom_inputs, check_exportable, export_for_boom
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.bundle import (
    Architecture,
    BundleError,
    ImageInput,
    Inputs,
    MetadataColumn,
    Outputs,
    open_bundle,
)

from ..network_description import describe

STAMPS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
EQUAL = 1e-6
AGE = COLUMNS.index("age")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle `default`, exported by the command."""
    path = tmp_path_factory.mktemp("boom") / "default.onnx"
    assert main(["models", "export", "default", "--for", "boom", "--out", str(path)]) == 0
    return path


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def scores(path: Path, inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """The scores of the exported graph, float32[N], after a check that both outputs hold them."""
    given = session(path).run(["fc_out", "score"], inputs)
    np.testing.assert_array_equal(*given)
    assert given[0].shape == (len(inputs["triplet"]), 1)
    return given[0][:, 0]


def buffer_to_image(stamp: bytes) -> NDArray[np.float32]:
    """The pixels of a stamp, in the middle of 63 x 63 zeros, as `buffer_to_image` of BOOM's `utils/fits.rs`."""
    data = gzip.decompress(stamp)
    cards = (data[start : start + 80].decode("ascii") for start in range(0, 2880, 80))
    header = {card[:8].strip(): card[10:].partition("/")[0].strip() for card in cards if card[8:10] == "= "}
    width, height = int(header["NAXIS1"]), int(header["NAXIS2"])
    pixels = np.frombuffer(data, ">f4", width * height, 2880).reshape(height, width)
    image = np.zeros((63, 63), np.float32)
    top, left = -((height - 63) // 2), -((width - 63) // 2)  # rounded up
    image[top : top + height, left : left + width] = pixels
    return image


def normalize_image(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The image divided by its norm, as `normalize_image` of BOOM's `utils/fits.rs`."""
    limits = np.finfo(np.float32)
    clean = np.clip(np.nan_to_num(image, nan=0.0, posinf=limits.max, neginf=limits.min), limits.min, limits.max)
    with np.errstate(all="ignore"):
        return clean / np.sqrt(np.sum(clean**2))


def boom_triplet(packet: bytes) -> NDArray[np.float32]:
    """The triplet [63, 63, 3] of a ZTF alert, as `get_triplet` of BOOM's `enrichment/models/base.rs`."""
    (alert,) = fastavro.reader(io.BytesIO(packet))
    return np.stack([normalize_image(buffer_to_image(alert[name]["stampData"])) for name in STAMPS], axis=-1)


def complete(alerts: AlertBatch) -> NDArray[np.bool_]:
    """The alerts for which BOOM sees the same pixels: stamps of full size without a pixel that overflows a norm."""
    full = (alerts.cutout_box[..., 2:] == 63).all(axis=(1, 2))
    with np.errstate(invalid="ignore"):
        return full & ~(np.abs(alerts.cutouts) > 1e15).any(axis=(1, 2, 3))


@pytest.fixture(scope="module")
def real(ztf_packets: list[tuple[int, bytes]]) -> tuple[AlertBatch, NDArray[np.float32]]:
    """Real ZTF alerts with the metadata that BOOM passes on, and their triplets, made as BOOM makes them."""
    some = [packet for _, packet in ztf_packets[::5]]
    alerts, rejects = Decoder(columns=(*COLUMNS, "new_drb")).decode([Packet(packet) for packet in some])
    assert not rejects
    return alerts, np.stack([boom_triplet(some[i]) for i in alerts.packet_index])


@pytest.mark.parametrize("bundle", ["default", "attention"])
def test_boom_gives_real_ztf_alerts_the_scores_of_the_bundle(
    bundle: str, real: tuple[AlertBatch, NDArray[np.float32]], tmp_path: Path
) -> None:
    path = tmp_path / f"{bundle}.onnx"
    export_for_boom(bundle, path)
    alerts, triplets = real
    expected = Scorer.open([bundle]).score(alerts).columns()[f"{bundle}.real"]
    same = complete(alerts)
    assert same.sum() > 150
    metadata = boom_inputs(raw_alerts(alerts))["metadata"]
    found = scores(path, {"triplet": triplets, "metadata": metadata})
    assert np.abs(found - expected)[same].max() <= EQUAL
    assert expected[same].min() < 0.1
    assert expected[same].max() > 0.9
    assert np.isfinite(found).all()


@pytest.fixture(scope="module")
def with_metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a network with random weights for BTSbot's images, and for metadata with fill values and flags."""
    torch = pytest.importorskip("torch", reason="making a bundle needs the extra train")
    from broker_filter.importers.write_bundle import write_bundle
    from broker_filter.scoring.networks import build_network

    columns = ("age", "new_drb", "sgscore1", "distpsnr1", "ndethist", "nnotdet", "peakmag_so_far")
    metadata = tuple(MetadataColumn(name=name, fill=0.5, flag=name == "sgscore1") for name in columns)
    description = describe(
        "mine",
        "test",
        ("ztf",),
        Inputs(images=TRIPLET, metadata=metadata),
        Outputs(labels=("first", "second"), activation="softmax"),
        Architecture(
            name="btsbot_cnn",
            arguments={
                "channels": (4, 4),
                "kernel": 5,
                "metadata": 8,
                "metadata_hidden": (8, 4),
                "hidden": (8, 4),
                "labels": 2,
            },
        ),
    )
    torch.manual_seed(1)
    out = tmp_path_factory.mktemp("bundle") / "metadata"
    write_bundle(out, description, build_network(description.architecture))
    return out


def test_metadata_are_chosen_by_name_and_filled(
    with_metadata: Path, real: tuple[AlertBatch, NDArray[np.float32]], tmp_path: Path
) -> None:
    path = tmp_path / "second.onnx"
    export_for_boom(with_metadata, path, "second")
    alerts, triplets = real
    same = complete(alerts)
    metadata = boom_inputs(raw_alerts(alerts))["metadata"]
    assert (metadata[:, COLUMNS.index("sgscore1")] == -999).any()
    expected = Scorer.open([with_metadata]).score(alerts).columns()["mine.second"]
    found = scores(path, {"triplet": triplets, "metadata": metadata})
    assert np.abs(found - expected)[same].max() <= EQUAL
    assert np.ptp(expected[same]) > 1000 * EQUAL

    negative = np.where(metadata == -999, metadata, metadata * np.where(np.arange(len(COLUMNS)) == AGE, -1, 1))
    np.testing.assert_array_equal(scores(path, {"triplet": triplets, "metadata": negative.astype(np.float32)}), found)
    unknown = np.where(metadata == -999, np.float32(np.nan), metadata)
    np.testing.assert_array_equal(scores(path, {"triplet": triplets, "metadata": unknown}), found)


def test_the_file_says_what_its_inputs_are(exported: Path) -> None:
    model = session(exported)
    assert [(given.name, given.shape, given.type) for given in model.get_inputs()] == [
        ("triplet", ["alerts", 63, 63, 3], "tensor(float)"),
        ("metadata", ["alerts", 25], "tensor(float)"),
    ]
    assert [output.name for output in model.get_outputs()] == ["fc_out", "score"]
    properties = model.get_modelmeta().custom_metadata_map
    assert json.loads(properties["broker_filter.metadata.columns"]) == list(COLUMNS)
    assert len(COLUMNS) == len(set(COLUMNS)) == 25
    assert properties["broker_filter.triplet.normalisation"] == "l2_image"
    assert json.loads(properties["broker_filter.triplet.order"]) == ["science", "template", "difference"]
    assert properties["broker_filter.bundle"] == open_bundle("default").card.title
    onnx.checker.check_model(str(exported), full_check=True)


def test_a_stamp_of_zeros_that_boom_divides_by_zero_gets_a_score(exported: Path) -> None:
    triplet = np.full((2, 63, 63, 3), np.nan, np.float32)
    assert np.isfinite(scores(exported, {"triplet": triplet, "metadata": np.zeros((2, 25), np.float32)})).all()


@pytest.mark.parametrize(
    ("bundle", "reasons"),
    [
        ("classes", ["isdiffpos, distnr, magnr"]),
        ("embedder", ["light curves", "metadata that are not among BOOM's 25"]),
        ("rubin", ["no network for ztf"]),
    ],
)
def test_a_bundle_with_other_inputs_is_refused_with_every_reason(
    bundle: str, reasons: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "refused.onnx"
    assert main(["models", "export", bundle, "--for", "boom", "--out", str(out)]) == 1
    complaint = capsys.readouterr().err
    assert all(reason in complaint for reason in reasons), complaint
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 31}, "31 px"),
        ({"normalisation": "snr"}, "normalisation snr"),
        ({"padding": 0.5}, "pads cutouts with 0.5"),
    ],
)
def test_other_cutouts_are_refused(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    part = open_bundle("default").part("ztf")
    images = ImageInput.model_validate(part.card.inputs.images.model_dump() | change)
    card = part.card.model_copy(update={"inputs": part.card.inputs.model_copy(update={"images": images})})
    with pytest.raises(BundleError, match=reason):
        check_exportable(replace(part, card=card))


def test_several_labels_need_a_choice(with_metadata: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="choose one with --label: first, second"):
        export_for_boom(with_metadata, tmp_path / "out.onnx")
    with pytest.raises(BundleError, match="no label 'third'"):
        export_for_boom(with_metadata, tmp_path / "out.onnx", "third")


def test_an_existing_file_is_not_replaced(exported: Path) -> None:
    before = exported.read_bytes()
    with pytest.raises(BundleError, match="exists already"):
        export_for_boom("default", exported)
    assert exported.read_bytes() == before
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_the_message_names_the_extra_without_onnx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker_filter.cli.extras.find_spec", lambda name: None)
    assert main(["models", "export", "default", "--for", "boom", "--out", str(tmp_path / "out.onnx")]) == 2
    assert "exporting a bundle needs packages that are not installed (onnx)" in capsys.readouterr().err
