"""What a service file is checked against besides itself: environment, bundles, models' outputs, librdkafka."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from confluent_kafka import Consumer, KafkaException, Producer

from broker_filter.config import KafkaValue, Section, Surroundings
from broker_filter.scoring.bundle import Bundle, BundleError, load_bundle
from broker_filter.scoring.reference import ReferenceSetError, check_made_with, read_card
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.kafka_client import RESERVED, librdkafka_log


class ThisMachine(Surroundings):
    """The surroundings of a service that is to run here."""

    def __init__(self, environment: Mapping[str, str], bundles: Sequence[str]) -> None:
        """`bundles`: those that the file names, sound or not."""
        self._environment = environment
        self._bundles = bundles
        self._opened: dict[str, Bundle | BundleError] = {}

    def check_variable(self, name: str) -> None:
        """See Surroundings."""
        if name not in self._environment:
            raise ValueError(f"the environment variable {name} is not set")

    def model_name(self, bundle: str) -> str:
        """See Surroundings."""
        opened = self._open(bundle)
        if isinstance(opened, BundleError):
            raise ValueError(str(opened))
        return opened.card.name

    def outputs(self) -> list[str] | None:
        """See Surroundings."""
        outputs = []
        for name in self._bundles:
            opened = self._open(name)
            if isinstance(opened, BundleError):
                return None
            outputs += [f"{opened.card.name}.{label}" for label in opened.card.outputs.labels]
        return outputs

    def check_reference(self, file: Path) -> None:
        """See Surroundings. Reads its card alone, not what may be gigabytes."""
        cards = [opened.card for name in self._bundles if isinstance(opened := self._open(name), Bundle)]
        try:
            reference = read_card(file)
            if len(cards) == len(self._bundles):  # what is wrong with a bundle is said of the models
                check_made_with(file, reference, cards)
        except ReferenceSetError as error:
            raise ValueError(str(error)) from None

    def check_filter(self, where: str, outputs: Sequence[str] | None) -> None:
        """See Surroundings."""
        compile_filter(where, FIELDS, outputs)

    def check_properties(self, client: Literal["consumer", "producer"], properties: Mapping[str, KafkaValue]) -> None:
        """See Surroundings. A client without servers is made, and connects to nothing."""
        if reserved := [f"{name} ({RESERVED[name]})" for name in properties if name in RESERVED]:
            raise ValueError(f"set by the service itself: {', '.join(reserved)}")
        values = {name: value for name, value in properties.items() if not isinstance(value, Section)}
        try:
            if client == "consumer":
                Consumer({"group.id": "-"} | values, logger=librdkafka_log)
            else:
                Producer({"transactional.id": "-"} | values, logger=librdkafka_log)
        except KafkaException as error:
            raise ValueError(error.args[0].str()) from None

    def _open(self, name: str) -> Bundle | BundleError:
        """The bundle, or what is wrong with it: read once."""
        if name not in self._opened:
            try:
                self._opened[name] = load_bundle(name)
            except BundleError as error:
                self._opened[name] = error
        return self._opened[name]
