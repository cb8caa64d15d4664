"""`load`: any known checkpoint format to a model."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.clip import CLIP, CLIPConfig
from ..models.config import ModelConfig
from . import huggingface, open_clip, openai
from .files import is_zip, key_bytes, open_zip, read_json
from .formats import BY_MODEL_TYPE, FORMATS
from .state import check_shapes, common_dtype, report_keys
from .tasks import for_task

_CLIP_FORMATS = {"openai": openai, "open_clip": open_clip, "huggingface": huggingface}
_BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"


def detect_format(path: str | Path) -> str:
    """Which reader a file or folder needs: one of those that `load` names. Runs nothing in it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: nothing this package reads; the message says what was looked for.
    """
    path = Path(path)
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        if "config.json" in names and names & set(huggingface.WEIGHT_NAMES):
            content = read_json(path / "config.json")
            kind = "vilbert" if "v_biattention_id" in content else content.get("model_type")
            return BY_MODEL_TYPE.get(kind, "huggingface") if isinstance(kind, str) else "huggingface"
        for name, entry in FORMATS.items():
            if entry.files and all(names & set(choices) for choices in entry.files):
                return name
        if names & {open_clip.CONFIG_NAME, *open_clip.WEIGHT_NAMES}:
            return "open_clip"
        raise ValueError(
            f"{path}: no checkpoint; must hold config.json and {huggingface.WEIGHT_NAMES[0]}, "
            f"or {open_clip.CONFIG_NAME} and {open_clip.WEIGHT_NAMES[0]}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    head = key_bytes(path)
    for name, entry in FORMATS.items():
        if any(key in head for key in entry.keys):
            return name
    if path.name in huggingface.WEIGHT_NAMES and (path.parent / "config.json").is_file():
        return "huggingface"
    if path.suffix == ".safetensors":
        return "open_clip"
    if is_zip(path):
        with open_zip(path) as archive:
            leaves = {name.partition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in leaves:
            raise ValueError(f"{path}: a zip archive without data.pkl, not a checkpoint")
        scripted = "constants.pkl" in leaves or any(leaf.startswith("code/") for leaf in leaves)
        return "openai" if scripted else "open_clip"
    with open(path, "rb") as file:
        if file.read(1) == b"\x80":  # torch.save before 1.6 wrote plain pickles
            return "open_clip"
    raise ValueError(f"{path}: neither a zip archive nor safetensors nor a pickle, not a checkpoint")


def load(
    path: str | Path,
    *parts: str | Path,
    format: str | None = None,
    task: str | None = None,
    labels=None,
    strict: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    quick_gelu: bool | None = None,
    config=None,
) -> nn.Module:
    """A model in evaluation mode from a public or own checkpoint. No code in the file is executed.

    Args:
        path: CLIP: OpenAI TorchScript `.pt`; open_clip `.pt`, `.bin`, `.safetensors` or folder; Hugging Face folder.
            BERT-like models: the authors' file, a folder with it and config.json, or a Hugging Face folder of LXMERT
            or VisualBERT; of VisualBERT and UNITER also MMF's names. Discrete VAEs: OpenAI's encoder.pkl; a Hugging
            Face FlavaImageCodebook; DALLE-pytorch's vae.pt; taming-transformers' `.ckpt`; min-dalle's detoker.pt.
            DALL-E: DALLE-pytorch's dalle.pt. DALL-E mini and mega: min-dalle's folder with encoder.pt and decoder.pt.
            GLIDE: base.pt, upsample.pt, their inpainting counterparts, clip_image_enc.pt, or a folder with them.
        parts: further files of the same model: OpenAI's decoder.pkl, without which its dVAE only encodes; the
            upsampler of a GLIDE; clip_text_enc.pt. The format may also stand last among them.
        format: "openai", "open_clip", "huggingface", a BERT-like model ("vilbert", "lxmert", "visualbert", "uniter",
            "vlbert", ...), "openai-dvae", "flava", "dalle-pytorch-vae", "taming", "min-dalle-vqgan", "dalle-pytorch",
            "min-dalle", "glide", "glide-noised-clip", or None to detect it. "vlmfast" is a folder written by
            `save_pretrained`, in any layout.
        task: a task of `vlmfast tasks`, "vqa" for example: the model gets a head for it, new and untrained where the
            checkpoint has none (with a warning), in place of its other heads.
        labels: of a new head: how many answers there are for "vqa" and "gqa" (None: those of an answer list beside the
            checkpoint, else the config's default); for "affect" names, or a `models.AffectConfig`.
        strict: raise on missing and unknown keys. False warns instead; missing tensors keep their initial values.
        device: where the model goes.
        dtype: of all parameters. None keeps the stored one, or float32 where several are mixed (OpenAI's files).
        image_size: pixels; another one than stored resizes the position grid (bicubic, antialiased).
        quick_gelu: overrides the activation. Needed for bare open_clip state dicts of GELU models, which do not
            store it: they default to QuickGELU, with a warning.
        config: of files that have none beside them, CLIP's excepted: a path to the JSON file, its content or a config
            object. Without it sizes come from the tensors, and what they do not tell is that of the public models.

    Returns:
        The model. `model.tokenizer`, of models that read texts, is a tokenizer when vocabulary files lie beside the
        checkpoint, else None; `model.preprocess` of a CLIP or discrete VAE is its ImagePreprocess.

    Raises:
        FileNotFoundError: no such file, or one that belongs to the checkpoint is absent.
        UnsafePickleError: a pickle that asks for more than tensors (a ValueError).
        ValueError: unknown format, damaged file, missing or unknown keys, shapes that do not fit the config, an
            argument of another model.
    """
    if parts and format is None and _is_format(parts[-1]):
        *parts, format = parts
    path, parts = Path(path), [Path(part) for part in parts]
    if format in (None, "vlmfast") or not path.exists():
        format = detect_format(path)
    elif format == "huggingface" and (path / "config.json").is_file():
        kind = BY_MODEL_TYPE.get(str(read_json(path / "config.json").get("model_type")))
        format = kind if kind and FORMATS[kind].huggingface else format
    entry = FORMATS.get(format)
    if parts and not (entry and entry.parts):
        several = ", ".join(name for name, entry in FORMATS.items() if entry.parts)
        raise ValueError(f"load: {len(parts) + 1} files, must be one: {path} is {format}, only {several} have two")
    if entry is not None:
        if image_size is not None or quick_gelu is not None:
            raise ValueError(f"load: image_size and quick_gelu belong to CLIP, {path} is {format}")
        try:
            model = entry.load(path, *parts, config=config, strict=strict, device=device, dtype=dtype)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: a setting has the wrong type ({error})") from error
        if entry.wordpiece:
            model.tokenizer = _wordpiece(path if path.is_dir() else path.parent, model.config)
        return model if task is None else for_task(model, path, task, labels)
    if format not in _CLIP_FORMATS:
        formats = ", ".join([*_CLIP_FORMATS, "vlmfast", *FORMATS])
        raise ValueError(f"load: format is {format!r}, must be one of {formats}")
    if config is not None:
        raise ValueError(f"load: config belongs to other models than CLIP, {path} is {format}")
    source = _CLIP_FORMATS[format]
    try:
        values, state = source.read(path)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: a setting has the wrong type ({error})") from error
    if quick_gelu is not None:
        values["quick_gelu"] = quick_gelu
    elif "quick_gelu" not in values:
        open_clip.warn_unknown_activation(path)
    if image_size is not None:
        values["image_size"] = image_size
    folder = path if path.is_dir() else path.parent
    preprocess = _preprocess(source, folder, values["image_size"])
    values["image_mean"], values["image_std"] = preprocess.mean, preprocess.std
    if "logit_bias" in state and values.get("init_logit_bias") is None:
        values["init_logit_bias"] = 0.0
    config = CLIPConfig.from_dict(values)

    blocks = config.text_layers + (sum(config.vision_layers) if config.resnet else config.vision_layers)
    if blocks > len(state):
        raise ValueError(f"{path}: the config has {blocks} blocks, the file only {len(state)} tensors")
    try:
        model = CLIP(config, device="meta")
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: sizes in the config are absurd ({error})") from error
    target = model.state_dict()
    state, missing = _translate(source, config, state, target, path, strict)
    if image_size is not None:
        _resize_positions(state, config)
    check_shapes(state, target, path)
    if missing:
        model = CLIP(config)
    dtype = dtype or common_dtype(state)
    for key in list(state):  # copies, one at a time: a mapped file may change or vanish under the model
        kind = dtype if state[key].is_floating_point() else None
        state[key] = state[key].to(device=device, dtype=kind, copy=True).contiguous()
    model.load_state_dict(state, strict=not missing, assign=True)
    model = model.to(device=device, dtype=dtype).eval() if missing else model.eval()
    model.preprocess = preprocess
    model.tokenizer = _tokenizer(folder, config)
    return model if task is None else for_task(model, path, task, labels)


def _is_format(part) -> bool:
    """Whether a positional argument of `load` is a format, known or not, and no file: files have a suffix."""
    return part is None or isinstance(part, str) and (part in (*_CLIP_FORMATS, *FORMATS, "vlmfast") or
                                                      not Path(part).suffix and not Path(part).exists())


def _preprocess(source, folder: Path, image_size: int):
    """The stored ImagePreprocess, or CLIP's own where none is stored, at the model's image size."""
    from ..data.images import ImagePreprocess

    names = {huggingface: huggingface.PREPROCESSOR_NAME, open_clip: open_clip.CONFIG_NAME}
    file = folder / names.get(source, "")
    preprocess = ImagePreprocess(image_size)
    if file.is_file():
        try:
            preprocess = ImagePreprocess.from_config(read_json(file), image_size)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{file}: wrong preprocessing settings ({error})") from error
    if preprocess.image_size != image_size:
        preprocess = replace(preprocess, image_size=image_size, resize_size=None)
    return preprocess


def _tokenizer(folder: Path, config: CLIPConfig):
    """The CLIPTokenizer whose vocabulary lies in `folder`, or None."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() or (folder / "tokenizer.json").is_file():
        vocabulary = folder
    elif (folder / _BPE_NAME).is_file():
        vocabulary = folder / _BPE_NAME
    else:
        return None
    from ..data.tokenizer import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_file(vocabulary, context_length=config.context_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{vocabulary}: has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    return tokenizer


def _wordpiece(folder: Path, config: ModelConfig):
    """The WordPieceTokenizer whose vocabulary lies in `folder`, or None."""
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        return None
    if getattr(config, "model", "bert") != "bert":  # RoBERTa's vocabulary is another kind
        return None
    from ..data.wordpiece import WordPieceTokenizer

    tokenizer = WordPieceTokenizer.from_file(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: the vocabulary has {tokenizer.vocab_size} tokens, the model only "
                         f"{config.vocab_size}")
    return tokenizer


def _translate(source, config, state, target, path, strict) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our keys, and our keys that got none."""
    try:
        keys = source.key_map(config, target)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    translated, absent, missing = {}, [], []
    for key, names in keys.items():
        lost = [name for name in names if name not in state]
        if lost and key.endswith("num_batches_tracked"):  # a counter that older files lack and inference ignores
            translated[key] = torch.zeros((), dtype=torch.int64)
        elif lost:
            absent += lost
            missing.append(key)
        else:
            parts = [state[name] for name in names]
            translated[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
            if source is huggingface and huggingface.transposed(key) and translated[key].ndim == 2:
                translated[key] = translated[key].T
    used = {name for names in keys.values() for name in names}
    unknown = sorted(name for name in state if name not in used and not source.DROPPED.fullmatch(name))
    report_keys(path, absent, unknown, strict)
    return translated, missing


def _resize_positions(state: dict[str, Tensor], config: CLIPConfig) -> None:
    """Interpolate the image tower's position grid [1 + g*g, W] to the config's; the class position stays."""
    key = "visual.attnpool.positional_embedding" if config.resnet else "visual.positional_embedding"
    table = state.get(key)
    if table is None or table.ndim != 2 or len(table) == config.grid**2 + 1:
        return
    side = round((len(table) - 1) ** 0.5)
    if side**2 + 1 != len(table):
        raise ValueError(f"load: {key} has {len(table)} rows, must be 1 + a square")
    cells = table[1:].float().T.reshape(1, -1, side, side)
    cells = F.interpolate(cells, size=(config.grid, config.grid), mode="bicubic", antialias=True, align_corners=False)
    state[key] = torch.cat([table[:1], cells.flatten(2)[0].T.to(table.dtype)])
