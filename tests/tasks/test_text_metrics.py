"""BLEU, chrF and CIDEr-D against their public implementations and by hand."""

import math
import sys

import numpy as np
import pytest

from vlmfast.tasks.text_metrics import CiderD, bleu, caption_words, chrf, cider_d

REFERENCES = [
    ["a man rides a brown horse", "the man is riding a horse on the beach", "man on horse"],
    ["two dogs play in the snow", "dogs running through snow"],
    ["a plate of food on a table", "food on the plate", "some food is on a white plate on the table"],
    ["a man and a dog walk on the beach"],
]
CANDIDATES = ["a man rides a horse on the beach", "two dogs in the snow snow", "a plate", "a cat"]


@pytest.mark.oracle
def test_cider_matches_the_coco_evaluation():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    theirs = scorer.CiderScorer(n=4, sigma=6.0)
    for candidate, references in zip(CANDIDATES, REFERENCES, strict=True):
        theirs += (candidate, references)
    mean, values = theirs.compute_score()
    ours = cider_d(CANDIDATES, REFERENCES, words=str.split)
    np.testing.assert_allclose(ours.per_caption, values, rtol=1e-12)
    assert ours.value == pytest.approx(mean, rel=1e-12) and 0 < mean < 10


@pytest.mark.oracle
def test_cider_matches_the_coco_evaluation_on_random_texts():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]

    def text():
        return " ".join(rng.choice(words, int(rng.integers(1, 14))))

    references = [[text() for _ in range(int(rng.integers(1, 6)))] for _ in range(60)]
    candidates = [text() if i % 3 else references[i][0] for i in range(60)]
    theirs = scorer.CiderScorer(n=4, sigma=6.0)
    for candidate, own in zip(candidates, references, strict=True):
        theirs += (candidate, own)
    np.testing.assert_allclose(
        cider_d(candidates, references, words=str.split).per_caption, theirs.compute_score()[1], rtol=1e-10, atol=1e-12
    )


def test_cider_by_hand():
    # four pictures; unigrams "red" and "car" occur in one each, so does the bigram: cosine 1 for n = 1, 2
    score = cider_d(["red car", "x", "y", "z"], ["red car", "a", "b", "c"])
    assert score.per_caption.tolist() == pytest.approx([5.0, 0, 0, 0])  # no 3-grams, no 4-grams: 10 * 2 / 4
    assert score.value == pytest.approx(1.25)
    assert score.standard_error == pytest.approx(5 * math.sqrt(0.25 * 0.75 * 4 / 3) / 2)
    # clipping: "red red red" against "red": min(3, 1) * 1 / (3 * 1) = 1/3, lengths in bigrams differ by 2
    value = cider_d(["red red red", "x"], ["red", "a"]).per_caption[0]
    assert value == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72))


def test_cider_of_a_corpus_serves_single_texts():
    corpus = CiderD(REFERENCES)
    together = corpus.score(CANDIDATES, REFERENCES)
    single = [corpus.score([c], [r]).value for c, r in zip(CANDIDATES, REFERENCES, strict=True)]
    np.testing.assert_allclose(together.per_caption, single)
    np.testing.assert_allclose(together.per_caption, cider_d(CANDIDATES, REFERENCES).per_caption)
    assert math.isnan(corpus.score(["a dog"], ["a dog"]).standard_error)


def test_caption_words_ignore_case_and_punctuation():
    assert caption_words("A man's dog, 3.5 m — isn't it?!") == ["a", "man's", "dog", "3.5", "m", "isn't", "it"]
    assert caption_words("Eine Straßenküche.") == ["eine", "straßenküche"]
    assert cider_d(["A Red Car!", "x"], ["a red car.", "y"]).per_caption[0] == pytest.approx(7.5)


def test_metrics_check_their_arguments():
    with pytest.raises(ValueError, match="references has 2 rows, candidates has 1"):
        cider_d(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="CiderD: references has 1 pictures, must have 2"):
        cider_d(["a"], ["a"])
    with pytest.raises(ValueError, match="row 1 has no reference"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="bleu: there are no texts"):
        bleu([], [])


def test_bleu_equals_sacrebleus_formula():
    pytest.importorskip("sacrebleu")
    # by hand: 5 of 6 unigrams, 3 of 5 bigrams, lengths 6 and 6
    score = bleu(["the cat sat on a mat"], ["the cat sat on the mat"], max_order=2)
    assert score.precisions == pytest.approx((100 * 5 / 6, 100 * 3 / 5)) and score.brevity_penalty == 1
    assert score.value == pytest.approx(100 * math.sqrt(5 / 6 * 3 / 5)) and score.name == "BLEU-2"
    assert "tok:13a" in score.signature and "version:" in score.signature and str(score).startswith("BLEU-2 70.7")
    short = bleu(["the cat sat"], ["the cat sat on the mat"], max_order=2)
    assert short.brevity_penalty == pytest.approx(math.exp(1 - 6 / 3)) and short.value == pytest.approx(
        100 * short.brevity_penalty
    )


def test_bleu_takes_several_and_unequal_references():
    sacrebleu = pytest.importorskip("sacrebleu")
    score = bleu(CANDIDATES, REFERENCES)
    padded = [[own[k] if k < len(own) else None for own in REFERENCES] for k in range(3)]
    assert score.value == pytest.approx(sacrebleu.corpus_bleu(CANDIDATES, padded).score) and 0 < score.value < 100
    assert bleu(["b c d e f", "a b c d e"], [["x", "b c d e f"], ["a b c d e"]]).value == pytest.approx(100)
    assert bleu(["A B C D"], ["a b c d"]).value == 0 and bleu(["A B C D"], ["a b c d"], lowercase=True).value > 99


def test_chrf_equals_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    one = [own[0] for own in REFERENCES]
    assert chrf(CANDIDATES, one).value == pytest.approx(sacrebleu.corpus_chrf(CANDIDATES, [one]).score)
    assert chrf(CANDIDATES, one).name == "chrF2" and chrf(CANDIDATES, one, word_order=2).name == "chrF2++"
    assert chrf(["abc"], ["abc"]).value == pytest.approx(100)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'vlmfast\[metrics\]'"):
        bleu(["a"], ["a"])
