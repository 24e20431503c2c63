"""Batch normalisation over the images of all ranks, also on CPU, where torch has none.

Shapes: B images of this rank, C channels, H x W feature map, R ranks.
"""

from __future__ import annotations

import time
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_exchange_s = {"forward": 0.0, "backward": 0.0}


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that, while it trains, normalises over the images of all ranks of the default process group.

    Parameters, buffers and their names are those of `nn.BatchNorm2d`, and so is what it does in eval mode, with one
    rank or without a process group. All ranks must run it equally often and in the same order, forward and backward;
    one may have fewer images than another. The gradients of weight and bias are this rank's share: add them up.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape, type and memory format.

        Raises:
            ValueError: this rank has nothing to normalise.
        """
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        if not input.numel():
            raise ValueError(f"an input of {tuple(input.shape)} has nothing to normalise; give every rank an image")
        mean, var, count = _statistics(input.detach())
        if self.track_running_stats:
            self._remember(mean, var * (count / (count - 1)))
        affine = (self.weight, self.bias) if self.affine else (torch.ones_like(mean), torch.zeros_like(mean))
        normalised: Tensor = _Normalise.apply(input, *affine, mean, var, self.eps, count)
        return normalised

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased_var: Tensor) -> None:
        num_batches = cast(Tensor, self.num_batches_tracked).add_(1)
        share = 1.0 / float(num_batches) if self.momentum is None else self.momentum
        cast(Tensor, self.running_mean).lerp_(mean, share)
        cast(Tensor, self.running_var).lerp_(unbiased_var, share)


def convert(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model, every `nn.BatchNorm2d` in it made one over the images of all ranks, in place.

    Parameters, buffers and training flags stay the very same.
    """
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # It holds what its base holds, and no more.
            module.__class__ = SyncBatchNorm2d
    return model


def taken_exchange_s() -> dict[str, float]:
    """Seconds that normalising on this worker's CPU spent on the others, in `forward` and `backward`, since asked."""
    taken = dict(_exchange_s)
    _exchange_s.update(dict.fromkeys(_exchange_s, 0.0))
    return taken


def _from_all_ranks(row: Tensor, part: Literal["forward", "backward"]) -> Tensor:
    """The rows (N,) of all ranks, (R, N), on every rank: half the rounds of an all-reduce, and sums in one order."""
    started = time.perf_counter()
    rows = row.new_empty(dist.get_world_size() * len(row))
    dist.all_gather_single(rows, row)
    _exchange_s[part] += time.perf_counter() - started
    return rows.view(-1, len(row))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean (C,) and biased variance (C,) over all ranks, at least in float32, and the number of values per channel.

    Every rank takes deviations from its own mean, which are put together as in Chan, Golub and LeVeque 1979: the mean
    of the squares less the square of the mean would cancel where the mean is large.
    """
    num_channels = x.shape[1]
    # As running statistics, which nobody reads, it makes the kernel give float32 for bfloat16.
    unused = torch.zeros(num_channels, dtype=torch.promote_types(x.dtype, torch.float32))
    mean, var = torch.batch_norm_update_stats(x, unused, unused, 0.0)
    row = torch.cat((mean, var, mean.new_full((1,), x.numel() // num_channels)))
    means, variances, counts = _from_all_ranks(row, "forward").split((num_channels, num_channels, 1), dim=1)
    count = float(counts.sum())
    share = counts / count
    mean = (means * share).sum(0)
    var = (means - mean).square_().add_(variances).mul_(share).sum(0)
    return mean, var, count


class _Normalise(Function):
    """Batch normalisation by `mean` and `var` (C,), which the x of all ranks has: `count` values per channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, count: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count = eps, count
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        # The kernel is slow where the two lie differently in memory.
        dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
        inverse = (var + ctx.eps).rsqrt_()
        # Not asked for the gradient of x, it ends with the sums of dy * (x - mean) * inverse and of dy, on this rank.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inverse, True, ctx.eps, (False, True, True)
        )
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = scale * (dy - mean(dy) - normal * mean(dy * normal)) with normal = (x - mean) * inverse: a
            # normalisation of x by the same statistics, and dy in scale.
            scale = weight * inverse
            sums = _from_all_ranks(torch.cat((dweight, dbias)), "backward").sum(0).view(2, -1)
            by, to = sums.mul_(scale / -ctx.count).unbind()
            dx = torch.batch_norm(x, by, to, mean, var, False, 0.0, ctx.eps, False)
            if x.dtype == scale.dtype:
                dx.addcmul_(dy, scale.view(-1, 1, 1))
            else:
                # Of the kernels that take bfloat16 and a float32 scale this is the fast one.
                dx.add_(torch.batch_norm(dy, weight, None, torch.zeros_like(mean), var, False, 0.0, ctx.eps, False))
        return dx, dweight, dbias, None, None, None, None
