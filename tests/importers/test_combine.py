"""Networks of several bundles in one bundle, by the command and by its function."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from broker_filter.cli import main
from broker_filter.importers.combine import combine_bundles
from broker_filter.scoring.bundle import CARD, BundleError, open_bundle

BOTH = ["--name", "both", "--version", "3.0", "--out"]


def test_the_command_writes_a_bundle_that_says_which_network_scores_which_survey(
    lsst_network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    assert main(["models", "combine", "--ztf", "default", "--lsst", str(lsst_network), *BOTH, str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: bundle both 3.0 written and verified; it gives real\n"

    assert main(["models", "list", str(out)]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:4] == ["both", "3.0", "ztf:stampnet;lsst:stampnet", "both.real"]

    assert main(["models", "show", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "both 3.0: ztf: real/bogus classification; lsst: real/bogus classification of LSST alerts" in shown
    assert "ztf by default 2.0 in ztf/ lsst by deep 1 in lsst/" in shown
    assert "both.real > 0.5 (ztf), both.real > 0.4 (lsst)" in shown
    assert "variance" in shown

    assert main(["models", "verify", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["for ztf", "for lsst"] * 2


def test_the_bundle_is_complete_in_itself(both_surveys: Path) -> None:
    files = {str(path.relative_to(both_surveys)) for path in both_surveys.rglob("*") if path.is_file()}
    listed = {f"{part.directory.name}/{name}" for part in open_bundle(both_surveys).parts for name in part.card.files}
    assert files == {CARD, f"ztf/{CARD}", f"lsst/{CARD}", *listed}
    assert not any(path.is_symlink() for path in both_surveys.rglob("*"))


def test_a_network_of_a_combined_bundle_can_be_combined_again(both_surveys: Path, tmp_path: Path) -> None:
    combine_bundles(tmp_path / "again", "again", "3.1", {"ztf": both_surveys, "lsst": both_surveys}, "real/bogus")
    old, new = open_bundle(both_surveys), open_bundle(tmp_path / "again")
    assert [part.card for part in new.parts] == [part.card for part in old.parts]
    assert new.weights_sha256 == old.weights_sha256
    assert new.card.task == "real/bogus"


def test_a_network_that_scores_two_surveys_is_copied_once(embedding_bundle: Path, tmp_path: Path) -> None:
    wide = shutil.copytree(embedding_bundle, tmp_path / "wide")
    card = yaml.safe_load((wide / CARD).read_text()) | {"surveys": ["ztf", "lsst"]}
    (wide / CARD).write_text(yaml.safe_dump(card))
    combine_bundles(tmp_path / "one", "one", "1", {"ztf": wide, "lsst": wide})
    assert [part.surveys for part in open_bundle(tmp_path / "one").parts] == [("ztf", "lsst")]


def test_bundles_that_cannot_be_combined_are_refused_in_one_line(
    lsst_network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cases = {
        "no network given; use --ztf and --lsst": [],
        "has no network for lsst, only for ztf": ["--ztf", "default", "--lsst", "classes"],
        "no label is given by every network: real of embedder 1.1 was not trained for lsst": ["--lsst", "embedder"],
        "not the name of a shipped bundle": ["--ztf", "defualt", "--lsst", str(lsst_network)],
    }
    for problem, networks in cases.items():
        assert main(["models", "combine", *networks, *BOTH, str(out)]) != 0
        complaint = capsys.readouterr().err
        assert problem in complaint
        assert complaint.count("\n") == 1
        assert not out.exists()
    arguments = ["models", "combine", "--lsst", str(lsst_network), "--name", "a-b", "--version", "1", "--out", str(out)]
    assert main(arguments) != 0
    assert "name: String should match pattern" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError, match="exists already"):
        combine_bundles(tmp_path, "both", "1", {"lsst": lsst_network})
