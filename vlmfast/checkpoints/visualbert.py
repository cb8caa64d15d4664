"""VisualBERT: the authors' `.th` files, MMF's, and Hugging Face folders.

Our keys are the authors' without the outer `bert.` of their training code. Head counts are not stored in their files;
they are 64 channels a head, as in all public models.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.visualbert import HEADS, VisualBERT, VisualBERTConfig
from .bert_like import bert_sizes, find_prefix, plain_state, read_state, stored_fields, write_config
from .files import read_json
from .huggingface import CONFIG_NAME, WEIGHT_NAMES
from .state import build_filled, check_tied, require_heads, shape_reader

MODEL_TYPE = "visual_bert"
TABLE = "embeddings.word_embeddings.weight"
# where the trunk lies: the authors' training code, Hugging Face, MMF, bare models, the trunk alone
PREFIXES = ("bert.bert.", "visual_bert.", "model.bert.", "bert.", "")
# copies checked to be copies; buffers; VCR's detector; parts of the grounding scorer that nothing reads
DROPPED = re.compile(r"(.*\.)?cls\.predictions\.decoder\.(weight|bias)|(.*\.)?embeddings\.position_ids|detector\..*"
                     r"|(.*\.)?(flickr_attention|attention)\.value\.(weight|bias)")
_HF_TABLES = {"token_type_embeddings_visual": "visual_token_type_embeddings",
              "position_embeddings_visual": "visual_position_embeddings", "projection": "visual_projection"}
_ARCHITECTURES = {(): "VisualBertModel", ("pretraining",): "VisualBertForPreTraining",
                  ("vqa",): "VisualBertForQuestionAnswering", ("nlvr2",): "VisualBertForVisualReasoning",
                  ("vcr",): "VisualBertForMultipleChoice",
                  ("pretraining", "flickr"): "VisualBertForRegionToPhraseAlignment"}
_LINEAR = ("vqa", "nlvr2", "vcr")  # heads that are one Linear, under the same name in every public layout


class Layout:
    """Where a file keeps what: called with one of our keys it gives the file's.

    Args:
        heads: what a config file says of the one head that has the same name in every task model.
    """

    def __init__(self, state: dict[str, Tensor], heads: tuple[str, ...], path: Path):
        self.trunk = find_prefix(state, PREFIXES, TABLE, "a VisualBERT", path)
        self.huggingface = f"{self.trunk}embeddings.visual_projection.weight" in state
        self.outer = "" if self.huggingface else self.trunk.removesuffix("bert.")
        self.flickr = "attention." if self.huggingface else f"{self.outer}flickr_attention."
        self.linear = "cls." if self.huggingface else f"{self.outer}classifier."
        self.task = None
        if f"{self.linear}weight" in state:
            told = [name for name in heads if name in _LINEAR]
            labels = len(state[f"{self.linear}weight"])
            self.task = told[0] if len(told) == 1 else {1: "vcr", 2: "nlvr2"}.get(labels, "vqa")

    def __call__(self, key: str) -> str:
        part, _, rest = key.partition(".")
        if part == "bert":
            return self.trunk + (hf_name(rest) if self.huggingface else rest)
        if part == "flickr_attention":
            return self.flickr + rest
        return (self.linear + rest) if part == f"{self.task}_classifier" else self.outer + key


def hf_name(key: str) -> str:
    """A trunk key in transformers' names."""
    match = re.fullmatch(r"embeddings\.(\w+)\.(\w+)", key)
    return f"embeddings.{_HF_TABLES.get(match[1], match[1])}.{match[2]}" if match else key


def load(path: Path, *, config=None, strict: bool, device, dtype) -> VisualBERT:
    """See `vlmfast.checkpoints.load`."""
    state = read_state(path)
    stored = stored_fields(config, VisualBERTConfig, MODEL_TYPE, path, None)
    layout = Layout(state, tuple(stored.get("heads") or _architecture_heads(path)), path)
    words = f"{layout.outer}cls.predictions."
    check_tied(state, f"{words}decoder.weight", layout.trunk + TABLE, path)
    check_tied(state, f"{words}decoder.bias", f"{words}bias", path)
    values = {**infer_config(state, layout, path), **stored, **_heads(state, layout, path)}
    require_heads(values, path)
    settings = VisualBERTConfig.from_dict(values)
    return build_filled(partial(VisualBERT, settings), settings.num_hidden_layers, state, layout, DROPPED.fullmatch,
                        path, strict=strict, device=device, dtype=dtype)


def _architecture_heads(path: Path) -> tuple[str, ...]:
    """The heads of the class that wrote a Hugging Face folder."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    written = read_json(file).get("architectures") if file.is_file() else None
    return next((heads for heads, name in _ARCHITECTURES.items() if written == [name]), ())


def infer_config(state: dict[str, Tensor], layout: Layout, path: Path) -> dict:
    """Config fields from tensor shapes."""
    shape = shape_reader(state, path, "VisualBERT")
    return {
        **bert_sizes(shape, state, f"{layout.trunk}embeddings.", layout.trunk),
        "visual_embedding_dim": shape(layout("bert.embeddings.projection.weight"), 2)[1],
    }


def _heads(state: dict[str, Tensor], layout: Layout, path: Path) -> dict:
    """Config fields that the tensors decide, whatever a config file says: heads, their sizes, optional modules."""
    shape = shape_reader(state, path, "VisualBERT")
    first = {"pretraining": "cls.predictions.bias", "flickr": "flickr_attention.query.bias",
             "classifier": "classifier.1.bias", **{name: f"{name}_classifier.bias" for name in _LINEAR}}
    heads = tuple(name for name in HEADS if layout(first[name]) in state)
    values = {"heads": heads, "bypass_transformer": f"{layout.trunk}additional_layer.output.dense.bias" in state}
    for name in ("vqa", "nlvr2"):
        if name in heads:
            values[f"{name}_labels"] = shape(layout(f"{name}_classifier.weight"), 2)[0]
    if "classifier" in heads:
        values["classifier_labels"], width = shape(layout("classifier.1.weight"), 2)
        values["classifier_images"] = max(width // max(shape(layout.trunk + TABLE, 2)[1], 1), 1)
    return values


def save(model: VisualBERT, folder: Path) -> None:
    """config.json and model.safetensors as transformers writes and reads them.

    Heads that transformers does not have, or not in one model, are written under our own names.
    """
    from safetensors.torch import save_file

    heads = tuple(name for name in HEADS if name in model.config.heads)
    public = _ARCHITECTURES.get(heads)
    state = {}
    for key, value in plain_state(model).items():
        part, _, rest = key.partition(".")
        if part == "bert":
            key = ("visual_bert." if heads else "") + hf_name(rest)
        elif part == "flickr_attention":
            key = f"attention.{rest}"
        elif public and part.endswith("_classifier"):
            key = f"cls.{rest}"
        state[key] = value
    if "flickr" in heads:  # transformers builds it and never reads it
        state |= {f"attention.value.{kind}": torch.zeros_like(state[f"attention.query.{kind}"])
                  for kind in ("weight", "bias")}
    save_file(state, folder / WEIGHT_NAMES[0], metadata={"format": "pt"})
    labels = {"vqa": model.config.vqa_labels, "nlvr2": model.config.nlvr2_labels}.get(heads[0] if heads else "")
    write_config(folder, model_type=MODEL_TYPE, architectures=[public or "VisualBERT"],
                 torch_dtype=str(model.dtype).removeprefix("torch."), **model.config.to_dict(), pad_token_id=0,
                 **({} if labels is None else {"num_labels": labels}))
