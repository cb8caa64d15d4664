"""Questions about a picture, answered from a list of answers (VQA, arXiv:1505.00468; GQA, arXiv:1902.09506)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .answers import read_answers
from .fine_tuning import TaskBatch
from .pair_inputs import PairAttention, PairTask


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
        model: any of the BERT-like models with an answer head; see `with_head`.
        answers: texts of the head's labels in their order, or a file of them (see `read_answers`).
        probabilities: "sigmoid", each answer for itself, as most heads are trained for VQA; "softmax", over all
            answers, as VisualBERT's and LXMERT's pretraining head are. None takes the one that belongs to the head.
        options: see `PairTask`.

    Raises:
        ValueError: also where there are not as many answers as the head has labels.
    """

    task = "vqa"

    def __init__(self, model: nn.Module, answers: Sequence[str] | str | os.PathLike, *,
                 probabilities: str | None = None, **options):
        super().__init__(model, **options)
        labels = getattr(self.config, self.task_head.labels)
        if isinstance(answers, str | os.PathLike):
            answers = read_answers(answers)
        self.answers = tuple(answers)
        if len(self.answers) != labels:
            raise ValueError(f"{self.name}: answers has {len(self.answers)} entries, the model's {self.head!r} head "
                             f"has {labels} labels")
        if probabilities not in (None, "sigmoid", "softmax"):
            raise ValueError(f"{self.name}: probabilities is {probabilities!r}, must be 'sigmoid' or 'softmax'")
        self.probabilities = probabilities or ("sigmoid" if self.task_head.loss == "answer_bce" else "softmax")

    def __call__(self, question: str | Sequence[str], regions, *, top: int = 5,
                 attention: bool = False) -> Answer | list[Answer]:
        """Answers.

        Args:
            question: one question or several.
            regions: of one picture (see `as_regions`; for Pixel-BERT the picture, see `as_picture`) or a list with one
                entry a question; one picture serves several questions, and one question several pictures.
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
        for arguments, output in self.run(texts, pictures, attention=attention):
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
        return self._probability(self.logits(texts, pictures))

    def batch(self, question: Sequence[str], regions, answers: Tensor | Sequence[str]) -> TaskBatch:
        """Questions with what they should be answered, to train on.

        Args:
            question, regions: as in a call, lists.
            answers: [B, labels] scores in 0..1 (see `data.annotations.soft_score`), [B] labels, or B answers.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; an answer that is not in the list.
        """
        texts, pictures, _ = self.examples(question, regions)
        if not isinstance(answers, Tensor):
            places = {answer: i for i, answer in enumerate(self.answers)}
            if unknown := [answer for answer in answers if answer not in places]:
                raise ValueError(f"{self.name}: answer {unknown[0]!r} is not among the {len(places)} answers")
            answers = torch.tensor([places[answer] for answer in answers])
        inputs = self.inputs(texts, pictures)
        if len(answers) != max(len(texts), len(pictures)) or answers.shape[1:] not in ((), (len(self.answers),)):
            raise ValueError(f"{self.name}: answers has shape {list(answers.shape)}, must be "
                             f"[{max(len(texts), len(pictures))}] or [..., {len(self.answers)}]")
        return TaskBatch(inputs, answers.to(self.device))

    def _probability(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return logits.sigmoid() if self.probabilities == "sigmoid" else logits.softmax(-1)


class GQA(VQA):
    """Compositional questions: as VQA, with ViLBERT's "gqa" head; the other models have one answer head."""

    task = "gqa"
