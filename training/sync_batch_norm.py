"""Batch normalisation over the images of all workers, also on CPU, where torch has none.

Shapes: B images of this rank, C channels, H x W feature map, R ranks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that, while it trains, normalises by the images of all ranks of the default process group.

    Parameters, buffers and their names are those of `nn.BatchNorm2d`, and so is what it does in eval mode, with one
    rank or without a process group. Every rank must run it equally often, in the same order; a rank may have fewer
    images than another, or none. Gradients of weight and bias are this rank's share: their sum over ranks is wanted.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape, type and memory format.

        Raises:
            ValueError: all ranks together have a single value per channel.
        """
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, count = _statistics_of_all_ranks(input.detach())
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel over all ranks, got input {tuple(input.shape)}")
        if self.track_running_stats:
            self._keep(mean, var * (count / (count - 1)))
        normalised: Tensor = _Normalise.apply(input, self.weight, self.bias, mean, var, count, self.eps)
        return normalised

    @torch.no_grad()
    def _keep(self, mean: Tensor, unbiased_var: Tensor) -> None:
        running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        num_batches = cast(Tensor, self.num_batches_tracked).add_(1)
        share = 1.0 / float(num_batches) if self.momentum is None else self.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), share)
        running_var.lerp_(unbiased_var.to(running_var.dtype), share)


def convert(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with every `nn.BatchNorm2d` in it turned, in place, into one over the images of all ranks."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # It holds what its base holds, and no more.
            module.__class__ = SyncBatchNorm2d
    return model


def _statistics_of_all_ranks(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean (C,), biased variance (C,) and number of values per channel, of all ranks, at least in float32.

    Deviations are taken from each rank's own mean and combined as in Chan, Golub and LeVeque 1979, Eq. (2.1): a sum
    of squares less the square of the sum would cancel where the mean is large.
    """
    num_channels, num_values = x.shape[1], x.numel() // max(x.shape[1], 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    mine = torch.zeros(2 * num_channels + 1, dtype=dtype)
    if num_values:
        # Running statistics that are thrown away: they make the kernel give float32 for bfloat16.
        unused = torch.zeros(2, num_channels, dtype=dtype)
        mean, var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
        torch.cat((mean, var.mul_(num_values), mine.new_tensor([num_values])), out=mine)
    every = mine.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_single(every, mine)
    means, squares, counts = every.view(-1, len(mine)).split((num_channels, num_channels, 1), dim=1)
    count = float(counts.sum())
    mean = (means * counts).sum(0) / count
    squares = squares.addcmul((means - mean).square(), counts)
    return mean, squares.sum(0) / count, count


class _Normalise(Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are functions of x on all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: float,
        eps: float,
    ) -> Tensor:
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.count = count
        scale = inverse if weight is None else weight * inverse
        shift = mean * -scale if bias is None else bias.addcmul(mean, scale, value=-1)
        return _per_channel(x, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
        # Without the gradient of x the fused kernel ends with the two sums, over this rank's images.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inverse, True, 0.0, [False, True, True]
        )
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack((dbias, dweight))
            dist.all_reduce(sums)
            mean_dy, mean_dy_normal = sums.div_(ctx.count)
            # dx = scale * (dy - mean(dy) - normal * mean(dy * normal)), normal = (x - mean) * inverse
            scale = inverse if weight is None else weight * inverse
            slope = -scale * inverse * mean_dy_normal
            shift = -(scale * mean_dy + mean * slope)
            dx = _add_scaled(_per_channel(x, slope, shift), dy, scale)
        return dx, dweight if weight is not None else None, dbias if True else None, None, None, None, None


def _per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift."""
    if x.dtype == scale.dtype:
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))
    return torch.batch_norm(x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0, False)


def _add_scaled(out: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    if x.dtype == scale.dtype:
        return out.addcmul_(x, scale.view(1, -1, 1, 1))
    return out.add_(_per_channel(x, scale, torch.zeros_like(scale)))
