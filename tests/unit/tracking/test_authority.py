"""The ledger in a real SQLite file and on real S3 servers, by processes that race and die; MLflow's aliases by it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from decided import crown, entry
from services.conditional_s3 import LOCALBUCKET, WITHOUT_LOCALBUCKET, conditional_s3_service
from services.fault_proxy import fault_proxy
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service

from tracking.authority import (
    Authority,
    AuthorityDamaged,
    AuthorityUnavailable,
    Entry,
    OtherRegistry,
    Overtaken,
    consult,
    open_authority,
    settle,
)
from tracking.registry import VERDICT, history, move_alias, record_verdict, register
from tracking.runs import DatasetRef, ensure_run

TESTS = Path(__file__).parents[2]
ROOT = TESTS.parent


@dataclass(frozen=True)
class Place:
    """Where a ledger lies: below `url` on S3, whose objects are files in `objects`, or in `home`."""

    url: str | None
    home: Path
    objects: Path

    def open(self) -> Authority:
        """The ledger, as another process would open it."""
        return open_authority(self.url, self.home)

    def appender(self, who: str, count: int) -> subprocess.Popen[str]:
        """A process that appends `count` entries."""
        script = Path(__file__).with_name("appender.py")
        command = [sys.executable, str(script), self.url or "-", str(self.home), who, str(count)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}"}
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)


@pytest.fixture(params=["sqlite", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "sqlite":
        yield Place(None, tmp_path / "home", tmp_path / "none")
        return
    if LOCALBUCKET is None:
        pytest.skip(WITHOUT_LOCALBUCKET)
    (tmp_path / "served/bucket").mkdir(parents=True)
    with conditional_s3_service(tmp_path / "served") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield Place("s3://bucket/team", tmp_path / "home", tmp_path / "served/bucket/team")


def test_what_is_appended_is_read_back_as_it_was(place: Place) -> None:
    ledger = place.open()
    assert ledger.entries("dots") == []
    first = entry("dots", 1, 1, why='first Größe "quoted"\n2nd line', previous=None)
    second = entry("dots", 2, 2, action="rejected", champion=1, challenger=2, gates=(), looks_at_test=2)
    for one in (first, second, entry("other", 1, 9)):
        ledger.append(one)
    assert place.open().entries("dots") == [first, second]
    assert [one.version for one in place.open().entries("other")] == [9]


def test_a_generation_is_given_once_and_none_is_left_out(place: Place) -> None:
    ours, theirs = place.open(), place.open()
    ours.append(entry("dots", 1, 1))
    for late in (entry("dots", 1, 1), entry("dots", 1, 2)):
        with pytest.raises(Overtaken, match="dots: somebody else made decision 1"):
            theirs.append(late)
    with pytest.raises(ValueError, match="generation 3 cannot follow 1"):
        theirs.append(entry("dots", 3, 2))
    assert [one.version for one in place.open().entries("dots")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("num_each", [8, pytest.param(25, marks=pytest.mark.soak)])
def test_of_many_that_append_at_once_each_gets_generations_of_its_own(place: Place, num_each: int) -> None:
    processes = [place.appender(who, num_each) for who in "abcd"]
    acknowledged: dict[int, str] = {}
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        for line in output.splitlines():
            generation, _, why = line.partition(" ")
            assert acknowledged.setdefault(int(generation), why) == why
    entries = place.open().entries("raced")
    assert [one.generation for one in entries] == list(range(1, 4 * num_each + 1))
    assert {one.generation: one.why for one in entries} == acknowledged
    wanted = [f"{who} {number}" for who in "abcd" for number in range(num_each)]
    assert sorted(one.why for one in entries) == sorted(wanted)


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_acknowledged(place: Place) -> None:
    acknowledged: list[str] = []
    for life in range(3):
        with place.appender(str(life), 10_000) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline() for _ in range(7)]
            process.kill()
            acknowledged += process.stdout.readlines()
    entries = place.open().entries("raced")
    kept = {one.generation: one.why for one in entries}
    told = dict(line.rstrip("\n").split(" ", 1) for line in acknowledged if line.endswith("\n"))
    assert len(told) >= 21
    assert {int(generation): why for generation, why in told.items()}.items() <= kept.items()
    # Each kill may have come between the entry and the line that told of it.
    assert len(kept) <= len(told) + 3
    place.open().append(entry("raced", len(kept) + 1, 1))


def test_the_file_lets_nobody_change_or_delete_an_entry(tmp_path: Path) -> None:
    ledger = open_authority(None, tmp_path)
    ledger.append(entry("dots", 1, 1))
    with closing(sqlite3.connect(tmp_path / "promotions.db")) as file:
        for statement in (
            "UPDATE entries SET entry = '{}'",
            "DELETE FROM entries",
            "INSERT OR REPLACE INTO entries SELECT dataset, generation, '{}' FROM entries",
            "INSERT INTO entries VALUES ('dots', 3, '{}')",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                file.execute(statement)
    assert ledger.entries("dots") == [entry("dots", 1, 1)]


def test_reading_leaves_no_file_behind_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert open_authority(None, tmp_path / "home").entries("dots") == []
    assert not (tmp_path / "home").exists()
    (tmp_path / "promotions.db").write_text("no database, but long enough to be looked at" * 100)
    with pytest.raises(AuthorityUnavailable, match=r"promotions\.db: file is not a database"):
        open_authority(None, tmp_path).entries("dots")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_an_object_that_was_taken_away_or_changed_is_missed(place: Place) -> None:
    ledger = place.open()
    for generation in (1, 2, 3):
        ledger.append(entry("dots", generation, generation))
    folder = place.objects / "promotions/dots"
    content = (folder / "2.json").read_text()
    (folder / "2.json").write_text(content[:50])
    with pytest.raises(AuthorityDamaged, match=r"promotions/dots/2\.json is no decision"):
        ledger.entries("dots")
    (folder / "2.json").unlink()
    with pytest.raises(AuthorityDamaged, match="generation 2 is missing"):
        ledger.entries("dots")
    (folder / "2.json").write_text(content)
    assert len(ledger.entries("dots")) == 3
    assert not list((place.objects / "promotions").glob(".probes/*"))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_an_answer_that_was_lost_is_no_defeat(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third request fails, some after the server did what it was asked: then the repetition is refused."""
    with fault_proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        ledger = place.open()
        proxy.failing_share = 1 / 3
        kept: list[str] = []
        for number in range(12):
            try:
                ledger.append(entry("dots", len(kept) + 1, 1, why=str(number)))
            except AuthorityUnavailable:
                # Too many in a row. What became of it, the ledger tells.
                if len(place.open().entries("dots")) == len(kept):
                    continue
            kept.append(str(number))
        proxy.failing_share = 0.0
        assert proxy.num_faults > 10
        assert [one.why for one in place.open().entries("dots")] == kept


@pytest.mark.slow
@pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
def test_a_server_that_ignores_the_condition_is_refused_before_anything_is_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served/bucket").mkdir(parents=True)
    with s3_service(tmp_path / "served") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        ledger = open_authority("s3://bucket/team", tmp_path)
        with pytest.raises(AuthorityUnavailable, match=r"ignores the condition 'If-None-Match: \*'") as error:
            ledger.append(entry("dots", 1, 1))
        assert service.environment["AWS_SECRET_ACCESS_KEY"] not in str(error.value)
        assert ledger.entries("dots") == []
        assert [path for path in (tmp_path / "served/bucket").rglob("*") if path.is_file()] == []


def registered(client: Any, dataset: str, run_key: str, folder: Path) -> int:
    run_id = ensure_run(
        client, experiment=dataset, run_key=run_key, training_id=run_key, name="x", params={}, tags={},
        dataset=DatasetRef(dataset, "0" * 32, "/srv", {"test": 3}), start_time_ms=1,
    )  # fmt: skip
    return register(
        client, model_name=dataset, run_id=run_id, run_key=run_key, model_folder=folder,
        tags={"speck.dataset_version": "0" * 32}, scores={},
    )  # fmt: skip


def aliases(client: Any, dataset: str) -> dict[str, int]:
    return {alias: version.version for version in history(client, dataset) for alias in version.aliases}


def test_aliases_follow_the_ledger_whoever_moved_them(client: Any, files: Path, tmp_path: Path) -> None:
    first, second, third = (registered(client, "moved", key, files) for key in ("aaa", "bbb", "ccc"))
    ledger = open_authority(None, tmp_path)
    assert consult(client, ledger, "moved") == ([], []), "nobody is champion, so there is nothing to adopt"
    crown(client, ledger, "moved", first, "aaa")
    crown(client, ledger, "moved", second, "bbb")
    assert aliases(client, "moved") == {"champion": second, "previous": first}
    assert consult(client, ledger, "moved")[1] == []

    move_alias(client, "moved", "champion", third)
    move_alias(client, "moved", "challenger", third)
    move_alias(client, "moved", "previous", None)
    entries, said = consult(client, ledger, "moved")
    assert [one.version for one in entries] == [first, second]
    assert aliases(client, "moved") == {"champion": second, "previous": first}
    assert len(said) == 3
    assert f"the registry had v{third} as champion; it is v{second} again" in said[0]
    assert "`speck promote` or `speck rollback moved`" in said[0]
    assert consult(client, ledger, "moved")[1] == []


def test_an_entry_whose_aliases_were_not_moved_any_more_is_projected_later(
    client: Any, files: Path, tmp_path: Path
) -> None:
    first, second = (registered(client, "late", key, files) for key in ("aaa", "bbb"))
    ledger = open_authority(None, tmp_path)
    crown(client, ledger, "late", first, "aaa")
    ledger.append(entry("late", 2, second, run_key="bbb", previous=first))
    consult(client, ledger, "late")
    assert aliases(client, "late") == {"champion": second, "previous": first}


def test_who_moves_aliases_late_does_not_undo_what_was_decided_meanwhile(
    client: Any, files: Path, tmp_path: Path
) -> None:
    first, second = (registered(client, "stale", key, files) for key in ("aaa", "bbb"))
    ledger = open_authority(None, tmp_path)
    stale = [crown(client, ledger, "stale", first, "aaa"), crown(client, ledger, "stale", second, "bbb")][0]

    class Late:
        """Read before the second decision, acted on after it."""

        answers = iter([stale])

        def entries(self, dataset: str) -> list[Entry]:
            return list(next(self.answers, ledger.entries(dataset)))

        def append(self, entry: Entry) -> None:
            raise AssertionError(entry)

    entries, _ = consult(client, Late(), "stale")
    assert [one.version for one in entries] == [first, second]
    assert aliases(client, "stale") == {"champion": second, "previous": first}


def test_a_registry_of_an_earlier_release_is_adopted_once(client: Any, files: Path, tmp_path: Path) -> None:
    first, second = (registered(client, "older", key, files) for key in ("aaa", "bbb"))
    record_verdict(client, "older", first, promoted=True, reason="the first")
    record_verdict(client, "older", second, promoted=True, reason="0.2 beats 0.1")
    move_alias(client, "older", "champion", second)
    move_alias(client, "older", "previous", first)
    ledger = open_authority(None, tmp_path)
    (adopted,), said = consult(client, ledger, "older")
    assert (adopted.action, adopted.generation, adopted.champion, adopted.previous) == ("adopted", 1, second, first)
    assert (adopted.run_key, adopted.looks_at_test) == ("bbb", 2)
    assert "0.2 beats 0.1" in adopted.why
    assert len(said) == 1
    assert consult(client, ledger, "older") == ([adopted], [])
    assert [version.tags[VERDICT] for version in history(client, "older")] == ["promoted"] * 2


def test_a_version_that_was_deleted_in_mlflow_is_said_and_stops_nothing(
    client: Any, files: Path, tmp_path: Path
) -> None:
    first, second = (registered(client, "gone", key, files) for key in ("aaa", "bbb"))
    ledger = open_authority(None, tmp_path)
    crown(client, ledger, "gone", first, "aaa")
    entries = crown(client, ledger, "gone", second, "bbb")
    client.delete_model_version("gone", str(second))
    (said,) = settle(client, entries, "gone")
    assert f"v{second}, the champion by decision 2, is not in the registry any more" in said
    assert aliases(client, "gone") == {"previous": first}


def test_another_registry_s_versions_are_not_taken_for_ours(client: Any, files: Path, tmp_path: Path) -> None:
    version = registered(client, "foreign", "aaa", files)
    ledger = open_authority(None, tmp_path)
    ledger.append(replace(entry("foreign", 1, version), run_key="zzz"))
    with pytest.raises(OtherRegistry, match=r"is run aaa in this registry and zzz in the ledger"):
        consult(client, ledger, "foreign")
    assert aliases(client, "foreign") == {}
