"""The files in deploy/ agree with the program: metrics exist, service files are valid, and alert rules fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_filter.config_file import load_service
from broker_filter.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
HOW_TO = DEPLOY.parent / "docs" / "how-to"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "broker-filter.json"
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
    return list(json.loads(DASHBOARD.read_text())["panels"])


def panel_expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]


def rule_expressions() -> Iterator[str]:
    for group in documents(RULES)[0]["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def test_every_metric_in_rules_and_dashboard_exists() -> None:
    named = named_metrics("\n".join([*panel_expressions(), *rule_expressions()]))
    assert len(named) > 10
    assert named - exported_metrics() == set()


def test_every_metric_of_the_service_is_on_the_dashboard() -> None:
    own = {name for name in exported_metrics() if name.startswith("broker_filter_")}
    # Dead letters are shown as published records of their topic.
    assert own - named_metrics("\n".join(panel_expressions())) == {"broker_filter_dead_letters_total"}


def test_dashboard_has_a_variable_for_its_data_source() -> None:
    text = DASHBOARD.read_text()
    variable, *_ = json.loads(text)["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    assert set(re.findall(r'"uid": "(.*)"', text)) == {"broker-filter", "${datasource}"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())


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
    assert {"Unaccounted", "Instances", "Partitions by instance"} <= set(limits)
    pod = documents(DEPLOY / "kubernetes" / "deployment.yaml")[0]["spec"]["template"]["spec"]
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


def rendered_manifests() -> list[Any]:
    """Return the manifests that `kubectl apply -k` sends to the cluster."""
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(DEPLOY / "kubernetes")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_every_kubernetes_file_is_a_valid_manifest(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate comes with the extra `test`")
    paths = {path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml"}
    assert len(paths) >= 3
    for manifest in (manifest for path in paths for manifest in documents(path)):
        validator.validate(manifest, version, strict=True)


def test_output_of_kustomize_is_valid_and_mounts_the_configuration() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate comes with the extra `test`")
    manifests = {manifest["kind"]: manifest for manifest in rendered_manifests()}
    for manifest in manifests.values():
        validator.validate(manifest, "1.37", strict=True)
    configuration = manifests["ConfigMap"]
    assert configuration["data"] == {
        "service.yaml": (DEPLOY / "kubernetes" / "config" / "service.yaml").read_text(),
    }
    volumes = manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "configuration", "configMap": {"name": configuration["metadata"]["name"]}} in volumes


def test_kubernetes_manifests_refer_to_each_other_correctly() -> None:
    kubernetes = DEPLOY / "kubernetes"
    kustomization = documents(kubernetes / "kustomization.yaml")[0]
    manifests = {
        manifest["kind"]: manifest for name in kustomization["resources"] for manifest in documents(kubernetes / name)
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
    pod = documents(DEPLOY / "kubernetes" / "deployment.yaml")[0]["spec"]["template"]["spec"]
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
