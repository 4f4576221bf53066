"""Students for other tools: SLidR's own layout, safetensors, and OpenPCDet's detectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slidr.models.files import WeightsError, write_checkpoint, write_safetensors
from slidr.models.weights import MINKUNET_STEM, VOXELNET_STEM

State = Mapping[str, Tensor]


def export_slidr(
    student_state: State, teacher_state: State | None, epoch: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """SLidR's published layout {model_points, model_images, epoch, config}; `write_checkpoint` saves it.

    Its own names `voxel_size` and `cylindrical_coordinates` are put at the top of the config, where its
    downstream scripts look for them. `model_images` is left out without a teacher state.
    """
    out: dict[str, Any] = {"model_points": _on_cpu(student_state)}
    if teacher_state is not None:
        out["model_images"] = _on_cpu(teacher_state)
    return {**out, "epoch": epoch, "config": {**config, **_slidr_voxels(config)}}


def export_safetensors(
    path: str | Path, student_state: State, epoch: int | None = None, config: Mapping[str, Any] | None = None
) -> str:
    """Writes the student's state dict as safetensors, epoch and config in the header as JSON; atomic."""
    metadata = {"format": "slidr", "epoch": epoch, "config": config}
    return write_safetensors(path, student_state, {k: v for k, v in metadata.items() if v is not None})


def export_openpcdet(path: str | Path, student_state: State) -> str:
    """Writes the student as an OpenPCDet checkpoint {"model_state": {"backbone_3d.*": ...}}; atomic.

    A VoxelNet's names and spconv 2 weights (C_out, kz, ky, kx, C_in) are those of VoxelBackBone8x, the
    backbone of SECOND and PV-RCNN. A MinkUNet keeps its own names, those of
    `slidr.models.openpcdet.MinkUNetBackbone`, which stands in for PointRCNN's PointNet++. The pretraining
    head `final` is left out: the detector trains its own. Raises `WeightsError` for any other state dict.
    """
    return write_checkpoint(path, openpcdet_state(student_state))


def openpcdet_state(student_state: State) -> dict[str, Any]:
    """What `export_openpcdet` writes."""
    if VOXELNET_STEM not in student_state and MINKUNET_STEM not in student_state:
        raise WeightsError(
            f"export: expected the state dict of a VoxelNet (with {VOXELNET_STEM}) or a MinkUNet (with "
            f"{MINKUNET_STEM}), got names such as {', '.join(list(student_state)[:3])}"
        )
    state = {
        f"backbone_3d.{name}": value for name, value in _on_cpu(student_state).items() if not name.startswith("final.")
    }
    return {"model_state": state, "epoch": 0, "it": 0}


def _on_cpu(state: State) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in state.items()}


def _slidr_voxels(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's voxels under SLidR's names; one number where the size is (s, 1, s) or (s, s, s)."""
    voxel = config.get("data", {}).get("voxel")
    if voxel is None:
        return {}
    size, cylindrical = list(voxel["size"]), bool(voxel["cylindrical"])
    scalar = size[0] == size[2] == (size[0] if cylindrical else size[1]) and (not cylindrical or size[1] == 1.0)
    return {"voxel_size": size[0] if scalar else size, "cylindrical_coordinates": cylindrical}
