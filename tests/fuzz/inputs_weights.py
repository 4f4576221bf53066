"""Inputs of weights: checkpoints of a run, students in every layout, teachers."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from slidr.config import Config, OptimConfig, to_dict
from slidr.models.export import export_safetensors, export_slidr
from slidr.models.files import read_checkpoint, write_checkpoint
from slidr.models.weights import load_encoder, load_student, student_state, voxel_expectation
from slidr.training.checkpoint import CheckpointFolder
from slidr.training.loop import fit

from . import formats, trees
from .harness import Input

CONFIG = Config()


class TinyStudent(nn.Module):
    """The names of a MinkUNet's first and last layer, and little else: as many bytes as tests need."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv0p1s1 = nn.Module()
        self.conv0p1s1.kernel = nn.Parameter(torch.randn(27, 1, 8))
        self.bn0 = nn.Module()
        self.bn0.bn = nn.BatchNorm1d(8)
        self.final = nn.Module()
        self.final.kernel = nn.Parameter(torch.randn(1, 8, 16))
        self.final.bias = nn.Parameter(torch.randn(16))


class TinyEncoder(nn.Module):
    """The names of a ResNet's first layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(8)


def student(variant: int) -> dict[str, Tensor]:
    return TinyStudent(variant).state_dict()


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


# ---------------------------------------------------------------------------------------------- checkpoints


class TinyTask:
    """Fits a line: the least that `fit` can train, checkpoint and resume."""

    kind = "pretrain"
    objective = ("val_loss", -1)

    def __init__(self, variant: int) -> None:
        torch.manual_seed(variant)
        self.model = nn.Linear(8, 8)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def loss(self, outputs: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        return (outputs - 1).square().mean(), {}

    def evidence(self, batch: Tensor) -> int:
        return len(batch)

    def validate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        with torch.no_grad():
            return {"val_loss": sum(float(self.loss(self.model(batch), batch)[0]) for batch in batches)}

    def state(self) -> dict[str, Any]:
        return {"student": self.model.state_dict(), "head": {}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["student"])


class TinyLoader:
    steps_per_epoch = 1

    def train(self, first_step: int, last_step: int) -> Iterator[Tensor]:
        for step in range(first_step, last_step):
            yield torch.randn(4, 8, generator=torch.Generator().manual_seed(step))

    def validation(self) -> list[Tensor]:
        return [torch.linspace(-1, 1, 32).reshape(4, 8)]


def train_on(variant: int, epochs: int = 3) -> Any:
    """Three epochs of a step each, from the newest checkpoint on; what training ends with."""
    config = replace(CONFIG, optim=OptimConfig(name="adamw", lr=0.01, epochs=3, batch_size=1))
    task, folder = TinyTask(variant), CheckpointFolder("run/checkpoints")
    device = torch.device("cpu")
    outcome = fit(
        task, TinyLoader(), config, folder, device, lambda *_: None, enough=lambda epoch, metrics: epoch >= epochs
    )
    metrics = {name: value for name, value in outcome.metrics.items() if name == "val_loss"}
    return task.model.state_dict(), outcome.step, outcome.epoch, metrics


def make_checkpoints(variant: int) -> None:
    train_on(variant, epochs=2)


def checkpoint_says(path: str) -> Callable[[Any], bool]:
    """Whether a checkpoint has the entries and types of one, and finite weights, when torch alone reads it."""

    def says(value: Any) -> bool:
        state = _checked(path)
        maps = all(isinstance(state[key], dict) for key in ("head", "optimizer", "scaler", "config", "metrics"))
        numbers = type(state["step"]) is int and type(state["epoch"]) is int and 0 <= state["step"] < 10**8
        weights = state["student"]
        return (
            maps
            and numbers
            and isinstance(state["kind"], str)
            and all(math.isfinite(number) for number in state["metrics"].values())
            and (state["best"] is None or math.isfinite(state["best"]))
            and all(tensor.dtype == torch.float32 for tensor in weights.values())
            and all(tensor.isfinite().all() for tensor in weights.values())
        )

    return says


def _checked(path: str) -> Any:
    """What torch alone reads from a file whose checksums are right, or safetensors from one of its own."""
    if not zipfile.is_zipfile(path):
        return load_safetensors(Path(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("damaged")
    return trees.from_torch(Path(path).read_bytes())  # by its contents, whatever its name ends in


def _tensors(tree: Any) -> Iterator[Tensor]:
    for _, value in trees.nodes(tree):
        if isinstance(value, Tensor):
            yield value


def one_checkpoint() -> Any:
    return CheckpointFolder("run/checkpoints").read(2)


def best() -> Any:
    return CheckpointFolder("run/checkpoints").best()


# ---------------------------------------------------------------------------------------------- students


def load_tiny(name: str) -> Any:
    module = TinyStudent(99)
    report = load_student(module, name, expect=voxel_expectation(CONFIG.data.voxel))
    return module.state_dict(), report.loaded, report.missing


def make_student(variant: int) -> None:
    write_checkpoint("student.pt", export_slidr(student(variant), None, 3, to_dict(CONFIG)))


def make_safetensors(variant: int) -> None:
    export_safetensors("student.safetensors", student(variant), 3, to_dict(CONFIG))


def safetensors_says(value: Any) -> bool:
    """Whether a student is the tensors of a .safetensors file as the library alone reads them, all finite floats.

    A file of torch under that name is taken for what it is.
    """
    if zipfile.is_zipfile("student.safetensors"):
        return student_says("student.safetensors")(value)
    state = load_safetensors(Path("student.safetensors").read_bytes())
    return _same(value[0], state)


def student_says(name: str) -> Callable[[Any], bool]:
    """Whether a student's weights are those of a file that torch alone reads, all finite floats of the right shapes."""

    def says(value: Any) -> bool:
        weights = [t for t in _tensors(_checked(name)) if t.is_floating_point()]
        got = value[0] if isinstance(value, tuple) else value
        return all(t.isfinite().all() for t in weights) and all(
            any(t.shape == mine.shape and torch.equal(t.to(mine.dtype), mine) for t in weights)
            for mine in got.values()
            if mine.is_floating_point()
        )

    return says


def _same(got: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    floats = [value for name, value in state.items() if "num_batches" not in name]
    return (
        all(value.dtype in (torch.float32, torch.float64, torch.float16) and value.isfinite().all() for value in floats)
        and all(torch.equal(got[name], state[name].to(got[name].dtype)) for name in got if name in state)
        and got.keys() == state.keys()
    )


def _legacy(tree: Any) -> bytes:
    """torch's file format before 1.6: no zip, no checksum."""
    sink = io.BytesIO()
    torch.save(tree, sink, _use_new_zipfile_serialization=False)
    return sink.getvalue()


def published(form: str, variant: int) -> dict[str, Any]:
    state = student(variant)
    return {
        "downstream": {"model_points": prefixed(state, "module."), "epoch": 20, "config": {"voxel_size": 0.1}},
        "lightning": {
            "state_dict": prefixed(state, "model_points.") | {"model_images.encoder.conv1.weight": torch.ones(3)},
            "hyper_parameters": {"voxel_size": 0.1, "cylindrical_coordinates": True},
        },
        "PointContrast": {"state_dict": state, "curr_iter": 5, "optimizer": {"lr": 0.1}},
        "DepthContrast": {"model": prefixed(state, "module.trunk.2."), "epoch": 9},
    }[form]


def make_published(form: str, variant: int) -> None:
    torch.save(published(form, variant), "weights.pth")


def make_old_file(variant: int) -> None:
    Path("weights.pth").write_bytes(_legacy(published("lightning", variant)))


def old_student_says(value: Any) -> bool:
    state = torch.load("weights.pth", weights_only=True)["state_dict"]
    return _same(
        value[0], {k.removeprefix("model_points."): v for k, v in state.items() if k.startswith("model_points.")}
    )


# ---------------------------------------------------------------------------------------------- teachers


def teacher(form: str, variant: int) -> dict[str, Any]:
    state = TinyEncoder(variant).state_dict()
    return {
        "MoCo": {"epoch": 200, "arch": "resnet50", "state_dict": prefixed(state, "module.encoder_q.")},
        "DINO": {"student": {}, "teacher": prefixed(state, "backbone.") | {"head.mlp.weight": torch.ones(2, 2)}},
        "PixPro": {"model": prefixed(state, "module.encoder."), "opt": "sgd"},
        "torchvision": {**state, "fc.weight": torch.ones(4, 8), "fc.bias": torch.zeros(4)},
        "SLidR": {"model_images": prefixed(state, "encoder."), "epoch": 50},
    }[form]


def load_teacher() -> Any:
    module = TinyEncoder(99)
    load_encoder(module, read_checkpoint("teacher.pth"), "resnet18", "teacher.pth")
    return module.state_dict()


def export_of(name: str) -> Any:
    return student_state(read_checkpoint(name), name)


TEACHERS = ("MoCo", "DINO", "PixPro", "torchvision", "SLidR")
STUDENTS = ("downstream", "lightning", "PointContrast", "DepthContrast")
_STEP = "run/checkpoints/step-00000002.pt"

INPUTS = (
    *(
        Input(f"checkpoint, {name}", make_checkpoints, path, read, trees.TORCH, checkpoint_says(path))
        for name, path, read in (
            ("resumed from", _STEP, lambda: train_on(0)),
            ("of a step", _STEP, one_checkpoint),
            ("the best", "run/checkpoints/best.pt", best),
        )
    ),
    Input(
        "student.pt",
        make_student,
        "student.pt",
        lambda: load_tiny("student.pt"),
        trees.TORCH,
        student_says("student.pt"),
    ),
    Input(
        "student.pt, exported",
        make_student,
        "student.pt",
        lambda: export_of("student.pt"),
        trees.TORCH,
        student_says("student.pt"),
    ),
    Input(
        "student.safetensors",
        make_safetensors,
        "student.safetensors",
        lambda: load_tiny("student.safetensors"),
        formats.SAFETENSORS,
        says=safetensors_says,
    ),
    *(
        Input(
            f"student of {form}",
            lambda variant, form=form: make_published(form, variant),
            "weights.pth",
            lambda: load_tiny("weights.pth"),
            trees.TORCH,
            student_says("weights.pth"),
        )
        for form in STUDENTS
    ),
    Input(
        "student in torch's old format",
        make_old_file,
        "weights.pth",
        lambda: load_tiny("weights.pth"),
        {},
        says=old_student_says,
    ),
    *(
        Input(
            f"teacher of {form}",
            lambda variant, form=form: Path("teacher.pth").write_bytes(trees.to_torch(teacher(form, variant))),
            "teacher.pth",
            load_teacher,
            trees.TORCH,
            student_says("teacher.pth"),
        )
        for form in TEACHERS
    ),
)
