"""VQGAN: taming-transformers' `.ckpt` files, DALL-E mini's `detoker.pt` as min-dalle stores it, and our own folders.

Our keys are taming's.
"""

import json
import re
from functools import partial
from pathlib import Path

from torch import Tensor

from ..models.vqgan import VQGAN, VQGANConfig
from .dvae import is_own, picture_preprocess
from .files import UnsafePickleError, find_weights, read_json, read_tensors
from .huggingface import CONFIG_NAME, WEIGHT_NAMES
from .module_pickle import read_training_checkpoint
from .state import build_filled, count_layers, shape_reader

MODEL_TYPE = "vqgan"
# perceptual loss, discriminator and what only colours segmentation maps
DROPPED = re.compile(r"loss\..*|colorize|.*num_batches_tracked")
MIN_DALLE_DROPPED = re.compile(r"encoder\..*|quant_conv\..*")
MIN_DALLE_EPS = 1e-5  # min-dalle's GroupNorm; taming's has 1e-6


def load_taming(path: Path, *, config=None, strict: bool, device, dtype) -> VQGAN:
    """`VQGAN` from a training checkpoint or bare state dict.

    The file does not tell the resolution that decides where attention is; it is read off the levels that have any.
    """
    if is_own(path, MODEL_TYPE):
        return load_folder(path, config=config, strict=strict, device=device, dtype=dtype)
    try:
        state = read_tensors(path)
    except UnsafePickleError:
        state = read_training_checkpoint(path)  # callbacks beside the tensors
    values = infer_config(state, path)
    return _fill(values, config, state, lambda key: key, DROPPED, path, strict, device, dtype)


def load_min_dalle(path: Path, *, config=None, strict: bool, device, dtype) -> VQGAN:
    """A `VQGAN` without encoder from detoker.pt."""
    state = read_tensors(path)
    named = {"quantize." + key if key.startswith("embedding.") else key: value for key, value in state.items()
             if not MIN_DALLE_DROPPED.fullmatch(key)}
    values = {**infer_config(named, path), "norm_eps": MIN_DALLE_EPS, "pixel_range": "unit"}

    def source_name(key: str) -> str:
        return key.removeprefix("quantize.")

    return _fill(values, config, state, source_name, MIN_DALLE_DROPPED, path, strict, device, dtype)


def load_folder(path: Path, *, config=None, strict: bool, device, dtype) -> VQGAN:
    """A folder that `save` wrote, or its model.safetensors."""
    folder = path if path.is_dir() else path.parent
    values = read_json(folder / CONFIG_NAME)
    for name in ("model_type", "torch_dtype"):
        values.pop(name, None)
    state = read_tensors(find_weights(folder, WEIGHT_NAMES[:1]) if path.is_dir() else path)
    return _fill(values, config, state, lambda key: key, DROPPED, path, strict, device, dtype)


def save(model: VQGAN, folder: Path) -> str:
    """config.json and model.safetensors under taming's keys. The layout."""
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHT_NAMES[0], metadata={"format": "pt"})
    content = {"model_type": MODEL_TYPE, **model.config.to_dict(),
               "torch_dtype": str(model.dtype).removeprefix("torch.")}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return MODEL_TYPE


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """VQGANConfig fields from tensor shapes; ValueError where one that fixes a size is missing."""
    shape = shape_reader(state, path, "VQGAN")
    levels = count_layers(state, "decoder.up.")
    if not levels:
        raise ValueError(f"{path}: not a VQGAN checkpoint: decoder.up.0 is missing")
    widths = [shape(f"decoder.up.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    encoder = "encoder.conv_in.weight" in state
    # without an encoder the finest level stands for one time ch, as it is in every public model
    ch, channels = shape("encoder.conv_in.weight", 4)[:2] if encoder else (widths[0], 3)
    if any(width % ch for width in widths):
        raise ValueError(f"{path}: widths {widths} are no multiples of the first, {ch}")
    resolution = max(256, 2 ** (levels - 1))
    gumbel = "quantize.embed.weight" in state
    codes, width = shape("quantize.embed.weight" if gumbel else "quantize.embedding.weight", 2)
    z_channels = shape("decoder.conv_in.weight", 4)[1]
    values = {
        "resolution": resolution, "in_channels": channels, "out_ch": shape("decoder.conv_out.weight", 4)[0], "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_layers(state, "decoder.up.0.block.") - 1,
        "attn_resolutions": tuple(resolution >> i for i in range(levels) if f"decoder.up.{i}.attn.0.q.weight" in state),
        "z_channels": z_channels, "n_embed": codes, "embed_dim": width, "quantizer": "gumbel" if gumbel else "vq",
        "encoder": encoder,
    }
    if encoder:
        values["double_z"] = shape("encoder.conv_out.weight", 4)[0] == 2 * z_channels
    return values


def _fill(values, config, state, source_name, dropped, path: Path, strict: bool, device, dtype) -> VQGAN:
    if isinstance(config, VQGANConfig):
        config = config.to_dict()
    elif config is not None and not isinstance(config, dict):
        config = read_json(Path(config))
    settings = VQGANConfig.from_dict({**values, **(config or {})})
    blocks = len(settings.ch_mult) * settings.num_res_blocks
    model = build_filled(partial(VQGAN, settings), blocks, state, source_name, dropped.fullmatch, path, strict=strict,
                         device=device, dtype=dtype)
    model.preprocess = picture_preprocess(settings.resolution)
    return model
