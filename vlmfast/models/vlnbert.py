"""Recurrent VLN-BERT: an agent that follows instructions and remembers by one state token.

Hong et al. 2021 (arXiv:2011.13922), sec. 3. The instruction is encoded once and then only read: at each step the state
and what is seen attend to it and to one another, the state scores the candidates, and takes up the one chosen. Scores
are h W c / sqrt(C) of the last layer (our choice; the paper takes the last layer's attention scores).

Candidates are the navigable views of a panorama with a stop before them (R2R), or a fixed set of actions beside a grid
of cells (BabyAI).

Sizes: B batch, T tokens, R observed rows (views or cells), K candidates, L steps, C width.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.bert import ACTIVATIONS, EPS, Intermediate, ResidualOutput, TextEmbeddings, init_bert
from ..layers.decoder import DecoderAttention
from ..layers.single_stream import BertEncoder, Segment, SingleStream, set_eps
from ..layers.streams import as_lengths, check_ids
from ..layers.transformer import LayerNorm
from .config import ModelConfig

STOP = 0  # choice of an agent among views; choice k is view k - 1


@dataclass(frozen=True, kw_only=True)
class VLNBERTConfig(ModelConfig):
    """Sizes and options; defaults are those of the paper's PREVALENT variant."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 9  # over the instruction
    num_cross_layers: int = 4  # over state and views, at each step
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = EPS
    image_feat_dim: int = 2048
    image_loc_dim: int = 4  # sin, cos of heading and elevation, relative to the agent; of cells their place; 0: none
    actions: int = 0  # a fixed set of actions to choose from; 0: stop or one of the observed views

    def __post_init__(self):
        self.check_numbers(from_zero=("image_loc_dim", "actions"))
        self.check_choice("hidden_act", ACTIVATIONS)
        self.check_heads("hidden_size", "num_attention_heads")


class VLNBERTState(NamedTuple):
    """Where an agent stands: instruction [B, T, C], which tokens exist [B, T] bool, state token [B, C]."""

    text: Tensor
    keep: Tensor
    state: Tensor


@dataclass
class VLNBERTOutput:
    """logits["action"] is [B, L, K], -inf for candidates that do not exist; `state` follows the last step."""

    logits: dict[str, Tensor]
    state: VLNBERTState = field(repr=False)


class ReadingLayer(nn.Module):
    """State and views attend to the instruction and to themselves; the instruction stays as it is (eq. 3)."""

    def __init__(self, config: VLNBERTConfig):
        super().__init__()
        width, drop = config.hidden_size, config.hidden_dropout_prob
        self.attention = DecoderAttention(width, config.num_attention_heads, drop, config.attention_probs_dropout_prob)
        self.intermediate = Intermediate(width, config.intermediate_size, config.hidden_act)
        self.output = ResidualOutput(config.intermediate_size, width, drop)

    def forward(self, x: Tensor, text: Tensor, keep: Tensor) -> Tensor:  # [B, S, C], [B, T, C], [B, T + S]
        x = self.attention(x, self.attention.read(torch.cat([text, x], 1)), keep)
        return self.output(self.intermediate(x), x)


class VLNBERT(nn.Module):
    """The agent.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: None until a caller sets one.
    """

    def __init__(self, config: VLNBERTConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.tokenizer = config, None
        width, drop = config.hidden_size, config.hidden_dropout_prob
        with torch.device("cpu" if device is None else device):
            self.embeddings = TextEmbeddings(config.vocab_size, width, config.max_position_embeddings, 2, drop)
            self.language = BertEncoder(config.num_hidden_layers, width, config.num_attention_heads,
                                        config.intermediate_size, drop, config.attention_probs_dropout_prob,
                                        config.hidden_act)
            self.feature = nn.Linear(config.image_feat_dim, width)
            self.location = nn.Linear(config.image_loc_dim, width) if config.image_loc_dim else None
            self.action_embeddings = nn.Embedding(max(1, config.actions), width)
            self.LayerNorm = LayerNorm(width, eps=EPS)
            self.dropout = nn.Dropout(drop)
            self.reading = nn.ModuleList(ReadingLayer(config) for _ in range(config.num_cross_layers))
            self.score = nn.Linear(width, width, bias=False)
            self.remember = nn.Linear(2 * width, width)
            self.state_norm = LayerNorm(width, eps=EPS)
            init_bert(self, config.initializer_range)
        set_eps(self, config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.score.weight.dtype

    def available(self) -> tuple[str, ...]:
        return ("action",)

    def start(self, input_ids: Tensor, text_lengths: Tensor | None = None) -> VLNBERTState:
        """The state before the first step: the instruction's [CLS] (sec. 3.2).

        Args:
            input_ids: [B, T] tokens, [CLS] first.
            text_lengths: [B] tokens that exist; None: all.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        check_ids(input_ids)
        segment = Segment.of("attention_mask", None, "text_lengths", text_lengths, input_ids)
        stream = SingleStream.of(len(input_ids), [segment], self.dtype, input_ids.device)
        text, _ = self.language(self.embeddings(input_ids), stream)
        return VLNBERTState(text, stream.keep, text[:, 0])

    def step(self, now: VLNBERTState, image_feat: Tensor, image_loc: Tensor | None = None,
             num_regions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of what can be done.

        Args:
            now: from `start` or `advance`.
            image_feat: [B, R, image_feat_dim] of the navigable views, or of the cells.
            image_loc: [B, R, image_loc_dim]; None where that is 0.
            num_regions: [B] rows that exist; None: all.

        Returns:
            (scores [B, K], candidates' states [B, K, C], the state token [B, C]). K is 1 + R, the stop first, or
            `actions`.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        config, batch = self.config, len(now.state)
        if image_feat.ndim != 3 or len(image_feat) != batch or image_feat.shape[2] != config.image_feat_dim:
            raise ValueError(f"image_feat: has shape {list(image_feat.shape)}, must be "
                             f"[{batch}, R, {config.image_feat_dim}]")
        rows = image_feat.shape[1]
        place = (batch, rows, config.image_loc_dim)
        if (image_loc is None) != (self.location is None) or image_loc is not None and image_loc.shape != place:
            got = "None" if image_loc is None else f"of shape {list(image_loc.shape)}"
            raise ValueError(f"image_loc: is {got}, must be {list(place) if self.location is not None else None}")
        counts = as_lengths("num_regions", num_regions, batch, rows)
        seen = torch.ones(batch, rows, dtype=torch.bool, device=image_feat.device)
        if counts is not None:
            seen = torch.arange(rows, device=image_feat.device) < counts[:, None]
        # what counts leave out, NaN included, must not reach a result
        views = self.feature(image_feat.to(self.dtype).masked_fill(~seen[..., None], 0))
        if self.location is not None:
            views = views + self.location(image_loc.to(self.dtype).masked_fill(~seen[..., None], 0))
        own = self.action_embeddings.weight
        views = self.dropout(self.LayerNorm(torch.cat([own.expand(batch, -1, -1), views], 1)))
        x = torch.cat([now.state[:, None], views], 1)  # [B, 1 + A + R, C]
        keep = torch.cat([now.keep, now.keep.new_ones(batch, 1 + len(own)), seen], 1)
        for layer in self.reading:
            x = layer(x, now.text, keep)
        choices = x[:, 1 : 1 + len(own)] if config.actions else x[:, 1:]
        scores = torch.einsum("bc,bkc->bk", self.score(x[:, 0]), choices) / config.hidden_size**0.5
        if not config.actions:
            scores = scores.masked_fill(~torch.cat([seen.new_ones(batch, 1), seen], 1), -torch.inf)
        return scores, choices, x[:, 0]

    def advance(self, now: VLNBERTState, state: Tensor, choices: Tensor, chosen: Tensor) -> VLNBERTState:
        """The state after candidate `chosen` [B], with the other results of `step` (eq. 7-8)."""
        taken = choices[torch.arange(len(chosen), device=chosen.device), chosen]
        return now._replace(state=self.state_norm(state + self.remember(torch.cat([state, taken], -1))))

    def forward(self, input_ids: Tensor, image_feat: Tensor, chosen: Tensor, image_loc: Tensor | None = None,
                text_lengths: Tensor | None = None, num_regions: Tensor | None = None, *,
                heads: tuple[str, ...] | None = None) -> VLNBERTOutput:
        """Scores along episodes whose choices are given (teacher forcing).

        Args:
            input_ids, text_lengths: as in `start`.
            image_feat, image_loc, num_regions: as in `step`, steps second: [B, L, R, ...], [B, L].
            chosen: [B, L] integers, what was done at each step; any negative number behind an episode's end.
            heads: ("action",) or None.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if unknown := set(heads or ()) - {"action"}:
            raise ValueError(f"heads: has {', '.join(map(repr, sorted(unknown)))}, this model has action")
        if image_feat.ndim != 4 or chosen.shape != image_feat.shape[:2]:
            raise ValueError(f"chosen: has shape {list(chosen.shape)}, image_feat {list(image_feat.shape)}; "
                             "must be [B, L] and [B, L, R, D]")
        now, scores = self.start(input_ids, text_lengths), []
        for i in range(chosen.shape[1]):
            found, choices, state = self.step(now, image_feat[:, i], None if image_loc is None else image_loc[:, i],
                                              None if num_regions is None else num_regions[:, i])
            scores.append(found)
            now = self.advance(now, state, choices, chosen[:, i].clamp(min=0))
        return VLNBERTOutput({"action": torch.stack(scores, 1)}, now)


PRESETS: dict[str, dict] = {
    "vlnbert-base": {},
    "vlnbert-tiny": dict(hidden_size=64, num_hidden_layers=1, num_cross_layers=2, num_attention_heads=4,
                         intermediate_size=128, max_position_embeddings=64, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> VLNBERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return VLNBERT(VLNBERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
