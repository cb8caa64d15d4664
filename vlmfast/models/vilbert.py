"""ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations (Lu et al. 2019, arXiv:1908.02265) and its
multi-task successor 12-in-1 (arXiv:1912.02315).

A text stream and a region stream of different widths, each a post-LN transformer, joined by co-attention layers
(Fig. 1). State-dict keys are those of the public checkpoints.

Sizes: B batch, T text tokens, R regions with the global one first, C text width, Cv region width, P pooled width.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..layers.bert import (
    ACTIVATIONS,
    EPS,
    BertLayer,
    MaskedLMHead,
    MLPClassifier,
    Pooler,
    RegionHead,
    ReluClassifier,
    TextEmbeddings,
    init_bert,
)
from ..layers.co_attention import CoAttentionLayer
from ..layers.streams import MASKED, Streams
from ..layers.transformer import LayerNorm
from .adapting import adapted
from .config import ModelConfig

TASK_TOKENS = 20
HEADS = ("pretraining", "vqa", "gqa", "binary", "vil", "tri", "vision", "linguistic")


@dataclass(frozen=True, kw_only=True)
class ViLBERTConfig(ModelConfig):
    """Settings under the names of the public JSON files; the last block is ours."""

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
    v_feature_size: int = 2048
    v_target_size: int = 1601
    v_hidden_size: int = 1024
    v_num_hidden_layers: int = 6
    v_num_attention_heads: int = 8
    v_intermediate_size: int = 1024
    v_hidden_act: str = "gelu"
    v_hidden_dropout_prob: float = 0.1
    v_attention_probs_dropout_prob: float = 0.1
    v_initializer_range: float = 0.02  # stored, read by nobody: the public code uses initializer_range everywhere
    bi_hidden_size: int = 1024
    bi_num_attention_heads: int = 8
    t_biattention_id: tuple[int, ...] = (6, 7, 8, 9, 10, 11)  # co layer k comes before these text blocks
    v_biattention_id: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # and before these vision blocks
    fusion_method: str = "mul"  # of the pooled vectors: "mul" or "sum"
    with_coattention: bool = True  # False skips the co layers, feed-forward networks included
    dynamic_attention: bool = False  # text gates the channels of the vision self-attention
    task_specific_tokens: bool = False  # a task's embedding is inserted after token 0
    in_batch_pairs: bool = False  # every text with every image from the first co layer on
    fast_mode: bool = False  # one text for all images; happens here whenever there is one text, set or not
    co_attention_scale: float = 0.0  # weight of co_attention_mask; the public code means 5 but leaves the mask out
    fixed_t_layer: int = 0  # the first blocks that get no gradient
    fixed_v_layer: int = 0
    visual_target: int = 0  # of masked regions: 0 class probabilities, 1 features, 2 features against negatives
    num_negative: int = 128
    objective: int = 0  # 1: mismatched pairs have no masked labels; 2: no alignment loss
    model: str = "bert"  # "roberta": positions start at 2

    heads: tuple[str, ...] = ("pretraining",)
    vqa_labels: int = 3129
    gqa_labels: int = 1533
    vqa_activation: str = "gelu"  # "relu": Linear, ReLU, Linear as in the first release

    def __post_init__(self):
        for name in ("t_biattention_id", "v_biattention_id", "heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.check_numbers(from_zero=("fixed_t_layer", "fixed_v_layer", "visual_target", "objective"))
        for name, allowed in {"hidden_act": ACTIVATIONS, "v_hidden_act": ACTIVATIONS, "model": ("bert", "roberta"),
                              "fusion_method": ("mul", "sum"), "visual_target": (0, 1, 2), "objective": (0, 1, 2),
                              "vqa_activation": ("gelu", "relu")}.items():
            self.check_choice(name, allowed)
        self.check_heads("hidden_size", "num_attention_heads")
        self.check_heads("v_hidden_size", "v_num_attention_heads")
        self.check_heads("bi_hidden_size", "bi_num_attention_heads")
        for name, first, last in (("t_biattention_id", self.fixed_t_layer, self.num_hidden_layers),
                                  ("v_biattention_id", self.fixed_v_layer, self.v_num_hidden_layers)):
            ids = getattr(self, name)
            if any(type(i) is not int or not first <= i <= last for i in ids) or list(ids) != sorted(ids):
                self.refuse(name, f"rising integers in {first}..{last}")
        if len(self.t_biattention_id) != len(self.v_biattention_id):
            self.refuse("t_biattention_id", f"as long as v_biattention_id, {self.v_biattention_id}")
        if not set(self.heads) <= set(HEADS):
            self.refuse("heads", f"a selection of {list(HEADS)}")

    def plan(self) -> list[tuple[str, int]]:
        """The encoder's steps in order: ("text", i), ("vision", i) and ("co", k)."""
        steps, text, vision = [], 0, 0
        for k, (text_end, vision_end) in enumerate(zip(self.t_biattention_id, self.v_biattention_id, strict=True)):
            steps += [("text", i) for i in range(text, text_end)] + [("vision", i) for i in range(vision, vision_end)]
            steps.append(("co", k))
            text, vision = text_end, vision_end
        return (steps + [("vision", i) for i in range(vision, self.v_num_hidden_layers)]
                + [("text", i) for i in range(text, self.num_hidden_layers)])


@dataclass
class ViLBERTOutput:
    """Last states, pooled vectors, scores and, on request, attention maps.

    B is B*B after in-batch pairing (row i * B + j is text i with image j); T is T + 1 with task tokens.
    """

    text_hidden: Tensor  # [B, T, C]
    image_hidden: Tensor  # [B, R, Cv]
    pooled_text: Tensor  # [B, P]
    pooled_image: Tensor  # [B, P]
    logits: dict[str, Tensor] = field(default_factory=dict)  # see `ViLBERT.forward`
    text_attentions: tuple[Tensor, ...] | None = None  # per text block [B, H, T, T]
    image_attentions: tuple[Tensor, ...] | None = None  # per vision block [B, Hv, R, R]
    text_to_image: tuple[Tensor, ...] | None = None  # per co layer, text queries over regions [B, Hbi, T, R]
    image_to_text: tuple[Tensor, ...] | None = None  # per co layer, regions over text [B, Hbi, R, T]


class RegionEmbeddings(nn.Module):
    """LN(W feature + W box), dropout."""

    def __init__(self, config: ViLBERTConfig):
        super().__init__()
        self.image_embeddings = nn.Linear(config.v_feature_size, config.v_hidden_size)
        self.image_location_embeddings = nn.Linear(5, config.v_hidden_size)
        self.LayerNorm = LayerNorm(config.v_hidden_size, eps=EPS)
        self.dropout = nn.Dropout(config.v_hidden_dropout_prob)

    def forward(self, feat: Tensor, loc: Tensor) -> Tensor:  # [B, R, F], [B, R, 5] -> [B, R, Cv]
        return self.dropout(self.LayerNorm(self.image_embeddings(feat) + self.image_location_embeddings(loc)))


class Encoder(nn.Module):
    """Both streams through `config.plan()`."""

    def __init__(self, config: ViLBERTConfig):
        super().__init__()
        self.config = config
        text = (config.hidden_size, config.intermediate_size, config.hidden_act, config.hidden_dropout_prob,
                config.attention_probs_dropout_prob)
        vision = (config.v_hidden_size, config.v_intermediate_size, config.v_hidden_act, config.v_hidden_dropout_prob,
                  config.v_attention_probs_dropout_prob)

        def block(width, inner, act, dropout, attention_dropout, heads, gate=None):
            return BertLayer(width, heads, inner, dropout, attention_dropout, act, gate)

        gate = config.hidden_size if config.dynamic_attention else None
        self.layer = nn.ModuleList(block(*text, config.num_attention_heads) for _ in range(config.num_hidden_layers))
        self.v_layer = nn.ModuleList(
            block(*vision, config.v_num_attention_heads, gate) for _ in range(config.v_num_hidden_layers)
        )
        self.c_layer = nn.ModuleList(
            CoAttentionLayer(text, vision, config.bi_hidden_size, config.bi_num_attention_heads)
            for _ in config.v_biattention_id
        )

    def forward(self, text: Tensor, image: Tensor, streams: Streams, return_probs: bool = False):
        config, maps = self.config, {kind: [] for kind in ("text", "vision", "text_to_image", "image_to_text")}
        for kind, i in config.plan():
            if kind == "co":
                text, image, streams, pairs = streams.paired(text, image, pack=not return_probs)
                if config.with_coattention:
                    text, image, *probs = self.c_layer[i](text, image, streams.text, streams.image, streams.bias,
                                                          return_probs, pairs)
                    maps["text_to_image"].append(probs[0])
                    maps["image_to_text"].append(probs[1])
                elif pairs is not None:
                    text, image = pairs.take(text, image)
                continue
            fixed = i < (config.fixed_t_layer if kind == "text" else config.fixed_v_layer)
            with torch.no_grad() if fixed else nullcontext():
                if kind == "text":
                    text, probs = self.layer[i](text, streams.text, return_probs=return_probs)
                else:
                    gate = streams.mean_text(text) if config.dynamic_attention else None
                    image, probs = self.v_layer[i](image, streams.image, gate, return_probs)
            maps[kind].append(probs)
        return *streams.padded(text, image), streams, maps


class Trunk(nn.Module):
    """Embeddings, encoder and poolers: the public `bert.*` keys."""

    def __init__(self, config: ViLBERTConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(
            config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size,
            config.hidden_dropout_prob, first_position=2 if config.model == "roberta" else 0,
            tasks=TASK_TOKENS if config.task_specific_tokens else 0,
        )
        self.v_embeddings = RegionEmbeddings(config)
        self.encoder = Encoder(config)
        self.t_pooler = Pooler(config.hidden_size, config.bi_hidden_size, torch.relu)
        self.v_pooler = Pooler(config.v_hidden_size, config.bi_hidden_size, torch.relu)


class PretrainingHeads(nn.Module):
    """The three pretraining heads: the public `cls.*` keys."""

    def __init__(self, config: ViLBERTConfig):
        super().__init__()
        self.predictions = MaskedLMHead(config.vocab_size, config.hidden_size, config.hidden_act)
        self.bi_seq_relationship = nn.Linear(config.bi_hidden_size, 2)
        # the public code takes the text's activation
        self.imagePredictions = RegionHead(config.v_hidden_size, config.v_target_size, config.hidden_act)


class ViLBERT(nn.Module):
    """The trunk and the heads named in `config.heads`.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: None until a caller sets one.
    """

    def __init__(self, config: ViLBERTConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = None
        pooled, heads = config.bi_hidden_size, config.heads
        with nullcontext() if device is None else torch.device(device):
            self.bert = Trunk(config)
            if "pretraining" in heads:
                self.cls = PretrainingHeads(config)
            if "vqa" in heads:
                kind = ReluClassifier if config.vqa_activation == "relu" else MLPClassifier
                self.vil_prediction = kind(pooled, 2 * pooled, config.vqa_labels)
            if "gqa" in heads:
                self.vil_prediction_gqa = MLPClassifier(pooled, 2 * pooled, config.gqa_labels)
            if "binary" in heads:
                self.vil_binary_prediction = MLPClassifier(2 * pooled, 2 * pooled, 2)
            if "vil" in heads:
                self.vil_logit = nn.Linear(pooled, 1)
            if "tri" in heads:
                self.vil_tri_prediction = nn.Linear(pooled, 3)
            if "vision" in heads:
                self.vision_logit = nn.Linear(config.v_hidden_size, 1)
            if "linguistic" in heads:
                self.linguisic_logit = nn.Linear(config.hidden_size, 1)
            self.dropout = nn.Dropout(0.1)
            init_bert(self, config.initializer_range)

    @property
    def dtype(self) -> torch.dtype:
        return self.bert.embeddings.word_embeddings.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        image_feat: Tensor,
        image_loc: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        num_regions: Tensor | None = None,
        co_attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> ViLBERTOutput:
        """States, pooled vectors and scores.

        Args:
            input_ids: [B, T] integer token ids; or [1, T], one text for all images.
            image_feat: [B, R, v_feature_size] region features, row 0 their mean (the global region).
            image_loc: [B, R, 5] boxes x1, y1, x2, y2, area, relative to the image; row 0 is 0, 0, 1, 1, 1.
            token_type_ids: [B, T] segments; None: all 0.
            attention_mask, image_mask: [B, T] and [B, R], 1 or True keeps a row; None: all. Masked keys get -10000,
                as in the public code, so a fully masked text is attended to as if it were not masked.
            text_lengths, num_regions: [B] integers in place of the masks: padding at the end is left out of the
                computation (of whole layers, unless compiled or asked for attention maps), and the states there are 0.
                Packed, padded or one by one, examples differ only where the BLAS rounds otherwise for fewer rows.
            co_attention_mask: [B, R, T] times `config.co_attention_scale` is added to the scores of both directions.
            task_ids: [B] or [B, 1] task numbers, needed by `task_specific_tokens`.
            heads: which scores to compute, None for all the model has ("binary" for even B only).
            output_attentions: also return the probabilities of every attention, before dropout.

        Returns:
            A ViLBERTOutput with these entries in `logits`: "mlm" [B, T, V], "image" [B, R, v_target_size], "nsp"
            [B, 2] (class 0: text and image match), "vqa" and "gqa" [B, labels], "binary" [B/2, 2] of two consecutive
            examples, "vil" [B, 1], "tri" [B, 3], "vision" [B, R, 1] (-10000 at masked regions), "linguistic"
            [B, T, 1].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks.
        """
        wanted = self._wanted(heads)
        streams = self._streams(input_ids, image_feat, image_loc, attention_mask, image_mask, text_lengths,
                                num_regions, co_attention_mask=co_attention_mask)
        if not output_attentions:
            streams = streams.without_padding()
        (text,) = streams.laid_out("text", self.bert.embeddings(input_ids, token_type_ids, task_ids))  # [B, T, C]
        feat, loc = streams.laid_out("image", image_feat.to(self.dtype), image_loc.to(self.dtype))
        image = self.bert.v_embeddings(feat, loc)  # [B, R, Cv], or [N, Cv] without padding
        text, image, streams, maps = self.bert.encoder(text, image, streams, output_attentions)
        output = ViLBERTOutput(text, image, self.bert.t_pooler(text), self.bert.v_pooler(image))
        if output_attentions:
            output.text_attentions, output.image_attentions = tuple(maps["text"]), tuple(maps["vision"])
            output.text_to_image, output.image_to_text = tuple(maps["text_to_image"]), tuple(maps["image_to_text"])
        self._score(output, wanted, heads is not None, streams.image_keep)
        return output

    def adapted(self, **changes) -> "ViLBERT":
        """A copy to fine-tune with other config fields, for example heads=("vqa",); see `models.adapting.adapted`."""
        return adapted(self, **changes)

    def available(self) -> tuple[str, ...]:
        """The names that `forward` accepts in `heads`."""
        names = [name for name in HEADS if name in self.config.heads and name != "pretraining"]
        return (("mlm", "image", "nsp") if "pretraining" in self.config.heads else ()) + tuple(names)

    def _wanted(self, heads: tuple[str, ...] | None) -> tuple[str, ...]:
        available = self.available()
        if heads is None:
            return available
        if unknown := [name for name in heads if name not in available]:
            raise ValueError(f"heads: has {', '.join(map(repr, unknown))}, this model has {', '.join(available)}")
        return tuple(heads)

    def _streams(self, input_ids, image_feat, image_loc, *layout, co_attention_mask) -> Streams:
        config = self.config
        streams = Streams.of(input_ids, image_feat, image_loc, (config.v_feature_size, 5), self.dtype, *layout)
        if co_attention_mask is not None:
            shape = (len(image_feat), image_feat.shape[1], input_ids.shape[1])
            if co_attention_mask.shape != shape:
                raise ValueError(f"co_attention_mask: has shape {list(co_attention_mask.shape)}, must be {list(shape)}")
            if config.co_attention_scale:
                if config.in_batch_pairs:
                    raise ValueError("co_attention_mask: given with in_batch_pairs, where only the diagonal has one")
                bias = co_attention_mask.to(self.dtype).transpose(1, 2)[:, None] * config.co_attention_scale
                streams = replace(streams, bias=bias)
        streams = replace(streams, all_pairs=config.in_batch_pairs)
        return streams.with_task_token() if config.task_specific_tokens else streams

    def _score(self, output: ViLBERTOutput, wanted: tuple[str, ...], demanded: bool, image_keep: Tensor):
        text, image, logits = output.text_hidden, output.image_hidden, output.logits
        if self.config.fusion_method == "mul":
            fused = self.dropout(output.pooled_text * output.pooled_image)  # [B, P]
        else:
            fused = self.dropout(output.pooled_text + output.pooled_image)
        if "mlm" in wanted:
            logits["mlm"] = self.cls.predictions(text, self.bert.embeddings.word_embeddings.weight)
        if "image" in wanted:
            logits["image"] = self.cls.imagePredictions(image)
        if "nsp" in wanted:
            logits["nsp"] = self.cls.bi_seq_relationship(fused)
        if "vqa" in wanted:
            logits["vqa"] = self.vil_prediction(fused)
        if "gqa" in wanted:
            logits["gqa"] = self.vil_prediction_gqa(fused)
        if "binary" in wanted:
            if len(fused) % 2 == 0:
                logits["binary"] = self.vil_binary_prediction(fused.reshape(len(fused) // 2, -1))
            elif demanded:
                raise ValueError(f"heads: 'binary' scores pairs of examples, the batch has {len(fused)}")
        if "vil" in wanted:
            logits["vil"] = self.vil_logit(fused)
        if "tri" in wanted:
            logits["tri"] = self.vil_tri_prediction(fused)
        if "vision" in wanted:
            logits["vision"] = self.vision_logit(self.dropout(image))
            logits["vision"] = logits["vision"] + (1 - image_keep.to(image.dtype))[:, :, None] * MASKED
        if "linguistic" in wanted:
            logits["linguistic"] = self.linguisic_logit(self.dropout(text))


PRESETS: dict[str, dict] = {
    "vilbert-base": {},
    "vilbert-base-multitask": dict(task_specific_tokens=True, heads=HEADS),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> ViLBERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return ViLBERT(ViLBERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
