"""Comparison of evaluations: paired differences, refusals, and a complete page."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from broker_filter.scoring.bundle import Card, open_bundle
from training.data.datasets import DatasetCard
from training.errors import EvaluationError
from training.evaluation import compare
from training.evaluation.bootstrap import Estimate
from training.evaluation.evaluate import EVALUATION, PREDICTIONS, evaluate
from training.evaluation.evaluations import read_evaluations
from training.evaluation.predictions import Predictions
from training.evaluation.report import as_html, as_markdown
from training.evaluation.served_speed import BATCHES, ServedSpeed

ALERTS, OBJECTS = 150, 75
RNG = np.random.default_rng(8)
TRUTH = RNG.integers(0, 2, ALERTS)
DIFFICULTY = RNG.normal(0, 0.15, ALERTS)
"""Noise that makes an alert difficult for every model."""
DATASET = DatasetCard.model_construct(sha256="1" * 64, labels="of a test")
SPEED = [
    ServedSpeed(batch=b, alerts_per_second=1e3, cpu_microseconds=1e3, peak_megabytes=90, provider="it", threads=1)
    for b in BATCHES
]

Write = Callable[..., Path]


def card(name: str, **training: float | str) -> Card:
    """Return the card of `default` with another name, and another description of its training."""
    default = open_bundle("default").part("ztf").card
    story = default.training.model_copy(update={"evaluation": training})
    return default.model_copy(update={"name": name, "training": story})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the evaluation of a model whose errors increase with `noise`."""

    def write(
        directory: str,
        noise: float,
        *,
        name: str = "",
        dataset: DatasetCard = DATASET,
        n: int = ALERTS,
        magpsf: float = np.nan,
        **training: float | str,
    ) -> Path:
        own = np.random.default_rng(len(directory)).normal(0, noise, ALERTS)
        score = np.clip(0.3 + 0.4 * TRUTH + DIFFICULTY + own, 0, 1)
        predictions = Predictions(
            ("bogus", "real"),
            np.arange(n),
            np.array([f"object {i % OBJECTS}" for i in range(n)]),
            np.full(n, magpsf),
            TRUTH[:n],
            score[:n, None].astype(np.float32),
            0.5,
        )
        out = tmp_path / directory
        out.mkdir()
        predictions.write(out / PREDICTIONS)
        evaluation = evaluate(card(name or directory, **training), dataset, "test", predictions, SPEED)
        (out / EVALUATION).write_text(evaluation.model_dump_json())
        return out

    return write


def width(of: Estimate) -> float:
    assert of.low is not None
    assert of.high is not None
    return of.high - of.low


def test_the_better_model_comes_first_with_a_significant_difference(write: Write) -> None:
    better, worse = read_evaluations([write("worse", 0.4), write("better", 0.02)])
    assert (better.title, worse.title) == ("better", "worse")
    difference = better.ahead_of(worse, "roc_auc")
    assert difference.low is not None
    assert difference.low > 0
    opposite = worse.ahead_of(better, "roc_auc")
    assert opposite.value == -(difference.value or np.nan)


def test_differences_are_paired_by_object(write: Write) -> None:
    a, b = read_evaluations([write("a", 0.01), write("bb", 0.01)])
    assert width(a.ahead_of(b, "roc_auc")) < 0.5 * width(a.figure("roc_auc"))


def test_equal_models_do_not_differ(write: Write) -> None:
    a, b = read_evaluations([write("one", 0.1), write("two", 0.1)])  # names of equal length give equal noise
    assert a.ahead_of(b, "roc_auc") == Estimate(value=0, low=0, high=0)
    assert "*" not in as_markdown([a, b]).partition("| against |")[2]


class Links(HTMLParser):
    """Collects the headings of a page and the resources that it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]


def test_the_command_writes_the_page_and_prints_the_table(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = write("alone", 0.1)
    compare.run(Namespace(evaluations=[evaluation], out=evaluation / "report"))
    markdown = (evaluation / "report" / compare.MARKDOWN).read_text()
    assert markdown in capsys.readouterr().out
    assert "<title>alone</title>" in (evaluation / "report" / compare.HTML).read_text()


@pytest.mark.parametrize("n", [1, 3])
def test_the_page_is_self_contained_and_the_table_has_a_row_per_model(write: Write, n: int) -> None:
    models = read_evaluations([write("m" * (i + 1), 0.1 * (i + 1)) for i in range(n)])
    page = Links()
    page.feed(as_html(models))
    assert page.tags.count("svg") == 5  # ROC, precision and recall, reliability, confusion, accuracy and cost
    assert all(link.startswith(("#", "data:")) for link in page.fetched)
    figures = re.search(r"## Figures\n.*?\n## ", as_markdown(models), re.DOTALL)
    assert figures is not None
    rows = [line for line in figures[0].splitlines() if line.startswith("| m")]
    assert len(rows) == n + 1  # with the header
    assert str(models[0].figure("roc_auc")) in rows[1]


def test_models_that_may_have_trained_on_the_objects_are_named(write: Write) -> None:
    apart = write("apart", 0.2, dataset_sha256=DATASET.sha256)
    assert "training may have used these objects: elsewhere." in as_markdown(
        read_evaluations([apart, write("elsewhere", 0.1)])
    )
    assert "training may have used" not in as_markdown(read_evaluations([apart]))


def test_fractions_of_the_data_make_a_curve_and_seeds_are_averaged(write: Write) -> None:
    runs = [
        write(f"{fraction}_{seed}_{'x' * i}", noise, regimen="galaxies", fraction=fraction, seed=seed)
        for i, (fraction, noise) in enumerate([(0.1, 0.5), (0.5, 0.2), (1.0, 0.1)])
        for seed in (1, 2)
    ]
    models = read_evaluations(runs)
    assert "Data efficiency" in as_html(models)
    over_seeds = as_markdown(models).partition("## Over seeds")[2]
    for share in ("10%", "50%", "100%"):
        assert f"| stampnet, galaxies, images | {share} | 2 |" in over_seeds


def test_models_of_one_name_are_named_by_directory_and_names_are_escaped(write: Write) -> None:
    page = as_html(read_evaluations([write("<i>", 0.1, name="same"), write("&b|", 0.3, name="same")]))
    assert "/&lt;i&gt;" in page
    assert "<i>" not in page


def test_policies_are_evaluated_if_there_are_magnitudes(write: Write) -> None:
    [blind] = read_evaluations([write("blind", 0.1)])
    assert "## Policies" not in as_markdown([blind])
    [seeing] = read_evaluations([write("seeing", 0.1, magpsf=18.0)])
    _, _, policies = as_markdown([seeing]).partition("## Policies")
    judged = seeing.evaluation.judged
    assert sum(judged.values()) == OBJECTS
    assert f"{judged['bogus']} bogus and {judged['real']} real objects with a history" in policies
    assert str(seeing.figure("bts_p1.purity")) in policies


def test_several_classes_are_compared_class_by_class(tmp_path: Path) -> None:
    classes = ("VS", "SN", "bogus")
    truth = np.arange(ALERTS) % 3
    for i, sharpness in enumerate((1.0, 4.0)):
        logits = np.random.default_rng(i).normal(size=(ALERTS, 3)) + sharpness * np.eye(3)[truth]
        scores = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
        objects = np.array([f"object {j}" for j in range(ALERTS)])
        predictions = Predictions(classes, np.arange(ALERTS), objects, np.zeros(ALERTS), truth, scores, 0.5)
        (tmp_path / str(i)).mkdir()
        predictions.write(tmp_path / str(i) / PREDICTIONS)
        evaluation = evaluate(card(f"model_{i}"), DATASET, "test", predictions, SPEED)
        (tmp_path / str(i) / EVALUATION).write_text(evaluation.model_dump_json())
    models = read_evaluations([tmp_path / "0", tmp_path / "1"])
    assert [model.title for model in models] == ["model_1", "model_0"]
    markdown = as_markdown(models)
    by_class = markdown.partition("## Classes: ROC AUC")[2]
    assert "| model | VS (50 alerts) | SN (50 alerts) | bogus (50 alerts) |" in by_class
    row = " | ".join(str(models[0].figure(f"{label}.roc_auc")) for label in classes)
    assert f"| model_1 | {row} |" in by_class
    assert as_html(models).count("<svg") == 5


def test_other_data_sets_are_refused(write: Write) -> None:
    other = DATASET.model_copy(update={"sha256": "2" * 64})
    with pytest.raises(EvaluationError, match=r"a and .*b cannot be compared: data sets 111111111111 and 222222222222"):
        read_evaluations([write("a", 0.1), write("b", 0.1, dataset=other)])


def test_other_alerts_of_the_same_data_set_are_refused(write: Write) -> None:
    with pytest.raises(EvaluationError, match="cannot be compared: alerts, 150 and 149"):
        read_evaluations([write("a", 0.1), write("b", 0.1, n=149)])


def test_a_directory_without_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"not an evaluation: there is no evaluation\.json"):
        read_evaluations([tmp_path])
