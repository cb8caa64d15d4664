"""Metrics of question answering and reasoning tasks."""

import re
from collections.abc import Hashable, Sequence

# each is put right where one of its apostrophes is missing
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _misspellings(right: str) -> list[str]:
    return [right[:i] + right[i + 1 :] for i, character in enumerate(right) if character == "'"]


# the last one is an oddity of the official table
_CORRECTED = {wrong: right for right in _CONTRACTIONS for wrong in _misspellings(right)} | {"somebody'd": "somebodyd"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")


def normalize_answer(answer: str) -> str:
    """An answer as the official VQA evaluation compares it.

    Punctuation becomes a space, or nothing where it stands beside one or where a number has thousands separators;
    periods go except in decimals; number words up to ten become digits, articles go, and contractions get their
    apostrophe.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = _THOUSANDS.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or thousands else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    return " ".join(_CORRECTED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """Agreement of an answer with people's: min(matches / 3, 1), averaged over leaving each person out.

    VQA (Antol et al. 2015, arXiv:1505.00468), with the normalisation of the official evaluation on both sides.

    Args:
        answer: the model's. references: what (ten) people answered, repeats included.

    Raises:
        TypeError: `references` is one string. ValueError: there is none.
    """
    if isinstance(references, str):
        raise TypeError("vqa_score: references is one string, must be the list of what people answered")
    if not references:
        raise ValueError("vqa_score: references is empty, must be what people answered")
    wanted = normalize_answer(answer)
    matches = [normalize_answer(reference) == wanted for reference in references]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean of `vqa_score` over questions.

    Raises:
        ValueError: no question, or another number of references than of answers.
    """
    _check("vqa_accuracy", answers, references)
    return sum(map(vqa_score, answers, references)) / len(answers)


def accuracy(answers: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Share of equal entries (GQA, VCR, NLVR2, entailment).

    Raises:
        ValueError: none, or not as many.
    """
    _check("accuracy", answers, truth)
    return sum(answer == true for answer, true in zip(answers, truth, strict=True)) / len(answers)


def nlvr2_consistency(answers: Sequence[bool], truth: Sequence[bool], statements: Sequence[Hashable]) -> float:
    """Share of statements that are judged right for every pair of pictures they come with (arXiv:1811.00491).

    Args:
        answers, truth: of each example. statements: what tells examples of the same statement, its text for instance.

    Raises:
        ValueError: none, or not as many.
    """
    _check("nlvr2_consistency", answers, truth)
    _check("nlvr2_consistency", answers, statements, "statements")
    right: dict[Hashable, bool] = {}
    for answer, true, statement in zip(answers, truth, statements, strict=True):
        right[statement] = right.get(statement, True) and bool(answer) == bool(true)
    return sum(right.values()) / len(right)


def _check(where: str, answers: Sequence, others: Sequence, name: str = "truth") -> None:
    if len(answers) != len(others) or not len(answers):
        raise ValueError(f"{where}: answers has {len(answers)} entries, {name} has {len(others)}; must be as many, at "
                         "least one")
