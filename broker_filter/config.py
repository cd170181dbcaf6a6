"""The service's configuration: the keys of a service file and their meaning. The module `config_file` reads a file.

Each key is documented where it is declared; an unknown key is an error. A secret is a reference (`{env: NAME}` or
`{file: PATH}`): the file never contains the secret itself, and the secret is never logged.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.schemas.registry_location import RegistryLocation, TlsFiles, is_http, registry_location

SCORED, SHADOW, ANOMALIES, DEAD_LETTER, POSITIONS = "scored", "shadow", "anomalies", "dead-letter", "positions"
REDRIVEN = "redriven"
RESERVED_TOPICS = (SCORED, SHADOW, ANOMALIES, DEAD_LETTER, POSITIONS, REDRIVEN)
"""Names of the service's own topics `<prefix>.<name>`; a filter cannot use them."""
TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
"""The topic names that Kafka accepts."""

RUBIN_HOST = "rubin-alert-stream-bootstrap.slac.stanford.edu"
"""The address of the brokers of Rubin's alert stream, without the port (9094)."""
RUBIN_REGISTRY = "https://rubin-alert-schemas.slac.stanford.edu/schema-registry"
"""The schema registry of Rubin's alert stream."""

SECRET_PROPERTIES = ("password", "secret", "passphrase", "key.pem")
"""Endings of the names of librdkafka properties that hold secrets."""

RELOADED = frozenset(
    {
        "output.payload",
        "output.schema_registry",
        "output.subject",
        "output.partitions",
        "output.replication_factor",
        "models",
        "anomalies",
        "filters",
        "duplicates",
        "batch",
        "runtime.engine",
        "runtime.device",
        "runtime.precision",
        "runtime.inference_threads",
        "reload",
    }
)
"""Paths of the keys that a running service can change, each with all keys below it. Any other key needs a restart."""

SurveyName = Literal["ztf", "lsst"]
RecordKey = Literal["object", "designation"]
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """A mapping in a file of YAML or JSON: immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServiceSection(Section):
    """A section of the service file. Values are not converted: `port: "80"` and `max_size: yes` are errors."""

    model_config = ConfigDict(strict=True)


class ConfigChecks(ABC):
    """Checks of a service file against its environment. Pydantic gets an instance as the context of a validation.

    Without an instance, only the form of the file is checked. Every method raises ValueError if its check fails.
    """

    @abstractmethod
    def check_variable(self, name: str) -> None:
        """Check that an environment variable is set."""

    @abstractmethod
    def model_name(self, bundle: str) -> str:
        """Check that a bundle can be read, and return the name of its model."""

    @abstractmethod
    def model_version(self, bundle: str) -> str:
        """Return the version of a bundle that can be read."""

    @abstractmethod
    def check_registry(self, registry: Registry) -> None:
        """Check that the certificates and the key of a schema registry can be used."""

    @abstractmethod
    def check_reference(self, file: Path) -> None:
        """Check that a file is a reference set that was made with one of the models."""

    @abstractmethod
    def check_lens(self, name: str, reference: Path | None) -> None:
        """Check that a lens is on one of the models and fits the reference set, if that is valid."""

    @abstractmethod
    def check_filter(self, where: str) -> None:
        """Check that an expression over the fields of alerts and the outputs of the models compiles."""

    @abstractmethod
    def check_properties(
        self,
        client: Literal["consumer", "producer"],
        properties: Mapping[str, KafkaValue],
        sasl: Sasl | None,
        tls: Tls | None,
    ) -> None:
        """Check that librdkafka accepts the properties together with `sasl` and `tls`, and that none is reserved."""


def _checks(info: ValidationInfo) -> ConfigChecks | None:
    return info.context if isinstance(info.context, ConfigChecks) else None


def _is_file(path: Path, info: ValidationInfo) -> Path:
    if _checks(info) and not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError(f"{path} is not a file that can be read")
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
    """A secret in a file. One trailing newline is removed."""

    file: ReadablePath


def _kind(value: Any) -> str:
    """Return the tag of the type that a value is validated as."""
    if isinstance(value, SecretFromFile) or (isinstance(value, dict) and "file" in value):
        return "file"
    return "env" if isinstance(value, SecretFromEnvironment | dict) else "plain"


def _named_secret(value: Any) -> Any:
    if _kind(value) == "plain":
        raise ValueError("a secret must not be in this file: refer to it with {env: VARIABLE} or {file: PATH}")
    return value


Secret = Annotated[
    Annotated[SecretFromEnvironment, Tag("env")] | Annotated[SecretFromFile, Tag("file")],
    Discriminator(_kind),
    BeforeValidator(_named_secret),
]


class SecretError(BrokerFilterError, ValueError):
    """The configuration refers to a secret that is missing."""

    exit_status = USAGE


def read_secret(secret: Secret, environment: Mapping[str, str] = os.environ) -> str:
    """Return the text of a secret, without one newline at its end. Keep the text out of logs and messages.

    Raises SecretError if the variable is not set or the file cannot be read.
    """
    if isinstance(secret, SecretFromEnvironment):
        text = environment.get(secret.env)
        if text is None:
            raise SecretError(
                f"environment variable {secret.env}, which holds a secret of the configuration, is not set"
            )
        return text.removesuffix("\n")
    try:
        return secret.file.read_text().removesuffix("\n")
    except OSError as error:
        raise SecretError(f"the file of a secret cannot be read: {error}") from None


class Sasl(ServiceSection):
    """SASL credentials. The connection uses TLS if `tls` is also given."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="SCRAM-SHA-512", description="SASL mechanism."
    )
    username: str = Field(description="SASL user name.")
    password: Secret = Field(description="SASL password: `{env: VARIABLE}` or `{file: PATH}`.")


class Tls(ServiceSection):
    """TLS to a server. With `certificate` and `key`, mutual TLS."""

    ca: ReadablePath | None = Field(
        default=None,
        description="PEM file of the trusted certificate authorities; if absent, the system's authorities.",
    )
    certificate: ReadablePath | None = Field(
        default=None, description="PEM file of the client certificate, for mutual TLS."
    )
    key: ReadablePath | None = Field(default=None, description="PEM file of the client certificate's private key.")
    key_password: Secret | None = Field(
        default=None, description="Password of the private key: `{env: VARIABLE}` or `{file: PATH}`."
    )

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Tls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both or neither")
        return self

    def files(self, environment: Mapping[str, str] = os.environ) -> TlsFiles:
        """Return the files with the password of the key. Raises SecretError if the password is missing."""
        password = read_secret(self.key_password, environment) if self.key_password else None
        return TlsFiles(self.ca, self.certificate, self.key, password)


class Registry(ServiceSection):
    """A Confluent schema registry. A string in the place of this section is taken as the key `url`."""

    url: str = Field(description="URL of the registry; for the input, also a directory of .avsc files in its place.")
    username: str | None = Field(default=None, description="User name or API key, for HTTP basic authentication.")
    password: Secret | None = Field(
        default=None, description="Password or API secret: `{env: VARIABLE}` or `{file: PATH}`."
    )
    tls: Tls | None = Field(
        default=None,
        description="Certificates, for an https URL; if absent, the system's authorities and no client certificate.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts_fit(self, info: ValidationInfo) -> Registry:
        at = registry_location(self.url)
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password belong together: give both or neither")
        if self.username is not None and (not at.is_remote or at.username is not None):
            raise ValueError("username and password need an http(s) URL without credentials in it")
        if self.tls is not None and not at.url.startswith("https:"):
            raise ValueError("tls needs an https URL")
        if checks := _checks(info):
            checks.check_registry(self)
        return self

    @property
    def is_remote(self) -> bool:
        """Whether `url` is an HTTP(S) URL, not the path of a directory."""
        return is_http(self.url)

    def location(self, environment: Mapping[str, str] = os.environ) -> RegistryLocation:
        """Return the location with the text of its secrets; `environment` holds the variables that they refer to.

        Raises SecretError if a secret is missing.
        """
        location = registry_location(self.url)
        if self.password is not None:
            password = read_secret(self.password, environment)
            location = replace(location, username=self.username, password=password)
        return replace(location, tls=self.tls.files(environment)) if self.tls else location


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
            f"a secret must not be in this file: refer to it with {{env: VARIABLE}} or {{file: PATH}}: "
            f"{', '.join(written)}"
        )
    return properties


KafkaProperties = Annotated[dict[str, KafkaValue], AfterValidator(_secrets_are_named)]


StartName = Literal["earliest", "latest", "stored"]


def _utc(value: Any) -> Any:
    """Convert a date or time to UTC; a time without a zone is taken as UTC.

    Returns the names of `StartName` as they are, and raises ValueError for anything else.
    """
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
    """The Kafka topics that alerts are read from."""

    bootstrap_servers: str = Field(
        min_length=1, description="Addresses of the survey's brokers, `host:port,host:port`."
    )
    group_id: str = Field(min_length=1, description="Consumer group; instances with the same id share the partitions.")
    topics: list[str] = Field(
        min_length=1,
        description="Topic names. A strftime directive stands for the UTC day (`ztf_%Y%m%d_programid1`), and the name "
        "changes at midnight. Topics of earlier days that hold unread messages are read too: with `start: earliest`, "
        "topics of all days; with a time, topics of the days since that time; otherwise, topics of the days since the "
        "first day that the group has read. A topic that is created days late is found within a minute.",
    )
    start: Start = Field(
        default="stored",
        description="Where to start in a partition that has no stored position: `earliest`, `latest`, or an ISO time "
        "(UTC). With `stored`, such a partition is an error.",
    )
    remade: Literal["refuse", "read"] = Field(
        default="refuse",
        description="What to do if a topic was deleted and created again, so that the stored position belongs to the "
        "deleted topic. `refuse`: the service ends with an error, at every start. `read`: the service reads the new "
        "topic from its beginning.",
    )
    sasl: Sasl | None = Field(default=None, description="SASL credentials.")
    tls: Tls | None = Field(
        default=None, description="TLS to the brokers; `{}` for TLS with the system's certificate authorities."
    )
    kafka: KafkaProperties = Field(default={}, description="librdkafka properties, passed through as they are.")
    schema_registry: Registry | None = Field(
        default=None,
        description="Schema registry of packets in Confluent wire format: a URL, a directory of .avsc files, or a "
        "section.",
    )
    schema_cache: Literal["keep", "drop"] = Field(
        default="keep",
        description="Whether to use the registry's schemas that earlier runs stored on this machine's disk. `drop` "
        "deletes them at the start: use it once after the registry was emptied and assigns its ids to other schemas.",
    )
    max_packet_bytes: int = Field(
        default=16 * 2**20,
        gt=0,
        description="Largest packet in bytes. A larger packet is rejected as `too_large` and not decoded.",
    )

    @field_validator("topics")
    @classmethod
    def _topics_are_names(cls, topics: list[str]) -> list[str]:
        # librdkafka takes a name with ^ as a pattern, which could match the topics that the service itself writes.
        now = datetime.now(UTC)
        if wrong := [repr(topic) for topic in topics if not TOPIC_NAME.fullmatch(now.strftime(topic))]:
            raise ValueError(
                f"{', '.join(wrong)}: not a topic name: use letters, digits, '.', '_', '-' and strftime directives; "
                "patterns are not supported"
            )
        return topics

    @field_validator("schema_registry")
    @classmethod
    def _registry_is_there(cls, registry: Registry | None, info: ValidationInfo) -> Registry | None:
        if _checks(info) and registry and not registry.is_remote and not Path(registry.url).is_dir():
            raise ValueError("neither an http(s) URL nor a directory")
        return registry

    @field_validator("kafka")
    @classmethod
    def _properties_exist(cls, properties: dict[str, KafkaValue], info: ValidationInfo) -> dict[str, KafkaValue]:
        if checks := _checks(info):
            checks.check_properties("consumer", properties, info.data.get("sasl"), info.data.get("tls"))
        return properties

    @model_validator(mode="after")
    def _rubin_accepts_it(self) -> Input:
        servers = self.bootstrap_servers.lower().split(",")
        hosts = [server.strip().rpartition("/")[2].partition(":")[0] for server in servers]  # `protocol://host:port`
        if RUBIN_HOST not in hosts:
            return self
        user = self.sasl.username if self.sasl else self.kafka.get("sasl.username")
        if user is None:
            raise ValueError("Rubin's brokers ask for a user name and a password: give them under input.sasl")
        if isinstance(user, str) and not self.group_id.startswith(user):
            raise ValueError(
                f"Rubin's brokers accept only a group_id that begins with the user name: {self.group_id!r} does not "
                f"begin with {user!r}; {f'{user}-{self.group_id}'!r} does"
            )
        if self.schema_registry is None:
            raise ValueError(
                "Rubin's packets name their schema by an id, so schema_registry is needed; the survey's is "
                f"{RUBIN_REGISTRY}"
            )
        return self


class Output(ServiceSection):
    """The Kafka topics that scored alerts are written to."""

    prefix: str = Field(
        pattern=r"^[a-zA-Z0-9._-]+$",
        description="Beginning of the output topics' names: `<prefix>.scored`, `<prefix>.anomalies`, ...",
    )
    bootstrap_servers: str | None = Field(
        default=None, min_length=1, description="Addresses of the output's brokers; if absent, the input's brokers."
    )
    payload: Literal["full", "no_cutouts", "scores"] = Field(
        default="full",
        description="How much of the input packet the output holds: `full` (all of it), `no_cutouts` (all but the "
        "cutouts) or `scores` (ids, time, position, band and scores).",
    )
    key: RecordKey = Field(
        default="object",
        description="Key of the output records, by which Kafka chooses the partition: `object` (the object id), or "
        "`designation` (the designation of the known solar-system object that the source is, else the object id). A "
        "moving object gets a new object id in almost every alert; its designation keeps its alerts in one partition.",
    )
    schema_registry: Registry | None = Field(
        default=None,
        description="Confluent schema registry: a URL, or a section. With it, records have the Confluent wire format; "
        "without it, each record is an Avro object container.",
    )
    subject: Literal["topic", "record", "topic-record"] = Field(
        default="topic-record",
        description="Subject under which a schema is registered: `topic` (`<topic>-value`), `record` (the record's "
        "full name) or `topic-record` (`<topic>-<full name>`).",
    )
    sasl: Sasl | None = Field(default=None, description="SASL credentials.")
    tls: Tls | None = Field(
        default=None, description="TLS to the brokers; `{}` for TLS with the system's certificate authorities."
    )
    kafka: KafkaProperties = Field(default={}, description="librdkafka properties, passed through as they are.")
    partitions: int = Field(default=4, gt=0, description="Number of partitions of a topic that the service creates.")
    replication_factor: int = Field(
        default=-1,
        ge=-1,
        description="Replication factor of a topic that the service creates; -1: the cluster's default.",
    )

    @field_validator("schema_registry")
    @classmethod
    def _registry_is_url(cls, registry: Registry | None) -> Registry | None:
        if registry and not registry.is_remote:
            raise ValueError("should be an http(s) URL: schemas are registered there")
        return registry

    @field_validator("kafka")
    @classmethod
    def _properties_exist(cls, properties: dict[str, KafkaValue], info: ValidationInfo) -> dict[str, KafkaValue]:
        if checks := _checks(info):
            checks.check_properties("producer", properties, info.data.get("sasl"), info.data.get("tls"))
        return properties


class Model(ServiceSection):
    """A bundle to score with. A string instead of this section is taken as the key `bundle`."""

    bundle: str = Field(description="Directory of a bundle, or the name of a bundle that ships.")
    also: list[SurveyName] = Field(
        default=[],
        description="Surveys whose alerts get every output of the bundle although it was not trained for them.",
    )
    shadow: bool = Field(
        default=False,
        description="Whether the model is on trial: its outputs go to `<prefix>.shadow` and into metrics only, and "
        "filters and anomaly detection never see them. It may have the name of another model.",
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


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Anomalies(ServiceSection):
    """Anomaly detection: the alerts that differ most from ordinary ones are also published to `<prefix>.anomalies`."""

    reference: ReadablePath = Field(
        description="File of ordinary alerts, which `broker-filter reference build` made with one of the models."
    )
    rate: float = Field(
        default=0.001,
        gt=0,
        le=0.1,
        description="Fraction of the judged alerts to flag. The threshold follows the stream so that this fraction is "
        "reached.",
    )
    where: str | None = Field(
        default=None,
        description="Filter expression that selects the alerts to judge; if absent, the expression of the reference. "
        "For example, `real > 0.9` excludes bogus alerts, which would otherwise be flagged.",
    )

    lens: Annotated[list[str], BeforeValidator(_listed)] = Field(
        default=[],
        description="Lenses that explain the flagged alerts in `reason.features`: the name of a lens that ships, a "
        "directory, or a list of them. Each must be a lens on one of the models.",
    )

    @field_validator("reference")
    @classmethod
    def _reference_is_of_a_model(cls, reference: Path, info: ValidationInfo) -> Path:
        if checks := _checks(info):
            checks.check_reference(reference)
        return reference

    @field_validator("lens")
    @classmethod
    def _lenses_are_of_models(cls, lenses: list[str], info: ValidationInfo) -> list[str]:
        if checks := _checks(info):
            for lens in lenses:
                checks.check_lens(lens, info.data.get("reference"))
        return lenses

    @field_validator("where")
    @classmethod
    def _where_compiles(cls, where: str | None, info: ValidationInfo) -> str | None:
        if where is not None and (checks := _checks(info)):
            checks.check_filter(where)
        return where


class Filter(ServiceSection):
    """A filter: alerts for which `where` is true are also published to `<prefix>.<name>`."""

    name: str = Field(pattern=r"^[a-zA-Z0-9._-]+$", description="Last part of the name of the filter's topic.")
    where: str = Field(
        description="Expression over scores and alert fields that is true for the alerts that pass, such as "
        "`real > 0.65 and magpsf < 18.5`."
    )
    max_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Largest fraction of the scored alerts that the filter should pass, such as 0.05; if absent, it "
        "may pass all.",
    )
    max_rate_minutes: float = Field(
        default=10.0,
        gt=0,
        le=1440,
        description="Length in minutes of the window of latest alerts in which this fraction is measured. Each "
        "instance measures its own alerts.",
    )
    over_rate: Literal["warn", "pause"] = Field(
        default="warn",
        description="What to do while the filter passes more than `max_rate`: `warn` sets a metric and logs it; "
        "`pause` also stops the records to the filter's topic until the fraction is low enough again. "
        "`<prefix>.scored` still gets every alert.",
    )

    @model_validator(mode="after")
    def _pauses_above_a_rate(self) -> Filter:
        if self.over_rate == "pause" and self.max_rate is None:
            raise ValueError("over_rate: pause needs a max_rate, above which the topic is paused")
        if "max_rate_minutes" in self.model_fields_set and self.max_rate is None:
            raise ValueError("max_rate_minutes needs a max_rate, which it is the window of")
        return self

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
            checks.check_filter(where)
        return where


class Batch(ServiceSection):
    """How many alerts are decoded and scored together."""

    max_size: int = Field(default=128, gt=0, le=4096, description="Largest number of packets in a batch.")
    max_wait_ms: int = Field(
        default=20, ge=0, description="Longest time in milliseconds to wait until a batch is full."
    )


class Transaction(ServiceSection):
    """The limits at which a transaction is committed; the first one that is reached counts.

    A quiet stream is delivered at once, and a burst is delivered in few large transactions.
    """

    linger_ms: int = Field(
        default=10,
        ge=0,
        description="Time in milliseconds until a transaction is committed while no more alerts are in flight.",
    )
    max_alerts: int = Field(
        default=1024, gt=0, description="Number of packets in a transaction at which it is committed."
    )
    max_ms: int = Field(
        default=500,
        gt=0,
        description="Time in milliseconds until a transaction is committed while more alerts are in flight.",
    )


class Runtime(ServiceSection):
    """The engine and device that run the networks. A requested device that is absent is an error, never a fallback."""

    engine: Literal["auto", "onnxruntime", "torch"] = Field(
        default="auto",
        description="Library that runs the networks: `onnxruntime`, `torch`, or `auto`, which takes torch on CUDA and "
        "onnxruntime on a CPU.",
    )
    device: Device = Field(
        default="auto",
        description="Device: `cpu`, `cuda`, or `auto`, which takes CUDA if there is a GPU and PyTorch is installed.",
    )
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Floating-point type of torch on a CUDA device. Scores are float32 in any case."
    )
    decode_threads: int | None = Field(
        default=None, gt=0, description="Number of decoding threads; if absent, the number of available cores."
    )
    inference_threads: int | None = Field(
        default=None,
        gt=0,
        description="Number of threads that run the networks; if absent, the number of available cores.",
    )


class Http(ServiceSection):
    """The address at which /metrics, /livez and /readyz are served."""

    host: str = Field(
        default="127.0.0.1", description="Address to listen on; by default only this machine can connect."
    )
    port: int = Field(default=9108, ge=0, le=65535, description="Port to listen on; 0 takes a free port.")


class Service(ServiceSection):
    """A whole service file."""

    input: Input = Field(description="Kafka topics that alerts are read from.")
    output: Output = Field(description="Kafka topics that scored alerts are written to.")
    models: list[Model] = Field(
        default=[Model(bundle="default")],
        min_length=1,
        description="Bundles to score with, such as `[default, ./mine]`; if absent, the bundle `default`.",
    )
    anomalies: Anomalies | None = Field(default=None, description="Anomaly detection; if absent, it is off.")
    filters: list[Filter] = Field(default=[], description="Filters, each with a topic of its own.")
    duplicates: Literal["mark", "drop"] = Field(
        default="mark",
        description="What to do with an alert whose id was seen before: `mark` publishes it with a mark, `drop` does "
        "not publish it. It is counted as a duplicate in both cases. Ids are kept in memory: an instance does not know "
        "the ids that it saw before a restart, nor the ids that another instance saw.",
    )
    duplicate_window: int = Field(
        default=1_000_000,
        ge=0,
        description="Number of the latest alert ids that an instance remembers. A restart forgets all of them.",
    )
    batch: Batch = Field(default=Batch(), description="Limits of the batches that are decoded and scored together.")
    transaction: Transaction = Field(default=Transaction(), description="Limits at which a transaction is committed.")
    runtime: Runtime = Field(default=Runtime(), description="Engine and device that run the networks.")
    http: Http = Field(default=Http(), description="Address at which metrics and health are served.")
    stall_timeout_s: float = Field(
        default=120,
        gt=0,
        description="Time in seconds. If a stage makes no progress for longer, the process ends with a non-zero exit "
        "status.",
    )
    reload: Literal["on_signal", "on_change"] = Field(
        default="on_signal",
        description="When a running service reads this file again: `on_signal`, after SIGHUP; `on_change`, also some "
        "seconds after this file, a bundle, the reference or a lens has changed.",
    )

    @property
    def serving(self) -> list[Model]:
        """The models whose outputs reach filters, anomaly detection and every topic, in their order."""
        return [model for model in self.models if not model.shadow]

    @property
    def shadows(self) -> list[Model]:
        """The models on trial, in their order."""
        return [model for model in self.models if model.shadow]

    @property
    def output_topics(self) -> list[str]:
        """The names of all topics that alerts and dead letters are written to."""
        on_trial = [SHADOW] if self.shadows else []
        anomalous = [ANOMALIES] if self.anomalies else []
        names = [SCORED, *on_trial, *anomalous, *(one.name for one in self.filters), DEAD_LETTER]
        return [f"{self.output.prefix}.{name}" for name in names]

    @field_validator("filters")
    @classmethod
    def _filters_differ(cls, filters: list[Filter]) -> list[Filter]:
        names = [filter_.name for filter_ in filters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than one filter has the name {', '.join(twice)}")
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
        if all(model.shadow for model in models):
            raise ValueError("all models are shadows: add the bundle to score with, without `shadow`")
        if checks := _checks(info):
            names = [checks.model_name(model.bundle) for model in models if not model.shadow]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"more than one bundle has the name {', '.join(twice)}; their outputs would have the same names"
                )
            on_trial = [model.bundle for model in models if model.shadow]
            titles = [f"{checks.model_name(bundle)} {checks.model_version(bundle)}" for bundle in on_trial]
            if twice := sorted({title for title in titles if titles.count(title) > 1}):
                raise ValueError(
                    f"more than one shadow has the name and version {', '.join(twice)}; change the version of one"
                )
        return models


def changed_keys(before: Section, after: Section, prefix: str = "") -> Iterator[str]:
    """Yield the paths of the keys whose values differ. The path of a section is yielded if RELOADED contains it.

    `prefix`: the path of the two sections, with a point at its end; empty for whole service files.
    """
    for name in type(before).model_fields:
        old, new, path = getattr(before, name), getattr(after, name), f"{prefix}{name}"
        if old == new:
            continue
        if isinstance(old, Section) and type(old) is type(new) and path not in RELOADED:
            yield from changed_keys(old, new, f"{path}.")
        else:
            yield path


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return text to append to a message about an unknown word: the most similar known word, or all known words."""
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}" if known else ""
