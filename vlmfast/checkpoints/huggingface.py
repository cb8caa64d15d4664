"""Hugging Face CLIPModel folders: config.json, weights (whole or sharded), preprocessor_config.json."""

import re
from pathlib import Path

from torch import Tensor

from ..models.clip import CLIPConfig
from .files import find_weights, read_json, read_tensors

DROPPED = re.compile(r"(text_model|vision_model)\.embeddings\.position_ids")
CONFIG_NAME, PREPROCESSOR_NAME = "config.json", "preprocessor_config.json"
WEIGHT_NAMES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")

_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
          "attn.out_proj": "self_attn.out_proj"}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_LEGACY_EOS = 2  # files older than transformers 4.31 say 2; the text feature then sits at the largest token id


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(config fields, tensors under Hugging Face keys) of a folder, or of a weights file inside one."""
    folder = path if path.is_dir() else path.parent
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json beside the weights")
    values = config_fields(read_json(config_file), config_file)
    weights = find_weights(folder, WEIGHT_NAMES) if path.is_dir() else path
    return values, read_shards(weights) if weights.suffix == ".json" else read_tensors(weights)


def read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: has no weight_map of file names")
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: shard name {name!r} must be a file in the same folder")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index}: shard {name} is missing")
        shard = read_tensors(index.parent / name)
        wrong = sorted(key for key in shard if weight_map.get(key) != name)
        if wrong:
            raise ValueError(f"{index}: shard {name} holds {', '.join(wrong[:20])}, which the index puts elsewhere")
        state |= shard
    lost = sorted(set(weight_map) - set(state))
    if lost:
        raise ValueError(f"{index}: the shards lack {', '.join(lost[:20])}")
    return state


def key_map(config: CLIPConfig, names) -> dict[str, tuple[str, ...]]:
    """Our key -> Hugging Face keys; three of them are stacked along dim 0, projections are transposed."""
    return {name: _hf_keys(name) for name in names}


def _hf_keys(name: str) -> tuple[str, ...]:
    fixed = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    }
    if name in fixed:
        return (fixed[name],)
    module, _, leaf = name.rpartition(".")
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",  # the published keys are spelled so
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    if module in norms:
        return (f"{norms[module]}.{leaf}",)
    match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"huggingface: {name} has no place in the CLIPModel layout")
    layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
    if match[3].startswith("attn.in_proj_"):
        kind = match[3].removeprefix("attn.in_proj_")
        return tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
    module, _, leaf = match[3].rpartition(".")
    return (f"{layer}.{_BLOCK[module]}.{leaf}",)


def transposed(name: str) -> bool:
    """Our projections are [width, embed], theirs are Linear weights [embed, width]."""
    return name in ("visual.proj", "text_projection")


def config_fields(content: dict, path: Path) -> dict:
    """CLIPConfig fields from config.json; what it leaves out has the default of transformers.

    Raises:
        ValueError: another model type, an activation other than gelu and quick_gelu, or towers that differ in it.
    """
    if content.get("model_type", "clip") != "clip":
        raise ValueError(f"{path}: model_type is {content['model_type']!r}, must be 'clip'")
    text, vision = (
        {**(content.get(f"{tower}_config") or {}), **(content.get(f"{tower}_config_dict") or {})}
        for tower in ("text", "vision")
    )
    shared = {}
    for key, default in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
        shared[key] = text.get(key, default)
        if shared[key] != vision.get(key, default):
            raise ValueError(f"{path}: {key} differs between the towers, which is not supported")
    if shared["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act is {shared['hidden_act']!r}, must be one of {', '.join(_ACTIVATIONS)}")
    if vision.get("num_channels", 3) != 3:
        raise ValueError(f"{path}: num_channels is {vision['num_channels']}, must be 3")
    sizes = {}
    for key, default in (("image_size", 224), ("patch_size", 32)):
        sizes[key] = vision.get(key, default)
        if isinstance(sizes[key], list):
            if len(set(sizes[key])) != 1:
                raise ValueError(f"{path}: vision_config.{key} is {sizes[key]}, must be square")
            sizes[key] = sizes[key][0]
    eos = text.get("eos_token_id", 49407)
    vision_width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    try:
        return {
            "embed_dim": content.get("projection_dim", 512),
            "image_size": sizes["image_size"],
            "vision_layers": vision.get("num_hidden_layers", 12),
            "vision_width": vision_width,
            "vision_patch_size": sizes["patch_size"],
            "vision_heads": vision.get("num_attention_heads", 12),
            "vision_mlp_ratio": vision.get("intermediate_size", 3072) / vision_width,
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "text_width": text_width,
            "text_heads": text.get("num_attention_heads", 8),
            "text_layers": text.get("num_hidden_layers", 12),
            "text_mlp_ratio": text.get("intermediate_size", 2048) / text_width,
            "quick_gelu": _ACTIVATIONS[shared["hidden_act"]],
            "layer_norm_eps": shared["layer_norm_eps"],
            "eos_token_id": None if eos == _LEGACY_EOS else eos,
            "init_logit_scale": content.get("logit_scale_init_value", 2.6592),
        }
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: wrong sizes ({error})") from error


def can_express(config: CLIPConfig) -> bool:
    """Whether CLIPModel can hold the model: ViT tower, no logit bias."""
    return not config.resnet and config.init_logit_bias is None


def config_json(config: CLIPConfig, dtype: str, bos_token_id: int) -> dict:
    """config.json of transformers.CLIPModel."""
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    text = {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": config.mlp_width("text"),
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "bos_token_id": bos_token_id,
        "eos_token_id": _LEGACY_EOS if config.eos_token_id is None else config.eos_token_id,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": config.mlp_width("vision"),
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.vision_patch_size,
    }
    for tower in (text, vision):
        tower |= {
            "projection_dim": config.embed_dim,
            "hidden_act": activation,
            "layer_norm_eps": config.layer_norm_eps,
        }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
        "torch_dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }
