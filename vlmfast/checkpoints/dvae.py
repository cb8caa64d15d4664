"""Discrete VAEs: OpenAI's pickled modules, FLAVA's image codebook, DALLE-pytorch's `vae.pt`, and our own folders.

Our keys of `DVAE` are OpenAI's below `encoder.` and `decoder.`, with `w` and `b` called `weight` and `bias`; those of
`DiscreteVAE` are DALLE-pytorch's.
"""

import json
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

from torch import Tensor

from ..models.dvae import DVAE, GROUPS, DiscreteVAE, DiscreteVAEConfig, DVAEConfig
from .files import check_tensors, find_weights, read_content, read_json, read_tensors
from .huggingface import CONFIG_NAME, WEIGHT_NAMES, read_shards
from .module_pickle import read_module
from .state import build_filled, count_layers, shape_reader

FLAVA_TYPE, DVAE_TYPE, DISCRETE_TYPE = "flava_image_codebook", "dvae", "discrete_vae"
PICKLES = "encoder.pkl", "decoder.pkl"
_FLAVA_PREFIXES = ("", "image_codebook.", "flava.image_codebook.")


def load_openai(path: Path, *parts: Path, config=None, strict: bool, device, dtype) -> DVAE:
    """`DVAE` from encoder.pkl and decoder.pkl, from the encoder alone, or from a folder with them.

    Each file is a pickled module, or state dict, of OpenAI's code; one state dict with `encoder.` and `decoder.` keys,
    as `save_pretrained` writes, is read too.
    """
    if not parts and is_own(path, DVAE_TYPE):
        return load_folder(path, config=config, strict=strict, device=device, dtype=dtype)
    if path.is_dir() and not parts:
        parts = tuple(path / name for name in PICKLES[1:] if (path / name).is_file())
        path = find_weights(path, PICKLES[:1])
    if len(parts) > 1:
        raise ValueError(f"load: {len(parts) + 1} files of an openai-dvae, must be an encoder and a decoder")
    state: dict[str, Tensor] = {}
    for file in (path, *parts):
        found = _openai_state(file)
        twice = sorted(state.keys() & found.keys())
        if twice:
            raise ValueError(f"{file}: holds {twice[0]}, as {path} does; must be an encoder and a decoder")
        state |= found
    values = {**_infer(state, path), **_given(config, DVAEConfig)}
    return _fill(DVAE, DVAEConfig.from_dict(values), state, lambda key: key, path, strict, device, dtype)


def load_flava(path: Path, *, config=None, strict: bool, device, dtype) -> DVAE:
    """`DVAE` without decoder from a folder or weights of transformers' `FlavaImageCodebook`, alone or inside FLAVA."""
    folder = path if path.is_dir() else path.parent
    weights = find_weights(path, WEIGHT_NAMES) if path.is_dir() else path
    state = read_shards(weights) if weights.suffix == ".json" else read_tensors(weights)
    prefix = next((prefix for prefix in _FLAVA_PREFIXES if f"{prefix}blocks.input.weight" in state), None)
    if prefix is None:
        raise ValueError(f"{path}: not a FlavaImageCodebook: blocks.input.weight is missing")
    state = {f"encoder.{_from_flava(key.removeprefix(prefix))}": value for key, value in state.items()
             if key.startswith(f"{prefix}blocks.")}
    values = _infer(state, path)
    if (folder / CONFIG_NAME).is_file():
        content = read_json(folder / CONFIG_NAME)
        groups = content.get("image_codebook_config", content).get("num_groups", GROUPS)
        if groups != GROUPS:
            raise ValueError(f"{folder / CONFIG_NAME}: num_groups is {groups!r}, must be {GROUPS}")
    values = {**values, "image_size": 112, **_given(config, DVAEConfig)}
    return _fill(DVAE, DVAEConfig.from_dict(values), state, lambda key: key, path, strict, device, dtype)


def load_dalle_pytorch(path: Path, *, config=None, strict: bool, device, dtype) -> DiscreteVAE:
    """`DiscreteVAE` from what train_vae.py saves: {"hparams", "weights"}, or from the bare state dict.

    Without hparams sizes come from the tensors; image size, temperature and loss are then the published defaults.
    """
    if is_own(path, DISCRETE_TYPE):
        return load_folder(path, config=config, strict=strict, device=device, dtype=dtype)
    stored: dict = {}
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        content = read_content(path)
        if isinstance(content, dict) and isinstance(content.get("hparams"), dict):
            stored, content = content["hparams"], content.get("weights")
        state = check_tensors(content, path)
    return discrete_vae(state, {**stored, **_given(config, DiscreteVAEConfig)}, path, strict=strict, device=device,
                        dtype=dtype)


def discrete_vae(state: dict[str, Tensor], settings: dict, path: Path, *, strict: bool = True, device="cpu",
                 dtype=None) -> DiscreteVAE:
    """`DiscreteVAE` from DALLE-pytorch's tensors and hyperparameters (which hold more than the model's)."""
    known = {entry.name for entry in fields(DiscreteVAEConfig)}
    values = {**_infer_discrete(state, path), **{name: value for name, value in settings.items() if name in known}}
    return _fill(DiscreteVAE, DiscreteVAEConfig.from_dict(values), state, lambda key: key, path, strict, device, dtype)


def load_folder(path: Path, *, config=None, strict: bool, device, dtype) -> DVAE | DiscreteVAE:
    """A folder that `save` wrote, or its model.safetensors."""
    folder = path if path.is_dir() else path.parent
    content = read_json(folder / CONFIG_NAME)
    model, settings = (DVAE, DVAEConfig) if content.pop("model_type", None) == DVAE_TYPE else \
        (DiscreteVAE, DiscreteVAEConfig)
    content.pop("torch_dtype", None)
    state = read_tensors(find_weights(folder, WEIGHT_NAMES[:1]) if path.is_dir() else path)
    values = settings.from_dict({**content, **_given(config, settings)})
    return _fill(model, values, state, lambda key: key, path, strict, device, dtype)


def is_own(path: Path, model_type: str) -> bool:
    """Whether a folder, or the one around a model.safetensors, was written by `save` for that type of model."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    weights = path.is_dir() or path.name == WEIGHT_NAMES[0]
    return weights and file.is_file() and read_json(file).get("model_type") == model_type


def save(model: DVAE | DiscreteVAE, folder: Path) -> str:
    """config.json and model.safetensors; a DVAE without decoder as transformers' FlavaImageCodebook. The layout."""
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    config, layout = model.config, DVAE_TYPE if isinstance(model, DVAE) else DISCRETE_TYPE
    content = {"model_type": layout, **config.to_dict()}
    if isinstance(model, DVAE) and model.decoder is None:
        layout = FLAVA_TYPE
        state = {_to_flava(key.removeprefix("encoder.")): value for key, value in state.items()}
        content = {"model_type": FLAVA_TYPE, "architectures": ["FlavaImageCodebook"], "num_groups": GROUPS,
                   "input_channels": config.input_channels, "num_blocks_per_group": config.n_blk_per_group,
                   "hidden_size": config.n_hid, "vocab_size": config.vocab_size}
    content["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    save_file(state, folder / WEIGHT_NAMES[0], metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return layout


def _openai_state(path: Path) -> dict[str, Tensor]:
    """Our keys; a module alone is told from its first kernel, 7 x 7 in the encoder, 1 x 1 in the decoder."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = read_tensors(path)
    except ValueError:
        if path.suffix == ".safetensors":
            raise
        state = read_module(path)
    state = {re.sub(r"\.([wb])$", lambda end: {"w": ".weight", "b": ".bias"}[end[1]], key): value
             for key, value in state.items()}
    first = state.get("blocks.input.weight")
    if first is None:
        return state
    prefix = "decoder." if first.shape[2:].numel() == 1 else "encoder."
    return {prefix + key: value for key, value in state.items()}


def _infer(state: dict[str, Tensor], path: Path) -> dict:
    """DVAEConfig fields from shapes; ValueError where a tensor that fixes one is missing."""
    shape = shape_reader(state, path, "DALL-E dVAE")
    n_hid, channels = shape("encoder.blocks.input.weight", 4)[:2]
    values = {"n_hid": n_hid, "input_channels": channels, "decoder": any(key.startswith("decoder.") for key in state),
              "vocab_size": shape("encoder.blocks.output.conv.weight", 4)[0],
              "n_blk_per_group": count_layers(state, "encoder.blocks.group_1.")}
    if values["decoder"]:
        values["n_init"] = shape("decoder.blocks.input.weight", 4)[0]
    return values


def _infer_discrete(state: dict[str, Tensor], path: Path) -> dict:
    shape = shape_reader(state, path, "DALLE-pytorch VAE")
    tokens, width = shape("codebook.weight", 2)
    hidden, channels = shape("encoder.0.0.weight", 4)[:2]
    layers = len({key for key in state if re.fullmatch(r"encoder\.\d+\.0\.weight", key)})
    blocks = len({key for key in state if re.fullmatch(r"encoder\.\d+\.net\.0\.weight", key)})
    return {"num_tokens": tokens, "codebook_dim": width, "hidden_dim": hidden, "channels": channels,
            "num_layers": layers, "num_resnet_blocks": blocks}


def _given(config, kind) -> dict:
    """Fields of `load`'s config argument: a path to JSON, a dict or a config object."""
    if config is None:
        return {}
    if isinstance(config, kind):
        return config.to_dict()
    return dict(config) if isinstance(config, dict) else read_json(Path(config))


def _fill(model, config, state, source_name, path: Path, strict: bool, device, dtype):
    blocks = GROUPS * config.n_blk_per_group if isinstance(config, DVAEConfig) else \
        config.num_layers + config.num_resnet_blocks
    filled = build_filled(partial(model, config), blocks, state, source_name, lambda key: False, path, strict=strict,
                          device=device, dtype=dtype)
    filled.preprocess = picture_preprocess(config.image_size)
    return filled


def picture_preprocess(image_size: int):
    """The ImagePreprocess of a discrete VAE: the shorter side resized, the centre cut out, pixels in 0 ... 1."""
    from ..data.images import ImagePreprocess

    return ImagePreprocess(image_size, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="lanczos")


def _from_flava(key: str) -> str:
    key = re.sub(r"^blocks\.group_(\d+)\.group\.", r"blocks.group_\1.", key)
    return key.replace(".res_path.path.", ".res_path.")


def _to_flava(key: str) -> str:
    key = re.sub(r"^blocks\.group_(\d+)\.", r"blocks.group_\1.group.", key)
    return key.replace(".res_path.", ".res_path.path.")
