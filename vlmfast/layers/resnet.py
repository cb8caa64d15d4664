"""CLIP's image ResNet (arXiv:2103.00020, sec. 2.4): three-convolution stem, anti-aliased strides, attention pooling.

Submodules carry the names of the public CLIP checkpoints.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Residual block, expansion 4. Every convolution has stride 1; an average pool after the second one strides."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int = 1):
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        nn.init.zeros_(self.bn3.weight)  # a new block starts as the identity
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),  # has no weights; checkpoints count from the convolution
                        ("0", nn.Conv2d(channels, out, 1, bias=False)),
                        ("1", nn.BatchNorm2d(out)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 planes, H/stride, W/stride]
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Multi-head attention whose one query is the mean of the map; keys and values are the mean and all cells.

    Args:
        grid: side of the (square) feature map.
        width: its channels C, a multiple of heads.
        output_dim: size of the result.
    """

    def __init__(self, grid: int, width: int, heads: int, output_dim: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"AttentionPool2d: width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, output_dim]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [B, 1 + HW, C]
        x = x + self.positional_embedding.to(x.dtype)
        query, key, value = (
            projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, tokens, C/heads]
            for projection, tokens in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        out = F.scaled_dot_product_attention(query, key, value)
        return self.c_proj(out.transpose(1, 2).flatten(1))


class ModifiedResNet(nn.Module):
    """Stem, four stages of bottlenecks with planes w, 2w, 4w, 8w, attention pooling over the 1/32 map of 32w channels.

    Args:
        layers: blocks per stage.
        width: w, output channels of the stem.
        heads: of the attention pooling.
        image_size: side of the input in pixels, a multiple of 32.
        output_dim: size of the image feature.
    """

    def __init__(self, layers: tuple[int, ...], width: int, heads: int, image_size: int, output_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)

        channels = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            modules = []
            for block in range(blocks):
                modules.append(Bottleneck(channels, planes, stride=2 if stage and not block else 1))
                channels = planes * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*modules))
        self.stages = len(layers)
        self.attnpool = AttentionPool2d(image_size // 32, channels, heads, output_dim)

    def stem(self, x: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, w, S/4, S/4]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.avgpool(x)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, output_dim]
        x = self.stem(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.attnpool(x)
