"""`DetectionDataset`: a split of a prepared dataset as samples for training or scoring.

Every random choice is drawn from (seed, epoch, index), none from a worker or a rank: the same epoch gives the same
samples however many processes load it, and after a resume.
"""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import AugmentConfig, Picture, areas_px, fit_hw, fit_scale, is_large_enough, pad, resize_to_fit
from data.batch import Batch, Sample, collate
from data.compose import compose
from data.decode import TooManyUnreadable, UndecodableImage, read_bgr
from data.image_cache import ImageCache
from data.sampler import GlobalBatchSampler, repeat_factors

__all__ = ["AugmentConfig", "Batch", "DetectionDataset", "GlobalBatchSampler", "Sample", "collate", "init_worker"]

# Of a split's images, while training; a score over fewer images would be another score.
MAX_UNREADABLE_SHARE = 0.001
# Names the files of cached pictures: `read_bgr` and `resize_to_fit` of another release may give other pixels.
PIXEL_RULE = f"bgr-area-opencv{cv2.__version__}"


class DetectionDataset(Dataset[Sample]):
    """Samples of `<root>/annotations/<split>.json`, in the order of that file.

    With `augment=None` a sample is the letterboxed picture: resized by min(S/H, S/W), top left, grey 114 around it.
    Otherwise it is what `compose` makes of it and, while `set_epoch` allows it, of others. Crowd boxes become ignore
    regions. Boxes no larger than 1 px a side in the input are left out and counted in `num_boxes_too_small`, over the
    whole split.

    With a `repeat_threshold`, `repeat_factors` says how often a sampler is to draw each image; index i + k N, for k
    below the largest factor, is the k-th repetition of image i, with random numbers of its own.

    Decoded pictures are kept at input size: in memory that this process shares with its loader processes (they have to
    be forked) if the split fits into `cache_bytes`; else in a file below `cache_folder`, which belongs to one dataset
    version, for all processes of the node and later runs; without a folder, as many as fit into memory.

    An image that cannot be read is an error with `augment=None`. Else the next one of the split that can be read takes
    its place, as sample or as part of one, and `unreadable` says so until the next epoch.

    Raises:
        FileNotFoundError: the split has no annotation file under `root`.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        input_size_px: int,
        augment: AugmentConfig | None,
        seed: int,
        repeat_threshold: float = 0.0,
        cache_bytes: int = 2**30,
        cache_folder: Path | None = None,
    ) -> None:
        path = root / "annotations" / f"{split}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: split {split!r} is missing. Prepare and materialise the dataset first")
        document = json.loads(path.read_bytes())
        self.input_size_px = input_size_px
        self.augment = augment
        self.seed = seed
        self.class_names = tuple(category["name"] for category in document["categories"])
        self.image_ids: list[int] = [image["id"] for image in document["images"]]
        self._paths = [root / "images" / image["file_name"] for image in document["images"]]
        self._hw: list[tuple[int, int]] = [(image["height"], image["width"]) for image in document["images"]]
        self._truths, self.num_boxes_too_small = self._read_truths(document)
        self.repeat_factors: npt.NDArray[np.float64] | None = None
        if repeat_threshold:
            labels = [labels.tolist() for _, labels, _ in self._truths]
            self.repeat_factors = repeat_factors(labels, len(self.class_names), repeat_threshold)
        # In shared memory, so that persistent loader processes see the next epoch, and this one what they could not
        # read: bool (N,).
        self._epoch_and_joins = torch.tensor([0, 1]).share_memory_()
        self.unreadable = torch.zeros(len(self._paths), dtype=torch.bool).share_memory_()
        sizes = [fit_hw(height, width, input_size_px) for height, width in self._hw]
        fits = sum(height * width * 3 for height, width in sizes) <= cache_bytes
        file = None if fits or cache_folder is None else cache_folder / f"{split}-{input_size_px}px-{PIXEL_RULE}.bin"
        self._cache = ImageCache(sizes, max_bytes=cache_bytes, path=file)

    def set_epoch(self, epoch: int, *, joins: bool) -> None:
        """Choose the epoch's random numbers, and whether pictures are joined; call before iterating a loader."""
        self._epoch_and_joins[0], self._epoch_and_joins[1] = epoch, int(joins)
        self.unreadable.zero_()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        num_indices = len(self) * (1 if self.repeat_factors is None else ceil(self.repeat_factors.max()))
        if not 0 <= index < num_indices:
            raise IndexError(f"image index {index} must be in 0..{num_indices - 1}")
        shown = index % len(self)
        if self.augment is None:
            picture = self._picture(shown)
            image = pad(picture.image, self.input_size_px)
        else:
            shown, first = self._next_readable(shown)
            picture = self._augmented(index, shown, first, self.augment)
            image = picture.image
        return Sample(
            # A view of (H, W, 3) memory: what `collate` turns into channels_last without a transposing copy.
            image=torch.from_numpy(image).permute(2, 0, 1),
            boxes_xyxy_px=torch.tensor(picture.boxes_xyxy_px),
            labels=torch.tensor(picture.labels),
            ignore_xyxy_px=torch.tensor(picture.ignore_xyxy_px),
            image_id=self.image_ids[shown],
            scale=fit_scale(*self._hw[shown], self.input_size_px),
            original_hw=self._hw[shown],
        )

    def unreadable_paths(self, unreadable: Tensor) -> list[Path]:
        """Return the files of the images that are true in bool (N,), such as `unreadable`, over one rank or several.

        Raises:
            TooManyUnreadable: they are more than MAX_UNREADABLE_SHARE of the split.
        """
        paths = [self._paths[index] for index in unreadable.nonzero().flatten().tolist()]
        if len(paths) > MAX_UNREADABLE_SHARE * len(self):
            named = ", ".join(str(path) for path in paths[:20]) + (", ..." if len(paths) > 20 else "")
            raise TooManyUnreadable(
                f"{len(paths)} of {len(self)} training images cannot be read, more than {MAX_UNREADABLE_SHARE:.1%}: "
                f"{named}. Replace these files and prepare the dataset again; if its source is sound, delete this "
                "node's copy of the dataset to have it fetched again"
            )
        return paths

    def _augmented(self, index: int, shown: int, first: Picture, config: AugmentConfig) -> Picture:
        """`first` is the picture `shown`; it is not read again."""
        epoch, joins = self._epoch_and_joins.tolist()
        return compose(
            shown,
            lambda other: first if other == shown else self._next_readable(other)[1],
            len(self),
            self.input_size_px,
            config,
            np.random.default_rng((self.seed, epoch, index)),
            joins=bool(joins),
        )

    def _next_readable(self, index: int) -> tuple[int, Picture]:
        """Return the first image from `index` on that can be read, around the end of the split, and its picture."""
        while True:
            if not self.unreadable[index]:
                try:
                    return index, self._picture(index)
                except (UndecodableImage, OSError):
                    self.unreadable[index] = True
                    self.unreadable_paths(self.unreadable)
            index = (index + 1) % len(self)

    def _picture(self, index: int) -> Picture:
        """Return the picture at input size, not yet padded; its arrays are shared and must not be written to."""
        image = self._cache.get(index)
        if image is None:
            original = read_bgr(self._paths[index])
            if original.shape[:2] != self._hw[index]:
                raise UndecodableImage(
                    f"{self._paths[index]}: is {original.shape[1]}x{original.shape[0]} px, its record says "
                    f"{self._hw[index][1]}x{self._hw[index][0]}. Prepare the dataset again"
                )
            image = resize_to_fit(original, self.input_size_px)
            self._cache.put(index, image)
        return Picture(image, *self._truths[index])

    def _read_truths(
        self, document: dict[str, Any]
    ) -> tuple[list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]], int]:
        """Boxes, labels and ignore regions of every image in input pixels, and how many boxes were too small."""
        labels = {category["id"]: label for label, category in enumerate(document["categories"])}
        rows: dict[int, list[tuple[list[float], int]]] = {image["id"]: [] for image in document["images"]}
        regions: dict[int, list[list[float]]] = {
            image["id"]: list(image["ignore_regions_xywh"]) for image in document["images"]
        }
        for annotation in document["annotations"]:
            if annotation["iscrowd"]:
                regions[annotation["image_id"]].append(annotation["bbox"])
            else:
                rows[annotation["image_id"]].append((annotation["bbox"], labels[annotation["category_id"]]))
        truths, num_too_small = [], 0
        for image_id, (height, width) in zip(self.image_ids, self._hw, strict=True):
            scale = fit_scale(height, width, self.input_size_px)
            boxes = _scaled_xyxy([box for box, _ in rows[image_id]], scale, self.input_size_px)
            keep = is_large_enough(boxes)
            num_too_small += int((~keep).sum())
            ignored = _scaled_xyxy(regions[image_id], scale, self.input_size_px)
            image_labels = np.array([label for _, label in rows[image_id]], np.int64)
            truths.append((boxes[keep], image_labels[keep], ignored[areas_px(ignored) > 0]))
        return truths, num_too_small


def init_worker(worker_id: int) -> None:
    """Pass to a DataLoader as `worker_init_fn`: one thread per process, for the processes are the parallelism."""
    del worker_id
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _scaled_xyxy(boxes_xywh_px: list[list[float]], scale: float, input_size_px: int) -> npt.NDArray[np.float32]:
    boxes = np.array(boxes_xywh_px, np.float64).reshape(-1, 4)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1) * scale
    return np.clip(corners, 0.0, input_size_px).astype(np.float32)
