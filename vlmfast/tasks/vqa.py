"""Questions about a picture, answered from a list of answers (VQA, arXiv:1505.00468; GQA, arXiv:1902.09506)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..models.lxmert import LXMERT
from ..models.vilbert import ViLBERT
from .answers import read_answers
from .two_stream import PairAttention, PairTask


@dataclass(frozen=True)
class Answer:
    """The most probable answer; `str()` of it is the answer.

    Attributes:
        answer, probability: the best.
        top: the best k with their probabilities, best first.
        attention: maps of words and regions where asked for, else None.
    """

    answer: str
    probability: float
    top: tuple[tuple[str, float], ...]
    attention: PairAttention | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.answer


class VQA(PairTask):
    """Visual question answering.

    Args:
        model: a ViLBERT with a "vqa" head or an LXMERT with an answer head.
        answers: texts of the head's labels in their order, or a file of them (see `read_answers`).
        probabilities: "sigmoid", each answer for itself, as heads are trained for VQA; "softmax", over all answers, as
            LXMERT's pretraining head is. None takes the one that belongs to the model's head.
        tokenizer, task_id, batch_size, max_tokens, max_regions: see `PairTask`.

    Raises:
        ValueError: also where there are not as many answers as the head has labels.
    """

    task = "vqa"

    def __init__(self, model: ViLBERT | LXMERT, answers: Sequence[str] | str | os.PathLike, *,
                 probabilities: str | None = None, **options):
        super().__init__(model, **options)
        self.head, labels = self._head()
        if isinstance(answers, str | os.PathLike):
            answers = read_answers(answers)
        self.answers = tuple(answers)
        if len(self.answers) != labels:
            raise ValueError(f"{self.name}: answers has {len(self.answers)} entries, the model's {self.head!r} head "
                             f"has {labels} labels")
        if probabilities not in (None, "sigmoid", "softmax"):
            raise ValueError(f"{self.name}: probabilities is {probabilities!r}, must be 'sigmoid' or 'softmax'")
        pretraining = not self.vilbert and model.config.heads == "pretraining"
        self.probabilities = probabilities or ("softmax" if pretraining else "sigmoid")

    def _head(self) -> tuple[str, int]:
        head, config = self.require_head("vqa"), self.model.config
        if self.vilbert:
            return head, config.vqa_labels
        if config.images_per_answer != 1:
            raise ValueError(f"{self.name}: model.config.images_per_answer is {config.images_per_answer}, must be 1")
        return head, config.num_qa_labels

    def __call__(self, question: str | Sequence[str], regions, *, top: int = 5,
                 attention: bool = False) -> Answer | list[Answer]:
        """Answers.

        Args:
            question: one question or several.
            regions: of one picture (see `as_regions`) or a list with one entry a question; one picture serves several
                questions, and one question several pictures.
            top: answers to give, best first.
            attention: with maps of words over regions and back.

        Returns:
            An Answer, or a list of them where `question` or `regions` is a list.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if top < 1:
            raise ValueError(f"{self.name}: top is {top}, must be at least 1")
        texts, pictures, one = self.examples(question, regions)
        found: list[Answer] = []
        for arguments, output in self.run(texts, pictures, head=self.head, attention=attention):
            best, index = self._probability(output.logits[self.head]).topk(min(top, len(self.answers)))
            for row, (values, labels) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
                picture = pictures[len(found) if len(pictures) > 1 else 0]
                maps = self.attention_of(arguments, output, row, picture) if attention else None
                ranked = tuple((self.answers[label], value) for label, value in zip(labels, values, strict=True))
                found.append(Answer(*ranked[0], ranked, maps))
        return found[0] if one else found

    def scores(self, question: str | Sequence[str], regions) -> Tensor:
        """Probabilities of all answers, [B, labels] float32 on the CPU."""
        texts, pictures, _ = self.examples(question, regions)
        return self._probability(self.logits(texts, pictures, head=self.head))

    def _probability(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return logits.sigmoid() if self.probabilities == "sigmoid" else logits.softmax(-1)


class GQA(VQA):
    """Compositional questions: as VQA, with ViLBERT's "gqa" head; LXMERT has one answer head."""

    task = "gqa"

    def _head(self) -> tuple[str, int]:
        return (self.require_head("gqa"), self.model.config.gqa_labels) if self.vilbert else super()._head()
