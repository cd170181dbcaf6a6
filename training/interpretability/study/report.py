"""The tables and warnings of a study, as text for a page: the features beside what they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FEW_EXPLAINED = 0.5
"""Explained variance below which a page warns: most of what the attention layer does is then not in the features."""
FEW_STABLE = 0.5
"""Share of stable features below which a page warns."""
EQUAL_CHANCE = 0.5
"""Share of features whose effect exceeds that of random directions if features were random directions themselves."""

Table = dict[str, Any]
"""`caption`, `head` (list of text) and `rows` (lists of text)."""


def tables(measures: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the measures of `study`: reconstruction, features, separation by survey, effects, heads."""
    found = [_reconstruction(measures["reconstruction"]), _features(measures)]
    for survey, separation in measures["separation"].items():
        if separation["area"]:
            found += [_separation(survey, separation), _ahead(survey, separation)]
    return [*found, _effects(measures["effects"]), _heads(measures["heads"])]


def warnings(measures: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the features must know, a sentence each; none if there is nothing to warn of."""
    found = []
    of_features = measures["reconstruction"]["methods"]["features"]
    if of_features["explained_variance"] < FEW_EXPLAINED:
        found.append(
            f"The features explain {of_features['explained_variance']:.0%} of the variance of this site: most of "
            "what it does is not in them."
        )
    stable = sum(2 * n > measures["seeds"] for n in measures["stable_in"])
    if stable < FEW_STABLE * measures["features"]:
        found.append(
            f"{stable} of {measures['features']} features are found in most of {measures['seeds']} seeds; do not "
            "build on the others."
        )
    if measures["causal"]["above_alike"] < EQUAL_CHANCE:
        found.append(
            f"The ablation of {measures['causal']['above_alike']:.0%} of the features changes the output more than an "
            "equally large difference of two alerts does."
        )
    for survey, separation in measures["separation"].items():
        for method, (value, low, _) in separation["mean_ahead"].items():
            if (
                method not in ("stable features", "untrained network")
                and value is not None
                and (low is None or low <= 0)
            ):
                found.append(
                    f"{survey.upper()}: single features separate known properties no better than {method} "
                    f"(mean difference of the ROC AUC {value:+.3f})."
                )
    return found


def worth(measures: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far a lens with these features can be trusted: `says`, some sentences, and `figures` by name."""
    reconstruction, causal = measures["reconstruction"], measures["causal"]
    of_features = reconstruction["methods"]["features"]
    stable = sum(2 * n > measures["seeds"] for n in measures["stable_in"])
    figures: dict[str, float | int | str] = {
        "l0": round(of_features["l0"], 3),
        "explained_variance": round(of_features["explained_variance"], 4),
        "loss_recovered_against_mean": round(of_features["recovered_mean"], 4),
        "features": measures["features"],
        "stable_features": stable,
        "effect_over_random_direction": round(causal["median_over_random"], 3),
        "effect_over_difference_of_alerts": round(causal["median_over_alike"], 3),
    }
    sentences = [
        f"The {measures['features']} features explain {of_features['explained_variance']:.0%} of the variance of the "
        f"output of {measures['site']}; {stable} of them are stable (found in most of {measures['seeds']} trainings).",
        f"Removing a feature moves the {causal['output']} {causal['median_over_random']:.1f} times as far as removing "
        "a random direction of equal size (median).",
    ]
    for survey, separation in measures["separation"].items():
        for method, estimate in separation["mean_area"].items():
            figures[f"{survey}_auc_{method.replace(' ', '_')}"] = interval(estimate, ".4f")
        if separation["area"]:
            sentences.append(_separates(survey, separation))
    return {"says": " ".join(sentences), "figures": figures}


COMPARED = {
    "sparse components": "Principal components that are equally sparse have {}",
    "untrained network": "features of an untrained network {}",
    "dimensions": "and single dimensions of the layer's output, which are not sparse, {}",
}
"""The methods that `worth` compares the features with, in words. The tables have all methods."""


def _separates(survey: str, separation: Mapping[str, Any]) -> str:
    """Return two sentences about how well single features separate the properties of a survey's alerts."""
    of_features = separation["mean_area"]["features"][0]
    compared = []
    for method, words in COMPARED.items():
        area, (_, low, high) = separation["mean_area"][method][0], separation["mean_ahead"][method]
        known = low is not None and high is not None
        lead = "worse" if known and low > 0 else "better" if known and high < 0 else "no measurable difference"
        compared.append(words.format(f"{area:.2f} ({lead})"))
    return (
        f"{survey.upper()}: the best feature for each of {len(separation['area'])} known properties has a mean ROC AUC "
        f"of {of_features:.2f}. {', '.join(compared)}."
    )


def _reconstruction(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            method,
            f"{figures['l0']:.2f}",
            f"{figures['explained_variance']:.3f}",
            f"{figures['loss']:.4f}",
            f"{figures['recovered_mean']:.3f}",
            f"{figures['recovered_zero']:.3f}",
        ]
        for method, figures in found["methods"].items()
    ]
    loss = found["loss"]
    return {
        "caption": f"Reconstruction of z on {found['alerts']} real held-out alerts ({found['rows']} rows). Loss: "
        f"{loss['clean']:.4f}; with the mean in place of z {loss['mean']:.4f}; with zeros {loss['zero']:.4f}",
        "head": ["method", "L0", "explained variance", "loss", "recovered (mean)", "recovered (zero)"],
        "rows": rows,
    }


def _features(measures: Mapping[str, Any]) -> Table:
    found, sparse, causal = measures["reconstruction"], measures["reconstruction"]["sparsity"], measures["causal"]
    stable = sum(2 * n > measures["seeds"] for n in measures["stable_in"])
    in_all = sum(n == measures["seeds"] for n in measures["stable_in"])
    rows = [
        ["features", str(measures["features"])],
        ["alive on real held-out alerts", f"{sparse['alive']:.1%}"],
        ["dead there", f"{sparse['dead']:.1%}"],
        ["dense (active in over 10 % of rows)", f"{sparse['dense']:.1%}"],
        ["greatest cosine of two directions", f"{found['greatest_cosine']['max']:.3f}"],
        ["median of the greatest cosines", f"{found['greatest_cosine']['median']:.3f}"],
        [f"stable (in most of {measures['seeds']} seeds)", f"{stable / measures['features']:.1%}"],
        [f"in all {measures['seeds']} seeds", f"{in_all / measures['features']:.1%}"],
        [f"effect on {causal['output']} above a random direction of equal size", f"{causal['above_random']:.1%}"],
        ["median ratio of these effects", f"{causal['median_over_random']:.2f}"],
        ["effect above an equal difference of two alerts", f"{causal['above_alike']:.1%}"],
        ["median ratio of these effects", f"{causal['median_over_alike']:.2f}"],
        ["families", ", ".join(f"{name} {n}" for name, n in measures["families"].items())],
    ]
    return {"caption": "Features", "head": ["figure", "value"], "rows": rows}


def _separation(survey: str, found: Mapping[str, Any]) -> Table:
    methods = list(found["mean_area"])
    rows = [
        [name, str(found["objects"][name]), *(interval(of[method], ".3f") for method in methods)]
        for name, of in found["area"].items()
    ]
    rows.append(["mean", "", *(interval(found["mean_area"][method], ".3f") for method in methods)])
    return {
        "caption": f"{survey.upper()}: ROC AUC of the best single score of each method, chosen on training objects, on "
        "real held-out alerts (95 % intervals by object)",
        "head": ["property", "objects with it", *methods],
        "rows": rows,
    }


def _ahead(survey: str, found: Mapping[str, Any]) -> Table:
    rows = []
    for method, mean in found["mean_ahead"].items():
        leads = [of[method] for of in found["ahead"].values()]
        better = sum(low is not None and low > 0 for _, low, _ in leads)
        worse = sum(high is not None and high < 0 for *_, high in leads)
        rows.append([method, interval(mean, "+.3f"), str(better), str(worse), str(len(leads))])
    return {
        "caption": f"{survey.upper()}: ROC AUC of features minus that of other methods",
        "head": ["method", "mean lead of features", "properties better", "properties worse", "of"],
        "rows": rows,
    }


def _effects(effects: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [
        [
            output,
            f"{of['median_change']:.2g}",
            f"{of['above_random']:.0%}",
            f"{of['median_over_random']:.2f}",
            f"{of['above_alike']:.0%}",
            f"{of['median_over_alike']:.2f}",
        ]
        for output, of in effects.items()
    ]
    return {
        "caption": "Effect of the ablation of a feature on each output: the median change; the share of features that "
        "change it more than a random direction, or a difference of two alerts, of equal size; and the median ratio",
        "head": ["output", "change", "above random", "ratio", "above a difference", "ratio"],
        "rows": rows,
    }


def _heads(heads: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            str(head["head"]),
            f"{head['least_share']:.2f}",
            str(head["same_head_by_dfa"]),
            ", ".join(f"{name} {n}" for name, n in head["families"].items()),
            ", ".join(f"{name or 'none'} {n}" for name, n in head["properties"].items()),
        ]
        for head in heads
    ]
    return {
        "caption": "The ten features with the greatest share of each head: a head with one family and one property "
        "would be monosemantic",
        "head": ["head", "least share", "also by DFA", "families", "properties that they separate best"],
        "rows": rows,
    }


def interval(estimate: Sequence[float | None], form: str) -> str:
    """Return an estimate (value, low, high) as text, with its interval if there is one."""
    value, low, high = estimate
    if value is None:
        return "undefined"
    text = format(value, form)
    return text if low is None or high is None else f"{text} ({low:{form}} to {high:{form}})"
