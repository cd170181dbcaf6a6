"""`python -m training`: commands, errors in one line, and the configuration in the documentation."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import Architecture, Description, open_bundle
from broker_filter.scoring.networks import build_network
from training.__main__ import COMMANDS, INSTALL, main
from training.data.datasets import Dataset
from training.interpretability.command import COMMANDS as LENS_COMMANDS
from training.recipe import Fit

CHECKOUT = Path(__file__).parents[2]
TRAIN_PAGE = CHECKOUT / "docs" / "how-to" / "train.md"


@pytest.mark.parametrize("command", ["build-dataset", "evaluate"])
def test_every_command_has_a_help_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: python -m training {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["sae"], ["sae", "nonsense"]])
def test_the_commands_of_a_command_are_listed_if_none_is_given(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    listed = capsys.readouterr().err
    assert listed.startswith("usage: python -m training sae COMMAND ...")
    assert all(f"  {command} " in listed for command in LENS_COMMANDS)


@pytest.mark.parametrize("command", LENS_COMMANDS)
def test_every_command_of_the_lens_has_a_help_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sae", command, "--help"])
    assert f"usage: python -m training sae {command}" in capsys.readouterr().out


def test_commands_are_listed_if_none_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["nonsense"]) == 2
    listed = capsys.readouterr().err
    assert all(f"  {command} " in listed for command in COMMANDS)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_not_an_error(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    printed = capsys.readouterr()
    assert all(f"  {command} " in printed.out for command in COMMANDS)
    assert not printed.err


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute"]) == 2
    assert capsys.readouterr().err.endswith("training: no command 'evalute'; did you mean 'evaluate'?\n")


def test_training_without_torch_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, COMMANDS["train-default"][0], raising=False)
    assert main(["train-default"]) == 2
    assert capsys.readouterr().err == f"training train-default: needs torch, which is not installed: {INSTALL}\n"


def test_a_command_removes_its_temporary_files_after_sigterm(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, tempfile, time
from types import SimpleNamespace
from training.__main__ import COMMANDS, main

def run(arguments):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

sys.modules["stopped"] = SimpleNamespace(add_arguments=lambda parser: None, run=run)
COMMANDS["stopped"] = ("stopped", "a command that gets SIGTERM")
sys.exit(main(["stopped"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert not list(tmp_path.iterdir())


def test_command_builds_a_data_set(night_packets: Path, night_table: Path, tmp_path: Path) -> None:
    arguments = ["build-dataset", str(night_packets), "--labels", str(night_table), "--label", "truth"]
    classes = ["--class", "bogus=detector", "--class", "real=sky", "--shares", "0.1", "0.2"]
    assert main([*arguments, *classes, "--out", str(tmp_path / "set")]) == 0
    card = Dataset.open(tmp_path / "set").card
    assert card.classes == ("bogus", "real")
    assert (card.split.validation, card.split.test) == (0.1, 0.2)


@pytest.mark.parametrize("options", [["--shares", "0.6", "0.3"], ["--shares", "nan", "0.1"], ["--cutout-size", "0"]])
def test_invalid_values_of_a_data_set_are_wrong_usage(
    options: list[str], night_packets: Path, night_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["build-dataset", str(night_packets), "--labels", str(night_table), "--out", str(tmp_path), *options])
    assert f"error: argument {options[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_zero_threads_are_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "default", "--dataset", str(tmp_path), "--out", str(tmp_path), "--threads", "0"])
    assert "error: argument --threads: 0 is not a positive number" in capsys.readouterr().err.splitlines()[-1]


def test_an_error_is_one_line(night_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build-dataset", str(tmp_path), "--labels", str(night_table), "--out", str(tmp_path / "set")]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"training build-dataset: {night_table}: no column 'label'; its columns are candid, truth"
    assert main(["fit", str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of VGG6 with random weights."""
    card = open_bundle("default").part("ztf").card
    described = {name: getattr(card, name) for name in Description.model_fields}
    vgg6 = Architecture(name="vgg6")
    bundle = tmp_path_factory.mktemp("bundles") / "vgg6"
    write_bundle(bundle, Description(**described | {"architecture": vgg6}), build_network(vgg6))
    return bundle


@pytest.mark.parametrize("command", ["train-default", "train-classes", "train-embedder", "anomalies", "suspects"])
@pytest.mark.parametrize(
    ("given", "message"),
    [("folder", "no .*alert"), ("bytes", "no .*alert"), ("absent", "absent: no such file or folder")],
)
def test_inputs_without_an_alert_are_an_error_in_one_line(
    command: str, given: str, message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "labels.csv").write_text("candid,weak_class\n1,VS\n2,SN\n3,asteroid\n4,bogus\n5,AGN\n")
    arguments = [command, str(tmp_path / given), "--out", str(tmp_path / "out")]
    if command == "train-default":
        arguments += ["--teacher", str(teacher)]
    else:
        arguments += ["--labels", str(tmp_path / "labels.csv")]
    arguments += ["--label", "weak_class"] if command == "suspects" else []
    assert main(arguments) == 1
    assert re.search(f"^training {command}: .*{message}", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-embedder", "x", "--labels", "x", "--out", "x", "--steps", "0"], "--steps: 0 is not a positive number"),
        (
            ["anomalies", "x", "--labels", "x", "--out", "x", "--rate", "4"],
            "--rate: 4 is not a fraction above 0 and at most 1",
        ),
        (["astrom3-simulate", "x", "--stars", "1", "-1", "1"], "--stars: -1 is not a positive number"),
        (["astrom3-simulate", "x", "--seed", "-1"], "--seed: -1 is not from 0 to"),
        (["build-dataset", "x", "--labels", "x", "--out", "x", "--seed", "-1"], "--seed: -1 is not from 0 to"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["fit", "pretrain", "study", "astrom3", "astrom3-study"])
@pytest.mark.parametrize("content", [b"", b"- 1\n", b"a: [1", bytes(range(256)), None])
def test_an_invalid_configuration_is_an_error_in_one_line(
    command: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "configuration.yaml"
    if content is not None:
        file.write_bytes(content)
    assert main([command, str(file)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"training {command}: {file}: ")


def test_the_configuration_of_fit_in_the_documentation_is_valid() -> None:
    text = TRAIN_PAGE.read_text()
    block = text[text.index("name: mine") :]
    config = Fit.model_validate(yaml.safe_load(block[: block.index("```")]))
    assert config.recipe.learning_rate == Fit.model_fields["recipe"].default.learning_rate
