"""A reference is a sample of the alerts that pass, calibrated on held-out objects; too few alerts are an error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from broker_filter.anomalies.reference import Reference, ReferenceSetError
from broker_filter.packets.batch import Survey
from broker_filter.scoring.scorer import Model
from broker_filter.streaming.build_reference import build_reference

from .conftest import PASSES, Scored, of_lsst, ordinary


def test_reference_holds_alerts_that_pass_the_cut_up_to_the_limit(make_embedded: Scored, default_model: Model) -> None:
    real = [0.9, 0.1] * 100
    batches = [
        make_embedded(ordinary(200, 1), real, magpsf=[18.0] * 100 + [21.0] * 100),
        make_embedded(ordinary(200, 1), real, magpsf=[18.0] * 100 + [21.0] * 100),  # the same alerts again
        make_embedded(ordinary(200, 2), first_id=200),
    ]
    built = build_reference(batches, default_model, PASSES, limit=1000)
    every = built.surveys[Survey.ZTF]
    kept = set(every.alerts.alert_id.tolist())
    passing = {*range(0, 100, 2), *range(200, 400)}
    assert kept < passing
    assert len(every.scores) == len(passing) - len(kept) == pytest.approx(50, abs=25)
    assert built.card.where == PASSES.text
    some = build_reference(batches[::-1], default_model, PASSES, limit=200).surveys[Survey.ZTF]
    assert len(some.alerts) + len(some.scores) == 200
    np.testing.assert_array_equal(
        some.alerts.alert_id,
        build_reference(batches, default_model, PASSES, limit=200).surveys[Survey.ZTF].alerts.alert_id,
    )


def test_reference_is_calibrated_on_held_out_objects(
    make_embedded: Scored, default_model: Model, reference: Reference
) -> None:
    """Alerts of one object are similar: compared with other alerts of its object, every alert would look ordinary."""
    alone = ordinary(400, 7)
    pairs = make_embedded(np.repeat(alone, 2, axis=0))  # the alerts 2 i and 2 i + 1 have the same object and embedding
    beside_others = build_reference([pairs], default_model, None, limit=1000).surveys[Survey.ZTF]
    assert set(np.unique(beside_others.alerts.object_id, return_counts=True)[1].tolist()) == {2}
    assert len(beside_others.alerts) + len(beside_others.scores) == 800


def test_too_few_alerts_for_a_reference_are_an_error(make_embedded: Scored, default_model: Model) -> None:
    with pytest.raises(ReferenceSetError, match="20 ordinary alerts of 10 objects are too few"):
        build_reference([make_embedded(ordinary(20, 0))], default_model, None, limit=100)
    with pytest.raises(ReferenceSetError, match="no ordinary alert"):
        build_reference([], default_model, None, limit=100)
    without = make_embedded(ordinary(20, 0))
    [scores] = without.scores.models
    without = replace(without, scores=replace(without.scores, models=(replace(scores, embedding=None),)))
    with pytest.raises(ReferenceSetError, match="gives no embedding"):
        build_reference([without], default_model, None, limit=100)


def test_filter_that_few_alerts_of_a_survey_pass_gives_a_warning(
    make_embedded: Scored, model_of_both: Model, caplog: pytest.LogCaptureFixture
) -> None:
    bogus = make_embedded(of_lsst(98, 1), [0.9] * 3 + [0.01] * 95, survey=[Survey.LSST] * 98, first_id=1000)
    build_reference([make_embedded(ordinary(300, 0)), bogus], model_of_both, PASSES, limit=1000)
    assert "lsst: only 3 of 98 alerts are scored by default and pass `default.real > 0.5" in caplog.text
    assert "ztf: only" not in caplog.text
