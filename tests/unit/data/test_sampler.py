from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampler import GlobalBatchSampler, repeat_factors, scoring_batches


def _steps(
    world_size: int,
    *,
    num_images: int,
    batch: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    factors: npt.NDArray[np.float64] | None = None,
) -> list[list[list[int]]]:
    """Shares by step and rank."""
    ranks = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            num_images, global_batch=batch, rank=rank, world_size=world_size, seed=seed, repeat_factors=factors
        )
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


FACTORS = st.lists(st.floats(1, 7), min_size=1, max_size=40).map(np.array)


@given(FACTORS, st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_repeated_images_follow_one_order_too(
    factors: npt.NDArray[np.float64], world_size: int, seed: int, epoch: int
) -> None:
    """Whatever the number of ranks, and when resumed at any step with another number of them."""
    num_images = len(factors)
    batch = min(num_images, 6)
    world_size = min(world_size, batch)
    given_for_all = {"num_images": num_images, "batch": batch, "seed": seed, "epoch": epoch, "factors": factors}
    alone = [shares[0] for shares in _steps(1, **given_for_all)]  # type: ignore[arg-type]
    shared = _steps(world_size, **given_for_all)  # type: ignore[arg-type]
    assert [list(chain(*shares)) for shares in shared] == alone
    assert all(len(step) == batch for step in alone)
    resumed = _steps(world_size, first_step=len(alone) // 2, **given_for_all)  # type: ignore[arg-type]
    assert resumed == shared[len(alone) // 2 :]
    other_epoch = _steps(1, **given_for_all | {"epoch": epoch + 1})  # type: ignore[arg-type]
    assert len(other_epoch) == len(alone)
    seen = [index for step in alone for index in step]
    assert len(set(seen)) == len(seen)
    assert all(index // num_images < np.ceil(factors[index % num_images]) for index in seen)


@given(FACTORS)
def test_every_image_is_drawn_as_often_as_its_factor_says(factors: npt.NDArray[np.float64]) -> None:
    """In each epoch its factor rounded down or up (but for one index that may be left out), on average the factor."""
    num_images, epochs = len(factors), 60
    sampler = GlobalBatchSampler(num_images, global_batch=1, rank=0, world_size=1, seed=0, repeat_factors=factors)
    total = np.zeros(num_images)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn = np.array([index for step in sampler for index in step])
        assert len(drawn) == len(sampler) == int(np.sum(np.round(factors * 2**20)) / 2**20)
        counts = np.bincount(drawn % num_images, minlength=num_images)
        assert (counts <= np.ceil(factors)).all()
        assert np.maximum(np.floor(factors - 1e-6) - counts, 0).sum() <= 1
        total += counts
    # An index too many is left out of some epochs, any of them. Five standard deviations of a mean of counts that vary
    # by half.
    expected = factors * sampler.num_drawn / factors.sum()
    assert (abs(total / epochs - expected) <= 5 * 0.5 / epochs**0.5).all()


def test_factors_of_one_are_a_permutation() -> None:
    steps = _steps(1, num_images=12, batch=4, seed=0, epoch=0, factors=np.ones(12))
    assert sorted(np.ravel(steps).tolist()) == list(range(12))


def test_repeat_factors_by_hand() -> None:
    """Class 0 in all of four images, class 1 in one, class 2 in none; the fourth image has no objects of class 1."""
    factors = repeat_factors([[0, 0], [0, 1], [0], [0]], 3, threshold=0.5)
    np.testing.assert_allclose(factors, [1, 2**0.5, 1, 1])


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=20), st.floats(0, 1))
def test_repeat_factors_equal_a_loop(labels: list[list[int]], threshold: float) -> None:
    expected = []
    for image in labels:
        shares = [sum(label in other for other in labels) / len(labels) for label in image]
        expected.append(max([1.0, *((threshold / share) ** 0.5 for share in shares)]))
    np.testing.assert_allclose(repeat_factors(labels, 5, threshold), expected)


@given(st.integers(0, 90), st.integers(1, 12), st.integers(1, 9))
def test_scoring_batches_are_the_same_for_any_number_of_ranks(
    num_images: int, batch_size: int, world_size: int
) -> None:
    def shares(world_size: int) -> list[list[list[int]]]:
        return [
            scoring_batches(num_images, batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    together = list(chain(*shares(world_size)))
    assert together == shares(1)[0]
    assert list(chain(*together)) == list(range(num_images))
    assert all(len(batch) == batch_size for batch in together[:-1])
    assert all(together)
    sizes = [len(share) for share in shares(world_size)]
    assert max(sizes) - min(sizes) <= 1
