"""`python -m training`: its commands, its errors in a line, and the configuration that README shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from training.__main__ import COMMANDS, main
from training.data.datasets import Dataset
from training.recipe import Fit

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("command", ["build-dataset", "evaluate"])
def test_a_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: python -m training {command}" in capsys.readouterr().out


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["nonsense"]) == 2
    listed = capsys.readouterr().err
    assert all(f"  {command} " in listed for command in COMMANDS)


def test_builds_a_data_set(night_packets: Path, night_table: Path, tmp_path: Path) -> None:
    arguments = ["build-dataset", str(night_packets), "--labels", str(night_table), "--label", "truth"]
    classes = ["--class", "bogus=detector", "--class", "real=sky", "--shares", "0.1", "0.2"]
    assert main([*arguments, *classes, "--out", str(tmp_path / "set")]) == 0
    card = Dataset.open(tmp_path / "set").card
    assert card.classes == ("bogus", "real")
    assert (card.split.validation, card.split.test) == (0.1, 0.2)


@pytest.mark.parametrize("options", [["--shares", "0.6", "0.3"], ["--shares", "nan", "0.1"], ["--cutout-size", "0"]])
def test_what_a_data_set_cannot_be_is_bad_usage(
    options: list[str], night_packets: Path, night_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["build-dataset", str(night_packets), "--labels", str(night_table), "--out", str(tmp_path), *options])
    assert f"error: argument {options[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_no_threads_evaluate_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "default", "--dataset", str(tmp_path), "--out", str(tmp_path), "--threads", "0"])
    assert "error: argument --threads: 0 is not a positive number" in capsys.readouterr().err.splitlines()[-1]


def test_an_error_is_one_line(night_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build-dataset", str(tmp_path), "--labels", str(night_table), "--out", str(tmp_path / "set")]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"training build-dataset: {night_table}: no column 'label'; there are candid, truth"
    assert main(["fit", str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().err.splitlines()[-1]


def test_the_configuration_in_readme_is_one() -> None:
    text = README.read_text()
    block = text[text.index("name: mine") :]
    config = Fit.model_validate(yaml.safe_load(block[: block.index("```")]))
    assert config.recipe.learning_rate == Fit.model_fields["recipe"].default.learning_rate
