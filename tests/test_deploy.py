"""What deploy/ holds fits the program: metrics that exist, configuration that it takes, rules that fire."""

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

from broker_filter.metrics import Metrics
from broker_filter.service_file import load_service

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "broker-filter.json"
RULES = DEPLOY / "prometheus" / "rules.yaml"
SECRETS = {"SURVEY_PASSWORD": "secret", "OUTPUT_PASSWORD": "secret"}


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def named_metrics(text: str) -> set[str]:
    """The service's metrics in PromQL, by the names that they have in the text format's `# TYPE` lines."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"broker_filter_\w+", text)}


def exported_metrics() -> set[str]:
    return set(re.findall(r"^# TYPE (\w+)", Metrics().exposition().decode(), re.MULTILINE))


def panel_expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
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
    own = {name for name in exported_metrics() if name.startswith("broker_filter_") and not name.endswith("_created")}
    # Dead letters are published records of one topic, and shown as that.
    assert own - named_metrics("\n".join(panel_expressions())) == {"broker_filter_dead_letters_total"}


def test_every_alert_is_explained_for_who_is_woken_by_it() -> None:
    guide = (DEPLOY / "README.md").read_text()
    for rule in (rule for group in documents(RULES)[0]["groups"] for rule in group["rules"]):
        assert f"### {rule['alert']}" in guide


def test_rules_fire_in_trouble_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    for arguments in (["check", "config", "prometheus.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run([promtool, *arguments], cwd=RULES.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["service.yaml", "kubernetes/service.yaml"])
def test_service_files_are_valid_and_can_be_probed(path: str) -> None:
    service = load_service(DEPLOY / path, environment=SECRETS)
    assert (service.http.host, service.http.port) == ("0.0.0.0", 9108)


def test_kubernetes_manifests_fit_together() -> None:
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


def test_compose_stack_fits_together() -> None:
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
        load_service(DEPLOY / "service.yaml", environment=SECRETS).input.topics[0]
        in compose["services"]["replay"]["command"]
    )
