"""VL-BERT: the authors' `.model` files, pretrained and fine-tuned.

Our keys are theirs. The CNN of their end-to-end models is left out: features come precomputed. Their files do not state
the head count; it is 64 channels a head, as in both public models.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.vlbert import HEADS, OBJECT_CLASSES, VLBERT, VLBERTConfig
from .bert_like import bert_sizes, find_prefix, plain_state, read_state, stored_fields, write_config
from .state import build_filled, check_tied, require_heads, shape_reader

MODEL_TYPE, WEIGHT_NAME = "vlbert", "pytorch_model.bin"
TABLE, COPY = "vlbert.word_embeddings.weight", "vlbert.mlm_head.predictions.decoder.weight"
WORDS, FEATURE = "object_mask_word_embedding.weight", "object_mask_visual_embedding.weight"
DOWN = "image_feature_extractor.obj_downsample.1.weight"
# the CNN, once registered twice; mask embeddings that no head of a file reads
DROPPED = re.compile(rf"{re.escape(COPY)}|image_feature_extractor\.(backbone|roi_head_feature_extractor|head)\..*"
                     rf"|{re.escape(WORDS)}|{re.escape(FEATURE)}")
# in the public YAML files; the first must be what every public model has
_FIXED = {"obj_pos_id_relative": True, "word_embedding_frozen": False}
_UNREAD = frozenset({*_FIXED, "from_scratch", "pos_embedding_frozen", "position_padding_idx"})
_HEAD_KEYS = {"mlm": "vlbert.mlm_head.predictions.bias", "mvrc": "vlbert.mvrc_head.region_cls_pred.bias",
              "relationship": "vlbert.relationsip_head.caption_image_relationship.bias", "vqa": "vqa_mlp.2.bias",
              "referring": "referring_mlp.2.bias", "vcr": "vcr_mlp.1.bias", "objects": "cnn_loss_reg.2.bias",
              "classifier": "classifier.1.bias"}
_TASKS = ("vqa", "referring", "vcr")  # each is `final_mlp` in the authors' task models


def load(path: Path, *, config=None, strict: bool, device, dtype) -> VLBERT:
    """See `vlmfast.checkpoints.load`."""
    state = {re.sub(r"^vlbert\._module\.", "vlbert.", key): value for key, value in read_state(path).items()}
    find_prefix(state, ("vlbert.",), "end_embedding.weight", "a VL-BERT", path)
    check_tied(state, COPY, TABLE, path)
    state = _task_names(state)
    values = {**infer_config(state, path), **_stored(config, path), **_decided(state, path)}
    require_heads(values, path)
    settings = VLBERTConfig.from_dict(values)
    return build_filled(partial(VLBERT, settings), settings.num_hidden_layers, state, lambda key: key,
                        DROPPED.fullmatch, path, strict=strict, device=device, dtype=dtype)


def _task_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`final_mlp` under the name of its task: only VQA's has a LayerNorm, only VCR's no transform."""
    if "final_mlp.0.LayerNorm.weight" in state:
        name = "vqa"
    else:
        name = "referring" if "final_mlp.0.dense.weight" in state else "vcr"
    return {re.sub(r"^final_mlp\.", f"{name}_mlp.", key): value for key, value in state.items()}


def _stored(config, path: Path) -> dict:
    """Fields of a flat configuration, or of the parts NETWORK.VLBERT of one like the public YAML files."""
    if not isinstance(config, dict):
        return stored_fields(config, VLBERTConfig, MODEL_TYPE, path, frozenset())
    network = config.get("NETWORK", config)
    values = dict(network.get("VLBERT", network)) | {name: config[name] for name in ("coord_dim", "image_feat_dim")
                                                     if name in config}
    for name, must in _FIXED.items():
        if values.get(name, must) != must:
            raise ValueError(f"config: {name} is {values[name]!r}, must be {must}")
    if "position_padding_idx" in values:
        values["first_position"] = values["position_padding_idx"] + 1
    return stored_fields(values, VLBERTConfig, MODEL_TYPE, path, _UNREAD)


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields from tensor shapes."""
    shape = shape_reader(state, path, "VL-BERT")
    visual_size, width = shape(DOWN, 2)
    features = shape(FEATURE, 2)[1] if FEATURE in state else width - 8 * 256
    return {**bert_sizes(shape, state, "vlbert.", "vlbert."), "visual_size": visual_size,
            "image_feat_dim": features, "coord_dim": (width - features) // 8}


def _decided(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields that the tensors decide, whatever a config file says: heads, their sizes, optional modules."""
    shape = shape_reader(state, path, "VL-BERT")
    heads = tuple(name for name in HEADS if _HEAD_KEYS[name] in state)
    words = shape("object_linguistic_embeddings.weight", 2)[0]
    values = {
        "heads": heads,
        "with_pooler": "vlbert.pooler.dense.weight" in state,
        "visual_ln": "vlbert.visual_scale_text" not in state,
        "object_word_embed_mode": 1 if words == OBJECT_CLASSES else 2,
        "text_only": "aux_text_visual_embedding.weight" in state,
        "image_feat_precomputed": FEATURE in state or "mvrc" not in heads,
    }
    if "mvrc" in heads:
        values["visual_region_classes"] = shape("vlbert.mvrc_head.region_cls_pred.weight", 2)[0]
    if "vqa" in heads:
        values["vqa_labels"] = shape("vqa_mlp.2.weight", 2)[0]
    if "classifier" in heads:
        values["classifier_labels"], width = shape("classifier.1.weight", 2)
        values["classifier_images"] = max(width // max(shape(TABLE, 2)[1], 1), 1)
    return values


def save(model: VLBERT, folder: Path) -> None:
    """pytorch_model.bin with the public names under "state_dict", as the authors' code reads it, and config.json."""
    state = plain_state(model)
    if "mlm" in model.config.heads:
        state[COPY] = state[TABLE]
    tasks = [name for name in _TASKS if name in model.config.heads]
    if len(tasks) == 1:
        state = {re.sub(rf"^{tasks[0]}_mlp\.", "final_mlp.", key): value for key, value in state.items()}
    torch.save({"state_dict": state}, folder / WEIGHT_NAME)
    write_config(folder, model_type=MODEL_TYPE, **model.config.to_dict())
