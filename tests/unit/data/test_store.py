from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data.store
from data.objects import MARKER, CorruptObject, MissingObject, Objects, UnsupportedSource
from data.store import DiskFull, default_max_bytes, default_root, materialise
from data.store_room import freed_bytes, make_room, remove, stored_versions

FILES = {"images/a.jpg": b"picture a", "images/sub/b.jpg": b"picture b", "annotations/train.json": b"{}", "empty": b""}


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def _object(source: Path, md5: str) -> Path:
    return source / "files" / "md5" / md5[:2] / md5[2:]


def _put(source: Path, content: bytes, suffix: str = "", mode: int = 0o444) -> str:
    path = _object(source, _md5(content) + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return _md5(content)


def _store(source: Path, files: dict[str, bytes] = FILES, mode: int = 0o444) -> str:
    """Write a version in DVC's layout and return its hash."""
    rows = [{"md5": _put(source, content, mode=mode), "relpath": relpath} for relpath, content in files.items()]
    return _put(source, json.dumps(rows).encode(), ".dir", mode)


def _visible(root: Path) -> list[str]:
    return [path.name for path in (root / "tiny").glob("[!.]*")]


@pytest.mark.parametrize(("mode", "is_linked"), [(0o444, True), (0o644, False)])
def test_exactly_the_versions_files_read_only(tmp_path: Path, mode: int, is_linked: bool) -> None:
    source = tmp_path / "cache"
    version = _store(source, mode=mode)
    folder = materialise("tiny", version, source=str(source), root=tmp_path / "node")
    assert folder == tmp_path / "node" / "tiny" / version
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del found[MARKER]
    assert found == FILES
    for relpath, content in FILES.items():
        assert (folder / relpath).stat().st_mode & 0o222 == 0
        assert (folder / relpath).samefile(_object(source, _md5(content))) == is_linked


def test_the_second_call_needs_no_source(tmp_path: Path) -> None:
    version = _store(tmp_path / "cache")
    first = materialise("tiny", version, source=f"file://{tmp_path}/cache", root=tmp_path / "node")
    assert materialise("tiny", version, source=str(tmp_path / "gone"), root=tmp_path / "node") == first


def test_two_versions_stand_side_by_side(tmp_path: Path) -> None:
    source, node = tmp_path / "cache", tmp_path / "node"
    versions = [_store(source), _store(source, {"images/a.jpg": b"picture c"})]
    folders = [materialise("tiny", version, source=str(source), root=node) for version in versions]
    assert [(folder / "images/a.jpg").read_bytes() for folder in folders] == [b"picture a", b"picture c"]


@pytest.mark.parametrize("mode", [0o444, 0o644])
@pytest.mark.parametrize("damaged", ["images/sub/b.jpg", None])
def test_wrong_bytes_are_refused(tmp_path: Path, mode: int, damaged: str | None) -> None:
    source = tmp_path / "cache"
    version = _store(source, mode=mode)
    path = _object(source, version + ".dir" if damaged is None else _md5(FILES[damaged]))
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(CorruptObject) as caught:
        materialise("tiny", version, source=str(source), root=tmp_path / "node")
    expected = version if damaged is None else _md5(FILES[damaged])
    for part in (str(path), f"expected md5 {expected}", f"found {_md5(bytes(content))}", "speck data pull"):
        assert part in str(caught.value)
    assert _visible(tmp_path / "node") == []


@pytest.mark.parametrize("absent", ["images/a.jpg", None])
def test_missing_objects_are_named(tmp_path: Path, absent: str | None) -> None:
    source = tmp_path / "cache"
    version = _store(source)
    path = _object(source, version + ".dir" if absent is None else _md5(FILES[absent]))
    path.unlink()
    with pytest.raises(MissingObject, match=str(path)):
        materialise("tiny", version, source=str(source), root=tmp_path / "node")
    assert _visible(tmp_path / "node") == []
    if absent is not None:
        _put(source, FILES[absent])
        materialise("tiny", version, source=str(source), root=tmp_path / "node")


@pytest.mark.parametrize("relpath", ["../evil", "/tmp/evil", "images/../../evil", "", MARKER])
def test_paths_that_escape_are_refused(tmp_path: Path, relpath: str) -> None:
    version = _store(tmp_path / "cache", FILES | {relpath: b"evil"})
    with pytest.raises(CorruptObject, match="leaves the dataset's folder"):
        materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(("name", "version"), [("../x", "0" * 32), ("tiny", "../.."), ("tiny", "0" * 32 + ".dir")])
def test_malformed_identities_are_refused(tmp_path: Path, name: str, version: str) -> None:
    with pytest.raises(ValueError, match="32 hex digits"):
        materialise(name, version, source=str(tmp_path), root=tmp_path / "node")


@pytest.mark.parametrize("source", ["gs://bucket/dvc", "s3://", "s3:///"])
def test_remote_sources_of_other_kinds_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(UnsupportedSource, match=rf"{source}.* must be a folder or s3://bucket/prefix"):
        materialise("tiny", "0" * 32, source=source, root=tmp_path)


def test_an_interrupted_fetch_goes_on_from_what_is_sound(tmp_path: Path) -> None:
    version = _store(tmp_path / "cache")
    partial = tmp_path / "node" / "tiny" / f".{version}.partial"
    (partial / "images").mkdir(parents=True)
    (partial / "stale").write_text("half")
    (partial / "images/a.jpg").write_bytes(FILES["images/a.jpg"])
    (partial / "annotations").mkdir()
    (partial / "annotations/train.json").write_bytes(b"{")
    # What is sound is not asked for again.
    _object(tmp_path / "cache", _md5(FILES["images/a.jpg"])).unlink()
    folder = materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items() if name != MARKER} == FILES
    assert all(path.stat().st_mode & 0o222 == 0 for name, path in found.items() if name != MARKER)
    assert not partial.exists()


def test_a_link_that_a_killed_process_left_is_not_written_through(tmp_path: Path) -> None:
    version = _store(tmp_path / "cache")
    wrong = _object(tmp_path / "cache", _md5(FILES["images/sub/b.jpg"]))
    target = tmp_path / "node" / "tiny" / f".{version}.partial" / "images/a.jpg"
    target.parent.mkdir(parents=True)
    os.link(wrong, target)
    folder = materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")
    assert (folder / "images/a.jpg").read_bytes() == FILES["images/a.jpg"]
    assert wrong.read_bytes() == FILES["images/sub/b.jpg"]


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = _store(tmp_path / "cache", mode=0o644)
    fetch, fetched = data.store.fetch_verified, list[str]()

    def until_full(objects: Objects, md5: str, target: Path) -> None:
        if len(fetched) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fetched.append(md5)
        fetch(objects, md5, target)

    monkeypatch.setattr("data.store.fetch_verified", until_full)
    with pytest.raises(DiskFull, match=rf"{version}: no room left .*`speck gc --delete`.* SPECK_STORE"):
        materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")
    assert {path.name for path in (tmp_path / "node/tiny").iterdir()} == {f".{version}.lock", f".{version}.making"}
    monkeypatch.undo()
    materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")


def test_a_full_disk_is_freed_of_what_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the disk is full while the first version is there."""
    source, node = tmp_path / "cache", tmp_path / "node"
    unused, used, new = (_store(source, {"image.jpg": content}, mode=0o644) for content in (b"1", b"2", b"3"))
    _other_process(unused, source, node, 10**12)
    materialise("tiny", used, source=str(source), root=node)
    fetch = data.store.fetch_verified

    def until_full(objects: Objects, md5: str, target: Path) -> None:
        if (node / "tiny" / unused).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fetch(objects, md5, target)

    monkeypatch.setattr("data.store.fetch_verified", until_full)
    materialise("tiny", new, source=str(source), root=node)
    assert sorted(_visible(node)) == sorted([used, new])


@pytest.mark.parametrize(("text", "expected"), [("", None), ("2", 2**31), ("0.5", 2**29)])
def test_the_size_limit_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None
) -> None:
    monkeypatch.setenv("SPECK_STORE_GIB", text)
    assert default_max_bytes() == expected


@pytest.mark.parametrize("text", ["much", "-1", "0", "nan"])
def test_a_size_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SPECK_STORE_GIB", text)
    with pytest.raises(ValueError, match=rf"SPECK_STORE_GIB='{text}': must be a positive number"):
        default_max_bytes()


MATERIALISE = """
import sys
from pathlib import Path
from data.store import materialise
materialise("tiny", sys.argv[1], source=sys.argv[2], root=Path(sys.argv[3]), max_bytes=int(sys.argv[4]))
"""

DELETE_TWICE = """
import shutil, sys
from pathlib import Path
from data.store import materialise
for _ in range(2):
    shutil.rmtree(materialise("tiny", sys.argv[1], source=sys.argv[2], root=Path(sys.argv[3])))
"""


def _other_process(*arguments: object) -> None:
    """A process that materialises and ends, so that it uses nothing any more."""
    subprocess.run([sys.executable, "-c", MATERIALISE, *map(str, arguments)], check=True, timeout=300)


def test_the_least_recently_used_versions_go_with_their_pictures_but_none_in_use(tmp_path: Path) -> None:
    source, node, no_limit = tmp_path / "cache", tmp_path / "node", 10**12
    versions = [_store(source, {"image.jpg": bytes([number]) * 100_000}, mode=0o644) for number in range(4)]
    for version in versions[:3]:
        _other_process(version, source, node, no_limit)
        (node / ".pictures" / version).mkdir(parents=True)
        (node / ".pictures" / version / "train").write_bytes(bytes(200_000))
    for age_s, version in enumerate((versions[2], versions[0], versions[1])):
        os.utime(node / "tiny" / version / MARKER, (1000 - age_s, 1000 - age_s))
    # The oldest is in use here, the next one is not.
    held = materialise("tiny", versions[1], source=str(source), root=node)
    os.utime(held / MARKER, (1, 1))
    before = {stored.version: stored.size_bytes for stored in stored_versions(node)}
    assert set(before) == set(versions[:3]), "pictures are part of their version, not a dataset"
    assert all(size >= 300_000 for size in before.values())
    _other_process(versions[3], source, node, 2 * max(before.values()) + 200_000)
    assert {stored.version for stored in stored_versions(node)} == {versions[1], versions[2], versions[3]}
    assert {path.name for path in (node / ".pictures").iterdir()} == {versions[1], versions[2]}
    _other_process(versions[0], source, node, 1)
    assert {stored.version for stored in stored_versions(node)} == {versions[0], versions[1]}


def test_what_is_linked_takes_no_room_and_is_not_evicted_in_vain(tmp_path: Path) -> None:
    source, node = tmp_path / "cache", tmp_path / "node"
    versions = [_store(source, {"image.jpg": bytes([number]) * 100_000}) for number in range(2)]
    for version in versions:
        _other_process(version, source, node, 50_000)
    assert {stored.version for stored in stored_versions(node)} == set(versions)
    assert all(stored.size_bytes < 10_000 for stored in stored_versions(node))


def test_pictures_that_came_later_count_in_the_next_process(tmp_path: Path) -> None:
    source, node = tmp_path / "cache", tmp_path / "node"
    versions = [_store(source, {"image.jpg": bytes([number])}, mode=0o644) for number in range(2)]
    for version in versions:
        _other_process(version, source, node, 1_000_000)
        (node / ".pictures" / version).mkdir(parents=True)
        (node / ".pictures" / version / "train").write_bytes(bytes(700_000))
    _other_process(versions[1], source, node, 1_000_000)
    assert _visible(node) == [versions[1]]
    assert [path.name for path in (node / ".pictures").iterdir()] == [versions[1]]


def test_a_version_that_is_used_since_it_was_listed_stays(tmp_path: Path) -> None:
    version = _store(tmp_path / "cache")
    _other_process(version, tmp_path / "cache", tmp_path / "node", 10**12)
    (tmp_path / "node/tiny" / f".{version}.lock").unlink()
    (listed,) = stored_versions(tmp_path / "node")
    materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")
    assert not remove(listed)
    assert _visible(tmp_path / "node") == [version]


def test_a_folder_that_vanishes_while_it_is_measured_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir
    (tmp_path / "images").mkdir()
    (tmp_path / "image.jpg").write_bytes(bytes(100_000))

    def vanishing(path: Path) -> object:
        return scan(path if Path(path) == tmp_path else tmp_path / "gone")

    monkeypatch.setattr(os, "scandir", vanishing)
    assert freed_bytes([tmp_path]) >= 100_000


def test_what_another_user_owns_is_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = _store(tmp_path / "cache", {"image.jpg": bytes(100_000)}, mode=0o644)
    _other_process(version, tmp_path / "cache", tmp_path / "node", 10**12)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert make_room(tmp_path / "node", 0) == []


def test_a_copy_that_was_deleted_by_hand_is_made_again(tmp_path: Path) -> None:
    """By another process while this one holds it, and by this one."""
    source, node = tmp_path / "cache", tmp_path / "node"
    version, other = _store(source, mode=0o644), _store(source, {"image.jpg": b"other"}, mode=0o644)
    folder = materialise("tiny", version, source=str(source), root=node)
    shutil.rmtree(folder)
    _other_process(version, source, node, 10**12)
    assert (folder / "images/a.jpg").read_bytes() == FILES["images/a.jpg"]
    subprocess.run([sys.executable, "-c", DELETE_TWICE, version, str(source), str(node)], check=True, timeout=300)
    assert not folder.exists()
    shutil.rmtree(node)
    assert materialise("tiny", version, source=str(source), root=node) == folder
    _other_process(other, source, node, 1)
    assert sorted(_visible(node)) == sorted([version, other]), "this process holds it still"


def test_an_interrupted_eviction_leaves_no_version_behind(tmp_path: Path) -> None:
    version = _store(tmp_path / "cache")
    _other_process(version, tmp_path / "cache", tmp_path / "node", 10**12)
    folder = tmp_path / "node" / "tiny" / version
    (folder / MARKER).unlink()
    (folder / "images/a.jpg").unlink()
    materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")
    assert (folder / "images/a.jpg").read_bytes() == FILES["images/a.jpg"]


def test_four_processes_do_it_once(tmp_path: Path) -> None:
    """The wrapper slows the work down, so that all four are inside the call at the same time."""
    version = _store(tmp_path / "cache")
    script = """
import sys, time
from pathlib import Path
import data.store as store
fill = store.fill
def counted(*arguments):
    with open(sys.argv[4], "a") as log:
        log.write("x")
    time.sleep(0.5)
    fill(*arguments)
store.fill = counted
Path(sys.argv[4] + "-started-" + sys.argv[5]).touch()
while len(list(Path(sys.argv[4]).parent.glob("log-started-*"))) < 4:
    time.sleep(0.005)
print(store.materialise("tiny", sys.argv[1], source=sys.argv[2], root=Path(sys.argv[3])))
"""
    arguments = [version, str(tmp_path / "cache"), str(tmp_path / "node"), str(tmp_path / "log")]
    workers = [
        subprocess.Popen([sys.executable, "-c", script, *arguments, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    outputs = [worker.communicate(timeout=300)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert set(outputs) == {str(tmp_path / "node" / "tiny" / version)}
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize(
    ("value", "expected"), [("~/store", "home/store"), ("store", "here/store"), ("", "home/.cache/speck")]
)
def test_the_store_does_not_depend_on_where_a_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPECK_STORE", value)
    assert default_root() == tmp_path / expected
