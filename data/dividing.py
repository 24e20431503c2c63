"""`Divider`: what a folder says about its splits, and a card's rule, made into lists of pictures."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from data.duplicates import repetitions
from data.images import threads
from data.problems import Problem
from data.records import SPLITS
from data.splits import SplitName, SplitRule, assign

UNASSIGNED = "unassigned"
_NUM_EXAMPLES = 3
# Of the pictures that a rule which nobody asked for would draw.
MAX_LEFT_OUT = 0.05
# Names of frames: what stands before their number names the video.
VIDEO = r"^(.*?)[-_]?\d+\.\w+$"
_ADVICE = (
    "Frames of a video belong together: `splits: {rule: by-sequence, sequence: ...}` in the card, with an expression "
    f"such as '{VIDEO}' for their names. Pictures of one camera that does not move look alike: `near_duplicates: keep`"
)


class Divider:
    """Called by a reader with the names of the pictures by split, before it reads their labels.

    A split that the folder does not have is not among the keys; pictures that it puts nowhere are UNASSIGNED. Without a
    rule the files' own splits are used or, where one is lacking, the rule `ratio`; `rule` is then the one in use. If
    more than MAX_LEFT_OUT of what that draws would go as near duplicates, it becomes `by-sequence` where names tell
    videos apart, or else near duplicates are kept.
    """

    def __init__(self, folder: Path, images: Path, rule: SplitRule | None) -> None:
        self.folder, self.images, self.rule = folder, images, rule
        self.problems: list[Problem] = []
        self.digests: dict[str, str | None] = {}
        self.num_excluded: dict[str, int] = {}
        self.num_drawn = 0
        self._is_choosing = rule is None

    def __call__(self, listed: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the names of each of the three splits; what is left out is among the `problems`."""
        lacking = [split for split in SPLITS if split not in listed]
        if self.rule is None:
            self.rule = SplitRule(rule="ratio") if lacking else SplitRule()
        if self.rule.rule == "given":
            return self._given(listed, lacking)
        divided = self._by_rule(listed, lacking, self.rule)
        for split in SPLITS:
            if not divided[split] and (split in lacking or listed[split]):
                rule = f"the rule {self.rule.rule!r} put no picture into split {split!r}"
                remedy = (
                    "Pin a picture or sequence to it, or give it a larger share: `splits: {pinned: ..., shares: ...}`"
                )
                self._report(rule, f"{remedy} in the card")
        return divided

    def _given(self, listed: Mapping[str, Sequence[str]], lacking: Sequence[str]) -> dict[str, list[str]]:
        for split in lacking:
            rule = f"there is no split {split!r}: training needs train, selection val and promotion test images"
            self._report(rule, "Provide it, or let the card's rule make it: `splits: {rule: ratio}`")
        left_out = listed.get(UNASSIGNED, ())
        if left_out:
            rule = f"{len(left_out)} pictures are in no split, for example {_examples(left_out)}"
            self._report(rule, "Left out when prepared: list them to use them", "warning")
        return {split: list(listed.get(split, ())) for split in SPLITS}

    def _by_rule(
        self, listed: Mapping[str, Sequence[str]], lacking: Sequence[str], rule: SplitRule
    ) -> dict[str, list[str]]:
        """Divide what is in no split, and train where val or test is lacking."""
        is_train_open = any(split in listed for split in SPLITS) and bool({"val", "test"} & {*lacking})
        open_splits = ["train", *lacking] if is_train_open else lacking or SPLITS
        shares: dict[str, float] = {split: getattr(rule.shares, split) for split in SPLITS if split in open_splits}
        split_of = {name: split for split in SPLITS for name in listed.get(split, ())}
        groups = self._groups([*split_of, *listed.get(UNASSIGNED, ())], rule)
        held = {
            name: split
            for name, split in split_of.items()
            if name in groups and not (is_train_open and split == "train")
        }
        fixed = self._pinned(groups, rule) | held
        assigned = assign(groups, fixed, shares)
        leaves_out = rule.rule == "ratio" and rule.near_duplicates == "leave-out"
        repeated = self._repetitions(assigned.splits, fixed) if leaves_out else {}
        self.num_drawn = len(assigned.splits) - len(fixed)
        if self._is_choosing and len(repeated) > MAX_LEFT_OUT * self.num_drawn:
            # Not one picture that was taken twice, but what the dataset is.
            self._is_choosing = False
            self.rule = self._rule_for_many(repeated, [*groups], shares)
            return self._by_rule(listed, lacking, self.rule)
        self._tell_left_out(repeated, assigned.splits)
        if assigned.conflicts:
            what = (
                f"{len(assigned.conflicts)} pictures, for example {_examples(assigned.conflicts)}, belong with others"
            )
            self._report(f"{what} that are in several splits", "Left out when prepared: put them into one", "warning")
        divided: dict[str, list[str]] = {split: [] for split in SPLITS}
        homes: dict[str, set[str]] = {}
        for name, split in assigned.splits.items():
            if name not in repeated:
                divided[split].append(name)
            homes.setdefault(groups[name], set()).add(split)
        torn = [group for group, found in homes.items() if len(found) > 1]
        if torn and rule.sequence is not None:
            what = f"{len(torn)} sequences, for example {_examples(torn)}, are in several splits as the files have it"
            self._report(what, "Kept: a score is only fair if a sequence stays in one", "warning")
        return divided

    def _repetitions(self, split_of: Mapping[str, str], fixed: Mapping[str, str]) -> dict[str, str]:
        """Return picture -> what it nearly repeats in another split, of those that go for that."""
        drawn = [name for split in reversed(SPLITS) for name in split_of if split_of[name] == split]
        drawn = [name for name in drawn if name not in fixed]
        if not drawn:
            return {}
        return repetitions(self.images, {name: split_of[name] for name in (*fixed, *drawn)}, len(fixed))

    def _tell_left_out(self, repeated: Mapping[str, str], split_of: Mapping[str, str]) -> None:
        self.num_excluded = dict(Counter(split_of[name] for name in repeated))
        if repeated:
            counts = ", ".join(f"{split} {number}" for split, number in self.num_excluded.items())
            rule = f"{len(repeated)} pictures ({counts}) nearly repeat one of another split: {_pairs(repeated)}"
            self._report(rule, f"Left out when prepared. {_ADVICE}", "warning")

    def _rule_for_many(
        self, repeated: Mapping[str, str], names: Sequence[str], shares: Mapping[str, float]
    ) -> SplitRule:
        """Return a rule for pictures many of which look alike: by video if their names tell it, else they are kept."""
        found = f"{len(repeated)} of {self.num_drawn} pictures nearly repeat one of another split: {_pairs(repeated)}"
        video_of = {name: match[1] for name in names if (match := re.match(VIDEO, name))}
        videos = Counter(video_of.values())
        is_told = len(video_of) == len(names) and all(video_of[one] == video_of[two] for one, two in repeated.items())
        if not is_told or len(videos) < len(SPLITS):
            self._report(found, f"Kept, so that scores will be too good. {_ADVICE}", "warning")
            return SplitRule(rule="ratio", near_duplicates="keep")
        homes = assign({video: video for video in videos}, {}, shares).splits
        pinned: dict[SplitName, tuple[str, ...]] = {}
        for split in SPLITS:
            if split in shares and split not in homes.values():
                held = Counter(homes.values())
                smallest = min((number, video) for video, number in videos.items() if held[homes[video]] > 1)[1]
                homes[smallest], pinned[split] = split, (smallest,)
        remedy = f"Each of {len(videos)} videos, by the names, is in one split: {_examples([*videos])}. See the card"
        self._report(found, remedy, "warning")
        return SplitRule(rule="by-sequence", sequence=VIDEO, pinned=pinned)

    def _groups(self, names: Sequence[str], rule: SplitRule) -> dict[str, str]:
        if rule.sequence is None:
            self.digests = digests(self.images, names)
            return {name: digest or name for name, digest in self.digests.items()}
        found = {name: re.search(rule.sequence, name) for name in names}
        nameless = [name for name, match in found.items() if match is None]
        if nameless:
            what = f"{len(nameless)} names, for example {_examples(nameless)}, do not match {rule.sequence!r}"
            self._report(f"{what}, so their sequence is not known", "Correct `splits: {sequence: ...}` in the card")
        return {name: match[1 if match.re.groups else 0] or "" for name, match in found.items() if match is not None}

    def _pinned(self, groups: Mapping[str, str], rule: SplitRule) -> dict[str, str]:
        """Return picture -> split for the pictures that the card names, themselves or by their sequence."""
        pins = {name: split for split, names in rule.pinned.items() for name in names}
        unknown = sorted(set(pins) - set(groups) - set(groups.values()))
        if unknown:
            rule_text = f"the card pins {_examples(unknown)}, which is no picture and no sequence of this dataset"
            self._report(rule_text, "Correct `splits: {pinned: ...}` in the card")
        return {
            name: pins[name] if name in pins else pins[group]
            for name, group in groups.items()
            if name in pins or group in pins
        }

    def _report(self, rule: str, remedy: str, severity: Literal["error", "warning"] = "error") -> None:
        self.problems.append(Problem(self.folder, None, rule, remedy, severity))


def digests(images: Path, names: Sequence[str]) -> dict[str, str | None]:
    """Return the SHA-256 of every picture, or None where it cannot be read, which others report."""
    with threads() as pool:
        return dict(zip(names, pool.map(lambda name: _digest(images / name), names), strict=True))


def _digest(path: Path) -> str | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _pairs(repeated: Mapping[str, str]) -> str:
    return ", ".join(f"{name} (like {other})" for name, other in [*repeated.items()][:_NUM_EXAMPLES])


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_EXAMPLES])
