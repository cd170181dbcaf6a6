"""The distribution over the archives of a training, as the command that makes a bundle adds it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from broker_filter.packets.packet import Packet
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.scorer import Scorer
from broker_filter.simulate import simulate_night
from training.data.record_distribution import record_archives


def test_a_training_records_the_alerts_of_its_archives_that_pass_the_cut(tmp_path: Path) -> None:
    packets = [alert.packet for alert in simulate_night(160, seed=8, survey="ztf")]
    night = tmp_path / "night"
    night.mkdir()
    for k, packet in enumerate(packets):
        (night / f"{k:03}.avro").write_bytes(packet)
    bundle = Path(shutil.copytree(open_bundle("default").part("ztf").directory, tmp_path / "default"))
    record_archives(bundle, [night], where="magpsf < 19.5")

    [part] = open_bundle(bundle).parts
    distribution = part.distribution()
    assert distribution
    assert distribution.of == "the archives of the training, as served: night; cut: magpsf < 19.5"
    scorer = Scorer.open(bundle)
    alerts, _ = scorer.decoder(columns=("magpsf",)).decode([Packet(packet) for packet in packets])
    passed = alerts.column("magpsf") < 19.5
    recorded = distribution.surveys["ztf"]
    assert 100 <= recorded.alerts == passed.sum() < len(packets)
    real = scorer.score(alerts).columns()["default.real"][passed]
    counts, _ = np.histogram(real, [-np.inf, *recorded.outputs["real"].edges, np.inf])
    assert recorded.outputs["real"].counts == (*counts.tolist(), 0)


def test_too_few_alerts_leave_the_bundle_as_it_is(tmp_path: Path) -> None:
    night = tmp_path / "night"
    night.mkdir()
    (night / "one.avro").write_bytes(next(iter(simulate_night(1, seed=8, survey="ztf"))).packet)
    bundle = Path(shutil.copytree(open_bundle("default").part("ztf").directory, tmp_path / "default"))
    before = open_bundle(bundle).parts[0].distribution()
    record_archives(bundle, [night])
    assert open_bundle(bundle).parts[0].distribution() == before
