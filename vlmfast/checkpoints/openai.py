"""OpenAI's TorchScript archives and bare state dicts with the same keys; those are also our own keys.

Sizes are read off tensor shapes. Head counts are not stored anywhere: 64 channels per head, as in all OpenAI models.
"""

import math
import re
from pathlib import Path

from torch import Tensor

from ..models.clip import PRESETS, CLIPConfig
from .torchscript import read_torchscript

DROPPED = re.compile(r"input_resolution|context_length|vocab_size|(.*\.)?attn_mask")


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(config fields, tensors) of an archive; all OpenAI weights use QuickGELU."""
    state = read_torchscript(path)
    return {**infer_config(state, path), "quick_gelu": True}, state


def key_map(config: CLIPConfig, names) -> dict[str, tuple[str, ...]]:
    """Our key -> source keys: the identity."""
    return {name: (name,) for name in names}


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields from tensor shapes; without `quick_gelu`, unless the sizes are those of a GELU preset.

    Raises:
        ValueError: a tensor that fixes a size is missing or has the wrong rank, or a width without a known head count.
    """

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != ndim:
            found = f"has shape {list(state[key].shape)}" if key in state else "is missing"
            raise ValueError(f"{path}: not a CLIP checkpoint: {key} {found}, must have {ndim} dimensions")
        return tuple(state[key].shape)

    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})

    def grid(key: str) -> int:
        cells = shape(key, 2)[0] - 1
        if cells < 1 or math.isqrt(cells) ** 2 != cells:
            raise ValueError(f"{path}: {key} has {cells + 1} rows, must be 1 + a square")
        return math.isqrt(cells)

    context_length, text_width = shape("positional_embedding", 2)
    values = {
        "embed_dim": shape("text_projection", 2)[1],
        "context_length": context_length,
        "vocab_size": shape("token_embedding.weight", 2)[0],
        "text_width": text_width,
        "text_layers": count("transformer.resblocks."),
        "text_mlp_ratio": shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / max(text_width, 1),
    }
    if "visual.attnpool.positional_embedding" in state:
        values["vision_width"] = shape("visual.conv3.weight", 4)[0]
        values["vision_layers"] = tuple(count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        values["vision_patch_size"] = None
        values["image_size"] = grid("visual.attnpool.positional_embedding") * 32
        widths = [values["vision_width"] * 32, text_width]
    else:
        width, _, _, patch = shape("visual.conv1.weight", 4)
        values["vision_width"], values["vision_patch_size"] = width, patch
        values["vision_layers"] = count("visual.transformer.resblocks.")
        values["vision_mlp_ratio"] = shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / max(width, 1)
        values["image_size"] = grid("visual.positional_embedding") * patch
        widths = [width, text_width]
    same = ("embed_dim", "vision_layers", "vision_width", "vision_patch_size", "text_width", "text_layers")
    for preset in PRESETS.values():
        if "vision_heads" in preset and all(preset[name] == values[name] for name in same):
            values["vision_heads"], values["quick_gelu"] = preset["vision_heads"], preset["quick_gelu"]
            return values
    if any(width % 64 for width in widths):
        raise ValueError(
            f"{path}: head counts are not stored and widths {widths} are not multiples of 64; "
            "put the model's open_clip_config.json beside the weights"
        )
    return values
