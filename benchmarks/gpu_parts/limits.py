"""Clouds of no voxel, of one, and of very many; and a batch that does not fit into the GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from gpu_parts.bench import Bench, relative
from gpu_parts.rows import NO_GPU, Row, judged
from gpu_parts.steps import run_steps
from slidr.models.students import MINKUNETS
from slidr.models.voxelnet import VoxelNet
from slidr.sparse import SparseTensor
from slidr.training.loop import OutOfMemory


def edges(bench: Bench) -> Iterator[Row]:
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model = MINKUNETS[bench.size.student](1, 64, width=bench.size.width)
    none, one = torch.zeros(0, 4, dtype=torch.int32), torch.tensor([[0, 3, -5, 7]], dtype=torch.int32)
    yield _against_cpu(bench, "one voxel", model, one)
    yield _against_cpu(bench, "an empty cloud", model, none)
    cloud = bench.batch(1).coordinates
    moved = cloud + torch.tensor([1, 0, 0, 0], dtype=torch.int32)  # cloud 0 of the batch is empty
    yield _against_cpu(bench, "an empty cloud beside another", model, moved)
    yield _empty_voxelnet(bench)
    yield from _many(bench, model)


def _features(coordinates: Tensor) -> Tensor:
    drawn = np.random.default_rng(0).uniform(0, 100, (len(coordinates), 1))
    return torch.from_numpy(drawn.astype(np.float32))


def _pass(model: nn.Module, coordinates: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and the last layer's gradient of one pass in training mode."""
    model.to(device).train().zero_grad(set_to_none=True)
    out = model(SparseTensor(_features(coordinates).to(device), coordinates.to(device))).features
    weight = torch.linspace(-1, 1, 64, device=device)
    (out * weight).sum().backward()
    gradient = model.final.kernel.grad  # type: ignore[union-attr]
    return out.detach().cpu(), torch.zeros(0) if gradient is None else gradient.cpu()  # type: ignore[union-attr]


def _against_cpu(bench: Bench, what: str, model: nn.Module, coordinates: Tensor) -> Row:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _pass(model, coordinates, torch.device("cpu"))
    finite = all(bool(value.isfinite().all()) for value in expected)
    if not bench.gpu:
        return Row("edges", what, "error", 0.0 if finite else float("nan"), NO_GPU, state="ok" if finite else "wrong")
    model.load_state_dict(state)
    got = _pass(model, coordinates, bench.device)
    model.to("cpu").load_state_dict(state)
    errors = [relative(mine, right) for mine, right in zip(got, expected, strict=True)]
    return judged("edges", what, None, max(errors), 1e-3)


def _empty_voxelnet(bench: Bench) -> Row:
    """A batch of an empty cloud gives a map of zeros, and a gradient."""
    model = VoxelNet(4, 64).to(bench.device).train()
    features = torch.zeros(0, 4, device=bench.device)
    bev = model(features, torch.zeros(0, 4, dtype=torch.int32, device=bench.device), 1)
    bev.sum().backward()
    bev = bev.detach()
    right = tuple(bev.shape) == (1, 64, 128, 128) and float(bev.abs().sum()) == 0.0
    return Row(
        "edges",
        "an empty cloud, VoxelNet",
        note="a map of zeros" if right else f"got {tuple(bev.shape)}, sum {float(bev.abs().sum()):g}",
        state="ok" if right else "wrong",
        **bench.cells("yes" if right else "no"),
    )


def _many(bench: Bench, model: nn.Module) -> Iterator[Row]:
    """Very many voxels: finite, trained on, with the rows of any cloud that is a part of them."""
    many = bench.size.many_voxels
    coordinates = _sheet(many)
    model.to(bench.device)

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        features = _features(coordinates).to(bench.device)
        with bench.arithmetic("float32"):
            out = model.train()(SparseTensor(features, coordinates.to(bench.device))).features
        out.sum().backward()
        return out.detach()

    kept: list[Tensor] = []
    peak = bench.peak_bytes(lambda: kept.append(run()))
    finite = bool(kept[-1].isfinite().all()) and len(kept[-1]) == many
    kept.clear()
    took = bench.milliseconds(run, runs=3) if bench.gpu else None
    memory = "" if peak is None else f"{peak / 1e9:.1f} GB"
    yield Row(
        "edges",
        f"{many:,} voxels, forward and backward",
        "ms",
        None,
        took if bench.gpu else NO_GPU,
        note=", ".join(filter(None, ["finite" if finite else "not finite", memory])),
        state="ok" if finite else "wrong",
        values={"peak_bytes": peak},
    )


def _sheet(many: int) -> Tensor:
    """So many distinct voxels of a rolling surface: each with about as many neighbours as a scanned one."""
    side = int(np.ceil(many**0.5))
    x, y = (grid.ravel()[:many] for grid in np.mgrid[:side, :side])
    z = np.round(8 * np.sin(x / 37) + 8 * np.cos(y / 23))
    return torch.from_numpy(np.stack([np.zeros(many), x, y, z], 1).astype(np.int32))


def out_of_memory(bench: Bench) -> Iterator[Row]:
    """A batch that cannot fit: the error must say what to change, and the process must go on."""
    if not bench.gpu:
        yield Row("memory", "a batch beyond the memory", gpu=NO_GPU, state="skipped")
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated() + 2**30  # one GiB for the step
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        run_steps(bench, "float32", steps=1)
        found, right = "no error", False
    except OutOfMemory as error:
        found, right = str(error), "optim.batch_size" in str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    bench.free()
    losses = run_steps(bench, "bfloat16", steps=1).losses
    goes_on = len(losses) == 1 and losses[0] == losses[0]
    note = f"{found[:90]}; " + ("then trains again" if goes_on else "does not train afterwards")
    yield Row(
        "memory", "a batch beyond the memory", note=note, gpu="told", state="ok" if right and goes_on else "wrong"
    )
