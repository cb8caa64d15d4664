"""VD-BERT: the authors' `.bin` state dicts (`v1.0_from_BERT_e30.bin` and fine-tuned ones).

Our keys are theirs. Their files state neither the head count (64 channels a head) nor the image slots: 36, or 100 where
the features go through two layers (VisDial 0.9). Segment and position tables grow as in their code where the config
asks for more rows than a file has.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.vdbert import VDBERT, VDBERTConfig
from .bert_like import bert_sizes, find_prefix, plain_state, read_state, stored_fields, write_config
from .state import build_filled, check_tied, require_heads, shape_reader

MODEL_TYPE, WEIGHT_NAME = "vdbert", "pytorch_model.bin"
TABLE, COPY = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
TYPES, POSITIONS = "bert.embeddings.token_type_embeddings.weight", "bert.embeddings.position_embeddings.weight"
# the last two are constants of the authors' losses
DROPPED = re.compile(rf"{re.escape(COPY)}|bert\.embeddings\.position_ids|crit_mask_lm_smoothed\.one_hot"
                     r"|crit_next_sent\.weight")
# in the authors' BertConfig and constructors, of training or without effect
_UNREAD = frozenset({"relax_projection", "task_idx", "fp32_embedding", "label_smoothing", "num_labels", "mask",
                     "loss_type", "drop_worst_ratio"})
NEW_TYPES = (0, 0, 0, 1)  # which row of BERT's two each further one copies


def load(path: Path, *, config=None, strict: bool, device, dtype) -> VDBERT:
    """See `vlmfast.checkpoints.load`."""
    state = read_state(path)
    find_prefix(state, ("bert.",), TABLE.removeprefix("bert."), "a VD-BERT", path)
    check_tied(state, COPY, TABLE, path)
    values = {**infer_config(state, path), **stored_fields(config, VDBERTConfig, MODEL_TYPE, path, _UNREAD),
              **_decided(state, path)}
    require_heads(values, path)
    settings = VDBERTConfig.from_dict(values)
    state = _grown(state, settings)
    return build_filled(partial(VDBERT, settings), settings.num_hidden_layers, state, lambda key: key,
                        DROPPED.fullmatch, path, strict=strict, device=device, dtype=dtype)


def infer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields from tensor shapes."""
    sizes = bert_sizes(shape_reader(state, path, "VD-BERT"), state, "bert.embeddings.", "bert.")
    return {**sizes, "len_vis_input": 100 if "vis_embed.2.weight" in state else 36}


def _decided(state: dict[str, Tensor], path: Path) -> dict:
    """Config fields that the tensors decide, whatever a config file says: heads, their sizes, how images enter."""
    shape = shape_reader(state, path, "VD-BERT")
    keys = {"mlm": "cls.predictions.bias", "nsp": "cls.seq_relationship.bias", "classifier": "classifier.1.bias"}
    values = {"heads": tuple(name for name, key in keys.items() if key in state)}
    if "vis_embed.0.weight" not in state:
        values["len_vis_input"] = 0
    else:
        values["vis_embed_layers"] = 1 + ("vis_embed.2.weight" in state)
        values["vis_feat_dim"] = shape("vis_embed.0.weight", 2)[1]
        values["vis_pe_dim"] = shape("vis_pe_embed.0.weight", 2)[1]
    if "classifier" in values["heads"]:
        values["classifier_labels"], width = shape("classifier.1.weight", 2)
        values["classifier_images"] = max(width // max(shape(TABLE, 2)[1], 1), 1)
    return values


def _grown(state: dict[str, Tensor], config: VDBERTConfig) -> dict[str, Tensor]:
    """Two segments to six, and positions repeated, where the config has more rows than the file."""
    grown = dict(state)
    if len(state[TYPES]) == 2 and config.type_vocab_size == 2 + len(NEW_TYPES):
        grown[TYPES] = torch.cat([state[TYPES], state[TYPES][list(NEW_TYPES)]])
    stored, wanted = state[POSITIONS], config.max_position_embeddings
    # a config may ask for absurdly many; the shape check names those
    if 0 < len(stored) < wanted <= 64 * len(stored):
        grown[POSITIONS] = stored[torch.arange(wanted) % len(stored)]
    return grown


def save(model: VDBERT, folder: Path) -> None:
    """pytorch_model.bin under the public names, which the authors' code reads, and config.json."""
    state = plain_state(model)
    if "mlm" in model.config.heads:
        state[COPY] = state[TABLE]
    torch.save(state, folder / WEIGHT_NAME)
    write_config(folder, model_type=MODEL_TYPE, **model.config.to_dict())
