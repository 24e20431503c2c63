from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.store import MARKER, CorruptObject, MissingObject, UnsupportedSource, default_root, materialise

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


def _left_behind(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if not path.name.endswith(".lock") and path != root / "tiny"]


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
    for part in (str(path), f"expected md5 {expected}", f"found {_md5(bytes(content))}", "dvc pull"):
        assert part in str(caught.value)
    assert _left_behind(tmp_path / "node") == []


@pytest.mark.parametrize("absent", ["images/a.jpg", None])
def test_missing_objects_are_named(tmp_path: Path, absent: str | None) -> None:
    source = tmp_path / "cache"
    version = _store(source)
    path = _object(source, version + ".dir" if absent is None else _md5(FILES[absent]))
    path.unlink()
    with pytest.raises(MissingObject, match=str(path)):
        materialise("tiny", version, source=str(source), root=tmp_path / "node")
    assert _left_behind(tmp_path / "node") == []
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


def test_remote_sources_are_refused_by_scheme(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSource, match="s3://"):
        materialise("tiny", "0" * 32, source="s3://bucket/dvc", root=tmp_path)


def test_a_killed_processs_leftovers_are_replaced(tmp_path: Path) -> None:
    version = _store(tmp_path / "cache")
    partial = tmp_path / "node" / "tiny" / f".{version}.partial"
    partial.mkdir(parents=True)
    (partial / "stale").write_text("half")
    folder = materialise("tiny", version, source=str(tmp_path / "cache"), root=tmp_path / "node")
    assert not (folder / "stale").exists()
    assert not partial.exists()


def test_four_processes_do_it_once(tmp_path: Path) -> None:
    """The wrapper slows the work down, so that all four are inside the call at the same time."""
    version = _store(tmp_path / "cache")
    script = """
import sys, time
from pathlib import Path
import data.store as store
fill = store._fill
def counted(*arguments):
    with open(sys.argv[4], "a") as log:
        log.write("x")
    time.sleep(0.5)
    fill(*arguments)
store._fill = counted
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
    outputs = [worker.communicate(timeout=60)[0].strip() for worker in workers]
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
