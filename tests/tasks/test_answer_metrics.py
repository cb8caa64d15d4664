"""Metrics of answers on examples worked out by hand."""

import pytest

from vlmfast.tasks import accuracy, nlvr2_consistency, normalize_answer, vqa_accuracy, vqa_score


@pytest.mark.parametrize("answer, wanted", [
    ("Yes", "yes"), ("  the\tred\ncat ", "red cat"), ("Two", "2"), ("none", "0"), ("ten dogs", "10 dogs"),
    ("eleven", "eleven"), ("dont know", "don't know"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
    ("somebody'd", "somebodyd"), ("oclock", "o'clock"), ("its", "its"), ("wed", "wed"), ("she'd", "she'd"),
    ("black-white", "black white"), ("black - white", "black white"), ("yes, it is!", "yes it is"),
    ("red,blue", "red blue"), ("1,000", "1000"), ("1,000 a/b", "1000 ab"), ("3.5", "3.5"), ("mr. x.", "mr x"),
    ("u.s.a", "usa"), ("$5", "$5"), ("what: it's", "what: it's"), ("a", ""), ("", ""),
])
def test_normalisation_is_the_official_one(answer, wanted):
    assert normalize_answer(answer) == wanted


def test_vqa_score_leaves_each_person_out():
    def people(yes):
        return ["yes"] * yes + [f"other {i}" for i in range(10 - yes)]

    # by hand: of ten people k agree; leaving out one that agrees leaves k - 1 matches
    for agree, wanted in ((0, 0.0), (1, 9 / 30), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1.0),
                          (10, 1.0)):
        assert vqa_score("Yes", people(agree)) == pytest.approx(wanted), agree
    assert vqa_score("the 2", ["two", "2.", "Two", "two", "3"]) == 1.0
    assert vqa_accuracy(["yes", "no"], [people(10), people(10)]) == 0.5
    assert vqa_score("yes", ["yes"]) == 0.0


def test_accuracy_and_consistency_by_hand():
    assert accuracy(["a", "b", "c", "c"], ["a", "b", "a", "b"]) == 0.5
    answers, truth = [True, False, True, True, False], [True, False, True, False, False]
    statements = ["x", "y", "x", "y", "z"]
    assert accuracy(answers, truth) == 0.8
    assert nlvr2_consistency(answers, truth, statements) == pytest.approx(2 / 3)
    assert nlvr2_consistency(answers[::-1], truth[::-1], statements[::-1]) == pytest.approx(2 / 3)


def test_wrong_lengths_are_refused():
    for call in (lambda: accuracy(["a"], []), lambda: accuracy([], []), lambda: vqa_accuracy(["a"], []),
                 lambda: nlvr2_consistency([True], [True], [])):
        with pytest.raises(ValueError, match="must be as many, at least one"):
            call()
    with pytest.raises(ValueError, match="references is empty"):
        vqa_score("yes", [])
    with pytest.raises(TypeError, match="references is one string"):
        vqa_score("yes", "yes")
