"""A pool's job template is one that Prefect's server takes and its workers turn into a job."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prefect.server.schemas.actions import validate_base_job_template
from prefect.utilities.templating import apply_values
from unit.infra.manifest_rules import INFRA, kubernetes_problems

POOLS = INFRA / "work_pools"


def template(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((POOLS / f"{kind}.json").read_text())
    return found


def job(configuration: Any, kind: str, **values: object) -> Any:
    """What a worker makes of it, given a run's job variables. It also asks the server for blocks; here are none."""
    made = template(kind)
    defaults = {name: each["default"] for name, each in made["variables"]["properties"].items() if "default" in each}
    return configuration(**apply_values(made["job_configuration"], defaults | values))


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_the_server_takes_it(kind: str) -> None:
    validate_base_job_template(template(kind))
    broken = template(kind)
    broken["variables"]["properties"].pop("env")
    with pytest.raises(ValueError, match="undeclared"):
        validate_base_job_template(broken)


def test_a_process_gets_its_environment() -> None:
    from prefect.workers.process import ProcessJobConfiguration

    assert job(ProcessJobConfiguration, "process", env={"A": "b"}).env == {"A": "b"}


def test_a_container_sees_the_checkout_under_its_own_name_and_nothing_else() -> None:
    from prefect_docker.worker import DockerWorkerJobConfiguration

    made = job(DockerWorkerJobConfiguration, "docker", user="1234:1234")
    assert made.volumes == ["/srv/speck:/srv/speck"]
    assert made.container_create_kwargs["user"] == "1234:1234"
    assert made.container_create_kwargs["working_dir"] == "/srv/speck"
    assert not made.privileged


def test_a_kubernetes_job_is_valid_and_holds_no_secret() -> None:
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    made = job(KubernetesWorkerJobConfiguration, "kubernetes", name="run", command="true", env={"A": "b"})
    made._populate_env_in_manifest()
    manifest = made.job_manifest
    # The worker makes them from the command and the name.
    manifest["spec"]["template"]["spec"]["containers"][0]["args"] = ["true"]
    assert kubernetes_problems(manifest) == []
    environment = {entry["name"]: entry for entry in manifest["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["A"]["value"] == "b"
    assert "secretKeyRef" in environment["MLFLOW_TRACKING_PASSWORD"]["valueFrom"]
