"""`speck rollback` and `speck history` over a real registry and ledger, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from decided import crown, entry
from typer.testing import CliRunner

from flows.cli import app
from flows.find_model import find_version
from flows.rollback import CannotRollBack, roll_back
from flows.settings import Settings
from tracking.authority import Entry, open_authority
from tracking.client import connect
from tracking.packaging import DigestMismatch
from tracking.registry import history, move_alias, register
from tracking.runs import DatasetRef, ensure_run

NAME = "sample-aerial"


@pytest.fixture
def client(settings: Settings) -> Any:
    return connect(settings.tracking_uri)


@pytest.fixture
def make_version(client: Any, tmp_path: Path) -> Callable[[str], int]:
    """Registers a folder of one file as a run's model."""

    def make(run_key: str) -> int:
        folder = tmp_path / run_key
        folder.mkdir()
        (folder / "weights").write_text(run_key)
        run_id = ensure_run(
            client, experiment=NAME, run_key=run_key, training_id=run_key, name="x", params={}, tags={},
            dataset=DatasetRef(NAME, "0" * 32, "", {"test": 1}), start_time_ms=1,
        )  # fmt: skip
        return register(
            client, model_name=NAME, run_id=run_id, run_key=run_key, model_folder=folder,
            tags={"speck.dataset_version": "0" * 32}, scores={"test/coco/AP": 0.25},
        )  # fmt: skip

    return make


@pytest.fixture
def reigns(client: Any, settings: Settings, make_version: Callable[[str], int]) -> list[int]:
    """Three champions, one after the other."""
    versions = [make_version(key) for key in ("aaa", "bbb", "ccc")]
    for version, key in zip(versions, ("aaa", "bbb", "ccc"), strict=True):
        crown(client, open_authority(None, settings.home), NAME, version, key)
    return versions


def aliases(client: Any) -> dict[str, int]:
    return {alias: version.version for version in history(client, NAME) for alias in version.aliases}


def test_going_back_twice_goes_further_back_and_forth_by_name(
    client: Any, settings: Settings, reigns: list[int]
) -> None:
    first, second, third = reigns

    def back(to: int | None = None) -> Entry:
        return roll_back(client, settings, NAME, to=to, why="  misses boats ")

    once = back()
    assert (once.generation, once.action, once.why) == (4, "rolled back", "misses boats")
    assert (once.champion, once.previous, once.run_key, once.looks_at_test) == (second, first, "bbb", 3)
    assert aliases(client) == {"champion": second, "previous": first}
    twice = back()
    assert (twice.champion, twice.previous) == (first, None)
    assert aliases(client) == {"champion": first}
    with pytest.raises(CannotRollBack, match=f"no champion came before v{first}"):
        back()
    forth = back(third)
    assert (forth.champion, forth.previous) == (third, second)
    assert open_authority(None, settings.home).entries(NAME)[3:] == [once, twice, forth]


def test_only_what_was_champion_can_be_gone_back_to(
    client: Any, settings: Settings, reigns: list[int], make_version: Callable[[str], int]
) -> None:
    rejected = make_version("ddd")
    ledger = open_authority(None, settings.home)
    ledger.append(
        entry(NAME, 4, rejected, run_key="ddd", action="rejected", champion=reigns[2], previous=reigns[1],
              challenger=rejected)
    )  # fmt: skip
    for to, message in (
        (rejected, f"v{rejected} was never champion, and going back passes no gates: `speck promote` it"),
        (99, "v99 was never champion"),
        (reigns[2], f"v{reigns[2]} is the champion already. Former champions for --to: v1, v2"),
    ):
        with pytest.raises(CannotRollBack, match=message):
            roll_back(client, settings, NAME, to=to, why="x")
    with pytest.raises(CannotRollBack, match="--why is empty"):
        roll_back(client, settings, NAME, to=None, why="  ")
    with pytest.raises(CannotRollBack, match="tiny has no champion yet"):
        roll_back(client, settings, "tiny", to=None, why="x")
    assert len(ledger.entries(NAME)) == 4
    ledger.append(entry("tiny", 1, 1, action="rejected", champion=None, challenger=1))
    with pytest.raises(CannotRollBack, match="tiny has no champion yet"):
        roll_back(client, settings, "tiny", to=None, why="x")


def test_a_model_whose_files_were_changed_is_not_gone_back_to(
    client: Any, settings: Settings, reigns: list[int]
) -> None:
    (weights,) = (path for path in (settings.home / "mlartifacts").rglob("weights") if path.read_text() == "bbb")
    weights.write_text("bbc")
    with pytest.raises(DigestMismatch, match=f"{NAME} version {reigns[1]}"):
        roll_back(client, settings, NAME, to=None, why="x")
    assert aliases(client)["champion"] == reigns[2]
    assert len(open_authority(None, settings.home).entries(NAME)) == 3


def test_the_commands_tell_who_when_why_and_repair_what_somebody_moved(
    client: Any, settings: Settings, reigns: list[int], make_version: Callable[[str], int]
) -> None:
    undecided = make_version("eee")
    answer = CliRunner().invoke(app, ["rollback", NAME, "--why", "misses boats"])
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == f"{NAME}: v{reigns[1]} is champion again (decision 4), previous is v{reigns[0]}\n"

    move_alias(client, NAME, "champion", undecided)
    assert find_version(client, NAME, "champion", settings).version == reigns[1]
    move_alias(client, NAME, "champion", undecided)
    answer = CliRunner().invoke(app, ["history", NAME, "--gates"])
    assert answer.exit_code == 0, answer.output
    assert f"the registry had v{undecided} as champion; it is v{reigns[1]} again" in answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("   4  20")
    assert f"v{reigns[1]} rolled back by " in lines[0]
    assert lines[0].endswith(f"champion v{reigns[1]}: misses boats")
    assert "v3 promoted by ada@lab (data 000000000000, look 3 at test); champion v3: better" in lines[1]
    assert [line for line in lines if "superior" in line and "yes" in line]
    assert lines[-4] == f"v{undecided}                    run eee data 000000000000 AP 0.250  undecided"
    assert lines[-2].endswith("AP 0.250 [champion]")

    told = json.loads(CliRunner().invoke(app, ["history", NAME, "--json"]).stdout)
    assert [one["generation"] for one in told["decisions"]] == [4, 3, 2, 1]
    assert [one["version"] for one in told["versions"]] == [undecided, *reversed(reigns)]
    assert told["decisions"][1]["gates"][0]["passed"] is True


def test_a_reason_has_to_be_given(settings: Settings) -> None:
    answer = CliRunner().invoke(app, ["rollback", NAME])
    assert answer.exit_code == 2
    assert "--why" in answer.stderr


def test_the_ledger_stays_in_the_home_where_the_s3_server_takes_no_conditional_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPECK_STORAGE", "s3://bucket/runs")
    assert Settings().ledger_url == "s3://bucket/runs"
    monkeypatch.setenv("SPECK_LEDGER", "home")
    assert Settings().ledger_url is None
    assert Settings().storage_url == "s3://bucket/runs"
    monkeypatch.setenv("SPECK_LEDGER", "disk")
    with pytest.raises(ValueError, match=r"storage.*home"):
        Settings()
