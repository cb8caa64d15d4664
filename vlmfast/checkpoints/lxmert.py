"""LXMERT: the authors' `.pth` state dicts (pretraining and fine-tuned) and Hugging Face folders.

Our keys are the authors'. A `.pth` does not state its head count; it is 64 channels per head, as in the public model.
"""

import json
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

from torch import Tensor

from ..models.lxmert import LXMERT, LXMERTConfig
from .files import find_weights, read_json, read_tensors
from .huggingface import CONFIG_NAME, WEIGHT_NAMES, read_shards
from .state import build_filled, check_tied, count_layers, plain_names, require_heads, shape_reader

COPY = "cls.predictions.decoder.weight"
TABLE = "embeddings.word_embeddings.weight"
# where the trunk lies: Hugging Face, fine-tuned, pretraining, the trunk alone
PREFIXES = ("lxmert.", "lxrt_encoder.model.bert.", "bert.", "")
DROPPED = re.compile(rf"{re.escape(COPY)}|(.*\.)?embeddings\.position_ids")
_ARCHITECTURES = {"pretraining": "LxmertForPreTraining", "vqa": "LxmertForQuestionAnswering", "none": "LxmertModel"}


def load(path: Path, *, config=None, strict: bool, device, dtype) -> LXMERT:
    """See `vlmfast.checkpoints.load`."""
    weights = find_weights(path, WEIGHT_NAMES) if path.is_dir() else path
    state = plain_names(read_shards(weights) if weights.suffix == ".json" else read_tensors(weights))
    prefix = next((prefix for prefix in PREFIXES if prefix + TABLE in state), None)
    if prefix is None:
        raise ValueError(f"{path}: not an LXMERT checkpoint: bert.{TABLE} is missing")
    check_tied(state, COPY, prefix + TABLE, path)
    answer = "" if "logit_fc.0.weight" in state else "answer_head."

    def source_name(key: str) -> str:
        if key.startswith("answer_head."):
            return answer + key.removeprefix("answer_head.")
        return prefix + key.removeprefix("bert.") if key.startswith("bert.") else key

    values = infer_config(state, prefix, f"{answer}logit_fc", path)
    decided = ("heads", "num_qa_labels", "images_per_answer") if values["heads"] != "none" else ("heads",)
    if values["heads"] == "pretraining":
        decided += ("task_obj_predict", "task_qa")
    if values.get("task_obj_predict"):
        decided += ("visual_obj_loss", "visual_attr_loss", "visual_feat_loss")
    # what the tensors decide, whatever a config file says
    fixed = {name: values[name] for name in decided if name in values}
    values = {**values, **_stored(config, path), **fixed}
    require_heads(values, path)
    settings = LXMERTConfig.from_dict(values)
    blocks = settings.l_layers + settings.r_layers + settings.x_layers
    return build_filled(partial(LXMERT, settings), blocks, state, source_name, DROPPED.fullmatch, path,
                        strict=strict, device=device, dtype=dtype)


def save(model: LXMERT, folder: Path) -> None:
    """config.json and model.safetensors as transformers writes and reads them: without the copy of the word table."""
    from safetensors.torch import save_file

    state = {("lxmert." if model.config.heads != "none" else "") + key.removeprefix("bert.")
             if key.startswith("bert.") else key: value.detach().cpu().contiguous()
             for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHT_NAMES[0], metadata={"format": "pt"})
    content = model.config.to_dict()
    del content["heads"]
    if content["images_per_answer"] == 1:
        del content["images_per_answer"]
    content |= {"model_type": "lxmert", "architectures": [_ARCHITECTURES[model.config.heads]],
                "torch_dtype": str(model.dtype).removeprefix("torch.")}
    if model.config.heads == "pretraining":
        content["task_obj_predict"] = bool(model.config.region_heads)
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def infer_config(state: dict[str, Tensor], prefix: str, answer: str, path: Path) -> dict:
    """Config fields from tensor shapes and from which heads there are.

    Raises:
        ValueError: a tensor that fixes a size is missing.
    """
    shape = shape_reader(state, path, "LXMERT")
    encoder = f"{prefix}encoder."
    vocab_size, hidden = shape(prefix + TABLE, 2)
    widening = re.compile(re.escape(encoder) + r".+\.(intermediate|lang_inter)\.dense\.weight")
    inner = [key for key in state if widening.fullmatch(key)]
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64 if hidden % 64 == 0 else 0,
        "max_position_embeddings": shape(f"{prefix}embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": shape(f"{prefix}embeddings.token_type_embeddings.weight", 2)[0],
        "l_layers": count_layers(state, f"{encoder}layer."),
        "r_layers": count_layers(state, f"{encoder}r_layers."),
        "x_layers": count_layers(state, f"{encoder}x_layers."),
        "visual_feat_dim": shape(f"{encoder}visn_fc.visn_fc.weight", 2)[1],
        "visual_pos_dim": shape(f"{encoder}visn_fc.box_fc.weight", 2)[1],
        "heads": "none",
    }
    if inner:
        values["intermediate_size"] = shape(inner[0], 2)[0]
    if any(key.startswith("cls.") for key in state):
        values["heads"] = "pretraining"
        values["task_qa"] = f"{answer}.0.weight" in state
        values["task_obj_predict"] = any(key.startswith("obj_predict_head.") for key in state)
        for name, size in (("obj", "num_object_labels"), ("attr", "num_attr_labels"), ("feat", None)):
            decoder = f"obj_predict_head.decoder_dict.{name}.weight"
            values[f"visual_{name}_loss"] = decoder in state
            if decoder in state and size:
                values[size] = shape(decoder, 2)[0]
    elif f"{answer}.0.weight" in state:
        values["heads"] = "vqa"
    if f"{answer}.0.weight" in state:
        values["images_per_answer"] = max(shape(f"{answer}.0.weight", 2)[1] // max(hidden, 1), 1)
        values["num_qa_labels"] = shape(f"{answer}.3.weight", 2)[0]
    return values


def _stored(config, path: Path) -> dict:
    """Fields of the given config, or of config.json beside the weights where that is LXMERT's, else none."""
    if isinstance(config, LXMERTConfig):
        return config.to_dict()
    source, content = "config", config
    if not isinstance(config, dict):
        folder = path if path.is_dir() else path.parent
        source = Path(config) if config is not None else folder / CONFIG_NAME
        if config is None and not source.is_file():
            return {}
        content = read_json(source)
        if config is None and not path.is_dir() and content.get("model_type") != "lxmert":
            return {}  # some other model's
    if content.get("model_type", "lxmert") != "lxmert":
        raise ValueError(f"{source}: model_type is {content['model_type']!r}, must be 'lxmert'")
    known = {entry.name for entry in fields(LXMERTConfig)}
    return {name: value for name, value in content.items() if name in known}
