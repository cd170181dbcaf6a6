"""A shadow model in the running service: its topic, its metrics, the comparison that reads them, and its promotion."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.cli import main
from broker_filter.local_kafka import embedded_broker
from broker_filter.scoring.bundle import open_bundle

from ..shadow_bundle import write_next_default
from .conftest import MakePipeline, Packets, Pipeline, RunningService, alert, inputs

SENT, AFTER = 120, 10
"""Packets with the shadow model, and after its promotion."""
SERVING = open_bundle("default").card.version


def test_a_shadow_is_tried_compared_and_promoted_while_the_service_goes_on(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = str(write_next_default(tmp_path / "next"))
    with embedded_broker(tmp_path) as bootstrap:
        pipeline = make_pipeline(source=bootstrap)
        config = pipeline.config | {"filters": [{"name": "sure", "where": "real > 0.5"}]}
        service = pipeline.start(**config | {"models": ["default"]})
        service.wait_ready()
        service.reload(config | {"models": ["default", {"bundle": new, "shadow": True}]})
        pipeline.send([*packets[:SENT], b"not a packet"])
        service.wait_consumed(SENT + 1)
        of_old, of_new = outputs_of_records(pipeline)
        check_metrics(service, pipeline.prefix, of_old, of_new)

        page = tmp_path / "page.html"
        command = ["compare-shadow", "--bootstrap-servers", bootstrap, "--topic", f"{pipeline.prefix}.shadow"]
        assert main([*command, "--out", str(page)]) == 0
        assert f"{SENT} alerts, correlation {np.corrcoef(of_old, of_new)[0, 1]:.4f}" in capsys.readouterr().out
        assert "<section>" in page.read_text()
        assert main([*command, "--out", str(page), "--since", "2100-01-01"]) == 1
        assert "no records" in capsys.readouterr().err

        service.reload(config | {"models": [new]})
        pipeline.send(packets[SENT : SENT + AFTER])
        service.wait_consumed(SENT + 1 + AFTER)
        assert service.metric("unaccounted_alerts") == 0
        assert service.end() == 0
        scored = pipeline.read("scored", expected=SENT + AFTER)
        versions = [one["version"] for record in scored for one in alert(record.value())["broker_filter"]["models"]]
        assert Counter(versions) == {SERVING: SENT, "9.0": AFTER}
        assert len(pipeline.read("shadow", expected=SENT)) == SENT


def outputs_of_records(pipeline: Pipeline) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check the records of the shadow topic against those of the scored alerts, and return both outputs."""
    scored, shadowed = (pipeline.read(name, expected=SENT) for name in ("scored", "shadow"))
    assert inputs(shadowed) == inputs(scored)
    assert set(inputs(shadowed).values()) == {1}
    records = [alert(one.value()) for one in shadowed]
    models = {record["alert_id"]: record["broker_filter"]["models"] for record in records}
    for one in scored:
        record = alert(one.value())
        assert record["broker_filter"]["models"] == models[record["alert_id"]][:1]
    marks = {tuple((model["version"], model["shadow"]) for model in pair) for pair in models.values()}
    assert marks == {((SERVING, False), ("9.0", True))}
    old, new = np.array([[model["outputs"]["real"] for model in pair] for pair in models.values()]).T
    return old, new


def check_metrics(service: RunningService, prefix: str, old: NDArray[np.float64], new: NDArray[np.float64]) -> None:
    of_shadow = 'model="default",version="9.0"'
    of_label = f'label="real",{of_shadow}'
    counted = {
        f"shadow_scored_alerts_total{{{of_shadow}}}": SENT,
        f"shadow_failed_alerts_total{{{of_shadow}}}": 0,
        f"shadow_compared_alerts_total{{{of_label}}}": SENT,
        f"shadow_disagreeing_alerts_total{{{of_label}}}": np.count_nonzero((old >= 0.5) != (new >= 0.5)),
        f'published_records_total{{topic="{prefix}.sure"}}': np.count_nonzero(old > 0.5),
        f'published_records_total{{topic="{prefix}.shadow"}}': SENT,
        "scored_alerts_total": SENT,
        "unaccounted_alerts": 0,
    }
    assert {sample: service.metric(sample) for sample in counted} == counted
    difference = service.metric(f"shadow_absolute_difference_total{{{of_label}}}")
    assert difference == pytest.approx(np.abs(new - old).sum(), rel=1e-5)
    assert service.metric('stage_seconds_count{stage="shadow"}') > 0
