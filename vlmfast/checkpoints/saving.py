"""`save_pretrained`: a model to a folder that the public code of its kind, and `load`, read back exactly."""

import json
from pathlib import Path

from torch import nn

from ..models.clip import CLIP
from . import huggingface, open_clip
from .dalle import VAE_FOLDER
from .files import atomic_folder
from .formats import FORMATS
from .glide import UPSAMPLER_FOLDER


def save_pretrained(model: nn.Module, folder: str | Path) -> str:
    """Write a model with its sizes, activation, preprocessing and (if `model.tokenizer` is set) vocabulary.

    LXMERT and VisualBERT are written as transformers' config.json and model.safetensors, other BERT-like models as
    the authors' pytorch_model.bin with config.json. A DVAE without decoder becomes transformers' FlavaImageCodebook;
    the other discrete VAEs, the DALL-Es and GLIDE have a config.json of their own and their public keys in
    model.safetensors, a DALL-E's discrete VAE in a folder `vae` and a GLIDE's upsampler in `upsample` beside it. CLIP's
    layout is Hugging Face's CLIPModel: config.json, model.safetensors, preprocessor_config.json. What that cannot hold
    (ResNet towers, a logit bias, images padded to a square) is written in open_clip's layout instead:
    open_clip_config.json, open_clip_model.safetensors. Files are written under a temporary name and then renamed.
    Preprocessing is `model.preprocess` without its random part, or CLIP's own with the config's mean and std.

    Returns:
        The layout written: "huggingface", "open_clip", the name of a BERT-like model, "dvae", "discrete_vae",
        "flava_image_codebook", "vqgan", "dalle", "dalle-mini", "glide" or "glide-noised-clip".

    Raises:
        TypeError: not one of these models.
        FileExistsError: the folder holds a checkpoint in the other layout.
    """
    for entry in FORMATS.values():
        if isinstance(model, entry.model):
            with atomic_folder(Path(folder)) as stage:
                layout = entry.save(model, stage) or entry.layout
                if getattr(model, "tokenizer", None) is not None:
                    model.tokenizer.save(stage)
            for part, name in (("vae", VAE_FOLDER), ("upsampler", UPSAMPLER_FOLDER)):
                if getattr(model, part, None) is not None:
                    save_pretrained(getattr(model, part), Path(folder) / name)
            return layout
    if not isinstance(model, CLIP):
        kinds = ", ".join(dict.fromkeys(entry.model.__name__ for entry in FORMATS.values()))
        raise TypeError(f"save_pretrained: model is a {type(model).__name__}, must be a CLIP or one of {kinds}")
    from safetensors.torch import save_file

    from ..data.images import ImagePreprocess

    folder, config, tokenizer = Path(folder), model.config, model.tokenizer
    preprocess = model.preprocess or ImagePreprocess(config.image_size, config.image_mean, config.image_std)
    preprocess = preprocess.for_evaluation()
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    if huggingface.can_express(config) and preprocess.resize_mode != "longest":
        layout, weights = "huggingface", "model.safetensors"
        other = open_clip.CONFIG_NAME
        tensors = {}
        for key, names in huggingface.key_map(config, state).items():
            value = state[key].T if huggingface.transposed(key) else state[key]
            tensors |= zip(names, value.chunk(len(names)), strict=True) if len(names) > 1 else {names[0]: value}
        bos = config.vocab_size - 2 if tokenizer is None else tokenizer.sot
        documents = {
            huggingface.CONFIG_NAME: huggingface.config_json(config, str(model.dtype).removeprefix("torch."), bos),
            huggingface.PREPROCESSOR_NAME: preprocess.to_config("huggingface"),
        }
    else:
        layout, weights = "open_clip", open_clip.WEIGHT_NAMES[0]
        other, tensors = huggingface.CONFIG_NAME, state
        documents = {
            open_clip.CONFIG_NAME: {
                "model_cfg": open_clip.config_json(config),
                "preprocess_cfg": preprocess.to_config("open_clip"),
            }
        }
    if (folder / other).exists():
        raise FileExistsError(f"save_pretrained: {folder} holds {other}, a checkpoint in another layout")
    with atomic_folder(folder) as stage:
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, stage / weights, metadata={"format": "pt"})
        for name, content in documents.items():
            (stage / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(stage)
    return layout
