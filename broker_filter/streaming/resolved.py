"""Resolves the names in a service file: bundles are opened, and filters are compiled, each once per start.

The checks of a service file, `config check` and the service use the same bundles and filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker_filter.config import Service
from broker_filter.scoring.bundle import Bundle, BundleError, open_bundle
from broker_filter.streaming.expressions import FIELDS, Expression, compile_filter


@dataclass(frozen=True, slots=True)
class ResolvedService:
    """A service file with the bundles and filters that it names."""

    config: Service
    bundles: tuple[Bundle, ...]
    """The opened bundles, in the order of `config.models`."""
    filters: tuple[tuple[str, Expression], ...]
    """Name and compiled expression of each filter, in the order of `config.filters`."""
    judged: Expression | None
    """The compiled `config.anomalies.where`; None if the file has none."""


class Resolver:
    """Opens the bundles of one service file and compiles expressions over their outputs. It repeats no work."""

    def __init__(self, bundles: Sequence[str]) -> None:
        """`bundles`: the bundles that the file names, valid or not."""
        self._names = bundles
        self._opened: dict[str, Bundle | BundleError] = {}
        self._compiled: dict[str, Expression] = {}

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
        """Return all bundles of the file, or None if one of them cannot be opened."""
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
            self._compiled[where] = compile_filter(where, FIELDS, outputs)
        return self._compiled[where]

    def resolve(self, config: Service) -> ResolvedService:
        """Return the configuration with its bundles and compiled filters.

        Raises BundleError if a bundle cannot be opened, and ExpressionError if a filter is not valid.
        """
        where = config.anomalies.where if config.anomalies else None
        return ResolvedService(
            config,
            bundles=tuple(self.bundle(model.bundle) for model in config.models),
            filters=tuple((one.name, self.expression(one.where)) for one in config.filters),
            judged=None if where is None else self.expression(where),
        )


def resolve(config: Service) -> ResolvedService:
    """Open the bundles and compile the filters of a configuration. Raises as `Resolver.resolve` does."""
    return Resolver([model.bundle for model in config.models]).resolve(config)
