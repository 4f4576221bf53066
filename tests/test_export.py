"""`slidr export`: students for other tools, out of any checkpoint that holds one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slidr.cli import main
from slidr.config import Config, to_dict
from slidr.models.files import read_checkpoint
from slidr.models.minkunet import MinkUNet14
from slidr.models.voxelnet import VoxelNet
from slidr.models.weights import load_student

Contents = dict[str, Any]


def minkunet() -> MinkUNet14:
    return MinkUNet14(1, 64, width=0.25)


def own(state: Contents) -> Contents:
    return {"format": 1, "kind": "pretrain", "student": state, "epoch": 3, "config": to_dict(Config())}


def slidr_layout(state: Contents) -> Contents:
    return {"model_points": state, "model_images": {"encoder.conv1.weight": torch.zeros(1)}, "epoch": 3}


def lightning(state: Contents) -> Contents:
    return {"state_dict": {f"model_points.{name}": value for name, value in state.items()}}


def depthcontrast(state: Contents) -> Contents:
    """Several networks of one kind; the one that learned from voxels is trunk 2."""
    trunks = {f"module.trunk.{i}.{name}": torch.zeros_like(value) for i in (0, 3) for name, value in state.items()}
    trunks |= {f"module.trunk.2.{name}": value for name, value in state.items()}
    trunks["module.trunk.2.head.clf.0.weight"] = torch.zeros(2, 2)
    return {"epoch": 2, "model": trunks, "train_criterion": {"params": torch.ones(1)}}


@pytest.mark.parametrize("layout", [own, slidr_layout, lightning, depthcontrast])
@pytest.mark.parametrize(("form", "ending"), [("slidr", "-slidr.pt"), ("safetensors", ".safetensors")])
def test_an_exported_student_loads_strictly_with_the_same_values(
    layout: Any, form: str, ending: str, tmp_path: Path
) -> None:
    student = minkunet()
    torch.save(layout(student.state_dict()), tmp_path / "run.pt")
    assert main(["export", str(tmp_path / "run.pt"), "--format", form]) == 0
    back = minkunet()
    load_student(back, tmp_path / f"run{ending}")
    for name, value in student.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("build", [minkunet, lambda: VoxelNet(4, 64)])
def test_openpcdet_gets_the_backbone_without_the_pretraining_head(
    build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = build()
    torch.save(own(student.state_dict()), tmp_path / "run.pt")
    out = tmp_path / "folder" / "backbone.pth"
    assert main(["export", str(tmp_path / "run.pt"), "--format", "openpcdet", "--out", str(out)]) == 0
    state = read_checkpoint(out)["model_state"]
    assert f"export: {len(state)} tensors -> {out}" in capsys.readouterr().err
    backbone = {f"backbone_3d.{n}" for n in student.state_dict() if not n.startswith("final.")}
    assert set(state) == backbone
    for name in backbone:
        assert torch.equal(state[name], student.state_dict()[name.removeprefix("backbone_3d.")])


@pytest.mark.parametrize("old", [False, True])
def test_the_options_for_openpcdet_are_written_from_kernels_of_either_layout(old: bool, tmp_path: Path) -> None:
    state = VoxelNet(4, 64).state_dict()
    layout = {n: v.permute(1, 2, 3, 4, 0).contiguous() if v.ndim == 5 and old else v for n, v in state.items()}
    torch.save({"model_points": layout}, tmp_path / "run.pt")
    words = ["export", str(tmp_path / "run.pt"), "--format", "openpcdet", "--out"]
    for spconv in ("1", "2"):
        out = str(tmp_path / f"{spconv}.pth")
        assert main([*words, out, "--spconv", spconv, "--intensity-scale", "255"]) == 0
        stem = read_checkpoint(out)["model_state"]["backbone_3d.conv_input.0.weight"]
        stem = stem.permute(4, 0, 1, 2, 3) if spconv == "1" else stem
        factor = torch.tensor([1.0, 1.0, 1.0, 255.0])
        assert torch.equal(stem, state["conv_input.0.weight"] * factor)


def test_options_for_openpcdet_are_refused_for_other_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(own(minkunet().state_dict()), tmp_path / "run.pt")
    assert main(["export", str(tmp_path / "run.pt"), "--format", "slidr", "--intensity-scale", "255"]) != 0
    assert "only apply to --format openpcdet, got slidr" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_file_without_a_student_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pt")
    assert main(["export", str(tmp_path / "resnet.pt"), "--format", "slidr"]) == 1
    assert "resnet.pt: no student in it" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["resnet.pt"]


def test_a_file_of_several_students_is_refused_by_their_prefixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = minkunet().state_dict()
    both = {f"{prefix}.{name}": value for prefix in ("teacher", "student") for name, value in state.items()}
    torch.save({"state_dict": both}, tmp_path / "two.pt")
    assert main(["export", str(tmp_path / "two.pt"), "--format", "slidr"]) == 1
    assert "two.pt: holds 2 students, under the prefixes 'student.', 'teacher.'" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["two.pt"]


def test_export_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 2
    assert "--format openpcdet|slidr|safetensors" in capsys.readouterr().err


def test_an_export_never_takes_its_checkpoints_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link = tmp_path / "run.pt", tmp_path / "link.pt"
    torch.save(own(minkunet().state_dict()), path)
    link.symlink_to(path)
    before = path.read_bytes()
    for out in (path, link, f"file://{path}"):
        assert main(["export", str(path), "--format", "safetensors", "--out", str(out)]) == 1
        assert "is the checkpoint itself; pass another file as --out" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(("out", "reason"), [("folder", "Is a directory"), ("run.pt/student.pt", "File exists")])
def test_a_place_that_takes_no_file_is_named(
    out: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(own(minkunet().state_dict()), tmp_path / "run.pt")
    (tmp_path / "folder").mkdir()
    assert main(["export", str(tmp_path / "run.pt"), "--format", "slidr", "--out", str(tmp_path / out)]) == 1
    place = str(tmp_path / out.split("/")[0])
    assert capsys.readouterr().err.startswith(f"slidr export: {place}: cannot be used ({reason}); check the path")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "run.pt"]
