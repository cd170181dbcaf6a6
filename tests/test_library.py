"""The public names of the library: few, typed, documented by examples that run, and imported when they are used."""

from __future__ import annotations

import ast
import doctest
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import broker_filter
from broker_filter import Packet, Scorer, read_packets, score_archive
from broker_filter.cli import main
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.archives import InputError, NoInputError
from docs.library_examples import write_example_night

HEAVY = ("astropy", "confluent_kafka", "fastavro", "numpy", "onnxruntime", "pyarrow", "pydantic", "torch", "yaml")
MOST_NAMES = 11


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`night.tar` with five simulated alerts and `alert.avro` with the first of them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_example_night(tmp_path)
    return tmp_path / "night.tar"


def run_python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_the_package_imports_nothing_heavy() -> None:
    program = f"import broker_filter, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(program) == "[]\n"


def test_a_decoder_needs_no_configuration_model() -> None:
    heavy = ("broker_filter.config", "pydantic", "onnxruntime", "confluent_kafka")
    program = f"import sys; from broker_filter import Decoder; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(program) == "[]\n"


def test_at_most_eleven_names_are_public_and_each_can_be_imported() -> None:
    assert len(broker_filter.__all__) <= MOST_NAMES
    assert set(broker_filter.__all__) < set(dir(broker_filter))
    for name in broker_filter.__all__:
        assert getattr(broker_filter, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Scorrer'"):
        broker_filter.Scorrer  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    tree = ast.parse(Path(broker_filter.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert seen == {name: f"broker_filter.{module}" for name, module in broker_filter._MODULES.items()}
    assert sorted(seen) == sorted(broker_filter.__all__)
    assert Path(broker_filter.__file__).with_name("py.typed").exists()


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize("name", ["broker_filter", *broker_filter.__all__])
def test_every_public_name_has_examples_that_run(name: str) -> None:
    """The examples of a class's methods run, too."""
    value = broker_filter if name == "broker_filter" else getattr(broker_filter, name)
    runner, report = doctest.DocTestRunner(), io.StringIO()
    own, *methods = sorted(doctest.DocTestFinder().find(value, name, globs={}), key=lambda found: found.name)
    assert own.name == name
    assert own.examples, f"{name} has no example"
    for found in (own, *methods):
        runner.run(found, out=report.write)
    assert runner.failures == 0, report.getvalue()


def test_score_archive_gives_the_table_that_the_command_writes(night: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.avro").write_bytes(b"Obj\1")
    inputs = [night, tmp_path / "broken.avro"]
    reader = score_archive(inputs, ["default", "embedder"])
    assert isinstance(reader, pa.RecordBatchReader)
    table = reader.read_all()

    out = tmp_path / "out.parquet"
    command = ["score", *map(str, inputs), "--model", "default", "--model", "embedder", "--out", str(out)]
    assert main([*command, "--quiet"]) == 0

    assert table.to_pylist() == pq.read_table(out).to_pylist()
    assert table["status"].to_pylist() == ["scored"] * 5 + ["rejected"]


def test_score_archive_takes_an_open_scorer_and_gives_its_scores(night: Path) -> None:
    scorer = Scorer.open("default")
    alerts, rejects = scorer.decoder().decode(list(read_packets(night)))
    assert rejects == []
    scores = scorer.score(alerts).columns()["default.real"]
    np.testing.assert_array_equal(score_archive(night, scorer).read_all()["default__real"].to_numpy(), scores)


def test_score_archive_gives_only_the_alerts_that_pass_a_filter(night: Path) -> None:
    scorer = Scorer.open("default")
    everything = score_archive(night, scorer).read_all()
    middle = float(np.median(everything["default__real"].to_numpy()))
    chosen = score_archive(night, scorer, where=f"real > {middle}").read_all()
    assert chosen.equals(everything.filter(pc.greater(everything["default__real"], middle)))
    assert 0 < chosen.num_rows < everything.num_rows


def test_lsst_packets_are_decoded_with_a_directory_of_schemas(tmp_path: Path) -> None:
    for alert in simulate_night(2, seed=2, survey="lsst"):
        (tmp_path / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    scorer = Scorer.open("default", also=["lsst"])
    table = score_archive(tmp_path, scorer, schema_registry=SCHEMAS).read_all()
    assert table["status"].to_pylist() == ["scored"] * 2
    assert table["default__real"].null_count == 0
    assert score_archive(tmp_path, scorer).read_all()["reject_reason"].to_pylist() == ["unknown_schema_id"] * 2


def test_score_archive_raises_our_errors(night: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoInputError, match="no such file"):
        score_archive(tmp_path / "no-such-night.tar")

    reader = score_archive(night)
    night.unlink()  # the input is opened when the first row is requested
    with pytest.raises(InputError, match=r"night\.tar: No such file"):
        reader.read_all()


def test_files_to_skip_are_not_read(night: Path, tmp_path: Path) -> None:
    assert [packet.position.path for packet in read_packets(tmp_path, skip=[night])] == [str(tmp_path / "alert.avro")]


def test_a_packet_without_a_position_is_decoded() -> None:
    alerts, [reject] = Scorer.open().decoder().decode([Packet(b"no alert")])
    assert len(alerts) == 0
    assert str(reject.packet.position) == "<memory>"
