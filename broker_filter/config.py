"""The service's configuration: one YAML file, checked whole before anything starts.

Every key is documented where it is declared; a misspelt key is an error. Secrets are named (`{env: NAME}` or `{file: PATH}`),
never written down here, and never logged.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SurveyName = Literal["ztf", "lsst"]


class Section(BaseModel):
    """A mapping of the file: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SecretFromEnvironment(Section):
    """A secret in an environment variable."""

    env: str


class SecretFromFile(Section):
    """A secret in a file (its trailing newline is dropped)."""

    file: Path


Secret = SecretFromEnvironment | SecretFromFile


class Sasl(Section):
    """SASL credentials; over TLS where `tls` is also given."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    username: str
    password: Secret


class Tls(Section):
    """TLS towards the brokers. `ca`: PEM bundle, the system's where absent. `certificate` and `key` for mutual TLS."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    key_password: Secret | None = None


KafkaValue = str | int | float | bool | Secret


class Input(Section):
    """Where alerts come from."""

    bootstrap_servers: str = Field(description="The survey's brokers, `host:port,host:port`.")
    group_id: str = Field(description="Consumer group; instances with the same id share the partitions.")
    topics: list[str] = Field(
        min_length=1,
        description="Topic names. strftime directives stand for the UTC day (`ztf_%Y%m%d_programid1`) and roll over at midnight.",
    )
    start: Literal["earliest", "latest", "stored"] | datetime = Field(
        "stored",
        description="Where to start in a partition without a stored position: earliest, latest, or an ISO time; "
        "`stored` refuses to start without one.",
    )
    sasl: Sasl | None = None
    tls: Tls | None = None
    kafka: dict[str, KafkaValue] = Field({}, description="librdkafka properties, passed through as they are.")
    schema_registry: str | None = Field(None, description="URL of a Confluent schema registry, or a directory of .avsc files.")
    max_packet_bytes: int = Field(16 * 2**20, gt=0, description="Larger packets are rejected as too_large, undecoded.")


class Output(Section):
    """Where scored alerts go."""

    prefix: str = Field(pattern=r"^[a-zA-Z0-9._-]+$", description="Topics are `<prefix>.scored`, `<prefix>.anomalies`, ...")
    bootstrap_servers: str | None = Field(None, description="One's own brokers; the input's cluster where absent.")
    payload: Literal["full", "no_cutouts", "scores"] = Field("full", description="How much of the packet travels on.")
    schema_registry: str | None = Field(
        None, description="URL of a registry: records are then Confluent wire format instead of container files."
    )
    sasl: Sasl | None = None
    tls: Tls | None = None
    kafka: dict[str, KafkaValue] = Field({}, description="librdkafka properties, passed through as they are.")
    partitions: int = Field(4, gt=0, description="Partitions of topics that are created.")
    replication_factor: int = Field(-1, description="Replication factor of topics that are created; -1: the cluster's default.")


class Model(Section):
    """A bundle to score with: a directory, or the name of one that ships."""

    bundle: str
    also: list[SurveyName] = Field([], description="Surveys to score that the bundle was not trained for.")


class Anomalies(Section):
    """Alerts whose model output is above a threshold go to `<prefix>.anomalies` too."""

    output: str = Field(description="A model output, `<model>.<label>`.")
    above: float


class Filter(Section):
    """Alerts for which `where` is true go to `<prefix>.<name>` too."""

    name: str = Field(pattern=r"^[a-zA-Z0-9._-]+$")
    where: str


class Batch(Section):
    """How many alerts are decoded and scored together."""

    max_size: int = Field(64, gt=0, le=4096)
    max_wait_ms: int = Field(20, ge=0)


class Transaction(Section):
    """A transaction ends by count or by time, whichever comes first."""

    max_alerts: int = Field(1024, gt=0)
    max_ms: int = Field(500, gt=0)


class Runtime(Section):
    """What runs the networks. `auto` takes CUDA where there is one; a device that was asked for and is not there is an error."""

    engine: Literal["auto", "onnxruntime", "torch"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    decode_threads: int | None = Field(None, gt=0, description="Decoding threads; by the available cores where absent.")
    inference_threads: int | None = Field(None, gt=0, description="Threads of one inference; by the cores where absent.")


class Http(Section):
    """Where /metrics, /livez and /readyz are served."""

    host: str = "127.0.0.1"
    port: int = Field(9108, ge=0, le=65535)


class Service(Section):
    """The whole file."""

    input: Input
    output: Output
    models: Annotated[list[str | Model], Field(min_length=1)] = ["default"]
    anomalies: Anomalies | None = None
    filters: list[Filter] = []
    duplicates: Literal["mark", "drop"] = Field(
        "mark", description="What to do with an alert id seen before: publish it marked, or drop it (both are counted)."
    )
    duplicate_window: int = Field(1_000_000, ge=0, description="How many of the latest alert ids are remembered.")
    batch: Batch = Batch()
    transaction: Transaction = Transaction()
    runtime: Runtime = Runtime()
    http: Http = Http()
    stall_timeout_s: float = Field(120, gt=0, description="A stage without progress for so long ends the process, non-zero.")
