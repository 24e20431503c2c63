"""The deployment `evaluate/default`: a model scored again, with its report and a table in Prefect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from prefect import State, flow, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from pydantic import Field

from flows.evaluate_model import Evaluated, Protocol, evaluate_model
from flows.overlap import one_at_a_time
from flows.retries import again_when_it_passes
from flows.say import say
from flows.settings import Settings
from training.scoring import Split


@flow(name="evaluate", validate_parameters=True)
def evaluate(
    model: str,
    dataset: str | None = None,
    split: Literal["val", "test", "train"] = "test",
    protocol: Literal["coco", "visdrone", "uavdt", "aitod", "voc"] | None = None,
    input_size_px: Annotated[int, Field(ge=32)] | None = None,
    tiled: bool | None = None,
    workers: Annotated[int, Field(ge=1)] = 1,
) -> State:
    """Score a finished run or a registered model again, on any split and version, under any protocol.

    Nothing about the run changes. The report lies in `evaluations/` of the home folder.

    Args:
        model: A run key or its beginning, `models:/NAME@champion`, `models:/NAME/VERSION`, or a `.safetensors` file.
        dataset: In its current version; by default the model's own, as it was trained on.
        split: What is scored.
        protocol: Instead of that of the dataset's card.
        input_size_px: Side of the network's input; by default as the model was scored.
        tiled: Tile by tile or whole; by default as the model was scored.
        workers: More than one make it a Ray job; the score is the same.
    """
    settings = Settings()
    with one_at_a_time(settings) as turn:
        if turn.held_back is not None:
            return turn.held_back
        rules = {"input_size_px": input_size_px, "tiled": tiled}
        found = score_model(model, settings, split, dataset, protocol, rules, workers)
    result = found.scored.result
    create_markdown_artifact(
        key="evaluation", markdown=as_markdown(found), description=f"{model} on {result.dataset_name} {split}"
    )
    headline = ", ".join(
        f"{name} {value:.4f}"
        for name, value in result.metrics.items()
        if value is not None and name in ("coco/AP", f"{result.protocol}/AP", f"{result.protocol}/AP50")
    )
    return Completed(message=f"run {result.run_key} on {result.dataset_name} {split}: {headline}")


@task(name="score-model", task_run_name="score {model}", cache_policy=NO_CACHE, **again_when_it_passes())
def score_model(
    model: str,
    settings: Settings,
    split: Split,
    dataset: str | None,
    protocol: Protocol | None,
    rules: Mapping[str, Any],
    workers: int,
) -> Evaluated:
    """The score of a model, with a report in a folder of its own."""
    out = settings.home / "evaluations" / str(runtime.flow_run.id)
    found = evaluate_model(
        model, settings, split, dataset=dataset, protocol=protocol, rules=rules, workers=workers, latency=False,
        out=out, say=say,
    )  # fmt: skip
    say(f"report: {out / 'report.html'}")
    return found


def as_markdown(found: Evaluated) -> str:
    """What was scored, under which rules, and every number."""
    result, options = found.scored.result, found.scored.result.options
    lines = [
        f"Run {result.run_key} on {result.dataset_name} {result.dataset_version[:12]}, split {result.split}: input "
        f"{options.input_size_px} px, score >= {options.score_threshold:g}, NMS IoU {options.nms_iou:g}, maxDets "
        f"{options.max_dets}",
        "",
        "| metric | value |",
        "| --- | --- |",
        *(f"| {name} | {'-' if value is None else f'{value:.4f}'} |" for name, value in result.metrics.items()),
    ]
    return "\n".join(lines)
