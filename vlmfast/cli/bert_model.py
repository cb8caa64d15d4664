"""Vocabulary and model of `vlmfast train uniter` and its relatives: sizes, heads, what a run starts from."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import load, load_bert_text
from ..checkpoints.bert import bert_settings
from ..checkpoints.files import read_json
from ..data import WordPieceTokenizer
from ..data.region_text import DetectorFacts
from ..data.region_text_batches import LAYOUTS
from ..models import create, list_models


@dataclass(frozen=True)
class Fields:
    """Names of a model's config fields: width of region features, numbers of object classes and attributes.

    `background`: class 0 of its region head is the background, so that the detector's class k is its k + 1.
    """

    features: str
    classes: str | None = None
    attributes: str | None = None
    background: bool = True


FIELDS = {
    "vilbert": Fields("v_feature_size", "v_target_size"),
    "lxmert": Fields("visual_feat_dim", "num_object_labels", "num_attr_labels", background=False),
    "visualbert": Fields("visual_embedding_dim"),
    "uniter": Fields("img_dim", "img_label_dim"),
    "vlbert": Fields("image_feat_dim", "visual_region_classes"),
    "imagebert": Fields("visual_feat_dim", "num_object_labels", background=False),
    "vdbert": Fields("vis_feat_dim"),
}
# of each model's paper, as far as plain region features allow
OBJECTIVES = {
    "vilbert": ("mlm", "itm"), "lxmert": ("mlm", "itm", "mrfr"), "visualbert": ("mlm", "itm"),
    "uniter": ("mlm", "itm", "wra", "mrfr"), "vlbert": ("mlm",), "imagebert": ("mlm", "itm", "mrfr"),
    "vdbert": ("mlm", "itm"),
}
_STEM = {"tiny": dict(hidden_size=64, num_attention_heads=2, intermediate_size=128, max_position_embeddings=128),
         "small": dict(hidden_size=256, num_attention_heads=4, intermediate_size=1024, max_position_embeddings=128)}
_LAYERS = {"tiny": 2, "small": 4}
SIZES = ("tiny", "small", "base", "large")


def sizes(model: str, size: str) -> dict:
    """Config fields of a small model; none for the published sizes."""
    if size not in _STEM:
        return {}
    stem, layers = dict(_STEM[size]), _LAYERS[size]
    width, heads = stem["hidden_size"], stem["num_attention_heads"]
    if model == "lxmert":
        return stem | dict(l_layers=layers, r_layers=layers // 2, x_layers=layers // 2)
    stem["num_hidden_layers"] = layers
    if model == "vilbert":
        across = layers // 2
        stem |= dict(v_hidden_size=width, v_num_attention_heads=heads, v_intermediate_size=2 * width,
                     v_num_hidden_layers=across, bi_hidden_size=width, bi_num_attention_heads=heads,
                     t_biattention_id=tuple(range(layers - across, layers)), v_biattention_id=tuple(range(across)))
    return stem


def read_overrides(values: list[str]) -> dict:
    """Config fields from "name=value" (JSON, else a text) and .json files.

    Raises:
        FileNotFoundError, ValueError: neither.
    """
    found: dict = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            content = read_json(Path(text)) if Path(text).is_file() else None
            if not isinstance(content, dict):
                raise ValueError(f"--config: {text!r} must be name=value or a JSON file with an object")
            found |= content
            continue
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def from_data(model: str, facts: DetectorFacts, feature_dim: int, objectives: tuple[str, ...]) -> dict:
    """Config fields that follow from the region features, for a new model."""
    names = FIELDS[model]
    found = {names.features: feature_dim}
    count = facts.probabilities or (facts.classes + names.background if facts.classes else 0)
    if names.classes and count and facts.complete:
        found[names.classes] = count
    if names.attributes and facts.attributes and facts.complete:
        found[names.attributes] = facts.attributes
    features, labels = ([x for x in objectives if x in group] for group in (("mrfr", "mrm_nce"), ("mrc", "mrc_kl")))
    if model == "vilbert" and features and labels:
        raise ValueError(f"vilbert has one head for regions, of features or of classes: {features[0]} and {labels[0]} "
                         "do not go together")
    if model == "vilbert" and features:
        found |= dict(visual_target=2 if "mrm_nce" in objectives else 1, v_target_size=feature_dim)
    if model == "vdbert":
        found["len_vis_input"] = min(max(facts.regions, 1), 100)
    return found


def pretraining_heads(model: str) -> dict:
    """Config fields of a model with all of its pretraining heads."""
    if model == "vlbert":
        return dict(with_pooler=True, heads=("pretraining",))
    if model == "lxmert":
        return dict(heads="pretraining", task_qa=False)
    return dict(heads=("mlm", "nsp") if model == "vdbert" else ("pretraining",))


def is_bert(path: Path) -> bool:
    """Whether a folder holds a plain BERT in Hugging Face's layout."""
    file = path / "config.json"
    return path.is_dir() and file.is_file() and read_json(file).get("model_type") == "bert"


def make_tokenizer(settings, texts: list[str], resumed: Path | None) -> WordPieceTokenizer:
    """The run's own vocabulary on --resume, else --vocab, that of --init, or one learned from the texts.

    Raises:
        FileNotFoundError: no such file. ValueError: --vocab-size is too small, or a checkpoint has no vocabulary.
    """
    if resumed is not None:
        return WordPieceTokenizer.from_file(resumed)
    if settings.vocab:
        return WordPieceTokenizer.from_file(settings.vocab)
    if settings.init:
        folder = Path(settings.init)
        folder = folder if folder.is_dir() else folder.parent
        try:
            return WordPieceTokenizer.from_file(folder)
        except FileNotFoundError as error:
            raise ValueError(f"--init: {settings.init} has no vocabulary beside it; give --vocab") from error
    return WordPieceTokenizer.train(texts, settings.vocab_size)


def make_model(settings, tokenizer: WordPieceTokenizer, facts: DetectorFacts, feature_dim: int, heads: dict,
               objectives: tuple[str, ...] = (), resumed: Path | None = None) -> tuple[nn.Module, str]:
    """(the model with its tokenizer, what it started from).

    Args:
        settings: `model`, `size`, `init`, `config`.
        facts, feature_dim: of the region features.
        heads: config fields of the heads that are needed; others are left away, needed ones that a checkpoint lacks
            are new.
        resumed: run folder to go on with, which is enough where --init has gone since.

    Raises:
        ValueError: unknown size or field, a checkpoint of another model or of other features.
    """
    name, overrides = settings.model, read_overrides(settings.config)
    wanted = {**from_data(name, facts, feature_dim, objectives), **heads}
    if settings.init and resumed is not None:
        model, started = load(resumed, dtype=torch.float32), f"{resumed}"
    elif settings.init and not is_bert(Path(settings.init)):
        model, started = _from_checkpoint(settings, tokenizer, feature_dim, {**heads, **overrides})
    else:
        base = f"{name}-{settings.size}" if settings.size == "large" else f"{name}-base"
        if base not in list_models():
            raise ValueError(f"--size: there is no {base}, must be one of tiny, small, base")
        wanted |= {"vocab_size": tokenizer.vocab_size}
        if name == "imagebert":
            wanted["sep_token_id"] = tokenizer.sep
        if name == "vdbert":
            wanted["mask_word_id"] = tokenizer.mask
        if settings.init:
            known = create(base, device="meta").config.to_dict()
            own = {key: value for key, value in bert_settings(settings.init).items() if key in known}
            own["vocab_size"] = max(own.get("vocab_size", 0), tokenizer.vocab_size)
            model = create(base, **{**wanted, **own, **overrides})
            report = load_bert_text(model, settings.init)
            started = f"{len(report.used)} tensors of the BERT in {settings.init}"
        else:
            model, started = create(base, **{**sizes(name, settings.size), **wanted, **overrides}), "random weights"
    head = FIELDS[name].classes
    count = facts.classes + FIELDS[name].background
    if head and {"mrc", "mrc_kl"} & set(objectives) and count > getattr(model.config, head):
        raise ValueError(f"the detector has classes up to {facts.classes - 1}, the model's {head} is "
                         f"{getattr(model.config, head)}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}")
    model.tokenizer = tokenizer
    return model.train(), started


def _from_checkpoint(settings, tokenizer, feature_dim: int, changes: dict) -> tuple[nn.Module, str]:
    path = Path(settings.init)
    if not path.exists():
        raise FileNotFoundError(f"--init: {path} does not exist")
    model = load(path, dtype=torch.float32)
    kind = type(model).__name__.lower()
    if kind != settings.model:
        raise ValueError(f"--init: {path} is a {type(model).__name__}, must be a {settings.model} or a BERT folder")
    field = FIELDS[settings.model].features
    if getattr(model.config, field) != feature_dim:
        raise ValueError(f"--init: {path} reads region features of {getattr(model.config, field)} values, these have "
                         f"{feature_dim}")
    model, new = refit(model, changes)
    return model, f"{path}" + (f", {len(new)} new tensors in {', '.join(top_names(new))}" if new else "")


def refit(model: nn.Module, changes: dict) -> tuple[nn.Module, list[str]]:
    """(the model with config fields changed and every tensor kept whose name and shape stay, names of new tensors)."""
    config = model.config.to_dict()
    if all(name in config and config[name] == value for name, value in changes.items()):
        return model, []
    changed = type(model)(type(model.config).from_dict({**config, **changes}))
    old, new = model.state_dict(), changed.state_dict()
    kept = {key: value for key, value in old.items() if key in new and new[key].shape == value.shape}
    changed.load_state_dict({**new, **kept})
    changed.tokenizer = model.tokenizer
    return changed, sorted(new.keys() - kept.keys())


def top_names(keys: list[str]) -> list[str]:
    """The modules that tensors belong to."""
    return sorted({key.split(".")[0] for key in keys})


def text_room(model: nn.Module, name: str) -> int:
    """Most tokens of a text that the model's position table has room for."""
    config = model.config
    slots = getattr(config, "len_vis_input", 0)
    first = getattr(config, "first_position", 0)
    return config.max_position_embeddings - LAYOUTS[name].positions - first - (slots + 1 if slots else 0)


def limited(facts: DetectorFacts, max_regions: int | None) -> DetectorFacts:
    """The facts of pictures whose regions are cut."""
    return facts if max_regions is None else replace(facts, regions=min(facts.regions, max_regions))
