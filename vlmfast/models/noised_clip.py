"""The CLIP that guides GLIDE (Nichol et al. 2021, arXiv:2112.10741, sec. 2.3): trained on noisy images, its image tower
knows how much noise there is.

Both towers are pre-LN transformers. The image tower has a learned token for each timestep in place of CLIP's class
token; keys have no bias. The public code pads both sequences to whole blocks of 32 and hides the padding behind a
finite mask of -1e10; in float32 that is exactly the attention without padding, which is what is computed here.

Sizes: B batch, S image side, W tower width, T positions, E `n_embd`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attention
from .clip import CLIPOutput
from .config import ModelConfig, check_ids

# of pixels 0 ... 255, as in CLIP
IMAGE_MEAN = 122.77093945, 116.74601272, 104.09373519
IMAGE_STD = 68.50053285, 66.63215831, 70.32316309
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class NoisedCLIPConfig(ModelConfig):
    """Sizes under the public code's names; without arguments the public model."""

    image_size: int = 64
    patch_size: int = 4
    n_timesteps: int = 1000
    n_vocab: int = 65536
    max_text_len: int = 77
    n_embd: int = 512
    n_head_text: int = 8
    n_head_state_text: int = 64  # channels of a head
    n_xf_blocks_text: int = 12
    n_head_image: int = 12
    n_head_state_image: int = 64
    n_xf_blocks_image: int = 12
    logit_scale: float = 100.0  # the scale itself, a constant

    def __post_init__(self):
        self.check_numbers()
        if self.image_size % self.patch_size:
            self.refuse("image_size", f"a multiple of patch_size, {self.patch_size}")

    @property
    def text_width(self) -> int:
        return self.n_head_text * self.n_head_state_text

    @property
    def image_width(self) -> int:
        return self.n_head_image * self.n_head_state_image


class Affine(nn.Module):
    """Linear layer whose parameters are called `w` [out, in] and `b` [out]."""

    def __init__(self, width: int, out: int, std: float, bias: bool = True):
        super().__init__()
        self.w = nn.Parameter(torch.empty(out, width).normal_(std=std))
        self.b = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class Norm(nn.Module):
    """LayerNorm in float32 or wider whose parameters are called `g` and `b`; the result has the dtype of the input."""

    def __init__(self, width: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), self.g.shape, self.g.to(wide), self.b.to(wide), EPS).to(x.dtype)


class AttentionResblock(nn.Module):
    """x + f_c(attention(ln x))."""

    def __init__(self, width: int, heads: int, residuals: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln = Norm(width)
        self.f_q = Affine(width, width, width**-0.5)
        self.f_k = Affine(width, width, width**-0.5, bias=False)
        self.f_v = Affine(width, width, width**-0.5)
        self.f_c = Affine(width, width, width**-0.5 / residuals)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, W] -> [B, T, W]
        h = self.ln(x)
        query, key, value = (f(h).unflatten(-1, (self.heads, -1)) for f in (self.f_q, self.f_k, self.f_v))
        return x + self.f_c(attention(query, key, value, causal=self.causal).out.flatten(2))


class MLPResblock(nn.Module):
    """x + f_2(gelu(f_1(ln x)))."""

    def __init__(self, width: int, residuals: int):
        super().__init__()
        self.ln = Norm(width)
        self.f_1 = Affine(width, 4 * width, (2 * width) ** -0.5)
        self.f_2 = Affine(4 * width, width, width**-0.5 / residuals)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f_2(F.gelu(self.f_1(self.ln(x))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, residuals: int, causal: bool):
        super().__init__()
        self.f_attn = AttentionResblock(width, heads, residuals, causal)
        self.f_mlp = MLPResblock(width, residuals)

    def forward(self, x: Tensor) -> Tensor:
        return self.f_mlp(self.f_attn(x))


class ImageInput(nn.Module):
    """Patches behind the token of the timestep, with positions, normalised."""

    def __init__(self, config: NoisedCLIPConfig):
        super().__init__()
        width, patch = config.image_width, config.patch_size
        cells = (config.image_size // patch) ** 2
        self.w_t = nn.Parameter(torch.empty(config.n_timesteps, width).normal_(std=width**-0.5))
        self.patch_proj = nn.Parameter(torch.empty(width, 3, patch, patch).normal_(std=(2 / width) ** 0.5 / patch))
        self.w_pos = nn.Parameter(torch.empty(1 + cells, width).normal_(std=width**-0.5))
        self.ln = Norm(width)

    def forward(self, image: Tensor, timesteps: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1], [B] -> [B, 1 + patches, W]."""
        # filled on the device: a copy from the host would wait for it at every step of sampling
        mean, std = (torch.cat([image.new_full((1, 1, 1), value) for value in values])
                     for values in (IMAGE_MEAN, IMAGE_STD))
        pixels = ((image + 1) * 127.5 - mean) / std
        patches = F.conv2d(pixels.to(self.patch_proj.dtype), self.patch_proj, stride=self.patch_proj.shape[-1])
        x = torch.cat([self.w_t[timesteps][:, None], patches.flatten(2).transpose(1, 2)], 1)
        return self.ln(x + self.w_pos)


class TextInput(nn.Module):
    """Tokens with positions."""

    def __init__(self, config: NoisedCLIPConfig):
        super().__init__()
        self.w_voc = nn.Parameter(torch.empty(config.n_vocab, config.text_width).normal_(std=0.02))
        self.w_pos = nn.Parameter(torch.empty(config.max_text_len, config.text_width).normal_(std=0.01))

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, W]
        return F.embedding(tokens, self.w_voc) + self.w_pos


class Output(nn.Module):
    """The feature read at one position."""

    def __init__(self, width: int, n_embd: int):
        super().__init__()
        self.ln = Norm(width)
        self.f = Affine(width, n_embd, (2 / (width + n_embd)) ** 0.5, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, W] -> [B, E]
        return self.f(self.ln(x))


class Encoder(nn.Module):
    """A tower: `blocks.input`, `blocks.block_0` ..., `blocks.output`."""

    def __init__(self, first: nn.Module, width: int, heads: int, layers: int, n_embd: int, causal: bool):
        super().__init__()
        blocks = {f"block_{i}": Block(width, heads, 2 * layers, causal) for i in range(layers)}
        self.blocks = nn.ModuleDict({"input": first, **blocks, "output": Output(width, n_embd)})

    def states(self, *inputs: Tensor) -> Tensor:
        """[B, T, W] of the last block."""
        first, *rest, _ = self.blocks.values()
        x = first(*inputs)
        for block in rest:
            x = block(x)
        return x


class NoisedCLIP(nn.Module):
    """Both towers; their parameters are named as in the public files, after `image_encoder.` and `text_encoder.`.

    Args:
        config: sizes.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: a CLIPTokenizer, set by loading, or None.
    """

    def __init__(self, config: NoisedCLIPConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.tokenizer = config, None
        with nullcontext() if device is None else torch.device(device):
            self.image_encoder = Encoder(ImageInput(config), config.image_width, config.n_head_image,
                                         config.n_xf_blocks_image, config.n_embd, causal=False)
            self.text_encoder = Encoder(TextInput(config), config.text_width, config.n_head_text,
                                        config.n_xf_blocks_text, config.n_embd, causal=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_encoder.blocks["input"].w_voc.dtype

    def encode_image(self, image: Tensor, timesteps: Tensor, normalize: bool = False, *,
                     return_probe_features: bool = False) -> Tensor:
        """Features of noisy images.

        Args:
            image: [B, 3, S, S]; [-1, 1] is black to white.
            timesteps: [B] integers, 0 ... n_timesteps - 1, those of the unspaced schedule.
            normalize: to length 1.
            return_probe_features: the last state of the timestep's token, [B, W], instead.

        Returns:
            [B, E].
        """
        size = self.config.image_size
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, size, size):
            raise ValueError(f"NoisedCLIP: image has shape {list(image.shape)}, must be [B, 3, {size}, {size}]")
        self._check_integers("timesteps", timesteps, (len(image),), self.config.n_timesteps)
        x = self.image_encoder.states(image, timesteps)[:, 0]
        return x if return_probe_features else self._features(self.image_encoder, x, normalize)

    def encode_text(self, tokens: Tensor, text_len: Tensor | None = None, normalize: bool = False, *,
                    return_probe_features: bool = False) -> Tensor:
        """Features of texts.

        Args:
            tokens: [B, max_text_len] integers, start and end included.
            text_len: [B] integers, tokens of each text before its padding; None where the end is the greatest id, as
                a CLIPTokenizer has it.
            normalize: to length 1.
            return_probe_features: the last state of the end's position, [B, W], instead.

        Returns:
            [B, E].
        """
        shape = len(tokens), self.config.max_text_len
        self._check_integers("tokens", tokens, shape, self.config.n_vocab)
        if text_len is None:
            text_len = tokens.argmax(-1) + 1
        last = text_len - 1
        self._check_integers("text_len - 1", last, shape[:1], shape[1])
        x = self.text_encoder.states(tokens)[torch.arange(len(tokens), device=tokens.device), last]
        return x if return_probe_features else self._features(self.text_encoder, x, normalize)

    def forward(self, image: Tensor, timesteps: Tensor, tokens: Tensor, text_len: Tensor | None = None) -> CLIPOutput:
        """Normalised features of both, and the scale of their products."""
        image_features = self.encode_image(image, timesteps, normalize=True)
        text_features = self.encode_text(tokens, text_len, normalize=True)
        return CLIPOutput(image_features, text_features, image_features.new_full((), self.config.logit_scale))

    def cond_fn(self, tokens: Tensor, text_len: Tensor | None = None,
                grad_scale: float = 1.0) -> Callable[..., Tensor]:
        r"""What pulls a sample towards a text: :math:`g \nabla_x\, s\, f(x_t, t) \cdot h(c)` (sec. 2.3).

        Args:
            tokens, text_len: as in `encode_text`; 1 row for all images, or as many as there are images.
            grad_scale: g.

        Returns:
            `guide(x, t, grad_scale=g)` -> gradient [B, 3, S, S] of the dtype of x; t as in `encode_image`. It works
            under `torch.no_grad` and leaves the gradients of parameters alone.
        """
        with torch.no_grad():
            text = self.encode_text(tokens, text_len, normalize=True)
        scale = self.config.logit_scale

        def guide(x: Tensor, t: Tensor, grad_scale: float = grad_scale) -> Tensor:
            if len(text) not in (1, len(x)):
                raise ValueError(f"cond_fn: x has {len(x)} rows, must have {len(text)}, one for each text")
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                similarity = scale * (text * self.encode_image(x, t, normalize=True)).sum()
                return torch.autograd.grad(similarity, x)[0] * grad_scale

        return guide

    def _features(self, encoder: Encoder, x: Tensor, normalize: bool) -> Tensor:
        x = encoder.blocks["output"](x)
        return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-12) if normalize else x

    def _check_integers(self, name: str, value: Tensor, shape: tuple[int, ...], size: int) -> None:
        if value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"NoisedCLIP: {name} are {value.dtype}, must be integers")
        if tuple(value.shape) != shape:
            raise ValueError(f"NoisedCLIP: {name} has shape {list(value.shape)}, must be {list(shape)}")
        check_ids("NoisedCLIP", name, value, size)


PRESETS: dict[str, dict] = {"glide-noised-clip": {}}


def build(name: str, device: torch.device | str | None = None, **overrides) -> NoisedCLIP:
    """A freshly initialised preset; `overrides` replace config fields."""
    return NoisedCLIP(NoisedCLIPConfig.from_dict({**PRESETS[name], **overrides}), device=device)
