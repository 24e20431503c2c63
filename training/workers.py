"""The group of processes that train one model together; one process is a group, too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.spec import ComputeSpec

# Longer than any rank keeps the others waiting: rank 0 may fetch a dataset that they have.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Workers:
    """This process's place in the group. `device` is where its model lives."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls, compute: ComputeSpec, gpu: int) -> Workers:
        """Join the group that the environment describes, as torchrun sets it, with the node's GPU `gpu` if any."""
        # One compute thread per CPU asked for: more only fight each other on a shared node.
        torch.set_num_threads(max(1, int(compute.cpus_per_worker)))
        on_gpu = compute.gpus_per_worker > 0
        if on_gpu:
            torch.cuda.set_device(gpu)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
        return cls.current(on_gpu=on_gpu)

    @classmethod
    def current(cls, *, on_gpu: bool = False) -> Workers:
        """The group that torch.distributed was initialised with, or this process alone; on its GPU if asked for."""
        joined = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return cls(rank, world_size, device)

    def leave(self) -> None:
        """The others are done, too."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_all(self, values: Sequence[Tensor]) -> None:
        """Put into every tensor its element-wise sum over all ranks."""
        if self.world_size > 1:
            flat = self.sum(torch.cat([value.flatten() for value in values]))
            for value, summed in zip(values, flat.split([value.numel() for value in values]), strict=True):
                value.copy_(summed.view_as(value))

    def share_buffers(self, *modules: nn.Module) -> None:
        """Give every rank the buffers of rank 0: running statistics differ, for each rank sees its own images."""
        for buffer in (buffer for module in modules if self.world_size > 1 for buffer in module.buffers()):
            dist.broadcast(buffer, 0)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
