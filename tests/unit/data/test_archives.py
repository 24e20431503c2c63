from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data import archives
from data.archives import unpack
from data.importing import ImportRefused, register
from data.prepare import prepare
from data.records import SPLITS

Make = Callable[..., Path]


def pack(folder: Path, archive: Path, prefix: str = "") -> Path:
    """Pack a folder with the standard library's writers."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
            for path in files:
                content.write(path, prefix + path.relative_to(folder).as_posix())
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as content:
            content.add(folder, prefix.rstrip("/") or ".")
    return archive


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_files(repo: Path) -> set[str]:
    return {path.relative_to(repo).as_posix() for path in repo.rglob("*") if ".dvc" not in path.parts}


@pytest.mark.parametrize("prefix", ["", "harbour-1.0/data/"])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "A.TGZ"])
def test_archives_are_imported_as_copies(coco_folder: Make, make_repo: Make, name: str, prefix: str) -> None:
    source, repo = coco_folder(), make_repo()
    archive = pack(source, source.parent / name, prefix)
    card, notes = register("harbour", str(archive), repo=repo)
    raw = repo / "data/raw/harbour"
    assert not raw.is_symlink()
    assert tree(raw) == tree(source)
    assert card.source == "data/raw/harbour"
    assert notes[0].startswith("coco: found annotations/train.json, annotations/val.json, annotations/test.json")
    assert {path.name for path in (repo / "data/raw").iterdir()} == {"harbour"}
    assert prepare("harbour", repo).is_dir()


def test_a_licence_beside_the_wrapping_folder_comes_along(coco_folder: Make, make_repo: Make) -> None:
    source, repo = coco_folder(), make_repo()
    (source / "README.txt").write_text("the folder's own")
    archive = pack(source, source.parent / "a.zip", "harbour-1.0/")
    with zipfile.ZipFile(archive, "a") as content:
        for name in ("LICENSE", "README.txt", "README.dataset.txt", "paper.pdf", ".DS_Store", "__MACOSX/._a.json"):
            content.writestr(name, name)
    register("harbour", archive, repo=repo)
    assert tree(repo / "data/raw/harbour") == tree(source) | {
        name: name.encode() for name in ("LICENSE", "README.dataset.txt", "paper.pdf")
    }
    assert {path.name for path in (repo / "data/raw").iterdir()} == {"harbour"}


def test_a_folder_beside_labels_is_no_wrapping(make_repo: Make, tmp_path: Path, paint: Make) -> None:
    """Darknet's `obj/` beside its lists."""
    source, repo = tmp_path / "source", make_repo()
    for split in SPLITS:
        paint(source / f"obj/{split}.png").with_suffix(".txt").write_text("0 .5 .5 .2 .2\n")
        (source / f"{split}.txt").write_text(f"obj/{split}.png\n")
    (source / "obj.names").write_text("car\n")
    register("harbour", pack(source, tmp_path / "a.zip"), repo=repo)
    assert tree(repo / "data/raw/harbour") == tree(source)


@pytest.mark.parametrize("prefix", ["", "harbour-1.0/"])
def test_faults_are_told_of_the_archive(coco_folder: Make, make_repo: Make, prefix: str) -> None:
    """Not of the folder that it was unpacked into, which is gone."""
    source, repo = coco_folder(), make_repo()
    (source / "annotations/val.json").write_text("")
    archive = pack(source, source.parent / "a.zip", prefix)
    inside = f"{archive}/{prefix}".rstrip("/")
    with pytest.raises(ImportRefused) as caught:
        register("harbour", archive, "coco", repo=repo)
    assert str(caught.value).startswith(f"{inside}/annotations/val.json:1:1: error: not JSON")
    with pytest.raises(ImportRefused) as caught:
        register("harbour", archive, "uavdt", repo=repo)
    assert str(caught.value).startswith(f"{inside!r}: not sound uavdt data. ")
    assert ".partial" not in str(caught.value)


def zip_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content:
        for name, data in members.items():
            content.writestr(name, data)
    return path


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as content:
        for member in members:
            content.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
    return path


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 1, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size if kind == tarfile.REGTYPE else 0, link
    return member


ESCAPES = ["../a", "/a", "a/../../b", "..\\a", "C:/a", "a\x01b", "a/" * 1500 + "b", "x" * 300]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    archive = tmp_path / f"a.{kind}"
    zip_of(archive, **{name: b"x"}) if kind == "zip" else tar_of(archive, tar_member(name))
    with pytest.raises(
        ImportRefused, match=r"a\.(zip|tar): .* (leaves the folder|has too long a name).*Pack plain files"
    ):
        unpack(archive, tmp_path / "inner/target")
    assert {path.name for path in tmp_path.iterdir()} == {archive.name, "inner"}
    assert not any(path.is_file() for path in (tmp_path / "inner").rglob("*"))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_members_that_are_no_plain_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(ImportRefused, match=r"is a link, a device or a sparse file|damaged"):
        unpack(tar_of(tmp_path / "a.tar", tar_member("b", kind, link="/etc/passwd")), tmp_path / "target")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_in_zip_files_are_refused(tmp_path: Path, mode: int) -> None:
    archive, member = tmp_path / "a.zip", zipfile.ZipInfo("link")
    member.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr(member, "/etc/passwd")
    with pytest.raises(ImportRefused, match="'link' is a link or a device"):
        unpack(archive, tmp_path / "target")


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_names_that_clash_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(ImportRefused, match="has the name of another member"):
        unpack(tar_of(tmp_path / "a.tar", *(tar_member(name) for name in names)), tmp_path / "target")


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_OF_RATIO_BYTES", 2**20)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
@pytest.mark.usefixtures("small_limits")
def test_bombs_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/zeros.bin").write_bytes(bytes(50 * 2**20))
    archive = pack(tmp_path / "source", tmp_path / name)
    assert archive.stat().st_size < 100_000
    with pytest.raises(ImportRefused, match=r"unpacks to more than \d+ bytes, more than 100 times the archive's size"):
        unpack(archive, tmp_path / "target")
    assert sum(path.stat().st_size for path in (tmp_path / "target").rglob("*") if path.is_file()) < 20 * 2**20


@pytest.mark.usefixtures("small_limits")
def test_a_zip_that_lies_about_sizes_is_stopped(tmp_path: Path) -> None:
    """All sizes are set to 1 in the central directory and before the data."""
    archive = zip_of(tmp_path / "a.zip", zeros=bytes(50 * 2**20))
    size = (50 * 2**20).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(size, (1).to_bytes(4, "little")))
    with pytest.raises(ImportRefused, match=r"damaged|bomb"):
        unpack(archive, tmp_path / "target")
    assert sum(path.stat().st_size for path in (tmp_path / "target").rglob("*") if path.is_file()) < 20 * 2**20


def test_a_header_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    """A pax header of 64 MiB, which tarfile would read into memory at once."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 64 * 2**20
    archive = tmp_path / "a.tar.gz"
    with gzip.open(archive, "wb", compresslevel=1) as file:
        file.write(header.tobuf())
        for _ in range(64):
            file.write(bytes(2**20))
    with pytest.raises(ImportRefused, match="has a header of more than 1048576 bytes"):
        unpack(archive, tmp_path / "target")


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILES", 2)
    with pytest.raises(ImportRefused, match="holds more than 2 files"):
        unpack(zip_of(tmp_path / "a.zip", a=b"", b=b"", c=b""), tmp_path / "target")


def test_too_much_for_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 10)
    with pytest.raises(ImportRefused, match=r"unpacks to more than 10 bytes, more than the disk has room for"):
        unpack(zip_of(tmp_path / "a.zip", a=b"x" * 11), tmp_path / "target")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("cut", [0, 1, 200])
def test_damaged_archives_are_refused_and_leave_nothing(
    coco_folder: Make, make_repo: Make, name: str, cut: int
) -> None:
    source, repo = coco_folder(), make_repo()
    archive = pack(source, source.parent / name)
    data = archive.read_bytes()
    archive.write_bytes(data[: cut or len(data) // 2])
    before = data_files(repo)
    with pytest.raises(ImportRefused):
        register("harbour", str(archive), repo=repo)
    assert data_files(repo) == before


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", a=b"secret")
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(ImportRefused, match="'a' is encrypted"):
        unpack(archive, tmp_path / "target")


@pytest.mark.parametrize("path", ["absent.zip", "absent", "file.txt"])
def test_what_is_not_there_is_refused(make_repo: Make, tmp_path: Path, path: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ImportRefused, match="Correct the path"):
        register("harbour", str(tmp_path / path), repo=make_repo())
