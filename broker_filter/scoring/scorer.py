"""Scores batches of alerts with the models. An alert's scores do not depend on the rest of its batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter import config
from broker_filter.packets.batch import AlertBatch, Plane, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing.ocf import MAX_CONTAINER_BYTES
from broker_filter.packets.schemas.registry import SchemaRegistry
from broker_filter.scoring.alerts import RawAlerts, raw_alerts
from broker_filter.scoring.bundle import PROBABILITIES, TEST_VECTOR, Bundle, BundleError, Inputs, Part, open_bundle
from broker_filter.scoring.preprocess import detections_seen, prepare
from broker_filter.scoring.runtimes import LoadedNetwork, Tensors, open_network
from broker_filter.scoring.scores import ModelScores, Scores


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """One network of a bundle, loaded. It scores the alerts of its surveys, and works on `RawAlerts` of any survey."""

    bundle: Part
    network: LoadedNetwork
    surveys: tuple[Survey, ...]

    @property
    def inputs(self) -> Inputs:
        """The network's inputs."""
        return self.bundle.card.inputs

    def run(self, alerts: RawAlerts) -> Tensors:
        """Return the network's outputs by name, float32[N, ...]. Raises as `preprocess.prepare` does."""
        n, step = len(alerts), self.network.chunk
        outputs = {name: np.empty((n, *shape), np.float32) for name, shape in self.bundle.card.outputs.shapes().items()}
        chunks = [slice(start, start + step) for start in range(0, n, step)]
        prepared = (prepare(alerts[chunk], self.inputs) for chunk in chunks)
        for chunk, results in zip(chunks, self.network.run_all(prepared), strict=True):
            for name, values in results.items():
                outputs[name][chunk] = values
        return outputs

    def too_short(self, alerts: RawAlerts) -> NDArray[np.bool_]:
        """Return which of N alerts have fewer detections than the network needs, bool[N]."""
        wanted = self.inputs.light_curve
        if wanted is None or not wanted.least_detections or alerts.light_curves is None or alerts.mjd is None:
            return np.zeros(len(alerts), np.bool_)
        return detections_seen(alerts.light_curves, alerts.mjd, wanted) < wanted.least_detections

    def verify(self) -> None:
        """Raise BundleError if the network does not reproduce the test vector in its folder.

        The allowed deviation is the runtime's tolerance plus the one that the card states for this network.
        """
        vector = self.bundle.test_vector()
        outputs = self.run(vector)
        for name, expected in vector.outputs.items():
            exact = expected.astype(np.float64)
            # The derivative of a probability by its log-odds is p (1 - p).
            scale = exact * (1 - exact) if name == PROBABILITIES else np.abs(exact).max()
            allowed = self.network.tolerance * (1 + np.abs(exact)) + self.bundle.card.tolerances.get(name, 0.0) * scale
            off = np.abs(outputs[name] - exact)
            if not (off <= allowed).all():  # also true for NaN
                worst = np.unravel_index(np.argmax(off - allowed), off.shape)
                raise BundleError(
                    f"{self.bundle.directory / TEST_VECTOR}: {self.network.provider} does not reproduce it: {name} is "
                    f"off by {off[worst]:.2g} where {allowed[worst]:.2g} is allowed; the bundle's files do not belong "
                    "together, or the runtime is faulty"
                )


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle with its loaded networks: each scores the alerts of its own surveys.

    `load_model` has checked that each network reproduces its test vector.
    """

    bundle: Bundle
    parts: tuple[LoadedPart, ...]
    also: tuple[Survey, ...] = ()
    """Surveys added by the operator: their alerts are scored although no network was trained for them."""

    @property
    def name(self) -> str:
        """The model's name, the prefix of its output columns."""
        return self.bundle.card.name

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self.bundle.card.version

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the C probabilities."""
        return self.bundle.card.outputs.labels

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its C output columns, `<model>.<label>`."""
        return self.bundle.output_names

    @property
    def surveys(self) -> tuple[Survey, ...]:
        """Surveys whose alerts the model takes: those of its networks, and those that the operator added."""
        return tuple(survey for part in self.parts for survey in part.surveys)

    def surveys_of(self, label: str) -> tuple[Survey, ...]:
        """Return the surveys for which the model gives the output `label`.

        These are the surveys that the output was trained for, and those that the operator added.
        """
        given = {*_surveys(self.bundle.surveys_of(label)), *self.also}
        return tuple(survey for survey in self.surveys if survey in given)

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns that the networks need, without repetition, in the order of the networks."""
        return tuple(dict.fromkeys(column.name for part in self.parts for column in part.inputs.metadata))

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Planes that must be decoded for the model besides the cutouts."""
        return tuple(dict.fromkeys(plane for part in self.parts for plane in part.inputs.planes))

    @property
    def cutout_size(self) -> int:
        """Size in pixels that cutouts must be decoded to: the largest that a network takes."""
        return max(part.inputs.images.size for part in self.parts)

    @property
    def provider(self) -> str:
        """The engine and device that really run the networks, as `engine/device`."""
        return ", ".join(dict.fromkeys(part.network.provider for part in self.parts))

    def part(self, survey: Survey) -> LoadedPart:
        """Return the network that scores the alerts of `survey`. Raises BundleError if none does."""
        for part in self.parts:
            if survey in part.surveys:
                return part
        raise BundleError(
            f"{self.bundle.directory}: {self.name} scores no alerts of {survey}, only of "
            f"{', '.join(map(str, self.surveys))}; choose a bundle for this survey (`broker-filter models list`), or "
            f"ask for it with also: [{survey}]"
        )

    def score(self, alerts: AlertBatch) -> ModelScores:
        """Return the model's outputs for N alerts; NaN for alerts of surveys that the model does not take.

        A single probability is also NaN for alerts of a survey that its label was not trained for, and all are NaN for
        alerts with fewer detections than the card's `least_detections`. Raises as `preprocess.prepare` does.
        """
        raw, n = raw_alerts(alerts), len(alerts)
        columns = {
            name: np.full((n, *shape), np.nan, np.float32) for name, shape in self.bundle.output_shapes().items()
        }
        taken = np.zeros(n, np.bool_)
        for part in self.parts:
            own = np.isin(alerts.survey, part.surveys)
            if not own.any():
                continue
            rows = slice(None) if own.all() else own  # a slice gives views, a mask copies
            chosen = raw[rows]
            results = part.run(chosen)
            probabilities = results[PROBABILITIES][:, self._served(part)]
            probabilities[part.too_short(chosen)] = np.nan
            columns[PROBABILITIES][rows] = probabilities
            for name in columns.keys() - {PROBABILITIES}:
                columns[name][rows] = results[name]
            taken |= own
        for c, label in enumerate(self.labels):
            if (known := self.surveys_of(label)) != self.surveys:
                columns[PROBABILITIES][~np.isin(alerts.survey, known), c] = np.nan
        return ModelScores(
            self.name,
            self.version,
            self.labels,
            columns[PROBABILITIES],
            columns.get("embedding"),
            taken,
            columns.get("modalities"),
        )

    def _served(self, part: LoadedPart) -> slice | list[int]:
        """Return which of a network's probabilities are the outputs of the model, in the order of its labels."""
        given = part.bundle.card.outputs.labels
        return slice(None) if given == self.labels else [given.index(label) for label in self.labels]

    def verify(self) -> None:
        """Raise BundleError if a network does not reproduce its test vector."""
        for part in self.parts:
            part.verify()


@dataclass(frozen=True, slots=True)
class Scorer:
    """Applies all models to each batch. Thread-safe.

    >>> from broker_filter import Packet, Scorer
    >>> from broker_filter.simulate import simulate_night
    >>> scorer = Scorer.open(["default"])
    >>> packets = [Packet(alert.packet) for alert in simulate_night(3, seed=1)]
    >>> alerts, rejects = scorer.decoder().decode(packets)
    >>> real = scorer.score(alerts).columns()["default.real"]
    >>> real.shape, real.dtype
    ((3,), dtype('float32'))
    """

    models: tuple[Model, ...]

    def __post_init__(self) -> None:
        """Raise BundleError if two models have the same name, because their outputs would have the same names."""
        directories: dict[str, Path] = {}
        for model in self.models:
            if model.name in directories:
                raise BundleError(
                    f"{directories[model.name]} and {model.bundle.directory} are both called {model.name!r}: their "
                    "output columns would have the same names; import one of them under another name"
                )
            directories[model.name] = model.bundle.directory

    @classmethod
    def open(
        cls,
        models: str | Path | Sequence[str | Path] = ("default",),
        *,
        also: Sequence[config.SurveyName] = (),
        device: config.Device = "auto",
    ) -> Scorer:
        """Open bundles, and check that each network reproduces the test vector of its bundle.

        `models`: names of bundles that ship with the package (`default`, `classes`, `embedder`), or directories.
        `also`: surveys whose alerts are scored although the bundles were not trained for them. `device`: `cpu`, `cuda`,
        or `auto` for CUDA if the machine has it.

        Raises NoBundleError for a bundle that does not exist, BundleError for a bundle that cannot be trusted or has
        the name of another one, and RuntimeUnavailableError if the device cannot run the networks.
        """
        if isinstance(models, str | Path):
            models = [models]
        chosen = [config.Model(bundle=str(model), also=list(also)) for model in models]
        return open_scorer(chosen, config.Runtime(device=device))

    def decoder(
        self,
        schema_registry: SchemaRegistry | str | Path | None = None,
        *,
        columns: Sequence[str] = (),
        beside: Sequence[Model] = (),
        max_packet_bytes: int = MAX_CONTAINER_BYTES,
    ) -> Decoder:
        """Return a decoder of everything that the models read: cutouts of `cutout_size`, planes, and metadata columns.

        `schema_registry`, `max_packet_bytes` and the errors raised: see Decoder. `columns`: metadata columns to decode
        besides those of the models. `beside`: models outside of this scorer that read the same batches.
        """
        wanted = (*self.columns, *(column for model in beside for column in model.columns), *columns)
        planes = (*self.planes, *(plane for model in beside for plane in model.planes))
        return Decoder(
            schema_registry,
            cutout_size=max([self.cutout_size, *(model.cutout_size for model in beside)]),
            columns=tuple(dict.fromkeys(wanted)),
            planes=tuple(dict.fromkeys(planes)),
            max_packet_bytes=max_packet_bytes,
        )

    @property
    def cutout_size(self) -> int:
        """Size in pixels that cutouts must be decoded to: the largest that a model takes."""
        return max(model.cutout_size for model in self.models)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Planes that must be decoded for the models besides the cutouts, without repetition."""
        return tuple(dict.fromkeys(plane for model in self.models for plane in model.planes))

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns that must be decoded for the models, without repetition."""
        return tuple(dict.fromkeys(column for model in self.models for column in model.columns))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the output columns, `<model>.<label>`, in the order of the models and their labels."""
        return tuple(name for model in self.models for name in model.outputs)

    def score(self, alerts: AlertBatch) -> Scores:
        """Return the outputs of every model for N alerts, in the order of the models.

        Raises KeyError or ValueError if the alerts were decoded without something that a model reads; `decoder` makes a
        decoder that fits.
        """
        scores = tuple(model.score(alerts) for model in self.models)
        return Scores(scores, np.logical_or.reduce([model.taken for model in scores]))


def load_model(bundle: Bundle, runtime: config.Runtime, also: Sequence[config.SurveyName] = ()) -> Model:
    """Load the networks of an opened bundle, and check that each reproduces its test vector.

    `also`: see Scorer.open; the first network scores these surveys. Raises BundleError, and RuntimeUnavailableError if
    the engine or device that `runtime` requests is not available.
    """
    added = tuple(survey for survey in also if survey not in bundle.surveys)
    parts = []
    for i, part in enumerate(bundle.parts):
        surveys = part.surveys if i else (*part.surveys, *added)
        parts.append(LoadedPart(part, open_network(part, runtime), _surveys(surveys)))
    model = Model(bundle, tuple(parts), _surveys(also))
    model.verify()
    return model


def _surveys(names: Iterable[str]) -> tuple[Survey, ...]:
    return tuple(Survey[name.upper()] for name in dict.fromkeys(names))


def open_model(choice: config.Model | str, runtime: config.Runtime) -> Model:
    """Open a bundle and load its networks. Raises as `load_model` does, and NoBundleError if there is no bundle."""
    name, also = (choice, []) if isinstance(choice, str) else (choice.bundle, choice.also)
    return load_model(open_bundle(name), runtime, also)


def open_scorer(models: Sequence[config.Model | str], runtime: config.Runtime) -> Scorer:
    """Open the models, in order. Raises as `open_model` does, and BundleError if two models have the same name."""
    return Scorer(tuple(open_model(choice, runtime) for choice in models))
