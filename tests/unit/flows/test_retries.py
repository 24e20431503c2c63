"""Which failures Prefect tries again, decided by Prefect's own engine."""

from __future__ import annotations

import pytest
from prefect.states import Failed

from data.versioning import VersioningFailed
from flows.cells import Cancelled
from flows.retries import again_when_it_passes, passes
from tracking.client import TrackingUnavailable
from training.jobs import CellFailed, JobLost
from training.store import StorageUnavailable


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (JobLost("its driver was killed by signal 9"), True),
        (StorageUnavailable("s3"), True),
        (TrackingUnavailable("mlflow"), True),
        (ConnectionRefusedError("ray"), True),
        (CellFailed("the loss is not finite"), False),
        (Cancelled("stopped"), False),
        (VersioningFailed("no raw data"), False),
        (ValueError("a fault of ours"), False),
    ],
)
def test_only_what_passes_by_itself_is_tried_again(error: Exception, again: bool) -> None:
    assert passes(None, None, Failed(data=error)) is again  # type: ignore[arg-type]


def test_pauses_grow() -> None:
    arguments = again_when_it_passes()
    delays = arguments["retry_delay_seconds"]
    assert len(delays) == arguments["retries"]
    assert delays == sorted(delays)
