"""Students from every published format, and the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from weight_states import State, prefixed, same, student

from slidr.config import Config, VoxelConfig, to_dict
from slidr.models.files import WeightsError
from slidr.models.voxelnet import VoxelNet
from slidr.models.weights import load_student, voxel_expectation

SLIDR_CONFIG = {"voxel_size": 0.1, "cylindrical_coordinates": True, "model_points": "minkunet"}


def student_checkpoint(kind: str, state: State) -> dict[str, Any]:
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    if kind == "own":
        return {"student": state, "head": {"0.weight": torch.ones(1)}, "config": to_dict(Config()), "step": 7}
    if kind == "slidr_pretraining":
        images = {"encoder.conv1.weight": torch.ones(1), "decoder.0.weight": torch.ones(1)}
        return {"model_points": state, "model_images": images, "epoch": 50, "config": SLIDR_CONFIG}
    if kind == "slidr_wrapped":
        return {"model_points": prefixed(state, "module."), "config": SLIDR_CONFIG}
    if kind == "lightning":
        images = {"model_images.encoder.conv1.weight": torch.ones(1)}
        return {
            "state_dict": {**prefixed(state, "model_points."), **images},
            "hyper_parameters": SLIDR_CONFIG,
        }
    if kind == "lightning_downstream":
        return {"state_dict": prefixed(state, "model."), "epoch": 1}
    if kind == "pointcontrast":
        return {"state_dict": state, "iteration": 100}
    if kind == "encoder":
        return {"state_dict": prefixed(state, "module.encoder.")}
    if kind == "plain":
        return dict(state)
    if kind == "depthcontrast":
        trunks = {
            **prefixed(other, "module.trunk.0."),
            **prefixed(state, "module.trunk.2."),
            **prefixed(other, "module.trunk.3."),
            "module.trunk.2.head.clf.0.weight": torch.ones(2, 2),
        }
        criterion = {"params": torch.ones(1)}
        return {"epoch": 2, "model": trunks, "optimizer": {"state": {}}, "train_criterion": criterion}
    raise AssertionError(kind)


STUDENTS = [
    *("own", "slidr_pretraining", "slidr_wrapped", "lightning", "lightning_downstream", "pointcontrast"),
    *("encoder", "plain", "depthcontrast"),
]


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_published_student_format_loads_whole(kind: str, student_state: State, tmp_path: Path) -> None:
    torch.save(student_checkpoint(kind, student_state), tmp_path / "s.pt")
    module = student()
    report = load_student(module, tmp_path / "s.pt", expect=voxel_expectation(VoxelConfig()))
    assert same(module, student_state)
    assert set(report.loaded) == set(student_state)
    assert report.missing == ()
    skipped = {"lightning": 1, "depthcontrast": 2 * len(student_state) + 1}.get(kind, 0)
    assert len(report.skipped) == skipped


def test_a_voxelnet_loads_from_spconv_1_and_spconv_2_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = VoxelNet().state_dict()
    old = {
        name: value.permute(1, 2, 3, 4, 0).contiguous() if value.ndim == 5 else value for name, value in state.items()
    }
    for number, layout in enumerate((state, old)):
        torch.save({"model_points": layout}, tmp_path / f"{number}.pt")
        module = VoxelNet()
        load_student(module, tmp_path / f"{number}.pt")
        assert same(module, state)


def test_another_class_count_is_an_error_with_both_unless_the_head_is_replaced(
    student_state: State, tmp_path: Path
) -> None:
    path = tmp_path / "s.pt"
    torch.save({"model_points": student_state}, path)
    module = student(out_channels=17)
    fresh = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(WeightsError, match=r"s.pt: its last layer has 64 outputs \(classes\), the model's has 17"):
        load_student(module, path)
    assert same(module, fresh)
    report = load_student(module, path, head="skip")
    assert same(module, student_state, except_for="final.")
    assert torch.equal(module.state_dict()["final.kernel"], fresh["final.kernel"])
    assert report.skipped == ("final.bias", "final.kernel")
    assert report.missing == ("final.kernel", "final.bias")
    assert "skipped 2 (final.bias, final.kernel)" in str(report)


def test_a_checkpoint_without_a_head_loads_only_for_fine_tuning(student_state: State, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    torch.save({n: v for n, v in student_state.items() if not n.startswith("final.")}, path)
    with pytest.raises(WeightsError, match=r'final.kernel, final.bias\); .* head="skip"'):
        load_student(student(), path)
    module = student()
    assert load_student(module, path, head="skip").skipped == ()
    assert same(module, student_state, except_for="final.")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"voxel_size": 0.05, "cylindrical_coordinates": True},
            r"voxel_size 0.05, this run has \(0.1, 1.0, 0.1\)",
        ),
        (
            {"voxel_size": 0.1, "cylindrical_coordinates": False},
            r"cylindrical_coordinates False, this run has True",
        ),
        ({"voxel_size": [0.1, 0.1, 0.1]}, r"voxel_size \[0.1, 0.1, 0.1\], this run has \(0.1, 1.0, 0.1\)"),
        (
            to_dict(Config()) | {"data": {"voxel": {"size": [0.2, 1.0, 0.2], "cylindrical": True}}},
            r"voxel_size \[0.2, 1.0, 0.2\], this run has \(0.1, 1.0, 0.1\)",
        ),
        (
            {"data": {"voxel": {"size": [0.1, 1.0, 0.1], "cylindrical": True, "azimuth_wrap": True}}},
            r"azimuth_wrap True, this run has False",
        ),
    ],
)
def test_other_voxels_are_an_error_with_both_values(
    config: dict[str, Any], message: str, student_state: State, tmp_path: Path
) -> None:
    torch.save({"model_points": student_state, "config": config}, tmp_path / "s.pt")
    with pytest.raises(WeightsError, match=r"s.pt: was trained with " + message):
        load_student(student(), tmp_path / "s.pt", expect=voxel_expectation(VoxelConfig()))
    load_student(student(), tmp_path / "s.pt")  # nothing expected, nothing compared


@pytest.mark.parametrize("size", [10**400, -0.1, [0.1, float("nan"), 0.1], [0.1, 1.0], "0.1"])
def test_a_voxel_size_that_is_not_one_is_refused_by_name(size: Any, student_state: State, tmp_path: Path) -> None:
    torch.save({"model_points": student_state, "config": {"voxel_size": size}}, tmp_path / "s.pt")
    with pytest.raises(WeightsError, match=r"s\.pt: config: voxel_size: expected one or three lengths"):
        load_student(student(), tmp_path / "s.pt", expect=voxel_expectation(VoxelConfig()))


def test_a_cartesian_scalar_is_a_cube(student_state: State, tmp_path: Path) -> None:
    config = {"voxel_size": 0.1, "cylindrical_coordinates": False}
    torch.save({"model_points": student_state, "config": config}, tmp_path / "s.pt")
    cube = VoxelConfig(cylindrical=False, size=(0.1, 0.1, 0.1))
    load_student(student(), tmp_path / "s.pt", expect=voxel_expectation(cube))


def test_what_matches_nothing_or_too_much_or_too_little_is_an_error(student_state: State, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    torch.save({"backbone.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"s.pt: matches nothing: it has 1 \(backbone.weight\), the model has"):
        load_student(student(), path)
    torch.save({**student_state, "block9.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"no place for: 1 \(block9.weight\)"):
        load_student(student(), path)
    torch.save({n: v for n, v in student_state.items() if n != "conv0p1s1.kernel"}, path)
    with pytest.raises(WeightsError, match=r"lacks what the model needs: 1 \(conv0p1s1.kernel\)"):
        load_student(student(), path)
    torch.save({**student_state, "module.conv0p1s1.kernel": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"two entries for conv0p1s1.kernel"):
        load_student(student(), path)
