"""The main flow: version datasets -> plan -> train and score each cell -> compare -> register and promote."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact

from data.summary import summarise
from data.versioning import DatasetVersion, version_dataset
from flows.cells import CellOutcome, PlannedCell, plan_cell, run_cell
from flows.experiment import Experiment, check_batch, load_experiment
from flows.leaderboard import Row, as_markdown, make_rows
from flows.promote import Promotion, promote_best
from flows.record import Recorder
from flows.say import say, warn
from flows.settings import REPO, Settings
from tracking.client import TrackingUnavailable, connect
from tracking.registry import champion
from tracking.runs import ensure_parent
from training.jobs import Cluster, Jobs, embedded_cluster
from training.spec import RunSpec


@dataclass(frozen=True)
class Report:
    """What a `train-all` did: leaderboard, what was promoted, by dataset why not, and the seconds of its parts."""

    rows: list[Row]
    promotions: list[Promotion]
    not_promoted: dict[str, str]
    seconds: dict[str, float]

    @property
    def failed(self) -> list[Row]:
        """Rows without a result."""
        return [row for row in self.rows if row.error is not None]


class Unfinished(RuntimeError):
    """Some cells have no result, or a dataset's best cell could not be promoted; what is done stays done."""

    def __init__(self, report: Report) -> None:
        self.report = report
        faults = [f"{row.architecture} / {row.dataset} / seed {row.seed}: {row.error}" for row in report.failed]
        faults += [f"nothing promoted for {name}: {reason}" for name, reason in report.not_promoted.items()]
        super().__init__(f"{len(report.failed)} of {len(report.rows)} cells failed. " + "; ".join(faults))


@flow(name="train-all", validate_parameters=True)
def train_all(
    experiment: str = "default",
    changes: list[str] | None = None,
    architectures: list[str] | None = None,
    datasets: list[str] | None = None,
    seeds: list[int] | None = None,
) -> Report:
    """Train what is not trained yet, compare, and promote the best of each dataset.

    Args:
        experiment: a name in `flows/runs/`, or a YAML file.
        changes: `key.path=value` each, for example `training.epochs=20`.
        architectures: instead of the experiment's.
        datasets: instead of the experiment's.
        seeds: instead of the experiment's.
    """
    loaded = load_experiment(
        experiment, changes or (), architectures=architectures or (), datasets=datasets or (), seeds=seeds or ()
    )
    report = run_experiment(loaded, Settings())
    if report.failed or report.not_promoted:
        raise Unfinished(report)
    return report


def run_experiment(experiment: Experiment, settings: Settings) -> Report:
    """The flow's body: every step is a Prefect task."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "versions"):
        versions = {name: version_data(name) for name in experiment.datasets}
    for name in experiment.datasets:
        check_batch(experiment, name, summarise(name, REPO).num_images["train"])
    with _timed(seconds, "plan"):
        planned = plan(experiment.cells({name: found.version for name, found in versions.items()}), settings)
    parent_run_id = open_parent_run(settings)
    cells: list[tuple[PlannedCell, CellOutcome | Exception]] = []
    with ExitStack() as stack, _timed(seconds, "cells"):
        jobs = _jobs_on_demand(settings, stack, seconds)
        for cell in planned:
            cells.append((cell, _outcome(cell, jobs, settings, parent_run_id)))
    with _timed(seconds, "promotion"):
        promotions, not_promoted, champions = compare_and_promote(cells, settings)
    report = Report(make_rows(cells, champions), promotions, not_promoted, seconds)
    create_markdown_artifact(key="leaderboard", markdown=as_markdown(report.rows), description="All cells compared")
    return report


@task(name="version-data", task_run_name="version {name}")
def version_data(name: str) -> DatasetVersion:
    """Prepare and version one dataset with DVC; nothing runs when nothing changed."""
    version = version_dataset(name, REPO)
    what = "prepared" if version.regenerated else "unchanged"
    size_mib = version.size_bytes / 2**20
    say(f"{name}: version {version.version[:12]} {what}, {version.num_files} files, {size_mib:.0f} MiB")
    return version


@task(name="plan")
def plan(specs: Sequence[RunSpec], settings: Settings) -> list[PlannedCell]:
    """Say what will happen to each cell, and why."""
    planned = [plan_cell(spec, settings) for spec in specs]
    for cell in planned:
        say(f"{cell.spec.title}: {cell.state} ({cell.spec.run_key}): {cell.why}")
    lines = [f"| {cell.spec.title} | {cell.state} | {cell.why} |" for cell in planned]
    create_markdown_artifact(key="plan", markdown="\n".join(["| cell | state | why |", "|---|---|---|", *lines]))
    return planned


@task(name="open-parent-run")
def open_parent_run(settings: Settings) -> str | None:
    """The MLflow run that stands for this `train-all`."""
    try:
        return ensure_parent(
            connect(settings.tracking_uri),
            train_all_id=str(runtime.flow_run.id),
            name=str(runtime.flow_run.name),
            start_time_ms=time.time_ns() // 1_000_000,
        )
    except TrackingUnavailable as error:
        warn(f"no MLflow run for this train-all: {error}")
        return None


@task(name="train-cell", task_run_name="{cell.spec.title}")
def train_cell(
    cell: PlannedCell, jobs: Callable[[], Jobs], settings: Settings, parent_run_id: str | None
) -> CellOutcome:
    """Train and score one cell as a Ray job, and keep its MLflow run up to date."""
    title = cell.spec.title
    recorder = Recorder(settings.tracking_uri, parent_run_id, warn)
    outcome = run_cell(cell, jobs, settings, recorder, lambda line: say(f"{title}: {line}"))
    test = outcome.result.scores["test"].metrics
    say(f"{title}: test coco/AP {test['coco/AP']:.3f}, AP50 {test['coco/AP50']:.3f}")
    if outcome.seconds:
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in outcome.seconds.items())
        say(f"{title}: {parts}")
    return outcome


@task(name="compare-and-promote")
def compare_and_promote(
    cells: Sequence[tuple[PlannedCell, CellOutcome | Exception]], settings: Settings
) -> tuple[list[Promotion], dict[str, str], set[str]]:
    """Register the best cell of each dataset and let it challenge the champion.

    Returns the promotions, why there is none by dataset, and the champions' run keys.
    """
    by_dataset: dict[str, list[CellOutcome]] = {}
    for cell, outcome in cells:
        if isinstance(outcome, CellOutcome):
            by_dataset.setdefault(cell.spec.dataset.name, []).append(outcome)
    promotions: list[Promotion] = []
    failed: dict[str, str] = {}
    champions: set[str] = set()
    for name, outcomes in by_dataset.items():
        # A champion that cannot be read, or a store that is gone, must not cost the other datasets their promotion.
        try:
            client = connect(settings.tracking_uri)
            promotion = promote_best(client, outcomes, settings)
            holder = champion(client, name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            warn(f"nothing promoted for {name}: {failed[name]}")
            continue
        promotions.append(promotion)
        moved = "promoted" if promotion.verdict.promote else "champion unchanged"
        say(f"{name}: version {promotion.version}, {moved}: {promotion.verdict.reason}")
        champions |= {holder.run_key} if holder is not None else set()
    return promotions, failed, champions


def _outcome(
    cell: PlannedCell, jobs: Callable[[], Jobs], settings: Settings, parent_run_id: str | None
) -> CellOutcome | Exception:
    # A poisoned cell fails alone.
    try:
        return train_cell(cell, jobs, settings, parent_run_id)
    except Exception as error:
        warn(f"{cell.spec.title} failed: {error}")
        return error


def _jobs_on_demand(settings: Settings, stack: ExitStack, seconds: dict[str, float]) -> Callable[[], Jobs]:
    """The cluster's job API; an embedded cluster starts at the first call and ends with `stack`."""
    made: list[Jobs] = []

    def jobs() -> Jobs:
        if not made:
            with _timed(seconds, "cluster start"):
                if settings.ray_jobs_url is None:
                    cluster = stack.enter_context(embedded_cluster(settings.home))
                else:
                    cluster = Cluster("auto", settings.ray_jobs_url)
                made.append(Jobs(cluster))
        return made[0]

    return jobs


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
