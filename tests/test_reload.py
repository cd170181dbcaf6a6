"""When a running service reads its file again, and what it does with the outcome."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_filter.config import RELOADED, Service, changed_keys
from broker_filter.config_file import ConfigError, document_keys, load_again, load_service
from broker_filter.health import Health
from broker_filter.metrics import Metrics
from broker_filter.packets.batch import Survey
from broker_filter.packets.schemas.registry import NoRegistry
from broker_filter.reload import LOOK_INTERVAL_S, RETRY_INTERVAL_S, Reloader, ServiceFile
from broker_filter.scoring.bundle import SHIPPED
from broker_filter.streaming.generation import Generation, open_generation
from broker_filter.streaming.resolved import ResolvedService

NEVER_S = 0.0
"""Time to wait for a request in tests that have none."""


class Reloads:
    """A reloader of a service file, with the generations that it has put into service."""

    def __init__(self, directory: Path, **keys: Any) -> None:
        self.file = ServiceFile(directory / "service.yaml", threading.Event(), load_again)
        self.write(**keys)
        self.metrics, self.health = Metrics(), Health()
        self.now = 0.0
        self.installed: list[Generation] = []
        self.before_install: Callable[[], None] = lambda: None
        self.service = load_service(self.file.path)
        self.reloader = Reloader(self.file, self.service, self.metrics, self.health, lambda: self.now)

    def write(self, **keys: Any) -> None:
        """Replace the service file."""
        sections = {
            "input": {"bootstrap_servers": "survey:9092", "group_id": "me", "topics": ["ztf"], "start": "earliest"},
            "output": {"prefix": "me"},
        }
        new = self.file.path.with_suffix(".new")
        new.write_text(yaml.safe_dump(sections | keys))
        new.rename(self.file.path)

    def build(self, service: ResolvedService) -> Generation:
        built = open_generation(service, NoRegistry())
        self.before_install()
        return built

    def request(self) -> None:
        """Request a reload, and let the reloader do it."""
        self.file.requested.set()
        self.run_once()

    def run_once(self) -> None:
        """Let the reloader work once."""
        self.reloader.run_once(NEVER_S, self.build, self.installed.append)

    def look(self, seconds: float = LOOK_INTERVAL_S) -> None:
        """Let the reloader work some seconds later, without a request."""
        self.now += seconds
        self.run_once()

    @property
    def outcomes(self) -> tuple[float, float]:
        """The number of reloads that succeeded and that failed."""
        text = self.metrics.exposition().decode()
        found = dict(
            line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("broker_filter_reloads_total")
        )
        succeeded, failed = (
            float(found[f'broker_filter_reloads_total{{outcome="{one}"}}']) for one in ("succeeded", "failed")
        )
        return succeeded, failed


def test_requests_during_a_reload_lead_to_one_more_reload_of_the_last_file(tmp_path: Path) -> None:
    reloads = Reloads(tmp_path)

    def request_twice() -> None:
        if not reloads.installed:
            for name in ("second", "third"):
                reloads.write(filters=[{"name": name, "where": "magpsf < 18"}])
                reloads.file.requested.set()

    reloads.before_install = request_twice
    reloads.write(filters=[{"name": "first", "where": "magpsf < 18"}])
    reloads.file.requested.set()
    for _ in range(3):
        reloads.run_once()
    assert [one.name for built in reloads.installed for one in built.config.filters] == ["first", "third"]
    assert reloads.outcomes == (2, 0)


def test_bundle_that_changes_while_it_is_loaded_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "curves", tmp_path / "own")
    reloads = Reloads(tmp_path, models=[str(tmp_path / "own")])
    reloads.before_install = (tmp_path / "own" / "weights.safetensors").touch
    reloads.request()
    assert reloads.installed == []
    assert "own/weights.safetensors changed during the reload" in reloads.health.note


def test_with_on_signal_a_changed_file_is_not_read_before_a_request(tmp_path: Path) -> None:
    reloads = Reloads(tmp_path)
    reloads.write(duplicates="drop")
    for _ in range(3):
        reloads.look()
    assert reloads.installed == []
    reloads.request()
    assert reloads.installed[-1].config.duplicates == "drop"


def test_with_on_change_a_file_or_bundle_is_read_when_two_looks_find_the_same_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(SHIPPED / "curves", tmp_path / "own")
    keys = {"reload": "on_change", "models": [str(tmp_path / "own")]}
    reloads = Reloads(tmp_path, **keys)
    reloads.look()
    reloads.look()
    assert reloads.outcomes == (0, 0)

    reloads.write(**keys, duplicates="drop")
    reloads.look()
    assert reloads.outcomes == (0, 0)  # it may be half written
    reloads.look(LOOK_INTERVAL_S / 2)
    assert reloads.outcomes == (0, 0)
    reloads.look()
    assert reloads.outcomes == (1, 0)

    card = tmp_path / "own" / "bundle.yaml"
    text = card.read_text()
    (tmp_path / "own" / "model.onnx").write_bytes(b"damaged")
    reloads.look()
    reloads.look()
    assert reloads.outcomes == (1, 1)
    assert "model.onnx" in reloads.health.note
    for _ in range(3):
        reloads.look()
    assert reloads.outcomes == (1, 1)  # nothing has changed since
    reloads.look(RETRY_INTERVAL_S)
    assert reloads.outcomes == (1, 2)
    assert caplog.text.count("the reload failed") == 1  # it says nothing new
    reloads.request()
    assert caplog.text.count("the reload failed") == 2

    shutil.copytree(SHIPPED / "curves", tmp_path / "own", dirs_exist_ok=True)
    card.write_text(text.replace("version:", "# another card\nversion:"))
    reloads.look()
    reloads.look()
    assert reloads.outcomes == (2, 3)
    assert reloads.health.note == ""
    assert len({one.revision for one in reloads.installed}) == 2


def test_a_fault_in_a_reload_is_logged_with_its_traceback_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reloads = Reloads(tmp_path)

    def fault() -> None:
        raise ZeroDivisionError("a fault")

    reloads.before_install = fault
    reloads.request()
    assert reloads.installed == []
    assert reloads.outcomes == (0, 1)
    assert "Traceback (most recent call last)" in caplog.text
    reloads.before_install = lambda: None
    reloads.request()
    assert reloads.outcomes == (1, 1)


def test_each_key_that_needs_a_restart_is_named(tmp_path: Path) -> None:
    reloads = Reloads(tmp_path)
    reloads.write(
        output={"prefix": "other", "payload": "scores", "kafka": {"linger.ms": 7}},
        http={"port": 1},
        runtime={"decode_threads": 3, "inference_threads": 1},
        duplicates="drop",
    )
    with pytest.raises(ConfigError) as refused:
        load_again(reloads.file.path, reloads.service.config)
    assert [problem.path for problem in refused.value.problems] == [
        "output.prefix",
        "output.kafka",
        "runtime.decode_threads",
        "http.port",
    ]


def test_keys_that_a_running_service_can_change_exist() -> None:
    paths = {path for path, _, _ in document_keys()}
    assert paths >= RELOADED
    config = Service.model_validate(
        {
            "input": {"bootstrap_servers": "survey:9092", "group_id": "me", "topics": ["ztf"]},
            "output": {"prefix": "me"},
        }
    )
    assert list(changed_keys(config, config.model_copy(deep=True))) == []


def test_a_generation_is_freed_when_its_last_user_drops_it_but_its_thresholds_go_on(
    tmp_path: Path, reference_file: Path
) -> None:
    """Without the garbage collector: the first generation is frozen (`gc.freeze`), so that it finds no cycles in it."""
    reloads = Reloads(tmp_path, anomalies={"reference": str(reference_file)})
    first: Generation | None = open_generation(reloads.service, NoRegistry())
    assert first is not None
    second = open_generation(reloads.service, NoRegistry(), before=first)
    assert first.judge is not None
    assert second.judge is not None
    assert second.judge._surveys[Survey.ZTF][1] is first.judge._surveys[Survey.ZTF][1]  # the threshold goes on
    held = [first, first.judge, *first.scorer.models[0].parts, first.router]
    freed = [weakref.ref(one) for one in held if hasattr(type(one), "__weakref__")]
    networks = [weakref.ref(part.network) for model in first.scorer.models for part in model.parts]
    gc.disable()
    try:
        del first, held
        assert [one() for one in (*freed, *networks)] == [None] * (len(freed) + len(networks))
    finally:
        gc.enable()
    assert len(freed) >= 3
