"""The GPU's benchmark on a machine without one: its smallest parts, its bookkeeping, and its unit costs in a plan."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_cuda
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slidr.config import load
from slidr.models.teachers import build_teacher
from slidr.models.voxelnet import SpatialConvolution, VoxelNet
from slidr.ops.voxelize import voxelize
from slidr.planning.costs import UNITS, Costs, UnitCost, read_costs, write_costs
from slidr.planning.estimate import Machines, plan_training, train_setting

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_parts import child, floors, loading, others, repeating, sections, steps, street, students  # noqa: E402
from gpu_parts.bench import FULL, SMALL, Bench, relative  # noqa: E402
from gpu_parts.rows import NO_GPU, Channel, Row, judged, table  # noqa: E402


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return script("gpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and threads that wait for each other lose on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench() -> Bench:
    return Bench(SMALL, time.time() + 60, None, lambda entry: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU prints")
def test_the_smallest_parts_run_in_one_command_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import bare\nbare.hide()\n")  # for the child process, too
    parts = "losses,edges,copy,loader,others"
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--small", "--parts", parts, "--json", str(tmp_path / "gpu.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}", "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = [Row(**row) for row in result["rows"]]
    assert [name for name in sections.SECTIONS if any(row.section == name for row in rows)] == sections.chosen(parts)
    assert result["machine"]["gpu"] == NO_GPU
    assert all(row.state in ("ok", "skipped") for row in rows)
    errors = [row for row in rows if row.section == "losses"]
    assert len(errors) == 4
    assert all(row.gpu == NO_GPU and 0 < row.cpu <= row.limit for row in errors)  # type: ignore[operator]
    assert [row.note for row in rows if row.section == "loader"] == ["Pillow is not installed"]
    assert [row.note for row in rows if row.section == "others"] == ["not installed"] * 2
    assert all(row.what in run.stdout for row in rows)


def test_a_section_that_fails_is_a_row_after_those_it_had_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Bench) -> Iterator[Row]:
        yield Row("losses", "first")
        raise ValueError("no such thing")

    use(monkeypatch, fails)
    rows = list(child.rows_of("losses", bench, small=True))
    assert [(row.what, row.state) for row in rows] == [("first", "ok"), ("failed", "failed")]
    assert rows[1].note == "ValueError: no such thing"


def test_a_section_that_outlasts_the_time_is_ended_and_later_ones_do_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeps(_: Bench) -> Iterator[Row]:
        yield Row("losses", "first")
        try:
            time.sleep(60)
        except Exception:
            raise AssertionError("a handler of errors must not catch the end of the time") from None

    use(monkeypatch, sleeps)
    bench = Bench(SMALL, time.time() + 1.5, None, lambda entry: None)
    rows = list(child.rows_of("losses", bench, small=True))
    assert [(row.what, row.state) for row in rows] == [("first", "ok"), ("not finished", "skipped")]
    (late,) = child.rows_of("losses", bench, small=True)
    assert (late.what, late.state) == ("not begun", "skipped")


def test_on_a_gpu_a_section_begins_only_where_its_estimate_fits() -> None:
    bench = SimpleNamespace(gpu=True, left=lambda: sections.SECTIONS["compile"].seconds - 5)
    (row,) = child.rows_of("compile", bench, small=False)
    assert (row.what, row.state) == ("not begun", "skipped")
    assert row.note.startswith("65 s left, takes about 70 s")


def use(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    section = SimpleNamespace(group="correct", seconds=1.0, load=lambda: function)
    monkeypatch.setitem(sections.SECTIONS, "losses", section)  # type: ignore[arg-type]


def test_after_a_process_that_died_the_other_sections_run_in_a_new_one(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def dies_in_the_second(_: argparse.Namespace, names: list[str], deadline: float, channel: Channel) -> int:
        asked.append(list(names))
        for name in names:
            channel.send("begin", name)
            if name == "b":
                return -11
            channel.send("row", Row(name, "made"))
            channel.send("end", [name, 0.1])
        return 0

    monkeypatch.setattr(gpu, "_child", dies_in_the_second)
    messages = gpu.run_in_children(argparse.Namespace(names=["a", "b", "c", "d"], minutes=1))
    assert asked == [["a", "b", "c", "d"], ["c", "d"]]
    rows = [(value.section, value.what, value.note) for kind, value in messages if kind == "row"]
    died = "its process was ended by signal 11"
    assert rows == [("a", "made", ""), ("b", "failed", died), ("c", "made", ""), ("d", "made", "")]


def test_a_wrong_or_failed_row_is_the_exit_status_and_skipped_ones_are_not(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(json=tmp_path / "new" / "gpu.json", small=False, costs=None)

    def status(*rows: Row) -> int:
        return gpu.report(options, [("row", row) for row in rows], 12.0)

    assert status(judged("a", "fits", 1e-7, 1e-4, 1e-3), Row("b", "absent", state="skipped")) == 0
    assert status(judged("a", "is off", 1e-7, 2e-3, 1e-3)) == 1
    assert status(judged("a", "is not a number", 1e-7, float("nan"), 1e-3)) == 1
    assert status(Row("a", "failed", state="failed")) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_table_keeps_columns_and_says_where_there_is_no_gpu() -> None:
    rows = [judged("students", "features", 1.5e-7, NO_GPU, 1e-3), Row("step", "step", "ms", gpu=12.34, floor=4.0)]
    title, header, first, second = table(rows, "a title").splitlines()
    assert title == "a title"
    end = header.index("GPU") + 3
    assert first[:end].endswith(NO_GPU)
    assert second[:end].endswith(" 12.3")
    assert second.split()[-2:] == ["4", "-"]


def test_parts_are_sections_and_groups_in_running_order() -> None:
    assert sections.chosen("step,rates") == ["rates", "step"]
    assert sections.chosen("loader") == ["loader"]
    assert sections.chosen("all") == list(sections.SECTIONS)
    assert {sections.SECTIONS[name].group for name in sections.chosen("correct")} == {"correct"}
    with pytest.raises(ValueError, match="got speed, expected some of all, correct"):
        sections.chosen("step,speed")


@pytest.mark.parametrize("name", list(sections.SECTIONS))
def test_every_section_names_a_function(name: str) -> None:
    assert callable(sections.SECTIONS[name].load())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one runs there")
@pytest.mark.parametrize("name", [name for name in sections.SECTIONS if name not in ("loader", "triton", "others")])
def test_a_sections_code_for_gpus_runs_on_a_stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    monkeypatch.setattr(repeating, "TRIES", 2)
    costs: list[dict[str, Any]] = []
    bench = Bench(SMALL, time.time() + 600, None, costs.append)
    bench.gpu = True
    rows = list(sections.SECTIONS[name].load()(bench))
    assert rows
    assert all(row.section == name for row in rows)
    assert {row.state for row in rows} == {"ok"}, [row for row in rows if row.state != "ok"]
    assert all(row.gpu is not None and row.gpu != NO_GPU for row in rows)
    assert all(row.floor is None or row.floor > 0 for row in rows)


def test_a_street_has_a_real_sweeps_rows_and_about_its_voxels() -> None:
    points = street.sweep(0)
    assert points.shape == (34_688, 4)
    assert points.dtype == np.float32
    assert np.array_equal(points, street.sweep(0))
    assert not np.array_equal(points, street.sweep(1))
    voxels = len(voxelize(points[:, :3]))
    assert 14_000 < voxels < 19_000  # the real keyframe has 15,947


def test_every_camera_of_a_street_sees_points_in_its_own_direction() -> None:
    made = street.sample(street.sweep(0), 0, "minkunet34c", 6, (224, 416))
    pairs = np.bincount(made.pixel_index[:, 0], minlength=6)
    assert (pairs > 1024).all()
    assert made.superpixels.max() < 2**8
    forward = street.cameras(6)[0].camera_from_lidar @ np.array([0, 10.0, 0, 1])  # y points forward
    assert np.allclose(forward[:3] / forward[2], [0, forward[1] / forward[2], 1])


def test_a_street_as_a_batch_repeats_and_voxelnets_rows_are_points(bench: Bench) -> None:
    again = Bench(SMALL, 0, None, lambda entry: None)
    assert torch.equal(bench.batch().coordinates, again.batch().coordinates)
    batch = bench.batch(1, "voxelnet")
    assert batch.features.shape[1] == 4
    assert int(batch.point_index.max()) < len(batch.points)


def test_a_relative_error_of_another_shape_is_not_a_number() -> None:
    assert relative(torch.ones(2), torch.ones(3)) != relative(torch.ones(2), torch.ones(3))
    assert relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative(torch.zeros(0), torch.zeros(0)) == 0


def test_the_worst_tensor_is_named_and_one_that_is_not_a_number_is_worst() -> None:
    reference = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)}
    got = {"a": torch.full((3,), 1.5), "b": torch.full((3,), float("nan")), "c": torch.full((3,), 9.0)}
    error, name = students.worst(got, reference)
    assert error != error
    assert name == "worst: b"
    assert students.worst({**got, "b": torch.ones(3)}, reference) == (8.0, "worst: c")


def test_the_teachers_operations_are_those_that_pytorch_counts(bench: Bench) -> None:
    teacher = build_teacher(SMALL.teacher)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        teacher.coarse(torch.rand(2, 3, *SMALL.image))
    assert floors.teacher_work(bench, 2).flop == counter.get_total_flops()


def test_the_students_operations_are_those_of_the_sparse_benchmark(bench: Bench) -> None:
    batch, sparse = bench.batch(1), script("sparse")
    network = students.MINKUNETS[SMALL.student](1, 64, width=SMALL.width).eval()
    forward, backward = floors.student_work(bench, batch)
    assert forward.flop == pytest.approx(1e9 * sparse.count_gflop(network, batch.features, batch.coordinates))
    assert backward.flop == 2 * forward.flop


def test_a_part_that_draws_at_random_does_not_repeat() -> None:
    assert repeating.repeats(lambda: [torch.ones(3)])
    assert not repeating.repeats(lambda: [torch.ones(3), torch.randn(3)])


def test_samples_of_made_up_keyframes_come_from_the_projects_own_code(bench: Bench, tmp_path: Path) -> None:
    frames = loading.write_keyframes(tmp_path, SMALL.beams, SMALL.columns, (90, 160))
    data = loading.replace(bench.config().data, root=str(tmp_path))
    first, again, other = (loading.make(frames, data, number) for number in (0, 0, len(frames)))
    assert first.images.shape == (6, 3, *SMALL.image)
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)  # another epoch
    assert loading._alone(frames, data, 0.05) > 0
    assert loading._threads(2, frames, data, 0.05, 0.1) > 0
    cores = sorted(os.sched_getaffinity(0))
    assert loading._processes(1, cores, frames, data, 0.05, 0.1) > 0


def test_the_other_librarys_encoder_has_voxelnets_layers() -> None:
    made: list[tuple[int, int, tuple[int, ...]]] = []

    def layer(c_in: int, c_out: int, kernel_size: Any = 3, **options: Any) -> nn.Module:
        made.append((c_in, c_out, tuple(np.broadcast_to(kernel_size, 3))))
        return nn.Identity()

    library = SimpleNamespace(SubMConv3d=layer, SparseConv3d=layer, SparseSequential=nn.Sequential)
    others.encoder(library)
    ours = [m for m in VoxelNet(4, 64).modules() if isinstance(m, SpatialConvolution)]
    shapes = [(m.weight.shape[4], m.weight.shape[0], m.kernel) for m in ours]
    assert made == [(int(a), int(b), kernel) for a, b, kernel in shapes[:-1]]  # but for the last, 1x1x1


def test_a_plan_with_the_benchmarks_unit_costs_answers_in_gpu_hours(gpu: ModuleType, tmp_path: Path) -> None:
    config = load(ROOT / "configs" / "pretrain" / "slidr_minkunet.yaml")
    bench = Bench(FULL, 0, None, lambda entry: None)
    bench.gpu = True  # made up, as the numbers are
    setting = train_setting("pretrain", bench.config("float32"))
    entries = [
        {"name": "train_frame", "value": 0.02, "setting": setting},
        {"name": "validate_frame", "value": 0.01, "setting": setting},
        {"name": "worker_memory", "value": 4e9, "setting": setting},
        {"name": "sample", "value": 0.1, "setting": {"job": "pretrain", "pixels": 1_440_000, "cameras": 6}},
    ]
    path = tmp_path / "costs.json"
    kept = UnitCost("superpixel_job", 0.001, {}, "a machine", "2026-01-01", "a command")
    write_costs(path, Costs([kept]))
    machine = {"gpu": "a GPU", "torch": "2.11", "date": "2026-01-02"}
    assert "4 unit costs" in gpu.write_costs(path, entries, machine)
    costs = read_costs(path)
    assert [(entry.name, entry.unit) for entry in costs] == [
        (name, UNITS[name]) for name in ("superpixel_job", "train_frame", "validate_frame", "worker_memory", "sample")
    ]
    counts = {"train": 1000, "val": 100, "score": 10}
    machines = Machines(16, 1, "one GPU")
    plan = plan_training("pretrain", counts, config, costs, machines, (100, 30), 1_440_000)
    # 8 CPUs make a sample in 0.0125 s: a GPU that needs 0.02 s is the slower one; a validated one takes 0.0125 s.
    seconds = 50 * 1000 * 0.02 + (50 * 100 + 2 * 10) * 0.0125
    assert plan.gpu_hours == pytest.approx(seconds / 3600)
    assert plan.memory_bytes == 4e9
    assert not plan.missing
    assert {entry.machine for entry in plan.basis} == {"a GPU, torch 2.11"}


def test_a_steps_unit_costs_are_a_keyframes_and_have_the_settings_that_a_plan_asks_for() -> None:
    made: list[dict[str, Any]] = []
    bench = Bench(SMALL, time.time() + 60, None, made.append)
    steps._costs(bench, "float32", steps.Steps(times=[900.0, 30.0, 50.0, 40.0], warm_up=1))
    assert [entry["name"] for entry in made] == ["train_frame", "validate_frame", "worker_memory"]
    assert made[0]["value"] == 0.04 / SMALL.clouds  # seconds
    assert made[1]["value"] > 0
    assert made[2]["value"] > 100e6  # bytes: torch alone takes more
    assert all(entry["setting"] == train_setting("pretrain", bench.config()) for entry in made)


def test_without_measured_unit_costs_no_file_is_written(gpu: ModuleType, tmp_path: Path) -> None:
    assert "not written" in gpu.write_costs(tmp_path / "costs.json", [], {})
    assert not (tmp_path / "costs.json").exists()
