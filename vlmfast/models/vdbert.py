"""VD-BERT: A Unified Vision and Dialog Transformer with BERT (Wang et al. 2020, arXiv:2004.13278).

One sequence [CLS] image slots [SEP] dialog [SEP] answer [SEP] (Fig. 2): BERT over token ids in which the slots'
word and position embeddings are replaced by projected region features and boxes. Answers are ranked by the matching
head (discriminative) or by their likelihood behind the dialog (generative). State-dict keys are those of the authors'
checkpoints.

Sizes: B batch, S sequence, R image slots (36), N answers, A tokens of an answer, C width, V vocabulary, H heads.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers.bert import MaskedLMHead, Pooler, TextEmbeddings, init_bert
from ..layers.single_stream import Segment, SingleStream, set_eps
from ..layers.streams import MASKED, as_lengths, as_mask, check_ids, check_regions, read_layout
from .single_stream import SingleStreamConfig, SingleStreamModel, SingleStreamOutput, in_groups
from .vdbert_answers import Answers

HEADS = ("mlm", "nsp", "classifier")


@dataclass(frozen=True, kw_only=True)
class VDBERTConfig(SingleStreamConfig):
    """BERT's settings at their bert-base-cased values, the public constructor's arguments, and `heads`."""

    vocab_size: int = 28996
    type_vocab_size: int = 6  # rows 0 and 1 are used
    layer_norm_eps: float = 1e-5
    len_vis_input: int = 36  # image slots, sequence positions 1 to 36; 0: no vision
    vis_feat_dim: int = 2048
    vis_pe_dim: int = 7  # x1, y1, x2, y2, area, class, score; 1607 in the model of VisDial 0.9
    vis_embed_layers: int = 1  # 2 in the model of VisDial 0.9
    mask_word_id: int = 103  # [MASK], where a token is predicted
    heads: tuple[str, ...] = ("mlm", "nsp")

    def __post_init__(self):
        self.check(HEADS, from_zero=("len_vis_input", "mask_word_id"))
        self.check_choice("vis_embed_layers", (1, 2))
        if self.len_vis_input > self.max_position_embeddings - 2:
            self.refuse("len_vis_input", f"at most max_position_embeddings - 2, {self.max_position_embeddings - 2}")


@dataclass
class VDBERTOutput(SingleStreamOutput):
    """As its base, except that `text_hidden` is the whole sequence [B, S, C], image slots included, in the order of
    the token ids; `image_hidden` repeats the slots [B, R, C]."""

    @property
    def hidden(self) -> Tensor:
        return self.text_hidden

    @property
    def text_to_image(self) -> tuple[Tensor, ...] | None:
        """Per layer [B, H, S, R]: the share of every row's attention that falls on the image slots."""
        last = 1 + self.image_hidden.shape[1]
        return self.attentions and tuple(probs[:, :, :, 1:last] for probs in self.attentions)

    @property
    def image_to_text(self) -> tuple[Tensor, ...] | None:
        """Per layer [B, H, R, S]: attention of the image slots."""
        last = 1 + self.image_hidden.shape[1]
        return self.attentions and tuple(probs[:, :, 1:last] for probs in self.attentions)


class Embeddings(TextEmbeddings):
    """LN(word + position + segment), where projected regions and boxes stand for the slots' words and positions."""

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor,
                regions: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """[B, S] ids, [B, R, C] regions and places -> [B, S, C]."""
        words, positions = self.word_embeddings(input_ids), self.position_embeddings(position_ids)
        if regions is not None:
            rest = 1 + regions.shape[1]
            words = torch.cat([words[:, :1], regions, words[:, rest:]], dim=1)
            positions = torch.cat([positions[:, :1], places, positions[:, rest:]], dim=1)
        return self.dropout(self.LayerNorm(words + positions + self.token_type_embeddings(token_type_ids)))


class Trunk(nn.Module):
    """Embeddings, encoder and pooler: the public `bert.*` keys."""

    def __init__(self, config: VDBERTConfig):
        super().__init__()
        self.embeddings = Embeddings(config.vocab_size, config.hidden_size, config.max_position_embeddings,
                                     config.type_vocab_size, config.hidden_dropout_prob, padding=())
        self.encoder = config.encoder()
        self.pooler = Pooler(config.hidden_size, config.hidden_size)


class PretrainingHeads(nn.Module):
    """Masked words and matching, as far as they are wanted: the public `cls.*` keys."""

    def __init__(self, config: VDBERTConfig):
        super().__init__()
        if "mlm" in config.heads:
            self.predictions = MaskedLMHead(config.vocab_size, config.hidden_size, config.hidden_act)
        if "nsp" in config.heads:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


def _projection(widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Linear and ReLU for each step of `widths`, then dropout."""
    steps = [(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[part for step in steps for part in step], nn.Dropout(dropout))


class VDBERT(Answers, SingleStreamModel):
    """The trunk and the heads named in `config.heads`; `Answers` scores and writes answers.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.
    """

    def __init__(self, config: VDBERTConfig, device: torch.device | str | None = None):
        super().__init__(config)
        width, drop = config.hidden_size, config.hidden_dropout_prob
        with nullcontext() if device is None else torch.device(device):
            self.bert = Trunk(config)
            self.cls = PretrainingHeads(config)
            if config.len_vis_input:
                middle = (config.vis_feat_dim,) * (config.vis_embed_layers - 1)
                self.vis_embed = _projection((config.vis_feat_dim, *middle, width), drop)
                self.vis_pe_embed = _projection((config.vis_pe_dim, width), drop)
            if "classifier" in config.heads:
                self.classifier = config.classifier()
            self.dropout = nn.Dropout(drop)
            init_bert(self, config.initializer_range)
        set_eps(self, config.layer_norm_eps)

    @property
    def word_table(self) -> Tensor:
        return self.bert.embeddings.word_embeddings.weight

    def available(self) -> tuple[str, ...]:
        """The names that `forward` accepts in `heads`."""
        return tuple(name for name in HEADS if name in self.config.heads)

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
        prefix_lengths: Tensor | None = None,
        position_ids: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> VDBERTOutput:
        """States, pooled vector and scores.

        Args:
            input_ids: [B, S] integer ids of the whole sequence; those at positions 1 to R ([UNK] in the public code)
                are not read where there is an image.
            image_feat: [B, R, vis_feat_dim] region features, R = len_vis_input; None: the ids are all there is.
            image_loc: [B, R, vis_pe_dim] boxes; see `vlmfast.data.region_boxes.vd_bert_boxes`.
            token_type_ids: [B, S] segments; None: 0 for [CLS], image and its [SEP], 1 behind them.
            attention_mask: [B, S], 1 or True keeps a row as a key for all; or [B, S, S], entry b, i, j: row i may see
                row j. None: all. What is masked gets -10000, as in the public code.
            image_mask: [B, R], 1 or True keeps a slot.
            text_lengths, num_regions: [B] integers in place of the masks: rows of the sequence, [CLS] and slots
                included, and slots in use. The others are left out of the computation (of whole layers, unless
                attention maps are asked for or prefix_lengths given), and their states are 0.
            prefix_lengths: [B] integers, the sequence-to-sequence mask: rows before this position are seen by all, the
                answer behind them only by itself, from left to right (UniLM, arXiv:1905.03197). None: all see all.
            position_ids: [B, S]; None: 0 to S - 1.
            heads: which scores to compute, None for all the model has.
            output_attentions: also return the probabilities of every attention, before dropout.

        Returns:
            A VDBERTOutput with these entries in `logits`: "mlm" [B, S, V], "nsp" [B, 2] (class 1: the right answer),
            "classifier" [B / classifier_images, classifier_labels].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks.
        """
        config, wanted = self.config, self.wanted(heads)
        stream = self._stream(input_ids, image_feat, image_loc, attention_mask, image_mask, text_lengths, num_regions)
        if prefix_lengths is not None:
            stream = stream.with_prefix(as_lengths("prefix_lengths", prefix_lengths, *input_ids.shape))
        x = self.embed(input_ids, image_feat, image_loc, token_type_ids, position_ids)  # [B, S, C]
        x, maps = self.bert.encoder(x, stream, output_attentions)
        slots = 0 if image_feat is None else image_feat.shape[1]
        output = VDBERTOutput(x, x[:, 1 : 1 + slots], self.bert.pooler(x),
                              attentions=maps if output_attentions else None)
        if "mlm" in wanted:
            output.logits["mlm"] = self.cls.predictions(x, self.word_table)
        if "nsp" in wanted:
            output.logits["nsp"] = self.cls.seq_relationship(output.pooled)
        if "classifier" in wanted:
            pooled = in_groups(output.pooled, config.classifier_images, heads is not None)
            if pooled is not None:
                output.logits["classifier"] = self.classifier(self.dropout(pooled))
        return output

    def embed(self, input_ids: Tensor, image_feat: Tensor | None = None, image_loc: Tensor | None = None,
              token_type_ids: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """The encoder's input [B, S, C]; arguments as in `forward`."""
        config, size = self.config, input_ids.shape[1]
        longest = config.max_position_embeddings
        if position_ids is None:
            if size > longest:
                raise ValueError(f"input_ids: has {size} tokens, must have at most {longest}")
            position_ids = torch.arange(size, device=input_ids.device).expand_as(input_ids)
        if token_type_ids is None:
            kind = (torch.arange(size, device=input_ids.device) >= config.len_vis_input + 2).long()
            token_type_ids = kind.expand_as(input_ids)
        for name, value in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if value.shape != input_ids.shape:
                raise ValueError(f"{name}: has shape {list(value.shape)}, must be {list(input_ids.shape)}")
        regions = places = None
        if image_feat is not None:
            regions = self.vis_embed(image_feat.to(self.dtype))
            places = self.vis_pe_embed(image_loc.to(self.dtype))
        return self.bert.embeddings(input_ids, token_type_ids, position_ids, regions, places)

    def _stream(self, input_ids, image_feat, image_loc, attention_mask, image_mask, text_lengths,
                num_regions) -> SingleStream:
        """[CLS], slots, the rest: checked, with what each may see."""
        check_ids(input_ids)
        (batch, size), config, slots = input_ids.shape, self.config, 0
        if image_feat is not None:
            if not config.len_vis_input:
                raise ValueError("image_feat: is given to a model without vision, must be None")
            if image_loc is None:
                raise ValueError("image_loc: is None, must be given with image_feat")
            check_regions(image_feat, image_loc, (config.vis_feat_dim, config.vis_pe_dim))
            slots = config.len_vis_input
            if image_feat.shape[:2] != (batch, slots):
                raise ValueError(f"image_feat: has {image_feat.shape[1]} regions of {len(image_feat)} images, must "
                                 f"have {slots} (len_vis_input) of {batch}")
            if size < slots + 2:
                raise ValueError(f"input_ids: has {size} tokens, must have at least {slots + 2} with the image")
        elif image_mask is not None or num_regions is not None:
            raise ValueError("image_feat: is None, must be given with image_mask or num_regions")
        full = attention_mask if attention_mask is not None and attention_mask.ndim == 3 else None
        if full is not None and text_lengths is not None:
            raise ValueError("text_lengths: given together with attention_mask, must be one or the other")
        mask, lengths = read_layout("attention_mask", None if full is not None else attention_mask, "text_lengths",
                                    text_lengths, (batch, size))
        first, image, rest = Segment(1), Segment(slots), Segment(size - 1 - slots)
        if slots:
            image = Segment.of("image_mask", image_mask, "num_regions", num_regions, image_feat)
        if lengths is not None:
            readable = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
            if batch and readable and int(lengths.min()) < 1 + slots:
                raise ValueError(f"text_lengths: starts at {int(lengths.min())}, must be at least {1 + slots}, [CLS] "
                                 "and the image")
            place = torch.arange(1 + slots, size, device=input_ids.device)
            rest = Segment(rest.size, place < lengths.to(place.device)[:, None], counted=True)
        if mask is not None:
            keep = mask.bool()
            first, rest = Segment(1, keep[:, :1]), Segment(rest.size, keep[:, 1 + slots :])
            if slots:
                seen = keep[:, 1 : 1 + slots]
                image = replace(image, keep=seen if image.keep is None else seen & image.keep, counted=False)
        stream = SingleStream.of(batch, [first, image, rest], self.dtype, input_ids.device)
        if full is not None:
            as_mask("attention_mask", full, (batch, size, size))
            stream = stream.with_bias((1 - full[:, None].to(self.dtype)) * MASKED)
        return stream

    def rank(self, input_ids: Tensor, image_feat: Tensor | None = None, image_loc: Tensor | None = None,
             token_type_ids: Tensor | None = None, *, text_lengths: Tensor | None = None) -> Tensor:
        """Discriminative scores of answers: the matching head's logit of class 1 (sec. 3.4).

        Args:
            input_ids: [B, N, S], the whole sequence with each answer.
            image_feat, image_loc: as in `forward`, one image for the N answers.
            token_type_ids: [B, N, S] or None.
            text_lengths: [B, N] rows of each sequence, or None.

        Returns:
            [B, N]; the best answer has the highest score.

        Raises:
            TypeError, ValueError: shapes or types do not fit.
        """
        if input_ids.ndim != 3:
            raise ValueError(f"input_ids: has shape {list(input_ids.shape)}, must be [B, N, S]")
        batch, answers = input_ids.shape[:2]
        for name, value, shape in (("token_type_ids", token_type_ids, input_ids.shape),
                                   ("text_lengths", text_lengths, input_ids.shape[:2])):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name}: has shape {list(value.shape)}, must be {list(shape)}")
        flat = [None if x is None else x.flatten(0, 1) for x in (input_ids, token_type_ids, text_lengths)]
        image = [None if x is None else x.repeat_interleave(answers, 0) for x in (image_feat, image_loc)]
        output = self(flat[0], *image, flat[1], text_lengths=flat[2], heads=("nsp",))
        return output.logits["nsp"][:, 1].unflatten(0, (batch, answers))


PRESETS: dict[str, dict] = {
    "vdbert-base": {},
    "vdbert-base-v0.9": dict(len_vis_input=100, vis_pe_dim=6 + 1601, vis_embed_layers=2),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> VDBERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return VDBERT(VDBERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
