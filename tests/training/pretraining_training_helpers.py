"""A tiny UNITER or LXMERT on the toy set of regions, for the tests of pretraining."""

import torch
from data.region_text_helpers import WIDTH, tokenizer, write_set

from vlmfast.data.region_text import RegionTextPairs
from vlmfast.data.region_text_batches import RegionTextEncoder
from vlmfast.models import create
from vlmfast.objectives import Pretraining
from vlmfast.training.pretraining import PretrainingObjective, pretraining_loader

WORDS = tokenizer()
BERT = dict(vocab_size=WORDS.vocab_size, hidden_size=32, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=40)
OBJECTIVES = ("mlm", "itm", "wra", "mrfr")


def tiny_uniter(seed: int = 0, **overrides):
    torch.manual_seed(seed)
    model = create("uniter-base", **{**BERT, "num_hidden_layers": 2, "img_dim": WIDTH, "img_label_dim": 6, **overrides})
    model.tokenizer = WORDS
    return model


def toy_pairs(folder, count: int = 40) -> RegionTextPairs:
    return RegionTextPairs.open(write_set(folder, count))


def objective(names=OBJECTIVES, **options) -> PretrainingObjective:
    losses = Pretraining(names, mask_id=WORDS.mask, special_ids=(WORDS.pad, WORDS.cls, WORDS.sep, WORDS.mask))
    return PretrainingObjective(losses, **options)


def toy_loader(pairs, batch_size: int = 10, names=OBJECTIVES, **options):
    encoder = RegionTextEncoder("uniter", WORDS, 40, class_offset=1)
    return pretraining_loader(pairs, encoder, names, batch_size, **options)[0]
