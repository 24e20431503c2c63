"""Of the flow runs of a deployment one at a time: a second one is cancelled, and one that died is marked as crashed.

Differs from Prefect's concurrency limit of a deployment: the slot of a run that was killed together with its worker
stays taken for five minutes. The lease of `flows.lease` knows at once that its process is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect import State, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.states import Cancelled, Crashed

from flows.lease import Busy, lease
from flows.say import say, warn
from flows.settings import Settings


@dataclass(frozen=True)
class Turn:
    """`held_back`: the state in which this flow run has to end at once, None where it goes ahead.

    `check` raises LeaseLost once another flow run has gone ahead in its place, because this one stood still.
    """

    held_back: State | None = None
    check: Callable[[], None] = lambda: None


@contextmanager
def one_at_a_time(settings: Settings, what: str = "") -> Iterator[Turn]:
    """Say whether it is this flow run's turn, and hold that turn for the length of this block.

    Only runs of a deployment are held back; `what` tells work apart that may go on side by side.
    """
    run = runtime.flow_run
    if runtime.deployment.id is None:
        yield Turn()
        return
    name = "-".join(part for part in (run.flow_name, runtime.deployment.name, what) if part)
    about = {"flow_run": str(run.id), "flow_run_name": str(run.name)}
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lease(settings.storage, name, say, _go_on, patient=False, about=about))
        except Busy as busy:
            holder = busy.holder
            where = f"process {holder.get('pid')} on {holder.get('host')}"
            other = f"flow run {holder.get('flow_run_name')!r} is at work on the same ({where})"
            yield Turn(Cancelled(message=f"{other}; cancel it first, or wait"))
            return
        if held.dead is not None and "flow_run" in held.dead:
            _mark_as_crashed(held.dead, str(run.name))
        yield Turn(check=held.check)


def _go_on() -> None:
    """Prefect ends a flow that waits by a signal; nothing has to be asked."""


def _mark_as_crashed(dead: Mapping[str, Any], successor: str) -> None:
    """Put right in Prefect what a killed flow run and its tasks are said to be doing."""
    run_id, process = UUID(dead["flow_run"]), f"process {dead.get('pid')} on {dead.get('host')}"
    state: State[Any] = Crashed(message=f"{process} is gone; flow run {successor!r} goes on where it was")
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
            if run.state is None or not run.state.is_final():
                client.set_flow_run_state(run_id, state)
                say(f"flow run {run.name!r} had been killed and is marked as crashed: {process} is gone")
            for task in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))):
                if task.state is None or not task.state.is_final():
                    client.set_task_run_state(task.id, state)
    except Exception as error:
        # The work matters more than how an earlier run is shown.
        warn(f"flow run {dead.get('flow_run_name')!r} was killed and may still be shown as running: {error}")
