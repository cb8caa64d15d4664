"""VisualBERT: A Simple and Performant Baseline for Vision and Language (Li et al. 2019, arXiv:1908.03557).

Region features stand behind the words in one BERT sequence (Fig. 2). State-dict keys are those of the authors'
checkpoints under `bert.` and `cls.`.

Sizes: B batch, T text tokens, R regions, C width.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.bert import BertLayer, MaskedLMHead, Pooler, TextEmbeddings, init_bert
from ..layers.single_stream import SingleStream, set_eps
from ..layers.streams import MASKED
from .single_stream import SingleStreamConfig, SingleStreamModel, SingleStreamOutput, before_last, in_groups

HEADS = ("pretraining", "vqa", "nlvr2", "vcr", "flickr", "classifier")


@dataclass(frozen=True, kw_only=True)
class VisualBERTConfig(SingleStreamConfig):
    """Settings under the names of the authors' and transformers' configurations; the last block is ours."""

    visual_embedding_dim: int = 2048
    bypass_transformer: bool = False  # only the text goes through the encoder, then one layer reads both
    special_visual_initialize: bool = True  # a new model's visual tables start as copies of the text tables

    visual_type: int = 0  # segment of regions where none is given; transformers takes 1, with the same weights
    heads: tuple[str, ...] = ("pretraining",)
    vqa_labels: int = 3129
    nlvr2_labels: int = 2
    classifier_pooling: str = "pooled"  # what "classifier" reads; "vqa": the token before the last

    def __post_init__(self):
        self.check(HEADS, from_zero=("visual_type",))
        self.check_choice("classifier_pooling", ("pooled", "vqa"))
        if self.visual_type >= self.type_vocab_size:
            self.refuse("visual_type", f"less than type_vocab_size, {self.type_vocab_size}")


class Embeddings(TextEmbeddings):
    """LN([word + position + segment ; W feature + visual segment + visual position 0]), dropout (sec. 3.2)."""

    def __init__(self, config: VisualBERTConfig):
        super().__init__(config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size,
                         config.hidden_dropout_prob, padding=())
        self.visual_type = config.visual_type
        self.token_type_embeddings_visual = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.position_embeddings_visual = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.projection = nn.Linear(config.visual_embedding_dim, config.hidden_size)

    def regions(self, feat: Tensor, types: Tensor | None, alignment: Tensor | None) -> Tensor:
        """[B, R, F], [B, R], [B, R' >= R, A] word positions behind each region, -1 pads -> [B, R, C]."""
        if types is None:
            types = torch.full(feat.shape[:2], self.visual_type, device=feat.device)
        x = self.projection(feat) + self.token_type_embeddings_visual(types) + self.position_embeddings_visual.weight[0]
        if alignment is None:
            return x
        alignment = alignment[:, : feat.shape[1]]
        real = (alignment >= 0)[..., None]
        words = self.position_embeddings(alignment.clamp(min=0)).masked_fill(~real, 0)  # [B, R, A, C]
        return x + words.sum(2) / real.sum(2).clamp(min=1)

    def normalize(self, x: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(x))


class Trunk(nn.Module):
    """Embeddings, encoder and pooler: the public `bert.*` keys."""

    def __init__(self, config: VisualBERTConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = config.encoder()
        self.pooler = Pooler(config.hidden_size, config.hidden_size)
        if config.bypass_transformer:
            self.additional_layer = BertLayer(config.hidden_size, config.num_attention_heads, config.intermediate_size,
                                              config.hidden_dropout_prob, config.attention_probs_dropout_prob,
                                              config.hidden_act)

    def forward(self, x: Tensor, stream: SingleStream, return_probs: bool):  # [B, S, C]
        if not hasattr(self, "additional_layer") or not stream.segments[1].size:
            return self.encoder(x, stream, return_probs)
        text, image = stream.split(x)
        alone = SingleStream.of(len(x), list(stream.segments[:1]), x.dtype, x.device)
        text, maps = self.encoder(text, alone, return_probs)
        x = torch.cat([text, image], dim=1)
        if not return_probs:
            x, stream = stream.packed(x)
        x, probs = self.additional_layer(x, stream.rows, return_probs=return_probs)
        return stream.padded(x), (*maps, probs) if return_probs else ()


class PretrainingHeads(nn.Module):
    """Masked words and matching: the public `cls.*` keys."""

    def __init__(self, config: VisualBERTConfig):
        super().__init__()
        self.predictions = MaskedLMHead(config.vocab_size, config.hidden_size, config.hidden_act)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class PhraseAttention(nn.Module):
    """Scores of phrases against regions: one attention head as wide as one of the encoder's."""

    def __init__(self, config: VisualBERTConfig):
        super().__init__()
        width = config.hidden_size // config.num_attention_heads
        self.query, self.key = nn.Linear(config.hidden_size, width), nn.Linear(config.hidden_size, width)

    def forward(self, phrases: Tensor, regions: Tensor, keep: Tensor) -> Tensor:
        """[B, E, C], [B, R, C], [B, R] -> [B, E, R]."""
        scores = self.query(phrases) @ self.key(regions).mT / self.query.out_features**0.5
        return scores + (1 - keep.to(scores.dtype))[:, None] * MASKED


class VisualBERT(SingleStreamModel):
    """The trunk and the heads named in `config.heads`.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.
    """

    def __init__(self, config: VisualBERTConfig, device: torch.device | str | None = None):
        super().__init__(config)
        width, heads = config.hidden_size, config.heads
        with nullcontext() if device is None else torch.device(device):
            self.bert = Trunk(config)
            if "pretraining" in heads:
                self.cls = PretrainingHeads(config)
            if "vqa" in heads:
                self.vqa_classifier = nn.Linear(width, config.vqa_labels)
            if "nlvr2" in heads:
                self.nlvr2_classifier = nn.Linear(width, config.nlvr2_labels)
            if "vcr" in heads:
                self.vcr_classifier = nn.Linear(width, 1)
            if "flickr" in heads:
                self.flickr_attention = PhraseAttention(config)
            if "classifier" in heads:
                self.classifier = config.classifier()
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
            init_bert(self, config.initializer_range)
            set_eps(self, config.layer_norm_eps)
            if config.special_visual_initialize:
                self.init_visual_tables()

    def init_visual_tables(self) -> None:
        """Makes the visual segment and position tables copies of the text tables (sec. 3.2)."""
        embeddings = self.bert.embeddings
        with torch.no_grad():
            embeddings.token_type_embeddings_visual.weight.copy_(embeddings.token_type_embeddings.weight)
            embeddings.position_embeddings_visual.weight.copy_(embeddings.position_embeddings.weight)

    @property
    def word_table(self) -> Tensor:
        return self.bert.embeddings.word_embeddings.weight

    def available(self) -> tuple[str, ...]:
        names = [name for name in HEADS if name in self.config.heads and name != "pretraining"]
        return (("mlm", "nsp") if "pretraining" in self.config.heads else ()) + tuple(names)

    def forward(
        self,
        input_ids: Tensor,
        image_feat: Tensor | None = None,
        image_loc: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        num_regions: Tensor | None = None,
        image_type_ids: Tensor | None = None,
        image_text_alignment: Tensor | None = None,
        phrase_positions: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> SingleStreamOutput:
        """States, pooled vector and scores.

        Args:
            input_ids: [B, T] integer token ids; or [1, T], one text for all images.
            image_feat: [B, R, visual_embedding_dim] region features, or None for text alone.
            image_loc: not read: VisualBERT knows no boxes, unless they are part of the features (Flickr30K).
            token_type_ids: [B, T] segments; None: all 0.
            attention_mask, image_mask: [B, T] and [B, R], 1 or True keeps a row; None: all. Masked keys get -10000,
                as in the public code.
            text_lengths, num_regions: [B] integers in place of the masks: padding at the end is left out of the
                computation (of whole layers, unless attention maps are asked for), and the states there are 0.
            image_type_ids: [B, R] segments of the regions, for NLVR2 0 and 1 of the two images; None:
                `config.visual_type`.
            image_text_alignment: [B, R, A] positions of the words that name a region, -1 where there are fewer; the
                mean of their position embeddings is added. Rows beyond R are cut off.
            phrase_positions: [B, E] token positions of phrases, the last piece of each, -1 pads; for "flickr".
            heads: which scores to compute, None for all the model has that the inputs allow.
            output_attentions: also return the probabilities of every attention, before dropout.

        Returns:
            A SingleStreamOutput with these entries in `logits`: "mlm" [B, T, V], "nsp" [B, 2] (class 1: text and
            image match), "vqa" [B, vqa_labels] of the token before the last, where a question has its [MASK], "nlvr2"
            [B, nlvr2_labels], "vcr" [B, 1] (one row per choice), "flickr" [B, E, R] (-10000 added at masked regions),
            "classifier" [B / classifier_images, classifier_labels].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks.
        """
        wanted = self.wanted(heads)
        stream = SingleStream.of_inputs(input_ids, image_feat, None, (self.config.visual_embedding_dim, 0), self.dtype,
                                        attention_mask, image_mask, text_lengths, num_regions)
        embeddings = self.bert.embeddings
        image = None
        if image_feat is not None:
            check_region_words(image_feat, image_type_ids, image_text_alignment)
            (feat,) = stream.blanked(1, image_feat.to(self.dtype))
            image = embeddings.regions(feat, image_type_ids, image_text_alignment)  # [B, R, C]
        x = embeddings.normalize(stream.join(embeddings.total(input_ids, token_type_ids), image))  # [B, T + R, C]
        x, maps = self.bert(x, stream, output_attentions)
        text, image = stream.split(x)
        output = SingleStreamOutput(text, image, self.bert.pooler(x), attentions=maps if output_attentions else None)
        self._score(output, wanted, heads is not None, stream, phrase_positions)
        return output

    def _score(self, output: SingleStreamOutput, wanted: tuple[str, ...], demanded: bool, stream: SingleStream,
               phrase_positions: Tensor | None) -> None:
        logits, text = output.logits, output.text_hidden
        pooled = self.dropout(output.pooled)  # [B, C]
        if "mlm" in wanted:
            logits["mlm"] = self.cls.predictions(text, self.word_table)
        if "nsp" in wanted:
            logits["nsp"] = self.cls.seq_relationship(output.pooled)
        if "vqa" in wanted:
            logits["vqa"] = self.vqa_classifier(self.dropout(before_last(text, stream)))
        if "nlvr2" in wanted:
            logits["nlvr2"] = self.nlvr2_classifier(pooled)
        if "vcr" in wanted:
            logits["vcr"] = self.vcr_classifier(pooled)
        if "flickr" in wanted and (demanded or phrase_positions is not None):
            logits["flickr"] = self._ground(output, stream, phrase_positions)
        if "classifier" in wanted:
            read = before_last(text, stream) if self.config.classifier_pooling == "vqa" else output.pooled
            read = in_groups(read, self.config.classifier_images, demanded)
            if read is not None:
                logits["classifier"] = self.classifier(self.dropout(read))

    def _ground(self, output: SingleStreamOutput, stream: SingleStream, positions: Tensor | None) -> Tensor:
        text = output.text_hidden
        if positions is None or positions.ndim != 2 or len(positions) != len(text):
            found = "is None" if positions is None else f"has shape {list(positions.shape)}"
            raise ValueError(f"phrase_positions: {found}, must be [{len(text)}, E] for 'flickr'")
        index = positions.clamp(min=0)[..., None].expand(-1, -1, text.shape[-1])
        _, keep = stream.split(stream.keep)
        return self.flickr_attention(text.gather(1, index), output.image_hidden, keep)


def check_region_words(feat: Tensor, types: Tensor | None, alignment: Tensor | None) -> None:
    """ValueError where segments or word positions do not belong to these regions."""
    batch, regions = feat.shape[:2]
    if types is not None and types.shape != (batch, regions):
        raise ValueError(f"image_type_ids: has shape {list(types.shape)}, must be {[batch, regions]}")
    if alignment is not None and (alignment.ndim != 3 or len(alignment) != batch or alignment.shape[1] < regions):
        raise ValueError(f"image_text_alignment: has shape {list(alignment.shape)}, must be "
                         f"[{batch}, at least {regions}, A]")


PRESETS: dict[str, dict] = {
    "visualbert-base": {},
    "visualbert-vqa": dict(heads=("vqa",)),
    "visualbert-nlvr2": dict(visual_embedding_dim=1024, heads=("nlvr2",)),
    "visualbert-vcr": dict(visual_embedding_dim=512, heads=("vcr",)),
    "visualbert-flickr": dict(visual_embedding_dim=2054, heads=("pretraining", "flickr")),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> VisualBERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return VisualBERT(VisualBERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
