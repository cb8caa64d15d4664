"""Discrete VAEs that turn a picture into a grid of codes and back: OpenAI's, and DALLE-pytorch's small one.

`DVAE`: Zero-Shot Text-to-Image Generation (Ramesh et al. 2021, arXiv:2102.12092), app. A and the published encoder and
decoder. `DiscreteVAE`: strided convolutions, as in lucidrains/DALLE-pytorch, whose state-dict keys it has.
Both take pictures in 0 ... 1, and both relax the choice of a code with Gumbel noise (`vlmfast.ops.gumbel_quantize`).

Sizes: B batch, C channels, H x W pixels, h x w codes, V vocabulary, D width of a code.
"""

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers.pixels import map_pixels, unmap_pixels
from ..ops import encode_indices, gumbel_quantize
from .codes import VAEOutput, check_codes, check_image, code_vectors, zero_loss
from .config import ModelConfig

GROUPS = 4


@dataclass(frozen=True, kw_only=True)
class DVAEConfig(ModelConfig):
    """Sizes under the names of the published code; the defaults are those of the public model."""

    image_size: int = 256  # what it was trained on; any multiple of 8 works
    input_channels: int = 3
    vocab_size: int = 8192  # V
    n_hid: int = 256  # width of the first encoder group, a multiple of 4; the last has 8 times as much
    n_init: int = 128  # D
    n_blk_per_group: int = 2
    temperature: float = 1.0  # of `forward` where no tau is given
    decoder: bool = True  # False: codes only, as FLAVA's image codebook

    def __post_init__(self):
        self.check_numbers()
        if self.n_hid % 4:
            self.refuse("n_hid", "a multiple of 4")
        if not self.temperature > 0:
            self.refuse("temperature", "above 0")


class Block(nn.Module):
    """x or its 1 x 1 projection, plus a small multiple of four convolutions, a ReLU before each."""

    def __init__(self, n_in: int, n_out: int, n_layers: int, kernels: tuple[int, ...]):
        super().__init__()
        self.post_gain = 1 / n_layers**2
        self.id_path = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, *(n_out // 4,) * 3, n_out)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels, 1):
            path[f"relu_{i}"] = nn.ReLU()
            path[f"conv_{i}"] = nn.Conv2d(widths[i - 1], widths[i], kernel, padding=kernel // 2)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


def _group(n_in: int, n_out: int, blocks: int, kernels: tuple[int, ...], resize: dict[str, nn.Module]) -> nn.Sequential:
    parts = {f"block_{i + 1}": Block(n_out if i else n_in, n_out, GROUPS * blocks, kernels) for i in range(blocks)}
    return nn.Sequential(OrderedDict(parts | resize))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """[B, C, H, W] mapped pixels -> features [B, 8 n_hid, H/8, W/8], which `blocks.output.conv` turns into logits."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        widths = [config.n_hid * factor for factor in (1, 1, 2, 4, 8)]
        parts: dict[str, nn.Module] = {"input": nn.Conv2d(config.input_channels, widths[0], 7, padding=3)}
        for i in range(GROUPS):
            resize = {"pool": nn.MaxPool2d(2)} if i < GROUPS - 1 else {}
            parts[f"group_{i + 1}"] = _group(widths[i], widths[i + 1], config.n_blk_per_group, (3, 3, 3, 1), resize)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(widths[-1], config.vocab_size, 1)))
        self.blocks = nn.Sequential(OrderedDict(parts))

    def features(self, x: Tensor) -> Tensor:
        for name, part in self.blocks.named_children():
            x = part.relu(x) if name == "output" else part(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    """Code vectors -> [B, 2 C, 8 h, 8 w]: mean and logarithm of the scale of each pixel's logit-Laplace distribution.

    `blocks.input` is the codebook: a 1 x 1 convolution of one-hot codes.
    """

    def __init__(self, config: DVAEConfig):
        super().__init__()
        widths = [config.n_init, *(config.n_hid * factor for factor in (8, 4, 2, 1))]
        parts: dict[str, nn.Module] = {"input": nn.Conv2d(config.vocab_size, widths[0], 1)}
        for i in range(GROUPS):
            resize = {"upsample": nn.Upsample(scale_factor=2, mode="nearest")} if i < GROUPS - 1 else {}
            parts[f"group_{i + 1}"] = _group(widths[i], widths[i + 1], config.n_blk_per_group, (1, 3, 3, 3), resize)
        last = nn.Conv2d(widths[-1], 2 * config.input_channels, 1)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks = nn.Sequential(OrderedDict(parts))

    @property
    def codebook(self) -> Tensor:
        """[V, D], without the bias that is added to every code."""
        return self.blocks.input.weight.flatten(1).T

    def forward(self, z: Tensor) -> Tensor:
        """z: [B, D, h, w], rows of the codebook or mixtures of them."""
        z = z + self.blocks.input.bias[:, None, None]
        for name, part in self.blocks.named_children():
            z = z if name == "input" else part(z)
        return z


class DVAE(nn.Module):
    """OpenAI's discrete VAE: 8 x 8 pixels become one of V codes.

    Attributes:
        config: sizes.
        vocab_size: V. downsample: pixels along a side of one code, 8.
    """

    downsample = 8

    def __init__(self, config: DVAEConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        with nullcontext() if device is None else torch.device(device):
            self.encoder = Encoder(config)
            self.decoder = Decoder(config) if config.decoder else None
            self.apply(_initialise)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.blocks.input.weight.dtype

    def target(self, image: Tensor) -> Tensor:
        """The picture in the units of `VAEOutput.raw`: mapped pixels, 0.1 ... 0.9."""
        return map_pixels(image)

    def logits(self, image: Tensor) -> Tensor:
        """[B, C, H, W] in 0 ... 1 -> [B, V, H/8, W/8], float32 under autocast."""
        x = map_pixels(check_image(self, image, self.config.input_channels, self.downsample))
        return _wide_conv(self.encoder.blocks.output.conv, self.encoder.features(x))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The most likely codes, without noise and without the logits in memory.

        Args:
            image:  [B, C, H, W] in 0 ... 1.

        Returns:
            int64 [B, H/8, W/8].
        """
        x = map_pixels(check_image(self, image, self.config.input_channels, self.downsample))
        last = self.encoder.blocks.output.conv
        return encode_indices(self.encoder.features(x).to(last.weight.dtype), last.weight, last.bias)

    def statistics(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] or [B, n] -> [B, 2 C, 8 h, 8 w], see `Decoder`."""
        decoder = self._needed_decoder()
        return decoder(code_vectors(check_codes(self, codes, self.vocab_size), decoder.codebook))

    def decode(self, codes: Tensor) -> Tensor:
        """The picture [B, C, 8 h, 8 w] in 0 ... 1 of codes int64 [B, h, w] (or [B, n], n a square)."""
        return self._picture(self.statistics(codes))

    def forward(self, image: Tensor, tau: float | None = None, seed: int | None = None, *, mode: str = "soft",
                kl_weight: float = 1.0, noise: Tensor | None = None) -> VAEOutput:
        """Encode, relax the choice of codes, decode.

        Args:
            image:  [B, C, H, W] in 0 ... 1.
            tau, seed, mode, kl_weight, noise: see `vlmfast.ops.gumbel_quantize`; noise is [B, V, H/8, W/8].

        Returns:
            VAEOutput; `raw` is [B, 2 C, H, W], see `Decoder`.
        """
        decoder, logits = self._needed_decoder(), self.logits(image)
        tau = self.config.temperature if tau is None else tau
        z, codes, kl = gumbel_quantize(logits, decoder.codebook, tau=tau, mode=mode, kl_weight=kl_weight, seed=seed,
                                       noise=noise)
        raw = decoder(z)
        return VAEOutput(self._picture(raw), kl, codes, raw, zero_loss(raw))

    def _picture(self, statistics: Tensor) -> Tensor:
        return unmap_pixels(statistics[:, : self.config.input_channels].float().sigmoid())

    def _needed_decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError("DVAE: this model has no decoder (config.decoder is False), it only encodes")
        return self.decoder


def _wide_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    # the softmax over thousands of codes needs float32, as in the published model
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.to(conv.weight.dtype))


@dataclass(frozen=True, kw_only=True)
class DiscreteVAEConfig(ModelConfig):
    """Settings under the names of DALLE-pytorch's `DiscreteVAE`, with its defaults."""

    image_size: int = 256
    num_tokens: int = 512  # V
    codebook_dim: int = 512  # D
    num_layers: int = 3  # halvings of the side
    num_resnet_blocks: int = 0
    hidden_dim: int = 64
    channels: int = 3
    smooth_l1_loss: bool = False  # what it was trained with; else squared error
    temperature: float = 0.9
    straight_through: bool = False
    reinmax: bool = False  # with straight_through
    kl_div_loss_weight: float = 0.0
    # means and deviations, of which the first `channels` count; None: pictures as they are
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0))

    def __post_init__(self):
        self.check_numbers(from_zero=("num_resnet_blocks",))
        if self.image_size % 2**self.num_layers:
            self.refuse("image_size", f"a multiple of 2**num_layers, {2**self.num_layers}")
        if not self.temperature > 0:
            self.refuse("temperature", "above 0")
        if self.reinmax and not self.straight_through:
            self.refuse("reinmax", "False without straight_through")
        if self.normalization is not None:
            pair = tuple(tuple(float(value) for value in values)[: self.channels] for values in self.normalization)
            if [len(values) for values in pair] != [self.channels] * 2 or min(pair[1]) <= 0:
                self.refuse("normalization", f"{self.channels} means and {self.channels} positive deviations, or None")
            object.__setattr__(self, "normalization", pair)

    @property
    def mode(self) -> str:
        """Of `vlmfast.ops.gumbel_quantize`."""
        return "reinmax" if self.reinmax else "straight_through" if self.straight_through else "soft"


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x


class DiscreteVAE(nn.Module):
    """DALLE-pytorch's discrete VAE: `num_layers` strided convolutions down, as many transposed ones up.

    Attributes:
        config: sizes.
        vocab_size: V. downsample: pixels along a side of one code, 2**num_layers.
    """

    def __init__(self, config: DiscreteVAEConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.vocab_size, self.downsample = config, config.num_tokens, 2**config.num_layers
        hidden, blocks = config.hidden_dim, config.num_resnet_blocks
        ends = [config.channels, config.codebook_dim if not blocks else hidden]
        with nullcontext() if device is None else torch.device(device):
            self.codebook = nn.Embedding(config.num_tokens, config.codebook_dim)
            down, up = ([], [])
            for i in range(config.num_layers):
                first, second = (hidden if i else width for width in ends)
                down.append(nn.Sequential(nn.Conv2d(first, hidden, 4, 2, 1), nn.ReLU()))
                up.append(nn.Sequential(nn.ConvTranspose2d(second, hidden, 4, 2, 1), nn.ReLU()))
            entry = [nn.Conv2d(config.codebook_dim, hidden, 1)] if blocks else []
            self.encoder = nn.Sequential(*down, *(ResBlock(hidden) for _ in range(blocks)),
                                         nn.Conv2d(hidden, config.num_tokens, 1))
            self.decoder = nn.Sequential(*entry, *(ResBlock(hidden) for _ in range(blocks)), *up,
                                         nn.Conv2d(hidden, config.channels, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.codebook.weight.dtype

    def target(self, image: Tensor) -> Tensor:
        """The picture in the units of `VAEOutput.raw`: (image - mean) / std."""
        return _affine(image, self.config.normalization)

    def features(self, image: Tensor) -> Tensor:
        x = _affine(check_image(self, image, self.config.channels, self.downsample), self.config.normalization)
        for part in list(self.encoder)[:-1]:
            x = part(x)
        return x

    def logits(self, image: Tensor) -> Tensor:
        """[B, C, H, W] in 0 ... 1 -> [B, V, h, w], float32 under autocast."""
        return _wide_conv(self.encoder[-1], self.features(image))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The most likely codes, int64 [B, h, w], of a picture [B, C, H, W] in 0 ... 1; without noise."""
        last = self.encoder[-1]
        return encode_indices(self.features(image).to(last.weight.dtype), last.weight, last.bias)

    def decode(self, codes: Tensor) -> Tensor:
        """The picture [B, C, H, W] in 0 ... 1 of codes int64 [B, h, w] (or [B, n], n a square)."""
        z = code_vectors(check_codes(self, codes, self.vocab_size), self.codebook.weight)
        return self._picture(self.decoder(z))

    def forward(self, image: Tensor, tau: float | None = None, seed: int | None = None, *, mode: str | None = None,
                kl_weight: float = 1.0, noise: Tensor | None = None) -> VAEOutput:
        """See `DVAE.forward`; without `mode` the config's. `raw` is [B, C, H, W] in the units of `target`."""
        logits = self.logits(image)
        z, codes, kl = gumbel_quantize(logits, self.codebook.weight, mode=mode or self.config.mode, seed=seed,
                                       tau=self.config.temperature if tau is None else tau, kl_weight=kl_weight,
                                       noise=noise)
        raw = self.decoder(z)
        return VAEOutput(self._picture(raw), kl, codes, raw, zero_loss(raw))

    def _picture(self, raw: Tensor) -> Tensor:
        return _affine(raw.float(), self.config.normalization, inverse=True).clamp(0, 1)


def _affine(image: Tensor, normalization, inverse: bool = False) -> Tensor:
    if normalization is None:
        return image
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in normalization)
    return image * std + mean if inverse else (image - mean) / std


PRESETS: dict[str, DVAEConfig | DiscreteVAEConfig] = {
    "openai-dvae": DVAEConfig(),
    "dvae-tiny": DVAEConfig(image_size=32, vocab_size=512, n_hid=32, n_init=64, n_blk_per_group=1),
    "dvae-small": DiscreteVAEConfig(image_size=32, num_tokens=512, codebook_dim=64, num_layers=2, num_resnet_blocks=1,
                                    hidden_dim=64),
    "dalle-pytorch-dvae": DiscreteVAEConfig(num_tokens=8192, num_resnet_blocks=2, hidden_dim=256),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> DVAE | DiscreteVAE:
    """A freshly initialised preset; `overrides` replace config fields."""
    preset = PRESETS[name]
    config = type(preset).from_dict({**preset.to_dict(), **overrides}) if overrides else replace(preset)
    return (DVAE if isinstance(config, DVAEConfig) else DiscreteVAE)(config, device)
