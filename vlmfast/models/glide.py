"""GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models (Nichol et al. 2021,
arXiv:2112.10741).

A U-Net predicts the noise in an image, and an interpolation between the bounds of its variance (sec. 2.1), given the
time and a text. A transformer encodes the text: its last position joins the time embedding, all of its positions are
read by the attention layers of the U-Net (sec. 3). The upsampler also sees the small image; the inpainting models see
the known part of the image and its mask (sec. 2.4).

Sizes: B batch, C `num_channels`, N `text_ctx`, W `xf_width`.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.transformer import LayerNorm
from ..layers.unet import UNet
from ..layers.unet_attention import GROUPS, TextTransformer
from .config import ModelConfig, check_ids

NOISE_SCHEDULES = "squaredcos_cap_v2", "linear"
PREDICTIONS = "epsilon", "x0", "v"
IMAGE_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class GLIDEConfig(ModelConfig):
    """Sizes under the public code's names; without arguments the public text-to-image model of 64 x 64."""

    image_size: int = 64  # that the model was made for; others work if they can be halved as often as there are levels
    num_channels: int = 192
    num_res_blocks: int = 3
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    attention_resolutions: tuple[int, ...] = (32, 16, 8)  # of an image of image_size
    num_head_channels: int = 64
    dropout: float = 0.1
    n_vocab: int = 50257
    text_ctx: int = 128
    xf_width: int = 512
    xf_layers: int = 16
    xf_heads: int = 8
    xf_final_ln: bool = True
    xf_padding: bool = True  # padding has a learned embedding for each position
    super_res: bool = False  # is given a smaller image
    inpaint: bool = False  # is given the known part of the image
    noise_schedule: str = "squaredcos_cap_v2"
    diffusion_steps: int = 1000
    prediction: str = "epsilon"  # what the first three channels out are, see `vlmfast.ops.denoise_step`
    use_checkpoint: bool = False  # less memory, more time in training

    def __post_init__(self):
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(type(n) is int and n > 0 for n in value):
                self.refuse(name, "positive integers")
        self.check_numbers()
        self.check_choice("noise_schedule", NOISE_SCHEDULES)
        self.check_choice("prediction", PREDICTIONS)
        self.check_heads("xf_width", "xf_heads")
        if not self.channel_mult or len(self.channel_mult) > 16:
            self.refuse("channel_mult", "1 to 16 integers")
        if self.image_size % self.multiple:
            self.refuse("image_size", f"a multiple of {self.multiple}, as channel_mult has {len(self.channel_mult)} "
                                      "levels")
        if self.num_channels % GROUPS:
            self.refuse("num_channels", f"a multiple of {GROUPS}")
        for level in (*self.attention_levels, len(self.channel_mult) - 1):
            if self.num_channels * self.channel_mult[level] % self.num_head_channels:
                self.refuse("num_head_channels", f"a divisor of {self.num_channels * self.channel_mult[level]}, the "
                                                 f"channels of level {level}")

    @property
    def multiple(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def attention_levels(self) -> frozenset[int]:
        sizes = [self.image_size >> level for level in range(len(self.channel_mult))]
        return frozenset(level for level, size in enumerate(sizes) if size in self.attention_resolutions)

    @property
    def in_channels(self) -> int:
        """The noisy image, then the known part and its mask, then the small image."""
        return IMAGE_CHANNELS * (1 + self.inpaint + self.super_res) + self.inpaint


class TextStates(NamedTuple):
    """A text as the U-Net reads it; it does not change from step to step of sampling.

    xf_proj [B, 4 C] joins the time embedding; xf_out [B, N, W]; encoder_kv holds for each attention layer the keys and
    values [B, N, H, D] that it reads.
    """

    xf_proj: Tensor
    xf_out: Tensor
    encoder_kv: tuple[tuple[Tensor, Tensor], ...]


class GLIDE(UNet):
    """U-Net and text transformer; parameters are named as in the public checkpoints.

    Args:
        config: sizes.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: a GPT2Tokenizer, set by loading and training, or None.
        upsampler: the GLIDE that enlarges this one's images, or None; see `attach_upsampler`.
    """

    def __init__(self, config: GLIDEConfig, device: torch.device | str | None = None):
        with nullcontext() if device is None else torch.device(device):
            super().__init__(config.in_channels, 2 * IMAGE_CHANNELS, config.num_channels, config.channel_mult,
                             config.num_res_blocks, config.attention_levels, config.num_head_channels,
                             config.xf_width, config.dropout, config.use_checkpoint)
            self.config, self.tokenizer, self.upsampler = config, None, None
            width = config.xf_width
            self.transformer = TextTransformer(width, config.xf_layers, config.xf_heads)
            self.final_ln = LayerNorm(width) if config.xf_final_ln else None
            self.token_embedding = nn.Embedding(config.n_vocab, width)
            self.positional_embedding = nn.Parameter(torch.empty(config.text_ctx, width))
            self.transformer_proj = nn.Linear(width, 4 * config.num_channels)
            if config.xf_padding:
                self.padding_embedding = nn.Parameter(torch.empty(config.text_ctx, width))
            self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.config.xf_padding:
            nn.init.normal_(self.padding_embedding, std=0.01)

    def attach_upsampler(self, upsampler: "GLIDE") -> None:
        """Sets `upsampler`.

        Raises:
            ValueError: it is not one, or does not inpaint where this model does or the reverse.
        """
        if not isinstance(upsampler, GLIDE) or not upsampler.config.super_res or self.config.super_res:
            raise ValueError("GLIDE: upsampler must be a GLIDE with super_res, attached to one without")
        if upsampler.config.inpaint != self.config.inpaint:
            raise ValueError(f"GLIDE: upsampler has inpaint {upsampler.config.inpaint}, must be {self.config.inpaint}")
        object.__setattr__(self, "upsampler", upsampler)  # not a submodule: neither trained nor saved with this model

    @property
    def dtype(self) -> torch.dtype:
        """Of convolutions and text; after `to_half` norms and time embedding stay float32."""
        return self.input_blocks[0][0].weight.dtype

    def to_half(self, dtype: torch.dtype = torch.float16) -> "GLIDE":
        """Half precision as in the public code: convolutions and projections of the U, linear layers and token
        embeddings of the text. Norms, everything that embeds the time and the last convolution stay float32.
        float32 as `dtype` undoes it."""
        # the linear layers of the U belong to the time
        for parts, kinds in ((self.torso, nn.Conv1d | nn.Conv2d), ((self.transformer,), nn.Linear)):
            for module in (module for part in parts for module in part.modules()):
                if isinstance(module, kinds):
                    module.to(dtype)
        self.transformer_proj.to(dtype)
        self.token_embedding.to(dtype)
        return self

    def null_text(self, batch: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and mask [B, N] of the empty text: padding only, as guidance and training without text use it."""
        shape, device = (batch, self.config.text_ctx), device or self.positional_embedding.device
        tokens = torch.full(shape, self.config.n_vocab - 1, dtype=torch.int64, device=device)
        return tokens, torch.zeros(shape, dtype=torch.bool, device=device)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> TextStates:
        """Everything that `forward` needs of a text. For guidance: the rows with text, then those of `null_text`.

        Args:
            tokens: [B, N] integers.
            mask: [B, N] bool, False at padding; None means there is none. Attention reads padding all the same: it
                has embeddings of its own (without `xf_padding` the mask changes nothing).

        Raises:
            ValueError: other shapes, or ids outside the vocabulary. TypeError: other dtypes.
        """
        self._check_text(tokens, mask)
        x = self.token_embedding(tokens) + self.positional_embedding
        if self.config.xf_padding and mask is not None:
            x = torch.where(mask[..., None], x, self.padding_embedding.to(x.dtype))
        x = self.transformer(x.to(self.dtype))
        if self.final_ln is not None:
            x = self.final_ln(x)
        kv = tuple(block.text_keys_values(x) for block in self.attention_blocks)
        return TextStates(self.transformer_proj(x[:, -1]), x, kv)

    def forward(self, x: Tensor, timesteps: Tensor, text_states: TextStates | None = None, *,
                tokens: Tensor | None = None, mask: Tensor | None = None, low_res: Tensor | None = None,
                inpaint_image: Tensor | None = None, inpaint_mask: Tensor | None = None) -> Tensor:
        """Noise and variance of a noisy image.

        Args:
            x: [B, 3, height, width], sides divisible by `config.multiple`; pixels were in [-1, 1] before the noise.
            timesteps: [B], 0 ... diffusion_steps - 1, those of the unspaced schedule.
            text_states: of `encode_text`; or `tokens` and `mask` as it takes them.
            low_res: [B, 3, h, w] in [-1, 1], of an upsampler; enlarged bilinearly.
            inpaint_image, inpaint_mask: [B, 3, height, width] and [B, 1, height, width], 1 where the image is known,
                of an inpainting model; without both nothing is known.

        Returns:
            [B, 6, height, width] float32: 3 channels of noise, 3 of the variance in [-1, 1].

        Raises:
            ValueError: shapes that do not fit, an input that is missing or that this model does not take.
        """
        if (text_states is None) == (tokens is None):
            raise ValueError("GLIDE: text_states or tokens must be given, and not both")
        if text_states is None:
            text_states = self.encode_text(tokens, mask)
        self._check_image("x", x, None)
        if tuple(timesteps.shape) != x.shape[:1]:
            raise ValueError(f"GLIDE: timesteps has shape {list(timesteps.shape)}, must be [{len(x)}]")
        if len(text_states.xf_proj) != len(x):
            raise ValueError(f"GLIDE: the text has {len(text_states.xf_proj)} rows, x has {len(x)}")
        emb = self.embed_time(timesteps)
        emb = emb + text_states.xf_proj.to(emb.dtype)
        return self.run(self._with_conditions(x, low_res, inpaint_image, inpaint_mask), emb, text_states.encoder_kv)

    def _with_conditions(self, x, low_res, inpaint_image, inpaint_mask) -> Tensor:
        """[B, in_channels, height, width]."""
        given = {"low_res": (low_res, self.config.super_res), "inpaint_image": (inpaint_image, self.config.inpaint),
                 "inpaint_mask": (inpaint_mask, self.config.inpaint)}
        for name, (value, taken) in given.items():
            if value is not None and not taken:
                raise ValueError(f"GLIDE: {name} must be None: this model has "
                                 f"{'super_res' if name == 'low_res' else 'inpaint'} False")
        parts = [x]
        if self.config.inpaint:
            if (inpaint_image is None) != (inpaint_mask is None):
                absent = "inpaint_image" if inpaint_image is None else "inpaint_mask"
                raise ValueError(f"GLIDE: {absent} is None, must be given with the other of the two")
            if inpaint_mask is None:
                parts.append(x.new_zeros(len(x), IMAGE_CHANNELS + 1, *x.shape[2:]))
            else:
                self._check_image("inpaint_image", inpaint_image, x.shape)
                self._check_image("inpaint_mask", inpaint_mask, (len(x), 1, *x.shape[2:]))
                known = inpaint_mask.to(x.dtype)
                parts += [inpaint_image.to(x.dtype) * known, known]
        if self.config.super_res:
            if low_res is None:
                raise ValueError("GLIDE: low_res is None, must be the small image of an upsampler")
            self._check_image("low_res", low_res, (len(x), IMAGE_CHANNELS, *low_res.shape[2:]))
            parts.append(F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear", align_corners=False))
        return torch.cat(parts, 1) if len(parts) > 1 else x

    def _check_image(self, name: str, image: Tensor, shape) -> None:
        if shape is not None:
            if image.ndim != 4 or tuple(image.shape) != tuple(shape):
                raise ValueError(f"GLIDE: {name} has shape {list(image.shape)}, must be {list(shape)}")
            return
        multiple = self.config.multiple
        if image.ndim != 4 or image.shape[1] != IMAGE_CHANNELS or any(n % multiple or not n for n in image.shape[2:]):
            raise ValueError(f"GLIDE: {name} has shape {list(image.shape)}, must be [B, {IMAGE_CHANNELS}, height, "
                             f"width] with sides divisible by {multiple}")

    def _check_text(self, tokens: Tensor, mask: Tensor | None) -> None:
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"GLIDE: tokens are {tokens.dtype}, must be integers")
        if tokens.ndim != 2 or tokens.shape[1] != self.config.text_ctx:
            raise ValueError(f"GLIDE: tokens has shape {list(tokens.shape)}, must be [B, {self.config.text_ctx}]")
        check_ids("GLIDE", "tokens", tokens, self.config.n_vocab)
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"GLIDE: mask is {mask.dtype}, must be bool")
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"GLIDE: mask has shape {list(mask.shape)}, must be {list(tokens.shape)}")


_UPSAMPLE = dict(image_size=256, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), super_res=True,
                 noise_schedule="linear")
_TINY = dict(image_size=32, num_channels=32, num_res_blocks=1, channel_mult=(1, 2, 3), attention_resolutions=(16, 8),
             num_head_channels=32, n_vocab=1024, text_ctx=24, xf_width=128, xf_layers=2, xf_heads=4)
PRESETS: dict[str, dict] = {
    "glide-base": {},
    "glide-upsample": _UPSAMPLE,
    "glide-base-inpaint": dict(inpaint=True),
    "glide-upsample-inpaint": dict(**_UPSAMPLE, inpaint=True),
    "glide-tiny": _TINY,
    "glide-tiny-upsample": dict(_TINY, super_res=True, noise_schedule="linear"),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> GLIDE:
    """A freshly initialised preset; `overrides` replace config fields."""
    return GLIDE(GLIDEConfig.from_dict({**PRESETS[name], **overrides}), device=device)
