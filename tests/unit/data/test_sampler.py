from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampler import GlobalBatchSampler


def _steps(
    world_size: int, *, num_images: int, batch: int, seed: int, epoch: int, first_step: int = 0
) -> list[list[list[int]]]:
    """Shares by step and rank."""
    ranks = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(num_images, global_batch=batch, rank=rank, world_size=world_size, seed=seed)
        sampler.set_epoch(epoch, first_step=first_step)
        steps = list(sampler)
        assert len(steps) == len(sampler)
        ranks.append(steps)
    return [list(shares) for shares in zip(*ranks, strict=True)]


@given(st.integers(1, 80), st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_the_ranks_together_follow_one_order(
    num_images: int, batch: int, world_size: int, seed: int, epoch: int
) -> None:
    if world_size > batch or batch > num_images:
        with pytest.raises(ValueError, match="global batch"):
            GlobalBatchSampler(num_images, global_batch=batch, rank=0, world_size=world_size, seed=seed)
        return
    alone = _steps(1, num_images=num_images, batch=batch, seed=seed, epoch=epoch)
    shared = _steps(world_size, num_images=num_images, batch=batch, seed=seed, epoch=epoch)
    assert [list(chain(*shares)) for shares in shared] == [shares[0] for shares in alone]
    for shares in shared:
        sizes = [len(share) for share in shares]
        assert sum(sizes) == batch
        assert max(sizes) - min(sizes) <= 1
    seen = [index for shares in alone for index in shares[0]]
    dropped = GlobalBatchSampler(num_images, global_batch=batch, rank=0, world_size=1, seed=seed).num_dropped
    assert len(set(seen)) == len(seen) == num_images - dropped
    assert 0 <= dropped < batch


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = {
        tuple(np.ravel(_steps(1, num_images=30, batch=30, seed=seed, epoch=epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_resumes_within_an_epoch() -> None:
    whole = _steps(2, num_images=50, batch=8, seed=3, epoch=2)
    assert _steps(2, num_images=50, batch=8, seed=3, epoch=2, first_step=4) == whole[4:]


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_outside_the_world(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} must be in 0..1"):
        GlobalBatchSampler(10, global_batch=4, rank=rank, world_size=2, seed=0)
