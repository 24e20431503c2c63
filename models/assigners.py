"""Assigners: which anchor point answers for which ground truth.

Shapes: B images, A anchor points, N candidates among them, G ground truths, C classes, P positives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .boxes import aligned_iou
from .heads import AnchorPredictions, DistributionPredictions
from .interface import Targets

CandidateMode = Literal["center", "box_or_center"]

MAX_POSITIVES_PER_OBJECT = 10
IOU_COST_WEIGHT = 3.0
# In strides; just above one, so that an object halfway between two anchor points has both of them inside.
NARROWEST = 1.01
# What a candidate outside the wanted region of this very object pays: more than any real cost.
OUTSIDE_PENALTY: dict[CandidateMode, float] = {"center": 1e6, "box_or_center": 1e5}


@dataclass(frozen=True)
class Assignment:
    """The positives of one batch, ordered by image, then anchor; an anchor occurs at most once per image.

    `image_index`, `anchor_index`, `object_index` (into the batch's `Targets`), each int64 (P,).
    """

    image_index: Tensor
    anchor_index: Tensor
    object_index: Tensor


@dataclass(frozen=True)
class SimOTA:
    """Simplified optimal transport assignment (Ge et al. 2021, section 2.3).

    `candidate_mode="center"`: candidates lie within `center_radius` strides (per axis) of an object's centre.
    `"box_or_center"`: the rule of the paper, inside a box or near its centre; preferred are those that are both.
    Ties go to the first anchor, and to the first object, so that the result does not depend on the device.
    """

    candidate_mode: CandidateMode
    center_radius: float

    @torch.no_grad()
    def __call__(self, predictions: AnchorPredictions, targets: Targets) -> Assignment:
        """Assign a batch, in the precision of the predictions: call it with autocast off."""
        boxes_xyxy_px = predictions.decoded_boxes_xyxy_px()
        object_boxes_xyxy_px = targets.boxes_xyxy_px.to(boxes_xyxy_px.dtype)
        objects, places, candidates = self._geometry(predictions, targets.image_index, object_boxes_xyxy_px)
        columns = torch.searchsorted(candidates, places)
        num_images, num_anchors = boxes_xyxy_px.shape[:2]
        images = candidates // num_anchors
        candidate_boxes_xyxy_px = boxes_xyxy_px.flatten(0, 1)[candidates]
        entropy = class_cost(
            predictions.objectness_logits.flatten()[candidates], predictions.class_logits.flatten(0, 1)[candidates]
        )
        preferred = objects * len(candidates) + columns

        def cost(objects: Tensor, columns: Tensor) -> Tensor:
            iou = aligned_iou(object_boxes_xyxy_px[objects], candidate_boxes_xyxy_px[columns])
            outside = ~torch.isin(objects * len(candidates) + columns, preferred)
            shape = -IOU_COST_WEIGHT * (iou + 1e-8).log()
            return entropy[columns, targets.labels[objects]] + shape + OUTSIDE_PENALTY[self.candidate_mode] * outside

        k = dynamic_k(object_boxes_xyxy_px, targets.image_index, candidate_boxes_xyxy_px, images, num_images)
        owner = match_cheapest(cost, k, objects, columns, targets.image_index, images, num_images)
        positive = (owner >= 0).nonzero().squeeze(1)
        return Assignment(images[positive], candidates[positive] % num_anchors, owner[positive])

    def _geometry(
        self, predictions: AnchorPredictions, image_index: Tensor, object_boxes_xyxy_px: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the preferred pairs of an object and a place, int64 (N,) each, and all candidates, int64 (N,).

        A place is image times A plus anchor; the candidates are the places, ascending, that any object may take.
        """
        grid_xy, strides = predictions.grid_xy, predictions.strides
        top_left, bottom_right = object_boxes_xyxy_px.split(2, dim=1)
        center = (top_left + bottom_right) / 2
        first_place = image_index * len(strides)

        def near(stride: Tensor) -> tuple[Tensor, Tensor]:
            return center - self.center_radius * stride, center + self.center_radius * stride

        objects, anchors = pairs_inside(near, grid_xy, strides)
        everything = places = first_place[objects] + anchors
        if self.candidate_mode == "box_or_center":
            in_box, box_anchors = pairs_inside(lambda _: (top_left, bottom_right), grid_xy, strides)
            everything = torch.cat((places, first_place[in_box] + box_anchors))
            both = torch.isin(objects * len(strides) + anchors, in_box * len(strides) + box_anchors)
            objects, places = objects[both], places[both]
        return objects, places, everything.unique()


@dataclass(frozen=True)
class TaskAligned:
    """Task-aligned assignment (Feng et al. 2021, "TOOD", section 3.2) with the constants of YOLOv8.

    Each object takes, of the anchor points inside its box, the ten of highest p_class^0.5 IoU^6; an anchor point wanted
    by several objects goes to the one that it overlaps most. Ties go to the first. All images are assigned at once,
    over the pairs of an object and an anchor point inside it: there are few, and no (G, A) matrix arises.

    Differs from YOLOv8: a box no wider than the finest stride counts as NARROWEST strides wide when anchor points
    inside it are looked for (likewise its height), because an object between four centres would never be learned.
    """

    num_positives: int = 10
    class_power: float = 0.5
    iou_power: float = 6.0

    @torch.no_grad()
    def __call__(self, predictions: DistributionPredictions, targets: Targets) -> tuple[Assignment, Tensor]:
        """Assign a batch: the positives, and the class score (P,) that each is to reach, 0..1.

        That score is the positive's alignment, scaled so that the best of an object gets the object's highest IoU.
        """
        boxes_xyxy_px = predictions.decoded_boxes_xyxy_px()
        object_boxes_xyxy_px = targets.boxes_xyxy_px.to(boxes_xyxy_px.dtype)
        top_left, bottom_right = object_boxes_xyxy_px.split(2, dim=1)
        center, least = (top_left + bottom_right) / 2, NARROWEST * predictions.strides[0] / 2
        corners = torch.minimum(top_left, center - least), torch.maximum(bottom_right, center + least)
        objects, anchors = pairs_inside(lambda _: corners, predictions.grid_xy, predictions.strides)
        images = targets.image_index[objects]
        iou = aligned_iou(object_boxes_xyxy_px[objects], boxes_xyxy_px[images, anchors])
        probability = predictions.class_logits[images, anchors, targets.labels[objects]].sigmoid()
        alignment = probability**self.class_power * iou**self.iou_power

        places = images * boxes_xyxy_px.shape[1] + anchors
        owned = rank_in_group(-alignment, objects) < self.num_positives
        contested = torch.bincount(places[owned], minlength=boxes_xyxy_px.shape[:2].numel())[places] > 1
        owned[contested] = rank_in_group(-iou[contested], places[contested]) == 0

        owned_pairs = owned.nonzero().squeeze(1)
        owned_pairs = owned_pairs[places[owned_pairs].argsort()]
        objects, alignment, iou = objects[owned_pairs], alignment[owned_pairs], iou[owned_pairs]
        best = _largest_per_object(alignment, objects, len(object_boxes_xyxy_px))
        scores = alignment / best.clamp(min=torch.finfo(best.dtype).tiny)
        scores *= _largest_per_object(iou, objects, len(object_boxes_xyxy_px))
        return Assignment(images[owned_pairs], anchors[owned_pairs], objects), scores


def pairs_inside(
    corners_xy_px: Callable[[Tensor], tuple[Tensor, Tensor]], grid_xy: Tensor, strides: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the pairs (object, anchor point) with the point inside the object's rectangle, not on its edge.

    Int64 (N,) each. `corners_xy_px` gives the low and high corners (G, 2) of the rectangles for the stride of a level.
    `grid_xy` (A, 2), `strides` (A,) of levels one after the other, each row by row. The anchors of an object ascend,
    and so do the objects of an anchor. The pairs are counted out, not searched for: no (G, A) matrix arises.
    """
    level_strides, counts = strides.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    objects, anchors = [], []
    for stride, first, last_xy in zip(level_strides, ends - counts, grid_xy[ends - 1], strict=True):
        # Anchor points stand in the middle of their cells.
        low, high = (corner / stride - 0.5 for corner in corners_xy_px(stride))
        low, high = (low.floor() + 1).clamp(min=0), torch.minimum(high.ceil() - 1, last_xy)
        extent = (high - low + 1).clamp(min=0).long()
        per_object = extent.prod(1)
        mine = torch.arange(len(extent), device=strides.device).repeat_interleave(per_object)
        within = torch.arange(len(mine), device=strides.device) - (per_object.cumsum(0) - per_object)[mine]
        row, column = within // extent[mine, 0], within % extent[mine, 0]
        corner = low.long()[mine]
        anchors.append(first + (corner[:, 1] + row) * (last_xy[0].long() + 1) + corner[:, 0] + column)
        objects.append(mine)
    return torch.cat(objects), torch.cat(anchors)


def pairs_within_images(image_a: Tensor, image_b: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Return all pairs of equal image, int64 (N,) each, of two lists whose images ascend; ordered by the first."""
    counts = torch.bincount(image_b, minlength=num_images)
    starts = counts.cumsum(0) - counts
    per_a = counts[image_a]
    first = torch.arange(len(image_a), device=image_a.device).repeat_interleave(per_a)
    within = torch.arange(len(first), device=image_a.device) - (per_a.cumsum(0) - per_a)[first]
    return first, starts[image_a[first]] + within


def dynamic_k(
    boxes: Tensor, box_images: Tensor, candidates: Tensor, candidate_images: Tensor, num_images: int
) -> Tensor:
    """Return how many candidates each object takes, int64 (G,): the sum of its ten best IoUs cut to an integer, or 1.

    `boxes` (G, 4) and `candidates` (N, 4) come with their images, which ascend. IoU is computed where boxes meet alone.
    """
    best = boxes.new_zeros(len(boxes), MAX_POSITIVES_PER_OBJECT)
    per_image = [torch.bincount(images, minlength=num_images).tolist() for images in (box_images, candidate_images)]
    objects, columns = [box_images.new_zeros(0)], [box_images.new_zeros(0)]
    start = candidate_start = 0
    for count, candidate_count in zip(*per_image, strict=True):
        ax1, ay1, ax2, ay2 = boxes[start : start + count].unsqueeze(1).unbind(2)
        bx1, by1, bx2, by2 = candidates[candidate_start : candidate_start + candidate_count].t().contiguous()
        meeting = ((ax1 < bx2) & (bx1 < ax2) & (ay1 < by2) & (by1 < ay2)).nonzero()
        objects.append(meeting[:, 0] + start)
        columns.append(meeting[:, 1] + candidate_start)
        start, candidate_start = start + count, candidate_start + candidate_count
    index = torch.cat(objects)
    iou = aligned_iou(boxes[index], candidates[torch.cat(columns)])
    rank = rank_in_group(-iou, index)
    among_best = rank < MAX_POSITIVES_PER_OBJECT
    best[index[among_best], rank[among_best]] = iou[among_best]
    return best.sum(1).long().clamp(min=1)


def match_cheapest(
    cost: Callable[[Tensor, Tensor], Tensor],
    k: Tensor,
    objects: Tensor,
    columns: Tensor,
    object_images: Tensor,
    candidate_images: Tensor,
    num_images: int,
) -> Tensor:
    """Return the object that wins each candidate, or -1: int64 (N,).

    Each object takes its `k` (G,) cheapest candidates. A candidate taken by several goes to the object of its image for
    which it is cheapest, be it one that did not take it. `cost(objects, columns)` prices pairs. `objects` and `columns`
    are those to look at first: each costs its object less than any other pair, so that the others matter only
    to an object with fewer than k of them.
    """
    short = torch.bincount(objects, minlength=len(k)) < k
    in_need = short.nonzero().squeeze(1)
    rows, row_columns = pairs_within_images(object_images[in_need], candidate_images, num_images)
    enough = ~short[objects]
    objects, columns = torch.cat((objects[enough], in_need[rows])), torch.cat((columns[enough], row_columns))
    taken = rank_in_group(cost(objects, columns), objects) < k[objects]
    objects, columns = objects[taken], columns[taken]

    owner = torch.full_like(candidate_images, -1)
    owner[columns] = objects
    contested = (torch.bincount(columns, minlength=len(owner)) > 1).nonzero().squeeze(1)
    rivals, where = pairs_within_images(object_images, candidate_images[contested], num_images)
    cheapest = rank_in_group(cost(rivals, contested[where]), where) == 0
    owner[contested[where[cheapest]]] = rivals[cheapest]
    return owner


def rank_in_group(keys: Tensor, groups: Tensor) -> Tensor:
    """Return for each key (N,) how many of its group (N,) come before it, the lowest first: int64 (N,); stable."""
    order = keys.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    in_order = groups[order]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(in_order, in_order)
    return ranks


def _largest_per_object(values: Tensor, object_index: Tensor, num_objects: int) -> Tensor:
    """Return for each value (P,) the largest among those of its object."""
    largest = values.new_zeros(num_objects).scatter_reduce_(0, object_index, values, "amax")
    return largest[object_index]


def class_cost(objectness_logits: Tensor, class_logits: Tensor) -> Tensor:
    """Return the cross entropy (N, C) of p = sqrt(p_class p_objectness) with the one-hot label of each class.

    The sum over classes is BCE(p, onehot(g)) = sum_c -log(1 - p_c) + log(1 - p_g) - log p_g: one sum per
    candidate and one term per class, instead of C terms per pair. Logarithms stop at -100.
    """
    p = (class_logits.sigmoid() * objectness_logits.sigmoid().unsqueeze(1)).sqrt()
    log_no = torch.log1p(-p).clamp(min=-100)
    log_yes = p.log().clamp(min=-100)
    return log_no - log_yes - log_no.sum(1, keepdim=True)
