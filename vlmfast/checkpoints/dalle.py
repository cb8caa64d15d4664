"""DALL-E: DALLE-pytorch's training checkpoints (`.pt`), and our own folders (config.json, model.safetensors, vae/).

A DALLE-pytorch file holds its settings under "hparams" and "vae_params" and the tensors under "weights", those of the
discrete VAE with the prefix "vae.". How many wrappers lie around a projection depends on its settings, so tensors are
told by how their names begin and end.
"""

import json
import re
from functools import partial
from pathlib import Path

from torch import Tensor

from ..models.dalle import DALLE, DALLEConfig
from .dvae import discrete_vae
from .files import check_tensors, read_content, read_json, read_tensors
from .state import build_filled, count_layers, plain_names, shape_reader

MODEL_TYPE = "dalle"
CONFIG_NAME, WEIGHT_NAME, VAE_FOLDER = "config.json", "model.safetensors", "vae"
KINDS = {"full": "full", "axial_row": "row_only", "axial_col": "col", "conv_like": "corner"}
# settings that change what is computed but not how tensors are called, and what they are when a file is silent
_DEFAULTS = {"heads": 8, "dim_head": 64, "loss_img_weight": 7, "stable": False, "attn_dropout": 0.0, "ff_dropout": 0.0,
             "attn_types": ("full",), "shift_tokens": True}
_REFUSED = {"reversible": "reversible layers", "sparse_attn": "DeepSpeed's sparse attention"}
_CONV_KERNEL = 5  # of "conv_like"; no file says otherwise
_PARTS = {"to_qkv": "attn.fn.to_qkv", "to_out.0": "attn.fn.to_out", "net.0": "ff.fn.fc", "net.3": "ff.fn.proj"}
_LAYER = re.compile(r"transformer\.layers\.layers\.(\d+)\.([01])\.(.+)")
_PROJECTION = re.compile(r"(?:fn\.)+(to_qkv|to_out\.0|net\.0|net\.3)\.(weight|bias)")
_OUTSIDE = {"to_logits.0.": "norm.", "to_logits.1.": "to_logits.", "image_pos_emb.weights.0": "image_row_emb.weight",
            "image_pos_emb.weights.1": "image_col_emb.weight", "transformer.pos_emb": "rotary"}
_SHARED = re.compile(r"(text|image)_emb\.linear\.(weight|bias)")


def load(path: Path, *, config=None, strict: bool, device, dtype) -> DALLE:
    """See `vlmfast.checkpoints.load`; `config` (a dict) replaces what a DALLE-pytorch file lacks, by its own names."""
    if path.is_dir():
        return _load_own(path, config=config, strict=strict, device=device, dtype=dtype)
    content = read_content(path)
    if not isinstance(content, dict) or not isinstance(content.get("weights"), dict):
        raise ValueError(f"{path}: not a DALLE-pytorch checkpoint: it holds no dict under 'weights'")
    hparams, vae_params = ({**(content.get(name) or {})} for name in ("hparams", "vae_params"))
    hparams |= config or {}
    weights = plain_names(check_tensors(content["weights"], path))
    parts = {key.removeprefix("vae."): value for key, value in weights.items() if key.startswith("vae.")}
    state = {own_name(key, path): value for key, value in weights.items()
             if not key.startswith("vae.") and not _SHARED.fullmatch(key)}
    values = infer_config(state, hparams, path)
    settings = DALLEConfig.from_dict(values)
    for name in ("image_row_emb.weight", "image_col_emb.weight", "rotary"):
        if name in state:
            state[name] = state[name].reshape(-1, state[name].shape[-1])
    for name in list(state):
        if name.endswith(".scale"):
            state[name] = state[name].flatten()
    model = build_filled(partial(DALLE, settings), settings.depth, state, lambda key: key, lambda key: False, path,
                         strict=strict, device=device, dtype=dtype)
    if vae_params and parts:
        model.attach_vae(discrete_vae(parts, vae_params, path, device=device, dtype=model.dtype))
    return model


def own_name(key: str, path: Path) -> str:
    """A name of DALLE-pytorch's as ours; one that is not its comes back as it is."""
    match = _LAYER.fullmatch(key)
    if match is None:
        start = next((start for start in _OUTSIDE if key.startswith(start)), None)
        return key if start is None else _OUTSIDE[start] + key.removeprefix(start)
    layer, branch, rest = match.groups()
    prefix = f"layers.{layer}.{('attn', 'ff')[int(branch)]}."
    if rest == "scale":
        return prefix + rest
    if projection := _PROJECTION.fullmatch(rest):
        return f"layers.{layer}.{_PARTS[projection[1]]}.{projection[2]}"
    return prefix + rest.removeprefix("fn.")


def infer_config(state: dict[str, Tensor], hparams: dict, path: Path) -> dict:
    """Config fields from tensor shapes under our names, and from the settings of the file.

    Raises:
        ValueError: a tensor that fixes a size is missing, or a setting that this package has no layer for.
    """
    for name, what in _REFUSED.items():
        chosen = hparams.get(name)
        if any(chosen) if isinstance(chosen, list | tuple) else chosen:
            raise ValueError(f"{path}: was trained with {what} ({name} is {chosen!r}), which is not supported")
    if any(hparams.get(name) is not None for name in ("shared_attn_ids", "shared_ff_ids")):
        raise ValueError(f"{path}: was trained with layers that share weights, which is not supported")
    read = {name: hparams[name] if hparams.get(name) is not None else value for name, value in _DEFAULTS.items()}
    kinds = (read["attn_types"],) if isinstance(read["attn_types"], str) else tuple(read["attn_types"])
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"{path}: attn_types holds {', '.join(unknown)}, must be some of {', '.join(KINDS)}")
    shape = shape_reader(state, path, "DALLE-pytorch")
    entries, dim = shape("to_logits.weight", 2)
    shared = "text_emb.weight" not in state
    if "rotary" in state:
        positions = state["rotary"].shape[-2]
        if "text_seq_len" not in hparams:
            raise ValueError(f"{path}: hparams lacks text_seq_len, which tells text from image positions")
        text_seq_len = hparams["text_seq_len"]
        grid = _square(positions - text_seq_len - 1, path)
    else:
        text_seq_len = shape("text_pos_emb.weight", 2)[0] - 1
        grid = shape("image_row_emb.weight", 4)[1], shape("image_col_emb.weight", 4)[2]
    if shared:
        text = hparams.get("num_text_tokens", 10000) + text_seq_len
    else:
        text = shape("text_emb.weight", 2)[0]
    return {
        "dim": dim,
        "depth": count_layers(state, "layers."),
        "heads": read["heads"],
        "dim_head": read["dim_head"],
        "ff_mult": shape("layers.0.ff.fn.proj.weight", 2)[1] // dim,
        "num_text_tokens": text - text_seq_len,
        "text_seq_len": text_seq_len,
        "num_image_tokens": entries - text,
        "image_grid": grid,
        "attn_types": tuple(KINDS[kind] for kind in kinds),
        "conv_kernel": _CONV_KERNEL,
        "start_token": True,
        "qkv_bias": "layers.0.attn.fn.to_qkv.bias" in state,
        "feed_forward": "geglu",
        "rotary": "rotary" in state,
        "shift_tokens": bool(read["shift_tokens"]),
        "sandwich_norm": any(".norm_out." in key for key in state),
        "layer_scale": any(key.endswith(".scale") for key in state),
        "divide_max": bool(read["stable"]),
        "shared_embeddings": shared,
        "attn_dropout": float(read["attn_dropout"]),
        "ff_dropout": float(read["ff_dropout"]),
        "image_loss_weight": float(read["loss_img_weight"]),
    }


def save(model: DALLE, folder: Path) -> None:
    """config.json and model.safetensors."""
    save_own(model, folder, MODEL_TYPE)


def save_own(model, folder: Path, model_type: str) -> None:
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHT_NAME, metadata={"format": "pt"})
    content = {"model_type": model_type, **model.config.to_dict()}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _load_own(folder: Path, *, config, strict: bool, device, dtype) -> DALLE:
    values = read_json(folder / CONFIG_NAME)
    if values.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{folder}: {CONFIG_NAME} has no model_type {MODEL_TYPE!r}, must be a folder of this package")
    settings = DALLEConfig.from_dict({**values, **(config or {})})
    state = read_tensors(folder / WEIGHT_NAME)
    model = build_filled(partial(DALLE, settings), settings.depth, state, lambda key: key, lambda key: False, folder,
                         strict=strict, device=device, dtype=dtype)
    from ..data.tokenizer import CLIPTokenizer

    attach_neighbours(model, folder, CLIPTokenizer, device)
    return model


def attach_neighbours(model, folder: Path, tokenizer: type, device) -> None:
    """Sets the tokenizer and the discrete VAE that lie in the folder."""
    if (folder / "vocab.json").is_file():
        model.tokenizer = tokenizer.from_file(folder)
    if (folder / VAE_FOLDER).is_dir():
        from .loading import load as load_any

        model.attach_vae(load_any(folder / VAE_FOLDER, device=device))


def _square(count: int, path: Path) -> tuple[int, int]:
    side = max(count, 0) ** 0.5
    if count < 1 or side != int(side):
        raise ValueError(f"{path}: {count} image positions, must be a square number")
    return int(side), int(side)
