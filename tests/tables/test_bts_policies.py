"""Policies give the same decisions on an alert's past as btsbot's evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.tables.bts_policies import POLICIES, PolicyFilter

Floats = NDArray[np.floating]


def expected(name: str, score: Floats, magpsf: Floats) -> bool:
    """Return the decisions by the policies' definitions, applied to the alerts up to one of them."""
    certain, enough = (0.5, 2) if name.startswith("bts") else (0.85, 1)
    good = sum(s > certain and m < 19 for s, m in zip(score, magpsf, strict=True))
    bright = name.endswith("p1") or min(magpsf) <= 18.5
    return good >= enough and bright


@pytest.mark.parametrize("name", POLICIES)
def test_an_alert_is_judged_only_with_the_past_of_its_object(name: str) -> None:
    rng = np.random.default_rng(2)
    n = 300
    object_id = rng.integers(60, size=n).astype(str)
    magpsf, score = rng.uniform(18, 19.5, n), rng.random(n).astype(np.float32)
    policy = PolicyFilter(POLICIES[name])
    batches = np.split(np.arange(n), [1, 100, 100, 250])
    result = np.concatenate([policy.passed(object_id[rows], score[rows], magpsf[rows]) for rows in batches])
    for i in range(n):
        past = (object_id == object_id[i]) & (np.arange(n) <= i)
        assert result[i] == expected(name, score[past], magpsf[past])
    assert 0.1 < result.mean() < 0.9


@pytest.mark.parametrize(
    ("magpsf", "passing"),
    [
        ([18.9, 18.9], {"bts_p1", "prod_p1"}),
        ([18.9, 18.5], {"bts_p1", "bts_p2", "prod_p1", "prod_p2"}),
        ([19.0, 18.5], {"prod_p1", "prod_p2"}),  # at 19 an alert does not count
        ([np.nan, 18.5], {"prod_p1", "prod_p2"}),
        ([19.0, 19.0], set()),
    ],
)
def test_limits_are_the_published_ones(magpsf: list[float], passing: set[str]) -> None:
    score = np.array([0.9, 0.9])
    assert {name for name, policy in POLICIES.items() if policy(score, np.array(magpsf))} == passing


def test_a_score_at_the_threshold_is_not_above_it() -> None:
    assert not any(policy(np.array([0.5, 0.5]), np.array([17.0, 17.0])) for policy in POLICIES.values())


def test_an_empty_batch_gives_an_empty_result() -> None:
    nothing = np.zeros(0)
    assert PolicyFilter(POLICIES["bts_p1"]).passed([], nothing, nothing).shape == (0,)
