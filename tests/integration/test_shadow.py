"""A shadow model in the running service: its topic, its metrics, and the comparison that reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from broker_filter.cli import main

from ..shadow_bundle import write_next_default
from .conftest import MakePipeline, Packets, alert, inputs

SENT = 120


@pytest.mark.kafka
def test_a_shadow_is_published_counted_and_compared_while_the_service_goes_on(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = [*packets[:SENT], b"not a packet"]
    pipeline = make_pipeline(sent)
    shadow = {"bundle": str(write_next_default(tmp_path / "next")), "shadow": True}
    service = pipeline.start(models=["default", shadow], filters=[{"name": "sure", "where": "real > 0.5"}])
    service.wait_consumed(len(sent))

    scored = pipeline.read("scored", expected=SENT)
    shadowed = pipeline.read("shadow", expected=SENT)
    assert inputs(shadowed) == inputs(scored) == Counter(dict.fromkeys(inputs(scored), 1))
    models = {alert(one.value())["alert_id"]: alert(one.value())["broker_filter"]["models"] for one in shadowed}
    for one in scored:
        record = alert(one.value())
        assert record["broker_filter"]["models"] == models[record["alert_id"]][:1]
    assert {tuple((model["version"], model["shadow"]) for model in pair) for pair in models.values()} == {
        (("3.1", False), ("9.0", True))
    }
    old, new = np.array([[model["outputs"]["real"] for model in pair] for pair in models.values()]).T
    assert service.metric(f'published_records_total{{topic="{pipeline.prefix}.sure"}}') == (old > 0.5).sum()

    of_shadow = 'model="default",version="9.0"'
    assert service.metric(f"shadow_scored_alerts_total{{{of_shadow}}}") == SENT
    assert service.metric(f"shadow_failed_alerts_total{{{of_shadow}}}") == 0
    of_label = f'label="real",{of_shadow}'
    assert service.metric(f"shadow_compared_alerts_total{{{of_label}}}") == SENT
    difference = service.metric(f"shadow_absolute_difference_total{{{of_label}}}")
    assert difference == pytest.approx(np.abs(new - old).sum(), rel=1e-5)
    assert service.metric(f"shadow_disagreeing_alerts_total{{{of_label}}}") == ((old >= 0.5) != (new >= 0.5)).sum()
    assert service.metric('stage_seconds_count{stage="shadow"}') > 0
    assert service.metric("unaccounted_alerts") == 0
    assert service.metric("scored_alerts_total") == SENT
    assert service.end() == 0

    servers, page = pipeline.source["bootstrap.servers"], tmp_path / "page.html"
    command = ["compare-shadow", "--topic", f"{pipeline.prefix}.shadow", "--bootstrap-servers", servers]
    assert main([*command, "--out", str(page)]) == 0
    assert f"{SENT} alerts, correlation {np.corrcoef(old, new)[0, 1]:.4f}" in capsys.readouterr().out
    assert "<section>" in page.read_text()
    assert main([*command, "--out", str(page), "--since", "2100-01-01"]) == 1
    assert "0 records" in capsys.readouterr().err
