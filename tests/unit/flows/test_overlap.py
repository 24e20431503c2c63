"""Whose turn it is, of the flow runs of a deployment; `test_deployment` starts real ones."""

from __future__ import annotations

import json

import pytest

from flows.lease import LeaseLost
from flows.overlap import one_at_a_time
from flows.settings import Settings


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Prefect tells a flow run of a deployment about itself."""
    told = {"DEPLOYMENT__ID": "1", "DEPLOYMENT__NAME": "default", "FLOW_RUN__ID": "2", "FLOW_RUN__NAME": "quick-owl"}
    for name, value in {**told, "FLOW_RUN__FLOW_NAME": "train-all"}.items():
        monkeypatch.setenv(f"PREFECT__RUNTIME__{name}", value)


def test_the_second_flow_run_is_held_back_and_told_by_whom(settings: Settings, deployed: None) -> None:
    with one_at_a_time(settings) as first, one_at_a_time(settings) as second, one_at_a_time(settings, "x") as other:
        assert first.held_back is other.held_back is None
        assert second.held_back is not None
        assert "flow run 'quick-owl' is at work on the same" in str(second.held_back.message)
        first.check()
        second.check()


def test_a_flow_run_whose_place_was_taken_learns_of_it(settings: Settings, deployed: None) -> None:
    path = settings.home / "leases" / "train-all-default.json"
    with one_at_a_time(settings) as turn:
        turn.check()
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "owner": "another"}))
        with pytest.raises(LeaseLost, match="stood still"):
            turn.check()
    assert json.loads(path.read_bytes())["owner"] == "another", "what is another's stays"


def test_what_no_deployment_started_is_never_held_back(settings: Settings) -> None:
    with one_at_a_time(settings) as first, one_at_a_time(settings) as second:
        assert first.held_back is second.held_back is None
        first.check()
