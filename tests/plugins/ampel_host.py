"""`make plugins`: the units for AMPEL run in AMPEL itself, with the results of this package.

AMPEL and its dependencies have an environment of their own: `write` runs in the environment of the tests, and `check`
in the other one, in which this package and `deploy/ampel` are installed. MongoDB is replaced by mongomock.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

ALERTS = 150
"""More than two batches of the supplier."""
BAD = {7: b"", 70: b"no alert"}
"""Packets that neither AMPEL nor this package can read, by their place among the packets."""
BLANK = 11
"""Place of an alert whose science cutout is empty: AMPEL can read it, and no model can score it."""
NIGHT = "night.tar"
EXPECTED = "expected.json"
PROCESS = Path(__file__).parents[2] / "deploy" / "ampel" / "process.yml"
"""The process of AMPEL that the documentation shows. Its loader is replaced here, and nothing else."""


def write(directory: Path) -> None:
    """Write an archive of simulated packets, and the scores of all its alerts as `score_archive` gives them."""
    import fastavro

    from broker_filter import score_archive
    from broker_filter.simulate import simulate_night

    directory.mkdir(parents=True, exist_ok=True)
    packets = [alert.packet for alert in simulate_night(ALERTS, seed=7)]
    reader = fastavro.reader(io.BytesIO(packets[BLANK]))
    (record,) = reader
    record["cutoutScience"]["stampData"] = b""
    emptied = io.BytesIO()
    fastavro.writer(emptied, reader.writer_schema, [record])
    packets[BLANK] = emptied.getvalue()
    for place, data in BAD.items():
        packets.insert(place, data)
    with tarfile.open(directory / NIGHT, "w") as archive:
        for i, packet in enumerate(packets):
            member = tarfile.TarInfo(f"{i}.avro")
            member.size = len(packet)
            archive.addfile(member, io.BytesIO(packet))
    readable = [next(fastavro.reader(io.BytesIO(packet))) for i, packet in enumerate(packets) if i not in BAD]
    magnitudes = {alert["candid"]: alert["candidate"]["magpsf"] for alert in readable}
    rows = [row for row in score_archive(directory / NIGHT).read_all().to_pylist() if row["alert_id"] in magnitudes]
    expected = [
        [row["alert_id"], row["default__real"], row["reject_reason"], magnitudes[row["alert_id"]]] for row in rows
    ]
    (directory / EXPECTED).write_text(json.dumps(expected))


def check(directory: Path) -> None:
    """Raise AssertionError if AMPEL does not give the expected alerts and scores."""
    expected = json.loads((directory / EXPECTED).read_text())
    context = _context(directory)
    _check_supplier(directory, expected)
    _check_a_missing_model(directory)
    _check_consumer(context, directory, expected)


def _context(directory: Path) -> Any:
    """Return an AMPEL context with all units that AMPEL finds, and check that the plugin's are among them."""
    import mongomock
    from ampel.config.builder.DisplayOptions import DisplayOptions
    from ampel.config.builder.DistConfigBuilder import DistConfigBuilder
    from ampel.core import AmpelDB
    from ampel.dev.DevAmpelContext import DevAmpelContext
    from mongomock.collection import BulkOperationBuilder

    # Units of other packages may lack a package, which AMPEL counts as an error.
    builder = DistConfigBuilder(options=DisplayOptions(), ignore_exc=["ModuleNotFoundError"])
    builder.load_distributions()
    config = builder.build_config(stop_on_errors=0, config_validator=None, get_unit_env=False)
    for unit in ("ScoringAlertSupplier", "ScoreFilter"):
        assert config["unit"][unit]["fqn"] == f"ampel.broker_filter.{unit}", config["unit"].get(unit)
    (directory / "ampel.json").write_text(json.dumps(config, default=str))
    AmpelDB.MongoClient = mongomock.MongoClient
    mongomock.codec_options.is_supported = lambda *_: None
    create, add = mongomock.Database.create_collection, BulkOperationBuilder.add_update
    # mongomock refuses options of collections, and does not know the argument `sort` of later pymongo.
    mongomock.Database.create_collection = lambda self, name, **_: create(self, name)
    BulkOperationBuilder.add_update = lambda self, *given, sort=None, **named: add(self, *given, **named)
    return DevAmpelContext.load(config=str(directory / "ampel.json"), purge_db=True)


def _loader(directory: Path) -> dict[str, Any]:
    return {"unit": "TarAlertLoader", "config": {"file_path": str(directory / NIGHT), "tar_mode": "r:"}}


def _supplier(directory: Path, **config: Any) -> dict[str, Any]:
    return {"unit": "ScoringAlertSupplier", "config": {"loader": _loader(directory), "fields": ["magpsf"], **config}}


def _check_supplier(directory: Path, expected: list[Any]) -> None:
    """Alerts come in order, one each, with the expected scores, whatever the batch is."""
    from ampel.abstract.AbsAlertSupplier import AbsAlertSupplier
    from ampel.base.AuxUnitRegister import AuxUnitRegister
    from ampel.model.UnitModel import UnitModel
    from ampel.protocol.AmpelAlertProtocol import AmpelAlertProtocol

    for batch in (1, 64, 1000):
        model = UnitModel(**_supplier(directory, batch=batch))
        with AuxUnitRegister.new_unit(model, sub_type=AbsAlertSupplier) as supplier:
            alerts = list(supplier)
        found = []
        for alert in alerts:
            assert isinstance(alert, AmpelAlertProtocol)
            assert alert.extra["name"].startswith("ZTF")
            entry = alert.extra["broker_filter"]
            real = entry["scores"].get("default", {}).get("real")
            found.append([alert.id, real, entry.get("reject", {}).get("reason"), entry.get("fields", {}).get("magpsf")])
        assert len(found) == ALERTS
        assert found[BLANK][1:] == [None, "missing_cutout", None]
        assert [row[:3] for row in found] == [row[:3] for row in expected]
        assert all(mine[3] == theirs[3] for mine, theirs in zip(found, expected, strict=True) if mine[2] is None)
        print(f"batch {batch}: {len(found)} alerts in order, scores equal to those of score_archive")


def _check_a_missing_model(directory: Path) -> None:
    """A worker without the model stops at once, with one clear error."""
    from ampel.base.AuxUnitRegister import AuxUnitRegister
    from ampel.model.UnitModel import UnitModel

    refusal = None
    try:
        AuxUnitRegister.new_unit(UnitModel(**_supplier(directory, models=["absent"])))
    except Exception as error:
        refusal = str(error)
    assert refusal is not None, "a missing model was accepted"
    assert "absent: not a bundle" in refusal, refusal
    print("a missing model is refused when the supplier is made")


def _check_consumer(context: Any, directory: Path, expected: list[Any]) -> None:
    """AMPEL's AlertConsumer ingests the alerts that the filter accepts, with their scores in the journal."""
    import yaml
    from ampel.alert.AlertConsumer import AlertConsumer
    from ampel.model.ProcessModel import ProcessModel

    process = yaml.safe_load(PROCESS.read_text())
    ProcessModel(**process)
    config = process["processor"]["config"]
    config["supplier"]["config"]["loader"] = _loader(directory)
    context.add_channel("REAL")
    consumer = AlertConsumer(context=context, process_name=process["name"], raise_exc=True, **config)
    assert consumer.run() == ALERTS
    journal = [entry for stock in context.db.get_collection("stock").find({}) for entry in stock["journal"]]
    found = {entry["alert"]: entry["real"] for entry in journal if "alert" in entry}
    accepted = {row[0]: row[1] for row in expected if row[1] is not None and row[1] > 0.5 and row[3] < 19.5}
    assert found == accepted, (len(found), len(accepted))
    assert 0 < len(accepted) < ALERTS
    print(f"AlertConsumer: {len(found)} of {ALERTS} alerts accepted by the filter, scores in the journal")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
