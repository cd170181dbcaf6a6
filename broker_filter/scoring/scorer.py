"""Batches of alerts through the models. An alert's scores do not depend on what else is in its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from broker_filter import config
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.scoring.alerts import RawAlerts, raw_alerts
from broker_filter.scoring.bundle import PROBABILITIES, TEST_VECTOR, Bundle, BundleError, load_bundle
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.runtimes import LoadedNetwork, Tensors, open_network
from broker_filter.scoring.scores import ModelScores, Scores


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle whose network is loaded and gives what the bundle says it must."""

    bundle: Bundle
    network: LoadedNetwork
    also: tuple[Survey, ...] = ()
    """The surveys that the operator added: their alerts are scored although the network was not trained for them."""

    @property
    def name(self) -> str:
        """The prefix of its output columns."""
        return self.bundle.card.name

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self.bundle.card.version

    @property
    def labels(self) -> tuple[str, ...]:
        """What its C probabilities are of."""
        return self.bundle.card.outputs.labels

    @property
    def surveys(self) -> tuple[Survey, ...]:
        """Whose alerts it takes: those that it was trained for, and those that the operator added."""
        return self._and_also(self.bundle.card.surveys)

    def surveys_of(self, label: str) -> tuple[Survey, ...]:
        """For whose alerts it gives the output `label`: those that this was trained for, and those that the operator
        added."""
        return self._and_also(self.bundle.card.surveys_of(label))

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that it needs, in its order."""
        return tuple(column.name for column in self.bundle.card.inputs.metadata)

    @property
    def provider(self) -> str:
        """What really runs its network, `engine/device`."""
        return self.network.provider

    def score(self, alerts: AlertBatch) -> ModelScores:
        """Its outputs for the alerts of its surveys, NaN for the others; each probability is NaN also for the alerts of
        a survey that this output was not trained for.

        Raises as `preprocess.prepare` does.
        """
        taken = np.isin(alerts.survey, self.surveys)
        rows = slice(None) if taken.all() else taken  # a view where it can be, a copy where it must
        columns = {}
        for name, values in self.run(raw_alerts(alerts)[rows]).items():
            columns[name] = np.full((len(alerts), *values.shape[1:]), np.nan, np.float32)
            columns[name][rows] = values
        for c, label in enumerate(self.labels):
            if (known := self.surveys_of(label)) != self.surveys:
                columns["probabilities"][~np.isin(alerts.survey, known), c] = np.nan
        return ModelScores(
            self.name,
            self.version,
            self.labels,
            columns["probabilities"],
            columns.get("embedding"),
            taken,
            columns.get("modalities"),
        )

    def run(self, alerts: RawAlerts) -> Tensors:
        """The network's outputs by name, float32[N, ...]; raises as `score` does."""
        card, n, step = self.bundle.card, len(alerts), self.network.chunk
        outputs = {name: np.empty((n, *shape), np.float32) for name, shape in card.outputs.shapes().items()}
        chunks = [slice(start, start + step) for start in range(0, n, step)]
        prepared = (prepare(alerts[chunk], card.inputs) for chunk in chunks)
        for chunk, results in zip(chunks, self.network.run_all(prepared), strict=True):
            for name, values in results.items():
                outputs[name][chunk] = values
        return outputs

    def _and_also(self, surveys: Sequence[str]) -> tuple[Survey, ...]:
        return tuple(dict.fromkeys([*(Survey[survey.upper()] for survey in surveys), *self.also]))

    def verify(self) -> None:
        """Raises BundleError where the network does not reproduce the bundle's test vector.

        Allowed is what the runtime's arithmetic allows any network, and what the card says of this one's.
        """
        vector = self.bundle.test_vector()
        outputs = self.run(vector)
        for name, expected in vector.outputs.items():
            exact = expected.astype(np.float64)
            # The derivative of a probability by its log-odds is p (1 - p).
            scale = exact * (1 - exact) if name == PROBABILITIES else np.abs(exact).max()
            allowed = self.network.tolerance * (1 + np.abs(exact)) + self.bundle.card.tolerances.get(name, 0.0) * scale
            off = np.abs(outputs[name] - exact)
            if not (off <= allowed).all():  # nor where it is NaN
                worst = np.unravel_index(np.argmax(off - allowed), off.shape)
                raise BundleError(
                    f"{self.bundle.directory / TEST_VECTOR}: {self.provider} does not reproduce it: {name} is off by "
                    f"{off[worst]:.2g} where {allowed[worst]:.2g} is allowed; the bundle's files do not belong "
                    "together, or the runtime is at fault"
                )


@dataclass(frozen=True, slots=True)
class Scorer:
    """All the models over each batch. May be called from several threads."""

    models: tuple[Model, ...]

    @property
    def cutout_size(self) -> int:
        """The size in pixels that cutouts must be decoded to: the largest that a model takes."""
        return max(model.bundle.card.inputs.images.size for model in self.models)

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that must be decoded for the models."""
        return tuple(dict.fromkeys(column for model in self.models for column in model.columns))

    def score(self, alerts: AlertBatch) -> Scores:
        """Every model's outputs, in the models' order."""
        scores = tuple(model.score(alerts) for model in self.models)
        return Scores(scores, np.logical_or.reduce([model.taken for model in scores]))


def open_model(choice: config.Model | str, runtime: config.Runtime) -> Model:
    """Loads a bundle and its network, and checks that the network gives what the bundle says.

    Raises BundleError, and RuntimeUnavailableError where `runtime` asks for what is not there.
    """
    name, also = (choice, []) if isinstance(choice, str) else (choice.bundle, choice.also)
    bundle = load_bundle(name)
    model = Model(bundle, open_network(bundle, runtime), tuple(Survey[survey.upper()] for survey in also))
    model.verify()
    return model


def open_scorer(models: Sequence[config.Model | str], runtime: config.Runtime) -> Scorer:
    """Opens the models, in order. Raises as `open_model` does, and BundleError where two have the same name."""
    opened: dict[str, Model] = {}
    for choice in models:
        model = open_model(choice, runtime)
        if model.name in opened:
            first, second = opened[model.name].bundle.directory, model.bundle.directory
            raise BundleError(
                f"{first} and {second} are both called {model.name!r}: their scores could not be told apart; "
                "import one of them under another name"
            )
        opened[model.name] = model
    return Scorer(tuple(opened.values()))
