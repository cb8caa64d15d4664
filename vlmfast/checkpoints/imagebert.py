"""ImageBERT: folders written by `save_pretrained`. No public weights exist, so there is no other format to read.

Sizes are read off the tensors where no config.json says them, as for the other models; the head count is then that of
64 channels a head.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.imagebert import HEADS, ImageBERT, ImageBERTConfig
from .bert_like import bert_sizes, find_prefix, plain_state, read_state, stored_fields, write_config
from .state import build_filled, check_tied, require_heads, shape_reader

MODEL_TYPE, WEIGHT_NAME = "imagebert", "pytorch_model.bin"
TABLE, COPY = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
DROPPED = re.compile(rf"{re.escape(COPY)}|bert\.embeddings\.position_ids")
_HEAD_KEYS = {"pretraining": "cls.predictions.bias", "rank": "rank_output.weight", "classifier": "classifier.1.weight"}


def load(path: Path, *, config=None, strict: bool, device, dtype) -> ImageBERT:
    """See `vlmfast.checkpoints.load`."""
    state = read_state(path)
    find_prefix(state, ("bert.",), "embeddings.image_location_embeddings.weight", "an ImageBERT", path)
    check_tied(state, COPY, TABLE, path)
    values = {**infer_config(state, path), **stored_fields(config, ImageBERTConfig, MODEL_TYPE, path, frozenset()),
              **_decided(state, path)}
    require_heads(values, path)
    settings = ImageBERTConfig.from_dict(values)
    return build_filled(partial(ImageBERT, settings), settings.num_hidden_layers, state, lambda key: key,
                        DROPPED.fullmatch, path, strict=strict, device=device, dtype=dtype)


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields from tensor shapes."""
    shape = shape_reader(state, path, "ImageBERT")
    return {**bert_sizes(shape, state, "bert.embeddings.", "bert."),
            "visual_feat_dim": shape("bert.embeddings.image_embeddings.weight", 2)[1]}


def _decided(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields that the tensors decide, whatever a config file says: heads, their sizes, the kind of position."""
    shape = shape_reader(state, path, "ImageBERT")
    dummy = "bert.embeddings.image_position_embeddings.weight" in state
    values = {"heads": tuple(name for name in HEADS if _HEAD_KEYS[name] in state),
              "image_position": "dummy" if dummy else "sequence"}
    if "pretraining" in values["heads"]:
        values["num_object_labels"] = shape("cls.object_classifier.weight", 2)[0]
    if "classifier" in values["heads"]:
        values["classifier_labels"], width = shape("classifier.1.weight", 2)
        values["classifier_images"] = max(width // max(shape(TABLE, 2)[1], 1), 1)
    return values


def save(model: ImageBERT, folder: Path) -> None:
    """pytorch_model.bin under our names, and config.json."""
    torch.save(plain_state(model), folder / WEIGHT_NAME)
    write_config(folder, model_type=MODEL_TYPE, **model.config.to_dict())
