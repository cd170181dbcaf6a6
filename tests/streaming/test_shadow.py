"""Shadow models are scored beside the serving ones, and change nothing in the records of the serving ones."""

from __future__ import annotations

import io
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
import yaml

from broker_filter.cli import main
from broker_filter.config import Runtime, Service
from broker_filter.config_file import ConfigError, load_service
from broker_filter.kafka.sink import UnaccountedError, divide
from broker_filter.kafka.source import Delivery
from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.packets.schemas.registry_client import RegistryUnavailable
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.scorer import open_model
from broker_filter.scoring.scores import ModelScores
from broker_filter.simulate import simulate_night
from broker_filter.streaming.account import account_batch
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.encoding import (
    Body,
    ContainerFraming,
    Encoder,
    Framing,
    OutputRecord,
    OutputSchema,
    RegistryRefusalError,
)
from broker_filter.streaming.filtering import score_alerts
from broker_filter.streaming.generation import open_generation
from broker_filter.streaming.resolved import resolve
from broker_filter.streaming.routing import REGISTRY_REST_S, Router
from broker_filter.streaming.scored import LeftOut, ScoredBatch
from broker_filter.streaming.shadow import ShadowScorer, counterpart

from ..shadow_bundle import write_next_default

NAN = float("nan")
N = 12
"""Alerts of the night."""


@pytest.fixture(scope="module")
def next_default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_next_default(tmp_path_factory.mktemp("bundles") / "next")


def service(shadows: Sequence[Path], **sections: Any) -> Service:
    models = ["default", *({"bundle": str(bundle), "shadow": True} for bundle in shadows)]
    source = {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]}
    return Service.model_validate({"input": source, "output": {"prefix": "me"}, "models": models, **sections})


def record(value: bytes) -> dict[str, Any]:
    (one,) = fastavro.reader(io.BytesIO(value))
    assert isinstance(one, dict)
    return one


def test_a_new_version_beside_the_old_one_changes_no_record_of_the_serving_model(
    next_default: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filters = [{"name": "sure", "where": "real > 0.5"}]
    packets = [
        Packet(alert.packet, KafkaPosition("c", "ztf", 0, i)) for i, alert in enumerate(simulate_night(N, seed=1))
    ]
    generation = open_generation(resolve(service([next_default], filters=filters)), open_registry(None))

    def score(decoder: Decoder) -> ScoredBatch:
        window = DuplicateWindow(100)
        return score_alerts(*decoder.decode(packets), generation.scorer, window, filters=generation.filters)

    def route(scored: ScoredBatch) -> tuple[list[OutputRecord], dict[str, list[Any]]]:
        routed, records = generation.router.route(scored), defaultdict(list)
        for one in routed.records:
            records[one.topic].append(record(one.value))
        return routed.records, records

    _, alone = route(score(generation.scorer.decoder(columns=generation.filters.columns)))
    beside, outcomes = generation.shadows.score(score(generation.decoder))
    routed, records = route(beside)
    assert alone.keys() == {"me.scored", "me.sure"}
    assert {topic: len(of_topic) for topic, of_topic in records.items()} == {
        "me.scored": N,
        "me.sure": len(alone["me.sure"]),
        "me.shadow": N,
    }
    for topic, of_topic in alone.items():
        for old, new in zip(of_topic, records[topic], strict=True):
            assert old["broker_filter"] | {"scored_at": 0} == new["broker_filter"] | {"scored_at": 0}

    [outcome] = outcomes
    pairs = []
    for alert, old in zip(records["me.shadow"], records["me.scored"], strict=True):
        first, second = alert["broker_filter"]["models"]
        assert [first] == old["broker_filter"]["models"]
        assert (first["model"], first["shadow"]) == ("default", False)
        assert (second["model"], second["version"], second["shadow"]) == ("default", "9.0", True)
        assert alert["broker_filter"]["filters"] == old["broker_filter"]["filters"]
        pairs.append((first["outputs"]["real"], second["outputs"]["real"]))
    old_real, new_real = np.array(pairs).T
    assert (outcome.model, outcome.version, outcome.scored, outcome.failed) == ("default", "9.0", N, 0)
    [difference] = outcome.differences
    assert (difference.label, difference.compared) == ("real", N)
    assert difference.absolute == pytest.approx(np.abs(new_real - old_real).sum(), rel=1e-5)
    assert difference.disagreeing == np.count_nonzero((new_real >= 0.5) != (old_real >= 0.5))
    assert difference.absolute > 0
    headers = {one.topic: dict(one.headers)["models"] for one in routed}
    serving = f"default={open_bundle('default').card.version}"
    assert (headers["me.scored"], headers["me.shadow"]) == (serving.encode(), f"{serving},default=9.0".encode())

    for i, one in enumerate(routed):
        if one.topic == "me.shadow":
            (tmp_path / f"{i}.avro").write_bytes(one.value)
    page = tmp_path / "page.html"
    assert main(["compare-shadow", str(tmp_path), "--out", str(page)]) == 0
    of_ztf = sum("objectId" in alert for alert in records["me.shadow"])
    assert f"  {of_ztf} alerts, correlation" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<img ") == 3 * text.count("S/N ") > 0  # three cutouts for each example
    for column in ("magnitude", "signal-to-noise ratio"):
        assert f"<th>{column}<th>alerts" in text


def test_a_service_file_may_name_two_versions_but_not_the_same_shadow_twice(tmp_path: Path, next_default: Path) -> None:
    def load(models: list[Any], **more: Any) -> list[str]:
        file = tmp_path / "service.yaml"
        source = {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]}
        file.write_text(yaml.safe_dump({"input": source, "output": {"prefix": "me"}, "models": models, **more}))
        try:
            return load_service(file).config.output_topics
        except ConfigError as error:
            return list(map(str, error.problems))

    shadow = {"bundle": str(next_default), "shadow": True}
    assert load(["default", shadow]) == ["me.scored", "me.shadow", "me.dead-letter"]
    assert load(["default", shadow, shadow]) == [
        "models: more than one shadow has the name and version default 9.0; change the version of one"
    ]
    assert load([shadow]) == ["models: all models are shadows: add the bundle to score with, without `shadow`"]
    assert load(["default", {"bundle": "./absent", "shadow": True}])[0].startswith("models[1]")
    hidden = load(
        ["default", {"bundle": "classes", "shadow": True}], filters=[{"name": "a", "where": "classes.SN > 0"}]
    )
    assert hidden[0].startswith("filters[0].where")
    named = load(["default"], filters=[{"name": "shadow", "where": "real > 0"}])
    assert named == ["filters[0].name: 'shadow' is one of the service's own topics"]


def test_a_shadow_is_compared_with_its_namesake_or_else_with_the_first_that_has_the_label() -> None:
    serving = {"fast": ("real",), "default": ("real", "SN"), "classes": ("SN",)}
    assert counterpart("default", "real", serving) == "default"
    assert counterpart("new", "real", serving) == "fast"
    assert counterpart("classes", "real", serving) == "fast"
    assert counterpart("new", "AGN", serving) is None


def test_a_shadow_that_raises_is_logged_and_the_others_go_on(
    make_alerts: Callable[..., AlertBatch],
    make_scored: Callable[..., ScoredBatch],
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    failing = open_model("classes", Runtime())  # needs metadata that these alerts were decoded without
    working = open_model("attention", Runtime())
    shadows = ShadowScorer([failing, working], lambda: now[0])
    alerts = make_alerts([1, 2, 3])
    alerts = replace(alerts, cutouts=np.ones((3, 3, 63, 63), np.float32), cutout_box=np.full((3, 3, 4), [0, 0, 63, 63]))
    scored = replace(make_scored(alerts, {"default": [0.9, 0.8, NAN]}), duplicate=np.array([False, True, False]))
    with caplog.at_level(logging.ERROR):
        for now[0] in (0.0, 1.0, 61.0):
            batch, (bad, good) = shadows.score(scored)
    assert (bad.model, bad.failed, bad.scored, bad.differences) == ("classes", 3, 0, ())
    assert (good.model, good.failed, good.scored) == ("attention", 0, 1)  # one is a duplicate, one is not scored
    assert [one.compared for one in good.differences] == [1]
    assert [one.model for one in batch.shadows] == ["attention"]
    assert batch.on_trial.tolist() == [0, 1]
    logged = [message for message in caplog.messages if "shadow model classes" in message]
    assert len(logged) == 2  # one a minute


@pytest.fixture
def shadowed(make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]) -> ScoredBatch:
    """Four alerts, of which the shadow model takes all but the second."""
    batch = make_scored(make_alerts([1, 2, 3, 4], offset=40), {"default": [0.9, 0.8, 0.1, 0.2]})
    new = np.array([[0.8], [NAN], [0.7], [0.2]], np.float32)
    return replace(batch, shadows=(ModelScores("default", "2", ("real",), new, None, ~np.isnan(new[:, 0])),))


class Troubled:
    """A framing whose registry raises an error for the shadow topic."""

    headers = ()

    def __init__(self, error: Exception) -> None:
        self.asked = 0
        self._error = error

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        if topic == "me.shadow":
            self.asked += 1
            raise self._error
        return ContainerFraming().frame(schema, body, topic)


def router(framing: Framing, now: list[float]) -> Router:
    models, shadows = [("default", "1")], [("default", "2")]
    encoder = Encoder("scores", "")
    return Router("me", models=models, shadows=shadows, encoder=encoder, framing=framing, clock=lambda: now[0])


def test_an_alert_of_a_survey_that_no_shadow_covers_has_no_record_of_the_shadow_topic(shadowed: ScoredBatch) -> None:
    routed = router(ContainerFraming(), [0.0]).route(shadowed)
    assert routed.published == {"me.scored": 4, "me.shadow": 3}
    inputs = [dict(one.headers)["input"][-2:] for one in routed.records if one.topic == "me.shadow"]
    assert inputs == [b"40", b"42", b"43"]
    assert all(one.optional == (one.topic == "me.shadow") for one in routed.records)


def test_a_registry_that_troubles_the_shadow_topic_rejects_no_alert(shadowed: ScoredBatch) -> None:
    class NoWriter:
        fenced = False

    from broker_filter.kafka.transactions import Claim

    delivery = Delivery(list(shadowed.packets), [40, 41, 42, 43], [Claim("ztf", 0, NoWriter(), 0)] * 4)  # type: ignore[arg-type]
    for error, reason, asked in (
        (RegistryRefusalError("HTTP 409"), LeftOut.SCHEMA_REFUSED, [3, 6]),
        (RegistryUnavailable("HTTP 503"), LeftOut.REGISTRY_UNAVAILABLE, [1, 1]),  # not asked again at once
    ):
        framing, now = Troubled(error), [1000.0]
        troubled = router(framing, now)
        for n in asked:
            routed = troubled.route(shadowed)
            assert framing.asked == n
            assert routed.published == {"me.scored": 4}
            assert not routed.refused
            (work,) = divide(delivery, shadowed, routed)
            assert sum((account.left_out for account in work.accounts), Counter()) == {reason: 3}
            total = account_batch(shadowed)
            assert (total.consumed, total.scored, total.rejected) == (4, 4, {})
        now[0] += REGISTRY_REST_S + 1
        troubled.route(shadowed)
        assert framing.asked > n

    only_shadow = replace(routed, records=[], packet_index=[])
    for one, k in zip(*_of_shadow(shadowed), strict=True):
        only_shadow.add(one, k)
    with pytest.raises(UnaccountedError):  # a record of the shadow topic is not the output of an alert
        divide(delivery, shadowed, only_shadow)


def _of_shadow(shadowed: ScoredBatch) -> tuple[list[Any], list[int]]:
    routed = router(ContainerFraming(), [0.0]).route(shadowed)
    chosen = [i for i, one in enumerate(routed.records) if one.topic == "me.shadow"]
    return [routed.records[i] for i in chosen], [routed.packet_index[i] for i in chosen]
