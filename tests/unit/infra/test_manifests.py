"""The manifests of `infra/` are right by their schemas and our rules, and a typical mistake in each is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from unit.infra.manifest_rules import INFRA, compose_problems, dockerfile_problems, kubernetes_problems

KUBERNETES = INFRA / "kubernetes"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
DOCKERFILE = (INFRA / "images" / "Dockerfile").read_text()
MANIFESTS = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def one(name: str, kind: str) -> dict[str, Any]:
    return next(document for document in documents(KUBERNETES / name) if document["kind"] == kind)


def test_compose_is_right() -> None:
    assert compose_problems(COMPOSE) == []
    assert set(COMPOSE["services"]) >= {
        "postgres",
        "s3",
        "prefect-server",
        "prefect-worker",
        "mlflow",
        "ray-head",
        "ray-worker",
    }


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_kubernetes_manifest_is_right(path: Path) -> None:
    for document in documents(path):
        assert kubernetes_problems(document) == [], document["metadata"]


def test_the_kustomization_has_every_manifest_but_the_job() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert {*kustomization["resources"], "ray-job.yaml"} == {path.name for path in MANIFESTS}


def test_flows_know_what_the_cluster_may_grow_to() -> None:
    (cluster,) = (each for each in documents(KUBERNETES / "ray-cluster.yaml") if each["kind"] == "RayCluster")
    (clients,) = (each for each in documents(KUBERNETES / "settings.yaml") if each["metadata"]["name"] == "clients")
    grown = {"cpu": 0, "nvidia.com/gpu": 0}
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        for kind in grown:
            grown[kind] += group["maxReplicas"] * int(container["resources"]["requests"].get(kind, 0))
    told = clients["data"]
    assert [told["SPECK_RAY_MAX_CPUS"], told["SPECK_RAY_MAX_GPUS"]] == [str(number) for number in grown.values()]


def test_what_a_manifest_names_is_there() -> None:
    made = {(each["kind"], each["metadata"].get("name")) for path in MANIFESTS for each in documents(path)}
    pool = json.loads((INFRA / "work_pools" / "kubernetes.json").read_text())
    keys = {"configMapRef": "ConfigMap", "configMap": "ConfigMap", "configMapKeyRef": "ConfigMap"}

    def named(node: Any) -> set[tuple[str, str]]:
        if isinstance(node, list):
            return set().union(*map(named, node))
        if not isinstance(node, dict):
            return set()
        found = {(kind, node[key]["name"]) for key, kind in keys.items() if key in node}
        found |= {("PersistentVolumeClaim", node["claimName"])} if "claimName" in node else set()
        found |= {("ServiceAccount", node["serviceAccountName"])} if "serviceAccountName" in node else set()
        return found.union(*map(named, node.values()))

    wanted = named([documents(path) for path in MANIFESTS]) | named(pool)
    assert len(wanted) >= 8
    assert wanted <= made


def test_the_dockerfile_is_right() -> None:
    assert dockerfile_problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("service", "change", "found"),
    [
        ("mlflow", {"enviroment": {}}, "enviroment"),
        ("mlflow", {"command": {"a": 1}}, "command"),
        ("prefect-server", {"ports": ["4200:4200"]}, "127.0.0.1"),
        ("prefect-server", {"ports": ["0.0.0.0:4200:4200"]}, "127.0.0.1"),
        ("s3", {"image": "versity/versitygw:latest"}, "names no version"),
        ("s3", {"image": "versity/versitygw"}, "names no version"),
        ("s3", {"environment": {"ROOT_SECRET_KEY": "speck"}}, "ROOT_SECRET_KEY"),
        ("s3", {"environment": {"ROOT_SECRET_KEY": "${SECRET:-speck}"}}, "ROOT_SECRET_KEY"),
        ("ray-head", {"environment": {"RAY_AUTH_TOKEN": "${RAY_AUTH_TOKEN}"}}, "RAY_AUTH_TOKEN"),
        ("mlflow", {"environment": {"MLFLOW_BACKEND_STORE_URI": "postgresql://a:b@c/d"}}, "password in it"),
        ("postgres", {"healthcheck": None}, "healthcheck"),
        ("prefect-worker", {"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]}, "root on the host"),
    ],
)
def test_a_mistake_in_compose_is_found(service: str, change: dict[str, Any], found: str) -> None:
    broken = copy.deepcopy(COMPOSE)
    broken["services"][service].update(change)
    for name in [name for name, value in change.items() if value is None]:
        del broken["services"][service][name]
    assert found in "\n".join(compose_problems(broken))


def _pod(document: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = document["spec"]["template"]["spec"]
    return pod


def _worker(document: dict[str, Any]) -> dict[str, Any]:
    worker: dict[str, Any] = document["spec"]["workerGroupSpecs"][0]
    return worker


@pytest.mark.parametrize(
    ("name", "kind", "mistake", "found"),
    [
        ("mlflow.yaml", "Deployment", lambda it: it["spec"].update(replica=2), "replica"),
        ("mlflow.yaml", "Deployment", lambda it: it["spec"].pop("selector"), "selector"),
        ("mlflow.yaml", "Deployment", lambda it: _pod(it)["containers"][0].update(image="speck:latest"), "no version"),
        ("mlflow.yaml", "Deployment", lambda it: _pod(it)["containers"][0].pop("resources"), "requests no cpu"),
        ("mlflow.yaml", "Deployment", lambda it: _pod(it).update(securityContext={}), "runAsNonRoot"),
        (
            "mlflow.yaml",
            "Deployment",
            lambda it: _pod(it)["containers"][0]["env"][0].update(value="x"),
            "from a Secret",
        ),
        ("mlflow.yaml", "Service", lambda it: it["spec"].update(type="LoadBalancer"), "open to the world"),
        ("mlflow.yaml", "Service", lambda it: it["spec"]["ports"][0].update(port="5000"), "port"),
        ("network-policies.yaml", "NetworkPolicy", lambda it: it["spec"].update(policyType=[]), "policyType"),
        ("network-policies.yaml", "NetworkPolicy", lambda it: it["spec"].update(podSelector=None, ingres=[]), "ingres"),
        ("settings.yaml", "ConfigMap", lambda it: it["data"].update(WORKERS=2), "WORKERS"),
        ("settings.yaml", "ConfigMap", lambda it: it.update(kind="Secret"), "Secret"),
        ("prefect.yaml", "Role", lambda it: it["rules"][0].pop("verbs"), "verbs"),
        ("ray-cluster.yaml", "RayCluster", lambda it: it["spec"].update(enableInTreeAutoscalling=True), "Autoscalling"),
        ("ray-cluster.yaml", "RayCluster", lambda it: it["spec"]["authOptions"].update(mode="tokens"), "tokens"),
        ("ray-cluster.yaml", "RayCluster", lambda it: _worker(it).pop("groupName"), "groupName"),
        ("ray-cluster.yaml", "RayCluster", lambda it: _worker(it).update(maxReplicas="8"), "maxReplicas"),
        ("ray-cluster.yaml", "RayCluster", lambda it: _pod(_spec(it))["containers"][0].pop("name"), "name"),
        (
            "ray-cluster.yaml",
            "RayCluster",
            lambda it: _worker(it)["rayStartParams"].update({"num-cpus": 8}),
            "num-cpus",
        ),
        ("ray-job.yaml", "RayJob", lambda it: it["spec"].pop("entrypoint"), "entrypoint"),
        ("ray-job.yaml", "RayJob", lambda it: it["spec"].pop("clusterSelector"), "clusterSelector"),
        ("ray-job.yaml", "RayJob", lambda it: it["spec"].update(submissionMode="HTTP"), "HTTP"),
    ],
)
def test_a_mistake_in_a_kubernetes_manifest_is_found(
    name: str, kind: str, mistake: Callable[[dict[str, Any]], object], found: str
) -> None:
    document = one(name, kind)
    mistake(document)
    assert found in "\n".join(kubernetes_problems(document))


def _spec(cluster: dict[str, Any]) -> dict[str, Any]:
    return {"spec": _worker(cluster)}


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ("USER 1000:1000", "USER root", "USER root"),
        ("USER 1000:1000\n", "", "USER root"),
        ("USER 1000:1000", "USER speck", "must be a number"),
        ("python:3.11.14-slim-bookworm", "python:latest", "names no version"),
        ("python:3.11.14-slim-bookworm", "python", "names no version"),
        ("ARG TORCH_INDEX_URL", "ARG INDEX_PASSWORD", "would stay in the image"),
        ("ENV PATH", "ENV AWS_SECRET_ACCESS_KEY=x PATH", "would stay in the image"),
        ("    && rm -rf /var/lib/apt/lists/*", "    && true", "DL3009"),
        ("COPY pyproject.toml", "COPI pyproject.toml", "unexpected 'C'"),
        ("pip install --constraint requirements.lock torch", "cd /tmp && pip install torch", "DL3013"),
    ],
)
def test_a_mistake_in_the_dockerfile_is_found(right: str, wrong: str, found: str) -> None:
    assert right in DOCKERFILE
    assert found in "\n".join(dockerfile_problems(DOCKERFILE.replace(right, wrong)))
