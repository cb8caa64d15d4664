"""UNITER: UNiversal Image-TExt Representation Learning (Chen et al. 2019, arXiv:1909.11740).

Words and regions, embedded each with its own LayerNorm, in one BERT (Fig. 1). State-dict keys are those of the
authors' checkpoints. The authors move each example's padding to the end of the sequence; here text and regions are
padded on their own, which gives the same values (see `layers.single_stream`).

Sizes: B batch, T text tokens, R regions, C width.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.bert import EPS, MaskedLMHead, Pooler, TextEmbeddings, init_bert
from ..layers.single_stream import SingleStream, set_eps
from ..layers.streams import MASKED, as_lengths
from ..layers.transformer import LayerNorm
from ..ops.attention import cross_attention
from .single_stream import SingleStreamConfig, SingleStreamModel, SingleStreamOutput, in_groups

PRETRAINING = ("mlm", "mrfr", "mrc", "itm")
HEADS = (*PRETRAINING, "rank", "vqa", "ve", "vcr", "nlvr2", "referring", "classifier")


@dataclass(frozen=True, kw_only=True)
class UNITERConfig(SingleStreamConfig):
    """Settings under the names of the public JSON files; the last block is ours."""

    vocab_size: int = 28996  # bert-base-cased
    img_dim: int = 2048
    img_label_dim: int = 1601

    heads: tuple[str, ...] = PRETRAINING  # "pretraining" stands for these four
    vqa_labels: int = 3129
    ve_labels: int = 3
    nlvr2: str = "paired-attn"  # "paired": two pooled vectors; "triplet": both images in one sequence
    mlp: int = 1  # layers of the referring expression head, 1 or 2

    def __post_init__(self):
        if "pretraining" in self.heads:
            rest = [name for name in self.heads if name not in (*PRETRAINING, "pretraining")]
            object.__setattr__(self, "heads", (*PRETRAINING, *rest))
        self.check(HEADS)
        self.check_choice("nlvr2", ("paired-attn", "paired", "triplet"))
        self.check_choice("mlp", (1, 2))


class RegionEmbeddings(nn.Module):
    """LN(LN(W feature) + LN(W box) + segment), dropout."""

    def __init__(self, config: UNITERConfig):
        super().__init__()
        width = config.hidden_size
        self.img_linear, self.img_layer_norm = nn.Linear(config.img_dim, width), LayerNorm(width, eps=EPS)
        self.pos_linear, self.pos_layer_norm = nn.Linear(7, width), LayerNorm(width, eps=EPS)
        self.mask_embedding = nn.Embedding(2, config.img_dim, padding_idx=0)  # row 0 is never read
        self.LayerNorm = LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, feat: Tensor, loc: Tensor, types: Tensor, masked: Tensor | None) -> Tensor:
        """[B, R, F], [B, R, 7], segments [B, R, C] or [C], bool [B, R] -> [B, R, C]."""
        if masked is not None:
            feat = torch.where(masked[..., None], self.mask_embedding.weight[1], feat)
        x = self.img_layer_norm(self.img_linear(feat)) + self.pos_layer_norm(self.pos_linear(loc)) + types
        return self.dropout(self.LayerNorm(x))


class Trunk(nn.Module):
    """Embeddings, encoder and pooler: the public `uniter.*` keys."""

    def __init__(self, config: UNITERConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config.vocab_size, config.hidden_size, config.max_position_embeddings,
                                         config.type_vocab_size, config.hidden_dropout_prob)
        self.img_embeddings = RegionEmbeddings(config)
        self.encoder = config.encoder()
        self.pooler = Pooler(config.hidden_size, config.hidden_size)


class MLMHead(nn.Module):
    """The public `cls.*` keys."""

    def __init__(self, config: UNITERConfig):
        super().__init__()
        self.predictions = MaskedLMHead(config.vocab_size, config.hidden_size, config.hidden_act)


class RegionFeatureRegression(nn.Module):
    """Linear, GELU, LayerNorm, then the feature projection turned round (eq. 4); its weights are passed in."""

    def __init__(self, config: UNITERConfig):
        super().__init__()
        width = config.hidden_size
        self.net = nn.Sequential(nn.Linear(width, width), nn.GELU(), LayerNorm(width, eps=EPS))
        self.bias = nn.Parameter(torch.zeros(config.img_dim))

    def forward(self, x: Tensor, projection: Tensor) -> Tensor:  # [B, R, C], [C, F] -> [B, R, F]
        return F.linear(self.net(x), projection.T, self.bias)


class RegionClassification(nn.Module):
    """Linear, GELU, LayerNorm, Linear."""

    def __init__(self, config: UNITERConfig):
        super().__init__()
        self.net = mlp(config.hidden_size, config.hidden_size, config.img_label_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def mlp(width: int, inner: int, classes: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), activation(), LayerNorm(inner, eps=EPS), nn.Linear(inner, classes))


class CrossAttention(nn.Module):
    """Multi-head attention of one pass over another; rows of `in_proj_weight` [3C, C] are query, key, value."""

    def __init__(self, config: UNITERConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, other: Tensor, keep: Tensor) -> Tensor:
        """[P, S, C] over [P, S, C], of which [P, S] rows exist."""
        weight, bias = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (F.linear(source, weight[i], bias[i]).unflatten(-1, (self.heads, -1))
                             for i, source in enumerate((x, other, other)))
        out = cross_attention(query, key, value, mask=keep, dropout=self.dropout if self.training else 0.0).out
        return self.out_proj(out.flatten(-2))


class AttentionPool(nn.Module):
    """Mean of the states weighted by softmax(relu(w x))."""

    def __init__(self, config: UNITERConfig):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(config.hidden_size, 1), nn.ReLU())
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # [P, S, C], [P, S] -> [P, C]
        score = self.fc(x)[..., 0] + (1 - keep.to(x.dtype)) * MASKED
        return (self.dropout(score.softmax(1))[:, None] @ x)[:, 0]


class UNITER(SingleStreamModel):
    """The trunk and the heads named in `config.heads`.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.
    """

    def __init__(self, config: UNITERConfig, device: torch.device | str | None = None):
        super().__init__(config)
        width, heads = config.hidden_size, config.heads
        with nullcontext() if device is None else torch.device(device):
            self.uniter = Trunk(config)
            if "mlm" in heads:
                self.cls = MLMHead(config)
            if "mrfr" in heads:
                self.feat_regress = RegionFeatureRegression(config)
            if "mrc" in heads:
                self.region_classifier = RegionClassification(config)
            if "itm" in heads:
                self.itm_output = nn.Linear(width, 2)
            if "rank" in heads:
                self.rank_output = nn.Linear(width, 1)
            if "vqa" in heads:
                self.vqa_output = mlp(width, 2 * width, config.vqa_labels)
            if "ve" in heads:
                self.ve_output = mlp(width, 2 * width, config.ve_labels)
            if "vcr" in heads:
                self.vcr_output = mlp(width, 2 * width, 2, nn.ReLU)
            if "nlvr2" in heads:
                self.nlvr2_output = nn.Linear(width if config.nlvr2 == "triplet" else 2 * width, 2)
                if config.nlvr2 == "paired-attn":
                    self.attn1, self.attn2 = CrossAttention(config), CrossAttention(config)
                    self.fc = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(),
                                            nn.Dropout(config.hidden_dropout_prob))
                    self.attn_pool = AttentionPool(config)
            if "referring" in heads:
                self.re_output = nn.Linear(width, 1) if config.mlp == 1 else mlp(width, width, 1)
            if "classifier" in heads:
                self.classifier = config.classifier()
            init_bert(self, config.initializer_range)
            set_eps(self, config.layer_norm_eps)

    @property
    def word_table(self) -> Tensor:
        return self.uniter.embeddings.word_embeddings.weight

    def available(self) -> tuple[str, ...]:
        return tuple(name for name in HEADS if name in self.config.heads)

    def inherited(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "itm_output.weight" not in state:
            return {}
        return {f"rank_output.{name}": state[f"itm_output.{name}"][1:] for name in ("weight", "bias")}

    def forward(
        self,
        input_ids: Tensor | None,
        image_feat: Tensor | None = None,
        image_loc: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        num_regions: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        image_type_ids: Tensor | None = None,
        image_masked: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> SingleStreamOutput:
        """States, pooled vector and scores.

        Args:
            input_ids: [B, T] integer token ids; or [1, T], one text for all images; or None for images alone.
            image_feat: [B, R, img_dim] region features, or None for text alone.
            image_loc: [B, R, 7] boxes x1, y1, x2, y2, w, h, w * h, relative to the image.
            token_type_ids: [B, T] segments; None: all 0. VCR: question 0, answer 2, rationale 3.
            attention_mask, image_mask: [B, T] and [B, R], 1 or True keeps a row; None: all. Masked keys get -10000,
                as in the public code.
            text_lengths, num_regions: [B] integers in place of the masks: padding at the end is left out of the
                computation (of whole layers, unless attention maps or prefix_lengths are given), and the states there
                are 0.
            prefix_lengths: [B] integers, the sequence-to-sequence mask: the regions and text tokens before this one
                are seen by all, the text behind them only by itself, from left to right (VLP, arXiv:1909.11059).
                0 for captions. None: all see all.
            image_type_ids: [B, R] segments of the regions; None: 1. NLVR2: 1 for the left and 2 for the right image.
            image_masked: [B, R] bool, True where a region is masked: the mask embedding replaces its feature.
            heads: which scores to compute, None for all the model has that the inputs allow.
            output_attentions: also return the probabilities of every attention, before dropout.

        Returns:
            A SingleStreamOutput with these entries in `logits`: "mlm" [B, T, V], "mrfr" [B, R, img_dim], "mrc"
            [B, R, img_label_dim], "itm" [B, 2] (class 1: text and image match), "rank" [B, 1], "vqa" [B, vqa_labels],
            "ve" [B, ve_labels], "vcr" [B, 2] (one row per choice; class 1: right), "nlvr2" [B/2, 2] of two consecutive
            examples, left and right ("triplet": [B, 2]), "referring" [B, R] (-10000 at masked regions), "classifier"
            [B / classifier_images, classifier_labels].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks.
        """
        wanted = self.wanted(heads)
        if image_feat is not None and image_loc is None:
            raise ValueError("image_loc: is None, must be given with image_feat")
        stream = SingleStream.of_inputs(input_ids, image_feat, image_loc, (self.config.img_dim, 7), self.dtype,
                                        attention_mask, image_mask, text_lengths, num_regions)
        if prefix_lengths is not None:
            if input_ids is None:
                raise ValueError("input_ids: is None, must be given with prefix_lengths")
            prefix_lengths = as_lengths("prefix_lengths", prefix_lengths, stream.batch, input_ids.shape[1])
            stream = stream.with_text_prefix(prefix_lengths, self.dtype)
        trunk, text, image = self.uniter, None, None
        if input_ids is not None:
            text = trunk.embeddings(input_ids, token_type_ids)  # [B, T, C]
        if image_feat is not None:
            table, shape = trunk.embeddings.token_type_embeddings, image_feat.shape[:2]
            for name, value in (("image_type_ids", image_type_ids), ("image_masked", image_masked)):
                if value is not None and value.shape != shape:
                    raise ValueError(f"{name}: has shape {list(value.shape)}, must be {list(shape)}")
            types = table.weight[1] if image_type_ids is None else table(image_type_ids)
            masked = None if image_masked is None else image_masked.bool()
            feat, loc = stream.blanked(1, image_feat.to(self.dtype), image_loc.to(self.dtype))
            image = trunk.img_embeddings(feat, loc, types, masked)  # [B, R, C]
        x, maps = trunk.encoder(stream.join(text, image), stream, output_attentions)  # [B, T + R, C]
        text, image = stream.split(x)
        output = SingleStreamOutput(text, image, trunk.pooler(x), attentions=maps if output_attentions else None)
        self._score(output, wanted, heads is not None, stream)
        return output

    def _score(self, output: SingleStreamOutput, wanted: tuple[str, ...], demanded: bool, stream: SingleStream) -> None:
        text, image, pooled, logits = output.text_hidden, output.image_hidden, output.pooled, output.logits
        if "mlm" in wanted:
            logits["mlm"] = self.cls.predictions(text, self.word_table)
        if "mrfr" in wanted:
            logits["mrfr"] = self.feat_regress(image, self.uniter.img_embeddings.img_linear.weight)
        if "mrc" in wanted:
            logits["mrc"] = self.region_classifier(image)
        for name in ("itm", "rank", "vqa", "ve", "vcr"):
            if name in wanted:
                logits[name] = getattr(self, f"{name}_output")(pooled)
        if "nlvr2" in wanted:
            paired = in_groups(pooled, 1 if self.config.nlvr2 == "triplet" else 2, demanded, "images per statement")
            if paired is not None:
                if self.config.nlvr2 == "paired-attn":
                    paired = self._compare(output.hidden, stream.keep)
                logits["nlvr2"] = self.nlvr2_output(paired)
        if "referring" in wanted:
            _, keep = stream.split(stream.keep)
            logits["referring"] = self.re_output(image)[..., 0].masked_fill(~keep, MASKED)
        if "classifier" in wanted:
            grouped = in_groups(pooled, self.config.classifier_images, demanded)
            if grouped is not None:
                logits["classifier"] = self.classifier(grouped)

    def _compare(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Each image's pass reads the other's, then both are pooled: [2P, S, C], [2P, S] -> [P, 2C]."""
        left, right, keep_left, keep_right = hidden[0::2], hidden[1::2], keep[0::2], keep[1::2]
        new_left = self.fc(torch.cat([self.attn1(left, right, keep_right), left], dim=-1))
        new_right = self.fc(torch.cat([self.attn2(right, left, keep_left), right], dim=-1))
        return torch.cat([self.attn_pool(new_left, keep_left), self.attn_pool(new_right, keep_right)], dim=-1)


_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
PRESETS: dict[str, dict] = {"uniter-base": {}, "uniter-large": _LARGE}


def build(name: str, device: torch.device | str | None = None, **overrides) -> UNITER:
    """A freshly initialised preset; `overrides` replace config fields."""
    return UNITER(UNITERConfig.from_dict({**PRESETS[name], **overrides}), device=device)
