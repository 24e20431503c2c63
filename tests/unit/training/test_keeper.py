"""The background writer of checkpoints and journal, over a real folder, with storage that fails when told to."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.checkpoint import CHECKPOINTS, Manifest, newest_valid, save_checkpoint
from training.keeper import MAX_LOST_IN_A_ROW, Keeper
from training.records import JournalEntry, read_journal
from training.store import FolderStore, StorageFull, StorageUnavailable

RUN_KEY = "a" * 12


class Moody(FolderStore):
    """A folder that is away while `is_away`, and answers no upload before `go_on`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.is_away = False
        self.go_on = threading.Event()
        self.go_on.set()

    def upload(self, folder: Path, name: str, *, last: str) -> None:
        assert self.go_on.wait(30)
        self._check()
        super().upload(folder, name, last=last)

    def write(self, name: str, content: bytes) -> None:
        self._check()
        super().write(name, content)

    def _check(self) -> None:
        if self.is_away:
            raise StorageUnavailable("the share is away. Mount it")


def saving(step: int, score: float | None = None) -> Callable[[Path], Manifest]:
    return lambda folder: save_checkpoint(
        folder, run_key=RUN_KEY, step=step, epoch=step // 6, tensors={}, state={"step": step}, score=score
    )


def entry(step: int) -> JournalEntry:
    return JournalEntry(
        run_key=RUN_KEY,
        attempt=1,
        step=step,
        epoch=step // 6,
        timestamp_ms=step,
        seconds=1.0,
        code_hash="c",
        metrics={},
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moody:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return Moody(tmp_path / RUN_KEY)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def keeper(store: Moody, said: list[str], tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(store, num_kept=2, say=said.append)
    yield made
    store.go_on.set()
    made.close()
    assert list((tmp_path / "tmp").iterdir()) == [], "nothing stays on the node's own disk"


def steps(store: FolderStore) -> list[int]:
    names = [name for name in store.names(CHECKPOINTS) if name.endswith("manifest.json")]
    return sorted(Manifest.model_validate_json(store.read(name)).step for name in names)


def test_the_latest_stay_and_the_best(store: Moody, keeper: Keeper, said: list[str]) -> None:
    scores = {6: 0.2, 12: 0.5, 18: 0.4, 20: None, 24: 0.5, 30: 0.1, 36: None}
    seen = []
    for step, score in scores.items():
        keeper.keep(saving(step, score), can_wait=False)
        keeper.wait()
        seen.append(steps(store))
    assert seen == [[6], [6, 12], [12, 18], [12, 18, 20], [20, 24], [24, 30], [24, 30, 36]]
    assert said == []


def test_what_an_earlier_attempt_kept_counts(store: Moody, keeper: Keeper) -> None:
    for step, score in {6: 0.9, 12: 0.1, 18: 0.1}.items():
        keeper.keep(saving(step, score), can_wait=False)
    keeper.close()
    (store_folder,) = {
        name.rpartition("/")[0] for name in store.names(CHECKPOINTS) if name.split("/")[1][:9] == "0" * 7 + "12"
    }
    (Path(store.url) / store_folder / "manifest.json").write_text("{")
    (resumed,) = {name.split("/")[1] for name in store.names(CHECKPOINTS) if name.split("/")[1][:9] == "000000018"}
    later = Keeper(store, num_kept=1, say=print, resumed=resumed)
    later.keep(saving(24), can_wait=False)
    later.close()
    found = {name.split("/")[1][:9] for name in store.names(CHECKPOINTS)}
    assert found == {"000000006", "000000012", "000000024"}, "a damaged one is left for people to look at"


def test_those_that_were_skipped_push_no_sound_one_out(store: Moody, keeper: Keeper, tmp_path: Path) -> None:
    for step in (6, 12, 18):
        keeper.keep(saving(step), can_wait=False)
        keeper.wait()
    for path in (Path(store.url) / CHECKPOINTS).glob("*/state.json"):
        path.write_text("{}")
    said: list[str] = []
    assert newest_valid(store, tmp_path / "here", said.append) is None
    assert len(said) == 2
    afresh = Keeper(store, num_kept=2, say=print)
    for step in (3, 6, 9):
        afresh.keep(saving(step), can_wait=False)
    afresh.close()
    sound = newest_valid(store, tmp_path / "here", print)
    assert sound is not None
    assert Manifest.model_validate_json((sound / "manifest.json").read_bytes()).step == 9
    later = Keeper(store, num_kept=2, say=print, resumed=sound.name)
    later.keep(saving(11), can_wait=False)
    later.close()
    assert steps(store) == [9, 11], "damaged ones go when there is a new one"


def test_what_a_killed_upload_left_goes(store: Moody, keeper: Keeper) -> None:
    keeper.keep(saving(6), can_wait=False)
    keeper.close()
    (whole,) = {name.rpartition("/")[0] for name in store.names(CHECKPOINTS)}
    store.write(f"{CHECKPOINTS}/000000012-abcdef/model.safetensors", b"half")
    Keeper(store, num_kept=2, say=print, resumed=whole.rpartition("/")[2]).close()
    assert {name.rpartition("/")[0] for name in store.names(CHECKPOINTS)} == {whole}


def test_training_goes_on_while_a_checkpoint_is_under_way(store: Moody, keeper: Keeper) -> None:
    store.go_on.clear()
    assert keeper.keep(saving(3), can_wait=True)
    assert not keeper.keep(saving(4), can_wait=True), "the next one does not wait for it"
    assert steps(store) == []
    store.go_on.set()
    assert keeper.keep(saving(6, 0.1), entry(6), can_wait=False)
    keeper.wait()
    assert steps(store) == [3, 6]
    assert read_journal(store) == [entry(6)]


def test_an_entry_comes_after_its_checkpoint(store: Moody, keeper: Keeper) -> None:
    """The other way round a kill in between would leave an epoch that is told and then done again."""
    store.go_on.clear()
    keeper.keep(saving(6), entry(6), can_wait=False)
    assert read_journal(store) == []
    store.go_on.set()
    keeper.wait()
    assert read_journal(store) == [entry(6)]


def test_a_storage_that_is_away_costs_checkpoints_and_no_entry(
    store: Moody, keeper: Keeper, said: list[str], tmp_path: Path
) -> None:
    keeper.keep(saving(6), entry(6), can_wait=False)
    keeper.wait()
    store.is_away = True
    for step in (12, 18):
        assert keeper.keep(saving(step), entry(step), can_wait=False)
        keeper.wait()
    assert [line for line in said if "lost" in line] == [
        f"a checkpoint is lost, {number} of {MAX_LOST_IN_A_ROW} in a row: the share is away. Mount it"
        for number in (1, 2)
    ]
    assert "the journal waits" in said[-1]
    store.is_away = False
    keeper.keep(saving(24), entry(24), can_wait=False)
    keeper.wait()
    assert steps(store) == [6, 24]
    assert read_journal(store) == [entry(step) for step in (6, 12, 18, 24)]
    assert newest_valid(store, tmp_path / "here", print) is not None


def test_training_stops_rather_than_go_on_unkept(store: Moody, keeper: Keeper) -> None:
    store.is_away = True
    for step in range(MAX_LOST_IN_A_ROW):
        keeper.keep(saving(step), can_wait=False)
    with pytest.raises(StorageUnavailable, match="the share is away"):
        keeper.keep(saving(99), can_wait=False)
    store.is_away = False
    keeper.close()


def test_a_full_disk_of_the_node_is_told_and_other_errors_are_raised(
    store: Moody, keeper: Keeper, said: list[str]
) -> None:
    def full(folder: Path) -> Manifest:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(folder: Path) -> Manifest:
        raise ValueError("JSON compliant")

    assert not keeper.keep(full, entry(6), can_wait=False)
    assert "no room for a checkpoint on this node's disk" in said[0]
    keeper.wait()
    assert read_journal(store) == [entry(6)], "what the epoch measured is told all the same"
    with pytest.raises(ValueError, match="JSON"):
        keeper.keep(broken, can_wait=False)
    keeper.keep(full, can_wait=False)
    keeper.keep(full, can_wait=False)
    with pytest.raises(StorageFull):
        keeper.keep(saving(6), can_wait=False)
