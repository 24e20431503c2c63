from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.dividing import UNASSIGNED, VIDEO, Divider, digests
from data.records import SPLITS
from data.splits import Shares, SplitRule, assign

Paint = Callable[..., Path]
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
names = st.text(min_size=1, max_size=6)
groupings = st.dictionaries(names, names, max_size=30)
splits = st.sampled_from(SPLITS)


@given(groupings, groupings)
def test_adding_pictures_moves_none(groups: dict[str, str], more: dict[str, str]) -> None:
    before = assign(groups, {}, SHARES).splits
    after = assign(more | groups, {}, SHARES).splits
    assert {picture: after[picture] for picture in groups} == before


@given(groupings, st.data())
def test_adding_pictures_moves_none_with_pins(groups: dict[str, str], data: st.DataObject) -> None:
    pinned = {
        picture: data.draw(splits)
        for picture in data.draw(st.sets(st.sampled_from([*groups, ""])) if groups else st.just(set()))
        if picture in groups
    }
    before = assign(groups, pinned, SHARES)
    after = assign(data.draw(groupings) | groups, pinned, SHARES)
    assert {picture: after.splits.get(picture) for picture in groups} == {
        picture: before.splits.get(picture) for picture in groups
    }
    assert {picture: before.splits[picture] for picture in pinned} == pinned, "a pin always holds"
    assert {*before.splits, *before.conflicts} == {*groups}, "none is lost"
    assert len(before.splits) + len(before.conflicts) == len(groups)
    places: dict[str, set[str]] = {}
    for picture, split in before.splits.items():
        places.setdefault(groups[picture], set()).add(split)
    for group, found in places.items():
        pins = {split for picture, split in pinned.items() if groups[picture] == group}
        assert len(found) == 1 or found == pins, "a group is in two splits only where it is pinned to them"
    for picture in before.conflicts:
        assert len({split for other, split in pinned.items() if groups[other] == groups[picture]}) > 1


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.tuples(*[st.floats(0.1, 1)] * 3))
def test_shares_hold_within_five_standard_deviations(seed: int, weights: tuple[float, float, float]) -> None:
    number = 4000
    shares = dict(zip(SPLITS, weights, strict=True))
    found = Counter(assign({f"{seed}-{n}": f"{seed}-{n}" for n in range(number)}, {}, shares).splits.values())
    for split, weight in shares.items():
        share = weight / sum(weights)
        assert abs(found[split] - number * share) <= 5 * (number * share * (1 - share)) ** 0.5


def test_the_draw_is_the_documented_one() -> None:
    """Pinned values: another hash would move every picture of every dataset."""
    found = assign({name: name for name in "abcdefghijklmnopqrst"}, {}, {"train": 2, "val": 1, "test": 1}).splits
    assert "".join(split[1] for split in found.values()) == "errrrreaeraarrrrarre"


def test_rules_that_make_no_sense_are_refused() -> None:
    for values in (
        {"rule": "by-sequence"},
        {"rule": "ratio", "sequence": "a"},
        {"rule": "given", "near_duplicates": "keep"},
        {"rule": "by-sequence", "sequence": "a", "near_duplicates": "keep"},
        {"rule": "by-sequence", "sequence": "("},
        {"pinned": {"val": ["a"]}},
        {"rule": "ratio", "pinned": {"val": ["a"], "test": ["a"]}},
        {"rule": "ratio", "shares": {"train": 0.9, "val": 0.2}},
        {"rule": "ratio", "shares": {"train": 1.0, "val": 0.0, "test": 0.0}},
        {"rule": "chance"},
    ):
        with pytest.raises(ValidationError):
            SplitRule.model_validate(values)
    assert Shares().train == 0.8


def divider(folder: Path, rule: SplitRule | None) -> Divider:
    return Divider(folder, folder, rule)


def test_given_splits_are_all_required(tmp_path: Path) -> None:
    divide = divider(tmp_path, SplitRule())
    assert divide({"train": ["a"], UNASSIGNED: ["b", "c"]}) == {"train": ["a"], "val": [], "test": []}
    assert [problem.severity for problem in divide.problems] == ["error", "error", "warning"]
    assert "2 pictures are in no split, for example b, c" in str(divide.problems[2])


def test_a_lacking_split_is_taken_out_of_train(tmp_path: Path) -> None:
    """Val as given stays as it is; without a rule, the files' lack decides for `ratio`."""
    train = [f"t{number}" for number in range(200)]
    divide = divider(tmp_path, None)
    found = divide({"train": train, "val": ["v"]})
    assert divide.rule == SplitRule(rule="ratio")
    assert found["val"] == ["v"]
    assert sorted(found["train"] + found["test"]) == sorted(train)
    assert 5 <= len(found["test"]) <= 40
    again = divider(tmp_path, None)({"train": [*train, "new"], "val": ["v"]})
    assert set(found["test"]) <= set(again["test"])


def test_lists_hold_and_only_the_rest_is_divided(tmp_path: Path) -> None:
    rest = [f"r{number}" for number in range(300)]
    listed = {"train": ["a"], "val": ["b"], "test": ["c"]}
    found = divider(tmp_path, SplitRule(rule="ratio"))(listed | {UNASSIGNED: rest})
    assert [listed[split][0] in found[split] for split in SPLITS] == [True] * 3
    assert min(len(found[split]) for split in SPLITS) > 10
    assert divider(tmp_path, SplitRule(rule="ratio"))(listed) == listed
    only = divider(tmp_path, SplitRule(rule="ratio"))({"val": ["b"], "test": ["c"], UNASSIGNED: rest})
    assert (sorted(only["train"]), only["val"], only["test"]) == (sorted(rest), ["b"], ["c"])


def test_pictures_of_the_same_content_stay_together(tmp_path: Path, paint: Paint) -> None:
    files = [paint(tmp_path / f"{number}.png") for number in range(30)]
    for file in files:
        shutil.copyfile(file, file.with_name(f"copy of {file.name}"))
    found = divider(tmp_path, SplitRule(rule="ratio"))({UNASSIGNED: [path.name for path in tmp_path.iterdir()]})
    split_of = {name: split for split, members in found.items() for name in members}
    assert all(split_of[file.name] == split_of[f"copy of {file.name}"] for file in files)
    renamed = tmp_path / "renamed.png"
    files[0].rename(renamed)
    found = divider(tmp_path, SplitRule(rule="ratio"))({UNASSIGNED: [path.name for path in tmp_path.iterdir()]})
    assert "renamed.png" in found[split_of[files[0].name]], "the content counts, not the name"


def test_sequences_stay_together_and_can_be_pinned(tmp_path: Path) -> None:
    pictures = [f"s{sequence}_{frame}.jpg" for sequence in range(9) for frame in range(5)]
    rule = SplitRule(rule="by-sequence", sequence=r"^(s\d)_", pinned={"val": ("s3",), "test": ("s4", "s5")})
    divide = divider(tmp_path, rule)
    found = divide({UNASSIGNED: pictures})
    assert divide.problems == []
    assert {f"s3_{frame}.jpg" for frame in range(5)} <= set(found["val"])
    assert {f"s{sequence}_{frame}.jpg" for sequence in (4, 5) for frame in range(5)} <= set(found["test"])
    homes = {(name[:2], split) for split, members in found.items() for name in members}
    assert len(homes) == 9


def test_what_the_rule_cannot_do_is_said(tmp_path: Path) -> None:
    rule = SplitRule(rule="by-sequence", sequence=r"^s\d", pinned={"val": ("s3", "s8")})
    divide = divider(tmp_path, rule)
    found = divide({UNASSIGNED: ["s3_1.jpg", "x.jpg"]})
    assert found == {"train": [], "val": ["s3_1.jpg"], "test": []}
    shown = [problem.rule for problem in divide.problems]
    assert shown == [
        "1 names, for example x.jpg, do not match '^s\\\\d', so their sequence is not known",
        "the card pins s8, which is no picture and no sequence of this dataset",
        "the rule 'by-sequence' put no picture into split 'train'",
        "the rule 'by-sequence' put no picture into split 'test'",
    ]


def test_pictures_between_two_given_splits_are_left_out_and_counted(tmp_path: Path) -> None:
    rule = SplitRule(rule="by-sequence", sequence=r"^s\d")
    divide = divider(tmp_path, rule)
    found = divide({"train": ["s1_1"], "val": ["s1_2"], "test": ["s2_1"], UNASSIGNED: ["s1_3", "s2_2"]})
    assert found == {"train": ["s1_1"], "val": ["s1_2"], "test": ["s2_1", "s2_2"]}
    assert [str(problem).partition(": warning: ")[2] for problem in divide.problems] == [
        "1 pictures, for example s1_3, belong with others that are in several splits. "
        "Left out when prepared: put them into one",
        "1 sequences, for example s1, are in several splits as the files have it. "
        "Kept: a score is only fair if a sequence stays in one",
    ]


def test_near_duplicates_of_another_split_are_left_out_and_none_moves(tmp_path: Path) -> None:
    """Three scenes in a row of ever brighter pictures; as the dataset grows, a picture may go, but never move."""
    names = []
    for scene in range(3):
        noise = np.random.default_rng(scene).normal(0, 1, (12, 12))
        texture = cv2.resize(noise, (96, 96), interpolation=cv2.INTER_CUBIC)
        for frame in range(20):
            names.append(f"{scene}-{frame}.png")
            pixels = (110 + frame + 30 * texture).clip(0, 255).astype(np.uint8)
            assert cv2.imwrite(str(tmp_path / names[-1]), pixels)
    draw = assign({name: digest or "" for name, digest in digests(tmp_path, names).items()}, {}, SHARES).splits
    before: dict[str, str] = {}
    for count in (6, 25, 41, 60):
        divide = divider(tmp_path, SplitRule(rule="ratio"))
        found = {name: split for split, part in divide({UNASSIGNED: names[:count]}).items() for name in part}
        assert all(found.get(name, split) == split for name, split in before.items()), "none moves"
        assert found.items() <= draw.items(), "what stays is where its own content put it"
        for scene in range(3):
            assert len({split for name, split in found.items() if name.startswith(f"{scene}-")}) <= 1
        assert sum(divide.num_excluded.values()) == count - len(found)
        before |= found
    (problem,) = [problem for problem in divide.problems if "nearly repeat" in problem.rule]
    assert problem.severity == "warning"
    assert problem.rule.startswith(f"{60 - len(found)} pictures (")
    told = divider(tmp_path, None)
    videos = {(name[0], split) for split, part in told({UNASSIGNED: names}).items() for name in part}
    assert (len(videos), {split for _, split in videos}) == (3, {*SPLITS}), "each video is in a split of its own"
    assert told.rule is not None
    assert (told.rule.rule, told.rule.sequence) == ("by-sequence", VIDEO)
    (problem,) = told.problems
    assert " of 60 pictures nearly repeat one of another split: " in problem.rule
    assert problem.remedy == "Each of 3 videos, by the names, is in one split: 0, 1, 2. See the card"
    for name in names:
        (tmp_path / name).rename(tmp_path / f"{name}.png")
    nameless = divider(tmp_path, None)
    found = nameless({UNASSIGNED: [f"{name}.png" for name in names]})
    assert {name[:-4]: split for split, part in found.items() for name in part} == draw
    assert nameless.rule == SplitRule(rule="ratio", near_duplicates="keep"), "too many to decide that for a person"
    assert nameless.problems[0].remedy.startswith("Kept, so that scores will be too good. Frames of a video belong")
    for name in names:
        (tmp_path / f"{name}.png").rename(tmp_path / name)
    kept = divider(tmp_path, SplitRule(rule="ratio", near_duplicates="keep"))
    assert {name: split for split, part in kept({UNASSIGNED: names}).items() for name in part} == draw
    assert kept.problems == []


def test_a_split_that_near_duplicates_empty_is_an_error(tmp_path: Path) -> None:
    """All pictures are one: whatever is in test keeps all others out."""
    texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8), (64, 64))
    names = [f"{number}.png" for number in range(60)]
    for number, name in enumerate(names):
        assert cv2.imwrite(str(tmp_path / name), cv2.add(texture // 2, number))
    divide = divider(tmp_path, SplitRule(rule="ratio"))
    found = divide({"train": names})
    assert [len(found[split]) > 0 for split in SPLITS] == [False, False, True]
    rules = [problem.rule for problem in divide.problems if problem.severity == "error"]
    assert rules == [f"the rule 'ratio' put no picture into split '{split}'" for split in ("train", "val")]


def test_what_the_files_or_the_card_say_is_never_left_out(tmp_path: Path) -> None:
    """Copies that differ in one pixel: the listed one and the pinned one stay, though they are alike."""
    original = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert cv2.imwrite(str(tmp_path / "a.png"), original)
    for number, name in enumerate("bcdefghij"):
        copy = original.copy()
        copy[number, 0] = 255 - copy[number, 0]
        assert cv2.imwrite(str(tmp_path / f"{name}.png"), copy)
    rule = SplitRule(rule="ratio", pinned={"val": ("b.png",)})
    divide = divider(tmp_path, rule)
    rest = [f"{name}.png" for name in "bcdefghij"]
    found = divide({"train": ["a.png"], "val": [], "test": [], UNASSIGNED: rest})
    assert "a.png" in found["train"]
    assert found["val"] == ["b.png"]
    assert found["test"] == []
    assert sorted(found["train"]) == ["a.png"], "what is like b, which is pinned to val, goes"


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("DJI-00760-00002.jpg", "DJI-00760"),
        ("DJI_0005-0018.jpg", "DJI_0005"),
        ("M0101/img000001.jpg", "M0101/img"),
        ("7.png", ""),
    ],
)
def test_the_expression_that_is_proposed_for_videos(name: str, video: str) -> None:
    match = re.match(VIDEO, name)
    assert match is not None
    assert match[1] == video


def test_one_that_was_taken_twice_is_left_out_without_being_asked(tmp_path: Path) -> None:
    names, twins = [f"{number}.png" for number in range(200)], []
    for number, name in enumerate(names):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 12, 3), np.uint8)
        assert cv2.imwrite(str(tmp_path / name), cv2.resize(coarse, (60, 40), interpolation=cv2.INTER_CUBIC))
    pixels = cv2.imread(str(tmp_path / names[0]))
    for number in range(8):
        pixels[0, number] = 255 - pixels[0, number]
        twins.append(f"twin{number}.png")
        assert cv2.imwrite(str(tmp_path / twins[-1]), pixels)
    divide = divider(tmp_path, None)
    found = divide({UNASSIGNED: [*names, *twins]})
    assert divide.rule == SplitRule(rule="ratio")
    left = {name: split for split, part in found.items() for name in part}
    assert len({left[name] for name in (names[0], *twins) if name in left}) == 1
    assert 0 < sum(divide.num_excluded.values()) < 9
    assert {*names[1:]} <= {*left}
