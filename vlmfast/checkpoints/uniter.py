"""UNITER: the authors' `.pt` state dicts, pretrained and fine-tuned, and MMF's names of the trunk.

Our keys are the authors'. Their files do not state the head count; it is 64 channels a head, as in both public models.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.uniter import HEADS, UNITER, UNITERConfig
from .bert_like import bert_sizes, find_prefix, plain_state, read_state, stored_fields, write_config
from .state import build_filled, check_tied, require_heads, shape_reader

MODEL_TYPE, WEIGHT_NAME = "uniter", "pytorch_model.bin"
TABLE, COPY = "uniter.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
PROJECTION, PROJECTION_COPY = "uniter.img_embeddings.img_linear.weight", "feat_regress.weight"
DROPPED = re.compile(rf"{re.escape(COPY)}|cls\.predictions\.decoder\.bias|{re.escape(PROJECTION_COPY)}"
                     r"|uniter\.embeddings\.position_ids")
_MMF = {"text_embeddings.": "embeddings.", "img_embeddings.final_layer_norm.": "img_embeddings.LayerNorm."}
_FIRST_KEYS = {"mlm": "cls.predictions.bias", "mrfr": "feat_regress.bias", "mrc": "region_classifier.net.0.bias",
               "itm": "itm_output.bias", "rank": "rank_output.bias", "vqa": "vqa_output.0.bias",
               "ve": "ve_output.0.bias", "vcr": "vcr_output.0.bias", "nlvr2": "nlvr2_output.bias",
               "referring": "re_output", "classifier": "classifier.1.bias"}
ENTAILMENT_LABELS = 3  # the authors' entailment model is their answer model with three answers


def load(path: Path, *, config=None, strict: bool, device, dtype) -> UNITER:
    """See `vlmfast.checkpoints.load`."""
    state = _author_names(read_state(path), path)
    check_tied(state, COPY, TABLE, path)
    check_tied(state, "cls.predictions.decoder.bias", "cls.predictions.bias", path)
    check_tied(state, PROJECTION_COPY, PROJECTION, path)
    stored = stored_fields(config, UNITERConfig, MODEL_TYPE, path, frozenset())
    if stored.get("heads") is None or "vqa" not in stored["heads"]:
        state = _entailment(state, path)
    values = {**infer_config(state, path), **stored, **_heads(state, path)}
    require_heads(values, path)
    settings = UNITERConfig.from_dict(values)
    return build_filled(partial(UNITER, settings), settings.num_hidden_layers, state, lambda key: key,
                        DROPPED.fullmatch, path, strict=strict, device=device, dtype=dtype)


def _author_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Trunk under `uniter.`, in the authors' names."""
    words = "embeddings.word_embeddings.weight"
    mmf = tuple(prefix + "text_" for prefix in ("uniter.", "model.uniter.", "model.", ""))
    prefix = find_prefix(state, ("uniter.", "", *mmf), words, "a UNITER", path).removesuffix("text_")
    named = {}
    for key, value in state.items():
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            for old, new in _MMF.items():
                key = new + key.removeprefix(old) if key.startswith(old) else key
            key = f"uniter.{key}"
        named[key] = value
    return named


def _entailment(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    last = state.get("vqa_output.3.bias")
    if last is None or len(last) != ENTAILMENT_LABELS or "ve_output.3.bias" in state:
        return state
    return {re.sub(r"^vqa_output\.", "ve_output.", key): value for key, value in state.items()}


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields from tensor shapes."""
    shape = shape_reader(state, path, "UNITER")
    return {**bert_sizes(shape, state, "uniter.embeddings.", "uniter."), "img_dim": shape(PROJECTION, 2)[1]}


def _heads(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields that the tensors decide, whatever a config file says: heads and their sizes."""
    shape = shape_reader(state, path, "UNITER")
    hidden = shape(TABLE, 2)[1]
    heads = tuple(name for name in HEADS if any(key.startswith(_FIRST_KEYS[name]) for key in state))
    values = {"heads": heads}
    for name, key, field in (("mrc", "region_classifier.net.3.weight", "img_label_dim"),
                             ("vqa", "vqa_output.3.weight", "vqa_labels"), ("ve", "ve_output.3.weight", "ve_labels"),
                             ("classifier", "classifier.1.weight", "classifier_labels")):
        if name in heads:
            values[field], width = shape(key, 2)
            if name == "classifier":
                values["classifier_images"] = max(width // hidden, 1)
    if "nlvr2" in heads:
        double = shape("nlvr2_output.weight", 2)[1] == 2 * hidden
        values["nlvr2"] = "paired-attn" if "attn1.in_proj_weight" in state else "paired" if double else "triplet"
    if "referring" in heads:
        values["mlp"] = 1 if "re_output.weight" in state else 2
    return values


def save(model: UNITER, folder: Path) -> None:
    """pytorch_model.bin under the public names, which the authors' code reads, and config.json."""
    state = plain_state(model)
    if "mlm" in model.config.heads:
        state[COPY] = state[TABLE]
    if "mrfr" in model.config.heads:
        state[PROJECTION_COPY] = state[PROJECTION]
    if "vqa" not in model.config.heads and model.config.ve_labels == ENTAILMENT_LABELS:
        state = {re.sub(r"^ve_output\.", "vqa_output.", key): value for key, value in state.items()}
    torch.save(state, folder / WEIGHT_NAME)
    write_config(folder, model_type=MODEL_TYPE, **model.config.to_dict())
