"""What the readers and writers of the single-stream models share."""

import json
from dataclasses import fields
from pathlib import Path

from torch import Tensor, nn

from .files import find_weights, read_json, read_tensors
from .huggingface import CONFIG_NAME, WEIGHT_NAMES, read_shards
from .state import count_layers, plain_names


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or of the weights in a folder, without `module.` and with LayerNorm's new names."""
    weights = find_weights(path, WEIGHT_NAMES) if path.is_dir() else path
    return plain_names(read_shards(weights) if weights.suffix == ".json" else read_tensors(weights))


def find_prefix(state: dict[str, Tensor], prefixes: tuple[str, ...], table: str, kind: str, path: Path) -> str:
    """The first of `prefixes` under which `table` lies; ValueError where there is none."""
    for prefix in prefixes:
        if prefix + table in state:
            return prefix
    raise ValueError(f"{path}: not {kind} checkpoint: {prefixes[0]}{table} is missing")


def bert_sizes(shape, state: dict[str, Tensor], tables: str, trunk: str) -> dict:
    """Config fields of the BERT whose embedding tables lie under `tables` and whose encoder lies under `trunk`.

    The head count is that of 64 channels a head, as in all public models, else 0.
    """
    vocab_size, hidden = shape(f"{tables}word_embeddings.weight", 2)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": count_layers(state, f"{trunk}encoder.layer."),
        "num_attention_heads": hidden // 64 if hidden % 64 == 0 else 0,
        "intermediate_size": shape(f"{trunk}encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": shape(f"{tables}position_embeddings.weight", 2)[0],
        "type_vocab_size": shape(f"{tables}token_type_embeddings.weight", 2)[0],
    }


def stored_fields(config, config_class: type, model_type: str, path: Path, unread: frozenset[str] | None) -> dict:
    """Fields of the given config, or of config.json beside the weights where that is this model's, else none.

    Args:
        config: None, a config object, the content of a JSON file or its path.
        model_type: what the file must say, if it says anything.
        unread: fields that are accepted and ignored; None: all unknown ones, as in transformers' files.

    Raises:
        ValueError: another model's configuration, or unknown fields.
    """
    if isinstance(config, config_class):
        return config.to_dict()
    source, content = "config", config
    if not isinstance(config, dict):
        folder = path if path.is_dir() else path.parent
        source = Path(config) if config is not None else folder / CONFIG_NAME
        if config is None and not source.is_file():
            return {}
        content = read_json(source)
        if config is None and not path.is_dir() and content.get("model_type") != model_type:
            return {}  # some other model's
    if content.get("model_type", model_type) != model_type:
        raise ValueError(f"{source}: model_type is {content['model_type']!r}, must be {model_type!r}")
    known = {entry.name for entry in fields(config_class)}
    unknown = sorted(set(content) - known - {"model_type", "architectures", "torch_dtype", "dtype"})
    if unread is not None and (wrong := [name for name in unknown if name not in unread]):
        raise ValueError(f"{source}: has unknown fields {', '.join(wrong)}")
    return {name: value for name, value in content.items() if name in known}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def write_config(folder: Path, **content) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
