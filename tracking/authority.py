"""Who is champion: the newest entry of an append-only ledger. MLflow's aliases are copies of it.

MLflow moves an alias without a condition, so that of two promotions at once both would win. An entry of the ledger has
a number that can be written once: whoever comes second learns that, and decides again.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from tracking.client import speaks_to_store
from tracking.registry import CHALLENGER, CHAMPION, PREVIOUS, Version, history, move_alias
from tracking.runs import TRAINING

if TYPE_CHECKING:
    from mlflow import MlflowClient

BUSY_S = 30.0
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries ("
    "dataset TEXT NOT NULL, generation INTEGER NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (dataset, generation))",
    "CREATE TRIGGER IF NOT EXISTS one_by_one BEFORE INSERT ON entries WHEN NEW.generation IS NOT "
    "(SELECT COALESCE(MAX(generation), 0) + 1 FROM entries WHERE dataset = NEW.dataset) "
    "BEGIN SELECT RAISE(ABORT, 'generations follow one another'); END",
    "CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries stay'); END",
    "CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries stay'); END",
)


class Overtaken(RuntimeError):
    """Somebody else appended this generation first: read the entries and decide again."""


class AuthorityUnavailable(RuntimeError):
    """The ledger cannot be read or written. Whether a decision was recorded, `speck history` tells afterwards."""


class AuthorityDamaged(RuntimeError):
    """The ledger lacks a generation, or has one that cannot be read."""


class OtherRegistry(RuntimeError):
    """The ledger was written about the versions of another registry than this one."""


@dataclass(frozen=True)
class Entry:
    """One decision about a dataset's models; the newest is the authority.

    `version`, `run_key` and `training` are what was decided about; `champion`, `previous` and `challenger` are versions
    of the registry, as they stand afterwards. `gates` are the verdict's rows. `looks_at_test` counts the decisions on
    this test version so far, this one included.
    """

    dataset: str
    generation: int
    at_ms: int
    who: str
    action: Literal["promoted", "rejected", "rolled back", "adopted"]
    why: str
    version: int
    run_key: str
    training: str
    champion: int | None
    previous: int | None
    challenger: int | None
    dataset_version: str
    protocol: str
    gates: tuple[Mapping[str, str | bool], ...]
    looks_at_test: int


class Authority(Protocol):
    """A ledger of decisions that can be added to and never changed."""

    def entries(self, dataset: str) -> list[Entry]:
        """All entries of a dataset, oldest first; empty where nothing was decided yet.

        Raises AuthorityUnavailable, AuthorityDamaged.
        """
        ...

    def append(self, entry: Entry) -> None:
        """Make `entry` the authority; on return it is kept for good.

        Raises Overtaken when its generation is taken, ValueError when an earlier one is missing, and
        AuthorityUnavailable when the ledger cannot be written, or its server cannot refuse a second write.
        """
        ...


def open_authority(storage_url: str | None, home: Path) -> Authority:
    """The ledger below `storage_url` (`s3://bucket/prefix`), or without one in the file `promotions.db` of `home`."""
    if storage_url is None:
        return SqliteAuthority(home / "promotions.db")
    from tracking.s3_authority import S3Authority

    return S3Authority(storage_url)


def consult(client: MlflowClient, authority: Authority, dataset: str) -> tuple[list[Entry], list[str]]:
    """The dataset's entries, and what had to be repaired to make the registry agree with them, a sentence each.

    Where a registry is older than the ledger, what its aliases say becomes the first entry. Call it before an alias is
    read, and after an append: of two that move aliases at once the later looks again, and the newest entry prevails.

    Raises what `Authority.entries`, `Authority.append` and `settle` do, apart from Overtaken.
    """
    entries, said = authority.entries(dataset), list[str]()
    if not entries and (adopted := _adopted(client, dataset)) is not None:
        with suppress(Overtaken):
            authority.append(adopted)
            said.append(f"{dataset}: the ledger begins with what the registry's aliases say: {adopted.why}")
        entries = authority.entries(dataset)
    while moved := settle(client, entries, dataset):
        said += moved
        if len(latest := authority.entries(dataset)) == len(entries):
            break
        entries = latest
    return entries, said


@speaks_to_store
def settle(client: MlflowClient, entries: Sequence[Entry], dataset: str) -> list[str]:
    """Makes MLflow's aliases what the last of `entries` says; a sentence for each that was not.

    Without entries there is nothing to do. Prefer `consult`, which knows whether these are still the newest.

    Raises OtherRegistry when a version is not the run that the ledger knows by its number.
    """
    if not entries:
        return []
    newest, versions = entries[-1], {version.version: version for version in history(client, dataset)}
    found = {alias: version.version for version in versions.values() for alias in version.aliases}
    aliases = {CHAMPION: newest.champion, PREVIOUS: newest.previous, CHALLENGER: newest.challenger}
    for number in aliases.values():
        if number in versions:
            _require_same_run(entries, versions[number], dataset)
    said = []
    for alias, wanted in aliases.items():
        if wanted is not None and wanted not in versions:
            said.append(
                f"{dataset}: v{wanted}, the {alias} by decision {newest.generation}, is not in the registry any more. "
                f"Promote another, or `speck rollback {dataset} --to VERSION`"
            )
        elif found.get(alias) != wanted:
            move_alias(client, dataset, alias, wanted)
            said.append(
                f"{dataset}: the registry had {_shown(found.get(alias))} as {alias}; it is {_shown(wanted)} again, as "
                f"decision {newest.generation} says. To change it: `speck promote` or `speck rollback {dataset}`"
            )
    return said


def actor() -> str:
    """Who decides, for an entry's `who`: `user@machine`."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container may have no name for its user.
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def to_json(entry: Entry, **more: str) -> str:
    """An entry as text; `more` is kept with it and not read back."""
    return json.dumps(asdict(entry) | more, allow_nan=False)


def from_json(where: str, text: str | bytes) -> Entry:
    """The entry of `to_json`. Raises AuthorityDamaged, naming `where` it lies, when it is none."""
    try:
        return TypeAdapter(Entry).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise AuthorityDamaged(
            f"{where} is no decision ({'.'.join(map(str, first['loc']))}: {first['msg']}). Restore it from a "
            "copy of the storage, or install the release that wrote it"
        ) from None


def in_order(where: str, entries: Iterable[Entry]) -> list[Entry]:
    """The entries by generation. Raises AuthorityDamaged when one is missing."""
    ordered = sorted(entries, key=lambda entry: entry.generation)
    for generation, entry in enumerate(ordered, start=1):
        if entry.generation != generation:
            raise AuthorityDamaged(
                f"{where}: generation {generation} is missing. Restore it from a copy of the storage"
            )
    return ordered


class SqliteAuthority:
    """The ledger in one file, for flows of one machine or a shared folder; see `Authority`.

    The journal is SQLite's oldest: a write-ahead log needs memory that machines with a shared folder do not share.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self, dataset: str) -> list[Entry]:
        """See `Authority`."""
        if not self._path.exists():
            return []
        with self._transaction("DEFERRED") as file:
            rows = file.execute("SELECT entry FROM entries WHERE dataset = ?", (dataset,)).fetchall()
        return in_order(f"{self._path}: {dataset}", (from_json(f"{self._path}: {dataset}", text) for (text,) in rows))

    def append(self, entry: Entry) -> None:
        """See `Authority`."""
        with self._transaction("IMMEDIATE") as file:
            (newest,) = file.execute(
                "SELECT COALESCE(MAX(generation), 0) FROM entries WHERE dataset = ?", (entry.dataset,)
            ).fetchone()
            require_next(entry, newest)
            file.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.dataset, entry.generation, to_json(entry)))

    @contextmanager
    def _transaction(self, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[sqlite3.Connection]:
        """All or nothing, also through a `kill -9` or a power cut."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)) as file:
                file.execute("PRAGMA synchronous = EXTRA")
                file.execute(f"BEGIN {kind}")
                for statement in SCHEMA:
                    file.execute(statement)
                yield file
                file.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise AuthorityUnavailable(
                f"{self._path}: {error}. Free the disk, set SPECK_HOME to a folder that can be written, or wait for "
                "who holds the file; then do the same again"
            ) from error


def require_next(entry: Entry, newest: int) -> None:
    """Raises Overtaken or ValueError where `entry` does not follow the generation `newest`."""
    if entry.generation <= newest:
        raise overtaken(entry)
    if entry.generation != newest + 1:
        raise ValueError(
            f"{entry.dataset}: generation {entry.generation} cannot follow {newest}: read the entries first"
        )


def overtaken(entry: Entry) -> Overtaken:
    """The error for who comes second."""
    return Overtaken(f"{entry.dataset}: somebody else made decision {entry.generation} meanwhile. Decide again")


def _adopted(client: MlflowClient, dataset: str) -> Entry | None:
    """The first entry for a registry of an earlier release; None where no version is champion."""
    versions = history(client, dataset)
    holder = {alias: version for version in versions for alias in version.aliases}
    if (champion := holder.get(CHAMPION)) is None:
        return None
    known = {alias: holder[alias].version if alias in holder else None for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    named = ", ".join(f"{alias} {_shown(version)}" for alias, version in known.items() if version is not None)
    judged = [v for v in versions if v.verdict and v.dataset_version == champion.dataset_version]
    return Entry(
        dataset=dataset,
        generation=1,
        at_ms=time.time_ns() // 1_000_000,
        who=actor(),
        action="adopted",
        why=f"{named}, by an earlier release: {champion.reason or 'it recorded no reason'}",
        version=champion.version,
        run_key=champion.run_key,
        training=champion.tags.get(TRAINING, champion.run_key),
        champion=champion.version,
        previous=known[PREVIOUS],
        challenger=known[CHALLENGER],
        dataset_version=champion.dataset_version,
        protocol="",
        gates=(),
        looks_at_test=max(1, len(judged)),
    )


def _require_same_run(entries: Sequence[Entry], version: Version, dataset: str) -> None:
    decided = [entry.run_key for entry in entries if entry.version == version.version]
    if decided and decided[-1] != version.run_key:
        raise OtherRegistry(
            f"{dataset}: v{version.version} is run {version.run_key or 'unknown'} in this registry and {decided[-1]} "
            "in the ledger, so the ledger is another registry's. Correct MLFLOW_TRACKING_URI, SPECK_HOME or "
            "SPECK_STORAGE; to begin anew with this registry, move the ledger away"
        )


def _shown(version: int | None) -> str:
    return "none" if version is None else f"v{version}"
