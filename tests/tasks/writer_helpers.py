"""Small models that write, with a vocabulary, pictures and regions."""

import torch
from models.seq2seq_helpers import tiny_seq2seq
from models.two_stream_helpers import perturb
from PIL import Image

from vlmfast.data import Regions, WordPieceTokenizer, uniter_boxes, vd_bert_boxes
from vlmfast.models import UNITER, VDBERT, ImageSeq2Seq, UNITERConfig, VDBERTConfig
from vlmfast.objectives import Pretraining, PretrainingBatch

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


def seq2seq_objective() -> Pretraining:
    return Pretraining(["seq2seq"], mask_id=TOKENIZER.mask, random_ids=(5, TOKENIZER.vocab_size),
                       generator=torch.Generator().manual_seed(0))


def caption_batch(model, pictures, texts) -> PretrainingBatch:
    """Captions to learn, written out from the models' sequences."""
    if isinstance(model, ImageSeq2Seq):
        return PretrainingBatch(image=torch.stack([model.preprocess(one) for one in pictures]),
                                target_ids=target_ids(texts))
    given = [TOKENIZER.cls, *[TOKENIZER.unk] * 5, TOKENIZER.sep] if isinstance(model, VDBERT) else [TOKENIZER.cls]
    rows = [torch.tensor([*given, *TOKENIZER.encode(text), TOKENIZER.sep]) for text in texts]
    boxes = [vd_bert_boxes(one.boxes, one.classes, one.confidences) if isinstance(model, VDBERT)
             else uniter_boxes(one.boxes, one.width, one.height) for one in pictures]
    counts = torch.tensor([len(one.features) for one in pictures])
    assert counts.max() == 5  # VD-BERT's slots
    pad = torch.nn.utils.rnn.pad_sequence
    return PretrainingBatch(pad(rows, True), pad([one.features for one in pictures], True), pad(boxes, True),
                            text_lengths=torch.tensor([len(row) for row in rows]), num_regions=counts,
                            prefix_lengths=torch.full((len(rows),), len(given)))


def translation_batch(model, sources, pictures, texts) -> PretrainingBatch:
    source = TOKENIZER(sources)
    image = None if pictures is None else torch.stack([model.preprocess(one) for one in pictures])
    return PretrainingBatch(source.input_ids, text_lengths=source.lengths, image=image, target_ids=target_ids(texts))


def target_ids(texts) -> torch.Tensor:
    ids = TOKENIZER(texts).input_ids
    return ids.masked_fill(ids == TOKENIZER.pad, -100)
