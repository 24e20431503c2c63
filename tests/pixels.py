"""What can be seen in a picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def pixels_of(path: Path, colour: str, tolerance: int = 24) -> int:
    """Number of pixels of about this `#rrggbb` colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (5, 3, 1)])
    return int((np.abs(cv2.imread(str(path)).astype(int) - wanted).max(axis=2) <= tolerance).sum())
