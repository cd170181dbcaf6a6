"""A small simulated night with true labels, and a data set of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("galsim", reason="simulated alerts need the extra `demo`")

from broker_filter.bench.rows import PRIMITIVES, arrow_type
from broker_filter.scoring.labels import Labels, parse_rule, read_labels
from broker_filter.simulate import SimulatedAlert, simulate_night
from training.data.build_dataset import build_dataset
from training.data.datasets import Dataset


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: more do not speed up such small networks, and slow down tests that run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kill_training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs `train` and ends it with SystemExit before the first step for which `when` is true.

    `learner`: the class of the learner. `when`: takes the learner and the number of the batch in the epoch.
    """

    def kill(learner: type[Any], when: Callable[[Any, int], bool], train: Callable[[], object]) -> None:
        step = learner.training_step

        def training_step(self: Any, batch: tuple[torch.Tensor, ...], i: int) -> torch.Tensor:
            if when(self, i):
                raise SystemExit
            return step(self, batch, i)

        with monkeypatch.context() as patch:
            patch.setattr(learner, "training_step", training_step)
            with pytest.raises(SystemExit):
                train()

    return kill


@pytest.fixture(scope="session")
def alerts_of_the_night() -> list[SimulatedAlert]:
    """Sixty alerts, nearly all of different objects."""
    return list(simulate_night(60, seed=5))


@pytest.fixture(scope="session")
def night_packets(alerts_of_the_night: list[SimulatedAlert], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packets of the night."""
    directory = tmp_path_factory.mktemp("packets")
    for alert in alerts_of_the_night:
        (directory / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    return directory


@pytest.fixture(scope="session")
def night_parquet(night_packets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file with the alerts of the night as rows, in the order of `night_packets`."""
    readers = [fastavro.reader(io.BytesIO(file.read_bytes())) for file in sorted(night_packets.iterdir())]
    columns = arrow_type(readers[0].writer_schema, {**PRIMITIVES})
    table = pa.Table.from_pylist([next(reader) for reader in readers], schema=pa.schema(columns.fields))
    path = tmp_path_factory.mktemp("rows") / "night.parquet"
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="session")
def night_table(alerts_of_the_night: list[SimulatedAlert], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of true labels: the column `truth` is sky or detector."""
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["candid", "truth"])
        table.writerows((alert.alert_id, "sky" if alert.is_real else "detector") for alert in alerts_of_the_night)
    return path


@pytest.fixture(scope="session")
def night_labels(night_table: Path) -> Labels:
    """Labels of two classes, bogus and real."""
    return read_labels(night_table, "truth", [parse_rule("bogus=detector"), parse_rule("real=sky")])


@pytest.fixture(scope="session")
def night_dataset(night_packets: Path, night_labels: Labels, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The night as a data set of these two classes."""
    return build_dataset([night_packets], night_labels, tmp_path_factory.mktemp("sets") / "night")
