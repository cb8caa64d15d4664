"""Residual networks as detectors and grid models use them: ResNet (He et al. 2015, arXiv:1512.03385) and ResNeXt
(Xie et al. 2016, arXiv:1611.05431), up to the last feature map. Submodules carry torchvision's names.

Sizes: B batch, H x W image in pixels, C channels of the last map (32 times the width of the stem).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name -> (blocks of each stage, groups of the 3 x 3 convolution, its channels per group in a stage of 64)
RESNETS = {
    "resnet50": ((3, 4, 6, 3), 1, 64),
    "resnet101": ((3, 4, 23, 3), 1, 64),
    "resnet152": ((3, 8, 36, 3), 1, 64),
    "resnext50": ((3, 4, 6, 3), 32, 4),
    "resnext101": ((3, 4, 23, 3), 32, 8),
    "resnext152": ((3, 8, 36, 3), 32, 8),
}


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with the stored statistics, scale and shift, none of which is trained."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ResidualBottleneck(nn.Module):
    """x + conv1x1(conv3x3(conv1x1(x))), each followed by a norm, with a projected shortcut where shapes change.

    Args:
        channels: of the input.
        inner: of the 3 x 3 convolution.
        out: of the result.
        stride: of the block, in the 3 x 3 convolution (torchvision) or, with stride_in_1x1, in the first one (the
            original and detectron2's ResNet-50 and -101).
        groups, dilation: of the 3 x 3 convolution.
        frozen_norm: `FrozenBatchNorm2d` instead of nn.BatchNorm2d.
    """

    def __init__(self, channels: int, inner: int, out: int, stride: int = 1, groups: int = 1, dilation: int = 1,
                 stride_in_1x1: bool = False, frozen_norm: bool = False):
        super().__init__()
        norm = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(channels, inner, 1, stride=first, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=second, padding=dilation, dilation=dilation, groups=groups,
                               bias=False)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = norm(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, out, H/stride, W/stride]
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem and four stages of bottlenecks; the result is the last stage's map (conv5).

    Args:
        layers: blocks of each stage.
        groups, group_width: of the 3 x 3 convolutions; see `RESNETS`.
        width: channels of the stem, 64 in all public models.
        stride_in_1x1, frozen_norm: see `ResidualBottleneck`.
        last_dilation: 2 leaves the last stage at 1/16 of the image, with dilated convolutions; 1 strides to 1/32.
    """

    def __init__(self, layers: tuple[int, ...] = (3, 4, 6, 3), groups: int = 1, group_width: int = 64, width: int = 64,
                 stride_in_1x1: bool = False, frozen_norm: bool = False, last_dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm2d(width) if frozen_norm else nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(layers):
            out, modules = 4 * width * 2**stage, []
            inner = width * group_width // 64 * 2**stage * groups
            dilation = last_dilation if stage == len(layers) - 1 else 1
            for block in range(blocks):
                stride = 2 if stage and not block and dilation == 1 else 1
                modules.append(ResidualBottleneck(channels, inner, out, stride, groups, dilation, stride_in_1x1,
                                                  frozen_norm))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*modules))
        self.stages, self.channels = len(layers), channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C, H/32, W/32]
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x
