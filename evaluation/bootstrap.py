"""Scores of resampled images without matching again: what became of a detection is the same in every sample.

An image that a sample draws twice counts as two. Detections of equal score keep the order that they have in the whole
set, so that the copies of one follow each other.

Legend: S samples, I images, A areas, T IoU thresholds, C classes, N detections.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.outcomes import RECALL_POINTS, Outcomes

Floats = NDArray[np.float64]
# Bounds memory, at 16 bytes for each image and sample and one for each object and sample. Much smaller is slower: the
# time for a detection hardly depends on the number of samples.
_BLOCK = 1024


class Resampled(NamedTuple):
    """AP and recall (S, A, T, C); NaN where the sample has no object of that class and area."""

    average_precision: Floats
    recall: Floats


def draw(groups: NDArray[np.int64], num_samples: int, seed: int) -> Floats:
    """How often each image is in each sample, (I, 1 + S); the first is the set itself, with every image once.

    A sample has as many groups as the set, drawn with replacement. `groups` (I,): images of equal numbers stay
    together. The samples of one seed are the same however many are asked for.
    """
    _, group_of = np.unique(groups, return_inverse=True)
    num_groups = 1 + int(group_of.max())
    drawn = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), num_samples)
    counts = np.concatenate([np.ones((1, num_groups)), drawn])[:, group_of]
    return np.ascontiguousarray(counts.T)


def resample(outcomes: Outcomes, weights: Floats, num_classes: int, *, all_points: bool) -> Resampled:
    """Score samples in which image i occurs `weights[i]` times; whole numbers (I, S).

    AP is the mean over `RECALL_POINTS`, or with `all_points` the area under the curve. Recall counts all detections
    that take part. Besides the result, memory is bounded by blocks of samples.
    """
    num_areas, num_thresholds, _ = outcomes.is_hit.shape
    num_images, num_samples = weights.shape
    scores = Resampled(*(np.full((num_samples, num_areas, num_thresholds, num_classes), np.nan) for _ in range(2)))
    is_counted: NDArray[np.bool_] = np.any(outcomes.is_counted, axis=1)
    for start in range(0, num_samples, _BLOCK):
        samples = slice(start, start + _BLOCK)
        block = np.ascontiguousarray(weights[:, samples])
        whole = block.astype(np.int64)
        for label, area in np.ndindex(num_classes, num_areas):
            is_truth = outcomes.is_scored[area] & (outcomes.truths.label == label)
            num_truths = _weight_of(_per_image(outcomes.truths.image[is_truth], num_images)[None], block)[0]
            rows = np.flatnonzero((outcomes.detections.label == label) & is_counted[area])
            found = _Walk(
                outcomes.detections.image[rows],
                outcomes.is_hit[area][:, rows],
                outcomes.is_counted[area][:, rows],
                num_truths,
            ).scores(block, whole, all_points)
            for values, new in zip(scores, found, strict=True):
                values[samples, area, :, label] = np.where(num_truths > 0, new, np.nan).T
    return scores


class _Walk(NamedTuple):
    """Detections of one class and area by descending score: `images` (N,), `is_hit` and `is_counted` (T, N).

    `num_truths` (S,): objects to be found.
    """

    images: NDArray[np.int64]
    is_hit: NDArray[np.bool_]
    is_counted: NDArray[np.bool_]
    num_truths: Floats

    def scores(self, weights: Floats, whole: NDArray[np.int64], all_points: bool) -> tuple[Floats, Floats]:
        """AP and recall (T, S), from the lowest score to the highest: then the best precision from there on is known.

        Samples lie side by side in memory: a step of all of them costs hardly more than that of one. `whole` are the
        weights as integers.
        """
        always: NDArray[np.bool_] = np.all(self.is_counted, axis=0)
        found, counted = self._totals(self.is_hit, weights), self._totals(always[None], weights)[0]
        num_truths = np.maximum(self.num_truths, 1)
        recall = found / num_truths
        # Counted at some thresholds only: few, and none without crowds in the view of all areas.
        sometimes = None if always.all() else self._totals(self.is_counted & ~always, weights)
        reached_by, first = _points_reached(num_truths.astype(np.int64))
        place = found.astype(np.int64) + first
        reached = reached_by.take(place)
        best, area = np.zeros_like(found), np.zeros_like(found)
        buffer, other, now = np.empty_like(found), np.empty_like(found), np.empty_like(reached)

        spans = self._spans()
        # Lists: an array's own items are slow to get one by one.
        of_image, whole_of_image = list(weights), list(whole)
        rows = list(zip(range(len(always)), self.images.tolist(), always.tolist(), strict=True))
        with np.errstate(invalid="ignore"):
            for row, image, is_always in reversed(rows):
                weight = of_image[image]
                for span in spans.get(row, ()):
                    best_here, step = best[span], buffer[span]
                    num_counted = counted if sometimes is None else np.add(counted, sometimes[span], out=other[span])
                    np.divide(found[span], num_counted, out=step)
                    # Where nothing has been drawn yet precision is 0 / 0, which fmax passes over.
                    np.fmax(best_here, step, out=best_here)
                    found[span] -= weight
                    # A hit that counts w times makes w steps, all at the precision after the last.
                    if all_points:
                        np.multiply(best_here, weight, out=step)
                    else:
                        place[span] -= whole_of_image[image]
                        reached_by.take(place[span], out=now[span], mode="clip")
                        np.multiply(best_here, np.subtract(reached[span], now[span], out=reached[span]), out=step)
                        reached[span] = now[span]
                    area[span] += step
                if is_always:
                    counted -= weight
                elif sometimes is not None:
                    sometimes[self.is_counted[:, row]] -= weight
        # Recall 0 is a point that no hit is needed for.
        return (area / num_truths if all_points else (area + best) / len(RECALL_POINTS)), recall

    def _totals(self, mask: NDArray[np.bool_], weights: Floats) -> Floats:
        """Weight of the detections that each row of a mask (K, N) names, (K, S)."""
        return _weight_of(np.array([_per_image(self.images[row], len(weights)) for row in mask]), weights)

    def _spans(self) -> dict[int, list[slice]]:
        """By detection, the ranges of thresholds at which it is a hit."""
        edges = np.diff(np.pad(self.is_hit.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        row, low = (edges == 1).nonzero()
        _, high = (edges == -1).nonzero()
        spans = defaultdict(list)
        for detection, *ends in zip(row.tolist(), low.tolist(), high.tolist(), strict=True):
            spans[detection].append(slice(*ends))
        return spans


def _points_reached(num_truths: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """How many of `RECALL_POINTS` are reached with 0 to all hits, for each sample in turn, and where each begins (S,).

    Compared as curves are read, hits / objects >= point: some points are not reached where whole numbers say so.
    """
    points = RECALL_POINTS[:, None]
    needed = np.maximum(np.floor(points * num_truths) - 1, 0).astype(np.int64)
    needed += sum((((needed + more) / num_truths < points).astype(np.int64) for more in range(3)), np.int64(0))
    lengths = np.diff(needed.T, axis=1, append=num_truths[:, None] + 1)
    numbers = np.tile(np.arange(1, len(points) + 1, dtype=np.uint8), len(num_truths))
    return np.repeat(numbers, lengths.ravel()), np.cumsum(num_truths + 1) - (num_truths + 1)


def _per_image(images: NDArray[np.int64], num_images: int) -> Floats:
    return np.bincount(images, minlength=num_images).astype(np.float64)


def _weight_of(counts: Floats, weights: Floats) -> Floats:
    """(K, S) from counts by image (K, I) and weights (I, S).

    Not by `@`: the threads of a BLAS go on spinning after each of many small products, and take the other cores.
    """
    total: Floats = np.einsum("ki,is->ks", counts, weights)
    return total
