"""Cells on a Ray cluster of several nodes, each with an IP of its own, of which some lose their power."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chaos.cells import HELD, Cell, faulty_code
from services.two_nodes import Nodes, namespaces_refused, ray_nodes

from training.jobs import Jobs
from training.ledger import read_usages
from training.records import JournalEntry, record_attempt, supersede
from training.spec import ComputeSpec, RunSpec

MakeSpec = Callable[..., RunSpec]
STEPS_PER_EPOCH = 12
SPREAD = ComputeSpec(workers=2, max_failures=0, placement="STRICT_SPREAD")
pytestmark = [
    pytest.mark.skipif(namespaces_refused() is not None, reason=str(namespaces_refused())),
]


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


@dataclass
class Starter:
    """Submits attempts. While the file `hold` is there, their workers wait a step after each epoch that they train."""

    nodes: Nodes
    source: str
    folder: Path

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    def __call__(self, spec: RunSpec) -> Cell:
        folder, jobs = self.folder / "runs" / spec.run_key, Jobs(self.nodes.cluster)
        attempt = record_attempt(folder, spec, data_source=self.source, code_hash="c" * 12)
        with faulty_code(HELD.format(hold=str(self.hold), steps=STEPS_PER_EPOCH + 1)) as code:
            return Cell(jobs, jobs.submit(attempt, folder, code), folder)


@pytest.fixture
def start(nodes: Nodes, tiny: Any, tmp_path: Path) -> Starter:
    return Starter(nodes, tiny.source, tmp_path)


def measured(entries: list[JournalEntry]) -> list[tuple[int, int, dict[str, float]]]:
    """Epoch, step and what was measured there, without how long that took."""
    named = ("train/loss", "val/")
    return [
        (entry.epoch, entry.step, {name: value for name, value in entry.metrics.items() if name.startswith(named)})
        for entry in entries
    ]


def assert_each_epoch_once(cell: Cell, epochs: int) -> None:
    expected = [(epoch, epoch * STEPS_PER_EPOCH) for epoch in range(1, epochs + 1)]
    assert [(entry.epoch, entry.step) for entry in cell.journal()] == expected


def test_a_lost_node_costs_the_work_since_the_last_checkpoint_and_no_accuracy(
    nodes: Nodes, start: Starter, tiny_spec: MakeSpec
) -> None:
    spec = tiny_spec(epochs=3, batch_size=2, compute=SPREAD)
    nodes.keep_workers(2)
    first, second = nodes.workers
    undisturbed = start(spec)
    expected = undisturbed.result()
    assert set(undisturbed.told(r"1 on [\d.]+, 1 on [\d.]+")) < {
        f"1 on {first.ip}, 1 on {second.ip}", f"1 on {second.ip}, 1 on {first.ip}",
    }  # fmt: skip
    assert_each_epoch_once(undisturbed, 3)
    loads = {"system/cpu_percent", "system/node_1/cpu_percent"}
    assert all(loads <= entry.metrics.keys() for entry in undisturbed.journal()), "each node tells of itself"
    (usage,) = read_usages(undisturbed.folder)
    assert [node.number for node in usage.nodes] == [0, 1]
    known = undisturbed.journal()
    supersede(undisturbed.folder)

    start.hold.touch()
    cell = start(spec)
    cell.wait_for_epoch(1)
    second.kill()
    start.hold.unlink()
    third = nodes.add_node(num_cpus=1)
    result = cell.result()
    assert measured(cell.journal()) == measured(known)
    assert {split: score.metrics for split, score in result.scores.items()} == {
        split: score.metrics for split, score in expected.scores.items()
    }
    assert cell.told(r"a machine was lost, starting again \(1 of 50\)")
    assert set(re.findall(r"1 on ([\d.]+)", cell.told("workers: .*")[-1])) == {first.ip, third.ip}
    assert len(cell.told("starting at epoch 1")) == len(cell.told("resuming from 000000012")) == 1


@pytest.mark.soak
def test_a_run_grows_onto_a_node_that_joins_and_shrinks_when_one_is_lost(
    nodes: Nodes, start: Starter, tiny_spec: MakeSpec
) -> None:
    compute = ComputeSpec(workers=(1, 2), resize_every_s=0.5, placement="SPREAD", max_failures=0)
    spec = tiny_spec(epochs=3, batch_size=2, seed=5, compute=compute)
    nodes.keep_workers(1)
    start.hold.touch()
    cell = start(spec)
    cell.wait_for_epoch(1)
    nodes.add_node(num_cpus=1)
    # Nothing is lost: the step that was under way is done, and a checkpoint kept.
    cell.wait_for_line("data ready on 2 workers .* resuming from 000000014")
    cell.wait_for_epoch(2)
    nodes.workers[1].kill()
    start.hold.unlink()
    cell.result()
    assert_each_epoch_once(cell, 3)
    assert [len(re.findall(r"1 on ", line)) for line in cell.told("workers: .*")] == [1, 2, 1]
    assert len(cell.told("going on with 2 workers")) == 1
    assert cell.told("a machine was lost"), (
        "and again, where Ray starts once more on the node before it knows of its end"
    )
    assert len(cell.told("resuming from 000000024")) == 1


@pytest.mark.soak
def test_when_the_driver_dies_with_its_node_the_next_attempt_goes_on(
    nodes: Nodes, start: Starter, tiny_spec: MakeSpec
) -> None:
    spec = tiny_spec(epochs=3, batch_size=2, seed=3, compute=SPREAD)
    nodes.keep_workers(2)
    start.hold.touch()
    cell = start(spec)
    cell.wait_for_epoch(1)
    nodes.head.kill()
    cell.join()
    assert "lost contact" in str(cell.failed)
    start.hold.unlink()

    # Nodes without a head last for minutes, and the workers on them, too: the run must not mind.
    nodes.start_head(num_cpus=0)
    nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1)
    again = start(spec)
    assert again.submission_id == f"{spec.run_key}-2"
    again.result()
    assert again.told("resuming from")
    assert_each_epoch_once(again, 3)


@pytest.mark.soak
def test_a_node_that_is_announced_to_go_costs_no_failure(
    nodes: Nodes, start: Starter, tiny_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    spec = tiny_spec(epochs=3, batch_size=2, seed=4, compute=SPREAD)
    nodes.keep_workers(2)
    start.hold.touch()
    cell = start(spec)
    cell.wait_for_epoch(1)
    going = nodes.workers[1]
    nodes.announce_end(going, deadline_s=10)
    cell.wait_for_line(r"a machine was lost, starting again \(1 of 50\)")
    going.kill()
    start.hold.unlink()
    nodes.add_node(num_cpus=1)
    cell.result()
    assert_each_epoch_once(cell, 3)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_power_cuts_at_random_moments(nodes: Nodes, start: Starter, tiny_spec: MakeSpec) -> None:
    """Whichever node goes, and whatever the run was doing, it ends as one that was left alone."""
    spec = tiny_spec(epochs=60, batch_size=2, seed=6, compute=SPREAD)
    nodes.keep_workers(2)
    undisturbed = start(spec)
    undisturbed.result()
    known = undisturbed.journal()
    supersede(undisturbed.folder)

    chance = random.Random(0)
    cell = start(spec)
    for _ in range(8):
        time.sleep(chance.uniform(1, 30))
        chance.choice(nodes.workers).kill()
        nodes.add_node(num_cpus=1)
    cell.result()
    assert_each_epoch_once(cell, 60)
    assert measured(cell.journal()) == measured(known)
