"""ResNet-18 and ResNet-50 image encoders, plain (stride 32) or dilated (stride 4), with torchvision's
parameter names.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with the stride in the 3x3 convolution
of a bottleneck. The dilated variant keeps stride 4: each stage that would halve the map doubles its dilation
instead (Yu & Koltun, "Dilated Residual Networks", CVPR 2017), so any pretrained weights fit it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from slidr.shapes import Float


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y.add_(self.downsample(x) if self.downsample is not None else x))


class Bottleneck(nn.Module):
    """1x1 reduction, 3x3 convolution, 1x1 expansion by 4, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y.add_(self.downsample(x) if self.downsample is not None else x))


class ResNet(nn.Module):
    """The convolutional part of a ResNet: images in, the last stage's feature map out.

    `stride` is pixels per cell of the output, `channels` its depth. A stage's first block convolves with the
    dilation of the stage before it, the others with their own.
    """

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], dilated: bool) -> None:
        super().__init__()
        self.stride = 4 if dilated else 32
        self.channels = 512 * block.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        inputs, dilation = 64, 1
        for width, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
            first_dilation = dilation
            if dilated:
                dilation, stride = dilation * stride, 1
            blocks = [block(inputs, width, stride, first_dilation)]
            inputs = width * block.expansion
            blocks += [block(inputs, width, 1, dilation) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def resnet18(dilated: bool = False) -> ResNet:
    """ResNet-18: 512 channels at stride 32. Two-convolution blocks are not dilated in the literature."""
    return ResNet(BasicBlock, (2, 2, 2, 2), dilated)


def resnet50(dilated: bool = False) -> ResNet:
    """ResNet-50: 2048 channels at stride 32, or 4 when dilated."""
    return ResNet(Bottleneck, (3, 4, 6, 3), dilated)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
