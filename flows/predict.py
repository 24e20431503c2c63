"""What a model finds on any pictures, by the code that scores it.

A registered model is detected with by this checkout's evaluation code, after its digest was checked, as `speck
evaluate` does; tests hold the packaged model, which servers run, to the same detections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import cv2
import torch
from cv2.typing import MatLike

from data.batch import Batch, Sample, collate
from data.decode import UndecodableImage, read_bgr
from data.headers import read_header
from data.label_files import UnreadableFile
from data.pictures import files_below, is_picture
from data.tiled_pictures import PictureTile, tile_sample
from data.tiling import Tile
from data.whole_file import write_whole
from evaluation.checks import CocoDetection
from evaluation.detector import detect
from evaluation.drawing import draw_detections
from evaluation.tiles import merge_tiles
from models.interface import Detector
from training.scoring import SCORING_BATCH, load_model, postprocess_config, score_options
from training.spec import RunSpec
from training.workers import Workers

NEWS_EVERY_PICTURES = 50


class BadPictures(ValueError):
    """Pictures that are not there or cannot be told apart, or none of which can be read."""


class Picture(NamedTuple):
    """A file, what it is called in the results, and its id there."""

    image_id: int
    file_name: str
    path: Path


@dataclass(frozen=True)
class Predicted:
    """COCO results by picture and descending score; `images` that were read, `unreadable` ones with the reason."""

    images: list[dict[str, Any]]
    detections: list[CocoDetection]
    unreadable: dict[str, str]


def find_pictures(
    paths: Sequence[Path], ids_of: Path | None, say: Callable[[str], object] = lambda _: None
) -> list[Picture]:
    """The files among `paths` and the pictures below the folders, which are called by their path within the folder.

    Ids count from 1; or they are those of the COCO file `ids_of`. `say` is told how many pictures are left out because
    it does not name them, how many of its own are not there, and how many files of folders are no pictures.

    Raises:
        BadPictures: a path does not exist, there is no picture, two have one name, or `ids_of` is no COCO file.
    """
    found, drawn = dict[str, Path](), dict[str, Path]()
    for path in paths:
        if path.is_dir():
            below = list(files_below(path))
            files = {name: path / name for name in below if is_picture(name)}
            if len(files) < len(below):
                say(f"{len(below) - len(files)} of {len(below)} files in {path} are no pictures by their names")
        elif path.exists():
            files = {path.name: path}
        else:
            raise BadPictures(f"{path} does not exist; give pictures, or folders of them")
        for name, file in files.items():
            if (shown := _drawn_name(name)) in drawn:
                raise BadPictures(
                    f"{drawn[shown]} and {file} would both be {shown!r} in the results; predict them in two runs"
                )
            found[name] = drawn[shown] = file
    ids = {name: number for number, name in enumerate(found, 1)} if ids_of is None else _ids(ids_of)
    if pictures := [Picture(ids[name], name, path) for name, path in found.items() if name in ids]:
        if len(pictures) < len(found):
            say(f"{len(found) - len(pictures)} of {len(found)} pictures are left out: {ids_of} does not name them")
        if len(pictures) < len(ids):
            say(f"{len(ids) - len(pictures)} of {len(ids)} pictures in {ids_of} are missing: a score counts them")
        return pictures
    among = f" of {len(found)} has a name that is in {ids_of}" if found else f" in {', '.join(map(str, paths))}"
    raise BadPictures(f"no picture{among}; give pictures, or folders of them")


def predict(
    spec: RunSpec, weights: Path, pictures: Sequence[Picture], say: Callable[[str], object] = lambda _: None
) -> Predicted:
    """What the spec's detector finds on pictures under the spec's rules of scoring. `say` is told of the progress.

    Raises:
        BadPictures: none of them can be read.
        UnfitWeights: see `load_model`.
    """
    device = Workers.current(on_gpu=torch.cuda.is_available()).device
    model = load_model(spec, weights).to(device)
    options = score_options(spec)
    predicted, tiles = Predicted([], [], {}), list[PictureTile]()

    def samples() -> Iterator[Sample]:
        for number, picture in enumerate(pictures, 1):
            try:
                pixels = _read(picture.path)
            except (UnreadableFile, UndecodableImage, OSError) as error:
                predicted.unreadable[picture.file_name] = str(error)
                continue
            height, width = pixels.shape[:2]
            predicted.images.append(
                {"id": picture.image_id, "file_name": picture.file_name, "width": width, "height": height}
            )
            whole = (Tile(0, 0, width, height),)
            for tile in whole if options.tiling is None else options.tiling.tiles(width, height):
                tiles.append(PictureTile(picture.image_id, tile))
                yield tile_sample(pixels, tile, options.input_size_px, len(tiles) - 1)
            if number % NEWS_EVERY_PICTURES == 0:
                say(f"{number}/{len(pictures)} pictures")

    detected = detect(
        cast(Detector, model),
        _batches(samples()),
        postprocess_config(spec),
        device=device,
        bf16=spec.training.precision == "bf16",
        flip=options.flip,
    )
    if not predicted.images:
        name, reason = next(iter(predicted.unreadable.items()))
        raise BadPictures(f"none of {len(pictures)} pictures can be read; {name}: {reason}")
    merged = merge_tiles(detected, tiles, max_detections=options.max_detections)
    predicted.detections.extend(merged.detections)
    return predicted


def write_predictions(
    predicted: Predicted, pictures: Sequence[Picture], class_names: Sequence[str], shown_score: float, out: Path
) -> None:
    """Write `detections.json`, `images.json` and, with boxes from `shown_score` on, `pictures/` into the folder `out`.

    `detections.json` is in COCO's form of results, with all scores; `images.json` in that of annotations, without any.
    """
    out.mkdir(parents=True, exist_ok=True)
    named = dict(enumerate(class_names, 1))
    categories = [{"id": category_id, "name": name} for category_id, name in named.items()]
    document = {"images": predicted.images, "annotations": [], "categories": categories}
    write_whole(out / "images.json", json.dumps(document, allow_nan=False))
    write_whole(out / "detections.json", json.dumps(predicted.detections, allow_nan=False))
    shown: dict[int, list[CocoDetection]] = {}
    for detection in predicted.detections:
        if detection["score"] >= shown_score:
            shown.setdefault(detection["image_id"], []).append(detection)
    path_of = {picture.image_id: picture.path for picture in pictures}
    for image in predicted.images:
        drawn = draw_detections(read_bgr(path_of[image["id"]]), shown.get(image["id"], []), named)
        path = out / "pictures" / _drawn_name(image["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), drawn):
            raise OSError(f"could not write {path}: is the disk full?")


def _drawn_name(name: str) -> str:
    """What a picture is called once boxes are drawn into it: a file of any name may be one."""
    return name if is_picture(name) else f"{name}.png"


def _read(path: Path) -> MatLike:
    # The header first: a small file that would unfold into gigabytes is never decoded.
    read_header(path)
    return read_bgr(path)


def _batches(samples: Iterable[Sample]) -> Iterator[Batch]:
    rest = iter(samples)
    while part := list(islice(rest, SCORING_BATCH)):
        yield collate(part)


def _ids(coco: Path) -> dict[str, int]:
    try:
        return {image["file_name"]: int(image["id"]) for image in json.loads(coco.read_bytes())["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BadPictures(f"{coco} must be a COCO file whose images have file_name and id: {error!r}") from None
