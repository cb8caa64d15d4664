"""Models without public weights: folders of `save_pretrained`, config.json beside tensors under our own names."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from ..models.config import ModelConfig
from ..models.image_seq2seq import ImageSeq2Seq, ImageSeq2SeqConfig
from ..models.vlnbert import VLNBERT, VLNBERTConfig
from .bert_like import plain_state, read_state, stored_fields, write_config
from .state import build_filled

WEIGHT_NAME = "model.safetensors"


@dataclass(frozen=True)
class Own:
    """Reader and writer of one model.

    Attributes:
        model, config: its classes.
        model_type: in config.json.
        key: part of a tensor name that no other model's files have.
        layers: of a config, how many layers the model has.
    """

    model: type[nn.Module]
    config: type[ModelConfig]
    model_type: str
    key: bytes
    layers: Callable[[ModelConfig], int]

    def load(self, path: Path, *, config=None, strict: bool, device, dtype) -> nn.Module:
        """See `vlmfast.checkpoints.load`."""
        state = read_state(path)
        fields = stored_fields(config, self.config, self.model_type, path, frozenset())
        if not fields:
            raise ValueError(f"{path}: sizes are unknown; pass config= or put config.json beside it")
        settings = self.config.from_dict(fields)
        return build_filled(partial(self.model, settings), self.layers(settings), state, lambda key: key,
                            lambda key: False, path, strict=strict, device=device, dtype=dtype)

    def save(self, model: nn.Module, folder: Path) -> None:
        """model.safetensors under our names, and config.json."""
        from safetensors.torch import save_file

        save_file(plain_state(model), folder / WEIGHT_NAME, metadata={"format": "pt"})
        write_config(folder, model_type=self.model_type, **model.config.to_dict())


OWN = (
    Own(ImageSeq2Seq, ImageSeq2SeqConfig, "image_seq2seq", b"decoder.0.cross_attention.",
        lambda config: config.encoder_layers + config.decoder_layers),
    Own(VLNBERT, VLNBERTConfig, "vlnbert", b"reading.0.attention.",
        lambda config: config.num_hidden_layers + config.num_cross_layers),
)
