"""Who reaches whom by the network policies, worked out here by Kubernetes' rules and compared with what is wanted.

A connection passes if no policy selects the sender for egress or one of those lets it out, and likewise ingress.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from unit.infra.manifest_rules import INFRA

POLICIES = [each["spec"] for each in yaml.safe_load_all((INFRA / "kubernetes" / "network-policies.yaml").read_text())]


@dataclass(frozen=True)
class Peer:
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "speck"
    ip: str = "10.1.2.3"
    is_pod: bool = True


def app(name: str, **more: str) -> Peer:
    return Peer({"app": name, **more})


API = {"speck/kubernetes-api": ""}
FLOW, MLFLOW, PREFECT, STRANGER = app("flow"), app("mlflow"), app("prefect-server"), app("other")
WORKER = Peer({"app": "prefect-worker", **API})
RAY_HEAD = Peer({"ray.io/cluster": "speck", "ray.io/node-type": "head", **API})
RAY_NODE = Peer({"ray.io/cluster": "speck", "ray.io/node-type": "worker"})
OPERATOR, DNS, ELSEWHERE = Peer(namespace="kuberay"), Peer(namespace="kube-system"), Peer(namespace="default")
S3 = Peer(ip="52.219.1.1", is_pod=False)
POSTGRES = Peer(ip="10.9.9.9", is_pod=False)
METADATA = Peer(ip="169.254.169.254", is_pod=False)
KUBERNETES = Peer(ip="10.0.0.1", is_pod=False)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for each in selector.get("matchExpressions", []):
        assert each["operator"] in {"In", "Exists"}
        if each["key"] not in labels or labels[each["key"]] not in each.get("values", [labels[each["key"]]]):
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_meant(peer: Peer, rule: dict[str, Any]) -> bool:
    if "ipBlock" in rule:
        address = ipaddress.ip_address(peer.ip)
        ranges = [ipaddress.ip_network(each) for each in rule["ipBlock"].get("except", [])]
        return address in ipaddress.ip_network(rule["ipBlock"]["cidr"]) and not any(address in each for each in ranges)
    if not peer.is_pod:
        return False
    if "namespaceSelector" in rule:
        if not selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
            return False
    elif peer.namespace != "speck":
        return False
    return selects(rule.get("podSelector", {}), peer.labels)


def lets(direction: str, own: Peer, other: Peer, port: int) -> bool:
    if own.namespace != "speck" or not own.is_pod:
        return True
    mine = [each for each in POLICIES if direction in each["policyTypes"] and selects(each["podSelector"], own.labels)]
    sides = {"Ingress": ("ingress", "from"), "Egress": ("egress", "to")}
    rules, side = sides[direction]
    return not mine or any(
        (side not in rule or any(is_meant(other, each) for each in rule[side]))
        and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for policy in mine
        for rule in policy.get(rules, [])
    )


def reaches(sender: Peer, receiver: Peer, port: int) -> bool:
    return lets("Egress", sender, receiver, port) and lets("Ingress", receiver, sender, port)


@pytest.mark.parametrize(
    ("sender", "receiver", "port"),
    [
        (FLOW, PREFECT, 4200), (FLOW, MLFLOW, 5000), (FLOW, RAY_HEAD, 8265), (FLOW, S3, 443), (FLOW, DNS, 53),
        (WORKER, PREFECT, 4200), (WORKER, KUBERNETES, 443), (WORKER, S3, 443),
        (RAY_HEAD, RAY_NODE, 34567), (RAY_NODE, RAY_HEAD, 6379), (RAY_NODE, RAY_NODE, 29500), (RAY_NODE, S3, 443),
        (RAY_HEAD, KUBERNETES, 6443), (OPERATOR, RAY_HEAD, 8265),
        (MLFLOW, POSTGRES, 5432), (PREFECT, POSTGRES, 5432), (MLFLOW, S3, 443), (PREFECT, S3, 443),
    ],
)  # fmt: skip
def test_what_is_needed_passes(sender: Peer, receiver: Peer, port: int) -> None:
    assert reaches(sender, receiver, port)


@pytest.mark.parametrize(
    ("sender", "receiver", "port"),
    [
        # The job API is remote execution for whoever has the token.
        (STRANGER, RAY_HEAD, 8265), (ELSEWHERE, RAY_HEAD, 8265), (FLOW, RAY_NODE, 8265), (FLOW, RAY_HEAD, 6379),
        (FLOW, RAY_HEAD, 10001), (OPERATOR, RAY_HEAD, 6379), (MLFLOW, RAY_HEAD, 8265),
        # Nodes run whatever a job brings: no server is theirs.
        (RAY_NODE, MLFLOW, 5000), (RAY_HEAD, PREFECT, 4200), (RAY_NODE, POSTGRES, 5432), (RAY_NODE, KUBERNETES, 6443),
        (ELSEWHERE, MLFLOW, 5000), (STRANGER, PREFECT, 4200), (FLOW, POSTGRES, 5432), (STRANGER, POSTGRES, 5432),
        (FLOW, KUBERNETES, 6443), (RAY_NODE, METADATA, 443), (FLOW, METADATA, 80), (FLOW, S3, 80), (RAY_NODE, S3, 22),
    ],
)  # fmt: skip
def test_everything_else_does_not(sender: Peer, receiver: Peer, port: int) -> None:
    assert not reaches(sender, receiver, port)


def test_the_labels_are_those_of_the_manifests() -> None:
    made = [
        each for name in ("prefect", "mlflow", "ray-cluster")
        for each in yaml.safe_load_all((INFRA / "kubernetes" / f"{name}.yaml").read_text())
    ]  # fmt: skip
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in made
        if each["kind"] == "Deployment"
    }
    assert labels == {"prefect-server": PREFECT.labels, "prefect-worker": WORKER.labels, "mlflow": MLFLOW.labels}
    (cluster,) = (each for each in made if each["kind"] == "RayCluster")
    assert cluster["metadata"]["name"] == RAY_HEAD.labels["ray.io/cluster"]
    assert cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"] == API
