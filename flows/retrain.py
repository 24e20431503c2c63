"""The deployment `retrain/default`: what a schedule runs. Where nothing changed it ends within seconds."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import State, flow
from prefect.states import Completed

from flows.experiment import load_experiment
from flows.leaderboard import spent
from flows.overlap import one_at_a_time
from flows.plan import OnCodeChange
from flows.promote import Outcome, Promotion
from flows.say import warn
from flows.settings import Settings
from flows.train_all import TrainAll, challenge
from training.records import read_result

SETTLED: tuple[Outcome, ...] = ("is champion", "decided before", "waits for approval")


@flow(name="retrain", validate_parameters=True)
def retrain(
    experiment: str = "default",
    changes: list[str] | None = None,
    datasets: list[str] | None = None,
    on_code_change: OnCodeChange = "warn",
) -> State:
    """Version the data, and train, compare and promote only where something changed; the state says what was done.

    Args:
        experiment: A name in `flows/runs/`, or a YAML file.
        changes: Single values of it, `key.path=value` each, for example `training.warm_start=champion`.
        datasets: Instead of the experiment's.
        on_code_change: What to do with finished cells that were trained by other code: use them and warn, or retrain.
    """
    loaded, settings = load_experiment(experiment, changes or (), datasets=datasets or ()), Settings()
    # A dataset that changes while another one is trained on is not to wait for the night.
    with one_at_a_time(settings, "-".join(sorted(datasets or ()))) as turn:
        if turn.held_back is not None:
            return turn.held_back
        work = TrainAll(loaded, settings, on_code_change, turn.check)
        work.prepare()
        versions = ", ".join(
            f"{found.name} {'prepared as' if found.regenerated else 'unchanged,'} version {found.version[:12]}"
            for found in work.versions
        )
        if (promotions := settled(work)) is not None:
            return Completed(name="Unchanged", message=unchanged(len(work.planned), versions, promotions))
        report = work.carry_out()
        promoted = ", ".join(map(_told, report.promotions))
        return Completed(message=f"{versions}; {spent(report.rows)}; {promoted}")


def unchanged(num_cells: int, versions: str, promotions: Sequence[Promotion]) -> str:
    """What a run says that had nothing to train; whose approval is awaited it says each time."""
    waiting = [_told(one) for one in promotions if one.is_open]
    return f"Nothing to do for {num_cells} cell{'s' * (num_cells != 1)}: {'; '.join([versions, *waiting])}"


def _told(promotion: Promotion) -> str:
    how = f": {promotion.how_to_approve}" if promotion.is_open else ""
    return f"{promotion.dataset}: {promotion.run_key} {promotion.outcome}{how}"


def settled(work: TrainAll) -> list[Promotion] | None:
    """What became of each dataset's best; None where a cell is not finished, or a decision not left to a person."""
    if work.unplanned or not all(cell.state in {"cached", "stale"} for cell in work.planned):
        return None
    promotions: list[Promotion] = []
    try:
        for name in sorted({cell.spec.dataset.name for cell in work.planned}):
            found = [
                read_result(work.settings.storage / cell.spec.run_key)
                for cell in work.planned
                if cell.spec.dataset.name == name
            ]
            promotion, _ = challenge(name, [result for result in found if result is not None], work.settings)
            if promotion.outcome not in SETTLED:
                return None
            promotions.append(promotion)
    except Exception as error:
        warn(f"what became of the finished cells is not settled: {error}")
        return None
    return promotions
