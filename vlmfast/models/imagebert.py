"""ImageBERT: Cross-modal Pre-training with Large-scale Weak-supervised Image-Text Data (Qi et al. 2020,
arXiv:2001.07966).

Words and detector regions in one BERT sequence [CLS] text [SEP] regions [SEP] (Fig. 1), pretrained on masked words,
masked objects' classes and features, and matching. The authors published neither code nor weights, so there is nothing
to compare with: sizes are bert-base-uncased's, and what the paper leaves open is an option whose default is stated.

Sizes: B batch, T text tokens, R regions, C width.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.bert import MaskedLMHead, Pooler, TextEmbeddings, init_bert
from ..layers.single_stream import SingleStream, set_eps
from .single_stream import SingleStreamConfig, SingleStreamModel, SingleStreamOutput, in_groups

HEADS = ("pretraining", "rank", "classifier")
BOX = 5  # x1, y1, x2, y2, area, relative to the image


@dataclass(frozen=True, kw_only=True)
class ImageBERTConfig(SingleStreamConfig):
    """BERT's settings and ours."""

    visual_feat_dim: int = 2048
    num_object_labels: int = 1600
    image_position: str = "dummy"  # of regions: one vector for all; "sequence": positions behind the text's
    image_sep: bool = True  # a [SEP] behind the regions
    sep_token_id: int = 102
    heads: tuple[str, ...] = ("pretraining",)

    def __post_init__(self):
        self.check(HEADS, from_zero=("sep_token_id",))
        self.check_choice("image_position", ("dummy", "sequence"))
        if self.type_vocab_size < 2:
            self.refuse("type_vocab_size", "at least 2: text is 0, image 1")
        if self.image_sep and self.sep_token_id >= self.vocab_size:
            self.refuse("sep_token_id", f"less than vocab_size, {self.vocab_size}")


class Embeddings(TextEmbeddings):
    """LN([word + position + segment ; W feature + W box + segment 1 + position]), dropout (sec. 3.1)."""

    def __init__(self, config: ImageBERTConfig):
        super().__init__(config.vocab_size, config.hidden_size, config.max_position_embeddings, config.type_vocab_size,
                         config.hidden_dropout_prob)
        self.sep_token_id = config.sep_token_id
        self.image_embeddings = nn.Linear(config.visual_feat_dim, config.hidden_size)
        self.image_location_embeddings = nn.Linear(BOX, config.hidden_size)
        if config.image_position == "dummy":
            self.image_position_embeddings = nn.Embedding(1, config.hidden_size)

    def regions(self, feat: Tensor, loc: Tensor, position: Tensor) -> Tensor:
        """[B, R, F], [B, R, 5], [B, R] -> [B, R, C], before the LayerNorm; position is read in "sequence" mode."""
        x = self.image_embeddings(feat) + self.image_location_embeddings(loc) + self.token_type_embeddings.weight[1]
        if hasattr(self, "image_position_embeddings"):
            return x + self.image_position_embeddings.weight[0]
        return x + self.position_embeddings(position)

    def end(self, position: Tensor) -> Tensor:
        """[B] -> the [SEP] behind the regions [B, 1, C], before the LayerNorm."""
        x = self.word_embeddings(torch.full_like(position, self.sep_token_id)) + self.token_type_embeddings.weight[1]
        return (x + self.position_embeddings(position))[:, None]

    def normalize(self, x: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(x))


class Trunk(nn.Module):
    """Embeddings, encoder and pooler."""

    def __init__(self, config: ImageBERTConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = config.encoder()
        self.pooler = Pooler(config.hidden_size, config.hidden_size)


class PretrainingHeads(nn.Module):
    """Masked words, matching, class and feature of masked regions (sec. 3.2)."""

    def __init__(self, config: ImageBERTConfig):
        super().__init__()
        self.predictions = MaskedLMHead(config.vocab_size, config.hidden_size, config.hidden_act)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)
        self.object_classifier = nn.Linear(config.hidden_size, config.num_object_labels)
        self.feature_regression = nn.Linear(config.hidden_size, config.visual_feat_dim)


class ImageBERT(SingleStreamModel):
    """The trunk and the heads named in `config.heads`.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.
    """

    def __init__(self, config: ImageBERTConfig, device: torch.device | str | None = None):
        super().__init__(config)
        with nullcontext() if device is None else torch.device(device):
            self.bert = Trunk(config)
            if "pretraining" in config.heads:
                self.cls = PretrainingHeads(config)
            if "rank" in config.heads:
                self.rank_output = nn.Linear(config.hidden_size, 1)
            if "classifier" in config.heads:
                self.classifier = config.classifier()
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
            init_bert(self, config.initializer_range)
        set_eps(self, config.layer_norm_eps)

    @property
    def word_table(self) -> Tensor:
        return self.bert.embeddings.word_embeddings.weight

    def available(self) -> tuple[str, ...]:
        """The names that `forward` accepts in `heads`."""
        names = [name for name in HEADS if name in self.config.heads and name != "pretraining"]
        return (("mlm", "itm", "moc", "mrfr") if "pretraining" in self.config.heads else ()) + tuple(names)

    def forward(
        self,
        input_ids: Tensor | None = None,
        image_feat: Tensor | None = None,
        image_loc: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        text_lengths: Tensor | None = None,
        num_regions: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> SingleStreamOutput:
        """States, pooled vector and scores.

        Args:
            input_ids: [B, T] integer token ids, [CLS] first, [SEP] last; or [1, T], one text for all images; None:
                regions alone.
            image_feat: [B, R, visual_feat_dim] region features, masked ones zeroed; None: text alone.
            image_loc: [B, R, 5] boxes x1, y1, x2, y2, area, relative to the image.
            token_type_ids: [B, T] segments; None: all 0.
            attention_mask, image_mask: [B, T] and [B, R], 1 or True keeps a row; None: all. Masked keys get -10000.
            text_lengths, num_regions: [B] integers in place of the masks: padding at the end is left out of the
                computation (of whole layers, unless attention maps are asked for), and the states there are 0.
            heads: which scores to compute, None for all the model has that the inputs allow.
            output_attentions: also return the probabilities of every attention, before dropout; the last row is the
                [SEP] behind the regions.

        Returns:
            A SingleStreamOutput with these entries in `logits`: "mlm" [B, T, V], "itm" [B, 2] (class 1: text and image
            match), "moc" [B, R, num_object_labels], "mrfr" [B, R, visual_feat_dim], "rank" [B, 1], "classifier"
            [B / classifier_images, classifier_labels].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks.
        """
        config, wanted = self.config, self.wanted(heads)
        if (image_feat is None) != (image_loc is None):
            raise ValueError("image_loc: goes together with image_feat, one of them is None")
        extra = int(config.image_sep and image_feat is not None)
        stream = SingleStream.of_inputs(input_ids, image_feat, image_loc, (config.visual_feat_dim, BOX), self.dtype,
                                        attention_mask, image_mask, text_lengths, num_regions, extra)
        needed = sum(part.size for part in stream.segments[:: 1 if config.image_position == "sequence" else 2])
        if image_feat is not None and needed > config.max_position_embeddings:
            raise ValueError(f"image_feat: text, regions and [SEP] need {needed} positions, must be at most "
                             f"{config.max_position_embeddings}")
        embeddings, parts = self.bert.embeddings, []
        if input_ids is not None:
            parts.append(embeddings.total(input_ids, token_type_ids))
        if image_feat is not None:
            text, image, *_ = stream.split(stream.keep.to(image_feat.device))
            start = text.sum(1)  # regions follow the example's own last token
            place = start[:, None] + (image.cumsum(1) - 1).clamp(min=0)
            parts.append(embeddings.regions(image_feat.to(self.dtype), image_loc.to(self.dtype), place))
            if extra:
                parts.append(embeddings.end(start + (config.image_position == "sequence") * image.sum(1)))
        x, maps = self.bert.encoder(embeddings.normalize(stream.join(*parts)), stream, output_attentions)
        text, image, *_ = stream.split(x)
        output = SingleStreamOutput(text, image, self.bert.pooler(x), attentions=maps if output_attentions else None)
        self._score(output, wanted, heads is not None)
        return output

    def _score(self, output: SingleStreamOutput, wanted: tuple[str, ...], demanded: bool) -> None:
        logits, pooled = output.logits, self.dropout(output.pooled)  # [B, C]
        if "mlm" in wanted:
            logits["mlm"] = self.cls.predictions(output.text_hidden, self.word_table)
        if "itm" in wanted:
            logits["itm"] = self.cls.seq_relationship(output.pooled)
        if "moc" in wanted:
            logits["moc"] = self.cls.object_classifier(output.image_hidden)
        if "mrfr" in wanted:
            logits["mrfr"] = self.cls.feature_regression(output.image_hidden)
        if "rank" in wanted:
            logits["rank"] = self.rank_output(pooled)
        if "classifier" in wanted:
            grouped = in_groups(pooled, self.config.classifier_images, demanded)
            if grouped is not None:
                logits["classifier"] = self.classifier(grouped)


PRESETS: dict[str, dict] = {
    "imagebert-base": {},
    "imagebert-base-retrieval": dict(heads=("rank",)),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> ImageBERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return ImageBERT(ImageBERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
