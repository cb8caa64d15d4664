"""Copies of models with other settings: how a pretrained one gets the head it is fine-tuned with."""

import torch
from torch import nn


def adapted(model: nn.Module, *, new_types: tuple[int, ...] = (), new_words: int = 0, **changes) -> nn.Module:
    """A copy to fine-tune: config fields changed, every tensor both models have copied, the rest new.

    Args:
        model: has `config`, `tokenizer` and perhaps `inherited(state)`, what heads it lacks start as, by our keys.
        new_types: for each new row of the segment table the row it starts as.
        new_words: how many rows the word table grows by.
        changes: config fields, for example heads=("vqa",).

    Raises:
        ValueError: unknown fields, or a tensor of both models whose shapes differ.
    """
    config = model.config.to_dict() | changes
    config["type_vocab_size"] += len(new_types)
    config["vocab_size"] += new_words
    copy = type(model)(type(model.config).from_dict(config)).to(next(model.parameters()))
    new, old = copy.state_dict(), model.state_dict()
    if hasattr(model, "inherited"):
        old |= {key: value for key, value in model.inherited(old).items() if key not in old}
    with torch.no_grad():
        for key in new.keys() & old.keys():
            value = old[key]
            if key.endswith("token_type_embeddings.weight") and new_types:
                value = torch.cat([value, value[list(new_types)]])
            if value.shape[1:] != new[key].shape[1:] or len(value) > len(new[key]):
                raise ValueError(f"adapted: {key} is {list(value.shape)}, the new model's {list(new[key].shape)}")
            new[key][: len(value)] = value
    copy.tokenizer = model.tokenizer
    if hasattr(model, "preprocess"):
        copy.preprocess = model.preprocess
    return copy.train(model.training)
