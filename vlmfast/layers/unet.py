"""U-Net of diffusion models: ADM (Dhariwal and Nichol 2021, arXiv:2105.05233) whose attention also reads a text.

Blocks change the resolution between norm and convolution; the time scales and shifts the second norm of each block.
Sizes: B batch, C channels, E time embedding, height and width of the image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import group_norm_silu
from .unet_attention import EPS, GROUPS, AttentionBlock, zeroed


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of `timesteps` [B] (fractions are legal) at `width` / 2 frequencies: [B, width] float32.

    Frequencies fall geometrically from 1 to 1 / `max_period`; an odd width ends in 0.
    """
    half = width // 2
    ranks = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * ranks / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, width % 2))


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; the second one starts at 0.

    Args:
        channels, out_channels: C in and out. emb_channels: E.
        dropout: before the second convolution.
        resample: "up" doubles and "down" halves both sides, None keeps them.
    """

    def __init__(self, channels: int, emb_channels: int, dropout: float, out_channels: int | None = None,
                 resample: str | None = None):
        super().__init__()
        out_channels = out_channels or channels
        self.resample = resample
        # the gaps in the numbering are the activations, as in the public checkpoints
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels, eps=EPS), nn.SiLU(),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out_channels, eps=EPS), nn.SiLU(), nn.Dropout(dropout),
                                        zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, h, w] with the time embedding [B, E] -> [B, C out, h', w']."""
        norm, _, conv = self.in_layers
        h = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
        h = conv(self._resampled(h))
        scale, shift = self.emb_layers(emb).chunk(2, 1)
        norm, _, dropout, conv = self.out_layers
        h = group_norm_silu(h, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, scale=scale,
                            shift=shift)
        return self.skip_connection(self._resampled(x)) + conv(dropout(h))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x


class Stage(nn.Sequential):
    """Layers of one resolution: a convolution, or ResBlocks with at most one AttentionBlock among them."""

    @property
    def attends(self) -> bool:
        return any(isinstance(layer, AttentionBlock) for layer in self)

    def forward(self, x: Tensor, emb: Tensor, text: tuple[Tensor, Tensor] | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, text) if isinstance(layer, AttentionBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The network, conditioned on a time embedding and on text that its attention reads.

    Args:
        in_channels, out_channels: of the image in and out.
        model_channels: C of a level whose multiplier is 1; the time embedding has E = 4 C.
        channel_mult: multiplier of each level; each level has half the height and width of the one before.
        num_res_blocks: blocks of a level on the way down; one more on the way up.
        attention_levels: indices of levels with attention; the middle always has it.
        head_channels: D, a divisor of the channels of these levels.
        text_width: W.
        use_checkpoint: in training, keep the inputs of stages and compute the rest once more for the gradient.
    """

    def __init__(self, in_channels: int, out_channels: int, model_channels: int, channel_mult: tuple[int, ...],
                 num_res_blocks: int, attention_levels: frozenset[int], head_channels: int, text_width: int,
                 dropout: float = 0.0, use_checkpoint: bool = False):
        super().__init__()
        self.use_checkpoint, self.model_channels = use_checkpoint, model_channels
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def block(before: int, after: int, resample: str | None = None) -> ResBlock:
            return ResBlock(before, emb, dropout, after, resample)

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, channels // head_channels, text_width)

        widths = [mult * model_channels for mult in channel_mult]
        ch, last = widths[0], len(widths) - 1
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                more = [attention(width)] if level in attention_levels else []
                self.input_blocks.append(Stage(block(ch, width), *more))
                ch = width
                skips.append(ch)
            if level != last:
                self.input_blocks.append(Stage(block(ch, ch, "down")))
                skips.append(ch)
        self.middle_block = Stage(block(ch, ch), attention(ch), block(ch, ch))
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            width = widths[level]
            for i in range(num_res_blocks + 1):
                layers = [block(ch + skips.pop(), width)]
                ch = width
                if level in attention_levels:
                    layers.append(attention(ch))
                if level and i == num_res_blocks:
                    layers.append(block(ch, ch, "up"))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, ch, eps=EPS), nn.SiLU(),
                                 zeroed(nn.Conv2d(ch, out_channels, 3, padding=1)))

    @property
    def torso(self) -> tuple[nn.Module, ...]:
        """The parts that half precision applies to."""
        return self.input_blocks, self.middle_block, self.output_blocks

    @property
    def attention_blocks(self) -> list[AttentionBlock]:
        """Attention layers in the order in which they are run."""
        return [module for part in self.torso for module in part.modules() if isinstance(module, AttentionBlock)]

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """[B] -> [B, E]."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))

    def run(self, x: Tensor, emb: Tensor, text: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        """The U itself.

        Args:
            x: [B, C in, height, width], both divisible by 2 ** (levels - 1).
            emb: [B, E].
            text: keys and values of the text for each of `attention_blocks`.

        Returns:
            [B, C out, height, width], of the dtype of the last convolution (float32 unless cast as a whole).
        """
        texts = iter(text)
        h, skips = x.to(self.input_blocks[0][0].weight.dtype), []
        for stage in self.input_blocks:
            h = self._run(stage, h, emb, next(texts) if stage.attends else None)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, next(texts))
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat([h, skips.pop()], 1), emb, next(texts) if stage.attends else None)
        norm, _, conv = self.out
        h = group_norm_silu(h.to(conv.weight.dtype), norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
        return conv(h)

    def _run(self, stage: Stage, h: Tensor, emb: Tensor, text) -> Tensor:
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, text, use_reentrant=False)
        return stage(h, emb, text)
