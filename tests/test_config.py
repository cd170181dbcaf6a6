"""Service files: which ones are accepted, and that all errors in a file are reported at once with their paths."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from broker_filter.config import Input, Model, Registry, SecretFromEnvironment, SecretFromFile, Service, Tls
from broker_filter.config_file import MAX_FILE_BYTES, ConfigError, document_keys, load_service
from broker_filter.scoring.bundle import open_bundle
from tests.conftest import own_lines

SMALLEST = """\
input:  {bootstrap_servers: "survey:9092", group_id: "me-filter", topics: ["ztf_20260225_programid1"], start: earliest}
output: {prefix: "me", bootstrap_servers: "ours:9092", payload: full}
models: [default]
"""


def load(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> Service:
    file = tmp_path / "service.yaml"
    file.write_text(text)
    return load_service(file, environment or {}).config


def problems(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return the error messages for a file, by the path of the key."""
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text, environment)
    for problem in refused.value.problems:
        assert str(problem) in str(refused.value)
    return {problem.path: problem.message for problem in refused.value.problems}


def test_the_smallest_file_is_enough(tmp_path: Path) -> None:
    service = load(tmp_path, SMALLEST)
    assert service.models == [Model(bundle="default")]
    assert service.input.start == "earliest"
    assert (service.http.host, service.http.port) == ("127.0.0.1", 9108)
    assert service.duplicates == "mark"


def test_all_errors_are_reported_at_once_with_their_paths(tmp_path: Path) -> None:
    assert problems(
        tmp_path,
        """
        input: {bootstrap_servers: "survey:9092", group_id: 5, topics: [ztf], start: earlyest, tls: {key: /nope}}
        output: {prefix: me, payload: ful, sals: {}, schema_registry: ./schemas}
        models: [default, {bundel: x}]
        anomalies: {reference: /nope, rate: yes}
        filters: [{name: scored, where: real > 0.5}, {name: bright, wher: real > 0.5}]
        batch: {max_size: "64", max_wait: 3}
        http: {port: true}
        modles: [default]
        duplicates: dropp
        """,
    ) == {
        "input.group_id": "should be text; put it in quotes",
        "input.start": "should be earliest, latest, stored or an ISO time",
        "input.tls.key": "/nope is not a file that can be read",
        "output.payload": "should be 'full', 'no_cutouts' or 'scores'",
        "output.sals": "unknown key; did you mean 'sasl'?",
        "output.schema_registry": "should be an http(s) URL: schemas are registered there",
        "models[1].bundle": "is required",
        "models[1].bundel": "unknown key; did you mean 'bundle'?",
        "anomalies.reference": "/nope is not a file that can be read",
        "anomalies.rate": "should be a valid number",
        "filters[0].name": "'scored' is one of the service's own topics",
        "filters[1].where": "is required",
        "filters[1].wher": "unknown key; did you mean 'where'?",
        "batch.max_size": "should be a valid integer",
        "batch.max_wait": "unknown key; did you mean 'max_wait_ms'?",
        "http.port": "should be a valid integer",
        "modles": "unknown key; did you mean 'models'?",
        "duplicates": "should be 'mark' or 'drop'",
    }


@pytest.mark.parametrize(
    ("section", "path", "message"),
    [
        ("filters: [{name: a, where: real > 0.5 and magps < 18}]", "filters[0].where", "did you mean 'magpsf'?"),
        ("filters: [{name: a, where: band > 0.5}]", "filters[0].where", "character 8: text"),
        ("filters: [{name: a, where: sso}, {name: a, where: sso}]", "filters", "more than one filter has the name a"),
        ("filters: [{name: dead-letter, where: sso}]", "filters[0].name", "one of the service's own topics"),
        ("filters: [{name: positions, where: sso}]", "filters[0].name", "one of the service's own topics"),
        ("filters: [{name: a b, where: sso}]", "filters[0].name", "should match pattern"),
        ("filters: [{name: a, where: sso, over_rate: pause}]", "filters[0]", "needs a max_rate"),
        ("filters: [{name: a, where: sso, max_rate_minutes: 5}]", "filters[0]", "needs a max_rate"),
        ("filters: [{name: a, where: sso, max_rate: 5}]", "filters[0].max_rate", "less than or equal to 1"),
        ("filters: [{name: a, where: true}]", "filters[0].where", "should be text; put it in quotes"),
        ("models: [default, default]", "models", "more than one bundle has the name default"),
        ("models: [./not/there]", "models[0]", "no bundle.yaml"),
        ("models: []", "models", "at least 1 item"),
        ("models: [{bundle: default, also: [desi]}]", "models[0].also[0]", "should be 'ztf' or 'lsst'"),
        ("http:", "http", "should be a mapping"),
        ("batch: [64]", "batch", "should be a mapping"),
        ("batch: {max_size: 0}", "batch.max_size", "greater than 0"),
        ("stall_timeout_s: .nan", "stall_timeout_s", "greater than 0"),
    ],
)
def test_errors_in_filters_models_and_thresholds_are_reported(
    tmp_path: Path, section: str, path: str, message: str
) -> None:
    text = SMALLEST.replace("models: [default]\n", "") if section.startswith("models") else SMALLEST
    found = problems(tmp_path, f"{text}{section}\n")
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    ("key", "path", "message"),
    [
        ("sasl: {username: me, password: hunter2}", "input.sasl.password", "a secret must not be in this file"),
        ("sasl: {username: me, password: {env: NOT_SET}}", "input.sasl.password.env", "NOT_SET is not set"),
        ("sasl: {username: me, password: {file: /not/there}}", "input.sasl.password.file", "/not/there is not a file"),
        ("sasl: {username: me}", "input.sasl.password", "is required"),
        ("tls: {ca: /not/there}", "input.tls.ca", "/not/there is not a file that can be read"),
        ("tls: {certificate: FILE}", "input.tls", "certificate and key belong together"),
        ("schema_registry: ./not/there", "input.schema_registry", "neither an http(s) URL nor a directory"),
        ("kafka: {fetch.mn.bytes: 1}", "input.kafka", 'No such configuration property: "fetch.mn.bytes"'),
        ("kafka: {sasl.password: hunter2}", "input.kafka", "a secret must not be in this file"),
        ("kafka: {ssl.key.pem: hunter2}", "input.kafka", "a secret must not be in this file"),
        (
            "kafka: {group.id: other}",
            "input.kafka",
            "group.id: the service sets this property itself: use the key `group_id`",
        ),
        ("kafka: {group.protocol: consumer}", "input.kafka", "KIP-848 protocol accepts such a commit only with"),
        ("kafka: {group.protocol: Consumer}", "input.kafka", "only 'classic' is supported"),
        ("kafka: {client.id: [a]}", "input.kafka.client.id", "should be text, a number"),
        ("kafka: {ssl.key.password: {env: NOT_SET}}", "input.kafka.ssl.key.password.env", "NOT_SET is not set"),
        ("kafka: {client.id: {file: /not/there}}", "input.kafka.client.id.file", "is not a file that can be read"),
        ("topics: ztf", "input.topics", "should be a valid list"),
        ("topics: []", "input.topics", "at least 1 item"),
        ("topics: ['']", "input.topics", "'': not a topic name"),
        ("topics: [ztf, '^ztf.*']", "input.topics", "'^ztf.*': not a topic name"),
        ("topics: ['ztf_%Q', a/b, ..]", "input.topics", "'ztf_%Q', 'a/b', '..': not a topic name"),
        ("bootstrap_servers: ''", "input.bootstrap_servers", "at least 1 character"),
        ("group_id: ''", "input.group_id", "at least 1 character"),
        ("start: 5", "input.start", "should be earliest"),
        ("start: stord", "input.start", "should be earliest"),
    ],
)
def test_errors_in_the_connection_settings_of_the_input_are_reported(
    tmp_path: Path, key: str, path: str, message: str
) -> None:
    usual = {
        "bootstrap_servers": "bootstrap_servers: 'survey:9092'",
        "group_id": "group_id: me",
        "topics": "topics: [ztf]",
    }
    given = usual | {key.partition(":")[0]: key.replace("FILE", str(tmp_path / "service.yaml"))}
    source = ", ".join(given.values())
    found = problems(tmp_path, f"input: {{{source}}}\noutput: {{prefix: me}}\n")
    assert list(found) == [path]
    assert message in found[path]


OIDC = (
    "security.protocol: sasl_ssl, sasl.mechanism: OAUTHBEARER, sasl.oauthbearer.method: oidc, "
    "sasl.oauthbearer.client.id: me, sasl.oauthbearer.client.secret: {env: SECRET}"
)
PLAIN = "security.protocol: sasl_ssl, sasl.mechanism: PLAIN, sasl.username: me, sasl.password: {file: SECRET_FILE}"


RUBIN = """\
input:
  bootstrap_servers: "rubin-alert-stream-bootstrap.slac.stanford.edu:9094"
  group_id: "{group}"
  topics: ["lsst-alerts-v11"]
  start: latest
  {credentials}
  {registry}
output: {{prefix: "me", bootstrap_servers: "ours:9092"}}
"""
RUBIN_SASL = "sasl: {username: me, password: {env: PASSWORD}}"
RUBIN_REGISTRY = "schema_registry: https://rubin-alert-schemas.slac.stanford.edu/schema-registry"


def rubin(group: str = "me-filter", credentials: str = RUBIN_SASL, registry: str = RUBIN_REGISTRY) -> str:
    return RUBIN.format(group=group, credentials=credentials, registry=registry)


@pytest.mark.parametrize(
    "credentials",
    [
        RUBIN_SASL,
        "kafka: {sasl.mechanism: SCRAM-SHA-512, sasl.username: me, sasl.password: {env: PASSWORD},"
        " security.protocol: SASL_PLAINTEXT}",
    ],
)
def test_rubins_brokers_need_a_group_that_begins_with_the_user_name(tmp_path: Path, credentials: str) -> None:
    secrets = {"PASSWORD": "x"}
    assert load(tmp_path, rubin(credentials=credentials), secrets).input.group_id == "me-filter"
    listener = rubin("filter", credentials).replace("rubin-alert", "SASL_PLAINTEXT://Rubin-Alert")
    assert "begins with the user name" in problems(tmp_path, listener, secrets)["input"]
    [(path, message)] = problems(tmp_path, rubin("filter", credentials), secrets).items()
    assert path == "input"
    assert "begins with the user name: 'filter' does not begin with 'me'; 'me-filter' does" in message
    elsewhere = rubin("filter", credentials).replace("rubin-alert-stream-bootstrap.slac.stanford.edu", "ours")
    assert load(tmp_path, elsewhere, secrets).input.group_id == "filter"


def test_rubins_brokers_need_credentials_and_a_schema_registry(tmp_path: Path) -> None:
    assert "under input.sasl" in problems(tmp_path, rubin(credentials=""))["input"]
    assert "/schema-registry" in problems(tmp_path, rubin(registry=""), {"PASSWORD": "x"})["input"]


@pytest.mark.parametrize("section", ["input", "output"])
@pytest.mark.parametrize("properties", [f"{OIDC}, sasl.oauthbearer.token.endpoint.url: TOKENS", PLAIN])
def test_property_that_needs_a_secret_is_accepted_without_any_connection(
    tmp_path: Path, section: str, properties: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("hunter2\n")
    with socket.create_server(("127.0.0.1", 0)) as tokens:
        properties = properties.replace("TOKENS", f"http://127.0.0.1:{tokens.getsockname()[1]}/token")
        properties = properties.replace("SECRET_FILE", str(tmp_path / "secret"))
        last = "start: earliest}" if section == "input" else "payload: full}"
        load(tmp_path, SMALLEST.replace(last, f"{last[:-1]}, kafka: {{{properties}}}}}"), {"SECRET": "hunter2"})
        tokens.setblocking(False)
        with pytest.raises(BlockingIOError):
            tokens.accept()
    assert own_lines(capfd.readouterr().err) == []


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_schema_registry_is_a_url_or_a_section_with_credentials_and_certificates(tmp_path: Path, side: str) -> None:
    last = "start: earliest" if side == "input" else "payload: full"
    text = SMALLEST.replace(last, f"{last}, schema_registry: LOCATION")
    url = "https://registry:8081/path"
    service = load(tmp_path, text.replace("LOCATION", f'"{url}"'))
    assert (service.input if side == "input" else service.output).schema_registry == Registry(url=url)

    key = f"{side}.schema_registry"
    login = "username: me, password: {env: SECRET}"
    given = load(tmp_path, text.replace("LOCATION", f'{{url: "{url}", {login}, tls: {{}}}}'), {"SECRET": "hunter2"})
    registry = (given.input if side == "input" else given.output).schema_registry
    assert registry == Registry(url=url, username="me", password=SecretFromEnvironment(env="SECRET"), tls=Tls())
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for section, path, message in (
        (f'{{url: "{url}", username: me}}', key, "username and password belong together"),
        (f'{{url: "{url}", username: me, password: hunter2}}', f"{key}.password", "a secret must not be in this file"),
        (f'{{url: "{url}", {login}, tls: {{ca: {junk}}}}}', key, f"{junk}: no PEM file of certificates"),
        (f'{{url: "http://registry", {login}, tls: {{}}}}', key, "tls needs an https URL"),
        (f'{{url: "https://me:too@registry", {login}}}', key, "an http(s) URL without credentials in it"),
        (f"{{url: {tmp_path}, {login}}}", key, "an http(s) URL without credentials in it"),
        ('"https://me:hunter2/too@registry"', key, "https://***@registry: the URL is not valid"),
        (f'{{ulr: "{url}"}}', f"{key}.ulr", "did you mean 'url'?"),
    ):
        found = problems(tmp_path, text.replace("LOCATION", section), {"SECRET": "hunter2"})
        assert message in found[path]
        assert "hunter2" not in str(found)


def test_private_key_is_opened_with_a_password_from_tls_or_from_the_properties(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a key")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    files, subject = ["-keyout", str(key), "-out", str(certificate)], ["-passout", "pass:hunter2", "-subj", "/CN=me"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", *files, *subject], check=True, capture_output=True
    )
    properties = f"ssl.certificate.location: {certificate}, ssl.key.location: {key}, ssl.key.password: {{env: SECRET}}"
    text = SMALLEST.replace("earliest}", f"earliest, kafka: {{security.protocol: ssl, {properties}}}}}")
    load(tmp_path, text, {"SECRET": "hunter2"})
    found = problems(tmp_path, text, {"SECRET": "something-else"})
    assert "ssl.key.location failed" in found["input.kafka"]
    assert "something-else" not in str(found)


def test_properties_are_checked_together_with_the_section_that_holds_the_password(tmp_path: Path) -> None:
    sasl = "sasl: {mechanism: PLAIN, username: me, password: {env: SECRET}}"
    load(
        tmp_path, SMALLEST.replace("earliest}", f"earliest, {sasl}, kafka: {{client.id: me}}}}"), {"SECRET": "hunter2"}
    )


def test_error_message_of_librdkafka_does_not_show_a_secret(tmp_path: Path) -> None:
    text = SMALLEST.replace("earliest}", "earliest, kafka: {security.protocol: {env: SECRET}}}")
    found = problems(tmp_path, text, {"SECRET": "hunter2"})
    assert found == {
        "input.kafka": 'Invalid value "<security.protocol>" for configuration property "security.protocol"'
    }


def test_properties_that_would_break_exactly_once_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = problems(tmp_path, SMALLEST.replace("payload: full", "kafka: {acks: 1}"))
    assert list(found) == ["output.kafka"]
    assert "`acks` must be set to `all`" in found["output.kafka"]
    assert own_lines(capfd.readouterr().err) == []  # librdkafka itself writes nothing


@pytest.mark.parametrize(
    ("topic", "servers", "loops"),
    [
        ("me.scored", "null", True),
        ("me.bright", "'survey:9092'", True),
        ("me.scored", "'ours:9092'", False),
        ("me.else", "null", False),
    ],
)
def test_topic_that_is_both_read_and_written_is_refused(tmp_path: Path, topic: str, servers: str, loops: bool) -> None:
    text = f"""
        input: {{bootstrap_servers: "survey:9092", group_id: me, topics: [{topic}]}}
        output: {{prefix: me, bootstrap_servers: {servers}}}
        filters: [{{name: bright, where: real > 0.5}}]
        """
    if loops:
        assert problems(tmp_path, text) == {"": f"{topic} would be read and written; choose another output.prefix"}
    else:
        assert load(tmp_path, text).input.topics == [topic]


def test_error_messages_do_not_contain_secrets(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
        input: {bootstrap_servers: s, group_id: g, topics: [t], sasl: {username: me, password: hunter2},
                kafka: {ssl.key.password: hunter2}}
        output: {prefix: me, sasl: {username: me, password: {env: hunter2, file: hunter2}}}
        """,
    )
    assert len(found) == 3
    assert "hunter2" not in str(found)


def test_secrets_are_named_by_variable_or_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    service = load(
        tmp_path,
        f"""
        input:
          bootstrap_servers: survey:9092
          group_id: me
          topics: [ztf]
          sasl: {{username: me, password: {{env: PASSWORD}}}}
          kafka: {{ssl.key.password: {{file: {tmp_path}/password}}, fetch.min.bytes: 1000, client.id: me}}
        output: {{prefix: me}}
        """,
        {"PASSWORD": "hunter2"},
    )
    assert service.input.sasl is not None
    assert service.input.sasl.password == SecretFromEnvironment(env="PASSWORD")
    assert service.input.kafka["ssl.key.password"] == SecretFromFile(file=tmp_path / "password")
    assert "hunter2" not in repr(service)


@pytest.mark.parametrize(
    ("start", "moment"),
    [
        ("2026-02-25", datetime(2026, 2, 25, tzinfo=UTC)),
        ("2026-02-25T03:00:00", datetime(2026, 2, 25, 3, tzinfo=UTC)),
        ("'2026-02-25T03:00:00Z'", datetime(2026, 2, 25, 3, tzinfo=UTC)),
        ("2026-02-25T03:00:00-08:00", datetime(2026, 2, 25, 11, tzinfo=UTC)),
        ("'2026-02-25T20:00:00-08:00'", datetime(2026, 2, 26, 4, tzinfo=UTC)),
    ],
)
def test_start_may_be_a_time_which_is_utc_without_a_zone(tmp_path: Path, start: str, moment: datetime) -> None:
    loaded = load(tmp_path, SMALLEST.replace("earliest", start)).input.start
    assert isinstance(loaded, datetime)
    assert (loaded, loaded.date()) == (moment, moment.date())  # the topics by day have the days of UTC


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environment = {
        "BROKER_FILTER__INPUT__GROUP_ID": "other",
        "BROKER_FILTER__HTTP__PORT": "0",
        "BROKER_FILTER__MODELS": "[{bundle: default, also: [lsst]}]",
        "BROKER_FILTER_UNRELATED": "x",
    }
    service = load(tmp_path, SMALLEST, environment)
    assert service.input.group_id == "other"
    assert service.http.port == 0
    assert service.models == [Model(bundle="default", also=["lsst"])]
    assert service.input.topics == ["ztf_20260225_programid1"]


@pytest.mark.parametrize(
    ("variable", "value", "path", "message"),
    [
        ("BROKER_FILTER__INPUT__GROPU_ID", "x", "input.gropu_id", "did you mean 'group_id'?"),
        ("BROKER_FILTER__MODELS__0", "x", "", "BROKER_FILTER__MODELS__0: models is not a mapping"),
        ("BROKER_FILTER__MODELS", "[", "", "BROKER_FILTER__MODELS: line 1: not valid YAML"),
        ("BROKER_FILTER__HTTP__PORT", "many", "http.port", "should be a valid integer"),
    ],
)
def test_a_wrong_override_is_an_error(tmp_path: Path, variable: str, value: str, path: str, message: str) -> None:
    found = problems(tmp_path, SMALLEST, {variable: value})
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a mapping"),
        (b"- a", "not a mapping"),
        (b"input: {group_id: a}\ninput: {group_id: b}", "line 2: the key 'input' is repeated"),
        (b"input: {a: 1, a: 2}", "line 1: the key 'a' is repeated"),
        (b"input: [", "line 1: not valid YAML"),
        (b"input: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"start: 2026-13-45", "not valid YAML"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"a: \0", "not valid YAML"),
        (b"[" * 100_000, "not valid YAML"),
        (b" " * (MAX_FILE_BYTES + 1), "more than"),
    ],
)
def test_other_content_than_a_service_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "service.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_service(file, {})
    [problem] = refused.value.problems
    assert message in problem.message
    assert "\n" not in problem.message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be used:\n  No such file"):
        load_service(tmp_path / "none.yaml", {})


def test_filters_are_checked_even_if_a_bundle_cannot_be_read(tmp_path: Path) -> None:
    text = SMALLEST.replace("default", "./not/there")
    found = problems(tmp_path, f"{text}filters: [{{name: a, where: score > 0.5}}, {{name: b, where: score >}}]\n")
    assert list(found) == ["models[0]", "filters[1].where"]


def test_files_that_filters_read_are_found_beside_the_service_file(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "targets.csv").write_text("name,ra,dec\na,1,2\nb,3,4\n")
    service = tmp_path / "service.yaml"
    service.write_text(SMALLEST + 'filters: [{name: a, where: \'near("lists/targets.csv", 2) and not in_moc("m")\'}]\n')
    (tmp_path / "m").write_text("3/0-5")
    resolved = load_service(service, {})
    assert [str(file.path) for file in resolved.files] == [str(tmp_path / "m"), str(tmp_path / "lists" / "targets.csv")]
    (tmp_path / "m").write_text("3/0-5x")
    (tmp_path / "lists" / "targets.csv").unlink()
    assert problems(tmp_path, service.read_text()) == {
        "filters[0].where": f"character 6: {tmp_path / 'lists' / 'targets.csv'}: no such file"
    }


def test_form_of_a_file_can_be_checked_without_its_environment() -> None:
    source = Input.model_validate(
        {"bootstrap_servers": "s", "group_id": "g", "topics": ["t"], "tls": {"ca": "/not/there"}}
    )
    assert source.tls is not None


def test_every_key_is_documented() -> None:
    keys = list(document_keys())
    assert {"input.bootstrap_servers", "output.sasl.password", "filters[].where", "http.port"} <= {
        key for key, *_ in keys
    }
    assert all(meaning.endswith(".") for _, _, meaning in keys)


def test_reference_must_be_made_with_one_of_the_models(tmp_path: Path, reference_file: Path) -> None:
    service = load(tmp_path, f"{SMALLEST}anomalies: {{reference: {reference_file}, where: real > 0.5}}\n")
    assert service.anomalies is not None
    assert service.anomalies.rate == 0.001
    unsuitable = {
        f"reference: {reference_file}, rate: 0.5": ("anomalies.rate", "less than or equal to 0.1"),
        f"reference: {reference_file}, where: reel > 0.5": ("anomalies.where", "did you mean 'real'?"),
        f"reference: {tmp_path / 'service.yaml'}": ("anomalies.reference", "not a safetensors file"),
    }
    for section, (path, message) in unsuitable.items():
        found = problems(tmp_path, f"{SMALLEST}anomalies: {{{section}}}\n")
        assert list(found) == [path]
        assert message in found[path]
    other = tmp_path / "other"
    shutil.copytree(open_bundle("default").part("ztf").directory, other)
    card = (other / "bundle.yaml").read_text().replace("version: ", "version: another-")
    (other / "bundle.yaml").write_text(card)
    text = SMALLEST.replace("default", str(other))
    found = problems(tmp_path, f"{text}anomalies: {{reference: {reference_file}}}\n")
    assert "build the reference again" in found["anomalies.reference"]


def test_file_without_read_permission_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    file = tmp_path / "service.yaml"
    file.write_text(SMALLEST)
    file.chmod(0)
    with pytest.raises(ConfigError, match=r"service\.yaml cannot be used"):
        load_service(file, {})
