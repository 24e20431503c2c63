"""The protocols by name, and the one function that scores by any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from evaluation.coco import aitod_rules, coco_rules, score_tables
from evaluation.ignore import IgnoreRule
from evaluation.score import Score
from evaluation.tables import Tables
from evaluation.uavdt import NO_CLASS, score_uavdt
from evaluation.visdrone import score_visdrone
from evaluation.voc import score_voc

ProtocolName = Literal["coco", "visdrone", "uavdt", "aitod", "voc"]


class NoClasses(ValueError):
    """Detections whose class is not known, for a protocol that needs it."""


class Protocol(NamedTuple):
    """How to score by a protocol, and its rules in words.

    `max_dets`: the limit on detections if nobody asks for another; None where there is no choice. `own_ignore_rule`:
    what it does about ignore regions; None where the dataset's ignore rule decides. `needs_classes`: of detections;
    `takes_others`: a class called `others` takes part, though it is not scored.
    """

    score: Callable[[Tables, int, IgnoreRule], Score]
    iou: str
    limit: str
    max_dets: int | None = None
    own_ignore_rule: str | None = None
    needs_classes: bool = True
    takes_others: bool = False


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "coco": Protocol(
        lambda tables, max_dets, ignore_rule: score_tables(tables, coco_rules(max_dets), ignore_rule=ignore_rule),
        iou=".50:.05:.95, AP over 101 points of recall",
        limit="{max_dets} per image and class, best first",
        max_dets=100,
    ),
    "visdrone": Protocol(
        lambda tables, max_dets, _: score_visdrone(tables, max_dets),
        iou=".50:.05:.95, AP over all points",
        limit="{max_dets} per image over all classes, in the order of the file",
        max_dets=500,
        own_ignore_rule="objects and detections with half of their pixels in regions are dropped",
        takes_others=True,
    ),
    "uavdt": Protocol(
        lambda tables, _, __: score_uavdt(tables),
        iou=".70, AP over all points",
        limit="none",
        own_ignore_rule="detections strictly inside a region are dropped; regions of M0209 and M0801 are not read",
        needs_classes=False,
    ),
    "aitod": Protocol(
        lambda tables, _, ignore_rule: score_tables(tables, aitod_rules(), ignore_rule=ignore_rule),
        iou=".50:.05:.95, AP over 101 points of recall",
        limit="1500 per image and class, best first",
    ),
    "voc": Protocol(
        lambda tables, _, ignore_rule: score_voc(tables, ignore_rule=ignore_rule),
        iou=".50, AP over all points",
        limit="none",
    ),
}


def score_by(
    protocol: ProtocolName, tables: Tables, *, max_dets: int | None = None, ignore_rule: IgnoreRule = "none"
) -> Score:
    """Score by a protocol. `max_dets` (None: the protocol's own) and `ignore_rule` count where it leaves the choice.

    Raises:
        NoClasses: the detections have no class, and the protocol needs it.
        UnknownImageSize: VisDrone's needs a size that is not there.
        ValueError: `max_dets` is below 1.
    """
    rules = PROTOCOLS[protocol]
    if rules.needs_classes and (tables.detections.label == NO_CLASS).any():
        without = ", ".join(name for name, other in PROTOCOLS.items() if not other.needs_classes)
        raise NoClasses(
            f"the detections have no class (-1), and protocol {protocol!r} needs it: give one, or score by {without}"
        )
    return rules.score(tables, _limit(rules, max_dets), ignore_rule)


def rules_in_force(
    protocol: ProtocolName, *, max_dets: int | None = None, ignore_rule: IgnoreRule = "none"
) -> dict[str, str]:
    """What a number depends on, in words: IoU, limit on detections, ignore regions."""
    rules = PROTOCOLS[protocol]
    return {
        "iou": rules.iou,
        "max_dets": rules.limit.format(max_dets=_limit(rules, max_dets)),
        "ignore_rule": rules.own_ignore_rule or ignore_rule,
    }


def _limit(rules: Protocol, max_dets: int | None) -> int:
    if rules.max_dets is None:
        return 0
    return rules.max_dets if max_dets is None else max_dets
