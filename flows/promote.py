"""From finished runs to the champion: select on val, gather the evidence, decide on test, append to the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from data.card import load_card
from data.versioning import current_version
from flows.decisions import decisions
from flows.evaluate import UnknownRun, find_result
from flows.evidence import gather
from flows.lineage import lineage_faults, unsent
from flows.load_gates import load_gates, protocol_of
from flows.register import register_run
from flows.settings import REPO, Settings
from tracking.authority import Entry, Overtaken, actor, open_authority
from tracking.client import TrackingUnavailable
from tracking.promotion import Gates, Verdict, decide
from tracking.registry import Version, history
from tracking.runs import Recorded, find_training
from training.records import CorruptResult, RunResult, read_result, require_files, training_id
from training.spec import DatasetSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRIC = "coco/AP"
Outcome: TypeAlias = Literal[
    "promoted", "rejected", "waits for approval", "would be promoted", "is champion", "decided before"
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class NotRecorded(RuntimeError):
    """A run cannot be decided about because MLflow does not know it, or not yet how it ended."""


@dataclass(frozen=True)
class Approval:
    """What a person says to a promotion that the gates allow; `comment` goes into the ledger."""

    granted: bool
    comment: str


# Asked with the gates, the verdict and the generation that it would get; None: nobody has said anything yet.
Approve = Callable[[Gates, Verdict, int], Approval | None]


@dataclass(frozen=True)
class Promotion:
    """What became of a run: its version in the registry, None before it is registered, and the verdict over it.

    `generation`: of the entry that says so; None where nothing was appended. `num_left_out` of the test pictures, for
    the champion was trained on them. `verdict` is None where none was needed.
    """

    dataset: str
    run_key: str
    version: int | None
    outcome: Outcome
    reason: str
    verdict: Verdict | None = None
    generation: int | None = None
    num_left_out: int = 0

    @property
    def is_open(self) -> bool:
        """Whether a person has to say something before the run can become champion."""
        return self.outcome == "waits for approval"

    @property
    def how_to_approve(self) -> str:
        """What a person does who agrees, where one is waited for."""
        command = f"`speck promote {self.dataset} --run {self.run_key} --approve`"
        return f"{command}, or the deployment promote/default in Prefect"


def ranked(results: Sequence[RunResult], metric: str = METRIC) -> list[RunResult]:
    """The runs by `metric` on the validation split, best first; the test split is not looked at. Of equals, by key."""
    return sorted(results, key=lambda result: (-(result.scores["val"].metrics.get(metric) or 0.0), result.run_key))


def find_candidate(dataset: str, run: str | None, settings: Settings, gates: Gates) -> RunResult:
    """The finished run whose key begins with `run`; None: the best on val on the dataset's current version.

    Runs that were scored under another protocol than the gates' have no part in that: they could only be refused.

    Raises:
        UnknownRun: there is none, or it is of another dataset.
    """
    if run is not None:
        result = find_result(run, settings)
        if result.spec.dataset.name != dataset:
            raise UnknownRun(f"run {result.run_key} was trained on {result.spec.dataset.name!r}, not on {dataset!r}")
        return result
    version = current_version(dataset, REPO)
    wanted = None if version is None else (dataset, version.version)
    found = [
        finished
        for path in settings.storage.glob("*/result.json")
        if (finished := _finished(path.parent)) is not None
        and (finished.spec.dataset.name, finished.spec.dataset.version) == wanted
        and _protocol(finished) == gates.protocol
    ]
    if not found:
        shown = "no version yet" if version is None else f"version {version.version[:12]}"
        raise UnknownRun(
            f"no run has finished on {dataset} ({shown}) under protocol {gates.protocol}; run `speck train-all "
            f"--datasets {dataset}`"
        )
    return ranked(found, gates.metric)[0]


def _finished(run_folder: Path) -> RunResult | None:
    """A run's result, None if it is damaged: `train-all` takes such a run for unfinished."""
    try:
        return read_result(run_folder)
    except CorruptResult:
        return None


def _protocol(result: RunResult) -> str:
    score = result.scores["val"]
    return protocol_of(score.protocol, score.options.max_dets, score.options.ignore_rule)


def automatic(gates: Gates, verdict: Verdict, generation: int) -> Approval | None:
    """The approval of somebody who was not asked: given unless the gates want a person's."""
    del verdict, generation
    return None if gates.approval else Approval(True, "")


def promote_best(
    client: MlflowClient, results: Sequence[RunResult], settings: Settings, say: Callable[[str], object]
) -> Promotion:
    """Let the run that is best on val challenge the champion, unless that was decided before; see `promote_run`."""
    gates = load_gates(load_card(results[0].spec.dataset.name))
    best = ranked(results, gates.metric)[0]
    return promote_run(client, best, settings, gates, automatic, say, again=False)


def promote_run(
    client: MlflowClient,
    result: RunResult,
    settings: Settings,
    gates: Gates,
    approve: Approve,
    say: Callable[[str], object],
    *,
    again: bool = True,
    dry_run: bool = False,
) -> Promotion:
    """Decide whether a finished run becomes its dataset's champion, and make it so.

    Whoever is overtaken by another decision begins again with the champion that it left. Unless `again`, a run that
    was rejected against the same champion on the same data, or that a person took back, is not looked at another time.
    `dry_run` decides nothing.

    Raises:
        NotRecorded: the run has no MLflow run, or one that is not finished.
        CorruptResult: its files are not those of its result.
        TrackingUnavailable, AuthorityUnavailable, AuthorityDamaged, OtherRegistry: see `tracking`.
        And what `flows.evidence.gather` raises.
    """
    name, run_folder = result.spec.dataset.name, settings.storage / result.run_key
    # Here as well, for a run that finished long ago: what is judged and registered must be what was scored.
    require_files(run_folder, result)
    recorded = find_training(client, name, training_id(run_folder), f"final/test/{gates.metric}")
    if recorded is None:
        raise NotRecorded(f"run {result.run_key} has no MLflow run yet; run again when the tracking store is reachable")
    if recorded.status != "FINISHED":
        # What MLflow lacks for the moment is no fault of the run, and a rejection would stand.
        raise NotRecorded(
            f"run {result.run_key} is {recorded.status} in MLflow, which lacks its end; send it with `speck sync "
            f"{result.run_key}`, then decide again"
        )
    challenge = _Challenge(client, result, recorded, training_id(run_folder), settings, gates, approve, say)
    while True:
        entries = decisions(client, settings, name, say)
        if (known := challenge.known(entries, again=again)) is not None:
            return known
        try:
            return challenge.decide(entries, dry_run=dry_run)
        except Overtaken as error:
            say(f"{name}: {error}")


@dataclass(frozen=True)
class _Challenge:
    """A run that would be champion, and what it takes to decide about it on top of some entries."""

    client: MlflowClient
    result: RunResult
    recorded: Recorded
    training: str
    settings: Settings
    gates: Gates
    approve: Approve
    say: Callable[[str], object]

    @property
    def dataset(self) -> DatasetSpec:
        return self.result.spec.dataset

    def known(self, entries: Sequence[Entry], *, again: bool) -> Promotion | None:
        """What the entries say already: the run is champion, or, unless `again`, it was rejected or rolled back."""
        if not entries:
            return None
        present, versions = entries[-1].champion, history(self.client, self.dataset.name)
        own = [version.version for version in versions if version.run_id == self.recorded.run_id]
        if present in own:
            return self._told(present, "is champion", self.training)
        if again:
            return None
        if present is not None and present not in [version.version for version in versions]:
            reason = f"v{present}, the champion, is not in the registry any more; `speck promote` decides without it"
            return self._told(min(own, default=None), "waits for approval", reason)
        return self._decided_before(entries, own)

    def _decided_before(self, entries: Sequence[Entry], own: Sequence[int]) -> Promotion | None:
        present = entries[-1].champion
        asked = ("rejected", self.training, present, self.dataset.version, self.gates.protocol)
        for before, entry in reversed([*zip([None, *entries], entries, strict=False)]):
            what = (entry.action, entry.training, entry.champion, entry.dataset_version, entry.protocol)
            # What a person took back does not return by itself with the next training.
            taken_back = entry.action == "rolled back" and before is not None and before.champion in own
            if what == asked or taken_back:
                reason = f"{entry.action} by generation {entry.generation}: {entry.why}; `speck promote` decides again"
                return self._told(min(own, default=entry.version), "decided before", reason)
            if entry.action == "promoted" and entry.version in own:
                return None
        return None

    def decide(self, entries: Sequence[Entry], *, dry_run: bool) -> Promotion:
        """One decision, which becomes the next entry. Raises Overtaken where another did meanwhile."""
        name, run_id, metric = self.dataset.name, self.recorded.run_id, self.gates.metric
        if dry_run:
            number = next((one.version for one in history(self.client, name) if one.run_id == run_id), None)
        else:
            number = register_run(self.client, self.result, run_id, self.settings)
        faults = lineage_faults(self.client, self.result, self.recorded, number, self.settings)
        lacking = unsent(self.result, self.recorded, metric)
        evidence = gather(
            self.client, self.result, self._champion(entries), self.gates, self.settings, (*faults, *lacking), self.say
        )
        if lacking and evidence.candidate.faults == lacking:
            raise NotRecorded(
                f"run {self.result.run_key}: {lacking[0]}; send what MLflow lacks with `speck sync "
                f"{self.result.run_key}`, then decide again"
            )
        verdict = decide(evidence.candidate, evidence.champion, self.gates, evidence.gain)
        seen = {"verdict": verdict, "num_left_out": evidence.num_left_out}
        if number is None or dry_run:
            asks = "; a person has to agree" if verdict.promote and self.gates.approval else ""
            outcome: Outcome = "would be promoted" if verdict.promote else "rejected"
            return self._told(number, outcome, f"{verdict.reason}{asks}", **seen)
        generation = len(entries) + 1
        approval = self.approve(self.gates, verdict, generation) if verdict.promote else Approval(True, "")
        if approval is None:
            return self._told(number, "waits for approval", f"{verdict.reason}; a person has to agree", **seen)
        entry = self._entry(entries, number, verdict, approval)
        open_authority(self.settings.ledger_url, self.settings.home).append(entry)
        try:
            # That MLflow lacked it is no news to anybody.
            decisions(self.client, self.settings, name, lambda _: None)
        except TrackingUnavailable as error:
            self.say(f"{name}: generation {generation} is decided, and MLflow will show it later: {error}")
        return self._told(
            number, "promoted" if entry.action == "promoted" else "rejected", entry.why, generation=generation, **seen
        )

    def _champion(self, entries: Sequence[Entry]) -> Version | None:
        number = entries[-1].champion if entries else None
        versions = history(self.client, self.dataset.name)
        return next((version for version in versions if version.version == number), None)

    def _entry(self, entries: Sequence[Entry], version: int, verdict: Verdict, approval: Approval) -> Entry:
        """The entry that follows. Only a sound run may become the challenger."""
        promotes = verdict.promote and approval.granted
        newest = entries[-1] if entries else None
        before = newest.champion if newest else None
        challenger = newest.challenger if newest else None
        parts = ("" if approval.granted else "not approved", approval.comment, verdict.reason)
        looks = [entry.looks_at_test for entry in entries if entry.dataset_version == self.dataset.version]
        return Entry(
            dataset=self.dataset.name,
            generation=len(entries) + 1,
            at_ms=time.time_ns() // 1_000_000,
            who=actor(),
            action="promoted" if promotes else "rejected",
            why="; ".join(part for part in parts if part),
            version=version,
            run_key=self.result.run_key,
            training=self.training,
            champion=version if promotes else before,
            previous=before if promotes else (newest.previous if newest else None),
            challenger=None if promotes else version if verdict.sound else challenger,
            dataset_version=self.dataset.version,
            protocol=self.gates.protocol,
            gates=tuple(asdict(row) for row in verdict.rows),
            looks_at_test=max(looks, default=0) + 1,
        )

    def _told(self, version: int | None, outcome: Outcome, reason: str, **more: Any) -> Promotion:
        return Promotion(self.dataset.name, self.result.run_key, version, outcome, reason, **more)
