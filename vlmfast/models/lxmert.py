"""LXMERT: Learning Cross-Modality Encoder Representations from Transformers (Tan and Bansal 2019, arXiv:1908.07490).

A language encoder and an object-relationship encoder, then cross-modality layers (Fig. 1). State-dict keys are those
of the authors' checkpoints.

Sizes: B batch, T text tokens, R regions, C width.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers.bert import (
    ACTIVATIONS,
    EPS,
    BertLayer,
    MaskedLMHead,
    MLPClassifier,
    Pooler,
    TextEmbeddings,
    Transform,
    init_bert,
)
from ..layers.co_attention import CrossModalityLayer
from ..layers.streams import Streams
from ..layers.transformer import LayerNorm
from .adapting import adapted
from .config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LXMERTConfig(ModelConfig):
    """Settings under the names of transformers' LxmertConfig; the last block is ours."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    l_layers: int = 9
    r_layers: int = 5
    x_layers: int = 5
    visual_feat_dim: int = 2048
    visual_pos_dim: int = 4
    num_qa_labels: int = 9500
    num_object_labels: int = 1600
    num_attr_labels: int = 400
    visual_loss_normalizer: float = 1 / 0.15  # factor of the region losses; transformers says 6.67
    task_matched: bool = True  # which losses pretraining adds
    task_mask_lm: bool = True
    task_obj_predict: bool = True  # False: no region heads
    task_qa: bool = True  # False: no answer head
    visual_obj_loss: bool = True  # which region heads
    visual_attr_loss: bool = True
    visual_feat_loss: bool = True

    heads: str = "pretraining"  # "vqa": the answer head only; "none": no heads
    images_per_answer: int = 1  # 2: the answer head reads two consecutive pooled vectors (NLVR2)

    def __post_init__(self):
        self.check_numbers(from_zero=("l_layers", "r_layers", "x_layers"))
        self.check_choice("hidden_act", ACTIVATIONS)
        self.check_choice("heads", ("pretraining", "vqa", "none"))
        self.check_heads("hidden_size", "num_attention_heads")

    @property
    def region_heads(self) -> dict[str, int]:
        """Name -> width of the region heads."""
        if self.heads != "pretraining" or not self.task_obj_predict:
            return {}
        sizes = {"obj": (self.visual_obj_loss, self.num_object_labels),
                 "attr": (self.visual_attr_loss, self.num_attr_labels),
                 "feat": (self.visual_feat_loss, self.visual_feat_dim)}
        return {name: size for name, (wanted, size) in sizes.items() if wanted}

    @property
    def answers(self) -> bool:
        """Whether there is an answer head."""
        return self.heads == "vqa" or (self.heads == "pretraining" and self.task_qa)


@dataclass
class LXMERTOutput:
    """Last states, pooled vector, scores and, on request, attention maps."""

    text_hidden: Tensor  # [B, T, C]
    image_hidden: Tensor  # [B, R, C]
    pooled: Tensor  # [B, C]
    logits: dict[str, Tensor] = field(default_factory=dict)  # see `LXMERT.forward`
    text_attentions: tuple[Tensor, ...] | None = None  # language layers, then cross layers, [B, H, T, T]
    image_attentions: tuple[Tensor, ...] | None = None  # object layers, then cross layers, [B, H, R, R]
    text_to_image: tuple[Tensor, ...] | None = None  # per cross layer, text queries over regions [B, H, T, R]
    image_to_text: tuple[Tensor, ...] | None = None  # per cross layer, regions over text [B, H, R, T]


class RegionEmbeddings(nn.Module):
    """(LN(W feature) + LN(W box)) / 2, dropout (eq. 1)."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.visn_fc = nn.Linear(config.visual_feat_dim, config.hidden_size)
        self.visn_layer_norm = LayerNorm(config.hidden_size, eps=EPS)
        self.box_fc = nn.Linear(config.visual_pos_dim, config.hidden_size)
        self.box_layer_norm = LayerNorm(config.hidden_size, eps=EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, feat: Tensor, loc: Tensor) -> Tensor:  # [B, R, F], [B, R, 4] -> [B, R, C]
        return self.dropout((self.visn_layer_norm(self.visn_fc(feat)) + self.box_layer_norm(self.box_fc(loc))) / 2)


class Encoder(nn.Module):
    """Language layers, object-relationship layers, cross-modality layers."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size, config.hidden_dropout_prob,
                 config.attention_probs_dropout_prob, config.hidden_act)
        self.visn_fc = RegionEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(*sizes) for _ in range(config.l_layers))
        self.r_layers = nn.ModuleList(BertLayer(*sizes) for _ in range(config.r_layers))
        self.x_layers = nn.ModuleList(CrossModalityLayer(*sizes) for _ in range(config.x_layers))

    def forward(self, text: Tensor, image: Tensor, streams: Streams, return_probs: bool = False):
        maps = {kind: [] for kind in ("text_to_image", "image_to_text", "text", "image")}
        for layer in self.layer:
            text, probs = layer(text, streams.text, return_probs=return_probs)
            maps["text"].append(probs)
        for layer in self.r_layers:
            image, probs = layer(image, streams.image, return_probs=return_probs)
            maps["image"].append(probs)
        text, image, streams, pairs = streams.paired(text, image, pack=not return_probs)
        for layer in self.x_layers:
            text, image, *probs = layer(text, image, streams.text, streams.image, return_probs, pairs)
            pairs = None
            for found, new in zip(maps.values(), probs, strict=True):
                found.append(new)
        if pairs is not None:
            text, image = pairs.take(text, image)
        return *streams.padded(text, image), maps


class Trunk(nn.Module):
    """Embeddings, encoder and pooler: the public `bert.*` keys."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(
            config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size,
            config.hidden_dropout_prob, padding=("word", "position", "type"),
        )
        self.encoder = Encoder(config)
        self.pooler = Pooler(config.hidden_size, config.hidden_size)


class PretrainingHeads(nn.Module):
    """Masked words and matching: the public `cls.*` keys."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.predictions = MaskedLMHead(config.vocab_size, config.hidden_size, config.hidden_act)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class RegionHeads(nn.Module):
    """One shared transform, then a Linear per target."""

    def __init__(self, config: LXMERTConfig):
        super().__init__()
        self.transform = Transform(config.hidden_size, config.hidden_act)
        self.decoder_dict = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, size) for name, size in config.region_heads.items()}
        )

    def forward(self, x: Tensor, names: list[str]) -> dict[str, Tensor]:
        x = self.transform(x)
        return {name: self.decoder_dict[name](x) for name in names}


class LXMERT(nn.Module):
    """The trunk and the heads that `config.heads` asks for.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        tokenizer: None until a caller sets one.
    """

    def __init__(self, config: LXMERTConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = None
        with nullcontext() if device is None else torch.device(device):
            self.bert = Trunk(config)
            if config.heads == "pretraining":
                self.cls = PretrainingHeads(config)
            if config.region_heads:
                self.obj_predict_head = RegionHeads(config)
            if config.answers:
                width = config.hidden_size * config.images_per_answer
                self.answer_head = MLPClassifier(width, 2 * config.hidden_size, config.num_qa_labels)
            init_bert(self, config.initializer_range)

    @property
    def dtype(self) -> torch.dtype:
        return self.bert.embeddings.word_embeddings.weight.dtype

    def adapted(self, **changes) -> "LXMERT":
        """A copy to fine-tune with other config fields, for example heads="vqa"; see `models.adapting.adapted`."""
        return adapted(self, **changes)

    def available(self) -> tuple[str, ...]:
        """The names that `forward` accepts in `heads`."""
        words = ("mlm", "matched") if self.config.heads == "pretraining" else ()
        return (*words, *self.config.region_heads, *(("vqa",) if self.config.answers else ()))

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
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> LXMERTOutput:
        """States, pooled vector and scores.

        Args:
            input_ids: [B, T] integer token ids; or [1, T], one text for all images.
            image_feat: [B, R, visual_feat_dim] region features.
            image_loc: [B, R, visual_pos_dim] boxes x1, y1, x2, y2 relative to the image.
            token_type_ids: [B, T] segments; None: all 0.
            attention_mask, image_mask: [B, T] and [B, R], 1 or True keeps a row; None: all. Masked keys get -10000,
                as in the public code, so a fully masked text is attended to as if it were not masked.
            text_lengths, num_regions: [B] integers in place of the masks: padding at the end is left out of the
                computation (of whole layers, unless compiled or asked for attention maps), and the states there are 0.
                Packed, padded or one by one, examples differ only where the BLAS rounds otherwise for fewer rows.
            heads: which scores to compute, None for all the model has.
            output_attentions: also return the probabilities of every attention, before dropout.

        Returns:
            An LXMERTOutput with these entries in `logits`: "mlm" [B, T, V], "matched" [B, 2] (class 1: text and image
            match), "obj" [B, R, num_object_labels], "attr" [B, R, num_attr_labels], "feat" [B, R, visual_feat_dim],
            "vqa" [B / images_per_answer, num_qa_labels].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks.
        """
        config, available = self.config, self.available()
        wanted = available if heads is None else tuple(heads)
        if unknown := [name for name in wanted if name not in available]:
            raise ValueError(f"heads: has {', '.join(map(repr, unknown))}, this model has {', '.join(available)}")
        widths = (config.visual_feat_dim, config.visual_pos_dim)
        streams = Streams.of(input_ids, image_feat, image_loc, widths, self.dtype, attention_mask, image_mask,
                             text_lengths, num_regions)
        if not output_attentions:
            streams = streams.without_padding()
        (text,) = streams.laid_out("text", self.bert.embeddings(input_ids, token_type_ids))  # [B, T, C]
        feat, loc = streams.laid_out("image", image_feat.to(self.dtype), image_loc.to(self.dtype))
        image = self.bert.encoder.visn_fc(feat, loc)  # [B, R, C], or [N, C] without padding
        text, image, maps = self.bert.encoder(text, image, streams, output_attentions)
        output = LXMERTOutput(text, image, self.bert.pooler(text))
        if output_attentions:
            output.text_attentions, output.image_attentions = tuple(maps["text"]), tuple(maps["image"])
            output.text_to_image, output.image_to_text = tuple(maps["text_to_image"]), tuple(maps["image_to_text"])
        if "mlm" in wanted:
            output.logits["mlm"] = self.cls.predictions(text, self.bert.embeddings.word_embeddings.weight)
        if "matched" in wanted:
            output.logits["matched"] = self.cls.seq_relationship(output.pooled)
        if regions := [name for name in config.region_heads if name in wanted]:
            output.logits |= self.obj_predict_head(image, regions)
        if "vqa" in wanted:
            if len(output.pooled) % config.images_per_answer:
                raise ValueError(f"image_feat: has {len(output.pooled)} rows, must be a multiple of images_per_answer, "
                                 f"{config.images_per_answer}")
            groups = len(output.pooled) // config.images_per_answer
            output.logits["vqa"] = self.answer_head(output.pooled.reshape(groups, -1))
        return output


PRESETS: dict[str, dict] = {"lxmert-base": {}}


def build(name: str, device: torch.device | str | None = None, **overrides) -> LXMERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return LXMERT(LXMERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
