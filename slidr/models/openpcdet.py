"""MinkUNet as the backbone of a point-based detector in OpenPCDet (PointRCNN), without importing OpenPCDet.

OpenPCDet builds a backbone as `cls(model_cfg=..., input_channels=..., **geometry)`, calls it with a batch
dict and reads `num_point_features`; this class keeps to that. Its parameters are named as the student's, so
that `export_openpcdet` fits it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidr.models.minkunet import MinkUNet34C
from slidr.ops.voxelize import voxelize
from slidr.sparse import SparseTensor


class MinkUNetBackbone(MinkUNet34C):
    """Per-point features: each point takes those of its voxel.

    Keys of `model_cfg`, all optional: `NUM_POINT_FEATURES` (128), `VOXEL_SIZE` (metres, degrees, metres:
    0.1, 1, 0.1), `CYLINDRICAL` (true), `INTENSITY_SCALE` (1) and `INTENSITY_OFFSET` (0), which bring the
    intensities of the detection data to those of pretraining.
    """

    def __init__(self, model_cfg: Any, input_channels: int, **geometry: Any) -> None:
        """`input_channels` counts x, y, z, intensity and whatever follows, which is not used."""
        if input_channels < 4:
            raise ValueError(f"MinkUNetBackbone: expected x, y, z, intensity, got {input_channels} channels")
        self.num_point_features = int(model_cfg.get("NUM_POINT_FEATURES", 128))
        super().__init__(in_channels=1, out_channels=self.num_point_features, normalize=False)
        self.model_cfg = model_cfg
        self.voxel_size = tuple(float(length) for length in model_cfg.get("VOXEL_SIZE", (0.1, 1.0, 0.1)))
        self.cylindrical = bool(model_cfg.get("CYLINDRICAL", True))
        self.intensity_scale = float(model_cfg.get("INTENSITY_SCALE", 1.0))
        self.intensity_offset = float(model_cfg.get("INTENSITY_OFFSET", 0.0))

    def forward(self, batch_dict: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Adds `point_features` (N, C) and `point_coords` (N, 4) [batch, x, y, z] for `points` (N, 4 + C)."""
        points: Tensor = batch_dict["points"]  # batch, x, y, z in metres, intensity, ...
        clouds = points[:, 0].long()
        coordinates, features, rows = [], [], torch.empty_like(clouds)
        voxels_before = 0
        for cloud in range(int(batch_dict["batch_size"])):
            own = (clouds == cloud).nonzero()[:, 0]
            xyz = points[own, 1:4].detach().cpu().numpy().astype(np.float32)
            voxels = voxelize(xyz, self.voxel_size, self.cylindrical)
            coordinates.append(np.pad(voxels.coordinates, ((0, 0), (1, 0)), constant_values=cloud))
            speaker = torch.from_numpy(voxels.point_of_voxel).to(points.device)
            features.append(points[own][speaker, 4:5])
            rows[own] = voxels_before + torch.from_numpy(voxels.voxel_of_point).to(points.device)
            voxels_before += len(voxels)
        intensity = torch.cat(features) * self.intensity_scale + self.intensity_offset
        grid = torch.from_numpy(np.concatenate(coordinates).astype(np.int32)).to(points.device)
        of_voxel = super().forward(SparseTensor(intensity, grid)).features
        return {**batch_dict, "point_features": of_voxel[rows], "point_coords": points[:, :4]}
