"""VQGAN: Taming Transformers for High-Resolution Image Synthesis (Esser et al. 2021, arXiv:2012.09841), fig. 2 and
tab. 7: a convolutional encoder, a codebook, a convolutional decoder. State-dict keys are taming-transformers'.

DALL-E mini reads its pictures from the decoder alone (`encoder=False`), in pixels of 0 ... 1 and with another epsilon.

Sizes: B batch, C channels, H x W pixels, h x w codes, V vocabulary, D width of a code.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.quantizer import GumbelQuantizer, VectorQuantizer
from .codes import VAEOutput, check_codes, check_image, zero_loss
from .config import ModelConfig

QUANTIZERS = "vq", "gumbel"
PIXEL_RANGES = "signed", "unit"
NORM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class VQGANConfig(ModelConfig):
    """Sizes under taming's names; the defaults are those of the f16 model with 16384 codes."""

    resolution: int = 256  # what it was trained on: decides where attention is; any multiple of the downsampling works
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # of ch, one entry a resolution
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    z_channels: int = 256
    double_z: bool = False
    n_embed: int = 16384  # V
    embed_dim: int = 256  # D
    quantizer: str = "vq"
    beta: float = 0.25  # of a "vq" quantizer, see `vlmfast.ops.vector_quantize`
    legacy: bool = True  # the public checkpoints were trained with it
    kl_weight: float = 5e-4  # of a "gumbel" quantizer
    temperature: float = 0.9
    straight_through: bool = False
    norm_eps: float = 1e-6
    pixel_range: str = "signed"  # -1 ... 1 inside, or "unit": 0 ... 1
    encoder: bool = True  # False: pictures from codes only

    def __post_init__(self):
        for name in ("ch_mult", "attn_resolutions"):
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, name, value)
            if not isinstance(value, tuple) or not all(type(n) is int and n > 0 for n in value):
                self.refuse(name, "positive integers")
        self.check_numbers()
        if not self.ch_mult or self.resolution % self.downsample:
            self.refuse("ch_mult", f"one entry a resolution, with resolution ({self.resolution}) a multiple of "
                                   "2**(entries - 1)")
        for factor in (1, *self.ch_mult):
            if self.ch * factor % NORM_GROUPS:
                self.refuse("ch", f"a multiple of {NORM_GROUPS} times every entry of ch_mult and once")
        for name in ("temperature", "norm_eps"):
            if not getattr(self, name) > 0:
                self.refuse(name, "above 0")
        self.check_choice("quantizer", QUANTIZERS)
        self.check_choice("pixel_range", PIXEL_RANGES)

    @property
    def downsample(self) -> int:
        """Pixels along a side of one code."""
        return 2 ** (len(self.ch_mult) - 1)

    def attends(self, level: int) -> bool:
        """Whether the blocks of that resolution, 0 being the finest, are followed by attention."""
        return self.resolution >> level in self.attn_resolutions


class ResnetBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, config: VQGANConfig):
        super().__init__()
        self.norm1 = _norm(n_in, config)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2 = _norm(n_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One head over all positions, as wide as the features."""

    def __init__(self, width: int, config: VQGANConfig):
        super().__init__()
        self.norm = _norm(width, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(query, key, value)  # [B, 1, h·w, width]
        return x + self.proj_out(out[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: as the public weights were trained


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each with attention behind it where the config says so, and the resize."""

    def __init__(self, n_in: int, n_out: int, blocks: int, attends: bool, config: VQGANConfig, **resize: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(n_out if i else n_in, n_out, config) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(n_out, config) for _ in range(blocks if attends else 0))
        for name, module in resize.items():
            self.add_module(name, module)
        self.resize = tuple(resize)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in self.resize:
            x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    def __init__(self, width: int, config: VQGANConfig):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, config)
        self.attn_1 = AttnBlock(width, config)
        self.block_2 = ResnetBlock(width, width, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[B, C, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.ch * factor for factor in (1, *config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], config.num_res_blocks, config.attends(i), config,
                  **({"downsample": Downsample(widths[i + 1])} if i < last else {})) for i in range(last + 1))
        self.mid = Middle(widths[-1], config)
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels * (2 if config.double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, out_ch, H, W]. `up[0]` is the finest level, and the last that runs."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        sources = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList(
            Level(sources[i], widths[i], config.num_res_blocks + 1, config.attends(i), config,
                  **({"upsample": Upsample(widths[i])} if i else {})) for i in range(len(widths)))
        self.norm_out = _norm(widths[0], config)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Pictures to codes and back, with nearest codes or a Gumbel-softmax.

    Attributes:
        config: sizes.
        vocab_size: V. downsample: pixels along a side of one code.
    """

    def __init__(self, config: VQGANConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.vocab_size, self.downsample = config, config.n_embed, config.downsample
        with nullcontext() if device is None else torch.device(device):
            self.encoder = Encoder(config) if config.encoder else None
            if config.quantizer == "vq":
                self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, config.beta, config.legacy)
            else:
                self.quantize = GumbelQuantizer(config.z_channels, config.n_embed, config.embed_dim,
                                                config.temperature, config.kl_weight, config.straight_through)
            if config.encoder:
                # the logits of a Gumbel quantizer are taken from z_channels features
                width = config.embed_dim if config.quantizer == "vq" else config.z_channels
                self.quant_conv = nn.Conv2d(config.z_channels * (2 if config.double_z else 1), width, 1)
            elif config.quantizer == "gumbel":
                self.quantize.proj = None
            self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
            self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    def target(self, image: Tensor) -> Tensor:
        """The picture in the units of `VAEOutput.raw`."""
        return image * 2 - 1 if self.config.pixel_range == "signed" else image

    def features(self, image: Tensor) -> Tensor:
        """[B, C, H, W] in 0 ... 1 -> what is quantized, [B, D, h, w] ([B, z_channels, h, w] with "gumbel")."""
        if self.encoder is None:
            raise ValueError("VQGAN: this model has no encoder (config.encoder is False), it only decodes")
        image = check_image(self, image, self.config.in_channels, self.downsample)
        return self.quant_conv(self.encoder(self.target(image)))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The nearest, or likeliest, codes without noise: int64 [B, h, w] of a picture [B, C, H, W] in 0 ... 1."""
        features = self.features(image)
        return self.quantize(features).indices if self.config.quantizer == "vq" else self.quantize.encode(features)

    def decode(self, codes: Tensor) -> Tensor:
        """The picture [B, C, H, W] in 0 ... 1 of codes int64 [B, h, w] (or [B, n], n a square)."""
        return self._picture(self.render(self.quantize.decode(check_codes(self, codes, self.vocab_size))))

    def render(self, z: Tensor) -> Tensor:
        """Code vectors [B, D, h, w] -> [B, C, H, W] in the units of `target`."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, image: Tensor, tau: float | None = None, seed: int | None = None) -> VAEOutput:
        """Encode, quantize, decode.

        Args:
            image:  [B, C, H, W] in 0 ... 1.
            tau, seed:  of a Gumbel quantizer, see `vlmfast.ops.gumbel_quantize`; a nearest-code one takes neither.

        Returns:
            VAEOutput. A Gumbel quantizer's `kl` has the config's `kl_weight` in it.
        """
        features = self.features(image)
        if self.config.quantizer == "vq":
            z, codes, loss = self.quantize(features)
            kl = zero_loss(z)
        else:
            z, codes, kl = self.quantize(features, tau, seed)
            loss = zero_loss(z)
        raw = self.render(z)
        return VAEOutput(self._picture(raw), kl, codes, raw, loss)

    def _picture(self, raw: Tensor) -> Tensor:
        raw = raw.float()
        return ((raw + 1) / 2 if self.config.pixel_range == "signed" else raw).clamp(0, 1)


def _norm(width: int, config: VQGANConfig) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, config.norm_eps)


_GUMBEL_F8 = VQGANConfig(ch_mult=(1, 1, 2, 4), attn_resolutions=(32,), n_embed=8192, quantizer="gumbel")
PRESETS: dict[str, VQGANConfig] = {
    "vqgan-f16-16384": VQGANConfig(),
    "vqgan-f16-1024": VQGANConfig(n_embed=1024),
    "vqgan-gumbel-f8": _GUMBEL_F8,
    "dalle-mini-vqgan": VQGANConfig(pixel_range="unit"),
    "vqgan-tiny": VQGANConfig(resolution=32, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,),
                              z_channels=32, n_embed=256, embed_dim=32, legacy=False, beta=0.25),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> VQGAN:
    """A freshly initialised preset; `overrides` replace config fields."""
    preset = PRESETS[name]
    config = VQGANConfig.from_dict({**preset.to_dict(), **overrides}) if overrides else replace(preset)
    return VQGAN(config, device)
