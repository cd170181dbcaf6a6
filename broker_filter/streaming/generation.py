"""What one configuration makes: decoder, models, judge, filters and router, as one immutable value, without Kafka.

A batch is decoded, scored and routed by one generation, so no output record mixes two configurations. What must outlive
a configuration, such as the window of duplicates and the metrics, is not in a generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker_filter.config import Input, Model, Service
from broker_filter.packets.decode import Decoder
from broker_filter.packets.schemas.registry import SchemaRegistry, open_registry
from broker_filter.packets.schemas.registry_client import no_beat
from broker_filter.scoring.bundle import Bundle
from broker_filter.scoring.scorer import Model as LoadedModel
from broker_filter.scoring.scorer import Scorer, load_model
from broker_filter.sky.files import SkyFiles
from broker_filter.streaming.drift import DriftMonitor
from broker_filter.streaming.filters import Filters, open_filters
from broker_filter.streaming.judge import AnomalyJudge, open_judge
from broker_filter.streaming.resolved import ResolvedService
from broker_filter.streaming.routing import Router, open_router
from broker_filter.streaming.shadow import ShadowScorer


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Generation:
    """The objects that one configuration makes. All of them are ready for use."""

    config: Service
    revision: str
    """Revision of the configuration, which each record states."""
    decoder: Decoder
    """Decodes everything that the models, with those on trial, the judge, the filters, router and `drift` read."""
    scorer: Scorer
    judge: AnomalyJudge | None
    """Flags anomalies; None without anomaly detection."""
    filters: Filters
    files: SkyFiles
    """The files that the filters and the judge's cut read."""
    shadows: ShadowScorer
    """The models on trial, perhaps none."""
    router: Router
    drift: DriftMonitor
    """Compares the alerts of the last day with those that the bundles of `scorer` record."""


def open_input_schemas(source: Input, waiting: Callable[[], None] = no_beat) -> SchemaRegistry:
    """Return where the schemas of input packets are found. `waiting`: see RegistryClient."""
    registry = source.schema_registry
    return open_registry(
        registry.location() if registry else None, drop_cache=source.schema_cache == "drop", waiting=waiting
    )


def open_generation(
    service: ResolvedService,
    registry: SchemaRegistry,
    waiting: Callable[[], None] = no_beat,
    before: Generation | None = None,
) -> Generation:
    """Load the models and the reference of a configuration, and run the test vectors of the models.

    `registry`: where the schemas of input packets are found. `waiting`: is called while the schema registry of the
    output does not answer; see RegistryClient. `before`: the generation that this one will replace. Its thresholds for
    anomalies are shared if reference and rate are the same, and its counts of a filter if the filter is the same.

    Raises BundleError, RuntimeUnavailableError, ReferenceSetError, LensError and ExpressionError, as `load_model` and
    `open_judge` do.
    """
    config = service.config
    scorer = Scorer(_load(config, config.serving, service.bundles))
    shadows = ShadowScorer(_load(config, config.shadows, service.shadows))
    judge = None
    if anomalies := config.anomalies:
        judge = open_judge(scorer, anomalies.reference, anomalies.rate, service.judged, anomalies.lens)
        if before and before.judge:
            judge.continue_from(before.judge)
    filters = open_filters(service, before.filters if before else None)
    drift = DriftMonitor(scorer.models)
    if before:
        drift.continue_from(before.drift)
    router = open_router(service, waiting)
    decoder = scorer.decoder(
        registry,
        columns=(*filters.columns, *(judge.columns if judge else ()), *drift.columns, *router.columns),
        beside=shadows.models,
        max_packet_bytes=config.input.max_packet_bytes,
    )
    return Generation(config, service.revision, decoder, scorer, judge, filters, service.files, shadows, router, drift)


def _load(config: Service, models: Sequence[Model], bundles: Sequence[Bundle]) -> tuple[LoadedModel, ...]:
    return tuple(load_model(bundle, config.runtime, model.also) for model, bundle in zip(models, bundles, strict=True))
