"""The deployment `promote/default`: a promotion that waits for a person."""

from __future__ import annotations

from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from data.card import load_card
from flows.events import promoted
from flows.load_gates import load_gates
from flows.promote import Approval, Promotion, find_candidate, promote_run
from flows.retries import again_when_it_passes
from flows.say import say
from flows.settings import Settings
from flows.verdict_table import as_markdown
from tracking.client import connect
from tracking.promotion import Gates, Verdict


class Answer(RunInput):
    """What the form asks whoever resumes the run."""

    approve: bool = True
    comment: str = Field(min_length=1)


@task(name="reach MLflow", task_run_name="reach MLflow", **again_when_it_passes())
def reach_mlflow(tracking_uri: str) -> None:
    """Waits for it where it is away for a moment: a decision needs it, and nothing is decided by halves."""
    connect(tracking_uri)


@flow(name="promote", validate_parameters=True)
def promote(dataset: str, run: str | None = None) -> State:
    """Let a run challenge its dataset's champion; where the gates let it pass, suspend until a person agrees.

    When it is resumed it decides anew. If somebody else has decided meanwhile, it asks again.

    Args:
        dataset: Whose champion is challenged.
        run: Run key or its beginning; by default the best on val, on the current data.
    """
    settings, gates = Settings(), load_gates(load_card(dataset))
    reach_mlflow(settings.tracking_uri)
    result = find_candidate(dataset, run, settings, gates)

    def ask(gates: Gates, verdict: Verdict, generation: int) -> Approval:
        del gates
        headline = f"{result.spec.title}, run {result.run_key}, would become champion: {verdict.reason}"
        show(dataset, as_markdown(verdict.rows, headline))
        # The key: what a person has agreed to is a verdict on this run on top of one generation, and on no other.
        answer = suspend_flow_run(
            wait_for_input=Answer.with_initial_data(description=as_markdown(verdict.rows, headline)),
            key=f"{result.run_key}-generation-{generation}",
            timeout=None,
        )
        return Approval(answer.approve, answer.comment)

    promotion = promote_run(connect(settings.tracking_uri), result, settings, gates, ask, say)
    tell(promotion)
    # A rejection is an answer, too, and no failure.
    return Completed(name=promotion.outcome.capitalize(), message=promotion.reason)


def tell(promotion: Promotion) -> None:
    """Say what was decided, keep the verdict as the flow run's artifact, and let an event tell of a new champion."""
    version = "" if promotion.version is None else f"version {promotion.version}, "
    say(f"{promotion.dataset}: {version}{promotion.outcome}: {promotion.reason}")
    if promotion.is_open:
        say(f"{promotion.dataset}: approve it by {promotion.how_to_approve}")
    if promotion.num_left_out:
        say(
            f"{promotion.dataset}: {promotion.num_left_out} test pictures that the champion was trained on are left out"
        )
    if promotion.verdict is not None:
        for row in promotion.verdict.rows:
            if not row.passed:
                say(f"{promotion.dataset}: failed: {row.gate}: {row.candidate}, asked: {row.threshold}")
        show(promotion.dataset, as_markdown(promotion.verdict.rows, f"{promotion.outcome}: {promotion.reason}"))
    if promotion.outcome == "promoted":
        promoted(promotion)


def show(dataset: str, markdown: str) -> None:
    """Keep a verdict as an artifact of the present run."""
    create_markdown_artifact(key=f"promotion-{dataset}", markdown=markdown, description=f"Verdict for {dataset}")
