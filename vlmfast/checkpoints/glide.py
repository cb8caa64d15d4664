"""GLIDE: the public files, flat state dicts whose names our models share, and our own folders.

base.pt, base_inpaint.pt, upsample.pt and upsample_inpaint.pt hold a U-Net with its text transformer; clip_image_enc.pt
and clip_text_enc.pt hold the towers of the noised CLIP. Their settings are read off names and shapes, except for the
number of heads, which is taken to be that of the public models. A folder of ours has the upsampler in `upsample`.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.glide import GLIDE, GLIDEConfig
from ..models.noised_clip import NoisedCLIP, NoisedCLIPConfig
from .bert_like import stored_fields
from .dalle import CONFIG_NAME, WEIGHT_NAME, save_own
from .files import read_json, read_tensors
from .state import build_filled, count_layers, plain_names, shape_reader

GLIDE_TYPE, CLIP_TYPE = "glide", "glide-noised-clip"
GLIDE_KEY, CLIP_KEYS = b"transformer_proj.weight", (b"blocks.input.w_t", b"blocks.input.w_voc")
UPSAMPLER_FOLDER = "upsample"
# public names: a model and its upsampler; the towers
PAIRS = ("base.pt", "upsample.pt"), ("base_inpaint.pt", "upsample_inpaint.pt")
TOWERS = "clip_image_enc.pt", "clip_text_enc.pt"
HEAD_CHANNELS = 64
_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_HALVES = torch.float16, torch.bfloat16


def load_glide(path: Path, *parts: Path, config=None, strict: bool, device, dtype) -> GLIDE:
    """See `vlmfast.checkpoints.load`; `config` replaces what tensors and config.json tell.

    A second path is the upsampler of the first. Half precision is that of `GLIDE.to_half`.
    """
    if len(parts) > 1:
        raise ValueError(f"load: {1 + len(parts)} files, must be a GLIDE and its upsampler")
    given = {} if config is None else stored_fields(config, GLIDEConfig, GLIDE_TYPE, path, frozenset())
    options = dict(given=given, strict=strict, device=device, dtype=dtype)
    model, folder = _load_unet(path, **options), path if path.is_dir() else path.parent
    beside = parts[0] if parts else _upsampler_beside(path)
    if beside is not None:
        model.attach_upsampler(_load_unet(beside, **options))
    from ..data.gpt2_tokenizer import GPT2Tokenizer, has_gpt2_vocabulary

    if has_gpt2_vocabulary(folder):
        model.tokenizer = GPT2Tokenizer.from_file(folder)
        if model.tokenizer.vocab_size > model.config.n_vocab:
            raise ValueError(f"{folder}: the vocabulary has {model.tokenizer.vocab_size} tokens, the model only "
                             f"{model.config.n_vocab}")
        if model.upsampler is not None:
            model.upsampler.tokenizer = model.tokenizer
    return model


def _upsampler_beside(path: Path) -> Path | None:
    """The upsampler in a folder, public or ours."""
    if (path / UPSAMPLER_FOLDER / CONFIG_NAME).is_file():
        return path / UPSAMPLER_FOLDER
    names = {} if (path / CONFIG_NAME).is_file() else dict(PAIRS)
    first = next((name for name in names if (path / name).is_file()), None)
    return path / names[first] if first and (path / names[first]).is_file() else None


def _load_unet(path: Path, *, given: dict, strict: bool, device, dtype) -> GLIDE:
    weights, values = _own(path, GLIDE_TYPE)
    if values is None and path.is_dir():
        weights = next((path / base for base, _ in PAIRS if (path / base).is_file()), None)
        if weights is None:
            raise FileNotFoundError(f"{path}: no weights, must hold {CONFIG_NAME} and {WEIGHT_NAME}, or one of "
                                    f"{', '.join(base for base, _ in PAIRS)}")
    state = plain_names(read_tensors(weights))
    if values is None:
        values = infer_glide_config(state, weights, given)
    settings = GLIDEConfig.from_dict({**values, **given})
    dtype = dtype or _torso_dtype(state)
    blocks = settings.xf_layers + len(settings.channel_mult) * settings.num_res_blocks
    model = build_filled(partial(GLIDE, settings), blocks, state, lambda key: key, lambda key: False, weights,
                         strict=strict, device=device, dtype=torch.float32 if dtype in _HALVES else dtype)
    return model.to_half(dtype) if dtype in _HALVES else model


def _torso_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """Of the convolutions: those files that hold several types are half precision with float32 norms."""
    first = state.get("input_blocks.0.0.weight")
    return first.dtype if first is not None and first.dtype in (*_HALVES, torch.float64) else torch.float32


def infer_glide_config(state: dict[str, Tensor], path: Path, given: dict) -> dict:
    """Config fields from names and shapes; `given` are those that are known.

    Raises:
        ValueError: a tensor that fixes a size is missing or makes no sense, or heads are unknown.
    """
    shape = shape_reader(state, path, "GLIDE")
    first, in_channels, _, _ = shape("input_blocks.0.0.weight", 4)
    kinds = {3: (False, False), 6: (True, False), 7: (False, True), 10: (True, True)}
    if in_channels not in kinds:
        raise ValueError(f"{path}: input_blocks.0.0.weight takes {in_channels} channels, must be one of {list(kinds)}: "
                         "base, upsampler, inpainting, inpainting upsampler")
    super_res, inpaint = kinds[in_channels]
    channels = shape("time_embed.0.weight", 2)[1]
    # every level but the last to be run ends with a second block, which enlarges
    blocks = count_layers(state, "output_blocks.")
    levels = 1 + sum(f"output_blocks.{i}.{j}.in_layers.2.weight" in state for i in range(blocks) for j in (1, 2))
    if not channels or first % channels or blocks % levels or blocks < 2 * levels:
        raise ValueError(f"{path}: {blocks} output blocks on {levels} levels of {first} and more channels with a time "
                         f"embedding of {channels} are no U-Net of GLIDE's")
    per_level, starts = blocks // levels, range(1, 1 + blocks, blocks // levels)
    widths = [shape(f"input_blocks.{at}.0.in_layers.2.weight", 4)[0] for at in starts]
    if any(width % channels for width in widths):
        raise ValueError(f"{path}: levels have {widths} channels, must be multiples of {channels}")
    image_size = 2 ** (levels + 2)
    vocabulary, xf_width = shape("token_embedding.weight", 2)
    heads = given.get("xf_heads") or _heads(xf_width, "xf_heads", path)
    return {
        "image_size": image_size,
        "num_channels": channels,
        "num_res_blocks": per_level - 1,
        "channel_mult": tuple(width // channels for width in widths),
        "attention_resolutions": tuple(image_size >> level for level, at in enumerate(starts)
                                       if f"input_blocks.{at}.1.qkv.weight" in state),
        "num_head_channels": HEAD_CHANNELS,
        "n_vocab": vocabulary,
        "text_ctx": shape("positional_embedding", 2)[0],
        "xf_width": xf_width,
        "xf_layers": count_layers(state, "transformer.resblocks."),
        "xf_heads": heads,
        "xf_final_ln": "final_ln.weight" in state,
        "xf_padding": "padding_embedding" in state,
        "super_res": super_res,
        "inpaint": inpaint,
        "noise_schedule": "linear" if super_res else "squaredcos_cap_v2",
    }


def save_glide(model: GLIDE, folder: Path) -> None:
    """config.json and model.safetensors."""
    save_own(model, folder, GLIDE_TYPE)


def load_noised_clip(path: Path, *parts: Path, config=None, strict: bool, device, dtype) -> NoisedCLIP:
    """See `vlmfast.checkpoints.load`; `config` replaces what tensors and config.json tell.

    Paths are the files of both towers in any order. The other tower is also found beside the one given.
    """
    given = {} if config is None else stored_fields(config, NoisedCLIPConfig, CLIP_TYPE, path, frozenset())
    weights, values = _own(path, CLIP_TYPE)
    if values is not None:
        if parts:
            raise ValueError(f"load: {1 + len(parts)} files, must be one: {path} holds both towers")
        state = read_tensors(weights)
    else:
        state = _tower_state(path, parts)
        values = infer_clip_config(state, path, given)
    settings = NoisedCLIPConfig.from_dict({**values, **given})
    model = build_filled(partial(NoisedCLIP, settings), settings.n_xf_blocks_image + settings.n_xf_blocks_text, state,
                         lambda key: key, lambda key: False, path, strict=strict, device=device, dtype=dtype)
    folder = path if path.is_dir() else path.parent
    own = weights != path and (folder / "vocab.json").is_file()
    vocabulary = folder if own else folder / _CLIP_VOCABULARY
    if own or vocabulary.is_file():
        from ..data.tokenizer import CLIPTokenizer

        model.tokenizer = CLIPTokenizer.from_file(vocabulary, context_length=settings.max_text_len)
        if model.tokenizer.vocab_size > settings.n_vocab:
            raise ValueError(f"{vocabulary}: has {model.tokenizer.vocab_size} tokens, the model only "
                             f"{settings.n_vocab}")
    return model


def _tower_state(path: Path, parts: tuple[Path, ...]) -> dict[str, Tensor]:
    """Tensors of both towers, each under its prefix."""
    paths = [path / name for name in TOWERS] if path.is_dir() else [path, *parts]
    if len(paths) == 1 and path.name in TOWERS:
        paths.append(path.with_name(TOWERS[1 - TOWERS.index(path.name)]))
    state: dict[str, Tensor] = {}
    for file in paths:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a noised CLIP is loaded from {' and '.join(TOWERS)}")
        tensors = plain_names(read_tensors(file))
        both = any(key.startswith("image_encoder.") for key in tensors)
        prefix = "" if both else "image_encoder." if "blocks.input.w_t" in tensors else "text_encoder."
        if state.keys() & {prefix + key for key in tensors}:
            raise ValueError(f"{file}: holds the same tower as {paths[0]}, must be the other one")
        state |= {prefix + key: value for key, value in tensors.items()}
    return state


def infer_clip_config(state: dict[str, Tensor], path: Path, given: dict) -> dict:
    """Config fields from names and shapes; `given` are those that are known.

    Raises:
        ValueError: a tensor that fixes a size is missing (that of a whole tower, where only one was given), or heads
            are unknown.
    """
    shape = shape_reader(state, path, "noised CLIP")
    image_width, _, patch, _ = shape("image_encoder.blocks.input.patch_proj", 4)
    cells = shape("image_encoder.blocks.input.w_pos", 2)[0] - 1
    side = round(max(cells, 0) ** 0.5)
    if side * side != cells or not side:
        raise ValueError(f"{path}: {cells} patches, must be a square number")
    vocabulary, text_width = shape("text_encoder.blocks.input.w_voc", 2)
    values = {
        "image_size": side * patch,
        "patch_size": patch,
        "n_timesteps": shape("image_encoder.blocks.input.w_t", 2)[0],
        "n_vocab": vocabulary,
        "max_text_len": shape("text_encoder.blocks.input.w_pos", 2)[0],
        "n_embd": shape("text_encoder.blocks.output.f.w", 2)[0],
    }
    for tower, width in (("image", image_width), ("text", text_width)):
        heads = given.get(f"n_head_{tower}") or _heads(width, f"n_head_{tower}", path)
        names = {key.split(".")[2] for key in state if key.startswith(f"{tower}_encoder.blocks.block_")}
        values |= {f"n_head_{tower}": heads, f"n_head_state_{tower}": width // heads,
                   f"n_xf_blocks_{tower}": len(names)}
    return values


def save_noised_clip(model: NoisedCLIP, folder: Path) -> None:
    """config.json and model.safetensors."""
    save_own(model, folder, CLIP_TYPE)


def _own(path: Path, model_type: str) -> tuple[Path, dict | None]:
    """Of a folder of ours the weights and the config; else the path and None."""
    if not (path / CONFIG_NAME).is_file():
        return path, None
    values = read_json(path / CONFIG_NAME)
    if values.pop("model_type", None) != model_type:
        raise ValueError(f"{path}: {CONFIG_NAME} has no model_type {model_type!r}, must be a folder of this package")
    if not (path / WEIGHT_NAME).is_file():
        raise FileNotFoundError(f"{path}: no {WEIGHT_NAME} beside {CONFIG_NAME}")
    return path / WEIGHT_NAME, values


def _heads(width: int, name: str, path: Path) -> int:
    if width % HEAD_CHANNELS or not width:
        raise ValueError(f"{path}: does not tell {name}; pass config={{{name!r}: ...}}")
    return width // HEAD_CHANNELS
