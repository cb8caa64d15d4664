"""CLIP: Learning Transferable Visual Models From Natural Language Supervision (Radford et al. 2021, arXiv:2103.00020).

An image tower (vision transformer or modified ResNet) and a causal text transformer, each projected to one shared
space (Fig. 3). State-dict keys are those of the public OpenAI checkpoints.

Sizes: B batch, S image side in pixels, P patch side, T tokens, W width of a tower, E shared embedding.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import LayerNorm, ModifiedResNet, Transformer

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes of both towers, under the names of the public OpenAI code. Head counts given as None are filled in."""

    embed_dim: int
    image_size: int
    vision_layers: int | tuple[int, ...]  # blocks of the ViT, or blocks per stage of the ResNet
    vision_width: int
    vision_patch_size: int | None  # None: ResNet
    vision_heads: int | None = None  # None: width // 64 (ViT), width * 32 // 64 (ResNet)
    vision_mlp_ratio: float = 4.0
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_heads: int | None = None  # None: width // 64
    text_layers: int = 12
    text_mlp_ratio: float = 4.0
    quick_gelu: bool = True  # False: exact GELU, the open_clip default
    layer_norm_eps: float = 1e-5
    eos_token_id: int | None = None  # None: the text feature sits at the largest token id, else at the first such id
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None  # a number adds a learned bias (SigLIP, arXiv:2303.15343)
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD

    def __post_init__(self):
        for name in ("vision_layers", "image_mean", "image_std"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        if self.resnet != isinstance(self.vision_layers, tuple) or (self.resnet and len(self.vision_layers) != 4):
            raise ValueError(
                f"CLIPConfig: vision_layers is {self.vision_layers}, vision_patch_size is {self.vision_patch_size}; "
                "a ResNet needs four block counts and None, a ViT two integers"
            )
        layers = self.vision_layers if self.resnet else (self.vision_layers,)
        sizes = {"vision_layers": layers, "vision_patch_size": (32 if self.resnet else self.vision_patch_size,)}
        for name in ("embed_dim", "image_size", "vision_width", "context_length", "vocab_size", "text_width",
                     "text_layers"):
            sizes[name] = (getattr(self, name),)
        for name, values in sizes.items():
            if not all(type(value) is int and value > 0 for value in values):
                raise ValueError(f"CLIPConfig: {name} is {getattr(self, name)!r}, must be positive integers")
        if self.image_size < sizes["vision_patch_size"][0]:
            raise ValueError(f"CLIPConfig: image_size is {self.image_size}, less than one patch")
        if self.eos_token_id is not None and type(self.eos_token_id) is not int:
            raise ValueError(f"CLIPConfig: eos_token_id is {self.eos_token_id!r}, must be an integer or None")
        for name in ("vision_mlp_ratio", "text_mlp_ratio", "layer_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"CLIPConfig: {name} is {value!r}, must be a positive number")
        for tower, width in (("vision", self.vision_width * (32 if self.resnet else 1)), ("text", self.text_width)):
            heads = getattr(self, f"{tower}_heads")
            if heads is None:
                heads = max(1, width // 64)
                object.__setattr__(self, f"{tower}_heads", heads)
            if type(heads) is not int or heads < 1 or width % heads:
                raise ValueError(f"CLIPConfig: {tower}_heads is {heads!r}, must divide the attention width {width}")

    @property
    def resnet(self) -> bool:
        return self.vision_patch_size is None

    @property
    def grid(self) -> int:
        """Side of the image tower's token grid."""
        return self.image_size // (self.vision_patch_size or 32)

    def mlp_width(self, tower: str) -> int:
        """Hidden units of the "vision" or "text" MLPs: width * ratio, rounded down."""
        width, ratio = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_mlp_ratio")
        return int(width * ratio + 1e-6)  # a ratio computed from two whole numbers may come out an ulp low

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "CLIPConfig":
        """Inverse of `to_dict`; raises ValueError on unknown fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"CLIPConfig: unknown fields {', '.join(unknown)}")
        return cls(**values)


class VisionTransformer(nn.Module):
    """Patches and a class token through a pre-LN transformer; the feature is the projected class token."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, patch = config.vision_width, config.vision_patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(config.grid**2 + 1, width) * width**-0.5)
        self.ln_pre = LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = Transformer(
            width, config.vision_layers, config.vision_heads, config.mlp_width("vision"),
            config.quick_gelu, config.layer_norm_eps,
        )
        self.ln_post = LayerNorm(width, eps=config.layer_norm_eps)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, E]
        x = self.conv1(image).flatten(2).transpose(1, 2)  # [B, (S/P)^2, W]
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1)  # [B, 1 + (S/P)^2, W]
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIPOutput(NamedTuple):
    image_features: Tensor | None  # [B, E], unit length
    text_features: Tensor | None  # [B, E], unit length
    logit_scale: Tensor  # [], the scale itself


class CLIP(nn.Module):
    """Both towers and the temperature.

    Args:
        config: sizes.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        logit_scale: [] fp32, the logarithm of the scale; the objective multiplies cosines by its exponential.
        logit_bias: [] fp32 or None.
        tokenizer, preprocess: set when a checkpoint is loaded; turn strings and images into model input.
    """

    def __init__(self, config: CLIPConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.preprocess = None
        width = config.text_width
        with nullcontext() if device is None else torch.device(device):
            if config.resnet:
                self.visual = ModifiedResNet(
                    config.vision_layers, config.vision_width, config.vision_heads, config.image_size, config.embed_dim
                )
            else:
                self.visual = VisionTransformer(config)
            self.transformer = Transformer(
                width, config.text_layers, config.text_heads, config.mlp_width("text"),
                config.quick_gelu, config.layer_norm_eps, causal=True,
            )
            self.token_embedding = nn.Embedding(config.vocab_size, width)
            self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
            self.ln_final = LayerNorm(width, eps=config.layer_norm_eps)
            self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
            self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
            bias = config.init_logit_bias
            self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
            nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Image features.

        Args:
            image: [B, 3, S, S] floating point, normalised with the config's mean and std.
            normalize: scale each row to length 1.

        Returns:
            [B, E] in the dtype of the model.

        Raises:
            ValueError: the shape does not fit the config.
        """
        size = self.config.image_size
        if image.ndim != 4 or image.shape[1:] != (3, size, size):
            raise ValueError(f"encode_image: image has shape {list(image.shape)}, must be [B, 3, {size}, {size}]")
        features = self.visual(image.to(self.dtype))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Text features, read at the end-of-text token: the largest id, its first occurrence on ties.

        Args:
            tokens: [B, T] integer ids, T at most context_length.
            normalize: scale each row to length 1.

        Returns:
            [B, E] in the dtype of the model.

        Raises:
            TypeError: tokens are not integers.
            ValueError: the shape does not fit the config.
        """
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"encode_text: tokens are {tokens.dtype}, must be integers")
        longest = self.config.context_length
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= longest:
            raise ValueError(f"encode_text: tokens have shape {list(tokens.shape)}, must be [B, 1..{longest}]")
        position = self.positional_embedding[: tokens.shape[1]]
        x = (self.token_embedding(tokens) + position).to(self.dtype)  # [B, T, W]
        x = self.ln_final(self.transformer(x))
        eos = self.config.eos_token_id
        end = tokens.argmax(dim=-1) if eos is None else (tokens == eos).int().argmax(dim=-1)
        features = x[torch.arange(len(x), device=x.device), end] @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> CLIPOutput:
        """Unit-length features of what is given, and exp(logit_scale); see `encode_image` and `encode_text`."""
        return CLIPOutput(
            None if image is None else self.encode_image(image, normalize=True),
            None if text is None else self.encode_text(text, normalize=True),
            self.logit_scale.exp(),
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale within [1, 100] (sec. 2.5); call after each optimizer step."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def _sizes(embed_dim, image_size, layers, width, patch, text_width, text_layers=12, **rest) -> dict:
    return dict(
        embed_dim=embed_dim, image_size=image_size, vision_layers=layers, vision_width=width,
        vision_patch_size=patch, text_width=text_width, text_layers=text_layers, **rest,
    )


# Table 19-20 of the paper; the last three large ones are open_clip's (arXiv:2212.07143).
PRESETS: dict[str, dict] = {
    "clip-rn50": _sizes(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "clip-rn101": _sizes(512, 224, (3, 4, 23, 3), 64, None, 512),
    "clip-rn50x4": _sizes(640, 288, (4, 6, 10, 6), 80, None, 640),
    "clip-rn50x16": _sizes(768, 384, (6, 8, 18, 8), 96, None, 768),
    "clip-rn50x64": _sizes(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "clip-vit-b-32": _sizes(512, 224, 12, 768, 32, 512),
    "clip-vit-b-16": _sizes(512, 224, 12, 768, 16, 512),
    "clip-vit-l-14": _sizes(768, 224, 24, 1024, 14, 768),
    "clip-vit-l-14-336": _sizes(768, 336, 24, 1024, 14, 768),
    "clip-vit-h-14": _sizes(1024, 224, 32, 1280, 14, 1024, 24, vision_heads=16, quick_gelu=False),
    "clip-vit-g-14": _sizes(
        1024, 224, 40, 1408, 14, 1024, 24, vision_heads=16, vision_mlp_ratio=4.3637, quick_gelu=False
    ),
    "clip-vit-bigg-14": _sizes(
        1280, 224, 48, 1664, 14, 1280, 32, vision_heads=16, vision_mlp_ratio=4.9231, quick_gelu=False
    ),
    "clip-tiny": _sizes(128, 32, 4, 128, 4, 128, 3, context_length=32, vocab_size=1024),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> CLIP:
    """A freshly initialised preset; `overrides` replace config fields."""
    return CLIP(CLIPConfig.from_dict({**PRESETS[name], **overrides}), device=device)
