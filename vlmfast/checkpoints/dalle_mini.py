"""DALL-E mini and mega: min-dalle's files (encoder.pt, decoder.pt, detoker.pt), dalle-mini's flax parameters, and our
own folders.

min-dalle's folder also holds vocab.json and merges.txt; the detokenizer lies there or in a folder `vqgan` beside it.
Norms before attention and in the feed-forward networks were trained without a scale, so files may lack it: it is 1.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data.bart_tokenizer import BartTokenizer
from ..models.dalle_mini import DALLEMini, DALLEMiniConfig
from .dalle import CONFIG_NAME, WEIGHT_NAME, attach_neighbours, save_own
from .files import read_json, read_tensors
from .state import build_filled, count_layers, require_heads, shape_reader

MODEL_TYPE = "dalle-mini"
SIDES = {"encoder": ("encoder.pt", "encoder_mini.pt"), "decoder": ("decoder.pt", "decoder_mini.pt")}
DETOKENIZER = "detoker.pt"
_SCALELESS = re.compile(r"(.*(?:pre_(?:self|encoder)_attn_layer_norm|glu\.ln[01]|final_ln))\.bias")
# flax names of dalle-mini -> min-dalle's, in each layer
_FLAX_PARTS = {
    "encoder": {"LayerNorm_0": "pre_self_attn_layer_norm", "LayerNorm_1": "self_attn_layer_norm",
                "FlaxBartAttention_0": "self_attn", "GLU_0": "glu"},
    "decoder": {"LayerNorm_0": "pre_self_attn_layer_norm", "LayerNorm_1": "self_attn_layer_norm",
                "LayerNorm_2": "pre_encoder_attn_layer_norm", "LayerNorm_3": "encoder_attn_layer_norm",
                "FlaxBartAttention_0": "self_attn", "FlaxBartAttention_1": "encoder_attn", "GLU_0": "glu"},
}
_FLAX_GLU = {"LayerNorm_0": "ln0", "LayerNorm_1": "ln1", "Dense_0": "fc0", "Dense_1": "fc1", "Dense_2": "fc2"}
_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def load(path: Path, *, config=None, strict: bool, device, dtype) -> DALLEMini:
    """See `vlmfast.checkpoints.load`; `config` (a dict) replaces fields that the tensors do not tell."""
    if not path.is_dir():
        raise ValueError(f"{path}: is a file, must be the folder with {SIDES['encoder'][0]} and {SIDES['decoder'][0]}")
    if (path / CONFIG_NAME).is_file() and (path / WEIGHT_NAME).is_file():
        values = read_json(path / CONFIG_NAME)
        if values.pop("model_type", None) != MODEL_TYPE:
            raise ValueError(f"{path}: {CONFIG_NAME} has no model_type {MODEL_TYPE!r}, must be our own folder")
        model = _fill(read_tensors(path / WEIGHT_NAME), {**values, **(config or {})}, path, strict, device, dtype)
        attach_neighbours(model, path, BartTokenizer, device)
        return model
    state: dict[str, Tensor] = {}
    for side, names in SIDES.items():
        state |= {f"{side}.{key}": value for key, value in read_tensors(_one_of(path, names)).items()}
    model = _fill(state, {**infer_config(state, path), **(config or {})}, path, strict, device, dtype)
    _attach_detokenizer(model, path, device)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        model.tokenizer = BartTokenizer.from_file(path)
    return model


def from_flax(params: dict, config: dict | None = None) -> DALLEMini:
    """A model with dalle-mini's flax parameters.

    Args:
        params: nested dicts of arrays, as read from flax_model.msgpack: "model" with "encoder" and "decoder", whose
            layers are stacked along the first axis, and "lm_head".
        config: fields that the arrays do not tell.

    Raises:
        ValueError: an array has no place or is missing.
    """
    state = flax_state(params)
    source = Path("params")
    return _fill(state, {**infer_config(state, source), **(config or {})}, source, True, "cpu", None)


def flax_state(params: dict) -> dict[str, Tensor]:
    """The arrays under min-dalle's names: kernels transposed, stacked layers taken apart."""
    try:
        sides = {"encoder": params["model"]["encoder"], "decoder": {**params["model"]["decoder"],
                                                                   "lm_head": params["lm_head"]}}
    except (KeyError, TypeError) as error:
        raise ValueError(f"from_flax: params lacks {error}, must hold model.encoder, model.decoder, lm_head") from error
    state = {}
    for side, tree in sides.items():
        stack = f"FlaxBart{side.title()}Layers"
        for names, array in _leaves(tree):
            value = torch.as_tensor(array)
            if names[-1] == "kernel":
                value = value.transpose(-1, -2)
            if names[-1] not in _FLAX_LEAVES:
                raise ValueError(f"from_flax: {side}.{'.'.join(names)} is no kernel, scale, embedding or bias")
            leaf = _FLAX_LEAVES[names[-1]]
            if names[:2] != ("layers", stack):
                state[".".join((side, *names[:-1], leaf))] = value.contiguous()
                continue
            parts = [_FLAX_PARTS[side].get(names[2], names[2]), *names[3:-1]]
            if parts[0] == "glu":
                parts[1] = _FLAX_GLU.get(parts[1], parts[1])
            for layer, part in enumerate(value):
                state[".".join((side, "layers", str(layer), *parts, leaf))] = part.contiguous()
    return state


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields from tensor shapes; heads have 64 channels, as in the public models.

    Raises:
        ValueError: a tensor that fixes a size is missing.
    """
    shape = shape_reader(state, path, "DALL-E mini")
    text, width = shape("encoder.embed_tokens.weight", 2)
    image = shape("decoder.embed_tokens.weight", 2)[0] - 1
    length = shape("decoder.embed_positions.weight", 2)[0]
    side = round(length**0.5)
    if side * side != length:
        raise ValueError(f"{path}: decoder.embed_positions has {length} rows, must be a square number of codes")
    values = {"d_model": width, "encoder_vocab_size": text, "image_vocab_size": image, "image_grid": side,
              "max_text_length": shape("encoder.embed_positions.weight", 2)[0]}
    for kind in SIDES:
        values |= {f"{kind}_layers": count_layers(state, f"{kind}.layers."),
                   f"{kind}_attention_heads": width // 64 if width % 64 == 0 else 0,
                   f"{kind}_ffn_dim": shape(f"{kind}.layers.0.glu.fc0.weight", 2)[0]}
    codes = min(image, 16384)  # mega has 31 entries more than there are codes
    return {**values, "num_image_codes": codes, "decoder_start_token_id": codes}


def save(model: DALLEMini, folder: Path) -> None:
    """config.json and model.safetensors."""
    save_own(model, folder, MODEL_TYPE)


def _fill(state, values: dict, path: Path, strict: bool, device, dtype) -> DALLEMini:
    require_heads(values, path)
    settings = DALLEMiniConfig.from_dict(values)
    for key in list(state):
        if (match := _SCALELESS.fullmatch(key)) and f"{match[1]}.weight" not in state:
            state[f"{match[1]}.weight"] = torch.ones_like(state[key])
    return build_filled(partial(DALLEMini, settings), settings.encoder_layers + settings.decoder_layers, state,
                        lambda key: key, lambda key: False, path, strict=strict, device=device, dtype=dtype)


def _one_of(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no weights, must hold one of {', '.join(names)}")


def _attach_detokenizer(model: DALLEMini, folder: Path, device) -> None:
    places = [place / DETOKENIZER for place in (folder, folder / "vqgan", folder.parent / "vqgan")]
    place = next((place for place in places if place.is_file()), None)
    if place is not None:
        from .loading import load as load_any

        model.attach_vae(load_any(place, format="min-dalle-vqgan", device=device))


def _leaves(tree, names: tuple[str, ...] = ()):
    """(names, array) of everything in nested dicts."""
    if not isinstance(tree, dict):
        yield names, tree
        return
    for name, part in tree.items():
        yield from _leaves(part, (*names, str(name)))
