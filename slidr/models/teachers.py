"""Image teachers: a frozen pretrained encoder, a trainable 1x1 head, bilinear upsampling, unit vectors per
pixel.

    teacher(images)[:, :, v, u] = normalise(upsample(head(encoder((images - mean) / std))))[:, :, v, u]

Only the head is trained and only the head needs to be stored; the encoder comes from its weights file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidr.config import TeacherName
from slidr.models import efficientnet
from slidr.models.download import EncoderName, Progress, resolve
from slidr.models.efficientnet import EfficientNetLite0
from slidr.models.files import read_checkpoint
from slidr.models.resnet import ResNet, resnet18, resnet50
from slidr.models.vit import VisionTransformer, vit_base, vit_small
from slidr.models.weights import load_encoder
from slidr.ops.upsampled import UpsampledMap
from slidr.shapes import Float

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Encoder = ResNet | VisionTransformer | EfficientNetLite0


@dataclass(frozen=True)
class Builder:
    """How one teacher is made: its encoder, whose weights fit it, the statistics of its input."""

    encoder: Callable[[], Encoder]
    weights_of: EncoderName
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


TEACHERS: dict[TeacherName, Builder] = {
    "dilation_resnet50": Builder(partial(resnet50, dilated=True), "resnet50"),
    "ppkt_resnet18": Builder(resnet18, "resnet18"),
    "ppkt_resnet50": Builder(resnet50, "resnet50"),
    "dino_vits16": Builder(partial(vit_small, 16), "vits16"),
    "dino_vits8": Builder(partial(vit_small, 8), "vits8"),
    "dino_vitb16": Builder(partial(vit_base, 16), "vitb16"),
    "dino_vitb8": Builder(partial(vit_base, 8), "vitb8"),
    "efficientnet_lite0": Builder(EfficientNetLite0, "efficientnet_lite0", efficientnet.MEAN, efficientnet.STD),
}


class Teacher(nn.Module):
    """Images to unit vectors, one per pixel. The encoder never trains; `head` does."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        """`encoder` maps (B, 3, H, W), multiples of encoder.stride, to (B, encoder.channels, h, w)."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.decoder = nn.Sequential(nn.Conv2d(encoder.channels, out_channels, 1))
        # Not in the state dict, which has the published layout.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def head(self) -> nn.Module:
        """The trainable 1x1 convolution: what a checkpoint has to store of a teacher."""
        return self.decoder

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The head's parameters, for the optimizer."""
        return self.decoder.parameters()

    def train(self, mode: bool = True) -> Teacher:
        """Sets the head's mode; the encoder stays in eval mode: its norms use their stored statistics."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C H W"]:
        """Features of every pixel, of length 1 over C; images are RGB in [0, 1], of any size. See `coarse`."""
        return self.coarse(images).dense()

    def coarse(self, images: Float[Tensor, "B 3 H W"]) -> UpsampledMap:
        """The same as `forward`, at the encoder's resolution: upsampling and normalisation are left to the asker.

        Sides that are no multiple of the encoder's stride are extended by repeating the last row and column,
        and the answer is cropped, so a pixel's place in the map never depends on the remainder. Raises
        `ValueError` for another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"teacher: expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        below, right = -height % self.encoder.stride, -width % self.encoder.stride
        with torch.no_grad():
            normalised = (images - self.mean) / self.std
            if below or right:
                normalised = F.pad(normalised, (0, right, 0, below), mode="replicate")
            # On a CPU one image at a time stays in the cache: half the time for Lite0's wide, thin layers.
            if images.device.type == "cpu":
                features = torch.cat([self.encoder(part) for part in normalised.split(1)])
            else:
                features = self.encoder(normalised)
        return UpsampledMap(self.decoder(features), (height + below, width + right), (height, width))


def build_teacher(
    name: TeacherName,
    out_channels: int = 64,
    weights: str | None = None,
    sha256: str | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Teacher:
    """The teacher called `name`, with its encoder's weights loaded strictly and a freshly drawn head.

    `weights` is a published name (see `slidr.models.download.PUBLISHED`), a path, an http(s) URL, or None for
    random weights; `sha256` is checked when given; `cache` is the folder of downloaded files; `progress` is
    told the bytes of a download so far and in all. Random values come from torch's global generator. Raises
    `ValueError` for an unknown name, and `WeightsError` where the weights cannot be had, are damaged, or do
    not fit the encoder.
    """
    if name not in TEACHERS:
        raise ValueError(f"teacher.name: unknown {name!r}; known: {', '.join(TEACHERS)}")
    builder = TEACHERS[name]
    encoder = builder.encoder()
    if weights is not None:
        path = resolve(weights, sha256, cache, encoder=builder.weights_of, progress=progress)
        load_encoder(encoder, read_checkpoint(path), builder.weights_of, source=str(path))
    return Teacher(encoder, out_channels, builder.mean, builder.std)
