"""A cluster whose job API is away, or fails for a moment, or may grow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.util.state.exception import RayStateApiException
from requests import ConnectionError as NoConnection

from flows.retries import PASSING
from training.cluster import Cluster
from training.jobs import JobLost, Jobs


class Client:
    """Stands for Ray's: raises `error` at every question, or tells of no job."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def ask(*_: object, **__: object) -> list[object]:
            if self.error is not None:
                raise self.error
            return []

        return ask


def jobs_of(monkeypatch: pytest.MonkeyPatch, error: Exception | None, **cluster: Any) -> Jobs:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda _: Client(error))
    return Jobs(Cluster("auto", "http://127.0.0.1:9", **cluster))


@pytest.mark.parametrize("error", [NoConnection("refused"), RuntimeError("Request failed with status code 503: head")])
def test_an_api_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    jobs = jobs_of(monkeypatch, error)
    with pytest.raises(PASSING, match=r"http://127.0.0.1:9 (does not answer|fails)"):
        jobs.living("abc")
    with pytest.raises(JobLost):
        jobs.stop("abc-1")


def test_a_question_that_ray_refuses_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="404") as caught:
        jobs_of(monkeypatch, RuntimeError("Request failed with status code 404: no such job")).living("abc")
    assert not isinstance(caught.value, PASSING)


def test_there_is_room_for_as_much_as_the_cluster_may_grow_to(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        SimpleNamespace(state="ALIVE", resources_total={"CPU": 8.0, "GPU": 1.0}),
        SimpleNamespace(state="DEAD", resources_total={"CPU": 8.0, "GPU": 1.0}),
    ]
    monkeypatch.setattr("ray.util.state.list_nodes", lambda **_: nodes)
    assert jobs_of(monkeypatch, None).room([]) == {"CPU": 8.0, "GPU": 1.0}
    assert jobs_of(monkeypatch, None, may_grow_to={"CPU": 4.0, "GPU": 64.0}).room([]) == {"CPU": 8.0, "GPU": 64.0}


def test_nodes_that_ray_does_not_tell_of_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RayStateApiException("timed out")

    monkeypatch.setattr("ray.util.state.list_nodes", fail)
    with pytest.raises(JobLost, match="does not tell of its nodes: timed out"):
        jobs_of(monkeypatch, None).room([])
