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
        none = targets.image_index.new_zeros(0)
        images, anchors, objects = [none], [none], [none]
        start = 0
        for image, count in enumerate(torch.bincount(targets.image_index, minlength=len(boxes_xyxy_px)).tolist()):
            if count:
                anchor_index, object_index = self._match(
                    boxes_xyxy_px[image],
                    predictions.objectness_logits[image],
                    predictions.class_logits[image],
                    predictions.grid_xy,
                    predictions.strides,
                    targets.boxes_xyxy_px[start : start + count].to(boxes_xyxy_px.dtype),
                    targets.labels[start : start + count],
                )
                images.append(torch.full_like(anchor_index, image))
                anchors.append(anchor_index)
                objects.append(object_index + start)
            start += count
        return Assignment(torch.cat(images), torch.cat(anchors), torch.cat(objects))

    def _match(
        self,
        boxes_xyxy_px: Tensor,
        objectness_logits: Tensor,
        class_logits: Tensor,
        grid_xy: Tensor,
        strides: Tensor,
        object_boxes_xyxy_px: Tensor,
        object_labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Match one image; return anchor_index and object_index, each (P,). Only candidates are scored."""
        candidates, preferred = self._geometry(grid_xy, strides, object_boxes_xyxy_px)
        if len(candidates) == 0:
            return candidates, candidates
        iou = sparse_iou(object_boxes_xyxy_px, boxes_xyxy_px[candidates])
        cost = class_cost(objectness_logits[candidates], class_logits[candidates], object_labels)
        cost -= IOU_COST_WEIGHT * (iou + 1e-8).log()
        cost += OUTSIDE_PENALTY[self.candidate_mode] * ~preferred
        owner = match_dynamic_k(cost, iou)
        positive = (owner >= 0).nonzero().squeeze(1)
        return candidates[positive], owner[positive]

    def _geometry(self, grid_xy: Tensor, strides: Tensor, object_boxes_xyxy_px: Tensor) -> tuple[Tensor, Tensor]:
        """Return the candidates int64 (N,), ascending, and which of them are preferred by which object (G, N)."""
        center, half_px = center_and_half(object_boxes_xyxy_px)

        def reach(stride: Tensor) -> Tensor:
            return (self.center_radius * stride).expand_as(half_px)

        objects, anchors = pairs_around(center, reach, grid_xy, strides, strict=True)
        everything = anchors
        if self.candidate_mode == "box_or_center":
            in_box = pairs_around(center, lambda _: half_px, grid_xy, strides, strict=True)
            everything = torch.cat((anchors, in_box[1]))
            both = torch.isin(objects * len(strides) + anchors, in_box[0] * len(strides) + in_box[1])
            objects, anchors = objects[both], anchors[both]
        candidates = everything.unique()
        preferred = torch.zeros(len(center), len(candidates), dtype=torch.bool, device=center.device)
        preferred[objects, torch.searchsorted(candidates, anchors)] = True
        return candidates, preferred


@dataclass(frozen=True)
class TaskAligned:
    """Task-aligned assignment (Feng et al. 2021, "TOOD", section 3.2) with the constants of YOLOv8.

    Each object takes, of the anchor points inside its box, the ten of highest p_class^0.5 IoU^6; an anchor point wanted
    by several objects goes to the one that it overlaps most. Ties go to the first. All images are assigned at once,
    over the pairs of an object and an anchor point inside it: there are few, and no (G, A) matrix arises.

    Differs from YOLOv8: a box narrower than the finest stride counts as one stride wide when anchor points inside it
    are looked for (likewise its height), because an object between four centres would never be learned.
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
        center, half_px = center_and_half(object_boxes_xyxy_px)
        half_px = half_px.clamp(min=predictions.strides[0] / 2)
        objects, anchors = pairs_around(
            center, lambda _: half_px, predictions.grid_xy, predictions.strides, strict=False
        )
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


def center_and_half(boxes_xyxy_px: Tensor) -> tuple[Tensor, Tensor]:
    """Return centres and half extents, (N, 2) in pixels each, of boxes (N, 4)."""
    top_left, bottom_right = boxes_xyxy_px.split(2, dim=1)
    return (top_left + bottom_right) / 2, (bottom_right - top_left) / 2


def pairs_around(
    center_xy_px: Tensor, half_px: Callable[[Tensor], Tensor], grid_xy: Tensor, strides: Tensor, *, strict: bool
) -> tuple[Tensor, Tensor]:
    """Return the pairs (object, anchor point) with the point no further from the centre than the half extent, per axis.

    Int64 (N,) each. `center_xy_px` (G, 2); `half_px` gives the half extents (G, 2) for the stride of a level; `strict`
    leaves out what lies on the edge. `grid_xy` (A, 2), `strides` (A,) of levels one after the other, each row by row.
    The anchors of an object ascend, and so do the objects of an anchor. The pairs are counted out, not searched for:
    no (G, A) matrix arises.
    """
    level_strides, counts = strides.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    objects, anchors = [], []
    for stride, first, last_xy in zip(level_strides, ends - counts, grid_xy[ends - 1], strict=True):
        half = half_px(stride)
        # Anchor points stand in the middle of their cells.
        low, high = (center_xy_px - half) / stride - 0.5, (center_xy_px + half) / stride - 0.5
        low, high = (low.floor() + 1, high.ceil() - 1) if strict else (low.ceil(), high.floor())
        low, high = low.clamp(min=0), torch.minimum(high, last_xy)
        extent = (high - low + 1).clamp(min=0).long()
        per_object = extent.prod(1)
        mine = torch.arange(len(center_xy_px), device=strides.device).repeat_interleave(per_object)
        within = torch.arange(len(mine), device=strides.device) - (per_object.cumsum(0) - per_object)[mine]
        row, column = within // extent[mine, 0], within % extent[mine, 0]
        corner = low.long()[mine]
        anchors.append(first + (corner[:, 1] + row) * (last_xy[0].long() + 1) + corner[:, 0] + column)
        objects.append(mine)
    return torch.cat(objects), torch.cat(anchors)


def sparse_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Return intersection over union (N, M) of boxes (N, 4) with boxes (M, 4), computed for those that meet alone."""
    ax1, ay1, ax2, ay2 = boxes_a.unsqueeze(1).unbind(2)
    bx1, by1, bx2, by2 = boxes_b.unbind(1)
    meet = (ax1 < bx2) & (bx1 < ax2) & (ay1 < by2) & (by1 < ay2)
    rows, columns = meet.nonzero().unbind(1)
    iou = boxes_a.new_zeros(meet.shape)
    iou[rows, columns] = aligned_iou(boxes_a[rows], boxes_b[columns])
    return iou


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


def class_cost(objectness_logits: Tensor, class_logits: Tensor, object_labels: Tensor) -> Tensor:
    """Return the cross entropy (G, N) of p = sqrt(p_class p_objectness) with each object's one-hot label.

    The sum over classes is BCE(p, onehot(g)) = sum_c -log(1 - p_c) + log(1 - p_g) - log p_g: one sum per
    candidate and one look-up per pair, instead of C terms per pair. Logarithms stop at -100.
    """
    p = (class_logits.sigmoid() * objectness_logits.sigmoid().unsqueeze(1)).sqrt()
    log_no = torch.log1p(-p).clamp(min=-100)
    log_yes = p.log().clamp(min=-100)
    return (log_no - log_yes).t()[object_labels] - log_no.sum(1)


def match_dynamic_k(cost: Tensor, iou: Tensor) -> Tensor:
    """Return the object that wins each candidate, or -1: int64 (N,), from `cost` and `iou` (G, N).

    Each object takes its k cheapest candidates, k being the sum of its ten best IoUs cut to an integer, at
    least 1. A candidate taken by several objects goes to the one for which it is cheapest.
    """
    num_candidates = cost.shape[1]
    most = min(MAX_POSITIVES_PER_OBJECT, num_candidates)
    k = iou.topk(most, dim=1).values.sum(1).long().clamp(1, most).unsqueeze(1)

    # One more than needed shows whether the k-th and the next are equal; top-k breaks such ties at will.
    values, taken = cost.topk(min(most + 1, num_candidates), dim=1, largest=False)
    following = k.clamp(max=values.shape[1] - 1)
    tied = ((values.gather(1, k - 1) == values.gather(1, following)) & (following == k)).squeeze(1)
    if tied.any():
        taken[tied] = cost[tied].argsort(dim=1, stable=True)[:, : taken.shape[1]]

    objects, slots = (torch.arange(taken.shape[1], device=k.device) < k).nonzero().unbind(1)
    candidates = taken[objects, slots]
    owner = torch.full((num_candidates,), -1, device=cost.device)
    owner[candidates] = objects
    contested = (torch.bincount(candidates, minlength=num_candidates) > 1).nonzero().squeeze(1)
    owner[contested] = cost[:, contested].argmin(dim=0)
    return owner
