"""open_clip checkpoints: a weights file, alone or in a folder with open_clip_config.json.

Accepted on reading: a `state_dict` wrapper, `module.` and `_orig_mod.` prefixes, CustomTextCLIP's `text.` prefix, a
logit_scale of shape [1]. The activation is GELU unless the config says quick_gelu; a bare state dict does not say.
"""

import re
import warnings
from pathlib import Path

from torch import Tensor

from ..models.clip import CLIPConfig
from . import openai
from .files import find_weights, read_json, read_tensors

CONFIG_NAME = "open_clip_config.json"
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
DROPPED = openai.DROPPED
key_map = openai.key_map

_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")
_TEXT = ("text.transformer.", "text.token_embedding.", "text.positional_embedding", "text.ln_final.",
         "text.text_projection", "text.attn_mask")

# Settings we implement, and those that change nothing in the forward pass. Others must have open_clip's default.
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"}
_TEXT_CFG = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "eos_id",
             "norm_kwargs"}
_IGNORED = {"patch_dropout", "output_tokens", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id",
            "attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
            "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained", "hf_proj_type",
            "hf_pooler_type"}
_DEFAULTS = {"pos_embed_type": "learnable", "pool_type": "tok", "proj_type": "linear", "block_type": "default"}


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(config fields, tensors). Warns when nothing says which activation a bare state dict was trained with."""
    weights = find_weights(path, WEIGHT_NAMES) if path.is_dir() else path
    state = rename(read_tensors(weights))
    config_file = weights.parent / CONFIG_NAME
    if config_file.is_file():
        return config_fields(read_json(config_file), config_file), state
    if any(key.startswith(("text_model.", "vision_model.")) for key in state):
        raise ValueError(f"{path}: has Hugging Face keys; load the folder that holds it and its config.json")
    return openai.infer_config(state, path), state


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Source keys to ours, with wrapper prefixes removed and [1] temperatures made scalars."""
    renamed = {}
    for key, value in state.items():
        name = _PREFIX.sub("", key)
        if name.startswith(_TEXT):
            name = name.removeprefix("text.")
        if name in renamed:
            raise ValueError(f"open_clip: {key} and another key both stand for {name}")
        if name in ("logit_scale", "logit_bias") and value.numel() == 1:
            value = value.reshape(())
        renamed[name] = value
    return renamed


def config_fields(content: dict, path: Path) -> dict:
    """CLIPConfig fields from open_clip_config.json.

    Raises:
        ValueError: a missing size, or a setting this architecture does not have, by name.
    """
    model = _part(content, "model_cfg", path)
    vision, text = _part(model, "vision_cfg", path), _part(model, "text_cfg", path)
    for name, part, known in (("vision_cfg", vision, _VISION), ("text_cfg", text, _TEXT_CFG)):
        for key, value in part.items():
            if key not in known | _IGNORED and value not in (None, False, _DEFAULTS.get(key, False)):
                raise ValueError(f"{path}: {name}.{key} = {value!r} is not supported")
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale",
             "init_logit_bias", "nonscalar_logit_scale", "multimodal_cfg"}
    for key, value in model.items():
        if (key not in known or key == "multimodal_cfg") and value is not None:
            raise ValueError(f"{path}: model_cfg.{key} is not supported")

    layers, width = vision.get("layers", 12), vision.get("width", 768)
    resnet = isinstance(layers, list)
    head_width = vision.get("head_width", 64)
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        raise ValueError(f"{path}: text_cfg.pool_type is {pool!r}, must be argmax or eos")
    eps = {((part.get("norm_kwargs") or {}).get("eps", 1e-5)) for part in (vision, text)}
    if len(eps) != 1:
        raise ValueError(f"{path}: norm_kwargs.eps differs between the towers")
    size = vision.get("image_size", 224)
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ValueError(f"{path}: vision_cfg.image_size is {size}, must be square")
        size = size[0]
    try:
        values = {
            "embed_dim": model["embed_dim"],
            "image_size": size,
            "vision_layers": layers,
            "vision_width": width,
            "vision_patch_size": None if resnet else vision.get("patch_size", 16),
            "vision_heads": width * (32 if resnet else 1) // head_width,
            "vision_mlp_ratio": vision.get("mlp_ratio", 4.0),
            "context_length": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "text_width": text.get("width", 512),
            "text_heads": text.get("heads", 8),
            "text_layers": text.get("layers", 12),
            "text_mlp_ratio": text.get("mlp_ratio", 4.0),
            "quick_gelu": bool(model.get("quick_gelu", False)),
            "layer_norm_eps": eps.pop(),
            "eos_token_id": text.get("eos_id", 2) if pool == "eos" else None,
            "init_logit_bias": model.get("init_logit_bias"),
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: incomplete or wrong model_cfg ({type(error).__name__}: {error})") from error
    if model.get("init_logit_scale") is not None:
        values["init_logit_scale"] = model["init_logit_scale"]
    return values


def config_json(config: CLIPConfig) -> dict:
    """The model_cfg of open_clip_config.json, all sizes spelled out."""
    vision = {
        "image_size": config.image_size,
        "layers": list(config.vision_layers) if config.resnet else config.vision_layers,
        "width": config.vision_width,
        "head_width": config.vision_width * (32 if config.resnet else 1) // config.vision_heads,
        "patch_size": config.vision_patch_size,
        "mlp_ratio": config.vision_mlp_ratio,
    }
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
        "mlp_ratio": config.text_mlp_ratio,
    }
    if config.layer_norm_eps != 1e-5:
        vision["norm_kwargs"] = text["norm_kwargs"] = {"eps": config.layer_norm_eps}
    if config.eos_token_id is not None:
        text |= {"pool_type": "eos", "eos_id": config.eos_token_id}
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "init_logit_scale": config.init_logit_scale,
        "vision_cfg": vision,
        "text_cfg": text,
    }
    if config.init_logit_bias is not None:
        model["init_logit_bias"] = config.init_logit_bias
    return model


def warn_unknown_activation(path: Path) -> None:
    warnings.warn(
        f"{path}: a bare state dict does not say which activation it was trained with; assuming QuickGELU as in "
        "OpenAI's weights. Pass quick_gelu=False for open_clip's own (LAION, DataComp) GELU models.",
        stacklevel=3,
    )


def _part(content: dict, key: str, path: Path) -> dict:
    part = content.get(key)
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {key} is missing or not an object")
    return part
