"""Small models that write, with a vocabulary, pictures and regions."""

import torch
from models.seq2seq_helpers import tiny_seq2seq
from models.two_stream_helpers import perturb
from PIL import Image

from vlmfast.data import Regions, WordPieceTokenizer
from vlmfast.models import UNITER, VDBERT, UNITERConfig, VDBERTConfig

TEXTS = ["A red square.", "A blue square.", "A big green square!", "Ein rotes Quadrat.", "Ein blaues Quadrat."]
TOKENIZER = WordPieceTokenizer.train(TEXTS * 2, 90, lowercase=False, max_length=24)
BERT = dict(vocab_size=TOKENIZER.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=40, max_position_embeddings=24)


def with_words(model):
    model.tokenizer = TOKENIZER
    return model.eval()


def seq2seq(std=0.3, **overrides):
    sizes = dict(vocab_size=TOKENIZER.vocab_size, bos_token_id=TOKENIZER.cls, eos_token_id=TOKENIZER.sep,
                 max_position_embeddings=24)
    return with_words(tiny_seq2seq(std, **{**sizes, **overrides}))


def vdbert(std=0.3, **overrides):
    sizes = dict(len_vis_input=5, vis_feat_dim=20, mask_word_id=TOKENIZER.mask)
    return with_words(perturb(VDBERT(VDBERTConfig(**{**BERT, **sizes, **overrides})), std))


def uniter(std=0.3, **overrides):
    return with_words(perturb(UNITER(UNITERConfig(**{**BERT, "img_dim": 20, **overrides})), std))


def regions(seed: int, count: int) -> Regions:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 10], 1)
    return Regions(f"img{seed}", torch.randn(count, 20, generator=generator), boxes, 80, 60,
                   classes=torch.arange(count), confidences=torch.full((count,), 0.5),
                   attributes=torch.zeros(count, dtype=torch.long),
                   attribute_confidences=torch.full((count,), 0.5))


def square(color, size=(30, 20)) -> Image.Image:
    return Image.new("RGB", size, color)


PICTURES = [square("red"), square("blue"), square("green", (10, 40))]
REGIONS = [regions(0, 5), regions(1, 3), regions(2, 4)]
