"""The files in deploy/ agree with the program: metrics exist, service files are valid, and alert rules fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_filter.config_file import load_service
from broker_filter.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
HOW_TO = DEPLOY.parent / "docs" / "how-to"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules.yaml"
SECRETS = {"SURVEY_PASSWORD": "secret", "OUTPUT_PASSWORD": "secret"}


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def named_metrics(text: str) -> set[str]:
    """Return the service's metrics in PromQL text, named as in the `# TYPE` lines of the text format."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"broker_filter_\w+", text)}


def exported_metrics() -> set[str]:
    return set(re.findall(r"^# TYPE (\w+)", Metrics().exposition().decode(), re.MULTILINE))


def panels() -> list[dict[str, Any]]:
    return [panel for dashboard in DASHBOARDS for panel in json.loads(dashboard.read_text())["panels"]]


def panel_expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]


def rule_expressions() -> Iterator[str]:
    for group in documents(RULES)[0]["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def test_every_metric_in_rules_and_dashboards_exists() -> None:
    named = named_metrics("\n".join([*panel_expressions(), *rule_expressions()]))
    assert len(named) > 10
    assert named - exported_metrics() == set()


def test_every_metric_of_the_service_is_on_a_dashboard() -> None:
    own = {name for name in exported_metrics() if name.startswith("broker_filter_")}
    # Dead letters are shown as published records of their topic.
    assert own - named_metrics("\n".join(panel_expressions())) == {"broker_filter_dead_letters_total"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.stem)
def test_dashboard_has_a_variable_for_its_data_source(dashboard: Path) -> None:
    content = json.loads(dashboard.read_text())
    variable, *_ = content["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    assert set(re.findall(r'"uid": "(.*)"', dashboard.read_text())) == {content["uid"], "${datasource}"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in content["panels"])


def test_dashboards_and_their_panels_have_ids_of_their_own() -> None:
    contents = [json.loads(dashboard.read_text()) for dashboard in DASHBOARDS]
    assert len({content["uid"] for content in contents}) == len(contents) == 2
    for content in contents:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in content["panels"]]
        assert len(set(places)) == len({panel["id"] for panel in content["panels"]}) == len(places)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panel_has_a_unit_and_a_text_for_missing_data(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["description"]
    assert defaults["noValue"]
    counts_seconds = any("_seconds" in target["expr"] for target in panel["targets"])
    if any("rate(" in target["expr"] for target in panel["targets"]) and not counts_seconds:
        assert re.search(r"/s$|alerts$|percentunit", defaults["unit"])


def test_panel_shows_the_limit_of_its_alert_rule() -> None:
    limits = {
        panel["title"]: [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        for panel in panels()
        if "thresholds" in panel["fieldConfig"]["defaults"]
    }
    conditions = "\n".join(rule_expressions())
    for title, limit in (("Lag", 50000), ("Latency, 99 %", 60), ("Rejected", 0.02), ("Lag by partition", 50000)):
        assert limits[title] == [None, limit]
        assert f"> {limit}" in conditions
    assert limits["Drift"] == [None, 0.1, 0.25]
    assert "(broker_filter_drift_psi) > 0.25" in conditions
    assert {"Unaccounted", "Instances", "Partitions by instance"} <= set(limits)
    pod = documents(DEPLOY / "kubernetes" / "base" / "deployment.yaml")[0]["spec"]["template"]["spec"]
    memory = pod["containers"][0]["resources"]["limits"]["memory"]
    assert limits["Resident memory"] == [None, int(memory.removesuffix("Gi")) * 2**30]


def test_every_alert_rule_is_explained_in_the_operations_guide() -> None:
    guide = (HOW_TO / "operations.md").read_text()
    for rule in (rule for group in documents(RULES)[0]["groups"] for rule in group["rules"]):
        assert f"\n### {rule['alert']}\n" in guide


def test_alert_rules_fire_only_for_their_problem() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    for arguments in (
        ["check", "config", "prometheus.yaml"],
        ["check", "config", "prometheus-kubernetes.yaml"],
        ["test", "rules", "rules_test.yaml"],
    ):
        done = subprocess.run([promtool, *arguments], cwd=RULES.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["service.yaml", "rubin.yaml", "kubernetes/config/service.yaml"])
def test_service_files_are_valid_and_serve_http_to_other_hosts(path: str) -> None:
    service = load_service(DEPLOY / path, environment=SECRETS).config
    assert (service.http.host, service.http.port) == ("0.0.0.0", 9108)


KUBERNETES = DEPLOY / "kubernetes"
COMPONENTS = tuple(sorted(path.name for path in (KUBERNETES / "components").iterdir()))


def rendered_manifests(directory: Path, components: tuple[str, ...] = ()) -> list[Any]:
    """Return the manifests that `kubectl apply -k` sends to the cluster, with these optional components.

    `directory`: an empty directory for a copy of the manifests.
    """
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not installed")
    copy = Path(shutil.copytree(KUBERNETES, directory / "kubernetes"))
    kustomization = (copy / "kustomization.yaml").read_text()
    for component in components:
        assert f"  # - components/{component}\n" in kustomization
        kustomization = kustomization.replace(f"  # - components/{component}\n", f"  - components/{component}\n")
    (copy / "kustomization.yaml").write_text(kustomization)
    done = subprocess.run([kubectl, "kustomize", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def is_of_kubernetes(manifest: Any) -> bool:
    """Return whether a resource is one of Kubernetes itself, whose schema the validator has."""
    return not any(group in manifest["apiVersion"] for group in ("keda.sh", "monitoring.coreos.com", "kustomize"))


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_every_kubernetes_file_is_a_valid_manifest(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate comes with the extra `test`")
    files = [path for path in KUBERNETES.rglob("*.yaml") if path.parent.name != "config"]
    manifests = [manifest for path in files for manifest in documents(path) if is_of_kubernetes(manifest)]
    assert {manifest["kind"] for manifest in manifests} > {"Deployment", "Service", "NetworkPolicy"}
    for manifest in manifests:
        validator.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    "components",
    [chosen for n in range(len(COMPONENTS) + 1) for chosen in combinations(COMPONENTS, n)],
    ids=lambda chosen: "+".join(chosen) or "plain",
)
def test_output_of_kustomize_is_valid_with_any_components(components: tuple[str, ...], tmp_path: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate comes with the extra `test`")
    manifests = {manifest["kind"]: manifest for manifest in rendered_manifests(tmp_path, components)}
    for manifest in manifests.values():
        assert manifest["metadata"]["namespace"] == "broker-filter"
        if is_of_kubernetes(manifest):
            validator.validate(manifest, "1.37", strict=True)
    configuration, deployment = manifests["ConfigMap"], manifests["Deployment"]
    assert configuration["data"] == {"service.yaml": (KUBERNETES / "config" / "service.yaml").read_text()}
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"name": "configuration", "configMap": {"name": configuration["metadata"]["name"]}} in volumes
    assert ("replicas" in deployment["spec"]) == ("keda" not in components)
    assert ("ScaledObject" in manifests) == ("keda" in components)
    assert ("PodMonitor" in manifests) == ("PrometheusRule" in manifests) == ("prometheus-operator" in components)
    assert ("NetworkPolicy" in manifests) == ("network-policy" in components)


def test_optional_components_select_the_pods_and_the_group_of_the_service(tmp_path: Path) -> None:
    manifests = {manifest["kind"]: manifest for manifest in rendered_manifests(tmp_path, COMPONENTS)}
    deployment = manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    service = load_service(KUBERNETES / "config" / "service.yaml", environment=SECRETS).config

    scaled = manifests["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"] == {"kind": "Deployment", "name": deployment["metadata"]["name"]}
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["consumerGroup"] == service.input.group_id
    assert trigger["metadata"]["bootstrapServers"] == service.input.bootstrap_servers
    assert trigger["metadata"]["offsetResetPolicy"] == service.input.start
    assert service.input.sasl
    assert trigger["metadata"]["sasl"] == service.input.sasl.mechanism.lower().replace("sha-", "sha").replace("-", "_")
    assert (trigger["metadata"]["tls"] == "enable") == (service.input.tls is not None)
    authentication = manifests["TriggerAuthentication"]
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    secrets = {one["valueFrom"]["secretKeyRef"]["name"] for one in container["env"]}
    assert {one["name"] for one in authentication["spec"]["secretTargetRef"]} == secrets
    behaviour = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    # A visit of Rubin drains within this time, and a pause between two visits is shorter than the other one.
    assert behaviour["scaleUp"]["stabilizationWindowSeconds"] >= 300
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 1800

    monitor = manifests["PodMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"] == labels
    assert labels[monitor["jobLabel"]] == "broker-filter"  # the job name in rules and dashboard
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = {port["name"] for port in container["ports"]}
    assert endpoint["port"] in ports

    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports
    open_ports = [
        range(port["port"], port.get("endPort", port["port"]) + 1)
        for rule in policy["egress"]
        for port in rule["ports"]
    ]
    assert service.output.bootstrap_servers
    for servers in (service.input.bootstrap_servers, service.output.bootstrap_servers):
        assert any(int(servers.rpartition(":")[2]) in ports for ports in open_ports)


def test_resource_of_the_prometheus_operator_has_the_alarm_rules() -> None:
    (resource,) = documents(KUBERNETES / "components" / "prometheus-operator" / "rules.yaml")
    assert resource["kind"] == "PrometheusRule"
    assert resource["spec"] == documents(RULES)[0], "run `make operator-rules`"


def test_kubernetes_manifests_refer_to_each_other_correctly() -> None:
    kustomization = documents(KUBERNETES / "kustomization.yaml")[0]
    base = KUBERNETES / "base"
    manifests = {
        manifest["kind"]: manifest
        for name in documents(base / "kustomization.yaml")[0]["resources"]
        for manifest in documents(base / name)
    }
    pod = manifests["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels

    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    (generator,) = kustomization["configMapGenerator"]
    assert volumes["configuration"]["configMap"]["name"] == generator["name"]
    assert {variable["name"] for variable in container["env"]} == set(SECRETS)


def test_pod_limits_are_the_documented_cpus_and_memory() -> None:
    pod = documents(DEPLOY / "kubernetes" / "base" / "deployment.yaml")[0]["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"]["cpu"] == resources["requests"]["cpu"]  # `available_cores` reads it as the quota
    memory = f"{resources['limits']['memory'].removesuffix('Gi')} GiB"
    assert f"{resources['limits']['cpu']} CPUs and {memory}" in (HOW_TO / "deploy.md").read_text()


def test_compose_stack_refers_to_existing_services_files_and_topics() -> None:
    compose = documents(DEPLOY / "compose.yaml")[0]
    for name, service in compose["services"].items():
        for dependency in service.get("depends_on", {}):
            assert dependency in compose["services"], name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    assert (
        load_service(DEPLOY / "service.yaml", environment=SECRETS).config.input.topics[0]
        in compose["services"]["replay"]["command"]
    )
