"""What is wrong with a manifest of `infra/`: by its schema, and by the rules of this house. No network, no engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

INFRA = Path(__file__).resolve().parents[3] / "infra"
HADOLINT = Path(sys.executable).with_name("hadolint")
_SECRET = re.compile("PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY")
# Names of those that hold none, but say where or how.
_NO_SECRET = re.compile("_AUTH_MODE$|_CONFIG_PATH$|^PREFECT_INTEGRATIONS_KUBERNETES_")
# Set, and not empty, or nothing starts.
_REQUIRED = re.compile(r"\$\{[A-Z_]+:\?.+\}")
_VERSION = re.compile(r"[^:@]+(:\d+)?/?[^:@]*:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")

_SCHEMAS = {
    name: json.loads((INFRA / "schemas" / f"{name}.json").read_text()) for name in ("compose", "kubernetes", "kuberay")
}
_REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in _SCHEMAS.items() if name != "compose"
)
_COMPOSE = Draft202012Validator(_SCHEMAS["compose"])


def compose_problems(compose: Mapping[str, Any]) -> list[str]:
    """Of a whole compose file, its anchors resolved."""
    return [*_schema_problems(_COMPOSE, compose), *_compose_rules(compose)]


def _compose_rules(compose: Mapping[str, Any]) -> Iterator[str]:
    for name, service in compose.get("services", {}).items():
        if "extends" in service:
            continue
        if not _VERSION.fullmatch(service.get("image", "")):
            yield f"{name}: the image {service.get('image')!r} names no version"
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield f"{name}: port {port!r} is open to the network; begin it with 127.0.0.1:"
        if service.get("privileged") or any("docker.sock" in str(volume) for volume in service.get("volumes", [])):
            yield f"{name}: is root on the host"
        ends = service.get("restart") == "no"
        if "restart" not in service or (not ends and "healthcheck" not in service):
            yield f"{name}: needs restart and healthcheck"
        for variable, value in service.get("environment", {}).items():
            if _SECRET.search(variable) and not _NO_SECRET.search(variable) and not _REQUIRED.fullmatch(str(value)):
                yield f"{name}: {variable} must be ${{...:?}}, which no default and no empty value passes"
            if re.search(r"//[^/@]*:[^/@]*@", str(value)):
                yield f"{name}: {variable} is an address with a password in it"


def kubernetes_problems(document: Mapping[str, Any]) -> list[str]:
    """Of one object."""
    kind, version = document.get("kind", ""), document.get("apiVersion", "")
    pointer = _pointer(kind, version)
    if pointer is None:
        return [f"{version} {kind}: infra/schemas has none"]
    validator = Draft202012Validator({"$ref": pointer}, registry=_REGISTRY)
    rules = _pod_rules(document, "") if kind != "Secret" else ["a Secret has no place in a repository"]
    return [*_schema_problems(validator, document), *rules]


def _pointer(kind: str, version: str) -> str | None:
    if version == "ray.io/v1":
        return f"kuberay#/$defs/{kind}" if kind in _SCHEMAS["kuberay"]["$defs"] else None
    group, _, number = version.rpartition("/")
    name = f"io.k8s.api.{group.split('.')[0] or 'core'}.{number}.{kind}"
    return f"kubernetes#/$defs/{name}" if name in _SCHEMAS["kubernetes"]["$defs"] else None


def _pod_rules(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, list):
        for index, child in enumerate(node):
            yield from _pod_rules(child, f"{path}/{index}")
    if not isinstance(node, dict):
        return
    for name, child in node.items():
        yield from _pod_rules(child, f"{path}/{name}")
    if node.get("type") in {"NodePort", "LoadBalancer"} or node.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"{path}: a service that is open to the world"
    if "containers" in node:
        yield from _container_rules(node, path)


def _container_rules(node: Mapping[str, Any], path: str) -> Iterator[str]:
    if not node.get("securityContext", {}).get("runAsNonRoot"):
        yield f"{path}: runAsNonRoot is not set"
    for container in [*node["containers"], *node.get("initContainers", [])]:
        where = f"{path}: {container.get('name')}"
        image = str(container.get("image", ""))
        # The kustomization gives ours its version; placeholders are a pool's.
        if image != "speck" and not image.startswith("{{") and not _VERSION.fullmatch(image):
            yield f"{where}: the image {image!r} names no version"
        if not {"cpu", "memory"} <= set(container.get("resources", {}).get("requests", {})):
            yield f"{where}: requests no cpu or no memory"
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            yield f"{where}: allowPrivilegeEscalation must be false"
        for variable in container.get("env", []):
            if "value" in variable and _SECRET.search(variable["name"]) and not _NO_SECRET.search(variable["name"]):
                yield f"{where}: {variable['name']} must come from a Secret"


def dockerfile_problems(text: str) -> list[str]:
    """By hadolint, which reads the shell lines too, and by what it has no rule for."""
    result = subprocess.run(
        [HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=300, check=False
    )
    return [*(line for line in (result.stdout + result.stderr).splitlines() if line), *_dockerfile_rules(text)]


def _dockerfile_rules(text: str) -> Iterator[str]:
    lines = re.sub(r"\\\n", " ", text).splitlines()
    stages, user = set[str](), "root"
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            image, _, stage = rest.partition(" AS ")
            if image not in stages and not _VERSION.fullmatch(image):
                yield f"FROM {image}: names no version"
            stages.add(stage)
            user = "root"
        elif word == "USER":
            user = rest
        elif word in {"ARG", "ENV"} and _SECRET.search(rest):
            yield f"{line.split('=')[0]}: would stay in the image for everybody to read"
    if not re.fullmatch(r"[1-9]\d*(:\d+)?", user):
        yield f"USER {user}: must be a number other than 0"


def _schema_problems(validator: Draft202012Validator, document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[-300:]}" for error in validator.iter_errors(document)]
