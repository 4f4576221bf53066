"""Students out: SLidR's layout, safetensors, OpenPCDet."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weight_states import State, same, student

from slidr.config import Config, VoxelConfig, to_dict
from slidr.models.export import export_openpcdet, export_safetensors, export_slidr, openpcdet_state
from slidr.models.files import WeightsError, read_checkpoint, write_checkpoint
from slidr.models.openpcdet import MinkUNetBackbone
from slidr.models.teachers import build_teacher
from slidr.models.voxelnet import GRID, VoxelNet
from slidr.models.weights import load_student, voxel_expectation
from slidr.ops.voxelize import voxelize
from slidr.sparse import SparseTensor


def test_slidrs_layout_holds_both_networks_and_its_own_voxel_names(student_state: State, tmp_path: Path) -> None:
    teacher = build_teacher("ppkt_resnet18").state_dict()
    out = export_slidr(student_state, teacher, 50, to_dict(Config()))
    assert set(out) == {"model_points", "model_images", "epoch", "config"}
    assert out["config"]["voxel_size"] == 0.1
    assert out["config"]["cylindrical_coordinates"] is True
    path = write_checkpoint(tmp_path / "slidr.pt", out)
    module = student()
    load_student(module, path, expect=voxel_expectation(VoxelConfig()))
    assert same(module, student_state)
    loaded = build_teacher("ppkt_resnet18", weights=str(path))
    assert all(torch.equal(v, teacher[f"encoder.{n}"]) for n, v in loaded.encoder.state_dict().items())
    assert "model_images" not in export_slidr(student_state, None, 50, {})


@pytest.mark.parametrize(
    ("voxel", "expected"),
    [
        (VoxelConfig(size=(0.1, 0.5, 0.1)), [0.1, 0.5, 0.1]),
        (VoxelConfig(cylindrical=False, size=(0.05, 0.05, 0.05)), 0.05),
        (VoxelConfig(cylindrical=False, size=(0.1, 0.1, 0.2)), [0.1, 0.1, 0.2]),
    ],
)
def test_slidrs_voxel_size_is_a_number_only_where_that_says_it_all(voxel: VoxelConfig, expected: Any) -> None:
    config = {"data": {"voxel": to_dict(voxel)}}
    assert export_slidr({}, None, 0, config)["config"]["voxel_size"] == expected


def test_safetensors_come_back_whole_with_their_config(student_state: State, tmp_path: Path) -> None:
    config = to_dict(Config())
    path = export_safetensors(tmp_path / "s.safetensors", student_state, epoch=50, config=config)
    checkpoint = read_checkpoint(path)
    assert checkpoint["config"] == config
    assert checkpoint["epoch"] == 50
    module = student()
    load_student(module, path, expect=voxel_expectation(VoxelConfig()))
    assert same(module, student_state)
    with pytest.raises(WeightsError, match=r"voxel_size \[0.1, 1.0, 0.1\], this run has \(0.2, 1.0, 0.2\)"):
        load_student(module, path, expect=voxel_expectation(VoxelConfig(size=(0.2, 1.0, 0.2))))


def openpcdet_backbone_8x() -> dict[str, tuple[int, ...]]:
    """Parameters of OpenPCDet's VoxelBackBone8x at 4 input channels, written out from its layer table."""
    shapes: dict[str, tuple[int, ...]] = {}

    def block(name: str, c_in: int, c_out: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        shapes[f"{name}.0.weight"] = (c_out, *kernel, c_in)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.1.{entry}"] = (c_out,)
        shapes[f"{name}.1.num_batches_tracked"] = ()

    block("conv_input", 4, 16)
    block("conv1.0", 16, 16)
    for stage, c_in, c_out in (("conv2", 16, 32), ("conv3", 32, 64), ("conv4", 64, 64)):
        block(f"{stage}.0", c_in, c_out)
        block(f"{stage}.1", c_out, c_out)
        block(f"{stage}.2", c_out, c_out)
    block("conv_out", 64, 128, (3, 1, 1))
    return shapes


def test_openpcdet_gets_every_weight_of_voxelbackbone8x_and_no_other(tmp_path: Path) -> None:
    state = VoxelNet().state_dict()
    out = read_checkpoint(export_openpcdet(tmp_path / "pcdet.pth", state))["model_state"]
    expected = {f"backbone_3d.{name}": shape for name, shape in openpcdet_backbone_8x().items()}
    assert {name: tuple(value.shape) for name, value in out.items()} == expected
    assert all(torch.equal(value, state[name.removeprefix("backbone_3d.")]) for name, value in out.items())


def openpcdet_loads(model: dict[str, tuple[int, ...]], file: State) -> State:
    """What OpenPCDet's detector takes of a file into parameters of these shapes; the rest stays random.

    Its rule (Detector3DTemplate._load_state_dict), written out: a kernel of another shape is tried as one of spconv 1,
    for the two layouts of spconv 2; whatever has the parameter's shape then is taken.
    """
    taken: State = {}
    for name, value in file.items():
        if name in model and value.ndim == 5 and tuple(value.shape) != model[name]:
            native = value.transpose(-1, -2)
            implicit = value.permute(4, 0, 1, 2, 3)
            value = next((v for v in (native, implicit) if tuple(v.shape) == model[name]), value)
        if name in model and tuple(value.shape) == model[name]:
            taken[name] = value
    return taken


def test_openpcdet_takes_every_tensor_on_spconv_1_and_2_from_the_layout_for_it() -> None:
    state = VoxelNet().state_dict()
    spconv2 = {f"backbone_3d.{name}": shape for name, shape in openpcdet_backbone_8x().items()}
    spconv1 = {n: (*shape[1:4], shape[4], shape[0]) if len(shape) == 5 else shape for n, shape in spconv2.items()}
    kernels = [name for name, shape in spconv2.items() if len(shape) == 5]
    new, old = (openpcdet_state(state, spconv=version)["model_state"] for version in (2, 1))
    assert len(kernels) == 12
    assert openpcdet_loads(spconv1, new).keys() == spconv1.keys() - set(kernels)  # why there is an option
    for model, file in ((spconv2, new), (spconv2, old), (spconv1, old)):
        assert openpcdet_loads(model, file).keys() == model.keys()
    for name, value in openpcdet_loads(spconv2, old).items():
        assert torch.equal(value, state[name.removeprefix("backbone_3d.")])
    # spconv 1 multiplies an input with weight[z, y, x] (C_in, C_out), spconv 2 with weight[:, z, y, x] (C_out, C_in).
    for name in kernels:
        one, two = old[name], new[name]
        for z, y, x in itertools.product(*map(range, one.shape[:3])):
            assert torch.equal(one[z, y, x], two[:, z, y, x].T)


def test_a_student_exported_with_a_factor_answers_to_scaled_intensities_as_before() -> None:
    torch.manual_seed(0)
    student = VoxelNet()
    rng = np.random.default_rng(0)
    indices = np.unique(rng.integers((0, 4, 500, 500), (1, 30, 540, 540), size=(300, 4)), axis=0).astype(np.int32)
    features = torch.from_numpy(rng.uniform(-20, 20, (len(indices), 4)))
    features[:, 3] = torch.from_numpy(rng.integers(0, 256, len(indices)).astype(np.float64))
    scaled = features.clone()
    scaled[:, 3] /= 255
    file = openpcdet_state(student.state_dict(), intensity_scale=255)["model_state"]
    exported = VoxelNet()
    state = {name.removeprefix("backbone_3d."): value for name, value in file.items()}
    exported.load_state_dict({**student.state_dict(), **state})
    before, after = student.state_dict(), exported.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["conv_input.0.weight"]
    assert torch.equal(before["conv_input.0.weight"][..., :3], after["conv_input.0.weight"][..., :3])
    # In float64, so that the only rounding is that of the stored weights.
    rows: list[torch.Tensor] = [
        torch.nn.functional.relu(norm(convolution(SparseTensor(inputs, torch.from_numpy(indices)), GRID)[0].features))
        for inputs, (convolution, norm, _) in (
            (features, student.double().eval().conv_input),
            (scaled, exported.double().eval().conv_input),
        )
    ]
    assert float(((rows[0] - rows[1]).norm() / rows[0].norm()).detach()) < 1.5e-7
    with torch.no_grad():
        maps = [net(x, torch.from_numpy(indices), 1) for net, x in ((student, features), (exported, scaled))]
        wrong = exported(features, torch.from_numpy(indices), 1)
    assert float((maps[0] - maps[1]).norm() / maps[0].norm()) < 1.5e-7
    assert float((maps[0] - wrong).norm() / maps[0].norm()) > 1e-2


def test_a_factor_that_is_none_and_options_of_another_student_are_refused(student_state: State) -> None:
    for factor in (0.0, -255.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(WeightsError, match=r"intensity_scale"):
            openpcdet_state(VoxelNet().state_dict(), intensity_scale=factor)
    for options in ({"intensity_scale": 255.0}, {"spconv": 1}):
        with pytest.raises(WeightsError, match=r"options of a VoxelNet; for a MinkUNet set INTENSITY_SCALE"):
            openpcdet_state(student_state, **options)  # type: ignore[arg-type]


def test_openpcdet_gets_every_weight_of_the_minkunet_backbone_but_its_head(tmp_path: Path) -> None:
    with torch.device("meta"):
        backbone = MinkUNetBackbone({}, input_channels=4)
    expected = {f"backbone_3d.{n}": v.shape for n, v in backbone.state_dict().items() if not n.startswith("final.")}
    from slidr.models.minkunet import MinkUNet34C

    with torch.device("meta"):
        state = MinkUNet34C().state_dict()
    state = {name: torch.empty_like(value, device="cpu") for name, value in state.items()}
    out = read_checkpoint(export_openpcdet(tmp_path / "pcdet.pth", state))["model_state"]
    assert {name: value.shape for name, value in out.items()} == expected


def test_openpcdet_export_refuses_another_network() -> None:
    with pytest.raises(WeightsError, match=r"expected the state dict of a VoxelNet .* names such as conv1.weight"):
        export_openpcdet("never.pth", {"conv1.weight": torch.ones(1)})


def test_the_minkunet_backbone_gives_every_point_its_voxels_feature() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    clouds = [rng.uniform(-4, 4, size=(n, 4)).astype(np.float32) for n in (40, 25)]
    points = np.concatenate([np.insert(cloud, 0, i, axis=1) for i, cloud in enumerate(clouds)])
    order = rng.permutation(len(points))  # clouds interleaved
    batch = {
        "points": torch.from_numpy(points[order].astype(np.float32)),
        "batch_size": 2,
        "frame_id": "kept",
    }
    options = {"NUM_POINT_FEATURES": 5, "INTENSITY_SCALE": 255.0, "INTENSITY_OFFSET": 1.0}
    backbone = MinkUNetBackbone(options, input_channels=4, grid_size=None).eval()
    assert backbone.num_point_features == 5
    with torch.no_grad():
        out = backbone(batch)
        alone = []
        for cloud in clouds:
            voxels = voxelize(cloud[:, :3])
            intensity = torch.from_numpy(cloud[voxels.point_of_voxel, 3:] * 255 + 1)
            grid = torch.from_numpy(np.insert(voxels.coordinates, 0, 0, axis=1).astype(np.int32))
            answer = super(MinkUNetBackbone, backbone).forward(SparseTensor(intensity, grid)).features
            alone.append(answer[torch.from_numpy(voxels.voxel_of_point)])
    expected = torch.cat(alone)[torch.from_numpy(order)]
    assert out["point_features"].shape == (65, 5)
    assert torch.allclose(out["point_features"], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(out["point_coords"], batch["points"][:, :4])
    assert out["frame_id"] == "kept"
    with pytest.raises(ValueError, match="expected x, y, z, intensity, got 3 channels"):
        MinkUNetBackbone({}, input_channels=3)
