"""Sentiment and emotion from text and picture: a head over the fused vector of any model.

No reference code; the standard heads (our choice): Linear, or Linear, GELU, Linear, after dropout. The vector is the
pooled one of a BERT-like model (ViLBERT: the product of its two), or of a dual encoder u, v and u * v of the normalised
features, or one of them.

Sizes: B batch, D width of the vector, C labels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .clip import CLIP
from .config import ModelConfig

KINDS = ("classes", "labels", "intensity")
READS = ("pair", "image", "text")


@dataclass(frozen=True, kw_only=True)
class AffectConfig(ModelConfig):
    """The head."""

    kind: str = "classes"  # "classes": one of C; "labels": any of C; "intensity": a number, as -3 to 3 in MOSI
    labels: tuple[str, ...] = ("negative", "neutral", "positive")  # names; not read for "intensity"
    hidden: int = 0  # inner width; 0: one Linear
    dropout: float = 0.1
    reads: str = "pair"  # of a dual encoder: "pair" [u, v, u * v], "image" v, "text" u

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        self.check_numbers(from_zero=("hidden",))
        self.check_choice("kind", KINDS)
        self.check_choice("reads", READS)
        if self.kind != "intensity" and (not self.labels or len(set(self.labels)) < len(self.labels)):
            self.refuse("labels", "at least one name, each once")

    @property
    def outputs(self) -> int:
        return 1 if self.kind == "intensity" else len(self.labels)


@dataclass
class AffectOutput:
    """pooled [B, D] is what the head reads; logits["affect"] is [B, C], or [B] for an intensity."""

    pooled: Tensor
    logits: dict[str, Tensor] = field(default_factory=dict)


class AffectModel(nn.Module):
    """A model with an affect head; all of it is trained.

    Args:
        trunk: a BERT-like model, or a CLIP.
        config: of the head.

    Attributes:
        tokenizer, preprocess: those of the trunk.

    Raises:
        ValueError: a BERT-like trunk without pooled vector (a VL-BERT without pooler), or `reads` of a CLIP.
    """

    def __init__(self, trunk: nn.Module, config: AffectConfig):
        super().__init__()
        self.trunk, self.config, self.dual = trunk, config, isinstance(trunk, CLIP)
        if not self.dual:
            if config.reads != "pair":
                config.refuse("reads", "'pair' for a model that reads text and picture together")
            if not getattr(trunk.config, "with_pooler", True):
                raise ValueError("AffectModel: trunk.config.with_pooler is False, must be True")
        width = self.width
        layers = [nn.Linear(width, config.outputs)]
        if config.hidden:
            layers = [nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.outputs)]
        self.affect = nn.Sequential(nn.Dropout(config.dropout), *layers)
        self.affect.to(next(trunk.parameters()))

    @property
    def width(self) -> int:
        """D"""
        config = self.trunk.config
        if self.dual:
            return config.embed_dim * (3 if self.config.reads == "pair" else 1)
        return getattr(config, "bi_hidden_size", config.hidden_size)

    @property
    def tokenizer(self):
        return self.trunk.tokenizer

    @property
    def preprocess(self):
        return getattr(self.trunk, "preprocess", None)

    def available(self) -> tuple[str, ...]:
        return ("affect",)

    def forward(self, *, heads: tuple[str, ...] | None = None, output_attentions: bool = False,
                **inputs: Tensor) -> AffectOutput:
        """Scores; `inputs` are the trunk's: `image` [B, 3, H, W] and `text` [B, T] of a CLIP, one where `reads` says
        so."""
        if self.dual:
            wanted = {"pair": ("image", "text"), "image": ("image",), "text": ("text",)}[self.config.reads]
            for name in wanted:
                if inputs.get(name) is None:
                    raise ValueError(f"{name}: is None, must be given to a head that reads {self.config.reads!r}")
            found = self.trunk(**{name: inputs[name] for name in wanted})
            parts = [getattr(found, f"{name}_features") for name in reversed(wanted)]  # u of the text, v of the image
            vector = torch.cat([*parts, parts[0] * parts[1]], -1) if len(parts) == 2 else parts[0]
        else:
            output = self.trunk(**inputs, heads=())
            vector = getattr(output, "pooled", None)  # ViLBERT has one of each stream
            if vector is None:
                add = self.trunk.config.fusion_method == "sum"
                text, image = output.pooled_text, output.pooled_image
                vector = text + image if add else text * image
        scores = self.affect(vector)
        return AffectOutput(vector, {"affect": scores[:, 0] if self.config.kind == "intensity" else scores})
