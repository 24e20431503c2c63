"""The one way this project turns an image file into pixels, for training, scoring and prediction alike."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from cv2.typing import MatLike

# As stored: COCO tools record sizes and boxes in the frame of the pixels, not of a viewer that turns the picture.
_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


class UndecodableImage(ValueError):
    """An image file whose bytes are truncated, damaged or of an unknown type."""


class TooManyUnreadable(RuntimeError):
    """More of a split's training images cannot be read than a training does without."""


def read_bgr(path: Path) -> MatLike:
    """Return the image as uint8 BGR (H, W, 3), without applying an EXIF rotation.

    Raises:
        FileNotFoundError: there is no such file.
        UndecodableImage: it cannot be decoded to its end.
    """
    encoded = np.fromfile(path, np.uint8)
    image = cv2.imdecode(encoded, _FLAGS) if encoded.size else None
    if image is None:
        raise UndecodableImage(f"{path}: truncated, damaged or not an image. Replace the file")
    return image
