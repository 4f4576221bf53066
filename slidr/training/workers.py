"""What several training processes do together: ranks, collectives, and batch norm over all of them.

Works the same in one process, where there is no process group and every function is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slidr.shapes import Float, Int64


def rank() -> int:
    """This process's number among the workers, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many workers train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_workers(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value's mean over the workers. Every worker must call it with the same keys."""
    return {name: total / world_size() for name, total in sum_over_workers(values, device).items()}


def sum_over_workers(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value's sum over the workers. Every worker must call it with the same keys."""
    if world_size() == 1:
        return values
    names = sorted(values)
    # Gloo and NCCL both reduce float64; MPS has none, and no process group either.
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(names, packed.tolist(), strict=True))


def sum_counts(counts: Int64[Tensor, "*shape"], device: torch.device) -> Int64[Tensor, "*shape"]:
    """Elementwise sum over the workers, exact. Every worker must call it with the same shape."""
    if world_size() == 1:
        return counts
    total = counts.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(counts.device)


def gather_int(value: int, device: torch.device) -> list[int]:
    """Every worker's whole number, in rank order. Every worker must call it."""
    if world_size() == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return [int(part) for part in parts]


def gather_rows(rows: Float[Tensor, "M C"]) -> tuple[Float[Tensor, "A C"], int]:
    """The rows of every worker, in rank order, and the position of this worker's first row.

    Gradients flow back to every worker's rows (summed over the workers). Workers may hold different numbers of
    rows, none included, but every one of them must call.
    """
    if world_size() == 1:
        return rows, 0
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    return _GatherRows.apply(rows, sizes), sum(sizes[: rank()])


class _GatherRows(torch.autograd.Function):
    """All-gather of unequal numbers of rows, padded to the longest; its adjoint sums over the workers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        first = sum(ctx.sizes[: rank()])
        return total[first : first + ctx.sizes[rank()]], None


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch norm taking its statistics over all workers.

    PyTorch's own SyncBatchNorm runs on GPUs only; on CPUs `WorkersBatchNorm` does the same.
    """
    if world_size() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return _convert(module)


class WorkersBatchNorm(_BatchNorm):
    """Batch norm over the rows of all workers, on any device; in eval mode an ordinary batch norm."""

    def forward(self, rows: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
        if not self.training or world_size() == 1:
            return super().forward(rows)
        normalised, mean, variance, count = _Normalise.apply(rows, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            unbiased = variance * (count / (count - 1).clamp_min(1))
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(unbiased, momentum)
        if self.weight is None:
            return normalised
        shape = (1, -1, *([1] * (rows.dim() - 2)))
        return normalised * self.weight.view(shape) + self.bias.view(shape)

    def _check_input_dim(self, rows: Tensor) -> None:
        if rows.dim() < 2:
            raise ValueError(f"batch norm: expected (N, C, ...), got shape {tuple(rows.shape)}")


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) with statistics over all workers (Ioffe and Szegedy 2015, eq. 1-3).

    Local means and squared deviations are merged by Chan's formula, which keeps float32 accurate.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [d for d in range(rows.dim()) if d != 1]
        shape = (1, -1, *([1] * (rows.dim() - 2)))
        channels = rows.shape[1]
        local_count = rows.new_tensor([rows.numel() // channels])
        local_sum = rows.sum(over)
        local_mean = local_sum / local_count.clamp_min(1)
        local_squares = (rows - local_mean.view(shape)).square().sum(over)
        packed = torch.cat([local_count, local_mean, local_squares])
        parts = [torch.empty_like(packed) for _ in range(world_size())]
        dist.all_gather(parts, packed)
        stacked = torch.stack(parts)
        counts, means, squares = stacked[:, :1], stacked[:, 1 : channels + 1], stacked[:, channels + 1 :]
        count = counts.sum()
        mean = (counts * means).sum(0) / count.clamp_min(1)
        variance = (squares + counts * (means - mean).square()).sum(0) / count.clamp_min(1)
        inverse = (variance + eps).rsqrt()
        normalised = (rows - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(normalised, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        normalised, inverse, count = ctx.saved_tensors
        grad = grads[0]
        over = [d for d in range(grad.dim()) if d != 1]
        shape = (1, -1, *([1] * (grad.dim() - 2)))
        sums = torch.stack([grad.sum(over), (grad * normalised).sum(over)])
        dist.all_reduce(sums)
        means = (sums / count.clamp_min(1)).unbind()
        centred = grad - means[0].view(shape) - normalised * means[1].view(shape)
        return centred * inverse.view(shape), None


def _convert(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm) and not isinstance(module, WorkersBatchNorm):
        twin = WorkersBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        # The very same tensors, so that an optimizer built before still trains them.
        twin._parameters, twin._buffers = module._parameters, module._buffers
        twin.training = module.training
        return twin
    for name, child in module.named_children():
        setattr(module, name, _convert(child))
    return module
