"""When an automation is written to the server again; the rest is asked of a real one in `test_deployment`."""

from __future__ import annotations

from datetime import timedelta

import pytest
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows.automations import BadWebhook, _plain, apply


def silent(seconds: float) -> AutomationCore:
    return AutomationCore(
        name="speck: silent",
        trigger=EventTrigger(
            expect={"a", "b", "c"}, match={"prefect.resource.id": "x"}, posture=Posture.Proactive, threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[],
    )  # fmt: skip


def test_one_that_says_the_same_is_left_alone_whatever_ids_the_server_gave_its_parts() -> None:
    assert _plain(silent(300)) == _plain(silent(300))
    assert _plain(silent(300)) != _plain(silent(600))
    # A paused one is written again, which resumes it.
    assert _plain(silent(300).model_copy(update={"enabled": False})) != _plain(silent(300))
    assert _plain({"id": 1, "expect": ["b", "a"]}) == _plain({"expect": ["a", "b"]})


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/x", ""])
def test_an_address_that_takes_no_post_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(BadWebhook, match="must be http"):
        apply(url)
