"""Prefect's automations as code: `speck automations` puts them on the server, and again after every change of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, CallWebhook, ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from flows.events import DATASET_CHANGED, FLOW, PROMOTED
from flows.promote import OUTCOMES

WEBHOOK_BLOCK = "speck-notify"
# Three times what Prefect's own restart, or a busy machine, may cost a heartbeat of 30 s.
SILENT_S = 300
# All deployments of prefect.yaml have the tag.
OF_SPECK: dict[str, str | list[str]] = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.speck"}
# Events are called by a state's name, and those of `retrain` and `promote` say what was done.
NAMES = ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut", "Unchanged", *map(str.capitalize, OUTCOMES))
ENDED = {f"prefect.flow-run.{name}" for name in NAMES}

# A template that gives the JSON of a flow's parameter.
_JSON_LIST_OF_ONE = "[{{ event.payload.name | tojson }}]"


class NoDeployment(RuntimeError):
    """An automation is to run a deployment that the server does not know."""


class BadWebhook(RuntimeError):
    """SPECK_WEBHOOK_URL is no address that takes a POST."""


class Applied(NamedTuple):
    """Names of automations: created, updated, unchanged, and removed because nothing asks for them any more."""

    created: list[str]
    updated: list[str]
    unchanged: list[str]
    removed: list[str]


def apply(webhook_url: str | None) -> Applied:
    """Make the server's automations whose names begin with `speck` those of this file.

    `webhook_url` gets a JSON POST for each notification; without one there is nobody to notify. The server keeps it
    encrypted, and nothing shows it.

    Raises NoDeployment where `prefect deploy --all` has not been run, BadWebhook where the address is none.
    """
    if webhook_url is not None and urlsplit(webhook_url).scheme not in ("http", "https"):
        raise BadWebhook("SPECK_WEBHOOK_URL must be http:// or https:// and the address of a host. Correct it")
    with get_client(sync_client=True) as client:
        wanted = [*_own_work(client), *(_notifications(_save_webhook(webhook_url)) if webhook_url else [])]
        return _reconcile(client, wanted)


def _own_work(client: SyncPrefectClient) -> list[AutomationCore]:
    try:
        retrain = client.read_deployment_by_name("retrain/default").id
    except ObjectNotFound:
        raise NoDeployment("there is no deployment retrain/default; run `prefect --no-prompt deploy --all`") from None
    dataset: Any = {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": _JSON_LIST_OF_ONE}}
    return [
        AutomationCore(
            name="speck: data changed -> retrain",
            description="A flow other than retrain, which trains on it anyway, saw another version of a dataset.",
            trigger=EventTrigger(
                expect={DATASET_CHANGED},
                match={"prefect.resource.id": "speck.dataset.*", FLOW: "!retrain"},
                posture=Posture.Reactive,
            ),
            actions=[RunDeployment(source="selected", deployment_id=retrain, parameters={"datasets": dataset})],
        ),
        AutomationCore(
            name="speck: silent -> crashed",
            description=f"A flow run whose process gave no sign of life for {SILENT_S} s is marked as crashed.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *ENDED, "prefect.flow-run.Suspended"},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=OF_SPECK,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=SILENT_S),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED, message=f"no heartbeat for {SILENT_S} s; the next run goes on where it was"
                )
            ],
        ),
    ]


def _notifications(block_id: UUID) -> list[AutomationCore]:
    def webhook(payload: dict[str, str]) -> Sequence[ActionTypes]:
        # Every value is a template that gives JSON.
        body = ", ".join(f"{json.dumps(key)}: {template}" for key, template in payload.items())
        return [CallWebhook(block_document_id=block_id, payload=f"{{{body}}}")]

    return [
        AutomationCore(
            name="speck: failed or crashed -> notify",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=OF_SPECK,
                posture=Posture.Reactive,
            ),
            actions=webhook(
                {
                    "what": "{{ event.resource['prefect.state-type'] | lower | tojson }}",
                    "flow": "{{ flow.name | tojson }}",
                    "flow_run": "{{ flow_run.name | tojson }}",
                    "why": "{{ event.resource['prefect.state-message'] | tojson }}",
                    "page": "{{ flow_run | ui_url | tojson }}",
                }
            ),
        ),
        AutomationCore(
            name="speck: promoted -> notify",
            trigger=EventTrigger(
                expect={PROMOTED}, match={"prefect.resource.id": "speck.model.*"}, posture=Posture.Reactive
            ),
            actions=webhook({"what": '"promoted"', "verdict": "{{ event.payload | tojson }}"}),
        ),
    ]


def _save_webhook(url: str) -> UUID:
    block = Webhook(method="POST", url=SecretStr(url), headers=SecretDict({"Content-Type": "application/json"}))
    # Prefect's own types do not tell that outside of a loop this is no coroutine.
    saved: Any = block.save(WEBHOOK_BLOCK, overwrite=True)
    return UUID(str(saved))


def _plain(node: object) -> object:
    """What an automation says, without the ids that Prefect gives its parts, and lists in an order of their own.

    To write an unchanged one again would begin its countdowns anew.
    """
    if isinstance(node, AutomationCore):
        node = node.model_dump(mode="json", include=set(AutomationCore.model_fields))
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items() if key != "id"}
    return sorted(map(_plain, node), key=repr) if isinstance(node, list) else node


def _reconcile(client: SyncPrefectClient, wanted: Sequence[AutomationCore]) -> Applied:
    there = {known.name: known for known in client.read_automations() if known.name.startswith("speck: ")}
    applied = Applied([], [], [], [])
    for automation in wanted:
        if (known := there.pop(automation.name, None)) is None:
            client.create_automation(automation)
            applied.created.append(automation.name)
        elif _plain(known) != _plain(automation):
            client.update_automation(known.id, automation)
            applied.updated.append(automation.name)
        else:
            applied.unchanged.append(automation.name)
    for name, known in there.items():
        client.delete_automation(known.id)
        applied.removed.append(name)
    return applied
