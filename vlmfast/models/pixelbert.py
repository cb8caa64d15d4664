"""Pixel-BERT: Aligning Image Pixels with Text by Deep Multi-modal Transformers (Huang et al. 2020, arXiv:2004.00849).

A residual network reads the image, and each cell of its last map is a token behind the words (Fig. 2); in pretraining
a random selection of them. The authors published neither code nor weights: layout and state-dict keys are those of the
third-party implementation zezeze97/pixelbert, which halves the map with a convolution and adds row and column
embeddings.

Sizes: B batch, T text tokens, h x w image in pixels, H x W cells of the grid (1/64 of the image), R = H W or the
number of sampled cells, C width.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.bert import MaskedLMHead, Pooler, TextEmbeddings, init_bert
from ..layers.plain_resnet import RESNETS, ResNet
from ..layers.single_stream import SingleStream, set_eps
from ..layers.streams import as_lengths, as_mask
from ..layers.transformer import LayerNorm
from .single_stream import SingleStreamConfig, SingleStreamModel, SingleStreamOutput, in_groups

HEADS = ("pretraining", "vqa", "rank", "classifier")


@dataclass(frozen=True, kw_only=True)
class PixelBERTConfig(SingleStreamConfig):
    """Settings under the names of the third-party code; the last block is ours."""

    backbone_channel_in_size: int = 2048  # channels of the backbone's last map
    max_grid_row_position_embeddings: int = 100  # 0 in both: no row and column tables, the paper's model
    max_grid_col_position_embeddings: int = 100
    pixel_random_sampling_size: int = 100  # cells kept in training mode; 0: all
    num_labels: int = 3129  # of "vqa"; 1 in the third-party multiple choice model
    cls_hidden_scale: int = 2  # inner width of that head, in widths

    backbone: str = "resnet50"  # a name in layers.plain_resnet.RESNETS, or "none": maps are given in place of images
    backbone_layers: tuple[int, ...] = ()  # blocks per stage; empty: those of the name
    backbone_width: int = 64  # channels of the stem
    stride_in_1x1: bool = True  # detectron2's ResNet-50; False: torchvision, detectron2's ResNeXt
    frozen_norm: bool = True
    img_input_format: str = "BGR"  # what the backbone reads; images are given as RGB
    img_pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)  # of RGB in 0..255, subtracted by the caller
    img_pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0)
    heads: tuple[str, ...] = ("pretraining",)

    def __post_init__(self):
        tables = ("max_grid_row_position_embeddings", "max_grid_col_position_embeddings")
        self.check(HEADS, from_zero=(*tables, "pixel_random_sampling_size"))
        self.check_choice("backbone", (*RESNETS, "none"))
        self.check_choice("img_input_format", ("RGB", "BGR"))
        for name in ("backbone_layers", "img_pixel_mean", "img_pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if any(type(blocks) is not int or blocks < 1 for blocks in self.backbone_layers):
            self.refuse("backbone_layers", "integers of at least 1")
        if (self.max_grid_row_position_embeddings == 0) != (self.max_grid_col_position_embeddings == 0):
            self.refuse(tables[0], f"0 exactly where {tables[1]} is, {self.max_grid_col_position_embeddings}")
        if self.backbone != "none":
            channels = 4 * self.backbone_width * 2 ** (len(self.stages) - 1)
            if self.backbone_channel_in_size != channels:
                self.refuse("backbone_channel_in_size", f"what {self.backbone} gives, {channels}")

    @property
    def stages(self) -> tuple[int, ...]:
        return self.backbone_layers or RESNETS[self.backbone][0]


@dataclass
class PixelBERTOutput(SingleStreamOutput):
    """As its base; `image_hidden` are the cells in row-major order, or the sampled ones."""

    grid: Tensor | None = None  # [B, H, W, C] visual features of all cells; None without an image
    cells: Tensor | None = None  # [R] which cells were sampled; None: all


class GridEncoder(nn.Module):
    """Backbone, 3 x 3 convolution to the model's width, 2 x 2 maximum, ReLU: the public `cnn.*` keys."""

    def __init__(self, config: PixelBERTConfig):
        super().__init__()
        self.flip = config.img_input_format == "BGR"
        if config.backbone != "none":
            _, groups, group_width = RESNETS[config.backbone]
            self.feature = ResNet(config.stages, groups, group_width, config.backbone_width, config.stride_in_1x1,
                                  config.frozen_norm)
        self.grid_encoder = nn.Sequential(
            nn.Conv2d(config.backbone_channel_in_size, config.hidden_size, 3, padding=1, bias=False),
            nn.MaxPool2d(2), nn.ReLU(),
        )

    def forward(self, image: Tensor | None, feat: Tensor | None = None) -> Tensor:
        """[B, 3, h, w], or in its place the map [B, channels, 2 H, 2 W] -> [B, H, W, C]."""
        if feat is None:
            feat = self.feature(image.flip(1) if self.flip else image)
        return self.grid_encoder(feat).permute(0, 2, 3, 1)


class PixelEmbeddings(nn.Module):
    """LN(cell + row + column + semantic vector), dropout (sec. 3.1)."""

    def __init__(self, config: PixelBERTConfig):
        super().__init__()
        rows, columns = config.max_grid_row_position_embeddings, config.max_grid_col_position_embeddings
        self.sizes = rows, columns
        if rows:
            self.row_position_embeddings = nn.Embedding(rows, config.hidden_size)
            self.col_position_embeddings = nn.Embedding(columns, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(1, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, grid: Tensor, cells: Tensor | None = None) -> Tensor:
        """[B, H, W, C], [R] -> [B, R, C]."""
        height, width = grid.shape[1:3]
        if self.sizes[0]:
            if height > self.sizes[0] or width > self.sizes[1]:
                raise ValueError(f"image: has {height} x {width} cells, must have at most {self.sizes[0]} x "
                                 f"{self.sizes[1]}")
            row, column = self.row_position_embeddings.weight, self.col_position_embeddings.weight
            grid = grid + row[:height, None] + column[:width]
        x = grid.flatten(1, 2)
        if cells is not None:
            x = x[:, cells]
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings.weight[0]))


class Trunk(nn.Module):
    """Embeddings, encoder and pooler: the public `transformer.bert.*` keys."""

    def __init__(self, config: PixelBERTConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config.vocab_size, config.hidden_size, config.max_position_embeddings,
                                         config.type_vocab_size, config.hidden_dropout_prob)
        self.visual_embeddings = PixelEmbeddings(config)
        self.encoder = config.encoder()
        self.pooler = Pooler(config.hidden_size, config.hidden_size)


class PretrainingHeads(nn.Module):
    """Masked words and matching: the public `transformer.cls.*` keys."""

    def __init__(self, config: PixelBERTConfig):
        super().__init__()
        self.predictions = MaskedLMHead(config.vocab_size, config.hidden_size, config.hidden_act)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class Transformer(nn.Module):
    """The trunk and the heads of the public files: the `transformer.*` keys."""

    def __init__(self, config: PixelBERTConfig):
        super().__init__()
        self.bert = Trunk(config)
        if "pretraining" in config.heads:
            self.cls = PretrainingHeads(config)
        if "vqa" in config.heads:
            inner = config.cls_hidden_scale * config.hidden_size
            self.classifier = nn.Sequential(nn.Linear(config.hidden_size, inner), nn.ReLU(),
                                            nn.Linear(inner, config.num_labels))


class PixelBERT(SingleStreamModel):
    """The image network, the trunk and the heads named in `config.heads`.

    Args:
        config: sizes and options.
        device: where parameters are created; "meta" allocates nothing.

    Attributes:
        preprocess: how pictures are prepared, an `ImagePreprocess`; None until a caller sets one.
    """

    def __init__(self, config: PixelBERTConfig, device: torch.device | str | None = None):
        super().__init__(config)
        self.preprocess = None
        with nullcontext() if device is None else torch.device(device):
            self.cnn = GridEncoder(config)
            self.transformer = Transformer(config)
            if "rank" in config.heads:
                self.rank_output = nn.Linear(config.hidden_size, 1)
            if "classifier" in config.heads:
                self.classifier = config.classifier()
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
            init_bert(self, config.initializer_range)
        set_eps(self, config.layer_norm_eps)

    @property
    def word_table(self) -> Tensor:
        return self.transformer.bert.embeddings.word_embeddings.weight

    def available(self) -> tuple[str, ...]:
        """The names that `forward` accepts in `heads`."""
        names = [name for name in HEADS if name in self.config.heads and name != "pretraining"]
        return (("mlm", "itm") if "pretraining" in self.config.heads else ()) + tuple(names)

    def forward(
        self,
        input_ids: Tensor,
        image: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        image_feat: Tensor | None = None,
        image_index: Tensor | None = None,
        text_lengths: Tensor | None = None,
        num_regions: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        output_attentions: bool = False,
    ) -> PixelBERTOutput:
        """States, pooled vector and scores.

        In training mode, `config.pixel_random_sampling_size` cells are drawn, the same ones for the whole batch.

        Args:
            input_ids: [B, T] integer token ids; or [1, T], one text for all images.
            image: [B, 3, h, w] RGB, normalised with `config.img_pixel_mean` and `img_pixel_std`; h, w of at least 64.
                None, and no image_feat: text alone.
            token_type_ids: [B, T] segments; None: all 0.
            attention_mask, image_mask: [B, T] and [B, H W] (row-major cells), 1 or True keeps a row; None: all. Masked
                keys get -10000, as in the public code.
            image_feat: [B, backbone_channel_in_size, 2 H, 2 W] maps of a backbone in place of images.
            image_index: [B] integers, which of the images (or maps) each text is about, so that one that several texts
                share is read once; None: the i-th text has the i-th image.
            text_lengths, num_regions: [B] integers in place of the masks: padding at the end is left out of the
                computation (of whole layers, unless attention maps are asked for), and the states there are 0.
            heads: which scores to compute, None for all the model has that the inputs allow.
            output_attentions: also return the probabilities of every attention, before dropout.

        Returns:
            A PixelBERTOutput with these entries in `logits`: "mlm" [B, T, V], "itm" [B, 2] (class 1: text and image
            match), "vqa" [B, num_labels], "rank" [B, 1], "classifier" [B / classifier_images, classifier_labels].

        Raises:
            TypeError, ValueError: shapes or types do not fit, `heads` names one the model lacks.
        """
        wanted, bert = self.wanted(heads), self.transformer.bert
        grid = cells = pixels = None
        if image is not None or image_feat is not None:
            grid = self._grid(image, image_feat, image_index)  # [B, H, W, C]
            cells, image_mask, num_regions = self._sampled(grid, image_mask, num_regions)
            pixels = bert.visual_embeddings(grid, cells)  # [B, R, C]
        elif image_index is not None:
            raise ValueError("image: is None, must be given with image_index")
        stream = SingleStream.of_inputs(input_ids, pixels, None, (self.config.hidden_size, 0), self.dtype,
                                        attention_mask, image_mask, text_lengths, num_regions)
        x = stream.join(bert.embeddings(input_ids, token_type_ids), pixels)  # [B, T + R, C]
        x, maps = bert.encoder(x, stream, output_attentions)
        text, pixels = stream.split(x)
        output = PixelBERTOutput(text, pixels, bert.pooler(x), attentions=maps if output_attentions else None,
                                 grid=grid, cells=cells)
        self._score(output, wanted, heads is not None)
        return output

    def _grid(self, image: Tensor | None, feat: Tensor | None, index: Tensor | None) -> Tensor:
        """[B, H, W, C] from checked images or maps, one per text."""
        if image is not None and feat is not None:
            raise ValueError("image_feat: given together with image, must be one or the other")
        if image is not None and self.config.backbone == "none":
            raise ValueError("image: given to a model without a backbone, must be image_feat")
        name, value, channels, least = ("image", image, 3, 64)
        if feat is not None:
            name, value, channels, least = "image_feat", feat, self.config.backbone_channel_in_size, 2
        if not value.is_floating_point():
            raise TypeError(f"{name}: is {value.dtype}, must be floating point")
        if value.ndim != 4 or value.shape[1] != channels or min(value.shape[2:]) < least:
            raise ValueError(f"{name}: has shape {list(value.shape)}, must be [B, {channels}, height, width] with "
                             f"sides of at least {least}")
        grid = self.cnn(*(None if x is None else x.to(self.dtype) for x in (image, feat)))
        if index is None:
            return grid
        if index.ndim != 1:
            raise ValueError(f"image_index: has shape {list(index.shape)}, must be [B]")
        return grid[as_lengths("image_index", index, len(index), len(grid) - 1)]

    def _sampled(self, grid: Tensor, mask: Tensor | None, counts: Tensor | None):
        """(cells [R] or None, the mask and the counts of those), drawn in training mode (sec. 3.3)."""
        batch, count, size = len(grid), grid.shape[1] * grid.shape[2], self.config.pixel_random_sampling_size
        mask = as_mask("image_mask", mask, (batch, count))
        counts = as_lengths("num_regions", counts, batch, count)
        if not self.training or not 0 < size < count:
            return None, mask, counts
        cells = torch.randperm(count, device=grid.device)[:size].sort().values
        mask = None if mask is None else mask[:, cells]
        return cells, mask, None if counts is None else (cells < counts.to(cells.device)[:, None]).sum(1)

    def _score(self, output: PixelBERTOutput, wanted: tuple[str, ...], demanded: bool) -> None:
        logits, pooled = output.logits, self.dropout(output.pooled)  # [B, C]
        if "mlm" in wanted:
            logits["mlm"] = self.transformer.cls.predictions(output.text_hidden, self.word_table)
        if "itm" in wanted:
            logits["itm"] = self.transformer.cls.seq_relationship(output.pooled)
        if "vqa" in wanted:
            logits["vqa"] = self.transformer.classifier(pooled)
        if "rank" in wanted:
            logits["rank"] = self.rank_output(pooled)
        if "classifier" in wanted:
            grouped = in_groups(pooled, self.config.classifier_images, demanded)
            if grouped is not None:
                logits["classifier"] = self.classifier(grouped)


_FINE_TUNED = dict(pixel_random_sampling_size=0)
PRESETS: dict[str, dict] = {
    "pixelbert-resnet50": {},
    "pixelbert-resnext152": dict(backbone="resnext152", stride_in_1x1=False),
    "pixelbert-resnet50-vqa": dict(heads=("vqa",), **_FINE_TUNED),
    "pixelbert-resnet50-nlvr2": dict(heads=("classifier",), classifier_images=2, **_FINE_TUNED),
    "pixelbert-resnet50-retrieval": dict(heads=("rank",), **_FINE_TUNED),
}


def build(name: str, device: torch.device | str | None = None, **overrides) -> PixelBERT:
    """A freshly initialised preset; `overrides` replace config fields."""
    return PixelBERT(PixelBERTConfig.from_dict({**PRESETS[name], **overrides}), device=device)
