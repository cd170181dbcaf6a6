"""The sentences on what a lens is worth say which differences were measured."""

from __future__ import annotations

from typing import Any

from training.interpretability.study.report import worth


def measures(ahead: dict[str, list[float | None]]) -> dict[str, Any]:
    methods = {"sparse components": 0.6, "untrained network": 0.71, "dimensions": 0.8}
    return {
        "site": "light_curve.0",
        "seeds": 5,
        "features": 3,
        "stable_in": [5, 2, 3],
        "reconstruction": {"methods": {"features": {"explained_variance": 0.9, "l0": 2.0, "recovered_mean": 0.8}}},
        "causal": {"output": "embedding", "median_over_random": 3.0, "median_over_alike": 0.9},
        "separation": {
            "ztf": {
                "area": {"class VS": {}, "rising": {}},
                "mean_area": {name: [area, area, area] for name, area in {"features": 0.7, **methods}.items()},
                "mean_ahead": ahead,
            },
            "lsst": {"area": {}, "mean_area": {}, "mean_ahead": {}},
        },
    }


def test_worth_says_which_methods_are_worse_better_or_alike() -> None:
    ahead: dict[str, list[float | None]] = {
        "sparse components": [0.1, 0.05, 0.15],
        "untrained network": [-0.01, -0.05, 0.03],
        "dimensions": [-0.1, -0.15, -0.05],
    }
    assert worth(measures(ahead))["says"] == (
        "The 3 features explain 90% of the variance of the output of light_curve.0; 2 of them are stable (found in "
        "most of 5 trainings). Removing a feature moves the embedding 3.0 times as far as removing a random direction "
        "of equal size (median). ZTF: the best feature for each of 2 known properties has a mean ROC AUC of 0.70. "
        "Principal components that are equally sparse have 0.60 (worse), features of an untrained network 0.71 (no "
        "measurable difference), and single dimensions of the layer's output, which are not sparse, 0.80 (better)."
    )


def test_worth_claims_no_difference_without_an_interval() -> None:
    methods = ("sparse components", "untrained network", "dimensions")
    says = worth(measures({method: [0.1, None, None] for method in methods}))["says"]
    assert says.count("(no measurable difference)") == 3
