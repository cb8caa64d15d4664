"""Pixel-BERT: state dicts of the third-party implementation zezeze97/pixelbert (the authors published none).

Our keys are theirs, except that the backbone has torchvision's names, where theirs are detectron2's; both are read.
Of the detector around the backbone only the backbone is used. Its X-152 with deformable convolutions is not
supported. The files do not state the head count; it is 64 channels a head.
"""

import json
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..layers.plain_resnet import RESNETS
from ..models.pixelbert import HEADS, PixelBERT, PixelBERTConfig
from .bert_like import bert_sizes, find_prefix, plain_state, read_state, stored_fields, write_config
from .files import read_json
from .huggingface import CONFIG_NAME, PREPROCESSOR_NAME
from .state import build_filled, check_shapes, check_tied, count_layers, report_keys, require_heads, shape_reader

MODEL_TYPE, WEIGHT_NAME = "pixelbert", "pytorch_model.bin"
BERT, FEATURE = "transformer.bert.", "cnn.feature."
TABLE, WORDS = f"{BERT}embeddings.word_embeddings.weight", "transformer.cls.predictions."
# the detector's other parts; tables and copies that nothing reads
DROPPED = re.compile(r"cnn\.feature\.(backbone\.)?(proposal_generator|roi_heads|fc)\..*"
                     r"|cnn\.feature\.(backbone\.)?pixel_(mean|std)|transformer\.cls\.predictions\.decoder\.weight"
                     r"|transformer\.bert\.(visual_embeddings\.position_embeddings\.weight|embeddings\.position_ids)")
_UNREAD = frozenset({"classifier", "loss_type", "chunk_size_feed_forward", "is_decoder", "output_attentions",
                     "output_hidden_states", "pad_token_id", "max_temporal_position_embeddings", "max_img_size",
                     "max_txt_len"})
_HEAD_KEYS = {"pretraining": f"{WORDS}bias", "vqa": "transformer.classifier.0.weight",
              "rank": "rank_output.weight", "classifier": "classifier.1.weight"}
_TRACKED = ".num_batches_tracked"


def load(path: Path, *, config=None, strict: bool, device, dtype) -> PixelBERT:
    """See `vlmfast.checkpoints.load`."""
    stored = read_state(path)
    find_prefix(stored, (BERT,), TABLE.removeprefix(BERT), "a Pixel-BERT", path)
    check_tied(stored, f"{WORDS}decoder.weight", TABLE, path)
    state = {torchvision_name(key): value for key, value in stored.items()}
    if f"{WORDS}decoder.bias" in state:  # the one that the public code adds
        state[f"{WORDS}bias"] = state.pop(f"{WORDS}decoder.bias")
    theirs = f"{FEATURE}conv1.weight" in state and f"{FEATURE}conv1.weight" not in stored
    values = {**infer_config(state, path, theirs), **_stored(config, path), **_decided(state, path)}
    require_heads(values, path)
    settings = PixelBERTConfig.from_dict(values)
    backbone = len(settings.stages) if settings.backbone != "none" else 0
    model = build_filled(partial(PixelBERT, settings), settings.num_hidden_layers + backbone, state, lambda key: key,
                         DROPPED.fullmatch, path, strict=strict, device=device, dtype=dtype)
    file = (path if path.is_dir() else path.parent) / PREPROCESSOR_NAME
    if file.is_file():
        from ..data.images import ImagePreprocess

        model.preprocess = ImagePreprocess.from_config(read_json(file))
    return model


def save(model: PixelBERT, folder: Path) -> None:
    """pytorch_model.bin under the third-party code's names, config.json, and preprocessor_config.json (in open_clip's
    terms) where the model has a `preprocess`."""
    state = {detectron_name(key): value for key, value in plain_state(model).items()}
    if "pretraining" in model.config.heads:
        state |= {f"{WORDS}decoder.weight": state[TABLE], f"{WORDS}decoder.bias": state[f"{WORDS}bias"]}
    torch.save(state, folder / WEIGHT_NAME)
    write_config(folder, model_type=MODEL_TYPE, **model.config.to_dict())
    if model.preprocess is not None:
        text = json.dumps(model.preprocess.for_evaluation().to_config("open_clip"), indent=2)
        (folder / PREPROCESSOR_NAME).write_text(text + "\n", encoding="utf-8")


def load_backbone(model: PixelBERT, path: str | Path) -> None:
    """Fills a model's image network from a file of that alone, its classifier left out.

    Args:
        path: a state dict (`.pth`, `.safetensors`) under torchvision's names, whose strides lie in the 3 x 3
            convolutions (`stride_in_1x1=False`), or under detectron2's.

    Raises:
        FileNotFoundError: no such file.
        UnsafePickleError: a pickle that asks for more than tensors (a ValueError).
        ValueError: the model has no backbone; missing or unknown keys, shapes or strides that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if model.config.backbone == "none":
        raise ValueError("load_backbone: model has no backbone, must be built with one")
    stored = read_state(path)
    if "conv1.weight" in stored and model.config.stride_in_1x1:
        raise ValueError(f"{path}: has torchvision's names, the model must be built with stride_in_1x1=False")
    state = {torchvision_name(FEATURE + key).removeprefix(FEATURE): value for key, value in stored.items()}
    target = model.cnn.feature.state_dict()
    state = {**{key: torch.zeros((), dtype=torch.int64) for key in target if key.endswith(_TRACKED)}, **state}
    unknown = [key for key in state if key not in target and not DROPPED.fullmatch(FEATURE + key)
               and not key.endswith(_TRACKED)]
    report_keys(path, [key for key in target if key not in state], unknown, strict=True)
    state = {key: state[key] for key in target}
    check_shapes(state, target, path)
    model.cnn.feature.load_state_dict(state)


def torchvision_name(key: str) -> str:
    """The backbone's key for a file's: `cnn.feature.backbone.res2.0.shortcut.norm.bias` is
    `cnn.feature.layer1.0.downsample.1.bias`; other keys stay."""
    if not key.startswith(FEATURE):
        return key
    name = re.sub(r"^backbone\.", "", key.removeprefix(FEATURE))
    name = re.sub(r"^stem\.", "", name)
    name = re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", name)
    name = re.sub(r"shortcut\.norm\.", "downsample.1.", name)
    name = re.sub(r"shortcut\.(weight)", r"downsample.0.\1", name)
    return FEATURE + re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)


def detectron_name(key: str) -> str:
    """Inverse of `torchvision_name` for the backbone's keys, under `cnn.feature.backbone.`."""
    if not key.startswith(FEATURE):
        return key
    name = re.sub(r"bn(\d)\.", r"conv\1.norm.", key.removeprefix(FEATURE))
    name = re.sub(r"downsample\.1\.", "shortcut.norm.", name)
    name = re.sub(r"downsample\.0\.", "shortcut.", name)
    staged = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", name)
    return f"{FEATURE}backbone.{staged if staged != name else f'stem.{name}'}"


def infer_config(state: dict[str, Tensor], path: Path, detectron: bool) -> dict:
    """Config fields from tensor shapes; `detectron`: the file has detectron2's names."""
    shape = shape_reader(state, path, "Pixel-BERT")
    values = bert_sizes(shape, state, f"{BERT}embeddings.", BERT)
    values["backbone_channel_in_size"] = shape("cnn.grid_encoder.0.weight", 4)[1]
    return {**values, **_backbone(state, shape, path, detectron)}


def _backbone(state: dict[str, Tensor], shape, path: Path, detectron: bool) -> dict:
    if f"{FEATURE}conv1.weight" not in state:
        return {"backbone": "none"}
    layers = tuple(count_layers(state, f"{FEATURE}layer{stage}.") for stage in range(1, 5))
    layers = tuple(blocks for blocks in layers if blocks)
    width = shape(f"{FEATURE}conv1.weight", 4)[0]
    inner, per_group = shape(f"{FEATURE}layer1.0.conv2.weight", 4)[:2]
    groups = inner // max(per_group, 1)
    kinds = [name for name, (_, count, group_width) in RESNETS.items()
             if count == groups and width * group_width // 64 * groups == inner]
    if not kinds:
        raise ValueError(f"{path}: {FEATURE}layer1.0.conv2.weight has {groups} groups of {per_group} channels, must be "
                         f"of one of {', '.join(RESNETS)}")
    name = next((name for name in kinds if RESNETS[name][0] == layers), kinds[0])
    return {"backbone": name, "backbone_layers": () if RESNETS[name][0] == layers else layers,
            "backbone_width": width, "stride_in_1x1": detectron and groups == 1}


def _decided(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields that the tensors decide, whatever a config file says: heads, their sizes, optional parts."""
    shape, hidden = shape_reader(state, path, "Pixel-BERT"), state[TABLE].shape[-1]
    values = {"heads": tuple(name for name in HEADS if _HEAD_KEYS[name] in state)}
    for kind in ("row", "col"):
        key = f"{BERT}visual_embeddings.{kind}_position_embeddings.weight"
        values[f"max_grid_{kind}_position_embeddings"] = shape(key, 2)[0] if key in state else 0
    if f"{FEATURE}conv1.weight" in state:
        values["frozen_norm"] = not any(key.startswith(FEATURE) and key.endswith(_TRACKED) for key in state)
    if "vqa" in values["heads"]:
        values["num_labels"], inner = shape("transformer.classifier.2.weight", 2)
        values["cls_hidden_scale"] = max(inner // max(hidden, 1), 1)
    if "classifier" in values["heads"]:
        values["classifier_labels"], width = shape("classifier.1.weight", 2)
        values["classifier_images"] = max(width // max(hidden, 1), 1)
    return values


def _stored(config, path: Path) -> dict:
    """As `stored_fields`; the third-party base_model.json calls itself a "bert"."""
    source = Path(config) if isinstance(config, (str, Path)) else path / CONFIG_NAME if config is None else None
    if source is not None and source.is_file():
        content = read_json(source)
        config = content if "backbone_channel_in_size" in content else config
    if isinstance(config, dict) and config.get("model_type") == "bert" and "backbone_channel_in_size" in config:
        config = {name: value for name, value in config.items() if name != "model_type"}
    return stored_fields(config, PixelBERTConfig, MODEL_TYPE, path, _UNREAD)
