"""Drift: what is recorded and what is counted later agree with a histogram of the same alerts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.cli import main
from broker_filter.packets.batch import Survey
from broker_filter.packets.packet import Packet
from broker_filter.scoring.bundle import WEIGHTS, BundleError, open_bundle
from broker_filter.scoring.distribution import QUANTITIES, Bins, SurveyDistribution, population_stability_index
from broker_filter.scoring.scorer import Scorer
from broker_filter.simulate import simulate_night
from broker_filter.streaming.drift import BLOCK_S, BLOCKS, LEAST_ALERTS, DriftMonitor, DriftWindow
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.record_distribution import (
    ThinnedRows,
    distribution_columns,
    measure_distributions,
    write_recorded,
)
from broker_filter.streaming.scored import ScoredBatch

ALERTS = 150
REPEATS = 8


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scorer, ScoredBatch, Path]:
    """A scorer with a distribution over a simulated night, the scored night, and the bundle."""
    folder = tmp_path_factory.mktemp("recorded")
    packets = [alert.packet for alert in simulate_night(ALERTS, seed=3, survey="ztf")]
    (folder / "night").mkdir()
    for k, packet in enumerate(packets):
        (folder / "night" / f"{k:04}.avro").write_bytes(packet)
    out = folder / "own"
    assert main(["models", "record-distribution", "default", str(folder / "night"), "--out", str(out)]) == 0
    scorer = Scorer.open(out)
    decoder = scorer.decoder(columns=distribution_columns(Survey))
    return scorer, score_packets([Packet(packet) for packet in packets], decoder, scorer, DuplicateWindow(9999)), out


def count(bins: Bins, values: NDArray[np.floating]) -> list[int]:
    known = values[~np.isnan(values)]
    counts, _ = np.histogram(known, [-np.inf, *bins.edges, np.inf])
    return [*counts.tolist(), len(values) - len(known)]


def test_the_recorded_counts_are_a_histogram_of_the_alerts(recorded: tuple[Scorer, ScoredBatch, Path]) -> None:
    _, scored, out = recorded
    distribution = open_bundle(out).part("ztf").distribution()
    assert distribution
    assert distribution.of == "night"
    ztf = distribution.surveys["ztf"]
    assert ztf.alerts == ALERTS
    assert list(ztf.outputs["real"].counts) == count(ztf.outputs["real"], scored.scores.columns()["default.real"])
    for name, bins in ztf.quantities.items():
        assert list(bins.counts) == count(bins, scored.alerts.column(name))


def test_recording_leaves_the_bundle_and_its_scores_as_they_are(recorded: tuple[Scorer, ScoredBatch, Path]) -> None:
    _, scored, out = recorded
    new, old = open_bundle(out), open_bundle("default")
    assert new.weights_sha256 == old.weights_sha256
    assert new.part("ztf").card.files[WEIGHTS] == old.part("ztf").card.files[WEIGHTS]
    assert new.part("lsst").distribution() == old.part("lsst").distribution()  # no alert of LSST was given
    assert new.part("ztf").distribution() != old.part("ztf").distribution()
    scores = Scorer.open("default").score(scored.alerts)
    assert (scores.columns()["default.real"] == scored.scores.columns()["default.real"]).all()


def test_the_same_alerts_have_not_drifted_and_others_have(recorded: tuple[Scorer, ScoredBatch, Path]) -> None:
    scorer, scored, out = recorded
    clock = Clock()
    monitor = DriftMonitor(scorer.models, clock)
    for _ in range(REPEATS - 2):
        monitor.count(scored)
    assert monitor.read() == ({("ztf", "default"): (REPEATS - 2) * ALERTS, ("lsst", "default"): 0}, [])
    monitor.count(replace(scored, duplicate=np.ones(ALERTS, np.bool_)))
    assert monitor.read()[0]["ztf", "default"] == (REPEATS - 2) * ALERTS
    monitor.count(scored)
    _, drifts = monitor.read()
    assert REPEATS * ALERTS > LEAST_ALERTS > (REPEATS - 2) * ALERTS
    assert {one.quantity for one in drifts} == {"default.real", *QUANTITIES["ztf"]}
    assert max(one.psi for one in drifts) < 0.02

    faint = scored.alerts.metadata.copy()
    magpsf = scored.alerts.columns.index("magpsf")
    faint[: ALERTS // 2, magpsf] = np.nan
    faint[ALERTS // 2 :, magpsf] += 1
    other = replace(scored, alerts=replace(scored.alerts, metadata=faint))
    changed = DriftMonitor(scorer.models, clock)
    for _ in range(REPEATS):
        changed.count(other)
    psi = {one.quantity: one.psi for one in changed.read()[1]}
    distribution = open_bundle(out).part("ztf").distribution()
    assert distribution
    bins = distribution.surveys["ztf"].quantities["magpsf"]
    found = REPEATS * np.array(count(bins, faint[:, magpsf]))
    assert psi["magpsf"] == pytest.approx(population_stability_index(np.array(bins.counts), found))
    assert psi["magpsf"] > 1
    assert psi["snr"] < 0.02


def test_the_window_forgets_after_a_day_and_outlives_another_configuration(
    recorded: tuple[Scorer, ScoredBatch, Path],
) -> None:
    scorer, scored, _ = recorded
    clock = Clock()
    monitor = DriftMonitor(scorer.models, clock)
    monitor.count(scored)
    clock.now = 3 * BLOCK_S
    monitor.count(scored)
    reloaded, other = DriftMonitor(scorer.models, clock), DriftMonitor(Scorer.open("default").models, clock)
    for new in (reloaded, other):
        new.continue_from(monitor)
    assert other.read()[0]["ztf", "default"] == 0  # its bundle records other bins
    reloaded.count(scored)
    assert reloaded.read()[0]["ztf", "default"] == 3 * ALERTS
    clock.now = BLOCKS * BLOCK_S
    assert reloaded.read()[0]["ztf", "default"] == 2 * ALERTS
    clock.now = (BLOCKS + 3) * BLOCK_S
    assert reloaded.read()[0]["ztf", "default"] == 0
    clock.now = 1000 * BLOCK_S
    reloaded.count(scored)
    assert reloaded.read()[0]["ztf", "default"] == ALERTS


def test_too_few_alerts_are_refused(recorded: tuple[Scorer, ScoredBatch, Path], tmp_path: Path) -> None:
    scorer, scored, _ = recorded
    few = replace(scored, duplicate=np.arange(ALERTS) > 50)
    found = measure_distributions([few], scorer.models[0])
    assert found == {}
    with pytest.raises(BundleError, match=r"no survey of default \(ztf, lsst\) has 100 alerts"):
        write_recorded(open_bundle("default"), tmp_path / "own", "few alerts", found)


def test_what_a_bundle_of_another_version_records_is_ignored(recorded: tuple[Scorer, ScoredBatch, Path]) -> None:
    _, scored, _ = recorded
    bins = Bins(edges=(0.5,), counts=(60, 90, 0))
    for quantities in ({"snr": bins, "of_the_future": bins}, {}):
        other = SurveyDistribution(alerts=ALERTS, outputs={"of_the_future": bins}, quantities=quantities)
        window = DriftWindow("default", Survey.ZTF, other, ("real",))
        for _ in range(REPEATS):
            window.count(0, scored, scored.scores.models[0])
        alerts, drifts = window.read(0)
        assert alerts == REPEATS * ALERTS
        assert [one.quantity for one in drifts] == (["snr"] if quantities else [])


def test_a_long_archive_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker_filter.streaming.record_distribution.SAMPLED", 50)
    sample = ThinnedRows()
    for start in range(0, 1000, 7):
        sample.put(np.arange(start, min(start + 7, 1000), dtype=float)[:, None])
    rows = sample.rows()
    assert rows is not None
    assert 50 <= len(rows) <= 107
    assert len(set(np.diff(rows[:, 0]).tolist())) == 1
