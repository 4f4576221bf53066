"""MinkUNet34C forward and backward on one real-sized cloud: the torch engine against MinkowskiEngine.

    python benchmarks/sparse.py [--threads 2] [--runs 7] [--out results/sparse.json]

Runs alternate in one process, so that a busy machine slows all alike: the torch engine by its compiled CPU kernels
("torch") and by gathering ("gather"), and MinkowskiEngine. GFLOP count the multiply-adds that the kernel maps ask for
(2 per pair and weight); backward counts twice the forward. The GEMM peak is the best float32 matrix product measured
between the runs, by torch.mm or by oneDNN, whichever is faster here. Peak memory is measured in fresh processes, each
engine's the median of three.

Where there is a CUDA device, a second table follows: training steps (maps, forward, backward, SGD) on a batch of four
clouds under bfloat16 autocast, timed by CUDA events, with each algorithm of the torch engine forced and with the
measured choice between them, and how far its output is from float32 on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidr.models.minkunet import MinkUNet34C
from slidr.sparse import SparseTensor, modules
from slidr.sparse.choice import SWITCH
from slidr.sparse.coordinates import CoordinateManager
from slidr.sparse.cpu_kernels import cut_tiles
from slidr.sparse.tensor import sort_rows

SHARED = Path(os.environ.get("SLIDR_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def cloud() -> tuple[Tensor, Tensor, str]:
    """Intensities and [batch, rho, phi, z] voxels of a keyframe, or of a synthetic 32-beam sweep where it is absent."""
    stored = SHARED / "golden" / "minkunet.npz"
    if stored.exists():
        voxels, source = np.load(stored)["coords"].astype(np.int32), "real keyframe"
    else:
        voxels, source = ring_voxels(), "synthetic 32-beam sweep"
    coordinates = np.concatenate([np.zeros((len(voxels), 1), np.int32), voxels], axis=1)
    features = np.random.default_rng(0).uniform(0, 1, (len(voxels), 1)).astype(np.float32)
    return torch.from_numpy(features), torch.from_numpy(coordinates), source


def ring_voxels(beams: int = 32, columns: int = 1080, seed: int = 0) -> np.ndarray:
    """Cylindrical voxels of rings on flat ground and of boxes of random range, as a spinning lidar sees them."""
    rng = np.random.default_rng(seed)
    azimuth = np.linspace(-180, 180, columns, endpoint=False)
    walls = np.repeat(rng.uniform(6, 60, columns // 18), 18)  # metres; one object face per 6 degrees
    rows = []
    for elevation in np.radians(np.linspace(-30, 10, beams)):
        ground = 1.8 / np.tan(-elevation) if elevation < 0 else np.inf
        distance = np.minimum(ground, walls) + rng.normal(0, 0.02, columns)
        height = distance * np.tan(elevation)
        seen = distance < 70
        rows.append(np.stack([distance / 0.1, azimuth, height / 0.1], axis=1)[seen])
    return np.unique(np.floor(np.concatenate(rows)).astype(np.int32), axis=0)


ENGINES = {"torch": ("torch", ""), "gather": ("torch", "gather"), "minkowski": ("minkowski", "")}


def build(name: str) -> MinkUNet34C:
    """The network on the engine of a row, whose algorithm it also forces on this process."""
    engine: Any
    engine, os.environ[SWITCH] = ENGINES[name]
    torch.manual_seed(0)
    return MinkUNet34C(1, 64, engine=engine).train()


def one_step(model: MinkUNet34C, features: Tensor, coordinates: Tensor) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass, kernel maps included."""
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    out = model(SparseTensor(features, coordinates)).features
    middle = time.perf_counter()
    (out * out.detach().roll(1, 0)).sum().backward()
    return middle - begin, time.perf_counter() - middle


def gemm_peaks(size: int = 2048) -> dict[str, float]:
    """GFLOP/s of one float32 matrix product by each library that torch brings along."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    products: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(a, b)}
    if torch.backends.mkldnn.is_available():
        # What torch.compile calls; torch.mm leaves float32 to the BLAS.
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    found = {}
    for name, product in products.items():
        product()
        begin = time.perf_counter()
        product()
        found[name] = 2 * size**3 / (time.perf_counter() - begin) / 1e9
    return found


def count_gflop(model: MinkUNet34C, features: Tensor, coordinates: Tensor) -> float:
    """Forward GFLOP: 2 C_in C_out per kernel-map pair, pointwise convolutions included."""
    total = 0.0
    real = modules.sparse_conv, modules.norm_relu_conv

    def counting(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any) -> Tensor:
            nonlocal total
            *_, weight, kernel_map = arguments
            total += 2.0 * kernel_map.num_pairs * weight.shape[1] * weight.shape[2]
            return convolution(*arguments)

        return counted

    modules.sparse_conv, modules.norm_relu_conv = (counting(convolution) for convolution in real)
    hooks = [
        m.register_forward_pre_hook(lambda m, inputs: pointwise.append((len(inputs[0].features), *m.kernel.shape)))
        for m in model.modules()
        if getattr(m, "kernel_size", None) == 1
    ]
    pointwise: list[tuple[int, ...]] = []
    try:
        with torch.no_grad():
            model(SparseTensor(features, coordinates))
    finally:
        modules.sparse_conv, modules.norm_relu_conv = real
        for hook in hooks:
            hook.remove()
    return (total + sum(2.0 * rows * c_in * c_out for rows, c_in, c_out in pointwise)) / 1e9


def maps_of_a_step(model: MinkUNet34C, features: Tensor, coordinates: Tensor) -> CoordinateManager:
    """What a step makes of the coordinates, kernel maps and the other forms of them that it asks for."""
    os.environ[SWITCH] = ""
    managers: list[CoordinateManager] = []
    hook = model.conv0p1s1.register_forward_pre_hook(lambda _, inputs: managers.append(inputs[0].manager))
    try:
        one_step(model, features, coordinates)
    finally:
        hook.remove()
    return managers[0]


def map_seconds(made: CoordinateManager, coordinates: Tensor) -> float:
    """Seconds to sort one cloud and to make all of it again."""
    begin = time.perf_counter()
    manager = sort_rows(SparseTensor(torch.zeros(len(coordinates), 1), coordinates)).tensor.manager
    for (kind, *arguments), old in made.maps.items():
        make = {"submanifold": manager.submanifold, "strided": manager.downsample}[kind]
        new = make(*arguments)
        for was, now in ((old, new), (old.transposed(), new.transposed())):
            for _, rows in was.kept:
                cut_tiles(now, rows)
            for form in ("bags", "table", "slices"):
                if form in vars(was):
                    getattr(now, form)
    return time.perf_counter() - begin


def peak_memory(engine: str, threads: int) -> float:
    """MiB above the imported, built model that three training steps reach, each time in a process of its own."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import sparse, torch;"
        f"torch.set_num_threads({threads}); m = sparse.build('{engine}'); f, c, _ = sparse.cloud();"
        "before = sparse.resident(); [sparse.one_step(m, f, c) for _ in range(3)]; print(sparse.high_water() - before)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def resident() -> float:
    """MiB resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def high_water() -> float:
    """MiB resident at most so far. (getrusage would count what the parent held when it forked.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def batch_of(clouds: int) -> tuple[Tensor, Tensor]:
    """Intensities and coordinates of `clouds` copies of the cloud as one batch, each turned by some whole cells."""
    features, coordinates, _ = cloud()
    parts = [coordinates + coordinates.new_tensor([b, 0, 3 * b, 0]) for b in range(clouds)]
    return features.repeat(clouds, 1), torch.cat(parts)


def training_step(model: MinkUNet34C, optimizer: torch.optim.Optimizer, features: Tensor, coordinates: Tensor) -> None:
    """One step under bfloat16 autocast on the tensors' device, kernel maps and optimizer included."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(features.device.type, torch.bfloat16):
        out = model(SparseTensor(features, coordinates)).features
    (out.float() * out.detach().float().roll(1, 0)).sum().backward()
    optimizer.step()


def cuda_milliseconds(step: Callable[[], None], runs: int, warm_up: int = 5) -> float:
    """Median time of a step between CUDA events."""
    for _ in range(warm_up):  # compiles kernels and times the algorithms
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure_cuda(runs: int, clouds: int = 4) -> dict[str, Any]:
    features, coordinates = (t.cuda() for t in batch_of(clouds))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "clouds": clouds,
        "voxels": len(coordinates),
        "runs": runs,
        "steps": {},
    }
    for algorithm in ("gather", "triton", "measured"):
        model = build("torch").cuda()
        os.environ[SWITCH] = algorithm if algorithm != "measured" else ""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        torch.cuda.reset_peak_memory_stats()
        step = functools.partial(training_step, model, optimizer, features, coordinates)
        try:
            milliseconds = cuda_milliseconds(step, runs)
        except ValueError as error:  # triton is not installed
            print(f"{algorithm}: skipped ({error})", file=sys.stderr)
            continue
        result["steps"][algorithm] = {
            "milliseconds": milliseconds,
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
            "error": distance_from_float32(features, coordinates),
        }
    return result


def distance_from_float32(features: Tensor, coordinates: Tensor) -> float:
    """Relative distance of bfloat16 features on the tensors' device from float32 ones on the CPU, in eval mode."""
    forced = os.environ[SWITCH]
    model = build("torch").eval()
    with torch.no_grad():
        expected = model(SparseTensor(features.cpu(), coordinates.cpu())).features
        os.environ[SWITCH] = forced
        with torch.autocast(features.device.type, torch.bfloat16):
            got = model.to(features.device)(SparseTensor(features, coordinates)).features
    return float((got.float().cpu() - expected).norm() / expected.norm())


def cuda_table(result: dict[str, Any]) -> str:
    lines = [
        f"MinkUNet34C training step, {result['device']}, {result['clouds']} clouds ({result['voxels']} voxels), "
        f"bfloat16 autocast, medians of {result['runs']}",
        f"{'algorithm':<10} {'step ms':>8} {'peak MiB':>9} {'from float32':>13}",
    ]
    lines += [
        f"{name:<10} {e['milliseconds']:>8.1f} {e['peak_mib']:>9.0f} {e['error']:>13.1e}"
        for name, e in result["steps"].items()
    ]
    return "\n".join(lines)


def measure(threads: int, runs: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    features, coordinates, source = cloud()
    models = {}
    for name in ENGINES:
        try:
            models[name] = build(name)
            one_step(models[name], features, coordinates)
        except ImportError as error:
            print(f"{name}: skipped ({error})", file=sys.stderr)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks, maps = [], []
    made = maps_of_a_step(models["torch"], features, coordinates)
    for _ in range(runs):
        for name, model in models.items():
            os.environ[SWITCH] = ENGINES[name][1]
            times[name].append(one_step(model, features, coordinates))
            peaks.append(gemm_peaks())
        maps.append(map_seconds(made, coordinates))
    forward = count_gflop(models["torch"], features, coordinates)
    best = {name: max(found[name] for found in peaks) for name in peaks[0]}
    peak = max(best.values())
    result: dict[str, Any] = {
        "cloud": source,
        "voxels": len(coordinates),
        "threads": threads,
        "runs": runs,
        "torch_version": torch.__version__,
        "processor": platform.machine(),
        "forward_gflop": forward,
        "gemm_peak_gflops": peak,
        "gemm_gflops": best,
        "map_seconds": statistics.median(maps),
        "engines": {},
    }
    for name, pairs in times.items():
        total = statistics.median(a + b for a, b in pairs)
        result["engines"][name] = {
            "forward_s": statistics.median(a for a, _ in pairs),
            "backward_s": statistics.median(b for _, b in pairs),
            "total_s": total,
            "best_total_s": min(a + b for a, b in pairs),
            "gflops": 3 * forward / total,
            "of_peak": 3 * forward / total / peak,
            "peak_mib": peak_memory(name, threads),
        }
    ours = result["engines"]["torch"]
    result["map_share"] = result["map_seconds"] / ours["total_s"]
    if "minkowski" in result["engines"]:
        result["time_ratio"] = ours["total_s"] / result["engines"]["minkowski"]["total_s"]
    return result


def table(result: dict[str, Any]) -> str:
    lines = [
        f"MinkUNet34C, {result['voxels']} voxels ({result['cloud']}), {result['threads']} threads, "
        f"medians of {result['runs']}; forward {result['forward_gflop']:.1f} GFLOP, "
        f"GEMM peak {' / '.join(f'{name} {gflops:.0f}' for name, gflops in result['gemm_gflops'].items())} GFLOP/s",
        f"{'engine':<10} {'forward s':>10} {'backward s':>11} {'sum s':>7} "
        f"{'GFLOP/s':>8} {'of peak':>8} {'peak MiB':>9}",
    ]
    lines += [
        f"{name:<10} {e['forward_s']:>10.3f} {e['backward_s']:>11.3f} {e['total_s']:>7.3f} {e['gflops']:>8.0f} "
        f"{e['of_peak']:>8.0%} {e['peak_mib']:>9.0f}"
        for name, e in result["engines"].items()
    ]
    lines.append(f"kernel maps {result['map_seconds'] * 1e3:.0f} ms, {result['map_share']:.1%} of a step")
    if "time_ratio" in result:
        lines.append(f"torch takes {result['time_ratio']:.2f} of minkowski's time (1/{1 / result['time_ratio']:.1f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/sparse.json"))
    args = parser.parse_args()
    result = measure(args.threads, args.runs)
    print(table(result))
    if torch.cuda.is_available():
        result["cuda"] = measure_cuda(max(args.runs, 20))
        print(cuda_table(result["cuda"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
