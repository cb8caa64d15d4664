"""Start the text stream of any BERT-like model from a BERT checkpoint (a Hugging Face folder)."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .bert_like import find_prefix, read_state
from .files import read_json
from .huggingface import CONFIG_NAME
from .state import check_shapes

TABLE = "embeddings.word_embeddings.weight"
# not LayerNorm's epsilon: VD-BERT runs a BERT of 1e-12 with 1e-5, as its public weights were trained
_SETTINGS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
             "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings")
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_WORDS = ("transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight", "transform.LayerNorm.bias",
          "bias")


@dataclass(frozen=True)
class BertReport:
    """What `load_bert_text` did.

    Attributes:
        used: our key -> the BERT key whose values it got.
        rows: of tables that are larger or smaller than BERT's: our key -> how many rows were copied.
        unused: BERT keys without a place in the model.
        untouched: our keys that kept their values.
    """

    used: dict[str, str]
    rows: dict[str, int]
    unused: tuple[str, ...]
    untouched: tuple[str, ...]


def bert_settings(folder: str | Path) -> dict:
    """The config fields that a BERT and our models have in common, from a folder's config.json.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: another kind of model, or one with relative positions.
    """
    file = Path(folder) / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_NAME}, must be a Hugging Face folder of a BERT")
    content = read_json(file)
    for name, must in (("model_type", "bert"), ("position_embedding_type", "absolute")):
        if content.get(name, must) != must:
            raise ValueError(f"{file}: {name} is {content[name]!r}, must be {must!r}")
    return {name: content[name] for name in _SETTINGS if name in content}


def from_bert(name: str, folder: str | Path, **overrides) -> tuple[nn.Module, BertReport]:
    """A new model of the BERT's sizes whose text stream has its weights: `from_bert("visualbert-base", folder)`.

    Args:
        name: as for `vlmfast.create`.
        folder: Hugging Face folder of a BERT, with or without its pretraining heads.
        overrides: config fields, as for `vlmfast.create`.
    """
    from ..models import create

    known = create(name, device="meta").config.to_dict()
    settings = {key: value for key, value in bert_settings(folder).items() if key in known}
    model = create(name, **{**settings, **overrides})
    return model, load_bert_text(model, folder)


def load_bert_text(model: nn.Module, folder: str | Path, *, new_types: tuple[int, ...] = ()) -> BertReport:
    """Copies a BERT's embeddings, layers, pooler and masked-word head into a model's text stream, where it has them.

    A model with fewer layers takes the first ones (LXMERT's language encoder). Tables may be longer than BERT's: the
    further rows keep their values. VisualBERT's visual tables become copies of the text tables, as its config says.

    Args:
        model: any of the BERT-like models; its widths, heads and activation must be the BERT's.
        folder: Hugging Face folder of a BERT, with or without its pretraining heads.
        new_types: which row each further row of the segment table copies, (0, 0, 0, 1) for VD-BERT's six.

    Returns:
        A BertReport; nothing of the model changes if there is an error.

    Raises:
        FileNotFoundError, ValueError: no BERT there, or one that does not fit; the message names what.
    """
    folder = Path(folder)
    settings, target = bert_settings(folder), model.state_dict()
    for name in ("hidden_act", "num_attention_heads"):
        ours = getattr(model.config, name)
        if name in settings and settings[name] != ours:
            raise ValueError(f"{folder}: {name} is {settings[name]!r}, the model's is {ours!r}")
    state = read_state(folder)
    prefix = find_prefix(state, ("bert.", ""), TABLE, "a BERT", folder)
    used = text_keys(target, prefix)
    lost = sorted(name for name in used.values() if name not in state and not name.startswith("cls."))
    if lost:
        raise ValueError(f"{folder}: missing keys: {', '.join(lost)}")
    used = {key: name for key, name in used.items() if name in state}
    values, rows = _fitted(target, {key: state[name] for key, name in used.items()}, new_types)
    check_shapes(values, target, folder)
    with torch.no_grad():
        for key, value in values.items():
            target[key].copy_(value)
    if getattr(model.config, "special_visual_initialize", False):
        model.init_visual_tables()
    taken = set(used.values())
    return BertReport(used, rows, tuple(sorted(key for key in state if key not in taken)),
                      tuple(key for key in target if key not in used))


def text_keys(target: dict[str, Tensor], prefix: str) -> dict[str, str]:
    """Our key -> BERT's, of a model's text stream."""
    tables = next(key for key in target if key.endswith("word_embeddings.weight")).removesuffix(
        "word_embeddings.weight")
    trunk = tables.removesuffix("embeddings.")
    keys = {f"{tables}{name}.weight": f"{prefix}embeddings.{name}.weight" for name in _TABLES}
    for kind in ("weight", "bias"):
        norm = f"{trunk}embedding_LayerNorm.{kind}"  # VL-BERT's trunk has no level of embeddings
        norm = norm if norm in target else f"{tables}LayerNorm.{kind}"
        keys[norm] = f"{prefix}embeddings.LayerNorm.{kind}"
        if f"{trunk}pooler.dense.{kind}" in target:
            keys[f"{trunk}pooler.dense.{kind}"] = f"{prefix}pooler.dense.{kind}"
    keys |= {key: prefix + key.removeprefix(trunk) for key in target if key.startswith(f"{trunk}encoder.layer.")}
    for key in target:
        if match := re.fullmatch(r"(.*predictions\.)transform\.dense\.weight", key):
            keys |= {match[1] + name: f"cls.predictions.{name}" for name in _WORDS}
    return keys


def _fitted(target: dict[str, Tensor], values: dict[str, Tensor],
            new_types: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tables brought to the model's number of rows, and how many rows of those are BERT's."""
    fitted, rows = dict(values), {}
    for key, value in values.items():
        name, want = key.split(".")[-2], target[key]
        words = key.endswith("predictions.bias")
        if (name not in _TABLES and not words) or len(value) == len(want) or value.shape[1:] != want.shape[1:]:
            continue
        if len(value) > len(want) and (words or name != "position_embeddings"):
            continue  # a word or a segment that the model does not know: the shape check refuses it
        if name == "token_type_embeddings" and new_types:
            value = torch.cat([value, value[list(new_types)]])
        rows[key] = min(len(values[key]), len(want))
        fitted[key] = torch.cat([value[: len(want)], want[len(value) :].to(value)])
    return fitted, rows

