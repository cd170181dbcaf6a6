"""Run by `make dashboards`: a real service works on nights of both surveys, and a real Prometheus scrapes it.

Every panel returns data from it, apart from those of faults that the service does not have, and every metric of the
rules has a series. `test_prometheus.py` evaluates the same expressions over recorded samples of services with faults.
"""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

from broker_filter.demo.ordinary import write_reference
from broker_filter.simulate import SCHEMAS, simulate_night

from ..shadow_bundle import write_next_default
from .conftest import MakePipeline, send
from .test_prometheus import panel_expressions, prometheus, rule_expressions

ZTF_ALERTS, LSST_ALERTS = 1600, 300
"""Drift has a value from 1000 alerts of a survey on, and duplicates are left out."""
PARTS = 20
PAUSE_S = 1.0
"""The night is sent in parts, so that rates over some seconds are above zero."""
ONLY_WITH_FAULTS = re.compile(r"> 0$")
"""Expressions of faults end so: they have no answer while the fault is absent."""


def test_every_panel_shows_a_working_service(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    reference = tmp_path / "ordinary.safetensors"
    write_reference(reference, seed=7)
    nights = [*simulate_night(ZTF_ALERTS, seed=7), *simulate_night(LSST_ALERTS, seed=8, survey="lsst")]
    packets = [alert.packet for alert in nights]
    packets[: len(packets) : 40] = [packet[:1000] for packet in packets[: len(packets) : 40]]
    order = [packets[k::PARTS] for k in range(PARTS)]
    pipeline = make_pipeline(order[0])
    pipeline.config["input"]["schema_registry"] = str(SCHEMAS)
    pipeline.config |= {
        "models": ["default", "embedder", {"bundle": str(write_next_default(tmp_path / "next")), "shadow": True}],
        "anomalies": {"reference": str(reference), "rate": 0.05},
        "filters": [{"name": "bright", "where": "magpsf < 19"}, {"name": "flood", "where": "snr > 0", "max_rate": 0.5}],
    }
    service = pipeline.start()
    with prometheus(tmp_path, f"127.0.0.1:{service.port}") as server:
        server.wait_for("sum(broker_filter_consumed_alerts_total) > 0")
        for part in order[1:]:
            send(pipeline.source, pipeline.topic, part)
            time.sleep(PAUSE_S)
        service.reload(pipeline.config)
        service.wait_consumed(len(packets))
        server.wait_for(f"sum(broker_filter_consumed_alerts_total) == {len(packets)}")
        server.wait_for("count(broker_filter_drift_psi)")
        panels = [one.replace("[10s]", "[1m]") for one in panel_expressions()]
        metrics = sorted(set(re.findall(r"\b(?:broker_filter_\w+|up)\b", "\n".join(rule_expressions()))))
        answers = {expression: server.query(expression) for expression in (*panels, *metrics)}

    empty = [one for one, answer in answers.items() if not answer]
    assert len(empty) < len(answers) / 10
    assert [one for one in empty if not ONLY_WITH_FAULTS.search(one)] == []
    assert [one for one, answer in answers.items() if any(map(math.isnan, answer.values()))] == []
