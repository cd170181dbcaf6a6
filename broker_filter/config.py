"""The service's configuration: what a service file may say, and what each key means. `config_file` reads one.

Every key is documented where it is declared; a misspelt key is an error. Secrets are named (`{env: NAME}` or `{file:
PATH}`), never written down in the file, never logged.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

SCORED, ANOMALIES, DEAD_LETTER, POSITIONS = "scored", "anomalies", "dead-letter", "positions"
RESERVED_TOPICS = (SCORED, ANOMALIES, DEAD_LETTER, POSITIONS)
"""`<prefix>.<name>` of the service's own topics, which no filter can have."""
TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
"""What Kafka takes for a topic's name."""

SECRET_PROPERTIES = ("password", "secret", "passphrase", "key.pem")
"""How the names of librdkafka's properties end that hold secrets."""

SurveyName = Literal["ztf", "lsst"]


class Section(BaseModel):
    """A mapping of a YAML file: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServiceSection(Section):
    """A section of the service file, which takes values as they are: `port: "80"` and `max_size: yes` are errors."""

    model_config = ConfigDict(strict=True)


class ConfigChecks(ABC):
    """What a service file is checked against besides itself: given to pydantic as the context of a validation.

    Without it only the file's form is checked. Every method but `outputs` raises ValueError for what does not do.
    """

    @abstractmethod
    def check_variable(self, name: str) -> None:
        """An environment variable must be set."""

    @abstractmethod
    def model_name(self, bundle: str) -> str:
        """A bundle must be readable; returns its name."""

    @abstractmethod
    def outputs(self) -> list[str] | None:
        """All models' outputs, `<model>.<label>`; None where a bundle cannot be read."""

    @abstractmethod
    def check_reference(self, file: Path) -> None:
        """A file must be a reference set, made with one of the models."""

    @abstractmethod
    def check_filter(self, where: str, outputs: Sequence[str] | None) -> None:
        """An expression must compile against the alerts' fields and the models' outputs, where those are known."""

    @abstractmethod
    def check_properties(
        self,
        client: Literal["consumer", "producer"],
        properties: Mapping[str, KafkaValue],
        sasl: Sasl | None,
        tls: Tls | None,
    ) -> None:
        """librdkafka must accept the properties beside `sasl` and `tls`, and none may be the service's own to set."""


def _checks(info: ValidationInfo) -> ConfigChecks | None:
    return info.context if isinstance(info.context, ConfigChecks) else None


def _is_file(path: Path, info: ValidationInfo) -> Path:
    if _checks(info) and not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError(f"no file {path} that can be read")
    return path


ReadablePath = Annotated[Path, Field(strict=False), AfterValidator(_is_file)]


class SecretFromEnvironment(ServiceSection):
    """A secret in an environment variable."""

    env: str

    @field_validator("env")
    @classmethod
    def _is_set(cls, name: str, info: ValidationInfo) -> str:
        if checks := _checks(info):
            checks.check_variable(name)
        return name


class SecretFromFile(ServiceSection):
    """A secret in a file (its trailing newline is dropped)."""

    file: ReadablePath


def _kind(value: Any) -> str:
    """Which of the types below a value is meant for."""
    if isinstance(value, SecretFromFile) or (isinstance(value, dict) and "file" in value):
        return "file"
    return "env" if isinstance(value, SecretFromEnvironment | dict) else "plain"


def _named_secret(value: Any) -> Any:
    if _kind(value) == "plain":
        raise ValueError("a secret is named, not written down: {env: VARIABLE} or {file: PATH}")
    return value


Secret = Annotated[
    Annotated[SecretFromEnvironment, Tag("env")] | Annotated[SecretFromFile, Tag("file")],
    Discriminator(_kind),
    BeforeValidator(_named_secret),
]


class Sasl(ServiceSection):
    """SASL credentials; over TLS where `tls` is also given."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="SCRAM-SHA-512", description="How to prove who one is."
    )
    username: str = Field(description="User name.")
    password: Secret = Field(description="`{env: VARIABLE}` or `{file: PATH}`.")


class Tls(ServiceSection):
    """TLS towards the brokers; with a certificate and its key, mutual TLS."""

    ca: ReadablePath | None = Field(
        default=None, description="PEM file of the authorities to trust; the system's if absent."
    )
    certificate: ReadablePath | None = Field(
        default=None, description="PEM file of one's own certificate, for mutual TLS."
    )
    key: ReadablePath | None = Field(default=None, description="PEM file of the certificate's private key.")
    key_password: Secret | None = Field(default=None, description="`{env: VARIABLE}` or `{file: PATH}`.")

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Tls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both or neither")
        return self


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float):
        raise ValueError("should be text, a number, true or false, or a secret: {env: VARIABLE} or {file: PATH}")
    return value


KafkaValue = Annotated[
    Annotated[str | int | float | bool, BeforeValidator(_scalar), Tag("plain")]
    | Annotated[SecretFromEnvironment, Tag("env")]
    | Annotated[SecretFromFile, Tag("file")],
    Discriminator(_kind),
]


def _secrets_are_named(properties: dict[str, KafkaValue]) -> dict[str, KafkaValue]:
    if written := [
        name
        for name, value in properties.items()
        if name.endswith(SECRET_PROPERTIES) and not isinstance(value, Section)
    ]:
        raise ValueError(
            f"secrets are named, not written down, {{env: VARIABLE}} or {{file: PATH}}: {', '.join(written)}"
        )
    return properties


KafkaProperties = Annotated[dict[str, KafkaValue], AfterValidator(_secrets_are_named)]


StartName = Literal["earliest", "latest", "stored"]


def _utc(value: Any) -> Any:
    """A time in UTC, whatever zone it was given in. Times without a zone are UTC."""
    if isinstance(value, str) and value not in get_args(StartName):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if not isinstance(value, str | datetime):
        raise ValueError("should be earliest, latest, stored or an ISO time")
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return value


Start = Annotated[StartName | datetime, BeforeValidator(_utc)]


class Input(ServiceSection):
    """Where alerts come from."""

    bootstrap_servers: str = Field(min_length=1, description="The survey's brokers, `host:port,host:port`.")
    group_id: str = Field(min_length=1, description="Consumer group; instances with the same id share the partitions.")
    topics: list[str] = Field(
        min_length=1,
        description="Topic names. strftime directives stand for the UTC day (`ztf_%Y%m%d_programid1`) and roll over at "
        "midnight. Topics of earlier days are read too as far as they hold unread messages: all days with `start: "
        "earliest`, the days since a time, otherwise the days since the first one that the group has read. A topic "
        "that appears days late is found within a minute.",
    )
    start: Start = Field(
        default="stored",
        description="Where to start in a partition without a stored position: `earliest`, `latest`, or an ISO time "
        "(UTC); `stored` refuses to start without one.",
    )
    remade: Literal["refuse", "read"] = Field(
        default="refuse",
        description="What to do where a topic was deleted and made anew, so that the stored position belongs to the "
        "deleted topic: `refuse` ends the service, at every start; `read` reads the new topic from its beginning.",
    )
    sasl: Sasl | None = Field(default=None, description="SASL credentials.")
    tls: Tls | None = Field(
        default=None, description="TLS towards the brokers; `{}` for TLS with the system's authorities."
    )
    kafka: KafkaProperties = Field(default={}, description="librdkafka properties, passed through as they are.")
    schema_registry: str | None = Field(
        default=None, description="URL of a Confluent schema registry, or a directory of .avsc files."
    )
    schema_cache: Literal["keep", "drop"] = Field(
        default="keep",
        description="`drop` deletes at the start what earlier runs have kept of the registry's schemas on this "
        "machine's disk: for a registry that was wiped and gives its ids to other schemas.",
    )
    max_packet_bytes: int = Field(
        default=16 * 2**20, gt=0, description="Larger packets are rejected as `too_large`, undecoded."
    )

    @field_validator("topics")
    @classmethod
    def _topics_are_names(cls, topics: list[str]) -> list[str]:
        # To librdkafka a name with ^ is a pattern: it could match the topics that the service itself writes.
        now = datetime.now(UTC)
        if wrong := [repr(topic) for topic in topics if not TOPIC_NAME.fullmatch(now.strftime(topic))]:
            raise ValueError(
                f"{', '.join(wrong)}: no topic's name, which is of letters, digits, '.', '_', '-' and strftime "
                "directives; patterns are not taken"
            )
        return topics

    @field_validator("schema_registry")
    @classmethod
    def _registry_is_there(cls, location: str | None, info: ValidationInfo) -> str | None:
        if _checks(info) and location and not _is_http_url(location) and not Path(location).is_dir():
            raise ValueError("neither an http(s) URL nor a directory")
        return location

    @field_validator("kafka")
    @classmethod
    def _properties_exist(cls, properties: dict[str, KafkaValue], info: ValidationInfo) -> dict[str, KafkaValue]:
        if checks := _checks(info):
            checks.check_properties("consumer", properties, info.data.get("sasl"), info.data.get("tls"))
        return properties


class Output(ServiceSection):
    """Where scored alerts go."""

    prefix: str = Field(
        pattern=r"^[a-zA-Z0-9._-]+$", description="Topics are `<prefix>.scored`, `<prefix>.anomalies`, ..."
    )
    bootstrap_servers: str | None = Field(
        default=None, min_length=1, description="One's own brokers; the input's cluster if absent."
    )
    payload: Literal["full", "no_cutouts", "scores"] = Field(
        default="full", description="How much of the packet travels on: `full`, `no_cutouts` or `scores`."
    )
    schema_registry: str | None = Field(
        default=None,
        description="URL of a registry: records are then Confluent wire format instead of container files.",
    )
    subject: Literal["topic", "record", "topic-record"] = Field(
        default="topic-record",
        description="Under which subject the registry gets a schema: `topic` (`<topic>-value`), `record` (the record's "
        "full name) or `topic-record` (`<topic>-<full name>`).",
    )
    sasl: Sasl | None = Field(default=None, description="SASL credentials.")
    tls: Tls | None = Field(
        default=None, description="TLS towards the brokers; `{}` for TLS with the system's authorities."
    )
    kafka: KafkaProperties = Field(default={}, description="librdkafka properties, passed through as they are.")
    partitions: int = Field(default=4, gt=0, description="Partitions of topics that are created.")
    replication_factor: int = Field(
        default=-1, ge=-1, description="Replication factor of topics that are created; -1: the cluster's default."
    )

    @field_validator("schema_registry")
    @classmethod
    def _registry_is_url(cls, location: str | None) -> str | None:
        if location and not _is_http_url(location):
            raise ValueError("should be an http(s) URL: schemas are registered there")
        return location

    @field_validator("kafka")
    @classmethod
    def _properties_exist(cls, properties: dict[str, KafkaValue], info: ValidationInfo) -> dict[str, KafkaValue]:
        if checks := _checks(info):
            checks.check_properties("producer", properties, info.data.get("sasl"), info.data.get("tls"))
        return properties


class Model(ServiceSection):
    """A bundle to score with; the bundle alone may be written in its place."""

    bundle: str = Field(description="A directory, or the name of a bundle that ships.")
    also: list[SurveyName] = Field(
        default=[], description="Surveys whose alerts get every output although the bundle was not trained for them."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_bundle(cls, value: Any) -> Any:
        return {"bundle": value} if isinstance(value, str) else value

    @field_validator("bundle")
    @classmethod
    def _bundle_is_sound(cls, bundle: str, info: ValidationInfo) -> str:
        if checks := _checks(info):
            checks.model_name(bundle)
        return bundle


class Anomalies(ServiceSection):
    """The alerts that are least like ordinary ones go to `<prefix>.anomalies` too."""

    reference: ReadablePath = Field(
        description="The ordinary ones: a file that `broker-filter reference build` made with one of the models."
    )
    rate: float = Field(
        default=0.001,
        gt=0,
        le=0.1,
        description="The share of the judged alerts that are flagged: the threshold follows the stream to keep it.",
    )
    where: str | None = Field(
        default=None,
        description="The alerts that are judged, an expression as a filter's (`real > 0.9`: bogus ones are strange, "
        "too); the reference's own if absent.",
    )

    @field_validator("reference")
    @classmethod
    def _reference_is_of_a_model(cls, reference: Path, info: ValidationInfo) -> Path:
        if checks := _checks(info):
            checks.check_reference(reference)
        return reference

    @field_validator("where")
    @classmethod
    def _where_compiles(cls, where: str | None, info: ValidationInfo) -> str | None:
        if where is not None and (checks := _checks(info)):
            checks.check_filter(where, checks.outputs())
        return where


class Filter(ServiceSection):
    """Alerts for which `where` is true go to `<prefix>.<name>` too."""

    name: str = Field(pattern=r"^[a-zA-Z0-9._-]+$", description="Last part of the topic's name.")
    where: str = Field(description="An expression over scores and alert fields: `real > 0.65 and magpsf < 18.5`.")

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED_TOPICS:
            raise ValueError(f"{name!r} is one of the service's own topics")
        return name

    @field_validator("where")
    @classmethod
    def _where_compiles(cls, where: str, info: ValidationInfo) -> str:
        if checks := _checks(info):
            checks.check_filter(where, checks.outputs())
        return where


class Batch(ServiceSection):
    """How many alerts are decoded and scored together."""

    max_size: int = Field(default=128, gt=0, le=4096, description="Most packets in a batch.")
    max_wait_ms: int = Field(default=20, ge=0, description="How long a batch waits to be full.")


class Transaction(ServiceSection):
    """A transaction ends when nothing more is on its way, by count, or by time, whichever comes first.

    So a quiet stream is delivered at once, and a burst in few large transactions.
    """

    linger_ms: int = Field(
        default=10, ge=0, description="How long a transaction stays open although nothing more is on its way."
    )
    max_alerts: int = Field(default=1024, gt=0, description="Most alerts in a transaction.")
    max_ms: int = Field(default=500, gt=0, description="How long a transaction stays open while more is on its way.")


class Runtime(ServiceSection):
    """What runs the networks. A device that was asked for and is not there is an error, never a silent fall-back."""

    engine: Literal["auto", "onnxruntime", "torch"] = Field(
        default="auto", description="`auto`, `onnxruntime`, `torch`."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto` uses CUDA if there is a GPU and PyTorch is installed; `cpu`, `cuda`."
    )
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="What torch computes in on a CUDA device; scores are float32 in any case."
    )
    decode_threads: int | None = Field(
        default=None, gt=0, description="Decoding threads; by the available cores if absent."
    )
    inference_threads: int | None = Field(
        default=None, gt=0, description="Threads of one inference; by the available cores if absent."
    )


class Http(ServiceSection):
    """Where /metrics, /livez and /readyz are served."""

    host: str = Field(default="127.0.0.1", description="Address to listen at; this machine alone by default.")
    port: int = Field(default=9108, ge=0, le=65535, description="0 takes a free port.")


class Service(ServiceSection):
    """The whole file."""

    input: Input = Field(description="Where alerts come from.")
    output: Output = Field(description="Where scored alerts go.")
    models: list[Model] = Field(
        default=[Model(bundle="default")],
        min_length=1,
        description="Bundles to score with, as `[default, ./mine]`; the default bundle if absent.",
    )
    anomalies: Anomalies | None = Field(default=None, description="What is an anomaly; nothing if absent.")
    filters: list[Filter] = Field(default=[], description="Topics of chosen alerts.")
    duplicates: Literal["mark", "drop"] = Field(
        default="mark",
        description="An alert whose id was seen before is published with a mark (`mark`) or not at all (`drop`), and "
        "counted as a duplicate. Ids are remembered in memory: an instance does not know the ids that it saw before "
        "a restart or that another instance saw.",
    )
    duplicate_window: int = Field(
        default=1_000_000,
        ge=0,
        description="How many of the latest alert ids an instance remembers; a restart forgets them all.",
    )
    batch: Batch = Field(default=Batch(), description="How many alerts are decoded and scored together.")
    transaction: Transaction = Field(default=Transaction(), description="How long a transaction is.")
    runtime: Runtime = Field(default=Runtime(), description="What runs the networks.")
    http: Http = Field(default=Http(), description="Where metrics and health are served.")
    stall_timeout_s: float = Field(
        default=120, gt=0, description="A stage without progress for so long ends the process, non-zero."
    )

    @property
    def output_topics(self) -> list[str]:
        """Every topic that alerts and dead letters go to."""
        anomalous = [ANOMALIES] if self.anomalies else []
        names = [SCORED, *anomalous, *(one.name for one in self.filters), DEAD_LETTER]
        return [f"{self.output.prefix}.{name}" for name in names]

    @field_validator("filters")
    @classmethod
    def _filters_differ(cls, filters: list[Filter]) -> list[Filter]:
        names = [filter_.name for filter_ in filters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than one filter is called {', '.join(twice)}")
        return filters

    @model_validator(mode="after")
    def _reads_nothing_that_it_writes(self) -> Service:
        source, output = self.input, self.output
        if output.bootstrap_servers in (None, source.bootstrap_servers):
            written = {f"{output.prefix}.{name}" for name in (*RESERVED_TOPICS, *(one.name for one in self.filters))}
            if loops := sorted(written.intersection(source.topics)):
                raise ValueError(f"{', '.join(loops)} would be read and written; choose another output.prefix")
        return self

    @field_validator("models")
    @classmethod
    def _models_differ(cls, models: list[Model], info: ValidationInfo) -> list[Model]:
        if checks := _checks(info):
            names = [checks.model_name(model.bundle) for model in models]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"more than one bundle is called {', '.join(twice)}; their outputs could not be told apart"
                )
        return models


def suggestion(word: str, known: Sequence[str]) -> str:
    """What was probably meant by an unknown word, to be put behind the message."""
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}" if known else ""


def _is_http_url(location: str) -> bool:
    """Whether `location` is a URL of a server, not a path."""
    return urlsplit(location).scheme in ("http", "https")
