"""Post-LN transformer parts under the names of the public BERT checkpoints (Devlin et al. 2019, arXiv:1810.04805).

Sizes: B batch, S rows of a stream, N rows of all its examples without padding, C width, H heads. States are [B, S, C],
or [N, C] packed; `rows` says which (see `streams`). GELU is the exact one and LayerNorm's epsilon sits inside the root.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streams import Rows, self_attend
from .transformer import LayerNorm

EPS = 1e-12
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


def init_bert(module: nn.Module, std: float) -> None:
    """N(0, std) for every Linear and Embedding, zero biases, LayerNorm (1, 0)."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class TextEmbeddings(nn.Module):
    """LN(word + position + segment), then dropout.

    Args:
        vocab_size, width, positions, types: sizes of the three tables.
        dropout: probability after the LayerNorm.
        padding: which tables ("word", "position", "type") never give row 0 a gradient, as in the public code.
        first_position: position of token 0 (2 for RoBERTa vocabularies).
        tasks: rows of a table whose row `task_ids` is inserted after token 0, before the LayerNorm and without
            position and segment; 0 for none (12-in-1, arXiv:1912.02315, sec. 3.3).
    """

    def __init__(self, vocab_size: int, width: int, positions: int, types: int, dropout: float = 0.1,
                 padding: tuple[str, ...] = ("word",), first_position: int = 0, tasks: int = 0):
        super().__init__()
        self.first_position = first_position

        def table(name: str, rows: int) -> nn.Embedding:
            return nn.Embedding(rows, width, padding_idx=0 if name in padding else None)

        self.word_embeddings = table("word", vocab_size)
        self.position_embeddings = table("position", positions)
        self.token_type_embeddings = table("type", types)
        self.task_embeddings = nn.Embedding(tasks, width) if tasks else None
        self.LayerNorm = LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, task_ids: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids -> [B, T, C], or [B, T + 1, C] with `task_ids` [B] or [B, 1]."""
        x = self.total(input_ids, token_type_ids)
        if self.task_embeddings is not None:
            if task_ids is None:
                raise ValueError("task_ids: is None, must be given to a model with task tokens")
            task = self.task_embeddings(task_ids.reshape(-1, 1)).expand(len(x), 1, -1)
            x = torch.cat([x[:, :1], task, x[:, 1:]], dim=1)
        return self.dropout(self.LayerNorm(x))

    def total(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """[B, T] ids -> word + position + segment [B, T, C], before the LayerNorm."""
        longest = self.position_embeddings.num_embeddings - self.first_position
        if input_ids.shape[1] > longest:
            raise ValueError(f"input_ids: has {input_ids.shape[1]} tokens, must have at most {longest}")
        position = torch.arange(self.first_position, self.first_position + input_ids.shape[1], device=input_ids.device)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        if types.shape != input_ids.shape:
            raise ValueError(f"token_type_ids: has shape {list(types.shape)}, must be {list(input_ids.shape)}")
        return self.word_embeddings(input_ids) + self.position_embeddings(position) + self.token_type_embeddings(types)


class BertSelfAttention(nn.Module):
    """Softmax attention of a stream over itself, before the output projection.

    Args:
        width, heads: C and H.
        dropout: probability on the attention weights.
        gate_width: width of a vector that scales query and key channels by 1 + sigmoid(W m); None for no gate
            (ViLBERT's `dynamic_attention`).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.1, gate_width: int | None = None):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"BertSelfAttention: width {width} is not a multiple of heads {heads}")
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        if gate_width is not None:
            self.dyLinear_q, self.dyLinear_k = nn.Linear(gate_width, width), nn.Linear(gate_width, width)

    def forward(self, x: Tensor, rows: Rows, gate: Tensor | None = None, return_probs: bool = False):
        """(context like x, probabilities [B, H, S, S] or None); `gate` broadcasts against x."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if gate is not None:
            query = query * (1 + torch.sigmoid(self.dyLinear_q(gate)))
            key = key * (1 + torch.sigmoid(self.dyLinear_k(gate)))
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        out, probs = self_attend(query, key, value, rows, dropout=dropout, return_probs=return_probs)
        return out.flatten(-2), probs


class ResidualOutput(nn.Module):
    """LN(residual + dropout(W x)): the end of the attention and of the feed-forward half."""

    def __init__(self, inner: int, width: int, dropout: float = 0.1):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Intermediate(nn.Module):
    """act(W x): the widening half of the feed-forward network."""

    def __init__(self, width: int, inner: int, activation: str = "gelu"):
        super().__init__()
        self.dense = nn.Linear(width, inner)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class AttentionHalf(nn.Module):
    """x <- LN(x + W_o attention(x)), under the key names `self` and `output`."""

    def __init__(self, width: int, heads: int, dropout: float = 0.1, attention_dropout: float = 0.1,
                 gate_width: int | None = None):
        super().__init__()
        self.self = BertSelfAttention(width, heads, attention_dropout, gate_width)
        self.output = ResidualOutput(width, width, dropout)

    def forward(self, x: Tensor, rows: Rows, gate: Tensor | None = None, return_probs: bool = False):
        context, probs = self.self(x, rows, gate, return_probs)
        return self.output(context, x), probs


class BertLayer(nn.Module):
    """x <- LN(x + W_o attention(x)); x <- LN(x + W_2 act(W_1 x)).

    Args:
        width, heads, inner: C, H and the feed-forward width.
        dropout, attention_dropout: after both output projections; on the attention weights.
        activation: "gelu", "relu" or "swish".
        gate_width: see `BertSelfAttention`.
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float = 0.1, attention_dropout: float = 0.1,
                 activation: str = "gelu", gate_width: int | None = None):
        super().__init__()
        self.attention = AttentionHalf(width, heads, dropout, attention_dropout, gate_width)
        self.intermediate = Intermediate(width, inner, activation)
        self.output = ResidualOutput(inner, width, dropout)

    def forward(self, x: Tensor, rows: Rows, gate: Tensor | None = None, return_probs: bool = False):
        """(states like x, probabilities [B, H, S, S] or None)."""
        x, probs = self.attention(x, rows, gate, return_probs)
        return self.output(self.intermediate(x), x), probs


class Pooler(nn.Module):
    """act(W x_0) of a stream's first row."""

    def __init__(self, width: int, pooled: int, activation=torch.tanh):
        super().__init__()
        self.dense = nn.Linear(width, pooled)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # [B, S, C] -> [B, P]
        return self.activation(self.dense(x[:, 0]))


class Transform(nn.Module):
    """LN(act(W x)): what precedes the vocabulary and region class projections."""

    def __init__(self, width: int, activation: str = "gelu"):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]
        self.LayerNorm = LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class MaskedLMHead(nn.Module):
    """Scores over the vocabulary, with the word table as output weights (tied, so passed in)."""

    def __init__(self, vocab_size: int, width: int, activation: str = "gelu"):
        super().__init__()
        self.transform = Transform(width, activation)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:  # [..., C], [V, C] -> [..., V]
        return F.linear(self.transform(x), table, self.bias)


class RegionHead(nn.Module):
    """Transform and Linear: class scores or features of masked regions."""

    def __init__(self, width: int, targets: int, activation: str = "gelu"):
        super().__init__()
        self.transform = Transform(width, activation)
        self.decoder = nn.Linear(width, targets)

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., targets]
        return self.decoder(self.transform(x))


class MLPClassifier(nn.Module):
    """Linear, GELU, LayerNorm, Linear, under the key `logit_fc`."""

    def __init__(self, width: int, inner: int, classes: int):
        super().__init__()
        self.logit_fc = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(), LayerNorm(inner, eps=EPS), nn.Linear(inner, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.logit_fc(x)


class ReluClassifier(nn.Module):
    """Linear, ReLU, Dropout, Linear under the key `main`; weight-normalised in the files, plain here."""

    def __init__(self, width: int, inner: int, classes: int):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(0.5), nn.Linear(inner, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)
