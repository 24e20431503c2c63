"""One of three processes that score together: `python scoring_worker.py RANK FOLDER`.

FOLDER/job.json names the specs and their datasets. Scored alone, by the first two and by all three.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.interface import AnchorScores, Detections, PostprocessConfig
from training.scoring import score_split
from training.spec import RunSpec
from training.state import build_model
from training.workers import Workers


class DependsOnTheBatch(nn.Module):
    """A detector that sees each picture in the light of the whole batch, as rounding does on some machines only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.strides = self.model.strides

    def forward(self, images: Tensor) -> Any:
        return self.model(images * (1 + images.float().mean() / 255))

    def postprocess(self, predictions: Any, config: PostprocessConfig) -> list[Detections]:
        found: list[Detections] = self.model.postprocess(predictions, config)
        return found

    def anchor_scores(self, predictions: Any) -> AnchorScores:
        scores: AnchorScores = self.model.anchor_scores(predictions)
        return scores


def score_all(folder: Path, workers: Workers) -> dict[str, Any]:
    """Detections and counts of an untrained model, by name of the spec; None on all ranks but 0."""
    found: dict[str, Any] = {}
    for name, (spec, dataset) in json.loads((folder / "job.json").read_text()).items():
        torch.manual_seed(3)
        loaded = RunSpec.model_validate(spec)
        scored = score_split(loaded, DependsOnTheBatch(build_model(loaded)), Path(dataset), "test", workers)
        if scored is None:
            found[name] = None
            continue
        result = scored.result
        found[name] = (scored.detections, result.counts, result.metrics, asdict(scored.foreground))
    return found


def score_together(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Score as one of `world_size`."""
    store = f"file://{folder}/rendezvous_{world_size}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world_size)
    try:
        return score_all(folder, Workers.current())
    finally:
        dist.destroy_process_group()


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for world_size in (2, 3):
        if rank < world_size:
            score_together(rank, world_size, folder)


if __name__ == "__main__":
    main()
