"""Which picture belongs to which split: the rule a card states, and the decision as a pure function.

A picture's split depends on the name of its group and on nothing else, so a dataset can grow and no picture moves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SplitName = Literal["train", "val", "test"]


class Shares(BaseModel):
    """How much of what is divided goes into each split, on average."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: float = Field(0.8, gt=0, lt=1)
    val: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError(f"shares must add up to 1, they add up to {self.train + self.val + self.test}")
        return self


class SplitRule(BaseModel):
    """How pictures come into splits.

    `given`: as the files say; all three splits must be there. `ratio`: pictures of the same content stay together.
    `by-sequence`: pictures whose names give the same `sequence` stay together, a regular expression whose first group,
    or else whose match, is the sequence's name; under `given` it only says which pictures belong together when scores
    are compared. What the files say holds under every rule: only pictures that they put
    nowhere are divided, and those of train where the files lack val or test. `pinned` names pictures or sequences.

    A picture that `ratio` draws and that nearly repeats one of another split is left out, first those of train, then
    those of val; so no picture moves, and what test holds was not trained on. `near_duplicates: keep` is for a camera
    that does not move, all of whose pictures look alike. Sequences are kept together and not compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["given", "ratio", "by-sequence"] = "given"
    shares: Shares = Shares()
    sequence: str | None = None
    near_duplicates: Literal["leave-out", "keep"] = "leave-out"
    pinned: dict[SplitName, tuple[str, ...]] = Field(default_factory=dict)

    @field_validator("sequence")
    @classmethod
    def _pattern(cls, sequence: str | None) -> str | None:
        try:
            re.compile(sequence or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return sequence

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rule == "by-sequence" and self.sequence is None:
            raise ValueError("the rule by-sequence needs a sequence")
        if self.rule == "ratio" and self.sequence is not None:
            raise ValueError("the rule ratio divides pictures and has no use for a sequence; use by-sequence or given")
        if self.near_duplicates == "keep" and self.rule != "ratio":
            raise ValueError("near_duplicates belongs to the rule ratio: the others keep them")
        names = [name for names in self.pinned.values() for name in names]
        if self.rule == "given" and names:
            raise ValueError("the rule given has nothing to pin: the files say it all")
        if len(set(names)) != len(names):
            raise ValueError("pinned must name every picture or sequence once")
        return self


class Assignment(NamedTuple):
    """`splits`: picture -> split. `conflicts`: pictures that got none, as their group is pinned to several splits."""

    splits: dict[str, str]
    conflicts: tuple[str, ...]


def assign(groups: Mapping[str, str], pinned: Mapping[str, str], shares: Mapping[str, float]) -> Assignment:
    """Put every picture into a split so that no group is in two of them.

    `groups`: picture -> name of its group, such as a sequence, a digest of the content or a set of near duplicates;
    for a picture to stay, its group must keep its name. `pinned`: picture -> split, which always holds, also for the
    rest of the picture's group. `shares`: split -> a weight above 0; the others are divided over these splits by a hash
    of the group's name.
    """
    pins: dict[str, set[str]] = {}
    for picture, split in pinned.items():
        pins.setdefault(groups[picture], set()).add(split)
    splits, conflicts = {}, []
    for picture, group in groups.items():
        held = pins.get(group, set())
        if picture in pinned:
            splits[picture] = pinned[picture]
        elif len(held) > 1:
            conflicts.append(picture)
        else:
            splits[picture] = next(iter(held)) if held else _draw(group, shares)
    return Assignment(splits, tuple(conflicts))


def _draw(group: str, shares: Mapping[str, float]) -> str:
    """Return the split in whose part of [0, 1) the hash of the group's name lies."""
    digest = hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:6]) / 2**48 * sum(shares.values())
    return next(
        (split for split, end in zip(shares, accumulate(shares.values()), strict=True) if place < end), [*shares][-1]
    )
