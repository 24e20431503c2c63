"""`near_duplicates`: which pictures of a dataset show the same thing, so that splits can keep them together.

A picture is looked at as a grey thumbnail of 32x32 px. Two pictures are near duplicates when

1. their hashes differ in at most MAX_DISTANCE of 64 bits: the signs of the thumbnail's lowest frequencies, and
2. their thumbnails correlate by at least MIN_CORRELATION after slow changes of light have been taken away.

Found are copies in other formats, sizes, qualities and exposures, and many neighbouring frames of a video. Not found
are mirrored or turned pictures, most of those that are shifted or cropped by 2% or more, and tiles of one picture: to
keep a video together its name must tell. Of 36 sparse frames of four aerial videos (aerial_cars), 28 fall into a group,
always with frames of their own video.

Why both. The hash finds candidates without comparing all pairs; the correlation decides. Neither is enough. On 1,800
steel pictures that are nearly grey all over (NEU-DET) a hash of brightness steps (dHash) puts 3,591 pairs within 3
bits, one of them true: these pictures share the gradient of one lamp. That gradient alone gives unlike pictures a plain
correlation of 0.98, hence the high-pass; and a bright scratch in the same place gives unlike pictures a high-pass
correlation of 0.93, which this hash holds apart by 25 bits. Of the 1.6 million pairs 2 pass both, and both are true:
the published copy, and one plate that was taken twice. On 1,120 pictures rendered one by one none passes; the nearest
two are 11 bits apart. Of 221 pictures of all four sets, each copied in nine ways (JPEG quality 50, half size,
contrast 0.7, gamma 0.8, noise of 5 grey levels and more), one copy is missed, which brightening drove to white.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data.headers import read_header
from data.images import leads_out, threads
from data.label_files import UnreadableFile
from data.problems import Problem
from data.records import Split

MAX_DISTANCE = 7
MIN_CORRELATION = 0.85
# Grey levels of standard deviation below which a thumbnail shows nothing but noise.
MIN_CONTRAST = 0.5
_SIDE = 32
_BLUR_SIGMA_PX = 3.0
# Blurring leaves a rim of a gradient of light, which all pictures under one lamp share.
_MARGIN = 4
_BANDS = 4
# All keys of 16 bits that differ from one in no bit or in one.
_PROBES = np.array([0, *(1 << bit for bit in range(16))], np.uint64)


class Link(NamedTuple):
    """Two pictures found alike; `distance_bits` 0 and `correlation` 1 where `same_bytes`."""

    first: str
    second: str
    distance_bits: int
    correlation: float
    same_bytes: bool = False


class Duplicates(NamedTuple):
    """`groups`: pictures that belong together, two or more, by name; `links`: what holds each group together.

    A group of n pictures has n - 1 links: other pairs within it may be alike as well. `unreadable` pictures were not
    looked at.
    """

    links: list[Link]
    groups: list[tuple[str, ...]]
    unreadable: list[str]


class _Look(NamedTuple):
    """`code`: 64 bits; `thumbnail`: float16 (576,) of mean 0 and length 1; both None where there is no contrast."""

    sha256: str
    code: int | None
    thumbnail: NDArray[np.float16] | None


def near_duplicates(images: Path, file_names: Sequence[str]) -> Duplicates:
    """Compare pictures by content, each read once; about 1 KiB a picture stays in memory.

    Pictures without contrast are alike only if their bytes are the same. Likeness is passed on: if a is like b and b
    like c, all three are one group, as the frames of a video are. A camera that never moves makes one group of all
    its pictures.
    """
    looks = _looks(images, file_names)
    group = np.arange(len(looks))
    links: list[Link] = []

    def join(one: int, other: int, distance_bits: int, correlation: float, same_bytes: bool) -> None:
        if group[one] != group[other]:
            links.append(Link(file_names[one], file_names[other], distance_bits, round(correlation, 3), same_bytes))
            group[group == group[other]] = group[one]

    first: dict[str, int] = {}
    for row, look in enumerate(looks):
        if look is not None:
            join(first.setdefault(look.sha256, row), row, 0, 1.0, True)
    rows, codes, thumbnails = _textured(looks)
    for here, near in neighbours(codes):
        # Of a group that is together already no further pair is asked for, else a fixed camera would ask for all.
        near = near[group[rows[near]] != group[rows[here]]]  # noqa: PLW2901
        correlations = thumbnails[near].astype(np.float32) @ thumbnails[here].astype(np.float32)
        for other, correlation in zip(near.tolist(), correlations.tolist(), strict=True):
            if correlation >= MIN_CORRELATION:
                distance = int(np.bitwise_count(codes[here] ^ codes[other]))
                join(int(rows[here]), int(rows[other]), distance, correlation, False)
    return Duplicates(links, _groups(group, file_names), [n for n, k in zip(file_names, looks, strict=True) if not k])


def repetitions(images: Path, split_of: Mapping[str, str], num_kept: int) -> dict[str, str]:
    """Return picture -> one of another split that it nearly repeats, for as many as must go so that no such pair stays.

    Of a pair the one that comes later in `split_of` goes; the first `num_kept` stay in any case. Only true pairs count:
    likeness is not passed on.
    """
    names = list(split_of)
    rows, codes, thumbnails = _textured(_looks(images, names))
    splits = np.array([split_of[names[row]] for row in rows], np.str_)
    can_go = rows >= num_kept
    has_gone = np.zeros(len(rows), np.bool_)
    found: dict[str, str] = {}
    for here, near in neighbours(codes, lambda row: bool(has_gone[row])):
        near = near[(splits[near] != splits[here]) & can_go[near] & ~has_gone[near]]  # noqa: PLW2901
        correlations = thumbnails[near].astype(np.float32) @ thumbnails[here].astype(np.float32)
        gone = near[correlations >= MIN_CORRELATION]
        has_gone[gone] = True
        found |= {names[row]: names[rows[here]] for row in rows[gone].tolist()}
    return found


def near_duplicate_problems(images: Path, splits: Mapping[str, Split]) -> list[Problem]:
    """Return a warning for each group of near duplicates that lies in several splits.

    Pictures of the same bytes are left to the check that makes errors of them.
    """
    owners = {record.file_name: split for split, content in splits.items() for record in content.images}
    found = near_duplicates(images, list(owners))
    group_of = {name: group for group in found.groups for name in group}
    crossing: dict[tuple[str, ...], Link] = {}
    for link in found.links:
        if owners[link.first] != owners[link.second] and not link.same_bytes:
            crossing.setdefault(group_of[link.first], link)
    problems = []
    for group, link in crossing.items():
        counts = ", ".join(f"{split} {count}" for split, count in Counter(owners[name] for name in group).items())
        rule = (
            f"leak: split {owners[link.second]!r} holds nearly the same picture as {link.first!r} in "
            f"{owners[link.first]!r} ({link.distance_bits} of 64 bits differ, correlation {link.correlation:.2f}); "
            f"{len(group)} such pictures lie in {counts}"
        )
        problems.append(Problem(images / link.second, None, rule, "Keep them in one split", "warning"))
    return problems


def neighbours(
    codes: NDArray[np.uint64], is_done: Callable[[int], bool] = lambda _: False
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield for each code, by index, the later ones within MAX_DISTANCE bits: all of them, by multi-index hashing.

    Of 7 differing bits at most one falls into some quarter of the 64. So whoever is near has, in one quarter, the same
    16 bits or 16 bits that differ in one: 4 x 17 places to look, in lists sorted by each quarter. A code that `is_done`
    when its turn comes is left out.
    """
    bands = [(codes >> np.uint64(16 * band)) & np.uint64(0xFFFF) for band in range(_BANDS)]
    orders = [np.argsort(keys, kind="stable") for keys in bands]
    sorted_keys = [keys[order] for keys, order in zip(bands, orders, strict=True)]
    # For pictures that are all alike sorting the places found, to see each once, would take most of the time.
    is_found = np.zeros(len(codes), np.bool_)
    for row in range(len(codes)):
        if is_done(row):
            continue
        is_found[row:] = False
        for keys, order, ranked in zip(bands, orders, sorted_keys, strict=True):
            probes = keys[row] ^ _PROBES
            starts, stops = np.searchsorted(ranked, probes, "left"), np.searchsorted(ranked, probes, "right")
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                is_found[order[start:stop]] = True
        candidates = row + 1 + np.flatnonzero(is_found[row + 1 :])
        yield row, candidates[np.bitwise_count(codes[candidates] ^ codes[row]) <= MAX_DISTANCE]


def _looks(images: Path, file_names: Sequence[str]) -> list[_Look | None]:
    root = Path(os.path.realpath(images))
    with threads() as pool:
        return list(pool.map(lambda name: None if leads_out(images / name, root) else _look(images / name), file_names))


def _textured(
    looks: Sequence[_Look | None],
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.float16]]:
    """Rows, codes and thumbnails of the pictures that show something."""
    seen = [(row, look.code, look.thumbnail) for row, look in enumerate(looks) if look is not None]
    textured = [(row, code, thumbnail) for row, code, thumbnail in seen if code is not None and thumbnail is not None]
    return (
        np.array([row for row, _, _ in textured], np.int64),
        np.array([code for _, code, _ in textured], np.uint64),
        np.array([thumbnail for _, _, thumbnail in textured], np.float16),
    )


def _look(path: Path) -> _Look | None:
    """Return what is compared of a picture, or None where it cannot be read, which other checks report."""
    try:
        # First, for it refuses what must not be read as a whole: bombs, pipes, files of gigabytes.
        read_header(path)
        encoded = np.fromfile(path, np.uint8)
        grey = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except (OSError, UnreadableFile, cv2.error):
        return None
    if grey is None:
        return None
    sha256 = hashlib.sha256(encoded.tobytes()).hexdigest()
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    fine = (small - cv2.GaussianBlur(small, (0, 0), _BLUR_SIGMA_PX))[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    fine = fine - fine.mean()
    if fine.std() < MIN_CONTRAST:
        return _Look(sha256, None, None)
    bits = cv2.dct(small)[_LOWEST] > 0
    code = int(np.packbits(bits).view(np.uint64)[0])
    return _Look(sha256, code, (fine / np.linalg.norm(fine)).astype(np.float16).ravel())


def _lowest_frequencies() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the 64 lowest frequencies of a cosine transform, without the mean."""
    places = [(row, column) for row in range(_SIDE) for column in range(_SIDE) if row or column]
    places = sorted(places, key=lambda place: (place[0] ** 2 + place[1] ** 2, place))[:64]
    rows, columns = np.array(places).T
    return rows, columns


_LOWEST = _lowest_frequencies()


def _groups(group: NDArray[np.int64], file_names: Sequence[str]) -> list[tuple[str, ...]]:
    members: dict[int, list[str]] = {}
    for label, name in zip(group.tolist(), file_names, strict=True):
        members.setdefault(label, []).append(name)
    return [tuple(names) for names in members.values() if len(names) > 1]
