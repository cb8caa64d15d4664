"""What the tasks of BERT-like models share: texts and pictures to model inputs, in batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.regions import Regions
from .pair_models import MODELS, TASK_IDS, kind_of, task_head_for, trunk_of
from .pair_pictures import (
    Picture,
    as_picture,
    as_regions,
    cell_regions,
    is_one_picture,
    pixel_batch,
    pixel_preprocess,
    region_batch,
)
from .pair_texts import lay_out

__all__ = ["PairAttention", "PairTask", "as_picture", "as_regions", "evaluating", "is_one_picture"]
TASK_TOKEN = "[TASK]"


@dataclass(frozen=True)
class PairAttention:
    """Attention between the words and the regions of one example; `vlmfast.viz.attention` takes it as `probs`.

    Attributes:
        tokens: T token texts, special ones included.
        regions: the picture's regions, those the model saw; cells of the grid for Pixel-BERT.
        global_region: region 0 of the maps is the whole picture and not among `regions` (ViLBERT, VL-BERT).
        text_to_image: per layer [H, T, R]. Of cross-modal layers (ViLBERT, LXMERT) rows sum to 1 over the regions; in a
            single stream they are the share of attention that goes to regions.
        image_to_text: per layer [H, R, T], likewise.
    """

    tokens: tuple[str, ...]
    regions: Regions
    global_region: bool
    text_to_image: tuple[Tensor, ...]
    image_to_text: tuple[Tensor, ...]

    def draw(self, image, **options):
        """The picture of `vlmfast.viz.attention` over a Pillow image; `options` are passed on."""
        from ..viz import attention

        boxes = self.regions.scaled(image.width, image.height).boxes
        options = {"region_names": self.regions.names, **options}
        return attention(self, self.tokens, image, boxes, global_region=self.global_region, **options)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients; a model in training goes back to it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class PairTask:
    """A model asked about texts with pictures. Base of the tasks.

    Give region features (see `as_regions`), for Pixel-BERT pictures (see `as_picture`).

    Args:
        model: one of the BERT-like models; `with_head` gives it a head that it lacks.
        head: which of its heads answers, where there are several; None takes the first of the task's.
        tokenizer: a `WordPieceTokenizer`; None takes `model.tokenizer`.
        preprocess: of Pixel-BERT's pictures; None takes `model.preprocess`, or the third-party code's.
        task_id: number of the task token of a multi-task ViLBERT; None takes the task's own of the public checkpoint.
        batch_size: examples computed at a time.
        max_tokens: most tokens of a text; None takes what tokenizer and model can do.
        max_regions: most regions of a picture, the whole picture included; None takes all.

    Attributes:
        task_head: the `TaskHead` of the head.

    Raises:
        TypeError: another model. ValueError: no tokenizer, one with more tokens than the model, or no such head.
    """

    task = ""  # key of TASK_HEADS

    def __init__(self, model, *, head: str | None = None, tokenizer=None, preprocess=None, task_id: int | None = None,
                 batch_size: int = 64, max_tokens: int | None = None, max_regions: int | None = None):
        self.name = type(self).__name__
        self.kind = kind_of(model, self.name)
        self.takes, self.config = MODELS[self.kind], trunk_of(model).config
        if batch_size < 1:
            raise ValueError(f"{self.name}: batch_size is {batch_size}, must be at least 1")
        self.model, self.batch_size, self.max_regions = model, batch_size, max_regions
        self.tokenizer = tokenizer or model.tokenizer
        if self.tokenizer is None:
            raise ValueError(f"{self.name}: tokenizer is None and the model carries none, give one")
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(f"{self.name}: tokenizer has {self.tokenizer.vocab_size} tokens, the model only "
                             f"{self.config.vocab_size}")
        if getattr(self.config, "in_batch_pairs", False):
            raise ValueError(f"{self.name}: model.config.in_batch_pairs is True, must be False: it would pair every "
                             "text of a batch with every picture")
        self.task_head = task_head_for(model, self.task, self.name, head)
        self.head = self.task_head.head
        self.preprocess = None
        if self.pixels:
            self.preprocess = preprocess or getattr(model, "preprocess", None) or pixel_preprocess(self.config)
        self.slots = getattr(self.config, "len_vis_input", 0)
        most = min(self._positions(), getattr(self.tokenizer, "max_length", self._positions()))
        self.max_tokens = most if max_tokens is None else min(max_tokens, most)
        self.task_id = TASK_IDS.get(self.task, 0) if task_id is None else task_id

    @property
    def pixels(self) -> bool:
        """Whether the model takes pictures and not regions."""
        return self.takes.feature_dim is None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _positions(self, regions: int = 0) -> int:
        """Text positions of the model beside so many regions."""
        config, taken = self.config, 0
        if self.kind == "ViLBERT":
            taken = 2 if config.model == "roberta" else 0
        elif self.kind == "VLBERT":
            taken = config.first_position + 2  # objects and END come after the text
        elif self.kind == "VDBERT":
            taken = self.slots + 1 if self.slots else 0
        elif self.kind == "ImageBERT":
            taken = int(config.image_sep) + (regions if config.image_position == "sequence" else 0)
        return config.max_position_embeddings - taken

    def inputs(self, texts: Sequence[str | Sequence[str]], regions: Sequence, pairs: Sequence[str] | None = None, *,
               task_id: int | None = None) -> dict[str, Tensor]:
        """The arguments of `model.forward` for B examples, on the model's device.

        Args:
            texts: B texts, or one for all pictures; a text may be a sequence of segments. pairs: as many last segments.
            regions: of B pictures, or of one for all texts; 2 B of them where two pictures share a sequence.
            task_id: instead of the task's own.

        Raises:
            ValueError: numbers of texts and pictures, or the features' width, do not fit.
        """
        counts = len(texts), len(regions) // self._per_text
        if 0 in counts or (1 not in counts and counts[0] != counts[1]):
            raise ValueError(f"{self.name}: {counts[0]} texts and regions of {len(regions)} pictures; must be as many, "
                             "or one of either")
        many = max(counts)
        if pairs is not None:
            texts = [((text,) if isinstance(text, str) else tuple(text)) + (pair,)
                     for text, pair in zip(list(texts) * (len(pairs) if len(texts) == 1 else 1), pairs, strict=True)]
        try:
            image = self._image(regions, many)
            most = min(self.max_tokens, self._positions(image["image_feat"].shape[1] if "image_feat" in image else 0))
            text = lay_out(self.tokenizer, texts, self.task_head, self.takes.segments, most,
                           cut_front=self.takes.cut_front, slots=self.slots)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if self.slots:  # the sequence holds text and picture
            text = {name: value.expand(many, *value.shape[1:]) for name, value in text.items()}
        if self.task_head.text == "phrase":
            text["phrase_positions"] = (text["text_lengths"] - 2)[:, None].expand(many, -1)
        if getattr(self.config, "task_specific_tokens", False):
            text["task_ids"] = torch.full((len(texts),), self.task_id if task_id is None else task_id)
        return {name: value.to(self.device) for name, value in {**text, **image}.items()}

    @property
    def _per_text(self) -> int:
        return 2 if self.task_head.pictures == "joint" else 1

    def _image(self, pictures: Sequence, many: int) -> dict[str, Tensor]:
        if self.pixels:
            return pixel_batch(pictures, self.preprocess, many)
        found = region_batch(pictures, self.takes, getattr(self.config, self.takes.feature_dim), self.task_head,
                             most=self.max_regions, slots=self.slots)
        return {name: value.expand(many, *value.shape[1:]) for name, value in found.items()}

    def run(self, texts: Sequence, regions: Sequence, pairs: Sequence[str] | None = None, *, together: int = 1,
            task_id: int | None = None, attention: bool = False) -> Iterator[tuple[dict, object]]:
        """(inputs, output) of the model, `batch_size` examples at a time in evaluation mode.

        Args:
            texts, regions, pairs: see :meth:`inputs`.
            together: consecutive pictures that must not be parted.
            attention: with attention maps.
        """
        per, step = self._per_text, max(self.batch_size // together, 1) * together
        for start in range(0, max(len(texts) * per, len(regions)), step):
            rows = slice(start, start + step), slice(start // per, (start + step) // per)
            parts = [part if part is None or len(part) == 1 else part[rows[i]]
                     for part, i in ((texts, 1), (regions, 0), (pairs, 1))]
            with evaluating(self.model):
                arguments = self.inputs(*parts, task_id=task_id)
                yield arguments, self.model(**arguments, heads=(self.head,), output_attentions=attention)

    def logits(self, texts: Sequence, regions: Sequence, pairs: Sequence[str] | None = None, **options) -> Tensor:
        """Scores of all examples, [B, ...] float32 on the CPU; see :meth:`run`."""
        outputs = self.run(texts, regions, pairs, **options)
        return torch.cat([output.logits[self.head].float().cpu() for _, output in outputs])

    def fit(self, logits: Tensor) -> Tensor:
        """[B, 1] or [B, 2] scores of a pair -> [B], how well it fits."""
        if self.task_head.reads == "logits":
            return logits[:, 0]
        if self.task_head.reads == "class":
            return logits[:, self.task_head.match]
        return logits[:, self.task_head.match] - logits[:, 1 - self.task_head.match]

    def attention_of(self, arguments: dict[str, Tensor], output, row: int, picture) -> PairAttention:
        """The maps of one example of a batch that :meth:`run` gave with `attention`."""
        text = row if len(arguments["input_ids"]) > 1 else 0
        length = int(arguments["text_lengths"][text])
        tokens = self.tokenizer.tokens(arguments["input_ids"][text, :length])
        if "task_ids" in arguments:
            tokens.insert(1, TASK_TOKEN)
        words = torch.arange(len(tokens))
        if self.slots:  # image slots are regions, not words
            words = words[(words == 0) | (words > self.slots)]
            tokens = [tokens[i] for i in words.tolist()]
        if self.pixels:
            grid, given = output.grid.shape[1:3], isinstance(picture.pixels, Tensor)
            count = grid[0] * grid[1]
            regions = cell_regions(picture, output.image_hidden[row].float().cpu(), grid,
                                   None if given else self.preprocess)
        else:
            count = int(arguments["num_regions"][row])
            regions = picture.first(count - self.takes.global_region)
        words = words.to(self.device)
        return PairAttention(
            tuple(tokens), regions, self.takes.global_region,
            tuple(layer[row][:, words, :count].float().cpu() for layer in output.text_to_image),
            tuple(layer[row][:, :count, words].float().cpu() for layer in output.image_to_text),
        )  # fmt: skip

    def picture(self, picture, name: str = "regions") -> Regions | Picture:
        """One picture as the model takes it; see `as_regions` and `as_picture`."""
        return (as_picture if self.pixels else as_regions)(picture, name)

    def examples(self, texts: str | Sequence[str], regions) -> tuple[list[str], list, bool]:
        """(texts, pictures, whether there is one example and not a list) from the arguments of a task."""
        one = isinstance(texts, str) and is_one_picture(regions)
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{self.name}: text {i} is {text!r}, must be a sentence")
        if is_one_picture(regions):
            return texts, [self.picture(regions)], one
        return texts, [self.picture(part, f"regions[{i}]") for i, part in enumerate(regions)], one
