"""How the models name their pretraining scores, and one forward pass of any of them.

A model is called as `model(input_ids=, image_feat=, image_loc=, token_type_ids=, attention_mask=, image_mask=,
text_lengths=, num_regions=, heads=)`, without those that the batch lacks, and answers with `.logits` (a dict),
`.text_hidden` [B, T, C], `.image_hidden` [B, R, C']; `model.available()` lists its heads. Where its forward also takes
`image_masked` [B, R] bool, `prefix_lengths` [B] or `decoder_input_ids` [B, S], it gets them.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import PretrainingBatch


@dataclass(frozen=True)
class Heads:
    """A model's names: None where it has no such head, whatever its settings.

    Attributes:
        words: scores over the vocabulary at every token.
        generated: the same at decoder positions, or at every token of a causal text; None: `words`.
        match, match_index: two scores of the pair, and which of them says that it matches.
        region_class, region_feature, region_attribute: scores of a region's class, its feature, its attribute.
        alone: whether the model reads a text without an image, and an image without a text.
        preset: conventions of its authors, a name in `presets.PRESETS`.
    """

    words: str | None = "mlm"
    generated: str | None = "lm"
    match: str | None = "itm"
    match_index: int = 1
    region_class: str | None = "mrc"
    region_feature: str | None = "mrfr"
    region_attribute: str | None = None
    alone: bool = True
    preset: str = "uniter"


# by class name, since models lie beside this package; a class that is not here or has no base here: Heads()
HEADS: dict[str, Heads] = {
    "ViLBERT": Heads(match="nsp", match_index=0, region_class="image", region_feature="image", preset="vilbert"),
    "LXMERT": Heads(match="matched", region_class="obj", region_feature="feat", region_attribute="attr",
                    preset="lxmert"),
    "UNITER": Heads(),
    "VLBERT": Heads(match="relationship", region_class="mvrc", region_feature=None, preset="vlbert"),
    "VisualBERT": Heads(match="nsp", region_class=None, region_feature=None, preset="visualbert"),
    "VDBERT": Heads(match="nsp", region_class=None, region_feature=None, alone=False, preset="vdbert"),
    "ImageBERT": Heads(region_class="moc", preset="imagebert"),
    "PixelBERT": Heads(region_class=None, region_feature=None, preset="pixelbert"),
}
# which of a model's heads each objective reads, by field of `Heads`; contrastive reads states
OBJECTIVES: dict[str, str | None] = {
    "mlm": "words", "mlm_whole_word": "words", "nsp": "match", "mrfr": "region_feature", "mrc": "region_class",
    "mrc_kl": "region_class", "mrm_nce": "region_feature", "mrc_attributes": "region_attribute", "itm": "match",
    "wra": None, "contrastive": None, "prefix_lm": "generated", "seq2seq": "generated",
}
# objectives whose model also has to take one of these arguments
ARGUMENTS = {"prefix_lm": ("prefix_lengths",), "seq2seq": ("decoder_input_ids", "prefix_lengths")}
# models that cannot do without an image: the field with the width of their features, and that of their boxes
NEED_IMAGES = {"ViLBERT": ("v_feature_size", 5), "LXMERT": ("visual_feat_dim", 4)}

WRAPPERS = {"DistributedDataParallel": "module", "FullyShardedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def inner(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, FullyShardedDataParallel, torch.compile."""
    while type(model).__name__ in WRAPPERS:
        model = getattr(model, WRAPPERS[type(model).__name__])
    return model


def heads_of(model: nn.Module) -> Heads:
    """The model's row of `HEADS`."""
    names = (kind.__name__ for kind in type(inner(model)).__mro__)
    return next((HEADS[name] for name in names if name in HEADS), Heads())


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(inner(model).forward).parameters


def head_for(model: nn.Module, objective: str, heads: Heads) -> str | None:
    """The name in `logits` that an objective reads, or None.

    Raises:
        ValueError: unknown objective, or one that this model's heads or arguments cannot serve.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Pretraining: unknown objective {objective!r}, must be one of {', '.join(OBJECTIVES)}")
    arguments, name = ARGUMENTS.get(objective, ()), type(inner(model)).__name__
    if arguments and not any(takes(model, argument) for argument in arguments):
        raise ValueError(f"Pretraining: objective {objective!r} needs a model whose forward takes "
                         f"{' or '.join(arguments)}, {name}'s does not")
    field, available = OBJECTIVES[objective], tuple(inner(model).available())
    if field is None:
        return None
    wanted = [getattr(heads, field)] + ([heads.words] if field == "generated" else [])
    if found := [head for head in wanted if head in available]:
        return found[0]
    needs = " or ".join(repr(head) for head in wanted if head) or "a head that this architecture does not have"
    raise ValueError(f"Pretraining: objective {objective!r} needs {needs}, {name} has "
                     f"{', '.join(map(repr, available)) or 'no heads'}")


def run(model: nn.Module, batch: PretrainingBatch, heads: tuple[str, ...], image_masked: Tensor | None = None,
        **extra: Tensor):
    """The model's output on a batch, with only these heads' scores."""
    given = batch.inputs()
    if batch.image_feat is None and batch.image is None and type(inner(model)).__name__ in NEED_IMAGES:
        given |= _blank_image(inner(model), batch)
    if batch.input_ids is None:
        given["input_ids"] = None
        if not takes_none(model, "input_ids"):
            given["input_ids"] = torch.zeros(len(batch), 1, dtype=torch.int64, device=batch.device)
            given["text_lengths"] = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    if image_masked is not None and takes(model, "image_masked"):
        given["image_masked"] = image_masked
    return model(**given, **extra, heads=tuple(dict.fromkeys(heads)))


def takes_none(model: nn.Module, argument: str) -> bool:
    """Whether None is a value for this argument, by its annotation."""
    return "None" in str(inspect.signature(inner(model).forward).parameters[argument].annotation)


def _blank_image(model: nn.Module, batch: PretrainingBatch) -> dict[str, Tensor]:
    """One region that does not exist: attention to no region gives 0, so that the text stays by itself."""
    field, boxes = NEED_IMAGES[type(model).__name__]
    shape, device = (len(batch), 1), batch.device
    return {"image_feat": torch.zeros(*shape, getattr(model.config, field), device=device),
            "image_loc": torch.zeros(*shape, boxes, device=device),
            "num_regions": torch.zeros(len(batch), dtype=torch.int64, device=device)}


def region_keep(batch: PretrainingBatch, image_hidden: Tensor) -> Tensor:
    """[B, R] bool, which rows of the image's states exist; all of them where the model made them from pixels."""
    if batch.image_feat is None or batch.image_feat.ndim != 3:
        return torch.ones(image_hidden.shape[:2], dtype=torch.bool, device=image_hidden.device)
    return batch.image_keep


def text_vectors(model: nn.Module, batch: PretrainingBatch) -> Tensor:
    """[B, D] normalised, of the texts alone: the pooled text, or the state of the first token."""
    output = run(model, batch.text_alone(), ())
    pooled = getattr(output, "pooled_text", None)
    return F.normalize(output.text_hidden[:, 0] if pooled is None else pooled, dim=-1)


def image_vectors(model: nn.Module, batch: PretrainingBatch) -> Tensor:
    """[B, D] normalised, of the images alone: the pooled image, or the mean state of the regions."""
    alone = batch.image_alone()
    output = run(model, alone, ())
    pooled = getattr(output, "pooled_image", None)
    if pooled is None:
        keep = region_keep(alone, output.image_hidden)[..., None]
        pooled = output.image_hidden.masked_fill(~keep, 0).sum(1) / keep.sum(1).clamp(min=1)
    return F.normalize(pooled, dim=-1)
