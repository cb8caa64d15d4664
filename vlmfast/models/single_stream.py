"""What the single-stream models have in common: BERT's settings, the output, the choice of heads.

Sizes: B batch, T text tokens, R regions (or pixels), C width, H heads.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers.bert import ACTIVATIONS, Transform
from ..layers.single_stream import BertEncoder, SingleStream
from .adapting import adapted
from .config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SingleStreamConfig(ModelConfig):
    """The settings of every BERT, under their public names; defaults are bert-base-uncased. The last block is ours."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    classifier_labels: int = 2  # of the head "classifier": Linear, GELU, LayerNorm, Linear, as in MMF
    classifier_images: int = 1  # 2: it reads two consecutive pooled vectors, one statement about two images

    def check(self, heads: tuple[str, ...] = (), from_zero: tuple[str, ...] = ()) -> None:
        """Numbers, the activation, head counts; `heads`: the names that the field of that name may select.

        Raises:
            ValueError: naming the field that is wrong.
        """
        self.check_numbers(from_zero)
        self.check_choice("hidden_act", ACTIVATIONS)
        self.check_heads("hidden_size", "num_attention_heads")
        if heads:
            object.__setattr__(self, "heads", tuple(self.heads))
            if not set(self.heads) <= set(heads):
                self.refuse("heads", f"a selection of {list(heads)}")

    def encoder(self) -> BertEncoder:
        return BertEncoder(self.num_hidden_layers, self.hidden_size, self.num_attention_heads, self.intermediate_size,
                           self.hidden_dropout_prob, self.attention_probs_dropout_prob, self.hidden_act)

    def classifier(self) -> nn.Sequential:
        """Any classification of what the model pools: entailment, sentiment, NLVR2 and others."""
        width = self.hidden_size * self.classifier_images
        return nn.Sequential(Transform(width, self.hidden_act), nn.Linear(width, self.classifier_labels))


@dataclass
class SingleStreamOutput:
    """Last states, pooled vector, scores and, on request, attention maps."""

    text_hidden: Tensor  # [B, T, C]
    image_hidden: Tensor  # [B, R, C]
    pooled: Tensor | None  # [B, C], of the first row; None for a model without pooler
    logits: dict[str, Tensor] = field(default_factory=dict)  # see the model's `forward`
    attentions: tuple[Tensor, ...] | None = None  # per layer [B, H, S, S] of the whole sequence, text first

    @property
    def hidden(self) -> Tensor:
        """[B, T + R, C]"""
        return torch.cat([self.text_hidden, self.image_hidden], dim=1)

    @property
    def text_to_image(self) -> tuple[Tensor, ...] | None:
        """Per layer [B, H, T, R]: the share of text queries that falls on regions; rows sum to less than 1."""
        tokens, last = self.text_hidden.shape[1], self.hidden.shape[1]
        return self.attentions and tuple(probs[:, :, :tokens, tokens:last] for probs in self.attentions)

    @property
    def image_to_text(self) -> tuple[Tensor, ...] | None:
        """Per layer [B, H, R, T]: the share of region queries that falls on text."""
        tokens, last = self.text_hidden.shape[1], self.hidden.shape[1]
        return self.attentions and tuple(probs[:, :, tokens:last, :tokens] for probs in self.attentions)


class SingleStreamModel(nn.Module):
    """Base of the models: `available` names the scores, `word_table` is [V, C].

    Attributes:
        tokenizer: None until a caller sets one.
    """

    def __init__(self, config: SingleStreamConfig):
        super().__init__()
        self.config = config
        self.tokenizer = None

    @property
    def word_table(self) -> Tensor:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.word_table.dtype

    def available(self) -> tuple[str, ...]:
        """The names that `forward` accepts in `heads`."""
        raise NotImplementedError

    def wanted(self, heads: tuple[str, ...] | None) -> tuple[str, ...]:
        """`heads`, or all where it is None; ValueError names those that the model lacks."""
        available = self.available()
        if heads is None:
            return available
        if unknown := [name for name in heads if name not in available]:
            raise ValueError(f"heads: has {', '.join(map(repr, unknown))}, this model has {', '.join(available)}")
        return tuple(heads)

    def adapted(self, *, new_types: tuple[int, ...] = (), new_words: int = 0, **changes) -> "SingleStreamModel":
        """A copy to fine-tune: config fields changed, every tensor both models have copied, the rest new.

        Args:
            new_types: for each new row of the segment table the row it starts as: (1,) for UNITER's NLVR2, (0, 0) for
                its VCR.
            new_words: how many rows the word table grows by.
            changes: config fields, for example heads=("vqa",).

        Raises:
            ValueError: unknown fields, or a tensor of both models whose shapes differ.
        """
        return adapted(self, new_types=new_types, new_words=new_words, **changes)

    def inherited(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What heads this model lacks start as, by our keys."""
        return {}


def in_groups(pooled: Tensor, images: int, demanded: bool, field: str = "classifier_images") -> Tensor | None:
    """[B, C] -> [B / images, images * C], consecutive rows side by side; None where B does not divide.

    Raises:
        ValueError: B does not divide though the score was `demanded`.
    """
    if len(pooled) % images == 0:
        return pooled.reshape(len(pooled) // images, -1)
    if demanded:
        raise ValueError(f"input_ids: has {len(pooled)} rows, must be a multiple of {field}, {images}")
    return None


def before_last(text: Tensor, stream: SingleStream) -> Tensor:
    """[B, C] of the token before the last that exists: a question's [MASK] in front of [SEP].

    Raises:
        ValueError: the texts have fewer than two tokens.
    """
    if text.shape[1] < 2:
        raise ValueError(f"input_ids: has {text.shape[1]} tokens, must have at least 2 to be answered")
    index = (stream.split(stream.keep)[0].sum(1) - 2).clamp(min=0)
    return text[torch.arange(len(text), device=text.device), index]
