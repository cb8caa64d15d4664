"""ViLBERT files of the authors: `.bin` state dicts of the pretrained, the multi-task and the first-release models.

Our keys are theirs. Head counts are not stored anywhere and come from a config file, else from 64 channels per text
head and 128 per vision and co-attention head, as in all public models.
"""

import json
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.vilbert import ViLBERT, ViLBERTConfig
from .files import find_weights, read_json, read_tensors
from .state import build_filled, check_tied, count_layers, plain_names, require_heads, shape_reader

CONFIG_NAME, WEIGHT_NAMES = "config.json", ("pytorch_model.bin", "model.safetensors")
TABLE, COPY = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
UNUSED = "biOutput.q_dense"  # in every file, shaped like biOutput.dense, and used by nothing
DROPPED = re.compile(rf"{re.escape(COPY)}|bert\.encoder\.c_layer\.\d+\.{re.escape(UNUSED)}[12]\.(weight|bias)"
                     r"|bert\.embeddings\.position_ids")
NORMALIZED = re.compile(r"(vil_prediction\.main\.[03]\.)weight_v")
_HEAD_KEYS = {"cls": "pretraining", "vil_prediction": "vqa", "vil_prediction_gqa": "gqa",
              "vil_binary_prediction": "binary", "vil_logit": "vil", "vil_tri_prediction": "tri",
              "vision_logit": "vision", "linguisic_logit": "linguistic"}
# in the public JSON files, read by no code; the last ones describe files, not models
_UNREAD = {"pooling_method", "bi_intermediate_size", "bi_attention_type", "visualization", "num_labels", "model_type",
           "architectures", "torch_dtype", "dtype", "intra_gate", "predict_feature"}


def load(path: Path, *, config=None, strict: bool, device, dtype) -> ViLBERT:
    """See `vlmfast.checkpoints.load`."""
    weights = find_weights(path, WEIGHT_NAMES) if path.is_dir() else path
    state = plain_names(read_tensors(weights))
    if not any(key.startswith("bert.") for key in state):  # the trunk alone
        state = {f"bert.{key}": value for key, value in state.items()}
    check_tied(state, COPY, TABLE, path)
    state = _folded(state, path)
    values = {**infer_config(state, path), **_stored(config, path), **_heads(state, path)}
    require_heads(values, path)
    settings = ViLBERTConfig.from_dict(values)
    blocks = settings.num_hidden_layers + settings.v_num_hidden_layers + len(settings.v_biattention_id)
    return build_filled(partial(ViLBERT, settings), blocks, state, lambda key: key, DROPPED.fullmatch, path,
                        strict=strict, device=device, dtype=dtype)


def save(model: ViLBERT, folder: Path) -> None:
    """pytorch_model.bin with every key that the authors' code has, and config.json.

    What we do not build is written too: the copy of the word table, the first release's weight norms, and zeros for
    the unused q_dense projections. Heads that `model.config.heads` lacks are not.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    state |= {key.replace("biOutput.dense", UNUSED): torch.zeros_like(value)
              for key, value in state.items() if "biOutput.dense" in key}
    if "pretraining" in model.config.heads:
        state[COPY] = state[TABLE]
    for i in (0, 3):
        name = f"vil_prediction.main.{i}.weight"
        if name in state:
            value = state.pop(name)
            state |= {f"{name}_g": value.norm(), f"{name}_v": value}
    torch.save(state, folder / WEIGHT_NAMES[0])
    content = {"model_type": "vilbert", **model.config.to_dict()}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields from tensor shapes.

    Raises:
        ValueError: a tensor that fixes a size is missing, or a width without a known head count.
    """
    shape = shape_reader(state, path, "ViLBERT")
    vocab_size, hidden = shape(TABLE, 2)
    v_hidden, features = shape("bert.v_embeddings.image_embeddings.weight", 2)
    shared = shape("bert.t_pooler.dense.weight", 2)[0]
    text, vision, both = (count_layers(state, f"bert.encoder.{kind}.") for kind in ("layer", "v_layer", "c_layer"))
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": text,
        "intermediate_size": shape("bert.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": shape("bert.embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": shape("bert.embeddings.token_type_embeddings.weight", 2)[0],
        "v_feature_size": features,
        "v_hidden_size": v_hidden,
        "v_num_hidden_layers": vision,
        "v_intermediate_size": shape("bert.encoder.v_layer.0.intermediate.dense.weight", 2)[0],
        "bi_hidden_size": shared,
        # the co layers of the public models stand before the last text blocks and the first vision blocks
        "t_biattention_id": tuple(range(max(text - both, 0), text)),
        "v_biattention_id": tuple(range(both)),
    }
    for name, width, channels in (("num_attention_heads", hidden, 64), ("v_num_attention_heads", v_hidden, 128),
                                  ("bi_num_attention_heads", shared, 128)):
        values[name] = width // channels if width % channels == 0 else 0
    if "cls.imagePredictions.decoder.weight" in state:
        values["v_target_size"] = shape("cls.imagePredictions.decoder.weight", 2)[0]
        values["visual_target"] = int(values["v_target_size"] == features)
    return values


def _heads(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields that the tensors decide, whatever a config file says: heads, their sizes, optional modules."""
    shape = shape_reader(state, path, "ViLBERT")
    found = {key.split(".")[0] for key in state}
    values = {
        "heads": tuple(head for key, head in _HEAD_KEYS.items() if key in found),
        "task_specific_tokens": "bert.embeddings.task_embeddings.weight" in state,
        "dynamic_attention": any(".dyLinear_q." in key for key in state),
    }
    if any(key.startswith("vil_prediction.main.") for key in state):
        values["vqa_activation"] = "relu"
        values["vqa_labels"] = shape("vil_prediction.main.3.weight", 2)[0]
    elif "vqa" in values["heads"]:
        values["vqa_labels"] = shape("vil_prediction.logit_fc.3.weight", 2)[0]
    if "gqa" in values["heads"]:
        values["gqa_labels"] = shape("vil_prediction_gqa.logit_fc.3.weight", 2)[0]
    return values


def _stored(config, path: Path) -> dict:
    """Fields of the given config, or of config.json beside the weights where that is ViLBERT's, else none."""
    if isinstance(config, ViLBERTConfig):
        return config.to_dict()
    source, content = "config", config
    if not isinstance(config, dict):
        folder = path if path.is_dir() else path.parent
        source = Path(config) if config is not None else folder / CONFIG_NAME
        if config is None and not source.is_file():
            return {}
        content = read_json(source)
        if config is None and not path.is_dir() and "v_hidden_size" not in content:
            return {}  # some other model's
    known = {entry.name for entry in fields(ViLBERTConfig)}
    unknown = sorted(set(content) - known - _UNREAD)
    if unknown or content.get("model_type", "vilbert") != "vilbert" or content.get("intra_gate"):
        kind = f"unknown fields {', '.join(unknown)}" if unknown else "settings of another model"
        raise ValueError(f"{source}: has {kind}, must be a ViLBERT configuration")
    values = {name: value for name, value in content.items() if name in known}
    if content.get("predict_feature"):
        values["visual_target"] = 1
    return values


def _folded(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """weight_v * (weight_g / its norm): the first release normalises each classifier matrix as a whole."""
    folded = dict(state)
    for key in state:
        if match := NORMALIZED.fullmatch(key):
            gain = folded.pop(f"{match[1]}weight_g", None)
            if gain is None or gain.numel() != 1:
                raise ValueError(f"{path}: {match[1]}weight_g is missing or not a single number")
            value = folded.pop(key)
            folded[f"{match[1]}weight"] = value * (gain.reshape(()) / value.norm())
    return folded
