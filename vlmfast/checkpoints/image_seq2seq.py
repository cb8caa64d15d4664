"""Image-conditioned encoder-decoders: folders written by `save_pretrained`; there are no public weights."""

from functools import partial
from pathlib import Path

from ..models.image_seq2seq import ImageSeq2Seq, ImageSeq2SeqConfig
from .bert_like import plain_state, read_state, stored_fields, write_config
from .state import build_filled

MODEL_TYPE, WEIGHT_NAME = "image_seq2seq", "model.safetensors"


def load(path: Path, *, config=None, strict: bool, device, dtype) -> ImageSeq2Seq:
    """See `vlmfast.checkpoints.load`."""
    state = read_state(path)
    fields = stored_fields(config, ImageSeq2SeqConfig, MODEL_TYPE, path, frozenset())
    if not fields:
        raise ValueError(f"{path}: sizes are unknown; pass config= or put config.json beside it")
    settings = ImageSeq2SeqConfig.from_dict(fields)
    return build_filled(partial(ImageSeq2Seq, settings), settings.encoder_layers + settings.decoder_layers, state,
                        lambda key: key, lambda key: False, path, strict=strict, device=device, dtype=dtype)


def save(model: ImageSeq2Seq, folder: Path) -> None:
    """model.safetensors under our names, and config.json."""
    from safetensors.torch import save_file

    save_file(plain_state(model), folder / WEIGHT_NAME, metadata={"format": "pt"})
    write_config(folder, model_type=MODEL_TYPE, **model.config.to_dict())
