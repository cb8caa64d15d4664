"""Captions of every kind of model that writes them."""

import pytest
import torch
from PIL import Image
from tasks.writer_helpers import PICTURES, REGIONS, TEXTS, TOKENIZER, seq2seq, square, uniter, vdbert

from vlmfast.data import uniter_boxes, vd_bert_boxes
from vlmfast.objectives import Pretraining
from vlmfast.objectives.batch import PretrainingBatch
from vlmfast.objectives.language import seq2seq_loss
from vlmfast.tasks import Captioner, Generation, join_words

GREEDY = Generation(beams=1, max_tokens=6)


@torch.no_grad()
def greedy_by_hand(score, most: int) -> list[int]:
    """Argmax, without the tokens that are no words; `score(written)` are logits [V] of what follows."""
    written: list[int] = []
    while len(written) < most:
        logits = score(written).clone()
        logits[[TOKENIZER.pad, TOKENIZER.unk, TOKENIZER.cls, TOKENIZER.mask]] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] == TOKENIZER.sep:
            return written[:-1]
    return written


def decoder_score(model, picture):
    image = model.preprocess(picture)[None]

    def score(written):
        ids = torch.tensor([[TOKENIZER.cls, *written]])
        return model(image=image, decoder_input_ids=ids).logits["lm"][0, -1]

    return score


def vdbert_score(model, picture):
    """The sequence of training: [CLS] slots [SEP] text [MASK], the text behind the prefix causal."""
    count = len(picture.features)
    feat, loc = torch.zeros(1, 5, 20), torch.zeros(1, 5, 7)
    feat[0, :count] = picture.features
    loc[0, :count] = vd_bert_boxes(picture.boxes, picture.classes, picture.confidences)

    def score(written):
        ids = torch.tensor([[TOKENIZER.cls, *[TOKENIZER.unk] * 5, TOKENIZER.sep, *written, TOKENIZER.mask]])
        output = model(ids, feat, loc, num_regions=torch.tensor([count]), prefix_lengths=torch.tensor([7]))
        return output.logits["mlm"][0, -1]

    return score


def uniter_score(model, picture):
    loc = uniter_boxes(picture.boxes, picture.width, picture.height)[None]

    def score(written):
        ids = torch.tensor([[TOKENIZER.cls, *written, TOKENIZER.mask]])
        return model(ids, picture.features[None], loc, prefix_lengths=torch.tensor([0])).logits["mlm"][0, -1]

    return score


@pytest.mark.parametrize("build, score, images", [
    (seq2seq, decoder_score, PICTURES), (vdbert, vdbert_score, REGIONS), (uniter, uniter_score, REGIONS),
], ids=["seq2seq", "vdbert", "uniter"])  # fmt: skip
def test_captions_are_what_the_training_mask_predicts(build, score, images):
    model = build()
    captioner = Captioner(model, GREEDY, batch_size=2)
    found = captioner.hypotheses(images)
    wanted = [greedy_by_hand(score(model, image), 6) for image in images]
    assert [list(hypothesis.tokens) for hypothesis in found] == wanted
    assert len({round(hypothesis.log_probability, 3) for hypothesis in found}) == 3  # the picture matters
    texts = captioner(images)
    assert texts == [join_words(TOKENIZER.decode(tokens).removeprefix("##")) for tokens in wanted]
    assert captioner(images[1]) == texts[1]


@pytest.mark.parametrize("build, images", [(seq2seq, PICTURES), (vdbert, REGIONS), (uniter, REGIONS)])
def test_beams_find_texts_at_least_as_probable_and_nucleus_draws(build, images):
    model = build()
    greedy = Captioner(model, GREEDY).hypotheses(images)
    beams = Captioner(model, Generation(beams=30, max_tokens=6, length_penalty=0.0)).hypotheses(images)
    assert all(b.log_probability >= g.log_probability - 1e-5 for b, g in zip(beams, greedy, strict=True))
    draw = Captioner(model, Generation(top_p=0.99, max_tokens=6))
    first, again, other = (draw(images * 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == again != other
    narrow = Captioner(model, Generation(top_p=1e-6, max_tokens=6))  # a nucleus of one token is greedy
    assert narrow(images) == Captioner(model, GREEDY)(images)


def train(loss, model, steps=120, lr=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()


def test_a_trained_decoder_writes_the_captions():
    model = seq2seq(0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
    ids = TOKENIZER(TEXTS[:3]).input_ids
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == TOKENIZER.pad, -100)
    image = torch.stack([model.preprocess(picture) for picture in PICTURES])
    train(lambda: seq2seq_loss(model(image=image, decoder_input_ids=ids[:, :-1]).logits["lm"], labels), model, 60)
    assert Captioner(model)(PICTURES) == TEXTS[:3]
    # what is transparent is read as white
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    captioner = Captioner(model, GREEDY)
    assert captioner.hypotheses([clear])[0] == captioner.hypotheses([square("white")])[0]


def test_a_masked_language_model_trained_on_captions_writes_them():
    """VD-BERT's sequence through `Pretraining(["seq2seq"])`, then `Captioner`."""
    model = vdbert(0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
    tokens = [[TOKENIZER.cls, *[TOKENIZER.unk] * 5, TOKENIZER.sep, *TOKENIZER.encode(text), TOKENIZER.sep]
              for text in TEXTS[:2]]
    lengths = torch.tensor([len(row) for row in tokens])
    ids = torch.zeros(2, int(lengths.max()), dtype=torch.long)
    for row, own in zip(ids, tokens, strict=True):
        row[: len(own)] = torch.tensor(own)
    feat = torch.stack([torch.nn.functional.pad(r.features, (0, 0, 0, 5 - len(r.features))) for r in REGIONS[:2]])
    loc = torch.stack([torch.nn.functional.pad(vd_bert_boxes(r.boxes, r.classes, r.confidences),
                                               (0, 0, 0, 5 - len(r.features))) for r in REGIONS[:2]])  # fmt: skip
    batch = PretrainingBatch(ids, feat, loc, text_lengths=lengths, num_regions=torch.tensor([5, 3]),
                             prefix_lengths=torch.tensor([7, 7]))
    generator = torch.Generator().manual_seed(0)
    objective = Pretraining(["seq2seq"], mask_id=TOKENIZER.mask, random_ids=(5, TOKENIZER.vocab_size),
                            generator=generator)
    train(lambda: objective(model, batch).total, model, 300)
    assert Captioner(model)(REGIONS[:2]) == TEXTS[:2]


def test_an_evaluation_leaves_the_model_as_it_was():
    model = seq2seq().train()
    Captioner(model, GREEDY)(PICTURES)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_wrong_models_and_inputs_are_named():
    with pytest.raises(TypeError, match="Captioner: model is Linear, must be ImageSeq2Seq or VDBERT or UNITER"):
        Captioner(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="has no 'mlm' head"):
        Captioner(uniter(heads=("itm",)))
    with pytest.raises(ValueError, match="fusion is 'gated'"):
        Captioner(seq2seq(fusion="gated"))
    with pytest.raises(ValueError, match="visual is 'none'"):
        Captioner(seq2seq(visual="none"))
    with pytest.raises(ValueError, match="tokenizer has 45 tokens, the model only 40".replace("45", str(
            TOKENIZER.vocab_size))):
        Captioner(seq2seq(vocab_size=40))
    bare = seq2seq()
    bare.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer is None"):
        Captioner(bare)
    with pytest.raises(TypeError, match="image 0: is Regions, must be a picture"):
        Captioner(seq2seq())(REGIONS[0])
    with pytest.raises(ValueError, match="have 20 values, the model takes 11"):
        Captioner(uniter(img_dim=11))(REGIONS)
    for fields, text in ((dict(beams=0), "beams is 0"), (dict(top_p=0.0), "top_p is 0.0"),
                         (dict(max_tokens=-1), "max_tokens is -1")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Generation(**fields)


def test_texts_are_no_longer_than_the_model():
    captioner = Captioner(seq2seq(max_position_embeddings=9), Generation(max_tokens=500))
    assert captioner.generation.max_tokens == 7
    assert all(len(hypothesis.tokens) <= 7 for hypothesis in captioner.hypotheses(PICTURES))


@pytest.mark.parametrize("text", [
    "A US 1-cent piece (0,01 $), called »Penny«.", "Don't! It’s “nice”, isn't it?", "1,000 cats; 6:30 and $5.50.",
    'A "quoted" word.', "Eine 5-Cent-Münze der USA. Sie wird »Nickel« genannt.", "„Hallo“ (ja)", "Left: 2 (right).",
])  # fmt: skip
def test_joined_words_are_the_text_that_was_split(text):
    from vlmfast.data import WordPieceTokenizer

    tokenizer = WordPieceTokenizer.train([text], 200, lowercase=False, min_frequency=1)
    split = tokenizer.decode(tokenizer.encode(text))
    assert split != text and join_words(split) == text
