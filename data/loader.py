"""`DetectionDataset`: a split of a prepared dataset as samples for training or scoring.

Every random choice is drawn from (seed, epoch, image index), none from a worker or a rank: the same epoch gives the
same samples however many processes load it, and after a resume.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from data.augment import (
    AugmentConfig,
    Image,
    Picture,
    areas_px,
    fit_scale,
    flip,
    is_large_enough,
    mosaic,
    pad,
    resize_to_fit,
    shift_colour,
)
from data.batch import Batch, Sample, collate
from data.decode import UndecodableImage, read_bgr
from data.sampler import GlobalBatchSampler

__all__ = ["AugmentConfig", "Batch", "DetectionDataset", "GlobalBatchSampler", "Sample", "collate", "init_worker"]


class DetectionDataset(Dataset[Sample]):
    """Samples of `<root>/annotations/<split>.json`, in the order of that file.

    With `augment=None` a sample is the letterboxed picture: resized by min(S/H, S/W), top left, grey 114 around it.
    Otherwise it is, by chance, a mosaic (while `set_epoch` allows it) or the letterboxed picture, then flipped and
    colour-shifted. Crowd boxes become ignore regions. Boxes no larger than 1 px a side in the input are left out
    and counted in `num_boxes_too_small`, over the whole split.

    Decoded pictures are kept at input size in this process's memory, least recently used out first, up to
    `cache_bytes`.

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
        cache_bytes: int = 2**30,
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
        # In shared memory, so that persistent loader processes see the next epoch too.
        self._epoch_and_mosaic = torch.tensor([0, 1]).share_memory_()
        self._cache = _ImageCache(cache_bytes)

    def set_epoch(self, epoch: int, *, mosaic: bool) -> None:
        """Choose the epoch's random numbers, and whether it sees mosaics; call before iterating a loader."""
        self._epoch_and_mosaic[0], self._epoch_and_mosaic[1] = epoch, int(mosaic)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image index {index} must be in 0..{len(self) - 1}")
        picture = self._picture(index)
        picture = self._padded(picture) if self.augment is None else self._augmented(index, picture, self.augment)
        return Sample(
            # A view of (H, W, 3) memory: what `collate` turns into channels_last without a transposing copy.
            image=torch.from_numpy(picture.image).permute(2, 0, 1),
            boxes_xyxy_px=torch.tensor(picture.boxes_xyxy_px),
            labels=torch.tensor(picture.labels),
            ignore_xyxy_px=torch.tensor(picture.ignore_xyxy_px),
            image_id=self.image_ids[index],
            scale=fit_scale(*self._hw[index], self.input_size_px),
            original_hw=self._hw[index],
        )

    def _augmented(self, index: int, picture: Picture, config: AugmentConfig) -> Picture:
        epoch, allows_mosaic = self._epoch_and_mosaic.tolist()
        rng = np.random.default_rng((self.seed, epoch, index))
        if allows_mosaic and rng.random() < config.mosaic_probability:
            others = [self._picture(other) for other in rng.integers(len(self), size=3).tolist()]
            picture = mosaic([picture, *others], self.input_size_px, config, rng)
        else:
            picture = self._padded(picture)
        if rng.random() < config.flip_probability:
            picture = flip(picture)
        image = shift_colour(picture.image, config, rng)
        return Picture(image, picture.boxes_xyxy_px, picture.labels, picture.ignore_xyxy_px)

    def _padded(self, picture: Picture) -> Picture:
        image = pad(picture.image, self.input_size_px)
        return Picture(image, picture.boxes_xyxy_px, picture.labels, picture.ignore_xyxy_px)

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


class _ImageCache:
    """Least recently used images go first once their bytes exceed the limit."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._images: OrderedDict[int, Image] = OrderedDict()

    def get(self, index: int) -> Image | None:
        image = self._images.get(index)
        if image is not None:
            self._images.move_to_end(index)
        return image

    def put(self, index: int, image: Image) -> None:
        self._images[index] = image
        self._num_bytes += image.nbytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._images.popitem(last=False)[1].nbytes


def _scaled_xyxy(boxes_xywh_px: list[list[float]], scale: float, input_size_px: int) -> npt.NDArray[np.float32]:
    boxes = np.array(boxes_xywh_px, np.float64).reshape(-1, 4)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1) * scale
    return np.clip(corners, 0.0, input_size_px).astype(np.float32)
