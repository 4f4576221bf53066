"""Are the students right on the GPU? Features, gradients and norms' statistics against the CPU's float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gpu_parts.bench import Bench, Mode, relative
from gpu_parts.rows import NO_GPU, Row, judged
from slidr.models import minkunet as networks
from slidr.models.students import MINKUNETS
from slidr.models.voxelnet import VoxelNet
from slidr.sparse import SparseTensor, modules

LIMITS: dict[Mode, float] = {"float32": 1e-3, "bfloat16": 1e-2}
NOTE = "limit: twice the CPU's own"
# Channels in and out of a residual block at strides 1, 2, 4 and 8, as MinkUNet34C has them.
BLOCKS = ((128, 96), (128, 96), (192, 128), (384, 256))


@dataclass(frozen=True)
class Answer:
    """What one training-mode pass gives: features, the gradient of each parameter, running means and variances."""

    features: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]


Forward = Callable[[nn.Module, torch.device, torch.dtype], Tensor]


def answer(bench: Bench, build: Callable[[], nn.Module], forward: Forward, device: torch.device, mode: str) -> Answer:
    """One forward and backward pass; `mode` "float64" computes in it, "bfloat16" under autocast."""
    dtype = torch.float64 if mode == "float64" else torch.float32
    torch.manual_seed(0)
    model = build().to(device, dtype).train()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with torch.autocast(device.type, torch.bfloat16, mode == "bfloat16"):
        features = forward(model, device, dtype)
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal(features.shape)).to(device, dtype)
    (features.to(dtype) * direction).sum().backward()
    return Answer(
        features.detach().cpu(),
        {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None},
        {name: value.cpu() for name, value in model.named_buffers() if "running" in name},
    )


@dataclass(frozen=True)
class Errors:
    """Relative errors of one result: the CPU's own, the GPU's (None without one) and its worst tensor's name."""

    cpu: float
    gpu: float | None
    where: str


def compared(bench: Bench, build: Callable[[], nn.Module], forward: Forward) -> dict[tuple[Mode, str], Errors]:
    """Errors by mode ("float32", "bfloat16") and result ("features", "gradients", "statistics").

    The CPU's own error is what its float32 is off float64, and its bfloat16 off its float32. Rounding flips the
    sign of some inputs of every ReLU, so a gradient is off by about the root of that share, on any device.
    """
    cpu = torch.device("cpu")
    exact = answer(bench, build, forward, bench.device, "float64")
    reference = answer(bench, build, forward, cpu, "float32")
    found = {}
    for mode in LIMITS:
        own = (reference, exact) if mode == "float32" else (answer(bench, build, forward, cpu, mode), reference)
        got = answer(bench, build, forward, bench.device, mode) if bench.gpu else None
        for what in ("features", "gradients", "statistics"):
            of_cpu, _ = worst(getattr(own[0], what), getattr(own[1], what))
            of_gpu, where = (None, "") if got is None else worst(getattr(got, what), getattr(reference, what))
            found[mode, what] = Errors(of_cpu, of_gpu, where)
    return found


def rows_of(section: str, name: str, found: dict[tuple[Mode, str], Errors]) -> Iterator[Row]:
    """One row a mode and result; an error may reach the larger of the limit and twice the CPU's own."""
    for (mode, what), errors in found.items():
        limit = LIMITS[mode]
        allowed = max(limit, 2 * errors.cpu)
        notes = "; ".join(filter(None, [errors.where, NOTE if allowed > limit else ""]))
        gpu = NO_GPU if errors.gpu is None else errors.gpu
        # The CPU's own error is no fault, unless it is not a number.
        yield judged(section, f"{name}, {mode}: {what}", errors.cpu, gpu, allowed, notes)


def worst(got: Tensor | dict[str, Tensor], reference: Tensor | dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of any tensor, NaN above all, and that tensor's name."""
    if isinstance(got, Tensor) or isinstance(reference, Tensor):
        return relative(got, reference), ""  # type: ignore[arg-type]
    if got.keys() != reference.keys():
        return float("nan"), "other tensors"
    errors = {name: relative(got[name], reference[name]) for name in reference}
    name = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    return errors[name], f"worst: {name}"


def minkunet(bench: Bench) -> Iterator[Row]:
    batch, size = bench.batch(1), bench.size
    kind = MINKUNETS[size.student]

    def forward(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
        return model(SparseTensor(batch.features.to(device, dtype), batch.coordinates.to(device))).features

    name = f"{kind.__name__}, {len(batch.features):,} voxels"
    yield from rows_of("minkunet", name, compared(bench, lambda: kind(1, 64, width=size.width), forward))


def voxelnet(bench: Bench) -> Iterator[Row]:
    batch = bench.batch(1, "voxelnet")

    def forward(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
        return model(batch.features.to(device, dtype), batch.coordinates.to(device), 1)

    name = f"VoxelNet, {len(batch.features):,} voxels"
    yield from rows_of("voxelnet", name, compared(bench, lambda: VoxelNet(4, 64), forward))


def blocks(bench: Bench) -> Iterator[Row]:
    """Each kind of a MinkUNet's layers alone, so that an error cannot hide among flipped signs."""
    cloud = bench.batch(1)
    manager = SparseTensor(cloud.features, cloud.coordinates).manager
    cells = [cloud.coordinates]
    for level in range(3):
        stride = (2**level,) * 3
        manager.downsample(stride, (2, 2, 2))
        coarse = manager.coordinates((2 ** (level + 1),) * 3)
        cells.append(torch.cat([coarse[:, :1], coarse[:, 1:] // 2 ** (level + 1)], dim=1).int())
    share = 0.25 if bench.size.width < 1 else 1.0
    found: dict[tuple[Mode, str], Errors] = {}
    for level, channels in enumerate(BLOCKS):
        a, b = (networks.scaled(count, share) for count in channels)
        features = torch.from_numpy(np.random.default_rng(level).standard_normal((len(cells[level]), a)))

        def forward(
            model: nn.Module,
            device: torch.device,
            dtype: torch.dtype,
            features: Tensor = features,
            at: Tensor = cells[level],
        ) -> Tensor:
            return model(SparseTensor(features.to(device, dtype), at.to(device))).features

        def build(a: int = a, b: int = b) -> nn.Module:
            return networks.ResidualBlock(modules, a, b, 0.05)

        for key, errors in compared(bench, build, forward).items():
            named = Errors(errors.cpu, errors.gpu, f"{a} to {b} at stride {2**level}")
            found[key] = max(found.get(key, named), named, key=_badness)
    yield from rows_of("blocks", f"{len(BLOCKS)} residual blocks", found)


def _badness(errors: Errors) -> tuple[bool, float]:
    """Sorts by how far the GPU exceeds the CPU's own error; not a number is worst."""
    value = errors.cpu if errors.gpu is None else errors.gpu / max(errors.cpu, 1e-12)
    return value != value, value
