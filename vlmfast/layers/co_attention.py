"""Layers in which two streams attend to each other: ViLBERT's co-attention block and LXMERT's cross-modality block.

Both directions read the states from before the layer. Text is stream a, vision stream b. Submodules carry the names
of the public checkpoints, where index 1 is vision and 2 is text. With `pairs` the states hold every example once: each
is projected once, attention reads by index, and what follows has a state per pair.

Sizes: B batch, T text rows, R regions, C width of text, Cv of vision, H heads.
"""

from torch import Tensor, nn

from .bert import EPS, AttentionHalf, Intermediate, ResidualOutput
from .streams import Pairs, Rows, co_attend
from .transformer import LayerNorm


class BiAttention(nn.Module):
    """Six projections to one shared width and attention both ways (ViLBERT, arXiv:1908.02265, Fig. 2b)."""

    def __init__(self, text_width: int, vision_width: int, shared_width: int, heads: int, text_dropout: float,
                 vision_dropout: float):
        super().__init__()
        self.heads = heads
        self.text_dropout, self.vision_dropout = text_dropout, vision_dropout
        self.query1, self.key1, self.value1 = (nn.Linear(vision_width, shared_width) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(text_width, shared_width) for _ in range(3))

    def forward(self, text: Tensor, vision: Tensor, text_rows: Rows, vision_rows: Rows, bias: Tensor | None = None,
                return_probs: bool = False, pairs: Pairs | None = None):
        """(text context, vision context, text-over-vision, vision-over-text probabilities); see `co_attend`."""

        def heads(x: Tensor, *projections: nn.Linear) -> tuple[Tensor, ...]:
            return tuple(projection(x).unflatten(-1, (self.heads, -1)) for projection in projections)

        # the public code drops text-over-vision weights with the vision probability, and the other way round
        training = float(self.training)
        text_context, vision_context, *probs = co_attend(
            heads(text, self.query2, self.key2, self.value2), heads(vision, self.query1, self.key1, self.value1),
            text_rows, vision_rows, bias=bias, dropout_a=training * self.vision_dropout,
            dropout_b=training * self.text_dropout, return_probs=return_probs, pairs=pairs,
        )
        return text_context.flatten(-2), vision_context.flatten(-2), *probs


class BiOutput(nn.Module):
    """LN(x + dropout(W context)) of each stream."""

    def __init__(self, text_width: int, vision_width: int, shared_width: int, text_dropout: float,
                 vision_dropout: float):
        super().__init__()
        self.dense1 = nn.Linear(shared_width, vision_width)
        self.LayerNorm1 = LayerNorm(vision_width, eps=EPS)
        self.dropout1 = nn.Dropout(vision_dropout)
        self.dense2 = nn.Linear(shared_width, text_width)
        self.LayerNorm2 = LayerNorm(text_width, eps=EPS)
        self.dropout2 = nn.Dropout(text_dropout)

    def forward(self, text_context: Tensor, text: Tensor, vision_context: Tensor, vision: Tensor):
        text = self.LayerNorm2(self.dropout2(self.dense2(text_context)) + text)
        vision = self.LayerNorm1(self.dropout1(self.dense1(vision_context)) + vision)
        return text, vision


class CoAttentionLayer(nn.Module):
    """Co-attention, then a feed-forward network per stream (ViLBERT, arXiv:1908.02265, sec. 2.1).

    Args:
        text, vision: (width, feed-forward width, activation, dropout, attention dropout) of each stream.
        shared_width, heads: of the co-attention.
    """

    def __init__(self, text: tuple, vision: tuple, shared_width: int, heads: int):
        super().__init__()
        (width, inner, act, drop, attention_drop), (v_width, v_inner, v_act, v_drop, v_attention_drop) = text, vision
        self.biattention = BiAttention(width, v_width, shared_width, heads, attention_drop, v_attention_drop)
        self.biOutput = BiOutput(width, v_width, shared_width, drop, v_drop)
        self.v_intermediate = Intermediate(v_width, v_inner, v_act)
        self.v_output = ResidualOutput(v_inner, v_width, v_drop)
        self.t_intermediate = Intermediate(width, inner, act)
        self.t_output = ResidualOutput(inner, width, drop)

    def forward(self, text: Tensor, vision: Tensor, text_rows: Rows, vision_rows: Rows, bias: Tensor | None = None,
                return_probs: bool = False, pairs: Pairs | None = None):
        """[B, T, C], [B, R, Cv] -> (text, vision, text-over-vision, vision-over-text probabilities or None)."""
        text_context, vision_context, *probs = self.biattention(text, vision, text_rows, vision_rows, bias,
                                                                return_probs, pairs)
        if pairs is not None:
            text, vision = pairs.take(text, vision)
        text, vision = self.biOutput(text_context, text, vision_context, vision)
        vision = self.v_output(self.v_intermediate(vision), vision)
        text = self.t_output(self.t_intermediate(text), text)
        return text, vision, *probs


class SharedAttention(nn.Module):
    """Query, key and value projections that both directions share."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, text: Tensor, vision: Tensor, text_rows: Rows, vision_rows: Rows, return_probs: bool = False,
                pairs: Pairs | None = None):
        def heads(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))

        dropout = self.dropout if self.training else 0.0
        text, vision, *probs = co_attend(heads(text), heads(vision), text_rows, vision_rows, dropout_a=dropout,
                                         dropout_b=dropout, return_probs=return_probs, pairs=pairs)
        return text.flatten(-2), vision.flatten(-2), *probs


class SharedCrossAttention(nn.Module):
    """x <- LN(x + W_o attention(x over the other stream)) for both streams with one set of weights."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.att = SharedAttention(width, heads, attention_dropout)
        self.output = ResidualOutput(width, width, dropout)

    def forward(self, text: Tensor, vision: Tensor, text_rows: Rows, vision_rows: Rows, return_probs: bool = False,
                pairs: Pairs | None = None):
        text_context, vision_context, *probs = self.att(text, vision, text_rows, vision_rows, return_probs, pairs)
        if pairs is not None:
            text, vision = pairs.take(text, vision)
        return self.output(text_context, text), self.output(vision_context, vision), *probs


class CrossModalityLayer(nn.Module):
    """Cross-attention, self-attention, feed-forward for each stream (LXMERT, arXiv:1908.07490, sec. 2.2).

    Args:
        width, heads, inner: C, H and the feed-forward width, the same in both streams.
        dropout, attention_dropout: after the output projections; on the attention weights.
        activation: "gelu", "relu" or "swish".
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float = 0.1, attention_dropout: float = 0.1,
                 activation: str = "gelu"):
        super().__init__()
        self.visual_attention = SharedCrossAttention(width, heads, dropout, attention_dropout)
        self.lang_self_att = AttentionHalf(width, heads, dropout, attention_dropout)
        self.visn_self_att = AttentionHalf(width, heads, dropout, attention_dropout)
        self.lang_inter = Intermediate(width, inner, activation)
        self.lang_output = ResidualOutput(inner, width, dropout)
        self.visn_inter = Intermediate(width, inner, activation)
        self.visn_output = ResidualOutput(inner, width, dropout)

    def forward(self, text: Tensor, vision: Tensor, text_rows: Rows, vision_rows: Rows, return_probs: bool = False,
                pairs: Pairs | None = None):
        """[B, T, C], [B, R, C] -> (text, vision, and the probabilities text over vision, vision over text, text over
        text, vision over vision, each [B, H, S, S'] or None)."""
        text, vision, *cross = self.visual_attention(text, vision, text_rows, vision_rows, return_probs, pairs)
        text, text_probs = self.lang_self_att(text, text_rows, return_probs=return_probs)
        vision, vision_probs = self.visn_self_att(vision, vision_rows, return_probs=return_probs)
        text = self.lang_output(self.lang_inter(text), text)
        vision = self.visn_output(self.visn_inter(vision), vision)
        return text, vision, *cross, text_probs, vision_probs
