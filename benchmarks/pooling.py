"""Pools the pixels of a batch into superpixels: the project's segment means beside sparse one-hot matrices.

    python benchmarks/pooling.py [--frames 4] [--threads 1] [--device cpu]

Prints a table and writes results/pooling.json. Both arms run in this one process, interleaved, on the same
values; their results are compared before their times. Peak memory is measured in a fresh process for each
arm.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slidr.ops.pooling import map_segment_mean

Pool = Callable[[Tensor, Tensor, int], Tensor]


def segment_means(maps: Tensor, labels: Tensor, segments: int) -> Tensor:
    """What the losses call."""
    return map_segment_mean(maps, labels, segments)[0].reshape(-1, maps.shape[1])


def sparse_one_hot(maps: Tensor, labels: Tensor, segments: int) -> Tensor:
    """The same means as a sparse (superpixel, pixel) matrix times the permuted maps."""
    batch, channels = maps.shape[:2]
    offset = torch.arange(batch, device=maps.device)[:, None, None] * segments
    segment = (labels + offset).reshape(-1)
    entries = torch.stack([segment, torch.arange(len(segment), device=maps.device)])
    ones = torch.ones(len(segment), device=maps.device)
    shape = (batch * segments, len(segment))
    one_hot = torch.sparse_coo_tensor(entries, ones, shape, check_invariants=False)
    sums = one_hot @ maps.permute(0, 2, 3, 1).reshape(-1, channels)
    counts = torch.sparse.sum(one_hot, 1).to_dense()
    return sums / counts.clamp(min=1)[:, None]


ARMS: dict[str, Pool] = {"segment means": segment_means, "sparse one-hot": sparse_one_hot}


def inputs(frames: int, size: tuple[int, int], channels: int, segments: int, device: str) -> tuple[Tensor, Tensor]:
    """Random maps of six images a frame, and label maps of cells around random centres, like superpixels."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: size[0], : size[1]]
    labels = []
    for _ in range(frames * 6):
        centres = rng.uniform(0, 1, (segments, 2)) * size
        squares = [(rows - r) ** 2 + (columns - c) ** 2 for r, c in centres]
        labels.append(np.argmin(np.stack(squares), axis=0))
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(frames * 6, channels, *size, generator=generator)
    return maps.to(device), torch.from_numpy(np.stack(labels)).to(device)


def timed(pool: Pool, maps: Tensor, labels: Tensor, segments: int) -> tuple[float, float, Tensor, Tensor]:
    """Seconds of the forward and of the backward pass, the means, and the maps' gradient."""
    leaf = maps.detach().requires_grad_()
    start = _now(maps.device)
    means = pool(leaf, labels, segments)
    middle = _now(maps.device)
    means.backward(means.detach())
    end = _now(maps.device)
    assert leaf.grad is not None
    return middle - start, end - middle, means.detach(), leaf.grad


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(arguments: argparse.Namespace, arm: str) -> float:
    """GB that one forward and backward pass needs above its inputs, in a fresh process."""
    command = [sys.executable, __file__, "--peak-of", arm]
    for name in ("frames", "height", "width", "channels", "segments", "threads", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(arguments: argparse.Namespace, maps: Tensor, labels: Tensor) -> None:
    """The child's part of `peak_memory`."""

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if maps.is_cuda else _resident_peak()

    before = peak()
    timed(ARMS[arguments.peak_of], maps, labels, arguments.segments)
    print((peak() - before) / 1e9)


def _resident_peak() -> int:
    """Bytes; Linux counts KiB here, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4, help="keyframes, six images each")
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--width", type=int, default=416)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--segments", type=int, default=115, help="superpixels of an image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/pooling.json"))
    parser.add_argument("--peak-of", choices=list(ARMS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    # First, while this process is small: on Linux a child's peak starts at its parent's.
    peaks = {} if arguments.peak_of is not None else {arm: peak_memory(arguments, arm) for arm in ARMS}
    size = (arguments.height, arguments.width)
    maps, labels = inputs(arguments.frames, size, arguments.channels, arguments.segments, arguments.device)
    if arguments.peak_of is not None:
        print_peak(arguments, maps, labels)
        return

    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for _ in range(arguments.repeats):
        results = {}
        for arm, pool in ARMS.items():
            forward, backward, means, gradient = timed(pool, maps, labels, arguments.segments)
            times[arm].append((forward, backward))
            results[arm] = (means, gradient)
        for ours, theirs in zip(*results.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        del results, means, gradient, ours, theirs

    table = {
        arm: {
            "forward_s": statistics.median(forward for forward, _ in pairs),
            "backward_s": statistics.median(backward for _, backward in pairs),
            "peak_memory_gb": peaks[arm],
        }
        for arm, pairs in times.items()
    }
    images = f"{arguments.frames * 6} x {arguments.channels} x {arguments.height} x {arguments.width}"
    device = torch.cuda.get_device_name() if maps.is_cuda else f"{platform.machine()} CPU"
    print(f"{images}, {arguments.device}, {arguments.threads} thread(s), median of {arguments.repeats}")
    print(f"{'':16}{'forward s':>12}{'backward s':>12}{'peak GB':>10}")
    for arm, row in table.items():
        print(f"{arm:16}{row['forward_s']:12.3f}{row['backward_s']:12.3f}{row['peak_memory_gb']:10.2f}")
    setting = {k: v for k, v in vars(arguments).items() if k not in ("out", "peak_of")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"benchmark": "pooling", "on": device, "torch": torch.__version__, **setting, "arms": table}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
