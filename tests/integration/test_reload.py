"""A running service gets another configuration: it keeps its partitions, and no alert is lost, doubled or mixed up."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_filter.cli import main
from broker_filter.config_file import load_again, load_service
from broker_filter.local_kafka import embedded_broker
from broker_filter.reload import ServiceFile
from broker_filter.scoring.bundle import SHIPPED
from broker_filter.service import FilterService

from .conftest import PATIENCE_S, MakePipeline, Packets, RunningService, alert, headers, inputs


def revision(service: RunningService) -> str:
    """Return the revision of the configuration in service."""
    name = 'broker_filter_configuration_info{revision="'
    (line,) = [line for line in service.get("/metrics")[1].splitlines() if line.startswith(name)]
    return line.removeprefix(name).partition('"')[0]


def test_reload_replaces_models_and_filters_between_two_batches(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each record holds the models and filters of the one configuration that it names, and order is kept."""
    own = tmp_path / "own"
    shutil.copytree(SHIPPED / "curves", own)
    real, faint = {"name": "real", "where": "default.real > 0.5"}, {"name": "faint", "where": "magpsf > 19"}
    strict = real | {"where": "default.real > 0.9"}
    changes: list[dict[str, Any]] = [
        {"models": ["default"], "filters": [real]},
        {"models": ["default", str(own)], "filters": [real, faint]},
        {"models": ["default"], "filters": [strict, faint]},
        {"models": ["default"], "filters": [strict], "output": {"payload": "no_cutouts"}},
    ]
    with embedded_broker(tmp_path) as bootstrap:
        pipeline = make_pipeline(packets[:40], source=bootstrap)
        config = pipeline.config
        configurations = [config | one | {"output": config["output"] | one.get("output", {})} for one in changes]
        service = pipeline.start(**changes[0])
        service.wait_consumed(40)
        revisions = [revision(service)]
        for n, configuration in enumerate(configurations[1:], start=1):
            pipeline.send(packets[40 * n : 40 * n + 20])  # in flight during the reload
            service.reload(configuration)
            pipeline.send(packets[40 * n + 20 : 40 * n + 40])
            service.wait_consumed(40 * n + 40)
            revisions.append(revision(service))
        assert service.metric('reloads_total{outcome="succeeded"}') == len(changes) - 1, service.log
        assert len(set(revisions)) == len(changes)
        assert service.log.count("reading") == 2  # each of the two partitions was claimed once

        models = {one: ["default", "curves"] if i == 1 else ["default"] for i, one in enumerate(revisions)}
        filters = {one: [f["name"] for f in change["filters"]] for one, change in zip(revisions, changes, strict=True)}
        records = pipeline.read("scored", expected=40 * len(changes))
        assert set(inputs(records).values()) == {1}
        assert len(records) == 40 * len(changes)
        by_partition: dict[str, list[tuple[int, int]]] = defaultdict(list)
        passed: set[tuple[str, str, str]] = set()
        for record in records:
            annotation = alert(record.value())["broker_filter"]
            of = annotation["configuration"]
            assert [model["model"] for model in annotation["models"]] == models[of]
            assert [one["name"] for one in annotation["filters"]] == filters[of]
            place = headers(record)["input"]
            partition, _, offset = place.rpartition("/")
            by_partition[partition].append((int(offset), revisions.index(of)))
            passed |= {(one["name"], of, place) for one in annotation["filters"] if one["passed"]}
        for read in by_partition.values():
            in_order = [index for _, index in sorted(read)]
            assert in_order == sorted(in_order)
        published = pipeline.read("real", "faint", expected=len(passed))
        assert {
            (r.topic().rpartition(".")[2], alert(r.value())["broker_filter"]["configuration"], headers(r)["input"])
            for r in published
        } == passed
        assert len(published) == len(passed)

        pipeline.send(packets[:10])  # the window of duplicates has survived
        service.wait_consumed(40 * len(changes) + 10)
        assert service.metric("duplicate_alerts_total") == 10

        # A configuration that fails changes nothing, and the service says so as `config check` does.
        for broken, message in (
            ({"filters": [{"name": "real", "where": "default.reel > 0.5"}]}, "filters[0].where: "),
            ({"models": ["default", str(own)]}, "corrupted"),
            ({"input": config["input"] | {"group_id": "other"}}, "input.group_id: this key has changed"),
        ):
            if message == "corrupted":
                (own / "model.onnx").write_bytes(b"damaged")
            service.reload(configurations[-1] | broken)
            assert service.metric("last_reload_failed") == 1
            assert revision(service) == revisions[-1]
            status, text = service.get("/readyz")
            assert status == 200
            assert text.startswith("ok; the last reload failed, and the earlier configuration stays in service: ")
            assert message in text
            if "input" not in broken:
                assert main(["config", "check", str(service.path)]) == 2
                assert capsys.readouterr().err.removeprefix("broker-filter: ").strip() in text
            assert text.partition("service: ")[2].strip() in service.log

        # With `on_change`, a link that is replaced (as Kubernetes does) needs no signal.
        service.reload(configurations[-1] | {"reload": "on_change"})
        assert service.metric("last_reload_failed") == 0
        assert service.get("/readyz")[1] == "ok\n"
        (tmp_path / "next.yaml").write_text(
            yaml.safe_dump(configurations[0] | {"reload": "on_change", "http": {"port": service.port}})
        )
        link = tmp_path / "link.yaml"
        link.symlink_to(tmp_path / "next.yaml")
        link.rename(service.path)
        service.wait_until(lambda: revision(service) == revisions[0])
        assert service.end() == 0


def test_models_of_the_earlier_configuration_are_freed_although_no_alert_comes(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path
) -> None:
    with embedded_broker(tmp_path) as bootstrap:
        pipeline = make_pipeline(packets[:40], source=bootstrap)
        path = tmp_path / "service.yaml"
        path.write_text(yaml.safe_dump(pipeline.config | {"http": {"port": 0}}))
        stop, requested = threading.Event(), threading.Event()
        service = FilterService(load_service(path), stop, ServiceFile(path, requested, load_again))
        networks = [weakref.ref(part.network) for model in service._generation.scorer.models for part in model.parts]
        gc.freeze()  # as the command `run` does: the garbage collector cannot help
        thread = threading.Thread(target=service.run)
        thread.start()
        try:
            assert len(pipeline.read("scored", expected=40)) == 40
            requested.set()
            deadline = time.monotonic() + PATIENCE_S
            while any(network() for network in networks) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert [network() for network in networks] == [None] * len(networks)
            assert service._generation.scorer.models
        finally:
            stop.set()
            thread.join(PATIENCE_S)
            gc.unfreeze()
