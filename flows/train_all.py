"""The main flow: version datasets -> plan -> train and score each cell -> compare -> register and promote."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from prefect import State, flow, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from data.summary import summarise
from data.versioning import DatasetVersion, current_version, version_dataset
from flows.budget import BudgetSpent, Purse
from flows.cells import CellOutcome, CellRunner
from flows.compare import compare_runs
from flows.data_report import report_data
from flows.decisions import champion_of
from flows.events import dataset_changed
from flows.experiment import Experiment, check_batch, load_experiment
from flows.leaderboard import (
    Row,
    as_json,
    as_markdown,
    flat_summaries,
    make_rows,
    ordered,
    spent,
    unplanned_rows,
)
from flows.lease import is_dead, this_process
from flows.overlap import one_at_a_time
from flows.plan import OnCodeChange, PlannedCell, plan_cells
from flows.plan_table import as_markdown as plan_as_markdown
from flows.plan_table import line as plan_line
from flows.promote import Promotion, promote_best, ranked
from flows.promote_flow import tell
from flows.record import Recorder
from flows.report import Report, Unfinished
from flows.retries import CELL_DELAYS_S, again_when_it_passes
from flows.say import log, say, warn
from flows.schedule import run_cells
from flows.send_version import send_version
from flows.settings import REPO, Settings
from flows.warm_start import specs_of
from tracking.client import TrackingUnavailable, connect
from tracking.runs import close_parent, end_abandoned, ensure_parent, upload
from training.cluster import Cluster, embedded_cluster
from training.jobs import Jobs
from training.ledger import Ledger, read_ledger
from training.records import RunResult
from training.spec import RunSpec
from training.store import StorageUnavailable


@flow(name="train-all", validate_parameters=True)
def train_all(
    experiment: str = "default",
    changes: list[str] | None = None,
    architectures: list[str] | None = None,
    datasets: list[str] | None = None,
    seeds: list[int] | None = None,
    on_code_change: OnCodeChange = "warn",
) -> Report | State:
    """Train what is not trained yet, compare, and promote the best of each dataset.

    Args:
        experiment: A name in `flows/runs/`, or a YAML file.
        changes: Single values of it, `key.path=value` each, for example `training.epochs=20`.
        architectures: Instead of the experiment's, for example `yolox-s`.
        datasets: Instead of the experiment's.
        seeds: Instead of the experiment's; one cell of the matrix for each.
        on_code_change: What to do with finished cells that were trained by other code: use them and warn, or retrain.
    """
    loaded = load_experiment(
        experiment, changes or (), architectures=architectures or (), datasets=datasets or (), seeds=seeds or ()
    )
    settings = Settings()
    with one_at_a_time(settings) as turn:
        if turn.held_back is not None:
            return turn.held_back
        return TrainAll(loaded, settings, on_code_change, turn.check).run()


class TrainAll:
    """The flow's body: every step is a Prefect task, and what fails, fails for its own dataset or cell alone.

    `check_turn`: see `CellRunner`.
    """

    def __init__(
        self, experiment: Experiment, settings: Settings, on_code_change: OnCodeChange,
        check_turn: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.experiment, self.settings, self.on_code_change = experiment, settings, on_code_change
        self.check_turn = check_turn
        self.seconds: dict[str, float] = {}
        self.stop = threading.Event()
        # Filled by `prepare`.
        self.versions: list[DatasetVersion] = []
        self.planned: list[PlannedCell] = []
        self.unplanned: dict[str, Exception] = {}
        self._jobs: Jobs | None = None
        self._starting = threading.Lock()

    def run(self) -> Report:
        """Do all of it; raises Unfinished where a cell has no result, or a dataset's best could not be promoted."""
        self.prepare()
        return self.carry_out()

    def prepare(self) -> None:
        """Version the datasets, and plan the cells of those where that went well."""
        with self._timed("versions"):
            specs = self._cells_of_datasets()
        with self._timed("plan"):
            self.planned = plan(specs, self.settings, self.on_code_change)

    def carry_out(self) -> Report:
        """Train, promote, compare and publish what was planned; raises as `run` does."""
        parent_run_id = open_parent_run(self.settings)
        try:
            report = self._carry_out(parent_run_id)
        except BaseException as error:
            with suppress(TrackingUnavailable):
                ending: Literal["FAILED", "KILLED"] = "FAILED" if isinstance(error, Exception) else "KILLED"
                close_parent(connect(self.settings.tracking_uri), parent_run_id, ending)
            raise
        publish_leaderboard(report, self.settings, parent_run_id)
        if report.failed or report.not_promoted:
            raise Unfinished(report)
        return report

    def _carry_out(self, parent_run_id: str | None) -> Report:
        for version in self.versions:
            report_data(version, self.settings, parent_run_id)
        with ExitStack() as stack, self._timed("cells"):
            cells = self._run_cells(self.planned, parent_run_id, stack)
        # Of two flow runs the one that went ahead decides.
        self.check_turn()
        with self._timed("promotion"):
            promotions, not_promoted, champions = compare_and_promote(cells, self.settings)
        with self._timed("comparison"):
            compare_best(cells, self.settings, parent_run_id)
        rows = make_rows(cells, champions, _ledgers(cells, self.settings))
        for name, error in self.unplanned.items():
            rows += unplanned_rows(name, self.experiment.resolved_architectures(), self.experiment.seeds, error)
        return Report(ordered(rows), promotions, not_promoted, self.seconds)

    def _cells_of_datasets(self) -> list[RunSpec]:
        """Every dataset's cells; `unplanned` says why there are none of the others."""
        specs: list[RunSpec] = []
        for name in self.experiment.datasets:
            try:
                version = version_data(name)
                check_batch(self.experiment, name, summarise(name, REPO).num_images["train"])
                specs += specs_of(self.experiment, name, version.version, self.settings)
            except Exception as error:
                self.unplanned[name] = error
                warn(f"{name}: no cell of it can run: {error}")
            else:
                self.versions.append(version)
        return specs

    def _run_cells(
        self, planned: Sequence[PlannedCell], parent_run_id: str | None, stack: ExitStack
    ) -> list[tuple[PlannedCell, CellOutcome | Exception]]:
        def jobs() -> Jobs:
            with self._starting:
                if self._jobs is None:
                    with self._timed("cluster start"):
                        url = self.settings.ray_jobs_url
                        address, may_grow_to = self.settings.ray_address, self.settings.may_grow_to
                        remote = None if url is None else Cluster(address, url, may_grow_to=may_grow_to)
                        self._jobs = Jobs(remote or stack.enter_context(embedded_cluster(self.settings.home)))
                return self._jobs

        def room(own: Sequence[str]) -> Mapping[str, float]:
            try:
                return jobs().room(own)
            except Exception as error:
                warn(f"the cluster does not say how much room it has, so one cell runs at a time: {error}")
                return {"CPU": 0.0, "GPU": 0.0}

        def start(cell: PlannedCell) -> object:
            recorder = Recorder(self.settings.tracking_uri, parent_run_id, warn)
            title = cell.spec.title
            runner = CellRunner(
                jobs, self.settings, recorder, lambda line: say(f"{title}: {line}"), self.stop, self.on_code_change,
                log, self.check_turn,
            )  # fmt: skip
            return train_cell.submit(cell, runner)

        if any(cell.trains for cell in planned):
            try:
                jobs()  # Here, because Ray wants to start in the main thread.
            except Exception as error:
                # Cells that need no training go on; the others try again, and say why they fail.
                warn(f"no Ray cluster: {error}")
        purse = Purse(self.experiment.budget, self.settings.storage, [cell.spec.run_key for cell in planned])
        cells = run_cells(planned, start, room, self.stop, purse.spent)  # type: ignore[arg-type]
        for cell, outcome in cells:
            if isinstance(outcome, Exception):
                how = "is left for the next run" if isinstance(outcome, BudgetSpent) else "failed"
                warn(f"{cell.spec.title} {how}: {outcome}")
        return cells

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


@task(name="version-data", task_run_name="version {name}", **again_when_it_passes())
def version_data(name: str) -> DatasetVersion:
    """Prepare and version one dataset with DVC; nothing runs when nothing changed, and else there is an event."""
    before = current_version(name, REPO)
    version = version_dataset(name, REPO)
    if before is None or before.version != version.version:
        dataset_changed(name, version.version, "" if before is None else before.version)
    what = "prepared" if version.regenerated else "unchanged"
    size_mib = version.size_bytes / 2**20
    say(f"{name}: version {version.version[:12]} {what}, {version.num_files} files, {size_mib:.0f} MiB")
    source = Settings().data_source
    if send_version(version, source, REPO):
        say(f"{name}: sent to {source}")
    return version


@task(name="plan", **again_when_it_passes())
def plan(specs: Sequence[RunSpec], settings: Settings, on_code_change: OnCodeChange) -> list[PlannedCell]:
    """Say what will happen to each cell, why, and how long it will take."""
    planned = plan_cells(specs, settings, on_code_change)
    for cell in planned:
        say(plan_line(cell))
    create_markdown_artifact(key="plan", markdown=plan_as_markdown(planned), description="What happens to each cell")
    return planned


@task(name="open-parent-run")
def open_parent_run(settings: Settings) -> str | None:
    """The MLflow run that stands for this `train-all`."""
    try:
        client = connect(settings.tracking_uri)
        for name in end_abandoned(client, is_dead):
            say(f"MLflow's run {name!r} of a train-all that was killed is marked so")
        return ensure_parent(
            client,
            train_all_id=str(runtime.flow_run.id),
            name=str(runtime.flow_run.name),
            start_time_ms=time.time_ns() // 1_000_000,
            process=this_process(),
        )
    except TrackingUnavailable as error:
        warn(f"no MLflow run for this train-all: {error}")
        return None


@task(
    name="train-cell", task_run_name="{cell.spec.title}", cache_policy=NO_CACHE, **again_when_it_passes(CELL_DELAYS_S)
)
def train_cell(cell: PlannedCell, runner: CellRunner) -> CellOutcome:
    """Train and score one cell as a Ray job, and keep its MLflow run up to date."""
    outcome = runner.run(cell)
    test = outcome.result.scores["test"].metrics
    runner.say(", ".join(f"test {name} {_score(test[f'coco/{name}'])}" for name in ("AP", "AP50")))
    if outcome.seconds:
        runner.say(", ".join(f"{name} {value:.1f} s" for name, value in outcome.seconds.items()))
    return outcome


def compare_and_promote(
    cells: Sequence[tuple[PlannedCell, CellOutcome | Exception]], settings: Settings
) -> tuple[list[Promotion], dict[str, str], set[str]]:
    """Register the best cell of each dataset and let it challenge the champion.

    Returns the promotions, why there is none by dataset, and the champions' MLflow runs.
    """
    promotions: list[Promotion] = []
    failed: dict[str, str] = {}
    champions: set[str] = set()
    for name, outcomes in _by_dataset(cells).items():
        # A champion that cannot be read, or a store that is gone, must not cost the other datasets their promotion.
        try:
            promotion, holder = challenge(name, [outcome.result for outcome in outcomes], settings)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            warn(f"nothing promoted for {name}: {failed[name]}")
            continue
        promotions.append(promotion)
        champions |= {holder} if holder is not None else set()
    return promotions, failed, champions


@task(name="challenge", task_run_name="promote {name}", cache_policy=NO_CACHE, **again_when_it_passes())
def challenge(name: str, results: Sequence[RunResult], settings: Settings) -> tuple[Promotion, str | None]:
    """What became of a dataset's best run, and the MLflow run of the champion after that."""
    client = connect(settings.tracking_uri)
    promotion = promote_best(client, results, settings, say)
    tell(promotion)
    holder = champion_of(client, settings, name)
    return promotion, None if holder is None else holder.run_id


@task(name="compare-best")
def compare_best(
    cells: Sequence[tuple[PlannedCell, CellOutcome | Exception]], settings: Settings, parent_run_id: str | None
) -> None:
    """Say of each dataset's two best cells on val whether test tells them apart; keep it with the parent run.

    Nothing depends on it: what goes wrong here is said, not raised.
    """
    for name, outcomes in _by_dataset(cells).items():
        if len(outcomes) < 2:
            continue
        best, second, *_ = ranked([outcome.result for outcome in outcomes])
        try:
            with tempfile.TemporaryDirectory(prefix="speck-comparison-") as folder:
                compared = compare_runs(second, best, settings, "test", out=Path(folder))
                if parent_run_id is not None:
                    upload(connect(settings.tracking_uri), parent_run_id, Path(folder), under=f"comparison/{name}")
        except Exception as error:
            warn(f"{name}: the two best cells are not compared: {error}")
            continue
        labels = " against ".join(result.spec.architecture.label for result in (best, second))
        say(f"{name}: {labels}: {compared.headline}")


def _ledgers(cells: Sequence[tuple[PlannedCell, CellOutcome | Exception]], settings: Settings) -> dict[str, Ledger]:
    """What every cell's attempts held, by run key, as far as that can be read."""
    found = {}
    for cell, _ in cells:
        with suppress(StorageUnavailable):
            if (ledger := read_ledger(settings.storage / cell.spec.run_key)) is not None:
                found[cell.spec.run_key] = ledger
    return found


def _by_dataset(cells: Sequence[tuple[PlannedCell, CellOutcome | Exception]]) -> dict[str, list[CellOutcome]]:
    found: dict[str, list[CellOutcome]] = {}
    for cell, outcome in cells:
        if isinstance(outcome, CellOutcome):
            found.setdefault(cell.spec.dataset.name, []).append(outcome)
    return found


@task(name="publish-leaderboard")
def publish_leaderboard(report: Report, settings: Settings, parent_run_id: str | None) -> None:
    """Show the comparison in Prefect and keep it with the parent run in MLflow."""
    say(spent(report.rows))
    markdown = as_markdown(report.rows)
    create_markdown_artifact(key="leaderboard", markdown=markdown, description=spent(report.rows))
    try:
        close_parent(
            connect(settings.tracking_uri),
            parent_run_id,
            "FAILED" if report.failed or report.not_promoted else "FINISHED",
            documents={"leaderboard.md": markdown},
            tables={"leaderboard.json": as_json(report.rows)["rows"], "over_seeds.json": flat_summaries(report.rows)},
            metrics=_headline(report.rows),
        )
    except TrackingUnavailable as error:
        warn(f"the leaderboard is not in MLflow: {error}")


def _headline(rows: Sequence[Row]) -> dict[str, float]:
    """Test AP of each dataset's cell that is best on val, and what became of the cells."""
    best: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: -1.0 if row.val_ap is None else row.val_ap):
        if row.test_ap is not None:
            best[f"best/{row.dataset}/test/coco/AP"] = row.test_ap
    states = ("trained", "resumed", "cached", "stale", "rescored", "stopped", "failed")
    return best | {f"cells/{state}": float(sum(row.state == state for row in rows)) for state in states}


def _score(value: float | None) -> str:
    return "without ground truth" if value is None else f"{value:.3f}"
