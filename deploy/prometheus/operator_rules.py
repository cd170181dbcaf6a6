"""Writes the alarm rules as a resource of the Prometheus operator: `make operator-rules`, after a change of rules.yaml.

Kustomize cannot put the content of a file into a resource, so that the resource is a second file.
"""

from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).with_name("rules.yaml")
RESOURCE = Path(__file__).parents[1] / "kubernetes" / "components" / "prometheus-operator" / "rules.yaml"
HEAD = "# Made from deploy/prometheus/rules.yaml by `make operator-rules`; change that file.\n"


def resource(rules: str) -> dict[str, Any]:
    """Return the PrometheusRule with the groups of `rules`, the text of a rule file of Prometheus."""
    name = "broker-filter"
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": name}}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata,
        "spec": yaml.safe_load(rules),
    }


if __name__ == "__main__":
    RESOURCE.write_text(HEAD + yaml.safe_dump(resource(RULES.read_text()), sort_keys=False, width=120))
