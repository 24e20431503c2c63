"""Cells on a Ray cluster of several nodes, each with an IP of its own, of which some lose their power."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chaos.processes import wait_until
from services.two_nodes import Nodes, namespaces_refused, ray_nodes

from training.jobs import CellFailed, Jobs, code_snapshot
from training.records import JournalEntry, RunResult, read_journal, read_result, record_attempt, supersede
from training.spec import ComputeSpec, RunSpec

ROOT = Path(__file__).parents[2]
MakeSpec = Callable[..., RunSpec]
# On a machine that is busy elsewhere a start takes minutes.
WAIT_S = 300.0
SPREAD = ComputeSpec(workers=2, max_failures=0, placement="STRICT_SPREAD")
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(namespaces_refused() is not None, reason=str(namespaces_refused())),
]


@dataclass
class Cell:
    """One submitted attempt, followed by a thread: `lines` grows while it runs."""

    jobs: Jobs
    submission_id: str
    folder: Path
    lines: list[str] = field(default_factory=list)
    failed: CellFailed | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            self.jobs.follow(self.submission_id, self.lines.append)
        except CellFailed as error:
            self.failed = error

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(WAIT_S * 2)
        assert not self._thread.is_alive(), self.output

    def result(self) -> RunResult:
        """What it left, after it has ended well."""
        self.join()
        result = read_result(self.folder)
        assert self.failed is None, self.failed
        assert result is not None, self.output
        return result

    def journal(self) -> list[JournalEntry]:
        """What it has reported so far."""
        return read_journal(self.folder)

    def wait_for_epoch(self, epoch: int) -> None:
        """Return when the epoch was reported, or a later one."""
        self._wait(lambda: any(entry.epoch >= epoch for entry in self.journal()), f"epoch {epoch}")

    def wait_for_line(self, pattern: str) -> None:
        """Return when it has said this."""
        self._wait(lambda: self.told(pattern), pattern)

    def told(self, pattern: str) -> list[str]:
        """What matched the pattern, line by line."""
        return [found[0] for line in list(self.lines) if "[speck]" in line and (found := re.search(pattern, line))]

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        def is_so() -> object:
            assert self._thread.is_alive(), f"ended before {what}: {self.failed}\n{self.output}"
            return condition()

        try:
            wait_until(is_so, WAIT_S, what)
        except TimeoutError:
            raise AssertionError(f"never {what}:\n{self.output}") from None

    @property
    def output(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head without CPUs, and what the tests add to it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        environment.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        environment.setattr("training.joblog.QUIET_S", 3.0)
        environment.setattr("training.joblog.KNOCK_S", 3.0)
        environment.setattr("training.jobs.CONTACT_PATIENCE_S", 2.0)
        with ray_nodes(tmp_path_factory.mktemp("nodes")) as made:
            made.start_head(num_cpus=0)
            yield made


@pytest.fixture
def start(nodes: Nodes, tiny: Any, tmp_path: Path) -> Callable[[RunSpec], Cell]:
    """Submits the next attempt of a run."""

    def submit(spec: RunSpec) -> Cell:
        folder, jobs = tmp_path / "runs" / spec.run_key, Jobs(nodes.cluster)
        attempt = record_attempt(folder, spec, data_source=tiny.source, code_hash="c" * 12)
        with code_snapshot(ROOT) as code:
            return Cell(jobs, jobs.submit(attempt, folder, code), folder)

    return submit


def measured(entries: list[JournalEntry]) -> list[tuple[int, int, dict[str, float]]]:
    """Epoch, step and what was measured there, without how long that took."""
    named = ("train/loss", "val/")
    return [
        (entry.epoch, entry.step, {name: value for name, value in entry.metrics.items() if name.startswith(named)})
        for entry in entries
    ]


def test_a_lost_node_costs_the_work_since_the_last_checkpoint_and_no_accuracy(
    nodes: Nodes, start: Callable[[RunSpec], Cell], tiny_spec: MakeSpec
) -> None:
    spec = tiny_spec(epochs=4, batch_size=2, compute=SPREAD)
    nodes.keep_workers(2)
    undisturbed = start(spec)
    expected = undisturbed.result()
    assert undisturbed.told("workers: .*") == [f"workers: 1 on {a.ip}, 1 on {b.ip}" for a, b in [nodes.workers]]
    known = undisturbed.journal()
    assert [(epoch, step) for epoch, step, _ in measured(known)] == [(1, 12), (2, 24), (3, 36), (4, 48)]
    supersede(undisturbed.folder)

    cell = start(spec)
    cell.wait_for_epoch(1)
    first, second = nodes.workers
    second.kill()
    third = nodes.add_node(num_cpus=1)
    result = cell.result()
    assert measured(cell.journal()) == measured(known)
    assert {split: score.metrics for split, score in result.scores.items()} == {
        split: score.metrics for split, score in expected.scores.items()
    }
    assert cell.told(r"a machine was lost, starting again \(1 of 50\)")
    assert set(re.findall(r"1 on ([\d.]+)", cell.told("workers: .*")[-1])) == {first.ip, third.ip}
    assert len(cell.told("starting at epoch 1")) == len(cell.told("resuming from")) == 1


def test_a_run_grows_onto_a_node_that_joins_and_shrinks_when_one_is_lost(
    nodes: Nodes, start: Callable[[RunSpec], Cell], tiny_spec: MakeSpec
) -> None:
    compute = ComputeSpec(workers=(1, 2), resize_every_s=0.5, placement="SPREAD", max_failures=0)
    spec = tiny_spec(epochs=40, batch_size=2, seed=5, compute=compute)
    nodes.keep_workers(1)
    cell = start(spec)
    cell.wait_for_epoch(1)
    with nodes.workers[0].frozen("RayTrainWorker"):
        nodes.add_node(num_cpus=1)
    cell.wait_for_line("data ready on 2 workers")
    grown_at = max(entry.epoch for entry in cell.journal())
    cell.wait_for_epoch(grown_at + 1)
    nodes.workers[1].kill()
    cell.result()
    assert [entry.epoch for entry in cell.journal()] == list(range(1, 41))
    assert [entry.step for entry in cell.journal()] == list(range(12, 481, 12))
    sizes = [len(re.findall(r"1 on ", line)) for line in cell.told("workers: .*")]
    assert sizes == [1, 2, 1]
    assert cell.told("going on with 2 workers")


def test_when_the_driver_dies_with_its_node_the_next_attempt_goes_on(
    nodes: Nodes, start: Callable[[RunSpec], Cell], tiny_spec: MakeSpec
) -> None:
    spec = tiny_spec(epochs=6, batch_size=2, seed=3, compute=SPREAD)
    nodes.keep_workers(2)
    cell = start(spec)
    cell.wait_for_epoch(1)
    nodes.head.kill()
    cell.join()
    assert "lost contact" in str(cell.failed)
    before = cell.journal()

    # Nodes without a head last for minutes, and the workers on them, too: the run must not mind.
    nodes.start_head(num_cpus=0)
    nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1)
    again = start(spec)
    assert again.submission_id == f"{spec.run_key}-2"
    again.result()
    assert again.told("resuming from")
    assert [entry.epoch for entry in again.journal()] == list(range(1, 7))
    assert again.journal()[: len(before)] == before
