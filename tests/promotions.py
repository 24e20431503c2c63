"""What was decided about the tests' dataset, and by which gates."""

from __future__ import annotations

from typing import Any

from conftest import CARD

from flows.load_gates import load_gates
from flows.settings import Settings
from tracking.authority import Entry, open_authority
from tracking.client import connect
from tracking.promotion import Gates
from tracking.registry import history

NAME = CARD.name


def ledger(settings: Settings) -> list[Entry]:
    """What was decided about the tests' dataset."""
    return open_authority(None, settings.home).entries(NAME)


def aliases(settings: Settings) -> dict[str, str]:
    """Run key by alias of the tests' dataset, as MLflow has them."""
    versions = history(connect(settings.tracking_uri), NAME)
    return {alias: version.run_key for version in versions for alias in version.aliases}


def load_gates_with(**changes: Any) -> Gates:
    """The gates of the tests' dataset, with some changed."""
    return Gates.model_validate(load_gates(CARD).model_dump() | changes)
