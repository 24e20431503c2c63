"""What a run held and what of it was of use, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import training.ledger
from training.ledger import LEDGER, Account, Ledger, Usage, UsageLog, ledger_of, read_ledger
from training.records import Attempt, JournalEntry, write_entry
from training.spec import ComputeSpec, RunSpec
from training.store import FolderStore

# Ten steps an epoch. The first start is killed in its second epoch, after a checkpoint at step 15; the second one has
# two workers, ends that epoch and is killed in the third, after a checkpoint at step 24; a new attempt, with three CPUs
# a worker instead of two, ends that.
FIRST = Usage(
    attempt=1, started_ms=0, last_ms=60_000, workers=1, cpus_per_worker=2, gpus_per_worker=0, price_per_hour=0.5,
    resumed_step=0,
)  # fmt: skip
GROWN = FIRST.model_copy(
    update={"started_ms": 100_000, "last_ms": 160_000, "workers": 2, "resumed_step": 15, "resumed_s": 12.0}
)
SECOND = Usage(
    attempt=2, started_ms=1_000_000, last_ms=1_050_000, workers=2, cpus_per_worker=3, gpus_per_worker=0,
    price_per_hour=0.36, resumed_step=24, resumed_s=6.0,
)  # fmt: skip


def entry(epoch: int, seconds: float, at_ms: int, attempt: int = 1) -> JournalEntry:
    return JournalEntry(
        run_key="0123456789ab", attempt=attempt, step=10 * epoch, epoch=epoch, timestamp_ms=at_ms, seconds=seconds,
        code_hash="c", metrics={},
    )  # fmt: skip


# Of the second epoch's 24 s the first start did 12, of the third's 18 s the second did 6.
JOURNAL = [entry(1, 25.0, 40_000), entry(2, 24.0, 130_000), entry(3, 18.0, 1_030_000, attempt=2)]


def test_two_attempts_three_starts_a_growing_group_and_epochs_that_were_interrupted() -> None:
    ledger = ledger_of([SECOND, GROWN, FIRST], JOURNAL, scoring_s=10.0)
    assert ledger is not None
    first = 2 * 60, 2 * (25 + 12)
    grown = 4 * 60, 4 * (12 + 6)
    second = 6 * 50, 6 * (12 + 10)
    assert ledger.accelerator == "CPU"
    assert ledger.attempts == {
        1: Account(first[0] + grown[0], first[1] + grown[1], 2, pytest.approx(0.5 * 360 / 3600)),
        2: Account(*second, 1, pytest.approx(0.36 * 300 / 3600)),
    }
    assert ledger.total == Account(660, 278, 3, pytest.approx(0.08))
    assert (ledger.total.wasted_s, ledger.total.useful_share) == (382, pytest.approx(278 / 660))


def test_work_that_is_not_in_the_journal_was_of_no_use() -> None:
    ledger = ledger_of([FIRST, GROWN], JOURNAL[:2])
    # Six seconds of the second start lie in a checkpoint, in an epoch that nobody ended.
    assert ledger is not None
    assert ledger.total.useful_s == 2 * (25 + 12) + 4 * 12


def test_a_start_that_ended_before_it_trained_has_no_part_in_an_epoch() -> None:
    idle = SECOND.model_copy(
        update={"attempt": 1, "started_ms": 200_000, "last_ms": 210_000, "resumed_step": None, "resumed_s": 0.0}
    )
    # This one began where the next one did, and was killed before it kept anything.
    lost = SECOND.model_copy(update={"attempt": 1, "started_ms": 300_000, "last_ms": 310_000})
    with_them = ledger_of([FIRST, GROWN, idle, lost, SECOND], JOURNAL, scoring_s=10.0)
    assert with_them is not None
    assert with_them.attempts[1] == Account(360 + 6 * 20, 146, 4, pytest.approx(0.5 * 360 / 3600 + 0.36 * 120 / 3600))
    assert with_them.attempts[2].useful_s == 132


def test_an_epoch_of_which_all_steps_were_done_before_is_theirs_who_did_them() -> None:
    """The later start validated it alone."""
    late = GROWN.model_copy(update={"resumed_step": 20, "resumed_s": 20.0})
    ledger = ledger_of([FIRST, late], JOURNAL[:2])
    assert ledger is not None
    assert ledger.total.useful_s == 2 * (25 + 20) + 4 * 4


def test_a_killed_group_lasted_at_least_to_its_last_report() -> None:
    stale = FIRST.model_copy(update={"last_ms": 10_000})
    ledger = ledger_of([stale], JOURNAL[:1])
    assert ledger is not None
    assert (ledger.total.held_s, ledger.total.useful_s) == (2 * 40, 2 * 25)


def test_with_gpus_the_account_is_of_gpus() -> None:
    on_gpu = SECOND.model_copy(update={"gpus_per_worker": 0.5, "price_per_hour": 7.2})
    ledger = ledger_of([FIRST, GROWN, on_gpu], JOURNAL, scoring_s=10.0)
    assert ledger is not None
    assert (ledger.accelerator, ledger.total.held_s, ledger.total.useful_s) == ("GPU", 2 * 0.5 * 50, 2 * 0.5 * 22)
    # What was paid for CPUs was paid all the same.
    assert ledger.total.price == pytest.approx(0.05 + 7.2 * 50 / 3600)


def test_a_price_is_that_of_all_or_none() -> None:
    ledger = ledger_of([FIRST.model_copy(update={"price_per_hour": None}), SECOND], JOURNAL)
    assert ledger is not None
    assert (ledger.attempts[1].price, ledger.attempts[2].price, ledger.total.price) == (None, pytest.approx(0.03), None)
    assert ledger_of([], JOURNAL) is None


def test_plain_values_name_what_follows_from_the_others() -> None:
    account = Account(held_s=8.0, useful_s=2.0, num_starts=1, price=None)
    plain: dict[str, Any] = {
        "held_s": 8.0, "useful_s": 2.0, "wasted_s": 6.0, "useful_share": 0.25, "num_starts": 1, "price": None,
    }  # fmt: skip
    assert Ledger("GPU", account, {3: account}, [account]).as_json() == {
        "accelerator": "GPU", "total": plain, "attempts": {"3": plain},
    }  # fmt: skip
    assert Account(0.0, 0.0, 1, None).useful_share == 0


@pytest.fixture
def attempt(tiny_spec: Callable[..., RunSpec]) -> Attempt:
    spec = tiny_spec(compute=ComputeSpec(workers=2, cpus_per_worker=0.5, price_per_hour=2.0))
    return Attempt(run_key=spec.run_key, number=3, spec=spec, data_source="", code_hash="c", submitted_ms=1)


def test_the_record_of_a_start_is_there_at_once_and_is_kept_up_to_date(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ms, said = 1_000, list[str]()
    monkeypatch.setattr(training.ledger, "_now_ms", lambda: now_ms)
    log = UsageLog(FolderStore(tmp_path), attempt, 2, said.append)

    def written() -> tuple[int, int | None, float]:
        (path,) = (tmp_path / LEDGER).iterdir()
        assert path.name == "003-1000.json"
        usage = Usage.model_validate_json(path.read_bytes())
        assert (usage.workers, usage.cpus_per_worker, usage.price_per_hour) == (2, 0.5, 2.0)
        return usage.last_ms, usage.resumed_step, usage.resumed_s

    assert written() == (1_000, None, 0.0)
    now_ms = 2_000
    log.resumed(7, 1.5)
    assert written() == (2_000, 7, 1.5)
    now_ms = 31_000
    log.refresh()
    assert written() == (2_000, 7, 1.5)
    now_ms = 33_000
    log.refresh()
    assert written() == (33_000, 7, 1.5)
    now_ms = 34_000
    log.close()
    now_ms = 35_000
    log.close()
    assert written() == (34_000, 7, 1.5)
    write_entry(tmp_path, entry(1, 16.5, 20_000))
    (tmp_path / LEDGER / "002-0000.json").write_text("{")
    with pytest.warns(UserWarning, match=r"002-0000\.json is unreadable"):
        ledger = read_ledger(tmp_path)
    assert ledger is not None
    # Whoever did the first 1.5 s of the epoch left no record.
    assert (ledger.total, said) == (Account(33.0, 15.0, 1, pytest.approx(2 * 33 / 3600)), [])


def test_a_storage_that_takes_no_record_is_told_and_nothing_else(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text("a file where the folder should be")
    said: list[str] = []
    log = UsageLog(FolderStore(tmp_path), attempt, 2, said.append)
    log.close()
    assert len(said) == 2
    assert all(line.startswith("the ledger waits: ") for line in said)
