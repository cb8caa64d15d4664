"""Translation of texts with their pictures."""

import pytest
import torch
from tasks.test_captioning import greedy_by_hand, train
from tasks.writer_helpers import PICTURES, REGIONS, TEXTS, TOKENIZER, seq2seq

from vlmfast.data import lxmert_boxes
from vlmfast.objectives.language import seq2seq_loss
from vlmfast.tasks import Generation, Translator

GREEDY = Generation(beams=1, max_tokens=6)
SOURCES = ["A red square.", "A blue", "square!"]


def score(model, text, picture=None):
    given = dict(input_ids=TOKENIZER(text).input_ids)
    if picture is not None and model.config.visual == "grid":
        given["image"] = model.preprocess(picture)[None]
    elif picture is not None:
        given["image_feat"] = picture.features[None]
        given["image_loc"] = lxmert_boxes(picture.boxes, picture.width, picture.height)[None]

    def scores(written):
        return model(**given, decoder_input_ids=torch.tensor([[TOKENIZER.cls, *written]])).logits["lm"][0, -1]

    return scores


@pytest.mark.parametrize("fields, images", [
    (dict(), PICTURES), (dict(fusion="gated"), PICTURES), (dict(visual="regions"), REGIONS), (dict(), None),
    (dict(visual="none"), None),
], ids=str)  # fmt: skip
def test_translations_are_the_models_predictions(fields, images):
    model = seq2seq(**fields)
    translator = Translator(model, GREEDY, batch_size=2)
    found = [list(h.tokens) for h in translator.hypotheses(SOURCES, images)]
    each = images or [None] * 3
    assert found == [greedy_by_hand(score(model, *row), 6) for row in zip(SOURCES, each, strict=True)]
    texts = translator(SOURCES, images)
    assert texts[2] == translator(SOURCES[2], each[2]) and isinstance(texts, list)


def test_the_picture_decides_where_the_source_does_not():
    """"A [MASK] square." is translated by the colour of the picture."""
    model = seq2seq(0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
    source, target = TOKENIZER(["A [MASK] square."] * 2), TOKENIZER(TEXTS[3:5]).input_ids
    labels = target[:, 1:].masked_fill(target[:, 1:] == TOKENIZER.pad, -100)
    given = dict(input_ids=source.input_ids, text_lengths=source.lengths, decoder_input_ids=target[:, :-1],
                 image=torch.stack([model.preprocess(picture) for picture in PICTURES[:2]]))
    train(lambda: seq2seq_loss(model(**given).logits["lm"], labels), model, 80)
    assert Translator(model)(["A [MASK] square."] * 2, PICTURES[:2]) == TEXTS[3:5]


def test_drawing_repeats_with_its_generator():
    translator = Translator(seq2seq(), Generation(top_p=0.95, max_tokens=8))
    first, again, other = (translator(SOURCES * 3, PICTURES * 3, generator=torch.Generator().manual_seed(seed))
                           for seed in (1, 1, 2))  # fmt: skip
    assert first == again != other


def test_wrong_input_is_named():
    translator = Translator(seq2seq())
    with pytest.raises(ValueError, match="image has 2 entries, text has 3"):
        translator(SOURCES, PICTURES[:2])
    with pytest.raises(ValueError, match="has 42 tokens, max_length is 24"):
        translator("red " * 40)
    with pytest.raises(TypeError, match="image 0: is Regions"):
        translator("A red square.", REGIONS[0])
    with pytest.raises(ValueError, match="image is given, the model reads text alone"):
        Translator(seq2seq(visual="none"))("A red square.", PICTURES[0])
    with pytest.raises(TypeError, match="Translator: model is Linear, must be ImageSeq2Seq"):
        Translator(torch.nn.Linear(1, 1))
