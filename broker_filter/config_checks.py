"""Checks of a service file against environment variables, bundles, the outputs of models, and librdkafka."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from confluent_kafka import Consumer, KafkaException, Producer

from broker_filter.anomalies.reference import ReferenceSetError, check_made_with, read_card
from broker_filter.config import ConfigChecks, KafkaValue, Registry, Sasl, Section, Tls
from broker_filter.kafka.client import (
    librdkafka_log,
    plain_properties,
    refused_properties,
    security_properties,
)
from broker_filter.packets.schemas.registry_client import RegistryClient
from broker_filter.scoring.bundle import Bundle, BundleError
from broker_filter.scoring.lens_files import LensError, open_files
from broker_filter.streaming.explain import find_explained
from broker_filter.streaming.resolved import Resolver

OIDC_ENDPOINT = "sasl.oauthbearer.token.endpoint.url"
NO_ENDPOINT = "file:///dev/null"
"""librdkafka requests an OIDC token when a client is created. A check must not send the secret to any server."""


class EnvironmentChecks(ConfigChecks):
    """Checks of a service file, made on this machine. It connects to no server."""

    def __init__(self, environment: Mapping[str, str], resolver: Resolver) -> None:
        """`environment`: variables by name. `resolver`: opens the bundles and compiles the filters of the file."""
        self._environment = environment
        self._resolver = resolver

    def check_variable(self, name: str) -> None:
        """See ConfigChecks."""
        if name not in self._environment:
            raise ValueError(f"the environment variable {name} is not set")

    def model_name(self, bundle: str) -> str:
        """See ConfigChecks."""
        return self._bundle(bundle).card.name

    def model_version(self, bundle: str) -> str:
        """See ConfigChecks."""
        return self._bundle(bundle).card.version

    def check_registry(self, registry: Registry) -> None:
        """See ConfigChecks. The check creates a client, which sends nothing."""
        if registry.is_remote:
            RegistryClient(registry.location(self._environment))

    def check_reference(self, file: Path) -> None:
        """See ConfigChecks. Reads only the card of the file, because the file may have gigabytes."""
        bundles = self._resolver.bundles()
        try:
            reference = read_card(file)
            if bundles is not None:  # an error in a bundle is reported under `models`
                check_made_with(file, reference, bundles)
        except ReferenceSetError as error:
            raise ValueError(str(error)) from None

    def check_lens(self, name: str, reference: Path | None) -> None:
        """See ConfigChecks."""
        bundles = self._resolver.bundles()
        try:
            files = open_files(name)
            if bundles is not None:
                find_explained(files, bundles, read_card(reference) if reference else None)
        except (LensError, ReferenceSetError) as error:
            raise ValueError(str(error)) from None

    def check_filter(self, where: str) -> None:
        """See ConfigChecks."""
        self._resolver.expression(where)

    def check_properties(
        self,
        client: Literal["consumer", "producer"],
        properties: Mapping[str, KafkaValue],
        sasl: Sasl | None,
        tls: Tls | None,
    ) -> None:
        """See ConfigChecks. The check creates a client without servers, which connects to nothing.

        The client gets the text of the secrets, because some properties are valid only together with a secret property.
        """
        named = {**security_properties(sasl, tls), **properties}
        values = plain_properties(named, self._environment)
        try:
            if refused := refused_properties(values):
                raise ValueError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
            if OIDC_ENDPOINT in values:
                values[OIDC_ENDPOINT] = NO_ENDPOINT
            if client == "consumer":
                Consumer({"group.id": "-"} | values, logger=librdkafka_log)
            else:
                Producer({"transactional.id": "-"} | values, logger=librdkafka_log)
        except (KafkaException, ValueError) as error:
            message = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            for name, value in named.items():
                if isinstance(value, Section) and (secret := str(values[name])):
                    message = message.replace(secret, f"<{name}>")
            raise ValueError(message) from None

    def _bundle(self, name: str) -> Bundle:
        try:
            return self._resolver.bundle(name)
        except BundleError as error:
            raise ValueError(str(error)) from None
