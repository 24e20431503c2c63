"""One attempt at a run on a group of workers: train, score, put everything away.

Ray's workers and torchrun's share it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from data.image_cache import picture_folder
from data.store import default_root, on_this_node
from evaluation.result import ScoreResult
from training.artifacts import write_artifacts
from training.checkpoint import CHECKPOINTS, Manifest, newest_valid
from training.keeper import Keeper
from training.ledger import UsageLog
from training.loop import Hooks, train
from training.machines import environment_lock, is_first_on_node, is_only_node, node_number, this_node
from training.meter import SECONDS, Progress
from training.records import (
    ENVIRONMENT,
    Attempt,
    RunResult,
    attempt_folder,
    complete_journal,
    hash_files,
    journal_entry,
    read_journal,
    split_finite,
    write_result,
)
from training.requests import Asked, is_leaving, stop_name
from training.say import say_line
from training.scoring import Scored, Split, score_split
from training.scratch import scratch_folder
from training.spec import RunSpec
from training.state import WarmStart, warm_start_path
from training.store import FolderStore, RunStore, StorageUnavailable
from training.system import SystemMeter, by_node
from training.trace import TRACE, StepTrace
from training.watchdog import Watchdog
from training.workers import Workers

# Rank 0 looks this often whether somebody asked the run to stop.
STOP_POLL_S = 1.0
# In a run's records, where storage is no folder: the weights it starts from, in a file named by their sha256.
WARM_START = "warm_start"


def run_attempt(
    attempt: Attempt,
    store: RunStore,
    workers: Workers,
    *,
    accumulation: int,
    preempting: Callable[[], bool] = lambda: False,
) -> None:
    """Train from the newest whole checkpoint, score val and test, and leave `result.json` in the store, last.

    `accumulation`: at least the spec's. `preempting`: whether a machine of the group is about to be taken away.

    Raises:
        Stopped, Preempted and what else `train` raises; the checkpoint that they speak of is in the store by then.
        StorageUnavailable: the store does not take, or give, what it has to.
    """
    spec, started = attempt.spec, time.monotonic()
    say = say_line if workers.rank == 0 else _nothing
    with ExitStack() as stack:
        usage = UsageLog(store, attempt, workers.world_size, say) if workers.rank == 0 else None
        if usage is not None:
            stack.callback(usage.close)
        here = stack.enter_context(scratch_folder())
        # Nobody watches this yet: a large dataset takes its time, and each of its requests has a limit of its own.
        dataset_folder = on_this_node(spec.dataset.name, spec.dataset.version, attempt.data_source)
        _describe(store, attempt, workers, usage, say)
        checkpoint = _newest_checkpoint(store, workers, here / CHECKPOINTS)
        watchdog = stack.enter_context(Watchdog(spec.compute.hang_timeout_s, f"worker {workers.rank}"))
        keeper = None if usage is None else _keeper(store, attempt, usage, checkpoint, here, say)
        if keeper is not None:
            stack.callback(keeper.close)
        requests = _Requests(store, attempt, usage, preempting)
        stack.callback(requests.close)
        who = f"{workers.world_size} worker" + "s" * (workers.world_size > 1)
        where = f"resuming from {checkpoint.name}" if checkpoint else "starting at epoch 1"
        say(f"data ready on {who} after {time.monotonic() - started:.1f} s, {where}")
        artifacts, trace = here / "artifacts", None
        if usage is not None and spec.compute.profile:
            trace = StepTrace(artifacts / TRACE, on_gpu=workers.device.type == "cuda", say=say)
            stack.callback(trace.close)
        report = _reporter(attempt, workers, keeper, requests, _system_meter(stack))
        hooks = _hooks(report, workers, keeper, requests, watchdog, trace, say)
        initial = None if checkpoint else _initial_weights(spec, store, here)
        pictures = picture_folder(default_root(), spec.dataset.version)
        state, validation = train(spec, dataset_folder, workers, hooks, checkpoint, initial, pictures, accumulation)
        if trace is not None:
            trace.close()
        trained = time.monotonic()
        say("scoring on the test split")
        average = state.average.module
        # Val chooses the thresholds by which test is judged.
        chosen = None if validation is None else validation.analysis.operating_point
        test = score_split(spec, average, dataset_folder, "test", workers, operating_point=chosen, alive=watchdog.alive)
        # Storage has its own patience.
        watchdog.close()
        if keeper and usage and validation is not None and test is not None:
            keeper.wait()
            seconds = {"train": trained - started, "score_test": time.monotonic() - trained}
            scored: dict[Split, Scored] = {"val": validation, "test": test}
            journal = read_journal(store)
            write_artifacts(spec, average.state_dict(), scored, seconds, dataset_folder, artifacts, journal)
            store.upload(artifacts, "artifacts", last="seconds.json")
            keeper.close()
            requests.close()
            usage.close()
            results = {split: content.result for split, content in scored.items()}
            write_result(store, _result(attempt, results, hash_files(here, artifacts), seconds))


def _keeper(
    store: RunStore,
    attempt: Attempt,
    usage: UsageLog,
    checkpoint: Path | None,
    here: Path,
    say: Callable[[str], None],
) -> Keeper:
    """The writer of the run's records, which know by then what this start goes on from."""
    usage.resumed(*_place(checkpoint))
    if checkpoint is not None:
        complete_journal(store, attempt, checkpoint)
    resumed = None if checkpoint is None else checkpoint.name
    return Keeper(store, num_kept=attempt.spec.compute.keep_checkpoints, say=say, resumed=resumed, here=here)


def _describe(
    store: RunStore, attempt: Attempt, workers: Workers, usage: UsageLog | None, say: Callable[[str], None]
) -> None:
    """Put on record which machines these workers are on, and the packages that rank 0 runs on."""
    told = workers.gather(this_node() if is_first_on_node() else None)
    if usage is None or told is None:
        return
    usage.runs_on([node for node in told if node is not None])
    try:
        store.write(f"{attempt_folder(attempt.number)}/{ENVIRONMENT}", environment_lock().encode())
    except StorageUnavailable as error:
        say(f"the list of packages is left out: {error}")


def _hooks(
    report: Callable[[dict[str, float], int, int, Callable[..., Manifest]], None],
    workers: Workers,
    keeper: Keeper | None,
    requests: _Requests,
    watchdog: Watchdog,
    trace: StepTrace | None,
    say: Callable[[str], None],
) -> Hooks:
    return Hooks(
        report=report,
        checkpoint=_checkpointer(keeper, requests, say),
        settle=partial(_settle, keeper, workers),
        asked=requests.asked,
        alive=watchdog.alive,
        stepped=trace.stepped if trace else lambda _: None,
        progress=lambda news: say(_line(news)),
        warm_started=lambda taken: say(_warm_start_line(taken)),
        skipped=lambda paths: say(_skipped_line(paths)),
    )


def _result(
    attempt: Attempt, scores: dict[Split, ScoreResult], files: dict[str, str], seconds: dict[str, float]
) -> RunResult:
    now_ms = time.time_ns() // 1_000_000
    return RunResult(
        run_key=attempt.run_key,
        spec=attempt.spec,
        scores={"val": scores["val"], "test": scores["test"]},
        files=files,
        attempts=attempt.number,
        seconds=seconds | {"job": (now_ms - attempt.submitted_ms) / 1000},
        code_hash=attempt.code_hash,
        finished_ms=now_ms,
    )


def _newest_checkpoint(store: RunStore, workers: Workers, here: Path) -> Path | None:
    """This node's copy of the checkpoint to go on from; rank 0 chooses it."""
    chosen = newest_valid(store, here, say_line) if workers.rank == 0 else None
    name: str | None = workers.broadcast(None if chosen is None else chosen.name)
    if name is None or chosen is not None:
        return chosen
    return store.download(f"{CHECKPOINTS}/{name}", here / name)


def _initial_weights(spec: RunSpec, store: RunStore, here: Path) -> Path | None:
    """The file of weights to start from: beside all runs in a shared folder, in the run's own records elsewhere."""
    if spec.training.warm_start is None:
        return None
    if isinstance(store, FolderStore):
        return warm_start_path(Path(store.url).parent, spec.training.warm_start)
    path = warm_start_path(here, spec.training.warm_start)
    return store.download(WARM_START, here / WARM_START) / path.name


def _place(checkpoint: Path | None) -> tuple[int, float]:
    """The step that a checkpoint is of, and how long its unfinished epoch had taken."""
    if checkpoint is None:
        return 0, 0.0
    state = json.loads((checkpoint / "state.json").read_bytes())
    return state["step"], state["so_far"].get(SECONDS, 0.0)


class _Requests:
    """What a worker is asked while it trains.

    On rank 0, which has a `usage`, a thread looks for a request to stop, and keeps that record fresh.
    """

    def __init__(
        self, store: RunStore, attempt: Attempt, usage: UsageLog | None, preempting: Callable[[], bool]
    ) -> None:
        self._interval_s = attempt.spec.compute.checkpoint_every_minutes * 60
        self._keeps, self._preempting = usage is not None, preempting
        self._kept, self._is_news = time.monotonic(), False
        self._was_preempting = False
        self._stop, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if usage is not None:
            arguments = (store, stop_name(attempt.number), usage)
            self._thread = threading.Thread(target=self._watch, args=arguments, name="requests", daemon=True)
            self._thread.start()

    def asked(self) -> Asked:
        """What this worker is asked now."""
        is_due = self._keeps and time.monotonic() - self._kept > self._interval_s
        preempting = not self._was_preempting and self._preempting()
        self._was_preempting |= preempting
        return Asked(checkpoint=is_due or preempting, leave=is_leaving(), stop=self._stop.is_set())

    def kept(self) -> None:
        """A checkpoint was made: the next is due an interval later."""
        self._kept, self._is_news = time.monotonic(), True

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, store: RunStore, name: str, usage: UsageLog) -> None:
        while not self._closed.wait(STOP_POLL_S):
            # Of a start that is killed, what it kept must not have been paid for by nobody.
            at_once, self._is_news = self._is_news, False
            usage.refresh(at_once=at_once)
            with suppress(StorageUnavailable):
                if not self._stop.is_set() and store.exists(name):
                    self._stop.set()


def _system_meter(stack: ExitStack) -> SystemMeter | None:
    """One for each node, until the stack is unwound."""
    if not is_first_on_node():
        return None
    meter = SystemMeter()
    stack.callback(meter.close)
    return meter


def _reporter(
    attempt: Attempt, workers: Workers, keeper: Keeper | None, requests: _Requests, meter: SystemMeter | None
) -> Callable[[dict[str, float], int, int, Callable[..., Manifest]], None]:
    def report(metrics: dict[str, float], step: int, epoch: int, save: Callable[..., Manifest]) -> None:
        load = None if meter is None else (node_number(), meter.read())
        # On one node nobody has to wait for the others.
        told = [load] if is_only_node() else workers.gather(load) or []
        system = by_node(reading for reading in told if reading is not None)
        stamped = metrics | system | {"step": step, "epoch": epoch, "timestamp_ms": time.time_ns() // 1_000_000}
        if keeper is not None:
            finite = split_finite(stamped)[0]
            keeper.keep(lambda folder: save(folder, finite), journal_entry(attempt, stamped), can_wait=False)
        requests.kept()

    return report


def _checkpointer(
    keeper: Keeper | None, requests: _Requests, say: Callable[[str], None]
) -> Callable[[int, int, Callable[..., Manifest], bool], None]:
    def checkpoint(step: int, epoch: int, save: Callable[..., Manifest], is_ending: bool) -> None:
        requests.kept()
        if keeper is None:
            return
        if keeper.keep(save, can_wait=not is_ending):
            say(f"checkpoint at step {step}, in epoch {epoch + 1}")

    return checkpoint


def _settle(keeper: Keeper | None, workers: Workers) -> None:
    """Wait on every rank for rank 0: whoever goes first ends the group, also whom a checkpoint still keeps busy."""
    if keeper is not None:
        keeper.wait()
    workers.broadcast(None)


def _line(news: Progress) -> str:
    minutes, seconds = divmod(int(news.eta_s), 60)
    return (
        f"epoch {news.epoch}/{news.epochs} step {news.step}/{news.steps} loss {news.loss:.3f} "
        f"{news.images_per_s:.1f} img/s ETA {minutes}:{seconds:02d}"
    )


def _warm_start_line(taken: WarmStart) -> str:
    left = f", left as initialised: {', '.join(taken.left)}" if taken.left else ""
    return f"warm start: {taken.num_taken} of {taken.num_taken + len(taken.left)} tensors taken{left}"


def _skipped_line(paths: list[Path]) -> str:
    return f"skipped {len(paths)} training images that cannot be read: {', '.join(str(path) for path in paths)}"


def _nothing(message: str) -> None:
    del message
