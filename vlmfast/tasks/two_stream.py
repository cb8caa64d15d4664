"""What the tasks of ViLBERT and LXMERT share: texts and regions to model inputs, in batches.

The only place that knows how each model takes its regions and tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.region_batches import collate_regions
from ..data.regions import RegionFeatures, Regions, make_regions
from ..models.lxmert import LXMERT
from ..models.vilbert import ViLBERT

# numbers of the task tokens of the public multi-task ViLBERT (12-in-1, arXiv:1912.02315)
TASK_IDS = {"vqa": 1, "vcr_answer": 5, "vcr_rationale": 6, "retrieval": 7, "grounding": 9, "nlvr2": 12,
            "entailment": 13, "gqa": 15}
TASK_TOKEN = "[TASK]"


@dataclass(frozen=True)
class PairAttention:
    """Attention between the words and the regions of one example; `vlmfast.viz.attention` takes it as `probs`.

    Attributes:
        tokens: T token texts, special ones included.
        regions: the picture's regions, those the model saw.
        global_region: region 0 of the maps is the whole picture and not among `regions` (ViLBERT).
        text_to_image: per cross-modal layer [H, T, R], rows sum to 1 over the regions.
        image_to_text: per cross-modal layer [H, R, T].
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


def as_regions(regions, name: str = "regions") -> Regions:
    """The regions of one picture.

    Args:
        regions: a `Regions`; an opened `RegionFeatures` that holds one picture; or a mapping with `features` [R, D] and
            `boxes` [R, 4] under any of the public names, in pixels beside `width` and `height`, else as fractions of
            the picture.
        name: of the argument, for errors.

    Raises:
        TypeError: something else. ValueError: several pictures, or arrays that do not fit.
    """
    if isinstance(regions, Regions):
        return regions
    if isinstance(regions, RegionFeatures):
        if len(regions) != 1:
            raise ValueError(f"{name}: holds {len(regions)} pictures, must be those of one; index it by image id")
        return regions[regions.ids[0]]
    if not isinstance(regions, Mapping):
        raise TypeError(f"{name}: is {type(regions).__name__}, must be Regions, an opened RegionFeatures or a mapping "
                        "with features and boxes")
    record = {key: value.detach().cpu().numpy() if isinstance(value, Tensor) else value
              for key, value in regions.items()}
    if "boxes" in record and not any(key.endswith(("width", "_w")) for key in record):
        if torch.as_tensor(record["boxes"]).max() > 1:
            raise ValueError(f"{name}: boxes reach {float(torch.as_tensor(record['boxes']).max()):g} and there is no "
                             "width and height; must be fractions of the picture, or pixels beside its size")
        record |= {"width": 1, "height": 1}
    try:
        return make_regions(str(record.get("image_id", "picture")), record)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def is_one_picture(regions) -> bool:
    """Whether an argument is the regions of one picture and not a list of those."""
    return isinstance(regions, (Regions, RegionFeatures, Mapping)) or not isinstance(regions, Sequence)


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
    """A two-stream model asked about texts with pictures. Base of the tasks; give it region features, not pictures.

    Args:
        model: a ViLBERT or LXMERT.
        tokenizer: texts to `BertTokens`; None takes `model.tokenizer`.
        task_id: number of the task token of a multi-task ViLBERT; None takes the task's own of the public checkpoint.
        batch_size: examples computed at a time.
        max_tokens: most tokens of a text; None takes what tokenizer and model can do.
        max_regions: most regions of a picture, ViLBERT's global one included; None takes all.

    Raises:
        TypeError: another model. ValueError: no tokenizer, one with more tokens than the model, or no such head.
    """

    task = ""  # key of TASK_IDS

    def __init__(self, model: ViLBERT | LXMERT, *, tokenizer=None, task_id: int | None = None, batch_size: int = 64,
                 max_tokens: int | None = None, max_regions: int | None = None):
        self.name = type(self).__name__
        if not isinstance(model, ViLBERT | LXMERT):
            raise TypeError(f"{self.name}: model is {type(model).__name__}, must be a ViLBERT or LXMERT")
        if batch_size < 1:
            raise ValueError(f"{self.name}: batch_size is {batch_size}, must be at least 1")
        self.model, self.batch_size, self.max_regions = model, batch_size, max_regions
        self.tokenizer = tokenizer or model.tokenizer
        if self.tokenizer is None:
            raise ValueError(f"{self.name}: tokenizer is None and the model carries none, give one")
        if self.tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{self.name}: tokenizer has {self.tokenizer.vocab_size} tokens, the model only "
                             f"{model.config.vocab_size}")
        self.vilbert = isinstance(model, ViLBERT)
        if self.vilbert and model.config.in_batch_pairs:
            raise ValueError(f"{self.name}: model.config.in_batch_pairs is True, must be False: it would pair every "
                             "text of a batch with every picture")
        self.feature_dim = model.config.v_feature_size if self.vilbert else model.config.visual_feat_dim
        first = 2 if self.vilbert and model.config.model == "roberta" else 0
        positions = model.config.max_position_embeddings - first
        self.max_tokens = min(max_tokens or positions, positions, getattr(self.tokenizer, "max_length", positions))
        self.task_id = TASK_IDS.get(self.task, 0) if task_id is None else task_id

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def require_head(self, *names: str) -> str:
        """The first of these heads that the model has; ValueError names what it has otherwise."""
        available = self.model.available()
        for name in names:
            if name in available:
                return name
        raise ValueError(f"{self.name}: model has the heads {', '.join(available) or '(none)'}, must have "
                         f"{' or '.join(names)}")

    def inputs(self, texts: Sequence[str], regions: Sequence[Regions], pairs: Sequence[str] | None = None, *,
               task_id: int | None = None) -> dict[str, Tensor]:
        """The arguments of `model.forward` for B examples, on the model's device.

        Args:
            texts: B texts, or one for all pictures. pairs: as many second segments, or None.
            regions: of B pictures, or of one for all texts.
            task_id: instead of the task's own.

        Raises:
            ValueError: numbers of texts and pictures, or the features' width, do not fit.
        """
        counts = len(texts), len(regions)
        if 0 in counts or (1 not in counts and counts[0] != counts[1]):
            raise ValueError(f"{self.name}: {counts[0]} texts and regions of {counts[1]} pictures; must be as many, "
                             "or one of either")
        for one in regions:
            if one.features.shape[1] != self.feature_dim:
                raise ValueError(f"{self.name}: regions of picture {one.image_id} have {one.features.shape[1]} values, "
                                 f"the model takes {self.feature_dim}")
        tokens = self.tokenizer(list(texts), None if pairs is None else list(pairs), max_length=self.max_tokens)
        batch = collate_regions(regions, "vilbert" if self.vilbert else "lxmert", max_regions=self.max_regions)
        many = max(counts)  # one text is passed on as one, the model repeats its states where it must
        arguments = {
            "input_ids": tokens.input_ids,
            "token_type_ids": tokens.token_type_ids,
            "text_lengths": tokens.lengths,
            "image_feat": batch.features.expand(many, -1, -1),
            "image_loc": batch.boxes.expand(many, -1, -1),
            "num_regions": batch.lengths.expand(many),
        }
        if self.vilbert and self.model.config.task_specific_tokens:
            arguments["task_ids"] = torch.full((len(texts),), self.task_id if task_id is None else task_id)
        return {name: value.to(self.device) for name, value in arguments.items()}

    def run(self, texts: Sequence[str], regions: Sequence[Regions], pairs: Sequence[str] | None = None, *, head: str,
            together: int = 1, task_id: int | None = None, attention: bool = False) -> Iterator[tuple[dict, object]]:
        """(inputs, output) of the model, `batch_size` examples at a time in evaluation mode.

        Args:
            texts, regions, pairs: see :meth:`inputs`.
            head: which scores to compute.
            together: consecutive examples that must not be parted.
            attention: with attention maps.
        """
        step = max(self.batch_size // together, 1) * together
        for start in range(0, max(len(texts), len(regions)), step):
            rows = slice(start, start + step)
            parts = [part if part is None or len(part) == 1 else part[rows] for part in (texts, regions, pairs)]
            with evaluating(self.model):
                arguments = self.inputs(*parts, task_id=task_id)
                yield arguments, self.model(**arguments, heads=(head,), output_attentions=attention)

    def logits(self, texts: Sequence[str], regions: Sequence[Regions], pairs: Sequence[str] | None = None, *,
               head: str, **options) -> Tensor:
        """Scores of all examples, [B, ...] float32 on the CPU; see :meth:`run`."""
        outputs = self.run(texts, regions, pairs, head=head, **options)
        return torch.cat([output.logits[head].float().cpu() for _, output in outputs])

    def attention_of(self, arguments: dict[str, Tensor], output, row: int, regions: Regions) -> PairAttention:
        """The maps of one example of a batch that :meth:`run` gave with `attention`."""
        text = row if len(arguments["input_ids"]) > 1 else 0
        length, count = int(arguments["text_lengths"][text]), int(arguments["num_regions"][row])
        tokens = self.tokenizer.tokens(arguments["input_ids"][text, :length])
        if "task_ids" in arguments:
            tokens.insert(1, TASK_TOKEN)
        keep = len(tokens), count
        return PairAttention(
            tuple(tokens),
            regions.first(count - self.vilbert),
            self.vilbert,
            tuple(layer[row, :, : keep[0], : keep[1]].float().cpu() for layer in output.text_to_image),
            tuple(layer[row, :, : keep[1], : keep[0]].float().cpu() for layer in output.image_to_text),
        )

    def examples(self, texts: str | Sequence[str], regions) -> tuple[list[str], list[Regions], bool]:
        """(texts, regions, whether there is one example and not a list) from the arguments of a task."""
        one = isinstance(texts, str) and is_one_picture(regions)
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{self.name}: text {i} is {text!r}, must be a sentence")
        if is_one_picture(regions):
            return texts, [as_regions(regions)], one
        return texts, [as_regions(part, f"regions[{i}]") for i, part in enumerate(regions)], one
