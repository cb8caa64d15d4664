"""Small encoder-decoders and their inputs."""

import torch
from models.two_stream_helpers import perturb

from vlmfast.models import ImageSeq2Seq, ImageSeq2SeqConfig

SIZES = dict(vocab_size=61, hidden_size=32, encoder_layers=2, decoder_layers=2, num_attention_heads=4,
             intermediate_size=40, max_position_embeddings=12, bos_token_id=2, eos_token_id=3, image_size=16,
             stem_widths=(6, 8), region_dim=20)


def tiny_seq2seq(std=0.3, **overrides) -> ImageSeq2Seq:
    return perturb(ImageSeq2Seq(ImageSeq2SeqConfig(**{**SIZES, **overrides})), std)


def seq2seq_inputs(model, batch=4, source=7, regions=5, target=8) -> dict:
    """Ragged: row i misses i source tokens and i regions at the end."""
    config, missing = model.config, torch.arange(batch)
    given = dict(input_ids=torch.randint(5, config.vocab_size, (batch, source)), text_lengths=source - missing,
                 decoder_input_ids=torch.randint(5, config.vocab_size, (batch, target)))
    if config.visual == "grid":
        given["image"] = torch.randn(batch, 3, config.image_size, config.image_size)
    if config.visual == "regions":
        given |= dict(image_feat=torch.randn(batch, regions, config.region_dim), num_regions=regions - missing)
        if config.region_loc_dim:
            given["image_loc"] = torch.rand(batch, regions, config.region_loc_dim)
    return given
