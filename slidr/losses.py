"""Losses: contrast of image and lidar features for pretraining, cross-entropy + Lovasz for segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slidr.ops.pooling import map_segment_mean, segment_mean
from slidr.ops.upsampled import UpsampledMap
from slidr.shapes import Float, Int64

# All-gathers a local (M, C) tensor, M differing between workers, with gradients: every worker's rows,
# concatenated in rank order, and the row at which this worker's begin. Every worker enters it, also with M =
# 0.
Gather = Callable[[Tensor], tuple[Tensor, int]]


# Full-size maps of unit length over channels, or coarse ones that stand for such.
ImageFeatures = Float[Tensor, "B C H W"] | UpsampledMap


class SuperpixelMeans(NamedTuple):
    """Mean features of the superpixels that points fall on, image after image."""

    student_means: Float[Tensor, "M C"]  # over the paired points
    teacher_means: Float[Tensor, "M C"]  # over all pixels
    image_of_superpixel: Int64[Tensor, " M"]
    counts: Int64[Tensor, " M"]  # pairs


def superpixel_means(
    point_features: Float[Tensor, "V C"],
    image_features: ImageFeatures,
    superpixels: Int64[Tensor, "B H W"],
    point_index: Int64[Tensor, " P"],
    pixel_index: Int64[Tensor, "P 3"],
    min_points: int = 1,
) -> SuperpixelMeans:
    """Student and teacher means of every superpixel with at least `min_points` pairs.

    Superpixel ids count from 0 in each image. Pair p joins row ``point_index[p]`` of the student's features
    to pixel ``pixel_index[p]`` = (image, row, column). Means are not normalised.
    """
    images = len(superpixels)
    segments = int(superpixels.max()) + 1 if superpixels.numel() > 0 else 0
    image, row, column = pixel_index.unbind(1)
    segment_of_pair = superpixels[image, row, column] + image * segments
    student, pairs = segment_mean(point_features.index_select(0, point_index), segment_of_pair, images * segments)
    if isinstance(image_features, UpsampledMap):
        teacher, _ = image_features.segment_means(superpixels, segments)
    else:
        teacher, _ = map_segment_mean(image_features, superpixels, segments)
    kept = torch.nonzero(pairs >= max(min_points, 1)).squeeze(1)
    return SuperpixelMeans(
        student_means=student.index_select(0, kept),
        teacher_means=teacher.reshape(images * segments, -1).index_select(0, kept),
        image_of_superpixel=kept // max(segments, 1),
        counts=pairs[kept],
    )


def superpixel_info_nce(
    point_features: Float[Tensor, "V C"],
    image_features: ImageFeatures,
    superpixels: Int64[Tensor, "B H W"],
    point_index: Int64[Tensor, " P"],
    pixel_index: Int64[Tensor, "P 3"],
    temperature: float = 0.07,
    min_points: int = 1,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE between the student and teacher means of superpixels (Sautier et al., CVPR 2022, eq. 1).

    Negatives are the other superpixels of this process's batch or, with `gather`, of every worker's. Without
    any superpixel the loss is 0, still connected to its inputs. See `superpixel_means` for the arguments.
    """
    means = superpixel_means(point_features, image_features, superpixels, point_index, pixel_index, min_points)
    return info_nce(means.student_means, means.teacher_means, temperature, gather)


def point_pixel_info_nce(
    point_features: Float[Tensor, "V C"],
    image_features: ImageFeatures,
    point_index: Int64[Tensor, " P"],
    pixel_index: Int64[Tensor, "P 3"],
    temperature: float = 0.07,
    pairs: int | None = None,
    generator: torch.Generator | None = None,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE between the two features of point-pixel pairs (PPKT, Liu et al., 2021).

    At most `pairs` of them are used, drawn without replacement from `generator`; None or fewer: all of them.
    """
    if pairs is not None and len(point_index) > pairs:
        device = generator.device if generator is not None else torch.device("cpu")
        chosen = torch.randperm(len(point_index), generator=generator, device=device)[:pairs].to(point_index.device)
        point_index, pixel_index = point_index[chosen], pixel_index[chosen]
    student = point_features.index_select(0, point_index)
    if isinstance(image_features, UpsampledMap):
        teacher = image_features.at(pixel_index)
    else:
        image, row, column = pixel_index.unbind(1)
        teacher = image_features[image, :, row, column]
    return info_nce(student, teacher, temperature, gather)


def info_nce(
    student: Float[Tensor, "M C"],
    teacher: Float[Tensor, "M C"],
    temperature: float = 0.07,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Mean over rows of -log softmax(student @ teacher^T / temperature) at the row's own teacher.

    With `gather`, the softmax runs over the teachers of all workers, and a worker's value is its rows' sum
    times workers / all rows: the mean over workers, which is what data-parallel training takes of losses and
    gradients, is then the mean over all rows, however unevenly they lie. Zero rows make a differentiable 0.
    """
    student, teacher = _at_least_float32(student), _at_least_float32(teacher)
    candidates, offset, workers = teacher, 0, 1
    if gather is not None:
        candidates, offset = gather(teacher)
        workers = len(gather(teacher.new_ones(1, 1).detach())[0])  # one row each: how many there are
    if len(candidates) == 0:  # on every worker, so that all agree on which collectives backward enters
        return student.sum() + candidates.sum()
    with torch.autocast(student.device.type, enabled=False):  # half precision is too coarse for logits / 0.07
        logits = student @ candidates.T / temperature
    own = torch.arange(offset, offset + len(student), device=logits.device)
    return F.cross_entropy(logits, own, reduction="sum") * (workers / len(candidates))


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy_lovasz(
    logits: Float[Tensor, "V K"],
    labels: Int64[Tensor, " V"],
    ignore_index: int = 0,
    class_weights: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy (weighted by class if asked) + Lovasz-softmax, over rows not labelled `ignore_index`.

    The weighted cross-entropy is the sum over rows of weight times loss, over the sum of weights; 0, with a gradient
    of 0, where every label that there is weighs nothing. Lovasz counts those classes all the same.
    """
    kept = torch.nonzero(labels != ignore_index).squeeze(1)
    if len(kept) == 0:
        return logits[:0].sum()
    logits, labels = _at_least_float32(logits.index_select(0, kept)), labels[kept]
    return _cross_entropy(logits, labels, class_weights) + lovasz_softmax(logits.softmax(1), labels)


def _cross_entropy(
    logits: Float[Tensor, "V K"], labels: Int64[Tensor, " V"], class_weights: Float[Tensor, " K"] | None
) -> Float[Tensor, ""]:
    if class_weights is None:
        return F.cross_entropy(logits, labels)
    class_weights = class_weights.to(logits.dtype)
    total = class_weights[labels].sum()
    # torch's own mean divides 0 by 0 where no label weighs anything.
    return F.cross_entropy(logits, labels, class_weights, reduction="sum") / total.where(
        total > 0, torch.ones_like(total)
    )


def lovasz_softmax(probabilities: Float[Tensor, "V K"], labels: Int64[Tensor, " V"]) -> Float[Tensor, ""]:
    """The Lovasz extension of the Jaccard loss, averaged over the classes present (Berman et al., CVPR 2018).

    For a class c with errors e = |1[label = c] - p_c| sorted downwards, the loss is the dot product of e with
    the increments of the Jaccard loss 1 - (n - hits) / (n + misses) along that order. All classes at once.
    """
    present, class_of_row = labels.unique(return_inverse=True)
    truth = F.one_hot(class_of_row, len(present)).to(probabilities.dtype)
    errors = (truth - probabilities.index_select(1, present)).abs()
    errors, order = errors.sort(dim=0, descending=True)
    truth = truth.gather(0, order)
    total = truth.sum(0)
    jaccard = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
    increments = torch.cat([jaccard[:1], jaccard.diff(dim=0)])
    return (errors * increments).sum(0).mean()
