"""Students for other tools: SLidR's own layout, safetensors, and OpenPCDet's detectors."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slidr.models.files import WeightsError, write_checkpoint, write_safetensors
from slidr.models.weights import MINKUNET_STEM, VOXELNET_STEM, voxels_in

State = Mapping[str, Tensor]
Spconv = Literal[1, 2]

_INTENSITY = 3  # the input channel of a VoxelNet that holds it, after x, y, z
_MOST_ENTRIES, _MOST_DEPTH = 100_000, 32  # of a config


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


def export_openpcdet(
    path: str | Path, student_state: State, intensity_scale: float | None = None, spconv: Spconv = 2
) -> str:
    """Writes the student as an OpenPCDet checkpoint {"model_state": {"backbone_3d.*": ...}}; atomic.

    A VoxelNet's names and spconv 2 weights (C_out, kz, ky, kx, C_in) are those of VoxelBackBone8x, the
    backbone of SECOND and PV-RCNN. A MinkUNet keeps its own names, those of
    `slidr.models.openpcdet.MinkUNetBackbone`, which stands in for PointRCNN's PointNet++. The pretraining
    head `final` is left out: the detector trains its own. For the options see `openpcdet_state`. Raises
    `WeightsError` for any other state dict.
    """
    return write_checkpoint(path, openpcdet_state(student_state, intensity_scale, spconv))


def openpcdet_state(student_state: State, intensity_scale: float | None = None, spconv: Spconv = 2) -> dict[str, Any]:
    """What `export_openpcdet` writes.

    `intensity_scale` multiplies a VoxelNet's weights of the intensity, so that it answers to intensities of a data
    set as it did to `intensity_scale` times these: 255 for KITTI's 0..1 after a pretraining on nuScenes' 0..255.
    `spconv` 1 writes its kernels as (kz, ky, kx, C_in, C_out), which spconv 1 stores and OpenPCDet turns into spconv
    2's layout where it runs with that.
    """
    if VOXELNET_STEM not in student_state and MINKUNET_STEM not in student_state:
        raise WeightsError(
            f"export: expected the state dict of a VoxelNet (with {VOXELNET_STEM}) or a MinkUNet (with "
            f"{MINKUNET_STEM}), got names such as {', '.join(list(student_state)[:3])}"
        )
    state = {name: value for name, value in _on_cpu(student_state).items() if not name.startswith("final.")}
    if (intensity_scale is not None or spconv != 2) and VOXELNET_STEM not in state:
        raise WeightsError(
            "export: intensity_scale and spconv are options of a VoxelNet; for a MinkUNet set INTENSITY_SCALE of "
            "MinkUNetBackbone (docs/weights.md)"
        )
    if intensity_scale is not None:
        state[VOXELNET_STEM] = _scaled(state[VOXELNET_STEM], intensity_scale)
    if spconv == 1:
        state = {n: v.permute(1, 2, 3, 4, 0).contiguous() if v.ndim == 5 else v for n, v in state.items()}
    return {"model_state": {f"backbone_3d.{name}": value for name, value in state.items()}, "epoch": 0, "it": 0}


def metadata_of(contents: Mapping[str, Any], source: str = "checkpoint") -> tuple[int, dict[str, Any]]:
    """Epoch and config of a checkpoint's contents, 0 and {} where it has none.

    Raises `WeightsError` for an epoch that is not a count, and for a config that is not made of plain values.
    """
    epoch, config = contents.get("epoch"), contents.get("config")
    if epoch is not None and (not isinstance(epoch, Integral) or isinstance(epoch, bool) or epoch < 0):
        raise WeightsError(f"{source}: epoch: expected a whole number from 0, got {str(epoch)[:80]}")
    config = vars(config) if isinstance(config, Namespace) else {} if config is None else config
    if not isinstance(config, Mapping):
        raise WeightsError(f"{source}: config: expected keys with values, got {type(config).__name__}")
    _require_plain(config, source)
    voxels_in(config, source)
    return int(epoch or 0), dict(config)


def _require_plain(config: Mapping[str, Any], source: str) -> None:
    """Raises `WeightsError` for a config that cannot become JSON, or only a huge one."""
    pending: list[tuple[Any, str, int]] = [(config, "config", 0)]
    entries = 0
    while pending:
        value, name, depth = pending.pop()
        entries += 1
        if depth > _MOST_DEPTH or entries > _MOST_ENTRIES:
            raise WeightsError(f"{source}: config: is nested too deeply or too large to be exported")
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise WeightsError(f"{source}: {name}: has keys that are not text")
            pending += [(inner, f"{name}.{key}", depth + 1) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(inner, name, depth + 1) for inner in value]
        elif not isinstance(value, str | int | float | None):
            raise WeightsError(f"{source}: {name}: holds a {type(value).__name__}, which cannot be exported")


def _scaled(stem: Tensor, factor: float) -> Tensor:
    """The first kernel (C_out, kz, ky, kx, C_in) for intensities that are `factor` times smaller."""
    if not (math.isfinite(factor) and factor > 0):
        raise WeightsError(f"export: intensity_scale: expected a finite factor above 0, got {factor}")
    scaled = stem.float().clone()
    scaled[..., _INTENSITY] *= factor
    if not bool(torch.isfinite(scaled).all()):
        raise WeightsError(f"export: intensity_scale: {factor} makes infinite weights")
    return scaled


def _on_cpu(state: State) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in state.items()}


def _slidr_voxels(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's voxels under SLidR's names; one number where the size is (s, 1, s) or (s, s, s)."""
    found = voxels_in(config, "export")
    size, cylindrical = found.get("voxel_size"), found.get("cylindrical_coordinates")
    if not isinstance(config.get("data"), Mapping) or size is None or cylindrical is None:
        return {}
    size = list(size) if isinstance(size, list | tuple) else [size] * 3
    scalar = size[0] == size[2] == (size[0] if cylindrical else size[1]) and (not cylindrical or size[1] == 1.0)
    return {"voxel_size": size[0] if scalar else size, "cylindrical_coordinates": bool(cylindrical)}
