"""Answers as classes: the vocabulary of frequent answers, and soft targets by how many annotators agree."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SOFT = (0.0, 0.3, 0.6, 0.9, 1.0)


def soft_score(count: int) -> float:
    """Target of an answer that `count` of ten annotators gave: 0, .3, .6, .9, and 1 from four on.

    Paper: Tips and Tricks for Visual Question Answering (Teney et al. 2018, arXiv:1708.02711); the VQA accuracy
    averaged over the subsets of nine annotators.
    """
    if count < 0:
        raise ValueError(f"soft_score: count is {count}, must not be negative")
    return _SOFT[min(count, 4)]


def plain(answer: str) -> str:
    """Lower case, outer and repeated white space removed."""
    return " ".join(answer.lower().split())


@dataclass(frozen=True)
class AnswerVocabulary:
    """The answers a classifier can give; class `i` is `answers[i]`.

    Args:
        answers: V different answers, normalised; a checkpoint's list, or those of :meth:`build`.
        normalize: applied to every answer before it is looked up, for example the VQA evaluation's normalisation.
    """

    answers: tuple[str, ...]
    normalize: Callable[[str], str] = plain

    def __post_init__(self):
        object.__setattr__(self, "answers", tuple(self.answers))
        if not self.answers:
            raise ValueError("AnswerVocabulary: no answers")
        index = {answer: i for i, answer in enumerate(self.answers)}
        if len(index) != len(self.answers):
            double = next(answer for answer, count in Counter(self.answers).items() if count > 1)
            raise ValueError(f"AnswerVocabulary: {double!r} stands there twice")
        object.__setattr__(self, "_index", index)

    @classmethod
    def build(
        cls, questions: Iterable, min_count: int = 9, normalize: Callable[[str], str] = plain
    ) -> "AnswerVocabulary":
        """The answers (field `answer`) of at least `min_count` questions, the most frequent first, then by alphabet.

        Nine on VQA v2's training and validation questions, with the evaluation's normalisation, makes the usual 3129.

        Raises:
            ValueError: no answer is that frequent.
        """
        counts = Counter(normalize(q.answer) for q in questions if q.answer is not None)
        answers = sorted((a for a, count in counts.items() if count >= min_count), key=lambda a: (-counts[a], a))
        if not answers:
            raise ValueError(f"AnswerVocabulary.build: none of {len(counts)} answers comes {min_count} times")
        return cls(tuple(answers), normalize)

    def __len__(self) -> int:
        return len(self.answers)

    def __contains__(self, answer: str) -> bool:
        return self.normalize(answer) in self._index

    def index(self, answer: str) -> int | None:
        """The class of an answer, None outside the vocabulary."""
        return self._index.get(self.normalize(answer))

    def soft_target(self, answers: Iterable[str] | Mapping[str, int]) -> Tensor:
        """[V] float32: :func:`soft_score` of each class.

        Args:
            answers: the annotators' answers, with repetitions, or answer -> count. Those outside are left out.
        """
        counts: Counter[int] = Counter()
        pairs = answers.items() if isinstance(answers, Mapping) else ((answer, 1) for answer in answers)
        for answer, count in pairs:
            label = self.index(answer)
            if label is not None:
                counts[label] += count
        target = torch.zeros(len(self))
        for label, count in counts.items():
            target[label] = soft_score(count)
        return target
