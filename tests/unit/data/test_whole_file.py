from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from data.whole_file import whole_file, write_whole


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_whole(path, "Öl")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text(encoding="utf-8") == "Öl"
    assert path.read_bytes() == b"new"
    with pytest.raises(ValueError, match="half way"):
        _break_off(path)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.json"]


def _break_off(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"newer")
        raise ValueError("half way")


def test_two_writers_do_not_write_into_each_other_s(tmp_path: Path) -> None:
    path, contents = tmp_path / "x", [bytes([number]) * 300_000 for number in range(8)]
    threads = [threading.Thread(target=lambda one=one: [write_whole(path, one) for _ in range(20)]) for one in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a machine that crashes keeps a manifest beside files of no bytes."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def told_sync(number: int) -> None:
        events.append(f"sync {os.readlink(f'/proc/self/fd/{number}').removeprefix(str(tmp_path))}")
        sync(number)

    def told_replace(path: Path, target: Path) -> Path:
        events.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", told_sync)
    monkeypatch.setattr(Path, "replace", told_replace)
    write_whole(tmp_path / "x", b"1")
    assert [event.partition("/.x.")[0] for event in events] == ["sync ", "replace", "sync "]
    assert events[2] == "sync "


def test_a_file_system_that_syncs_no_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def refuse(number: int) -> None:
        if Path(f"/proc/self/fd/{number}").is_dir():
            raise OSError(22, "Invalid argument")
        sync(number)

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
