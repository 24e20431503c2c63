"""What all procedural datasets share: the recipe, one picture with its labels, and where its randomness comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from data.problems import InvalidDataset, Problem

Split = Literal["train", "val", "test"]


class Recipe(BaseModel):
    """Everything a picture depends on beside its split and its index; `scenes` is what the pictures show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenes: Literal["aerial", "surface"]
    seed: int = Field(ge=0)
    image_size_px: int = Field(ge=128)
    num_images: dict[Split, int]
    low_contrast_share: float = Field(ge=0, le=1)


@dataclass(frozen=True)
class Scene:
    """A picture and its labels; all boxes in the image's own pixels, x2 and y2 exclusive.

    `image_bgr` (H, W, 3); `boxes_xyxy_px` (G, 4) tight around the visible object; `labels` (G,) index into the card's
    classes; `ignore_xyxy_px` (R, 4), regions whose content is not labelled.
    """

    image_bgr: npt.NDArray[np.uint8]
    boxes_xyxy_px: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    ignore_xyxy_px: npt.NDArray[np.float32]


def load_recipe(folder: Path) -> Recipe:
    """The recipe in `folder`/recipe.yaml. Raises OSError, yaml.YAMLError or, with every fault, InvalidDataset."""
    path = folder / "recipe.yaml"
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        remedy = f"Correct the recipe; its keys are: {', '.join(Recipe.model_fields)}"
        raise InvalidDataset(
            [Problem(path, None, _rule(detail), remedy) for detail in error.errors(include_url=False)]
        ) from error


def _rule(detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "recipe"
    # The input of a missing key is the whole recipe.
    return f"{key}: {detail['msg']}" + ("" if detail["type"] == "missing" else f", got {detail['input']!r}")


def picture_rng(recipe: Recipe, split: str, index: int) -> np.random.Generator:
    """The only source of randomness of picture number `index` of a split.

    Raises ValueError for an unknown split, IndexError for an index outside it.
    """
    splits = get_args(Split)
    if split not in splits:
        raise ValueError(f"UnknownSplit: '{split}' is not known. Known: {', '.join(splits)}")
    num_images = {name: recipe.num_images.get(name, 0) for name in splits}[split]
    if not 0 <= index < num_images:
        raise IndexError(f"image {index} is outside split '{split}'; the recipe gives it {num_images}, counted from 0")
    return np.random.default_rng(np.random.SeedSequence([recipe.seed, splits.index(split), index]))
