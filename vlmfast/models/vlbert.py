"""VL-BERT: Pre-training of Generic Visual-Linguistic Representations (Su et al. 2019, arXiv:1908.08530).

Every element of the sequence [words ; objects ; END] is the sum of a token, a visual, a segment and a position
embedding (Fig. 1); a word's visual embedding is that of an object, by default of the whole image. State-dict keys are
those of the authors' checkpoints.

Sizes: B batch, T text tokens, R objects with the whole image first, F channels of a feature, C width.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.bert import ACTIVATIONS, EPS, MaskedLMHead, Pooler, Transform, init_bert
from ..layers.single_stream import SingleStream, set_eps
from ..layers.streams import MASKED
from ..layers.transformer import LayerNorm
from .single_stream import SingleStreamConfig, SingleStreamModel, SingleStreamOutput, before_last, in_groups

HEADS = ("mlm", "mvrc", "relationship", "vqa", "referring", "vcr", "objects", "classifier")
OBJECT_CLASSES = 81
_POOLED = {"relationship", "vcr", "classifier"}


@dataclass(frozen=True, kw_only=True)
class VLBERTConfig(SingleStreamConfig):
    """Settings under the names of the public YAML files, in lower case; the last block is ours."""

    type_vocab_size: int = 3  # text 0 and 1, objects and END 2
    visual_size: int = 0  # channels of an object; 0: hidden_size, as in every public model
    visual_ln: bool = True  # LayerNorm on visual embeddings; False: a factor each
    visual_scale_text_init: float = 0.0  # 0: a new model does not see the image until it has learned to
    visual_scale_object_init: float = 0.0
    visual_region_classes: int = 1601
    with_pooler: bool = False
    object_word_embed_mode: int = 2  # 2: one word for all objects; 1: one per object class
    image_feat_precomputed: bool = True  # a masked object's feature is replaced; False: its pixels were

    image_feat_dim: int = 2048
    coord_dim: int = 256  # sines and as many cosines per coordinate
    first_position: int = 0  # of token 0; 2 for RoBERTa
    text_only: bool = True  # has a visual embedding for texts without image
    heads: tuple[str, ...] = ("mlm", "mvrc")  # "pretraining" stands for these, and "relationship" with a pooler
    vqa_labels: int = 3129

    def __post_init__(self):
        if "pretraining" in self.heads:
            group = HEADS[: 3 if self.with_pooler else 2]
            rest = [name for name in self.heads if name not in (*group, "pretraining")]
            object.__setattr__(self, "heads", (*group, *rest))
        self.check(HEADS, from_zero=("first_position", "visual_size"))
        if self.visual_size == 0:
            object.__setattr__(self, "visual_size", self.hidden_size)
        self.check_choice("object_word_embed_mode", (1, 2))
        if self.type_vocab_size < 3:
            self.refuse("type_vocab_size", "at least 3")
        if not self.with_pooler and (wrong := sorted(_POOLED & set(self.heads))):
            self.refuse("with_pooler", f"True for the heads {', '.join(wrong)}")


class ObjectFeatures(nn.Module):
    """ReLU(W [sines and cosines of the box ; feature]): the `image_feature_extractor` without its CNN."""

    def __init__(self, config: VLBERTConfig):
        super().__init__()
        self.coord_dim = config.coord_dim
        self.obj_downsample = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(8 * config.coord_dim + config.image_feat_dim, config.visual_size), nn.ReLU()
        )

    def coordinates(self, loc: Tensor) -> Tensor:
        """[..., 4] in per cent of the image -> [..., 4, 2 coord_dim], sines then cosines (sec. 3.2)."""
        power = torch.arange(self.coord_dim, device=loc.device, dtype=loc.dtype) / self.coord_dim
        angle = loc[..., None] / 1000**power
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def forward(self, feat: Tensor, loc: Tensor) -> Tensor:  # [B, R, F], [B, R, 4] -> [B, R, visual_size]
        wide = torch.promote_types(loc.dtype, torch.float32)  # sines of up to 100 need the digits
        position = self.coordinates(loc.to(wide)).flatten(-2).to(feat.dtype)
        return self.obj_downsample(torch.cat([position, feat], dim=-1))


class HeadTransform(nn.Module):
    """GELU(W x), without LayerNorm."""

    def __init__(self, config: VLBERTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class RegionHead(nn.Module):
    """Class scores of masked objects: the public `mvrc_head`."""

    def __init__(self, config: VLBERTConfig):
        super().__init__()
        self.transform = HeadTransform(config)
        self.region_cls_pred = nn.Linear(config.hidden_size, config.visual_region_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.region_cls_pred(self.transform(x))


class Trunk(nn.Module):
    """Tables, encoder, pooler and pretraining heads: the public `vlbert.*` keys."""

    def __init__(self, config: VLBERTConfig):
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.heads
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.end_embedding = nn.Embedding(1, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.embedding_LayerNorm = LayerNorm(width, eps=EPS)
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        for name in ("text", "object"):
            if config.visual_size != width:
                setattr(self, f"visual_1x1_{name}", nn.Linear(config.visual_size, width))
            if config.visual_ln:
                setattr(self, f"visual_ln_{name}", LayerNorm(width, eps=EPS))
            else:
                setattr(self, f"visual_scale_{name}", nn.Parameter(torch.zeros(())))
        self.encoder = config.encoder()
        if config.with_pooler:
            self.pooler = Pooler(width, width)
        if "mlm" in heads:
            self.mlm_head = nn.ModuleDict({"predictions": MaskedLMHead(config.vocab_size, width, config.hidden_act)})
        if "mvrc" in heads:
            self.mvrc_head = RegionHead(config)
        if "relationship" in heads:
            self.relationsip_head = nn.ModuleDict({"caption_image_relationship": nn.Linear(width, 2)})

    def init_scales(self) -> None:
        with torch.no_grad():
            for name, value in (("text", self.config.visual_scale_text_init),
                                ("object", self.config.visual_scale_object_init)):
                scale = getattr(self, f"visual_ln_{name}").weight if self.config.visual_ln else getattr(
                    self, f"visual_scale_{name}")
                scale.fill_(value)

    def visual(self, name: str, x: Tensor) -> Tensor:
        """[..., visual_size] -> [..., C], of name "text" or "object"."""
        if self.config.visual_size != self.config.hidden_size:
            x = getattr(self, f"visual_1x1_{name}")(x)
        if self.config.visual_ln:
            return getattr(self, f"visual_ln_{name}")(x)
        return x * getattr(self, f"visual_scale_{name}")

    def embed(self, words: Tensor, objects: Tensor | None, types: Tensor, stream: SingleStream) -> Tensor:
        """Token plus visual embeddings [B, T, C] and [B, R, C], segments [B, T] -> the sequence [B, T + R + 1, C]."""
        tokens, first = words.shape[1], self.config.first_position
        longest = self.position_embeddings.num_embeddings - first - 2  # objects and END come after the text
        if tokens > longest:
            raise ValueError(f"input_ids: has {tokens} tokens, must have at most {longest}")
        count = stream.split(stream.keep)[0].sum(1, keepdim=True)  # [B, 1]: an object's position is that of END - 1
        text_position = torch.arange(tokens, device=words.device).expand(stream.batch, -1)
        others = 0 if objects is None else objects.shape[1]
        position = torch.cat([text_position, count.expand(-1, others), count + 1], dim=1) + first
        types = torch.cat([types.expand(stream.batch, -1), types.new_full((stream.batch, others + 1), 2)], dim=1)
        x = stream.join(words, objects, self.end_embedding.weight[None])
        x = x + self.position_embeddings(position) + self.token_type_embeddings(types)
        return self.embedding_dropout(self.embedding_LayerNorm(x))


class VLBERT(SingleStreamModel):
    """The trunk and the heads named in `config.heads`.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.
    """

    def __init__(self, config: VLBERTConfig, device: torch.device | str | None = None):
        super().__init__(config)
        width, heads = config.hidden_size, config.heads
        with nullcontext() if device is None else torch.device(device):
            self.vlbert = Trunk(config)
            self.image_feature_extractor = ObjectFeatures(config)
            words = OBJECT_CLASSES if config.object_word_embed_mode == 1 else 1
            self.object_linguistic_embeddings = nn.Embedding(words, width)
            if config.text_only:
                self.aux_text_visual_embedding = nn.Embedding(1, config.visual_size)
            if "mvrc" in heads:
                self.object_mask_word_embedding = nn.Embedding(1, width)
                if config.image_feat_precomputed:
                    self.object_mask_visual_embedding = nn.Embedding(1, config.image_feat_dim)

            def head(transform: nn.Module, classes: int) -> nn.Sequential:
                return nn.Sequential(transform, nn.Dropout(0.1), nn.Linear(width, classes))

            if "vqa" in heads:
                self.vqa_mlp = head(Transform(width, config.hidden_act), config.vqa_labels)
            if "referring" in heads:
                self.referring_mlp = head(HeadTransform(config), 1)
            if "vcr" in heads:
                self.vcr_mlp = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 1))
            if "objects" in heads:
                self.cnn_loss_reg = head(HeadTransform(config), OBJECT_CLASSES)
            if "classifier" in heads:
                self.classifier = config.classifier()
            init_bert(self, config.initializer_range)
            set_eps(self, config.layer_norm_eps)
            self.vlbert.init_scales()
            if "mvrc" in heads and config.image_feat_precomputed:
                nn.init.zeros_(self.object_mask_visual_embedding.weight)

    @property
    def word_table(self) -> Tensor:
        return self.vlbert.word_embeddings.weight

    def available(self) -> tuple[str, ...]:
        return tuple(name for name in HEADS if name in self.config.heads)

    def inherited(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        words, regions = "vlbert.mlm_head.predictions.transform.", "vlbert.mvrc_head.transform."
        found = {f"{new}.0.{key.removeprefix(old)}": value for key, value in state.items()
                 for old, new in ((words, "vqa_mlp"), (regions, "referring_mlp"), (regions, "cnn_loss_reg"))
                 if key.startswith(old)}
        match = "vlbert.relationsip_head.caption_image_relationship."
        for name in ("weight", "bias"):  # a choice is right as far as it matches more than it does not
            if match + name in state:
                found[f"vcr_mlp.1.{name}"] = (state[match + name][1] - state[match + name][0])[None]
        return found

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
        text_tags: Tensor | None = None,
        image_masked: Tensor | None = None,
        object_classes: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> SingleStreamOutput:
        """States, pooled vector and scores.

        Args:
            input_ids: [B, T] integer token ids; or [1, T], one text for all images.
            image_feat: [B, R, image_feat_dim] object features, row 0 of the whole image; None for text alone.
            image_loc: [B, R, 4] centre x, centre y, width, height in per cent of the image's width and height.
            token_type_ids: [B, T] segments 0 or 1; None: all 0.
            attention_mask, image_mask: [B, T] and [B, R], 1 or True keeps a row; None: all. Masked keys get -10000,
                as in the public code. Positions of objects and END count the tokens that the mask keeps.
            text_lengths, num_regions: [B] integers in place of the masks: padding at the end is left out of the
                computation (of whole layers, unless attention maps are asked for), and the states there are 0.
            text_tags: [B, T] which object each word is about; None: 0, the whole image.
            image_masked: [B, R] bool, True where an object is masked: its word, and its feature unless
                `image_feat_precomputed` is False, are replaced. For models with the head "mvrc".
            object_classes: [B, R] classes 0..80 for `object_word_embed_mode` 1.
            heads: which scores to compute, None for all the model has that the inputs allow.
            output_attentions: also return the probabilities of every attention, before dropout, [B, H, S, S] with
                S = T + R + 1: text, objects, END.

        Returns:
            A SingleStreamOutput (pooled is None without pooler) with these entries in `logits`: "mlm" [B, T, V], "mvrc"
            [B, R, visual_region_classes], "relationship" [B, 2] (class 1: text and image match), "vqa"
            [B, vqa_labels] of the token before the last, the [MASK] of [CLS] question [SEP] [MASK] [SEP], "referring"
            [B, R] (-10000 at masked objects), "vcr" [B, 1] (one row per choice), "objects" [B, R, 81], "classifier"
            [B / classifier_images, classifier_labels].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks, no image for a model
                without `text_only`.
        """
        config, wanted = self.config, self.wanted(heads)
        if image_feat is not None and image_loc is None:
            raise ValueError("image_loc: is None, must be given with image_feat")
        if image_feat is None and not config.text_only:
            raise ValueError("image_feat: is None, must be given to a model without text_only")
        if input_ids is None:
            raise ValueError("input_ids: is None, must be given")
        stream = SingleStream.of_inputs(input_ids, image_feat, image_loc, (config.image_feat_dim, 4), self.dtype,
                                        attention_mask, image_mask, text_lengths, num_regions, extra=1)
        words = self.vlbert.word_embeddings(input_ids)  # [B, T, C]
        objects = None
        if image_feat is None:
            words = words + self.vlbert.visual("text", self.aux_text_visual_embedding.weight[0])
        else:
            seen = self.objects(*stream.blanked(1, image_feat, image_loc), image_masked)  # [B, R, visual_size]
            words = words + self.vlbert.visual("text", self._tagged(seen, input_ids, text_tags))
            objects = self.vlbert.visual("object", seen) + self._object_words(image_feat, image_masked, object_classes)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        if types.shape != input_ids.shape:
            raise ValueError(f"token_type_ids: has shape {list(types.shape)}, must be {list(input_ids.shape)}")
        x = self.vlbert.embed(words, objects, types, stream)  # [B, T + R + 1, C]
        x, maps = self.vlbert.encoder(x, stream, output_attentions)
        text, image, _ = stream.split(x)
        pooled = self.vlbert.pooler(x) if config.with_pooler else None
        output = SingleStreamOutput(text, image, pooled, attentions=maps if output_attentions else None)
        self._score(output, wanted, heads is not None, stream)
        return output

    def objects(self, feat: Tensor, loc: Tensor, masked: Tensor | None = None) -> Tensor:
        """Visual embeddings of objects [B, R, visual_size], as the words and the objects take them."""
        feat = feat.to(self.dtype)
        if masked is not None:
            if "mvrc" not in self.config.heads:
                raise ValueError("image_masked: given to a model without the head 'mvrc'")
            if masked.shape != feat.shape[:2]:
                raise ValueError(f"image_masked: has shape {list(masked.shape)}, must be {list(feat.shape[:2])}")
            if self.config.image_feat_precomputed:
                feat = torch.where(masked.bool()[..., None], self.object_mask_visual_embedding.weight[0], feat)
        return self.image_feature_extractor(feat, loc)

    def _tagged(self, seen: Tensor, input_ids: Tensor, tags: Tensor | None) -> Tensor:
        """The object behind each word: [B, R, visual_size] -> [B, T or 1, visual_size]."""
        if tags is None:
            return seen[:, :1]
        shape = (len(seen), input_ids.shape[1])
        if tags.shape != shape:
            raise ValueError(f"text_tags: has shape {list(tags.shape)}, must be {list(shape)}")
        return seen.gather(1, tags.clamp(min=0)[..., None].expand(-1, -1, seen.shape[-1]))

    def _object_words(self, feat: Tensor, masked: Tensor | None, classes: Tensor | None) -> Tensor:
        """[B, R, C] or [1, C]: what stands in an object's place among the words."""
        if self.config.object_word_embed_mode == 1:
            if classes is None or classes.shape != feat.shape[:2]:
                raise ValueError(f"object_classes: must be {list(feat.shape[:2])} for object_word_embed_mode 1")
            words = self.object_linguistic_embeddings(classes)
        else:
            words = self.object_linguistic_embeddings.weight
        if masked is None:
            return words
        return torch.where(masked.bool()[..., None], self.object_mask_word_embedding.weight, words)

    def _score(self, output: SingleStreamOutput, wanted: tuple[str, ...], demanded: bool, stream: SingleStream) -> None:
        text, image, pooled, logits = output.text_hidden, output.image_hidden, output.pooled, output.logits
        if "mlm" in wanted:
            logits["mlm"] = self.vlbert.mlm_head["predictions"](text, self.word_table)
        if "mvrc" in wanted:
            logits["mvrc"] = self.vlbert.mvrc_head(image)
        if "relationship" in wanted:
            logits["relationship"] = self.vlbert.relationsip_head["caption_image_relationship"](pooled)
        if "vqa" in wanted:
            logits["vqa"] = self.vqa_mlp(before_last(text, stream))
        if "referring" in wanted:
            keep = stream.split(stream.keep)[1]
            logits["referring"] = self.referring_mlp(image)[..., 0].masked_fill(~keep, MASKED)
        if "vcr" in wanted:
            logits["vcr"] = self.vcr_mlp(pooled)
        if "objects" in wanted:
            logits["objects"] = self.cnn_loss_reg(image)
        if "classifier" in wanted:
            grouped = in_groups(pooled, self.config.classifier_images, demanded)
            if grouped is not None:
                logits["classifier"] = self.classifier(grouped)


_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
PRESETS: dict[str, dict] = {"vlbert-base": {}, "vlbert-large": _LARGE}


def build(name: str, device: torch.device | str | None = None, **overrides) -> VLBERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return VLBERT(VLBERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
