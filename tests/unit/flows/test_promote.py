"""Decisions on real evidence: runs in a folder, a registry in an SQLite file, the ledger beside it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from conftest import TinyDataset
from finished import failed
from promotions import NAME, aliases, ledger, load_gates_with

from data.card import DatasetCard
from data.versioning import DatasetVersion
from flows.cli import main
from flows.decisions import decisions
from flows.evaluate import UnknownRun
from flows.find_model import find_model
from flows.promote import Approval, NotRecorded, Promotion, automatic, find_candidate, promote_best, promote_run
from flows.record import open_run
from flows.rollback import roll_back
from flows.settings import Settings
from flows.sync import sync
from tracking.authority import Entry, Overtaken, SqliteAuthority
from tracking.client import connect
from tracking.packaging import DigestMismatch
from tracking.promotion import Gates
from tracking.registry import history
from training.artifacts import OPERATING_POINT
from training.records import RunResult, read_attempt
from training.spec import RunSpec, ScoringSpec

MakeSpec = Callable[..., RunSpec]
Finish = Callable[..., RunResult]
PromoteRun = Callable[..., Promotion]

pytestmark = pytest.mark.slow


def test_the_better_one_replaces_the_first_and_the_ledger_and_mlflow_say_why(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    some, everything = finish(0, 0.3), finish(1, 1.0)
    first = promote(some)
    assert (first.outcome, first.version, first.generation) == ("promoted", 1, 1)
    assert promote(some).outcome == "is champion"
    second = promote(everything)
    assert (second.outcome, second.version, second.generation) == ("promoted", 2, 2)
    assert aliases(home) == {"champion": everything.run_key, "previous": some.run_key}
    entries = ledger(home)
    assert [(entry.action, entry.version, entry.looks_at_test) for entry in entries] == [
        ("promoted", 1, 1), ("promoted", 2, 2),
    ]  # fmt: skip
    assert "superior in coco/AP: 1.0000 (+" in entries[1].why
    assert entries[1].gates[-1]["gate"] == "superior in coco/AP"
    newest = history(connect(home.tracking_uri), NAME)[0]
    assert (newest.verdict, newest.reason) == ("promoted", entries[1].why)
    described = connect(home.tracking_uri).get_model_version(NAME, "2").description
    assert described.splitlines()[0].startswith("promoted as generation 2: superior in coco/AP: 1.0000")
    assert described.count("| pass |") == len(entries[1].gates)


def test_one_that_is_not_shown_better_is_refused_and_becomes_challenger(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    everything, some = finish(0, 1.0), finish(1, 0.8)
    promote(everything)
    refused = promote(some)
    assert refused.outcome == "rejected"
    assert "superior in coco/AP" in failed(refused)
    assert aliases(home) == {"champion": everything.run_key, "challenger": some.run_key}
    assert promote(some, again=False).outcome == "decided before"
    assert [entry.looks_at_test for entry in ledger(home)] == [1, 2]
    again = promote(some)
    assert (again.outcome, again.generation, ledger(home)[-1].looks_at_test) == ("rejected", 3, 3)


def test_what_a_person_took_back_returns_only_when_a_person_asks(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    some, everything = finish(0, 0.3), finish(1, 1.0)
    promote(some)
    promote(everything)
    roll_back(connect(home.tracking_uri), home, NAME, to=None, why="it misses boats at night")
    kept = promote(everything, again=False)
    assert kept.outcome == "decided before"
    assert "rolled back by generation 3: it misses boats at night" in kept.reason
    assert aliases(home)["champion"] == some.run_key
    assert promote(everything).outcome == "promoted"
    assert [entry.looks_at_test for entry in ledger(home)] == [1, 2, 2, 3]


def test_scores_in_the_verdict_are_those_of_the_runs(finish: Finish, promote: PromoteRun) -> None:
    some, most = finish(0, 0.4), finish(1, 0.7)
    promote(some)
    verdict = promote(most, dry_run=True).verdict
    assert verdict is not None
    rule = verdict.rows[-1]
    old, new = (result.scores["test"].metrics["coco/AP"] for result in (some, most))
    assert (rule.champion, rule.candidate.split()[0]) == (f"{old:.4f}", f"{new:.4f}")


def test_a_dry_run_changes_nothing(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    shown = promote(finish(0, 0.5), dry_run=True)
    assert (shown.outcome, shown.version, shown.generation) == ("would be promoted", None, None)
    assert ledger(home) == []
    assert history(connect(home.tracking_uri), NAME) == []
    asked = promote(finish(1, 0.5), load_gates_with(approval=True), dry_run=True)
    assert (asked.outcome, asked.reason.rpartition("; ")[2]) == ("would be promoted", "a person has to agree")


def test_the_champion_has_its_run_s_operating_point(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    result = finish(0, 0.5)
    promote(result)
    kept = home.storage / result.run_key / "artifacts" / OPERATING_POINT
    with find_model(f"models:/{NAME}@champion", home) as model:
        assert model.weights.with_name(OPERATING_POINT).read_bytes() == kept.read_bytes()


def test_of_several_runs_the_best_on_val_is_tried_and_test_is_not_looked_at_for_that(
    finish: Finish, home: Settings, monkeypatch: pytest.MonkeyPatch, tiny: TinyDataset, tiny_spec: MakeSpec,
    gates: Gates,
) -> None:  # fmt: skip
    results = [finish(seed, share) for seed, share in ((0, 0.2), (1, 1.0), (2, 0.5))]
    promotion = promote_best(connect(home.tracking_uri), results, home, lambda _: None)
    assert (promotion.run_key, promotion.outcome) == (results[1].run_key, "promoted")
    version = DatasetVersion(NAME, tiny.version, 1, 1, {}, False)
    monkeypatch.setattr("flows.promote.current_version", lambda *_: version)
    # In COCO's view with 500 detections: nothing that compares with the others.
    finish(3, 1.0, spec=tiny_spec(seed=3, scoring=ScoringSpec(max_dets=500)))
    finish(4, 1.0, spec=tiny_spec(seed=4, scoring=ScoringSpec(max_dets=300)))
    assert find_candidate(NAME, None, home, gates).run_key == results[1].run_key
    assert find_candidate(NAME, results[2].run_key[:6], home, gates).run_key == results[2].run_key
    with pytest.raises(UnknownRun, match="was trained on 'tiny-squares', not on 'sample-aerial'"):
        find_candidate("sample-aerial", results[0].run_key, home, gates)
    with pytest.raises(UnknownRun, match="under protocol coco max_dets=7"):
        find_candidate(NAME, None, home, gates.model_copy(update={"protocol": "coco max_dets=7"}))


def test_whoever_is_overtaken_decides_again_against_the_new_champion(
    finish: Finish, promote: PromoteRun, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, good = finish(0, 1.0), finish(1, 0.3)
    append, num_tried = SqliteAuthority.append, 0

    def overtaken(self: SqliteAuthority, entry: Entry) -> None:
        nonlocal num_tried
        num_tried += 1
        if num_tried == 1:
            promote(best)
        append(self, entry)

    monkeypatch.setattr(SqliteAuthority, "append", overtaken)
    promotion = promote(good)
    assert (promotion.outcome, promotion.generation, num_tried) == ("rejected", 2, 3)
    assert aliases(home) == {"champion": best.run_key, "challenger": good.run_key}
    with pytest.raises(Overtaken):
        append(SqliteAuthority(home.home / "promotions.db"), ledger(home)[0])


def test_a_run_whose_end_mlflow_does_not_know_yet_is_not_rejected_for_that(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    result = finish(0, 1.0, record=False)
    folder, client = home.storage / result.run_key, connect(home.tracking_uri)
    open_run(client, read_attempt(folder, 1), folder)
    with pytest.raises(NotRecorded, match=f"is RUNNING in MLflow.*`speck sync {result.run_key}`"):
        promote(result, again=False)
    assert ledger(home) == []
    assert [one.problem for one in sync(client, [folder], restores=False)] == [None]
    assert promote(result, again=False).outcome == "promoted"


def test_a_decision_counts_though_mlflow_goes_away_before_it_shows_it(
    finish: Finish, home: Settings, gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, database, told = finish(0, 1.0), home.home / "mlflow.db", list[str]()
    append = SqliteAuthority.append

    def then_break(self: SqliteAuthority, entry: Entry) -> None:
        append(self, entry)
        with closing(sqlite3.connect(database)) as file, file:
            file.execute("ALTER TABLE registered_models RENAME TO away")

    monkeypatch.setattr(SqliteAuthority, "append", then_break)
    promotion = promote_run(connect(home.tracking_uri), result, home, gates, automatic, told.append)
    assert (promotion.outcome, promotion.generation) == ("promoted", 1)
    assert "generation 1 is decided, and MLflow will show it later" in told[-1]
    with closing(sqlite3.connect(database)) as file, file:
        file.execute("ALTER TABLE away RENAME TO registered_models")
    assert aliases(home) == {}
    assert decisions(connect(home.tracking_uri), home, NAME, told.append)[-1].champion == promotion.version
    assert aliases(home) == {"champion": result.run_key}
    newest = history(connect(home.tracking_uri), NAME)[0]
    assert (newest.verdict, newest.reason) == ("promoted", ledger(home)[0].why)
    described = connect(home.tracking_uri).get_model_version(NAME, "1").description
    assert described.startswith("promoted as generation 1: ")
    assert described.count("| pass |") == len(ledger(home)[0].gates)


def test_a_run_scored_again_while_mlflow_was_away_is_decided_about_once_it_has_the_score(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    result = finish(0, 1.0)
    with closing(sqlite3.connect(home.home / "mlflow.db")) as file, file:
        for table in ("metrics", "latest_metrics"):
            file.execute(f"UPDATE {table} SET value = 0.25 WHERE key = 'final/test/coco/AP'")
    with pytest.raises(NotRecorded, match=rf"has test coco/AP 0.25, not 1.0; .*`speck sync {result.run_key}`"):
        promote(result, again=False)
    assert ledger(home) == []
    folder = home.storage / result.run_key
    assert [one.problem for one in sync(connect(home.tracking_uri), [folder], restores=False)] == [None]
    assert promote(result, again=False).outcome == "promoted"


def test_without_the_champion_s_version_a_person_decides(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    some, everything = finish(0, 0.3), finish(1, 1.0)
    promote(some)
    connect(home.tracking_uri).delete_model_version(NAME, "1")
    waits = promote(everything, again=False)
    assert waits.outcome == "waits for approval"
    assert "v1, the champion, is not in the registry any more" in waits.reason
    assert len(ledger(home)) == 1
    assert promote(everything).outcome == "promoted"


# Approval, and the command.


def test_without_an_approval_that_the_gates_want_nothing_happens(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    result = finish(0, 0.5)
    asked = load_gates_with(approval=True)
    assert promote(result, asked).outcome == "waits for approval"
    assert ledger(home) == []
    declined = promote(result, asked, lambda *_: Approval(False, "not before the audit"))
    assert declined.outcome == "rejected"
    assert ledger(home)[0].why.startswith("not approved; not before the audit; no champion to compare with")
    approved = promote(result, asked, lambda *_: Approval(True, "seen on the roof pictures"))
    assert approved.outcome == "promoted"
    assert ledger(home)[1].why.startswith("seen on the roof pictures; ")


@pytest.fixture
def speck(home: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["speck", "promote", NAME, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_the_command_shows_the_verdict_and_says_why(finish: Finish, speck: Callable[..., Any], home: Settings) -> None:
    everything, some = finish(0, 1.0), finish(1, 0.2)
    code, out, _ = speck("--run", everything.run_key, "--dry-run")
    assert (code, ledger(home)) == (0, [])
    assert f"{NAME}: would be promoted: no champion to compare with: coco/AP 1.0000" in out
    code, out, _ = speck("--run", everything.run_key[:8])
    assert code == 0
    assert "promoted as generation 1" in out
    code, out, err = speck("--run", some.run_key)
    assert code == 1
    assert "FAIL" in out
    assert f"NotPromoted: {NAME}: rejected as generation 2: " in err
    code, out, _ = speck("--run", some.run_key, "--json")
    told = json.loads(out)
    assert (code, told["outcome"], told["generation"], told["verdict"]["promote"]) == (1, "rejected", 3, False)


def test_the_command_asks_for_an_approval(
    finish: Finish, speck: Callable[..., Any], home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finish(0, 0.5)
    monkeypatch.setattr("flows.load_gates.load_gates", lambda _: load_gates_with(approval=True))
    code, _, err = speck("--run", result.run_key)
    assert code == 1
    assert f"`speck promote {NAME} --run {result.run_key} --approve`" in err
    assert speck("--run", result.run_key, "--approve")[0] == 0
    assert "approved on the command line; " in ledger(home)[0].why


def test_latency_is_measured_for_both_when_a_gate_asks(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    some, everything = finish(0, 0.3), finish(1, 1.0)
    promote(some)
    refused = promote(everything, load_gates_with(max_latency_ms=0.001, max_latency_ratio=100.0))
    assert refused.verdict is not None
    rows = [row for row in refused.verdict.rows if row.gate == "latency, p95"]
    assert [row.passed for row in rows] == [False, True]
    assert all(float(row.champion.split()[0]) > 0 for row in rows)


def test_a_champion_whose_files_in_the_registry_were_changed_is_not_scored(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    some = finish(0, 0.3)
    promote(some)
    shutil.rmtree(home.storage / some.run_key)
    for path in (home.home / "mlartifacts").rglob("model-*/artifacts/weights.safetensors"):
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DigestMismatch, match="changed after registration"):
        promote(finish(1, 1.0))


def test_a_champion_whose_run_is_gone_is_scored_again_from_the_registry(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    some = finish(0, 0.3)
    promote(some)
    shutil.rmtree(home.storage / some.run_key)
    decided = promote(finish(1, 1.0))
    assert decided.outcome == "promoted"
    assert decided.verdict is not None
    assert float(decided.verdict.rows[-1].champion) < 0.1, "untrained weights find next to nothing"


def test_models_of_other_classes_are_not_compared(
    finish: Finish, promote: PromoteRun, tiny: TinyDataset, tiny_spec: MakeSpec
) -> None:
    promote(finish(0, 0.3))
    card = DatasetCard.model_validate(tiny.card.model_dump() | {"classes": ("light", "dark")})
    spec = tiny_spec(seed=1)
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})
    other = finish(1, 1.0, spec=spec)
    assert failed(promote(other)) == {"same classes": "light, dark"}
    assert promote(other, load_gates_with(other_classes=True)).outcome == "promoted"
