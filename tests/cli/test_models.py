"""`broker-filter models` on the command line: list, show, verify and import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from broker_filter.cli import main
from broker_filter.scoring.bundle import open_bundle, shipped_bundles
from broker_filter.simulate import simulate_night

DEFAULT = open_bundle("default").part("ztf").directory


@pytest.fixture
def corrupted(tmp_path: Path) -> Path:
    copy = tmp_path / "corrupted"
    copy.mkdir()
    for path in DEFAULT.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    return copy


def test_list_shows_shipped_bundles_and_bundles_of_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").symlink_to(DEFAULT)
    assert main(["models", "list", str(tmp_path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "VERSION", "NETWORKS", "OUTPUTS", "TASK", "DIRECTORY"]
    assert [row.split()[0] for row in rows] == [*shipped_bundles(), "default"]
    assert "default.real" in rows[shipped_bundles().index("default")]
    assert rows[-1].endswith(str(tmp_path / "other"))


def test_list_shows_the_valid_bundles_if_another_is_corrupted(
    corrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corrupted.parent / "sound").symlink_to(DEFAULT)
    assert main(["models", "list", str(corrupted.parent)]) == 1
    out, complaint = capsys.readouterr()
    assert [Path(row.split()[-1]).name for row in out.splitlines()[1:]] == [*shipped_bundles(), "sound"]
    assert str(corrupted / "weights.safetensors") in complaint


def test_show_prints_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "default"]) == 0
    shown = capsys.readouterr().out
    for entry in ("real/bogus classification", "surveys", "l2_row", "stampnet", "BSD-3-Clause", "roc_auc", "agreement"):
        assert entry in shown


def test_show_says_which_alerts_the_drift_is_measured_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "default"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for survey, alerts in (("ztf", "1,937"), ("lsst", "176")):
        assert f"measured from the distribution of {alerts} alerts of {survey}: public {survey.upper()} alerts" in shown


def test_record_distribution_refuses_a_wrong_cut_and_too_few_alerts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.avro").write_bytes(next(iter(simulate_night(1, seed=1))).packet)
    command = ["models", "record-distribution", "default", str(tmp_path / "one.avro"), "--out", str(tmp_path / "new")]
    assert main([*command, "--where", "magpsf <"]) == 2
    assert main(command) == 1
    complaints = capsys.readouterr().err
    assert "--where" in complaints
    assert "no survey of default (ztf, lsst) has 100 alerts among the inputs: give more alerts" in complaints
    assert not (tmp_path / "new").exists()


def test_verify_runs_a_shipped_bundle_on_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "verify", "default"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(open_bundle("default").parts)
    assert "onnxruntime/" in lines[0]
    assert "torch/" in lines[-1]


def test_verifying_without_torch_says_what_was_not_verified(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["models", "verify", "default"]) == 0
    *onnx, torch = capsys.readouterr().out.splitlines()
    assert "onnxruntime/" in onnx[0]
    assert "not verified" in torch
    assert "pip install 'broker-filter[gpu]'" in torch


def test_importing_without_torch_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    options = ["--class", "h", "--name", "acai_h", "--out", str(tmp_path / "acai_h")]
    assert main(["models", "import", "acai", str(tmp_path / "acai_h.h5"), *options]) == 2
    assert capsys.readouterr().err == (
        "broker-filter: importing weights needs packages that are not installed (torch): "
        "pip install 'broker-filter[train]'\n"
    )


@pytest.mark.parametrize("command", ["verify", "show"])
def test_verifying_a_corrupted_bundle_fails_and_names_the_file(
    corrupted: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main(["models", command, str(corrupted)]) == 1
    complaint = capsys.readouterr().err
    assert str(corrupted / "weights.safetensors") in complaint
    assert "Traceback" not in complaint


@pytest.mark.shared
def test_import_writes_a_bundle_of_published_weights(
    shared_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(shared_models / "braai" / "d6_m7.weights.h5")
    out = str(tmp_path / "d6_m7")
    assert main(["models", "import", "braai", weights, "--normalisation", "row", "--name", "d6_m7", "--out", out]) == 0
    assert main(["models", "verify", out]) == 0
    assert main(["models", "show", out]) == 0
    assert "Duev et al. 2019" in capsys.readouterr().out


def test_missing_weights_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["models", "import", "braai", str(tmp_path / "no.h5"), "--normalisation", "row", "--name", "x"]
    assert main([*arguments, "--out", str(out)]) == 2
    complaint = capsys.readouterr().err
    assert "no.h5" in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()
