"""Resolves the names in a service file: bundles are opened, and filters are compiled, each once per start.

The checks of a service file, `config check` and the service use the same bundles and filters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from broker_filter.anomalies.reference import read_card
from broker_filter.config import Service
from broker_filter.scoring.bundle import CARD, Bundle, BundleError, open_bundle
from broker_filter.scoring.lens_files import LENS_CARD, lens_directory
from broker_filter.sky.files import SkyFiles
from broker_filter.streaming.expressions import FIELDS, REVISION_DIGITS, Expression, compile_filter, normalised


@dataclass(frozen=True, slots=True)
class ResolvedService:
    """A service file with the bundles and filters that it names."""

    config: Service
    bundles: tuple[Bundle, ...]
    """The opened bundles, in the order of `config.serving`."""
    shadows: tuple[Bundle, ...]
    """The opened bundles on trial, in the order of `config.shadows`."""
    filters: tuple[tuple[str, Expression], ...]
    """Name and compiled expression of each filter, in the order of `config.filters`."""
    judged: Expression | None
    """The compiled `config.anomalies.where`; None if the file has none."""
    files: SkyFiles
    """The regions and lists of targets that these expressions read."""
    revision: str
    """Revision of the configuration: see `configuration_revision`."""


class Resolver:
    """Opens the bundles of one service file and compiles expressions over their outputs. It repeats no work."""

    def __init__(self, bundles: Sequence[str], folder: Path) -> None:
        """`bundles`: the bundles that the file names, valid or not, except shadows, whose outputs no filter sees.

        `folder`: where names of files in filters start.
        """
        self._names = bundles
        self._opened: dict[str, Bundle | BundleError] = {}
        self._compiled: dict[str, Expression] = {}
        self._files = SkyFiles(folder)

    def bundle(self, name: str) -> Bundle:
        """Return a bundle. Raises BundleError if it cannot be opened."""
        if name not in self._opened:
            try:
                self._opened[name] = open_bundle(name)
            except BundleError as error:
                self._opened[name] = error
        if isinstance(opened := self._opened[name], BundleError):
            raise opened.with_traceback(None)  # otherwise its traceback would grow each time
        return opened

    def bundles(self) -> list[Bundle] | None:
        """Return all bundles of the file except shadows, or None if one of them cannot be opened."""
        try:
            return [self.bundle(name) for name in self._names]
        except BundleError:
            return None

    def expression(self, where: str) -> Expression:
        """Return the compiled filter `where`. Raises ExpressionError if it is not valid.

        If a bundle cannot be opened, its outputs are unknown, and any unknown name is accepted as an output.
        """
        if where not in self._compiled:
            bundles = self.bundles()
            outputs = None if bundles is None else [name for one in bundles for name in one.output_names]
            self._compiled[where] = compile_filter(where, FIELDS, outputs, self._files)
        return self._compiled[where]

    def resolve(self, config: Service) -> ResolvedService:
        """Return the configuration with its bundles and compiled filters.

        Raises BundleError if a bundle cannot be opened, ExpressionError if a filter is not valid, ReferenceSetError if
        the reference cannot be read, and OSError if the card of a lens cannot be read.
        """
        where = config.anomalies.where if config.anomalies else None
        return ResolvedService(
            config,
            bundles=tuple(self.bundle(model.bundle) for model in config.serving),
            shadows=tuple(self.bundle(model.bundle) for model in config.shadows),
            filters=tuple((one.name, self.expression(one.where)) for one in config.filters),
            judged=None if where is None else self.expression(where),
            files=self._files,
            revision=configuration_revision(config, [self.bundle(model.bundle) for model in config.models]),
        )


def configuration_revision(config: Service, bundles: Sequence[Bundle]) -> str:
    """Return the first REVISION_DIGITS hexadecimal digits of a sha256 over what decides the output records.

    That is everything that decides whether an alert has a record in a topic, and what the record holds: the models
    (with the sha256 of their cards, which list that of all their files) and whether they are shadows, the precision,
    reference, rate and lenses of the anomaly detection, the filters, the payload, the size of the window of duplicates,
    and whether duplicates are published. Brokers, topics, ports, secrets and limits of time and size are left out. The
    files that a filter reads are left out too: the revision of the filter covers them.

    `bundles`: the opened bundles, in the order of `config.models`.

    Raises ReferenceSetError if the reference cannot be read, and OSError if the card of a lens cannot be read.
    """
    anomalies = config.anomalies and {
        "reference": read_card(config.anomalies.reference).model_dump(include={"data_sha256", "measure", "where"}),
        "rate": config.anomalies.rate,
        "where": config.anomalies.where and normalised(config.anomalies.where),
        "lenses": [_sha256(lens_directory(lens) / LENS_CARD) for lens in config.anomalies.lens],
    }
    decisive = {
        "models": [
            [bundle.card.name, bundle.card.version, _sha256(bundle.directory / CARD), sorted(model.also), model.shadow]
            for model, bundle in zip(config.models, bundles, strict=True)
        ],
        "precision": config.runtime.precision,
        "anomalies": anomalies,
        "filters": [one.model_dump(exclude_defaults=True) | {"where": normalised(one.where)} for one in config.filters],
        "payload": config.output.payload,
        "duplicates": [config.duplicate_window, config.duplicates],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:REVISION_DIGITS]


def _sha256(card: Path) -> str:
    return hashlib.sha256(card.read_bytes()).hexdigest()


def resolve(config: Service) -> ResolvedService:
    """Open the bundles and compile the filters of a configuration. Raises as `Resolver.resolve` does.

    Names of files in filters start in the current directory.
    """
    return Resolver([model.bundle for model in config.serving], Path()).resolve(config)
