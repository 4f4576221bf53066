"""A picture of the method on one keyframe: what the teacher says of an image, the student of the points."""

from __future__ import annotations

import io

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from slidr.ops.upsampled import UpsampledMap
from slidr.shapes import Float
from slidr.types import PairBatch

_RANGE = 30.0  # metres shown around the sensor, seen from above
_DPI = 110


def method_figure(
    batch: PairBatch,
    rows: Float[Tensor, "V C"],
    maps: UpsampledMap,
    image: int = 0,
) -> bytes:
    """PNG of one image of a one-frame batch and its cloud, features coloured by one common projection.

    `rows` are the student's features by voxel, `maps` the teacher's by pixel. Colours are the first three
    principal axes of the teacher's superpixel means over the batch, so equal colours mean equal features,
    whichever network they come from.
    """
    superpixels = batch.superpixels[image].numpy()
    segments = int(batch.superpixels.max()) + 1
    means, counts = maps.segment_means(batch.superpixels, segments)
    project = _Projection(means.reshape(-1, means.shape[-1])[counts.reshape(-1) > 0])
    here = batch.pixel_index[:, 0] == image
    row, column = batch.pixel_index[here, 1].numpy(), batch.pixel_index[here, 2].numpy()
    picture = batch.images[image].permute(1, 2, 0).numpy()

    figure = Figure(figsize=(13, 5.4), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, width_ratios=(1.72, 1.72, 1))
    _show(axes[0, 0], picture, "1  a camera image")
    _show(axes[0, 1], _outlined(picture, superpixels), "2  its superpixels and the lidar points seen in them")
    axes[0, 1].scatter(column, row, s=1.5, c="#ffd400", linewidths=0)
    teacher = project(means[image])[superpixels]
    _show(axes[1, 0], teacher, "3  teacher: one feature per superpixel")
    _show(axes[1, 1], picture * 0.25, "4  student: the same, from the points alone")
    axes[1, 1].scatter(column, row, s=4, c=project(rows[batch.point_index[here]]), linewidths=0)
    cloud = batch.points[:, 1:].numpy()  # a point for every row of a voxel student
    _show_above(axes[0, 2], cloud, "#c8c8c8", "the sweep from above")
    _show_above(axes[1, 2], cloud, project(rows), "5  student features of the whole sweep")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


class _Projection:
    """Features to colours: three principal axes, scaled to their central 96 %."""

    def __init__(self, features: Tensor) -> None:
        self.centre = features.mean(0)
        _, _, found = torch.linalg.svd(features - self.centre, full_matrices=False)
        # Fewer than three features or channels have fewer axes; the colours of the others stay 0.
        self.axes = features.new_zeros(features.shape[1], 3)
        self.axes[:, : min(3, len(found))] = found[:3].T
        values = (features - self.centre) @ self.axes
        self.low, self.high = torch.quantile(values, torch.tensor([0.02, 0.98]), dim=0)

    def __call__(self, features: Tensor) -> np.ndarray:
        values = (features - self.centre) @ self.axes
        return ((values - self.low) / (self.high - self.low).clamp_min(1e-9)).clamp(0, 1).numpy()


def _show(axes: Axes, picture: np.ndarray, title: str) -> None:
    axes.imshow(picture)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_axis_off()


def _show_above(axes: Axes, points: np.ndarray, colours: np.ndarray | str, title: str) -> None:
    axes.set_facecolor("#101014")
    axes.scatter(points[:, 0], points[:, 1], s=1.0, c=colours, linewidths=0)
    axes.set(xlim=(-_RANGE, _RANGE), ylim=(-_RANGE, _RANGE), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, loc="left")


def _outlined(picture: np.ndarray, superpixels: np.ndarray) -> np.ndarray:
    """The picture with white lines where superpixels meet."""
    edge = np.zeros(superpixels.shape, bool)
    edge[:, 1:] |= superpixels[:, 1:] != superpixels[:, :-1]
    edge[1:] |= superpixels[1:] != superpixels[:-1]
    return np.where(edge[..., None], 1.0, picture)
