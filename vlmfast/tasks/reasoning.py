"""Statements about pictures, and choices: NLVR2 (arXiv:1811.00491), SNLI-VE (1901.06706), VCR (1811.10830)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fine_tuning import TaskBatch
from .pair_inputs import PairTask
from .pair_models import TASK_IDS


class NLVR2(PairTask):
    """Is a statement about two pictures true?

    Args:
        model: any of the BERT-like models with a head for two pictures; see `with_head`. They are read in a pass each
            or in one sequence, as the model's authors do.
        options: see `PairTask`.
    """

    task = "nlvr2"

    def __call__(self, statement: str | Sequence[str], regions) -> dict[str, float] | list[dict[str, float]]:
        """Probabilities {"true": p, "false": 1 - p}.

        Args:
            statement: one statement or several.
            regions: two pictures, left and right (each as in `as_regions`; for Pixel-BERT, `as_picture`); or a pair
                for every statement.

        Returns:
            A dict, or a list of them where `statement` is a list.
        """
        one = isinstance(statement, str)
        texts, pictures = self._examples(statement, regions)
        true = self.logits(texts, pictures, together=2).softmax(-1)[:, 1].tolist()
        found = [{"true": p, "false": 1 - p} for p in true]
        return found[0] if one else found

    def batch(self, statement: Sequence[str], regions, true: Sequence[bool]) -> TaskBatch:
        """Statements, pairs of pictures and which statements are true, to train on."""
        inputs = self.inputs(*self._examples(list(statement), regions))
        if len(true) != len(statement):
            raise ValueError(f"NLVR2: true has {len(true)} entries, statement has {len(statement)}; must be as many")
        return TaskBatch(inputs, torch.as_tensor(true).long().to(self.device))

    def _examples(self, statement: str | Sequence[str], regions) -> tuple[list[str], list]:
        """Texts and pictures as `inputs` takes them: a text for each pass."""
        one = isinstance(statement, str)
        pairs = [regions] if one else list(regions)
        for i, pair in enumerate(pairs):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                found = f"{len(pair)} pictures" if isinstance(pair, Sequence) else type(pair).__name__
                raise ValueError(f"NLVR2: regions{'' if one else f'[{i}]'} is {found}, must be two pictures")
        texts, pictures, _ = self.examples(statement, [picture for pair in pairs for picture in pair])
        if len(texts) != len(pairs):
            raise ValueError(f"NLVR2: {len(texts)} statements and {len(pairs)} pairs of pictures, must be as many")
        return texts if self.task_head.pictures == "joint" else [text for text in texts for _ in range(2)], pictures


NLVR = NLVR2


class VisualEntailment(PairTask):
    """Does a picture entail a sentence, contradict it, or neither?

    Args:
        model: any of the BERT-like models with a head of three classes; see `with_head`.
        labels: names of the head's classes in their order; None is that of the model's public code: contradiction,
            neutral, entailment for ViLBERT, contradiction, entailment, neutral for UNITER and where there is none.
        options: see `PairTask`.
    """

    task = "entailment"

    def __init__(self, model, *, labels: Sequence[str] | None = None, **options):
        super().__init__(model, **options)
        self.labels = self.takes.entailment if labels is None else tuple(labels)
        if len(self.labels) != 3:
            raise ValueError(f"VisualEntailment: labels has {len(self.labels)} entries, the {self.head!r} head has 3")

    def __call__(self, sentence: str | Sequence[str], regions) -> dict[str, float] | list[dict[str, float]]:
        """Probabilities by label; a list of dicts where `sentence` or `regions` is a list."""
        texts, pictures, one = self.examples(sentence, regions)
        rows = self.logits(texts, pictures).softmax(-1).tolist()
        found = [dict(zip(self.labels, row, strict=True)) for row in rows]
        return found[0] if one else found

    def batch(self, sentence: Sequence[str], regions, labels: Sequence[str]) -> TaskBatch:
        """Sentences, pictures and the names of their labels, to train on; the head's order is seen to here."""
        texts, pictures, _ = self.examples(sentence, regions)
        if unknown := [label for label in labels if label not in self.labels]:
            raise ValueError(f"VisualEntailment: label {unknown[0]!r} must be one of {', '.join(self.labels)}")
        target = torch.tensor([self.labels.index(label) for label in labels])
        inputs = self.inputs(texts, pictures)
        if len(target) != max(len(texts), len(pictures)):
            raise ValueError(f"VisualEntailment: {len(target)} labels of {max(len(texts), len(pictures))} examples, "
                             "must be as many")
        return TaskBatch(inputs, target.to(self.device))


@dataclass(frozen=True)
class Choice:
    """Which of the choices fits best: its index, its text, and the probabilities of all of them."""

    index: int
    text: str
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        return self.text


class VCR(PairTask):
    """Visual commonsense reasoning: one of the (four) answers to a question, or of the rationales of an answer.

    Choices are ranked by how well `question [SEP] choice` fits the picture. VD-BERT's are ranked by its matching head,
    as it ranks the answers of a dialog.

    Args:
        model: any of the BERT-like models with a head that scores a pair; see `with_head`.
        task_id: None takes the task tokens of both parts of the task.
        options: see `PairTask`.
    """

    task = "vcr"

    def __init__(self, model, *, task_id: int | None = None, **options):
        super().__init__(model, task_id=task_id, **options)
        self._own_task_id = task_id

    def __call__(self, question: str, choices: Sequence[str], regions, *, answer: str | None = None) -> Choice:
        """The best choice.

        Args:
            question: people and things of the picture are spelled by name, as in the public code.
            choices: at least two answers; or rationales, where
            answer: tells the answer they should explain (QA→R); None chooses an answer (Q→A).
            regions: of one picture, see `as_regions`; for Pixel-BERT the picture.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if isinstance(choices, str) or len(choices) < 2:
            raise ValueError(f"VCR: choices is {choices!r:.60}, must be a list of at least two texts")
        scores = self.scores(question, choices, regions, answer=answer)
        best = int(scores.argmax())
        return Choice(best, choices[best], tuple(scores.softmax(0).tolist()))

    def scores(self, question: str, choices: Sequence[str], regions, *, answer: str | None = None) -> Tensor:
        """[choices] float32 scores, softmax over them is the probability."""
        for name, value in (("question", question), ("answer", answer)):
            if not isinstance(value, str) and (name == "question" or value is not None):
                raise TypeError(f"VCR: {name} is {type(value).__name__}, must be one text")
        choices, pictures, _ = self.examples(choices, regions)
        self.examples(question, pictures)
        premise = (question,) if answer is None else (question, answer)
        logits = self.logits([premise] * len(choices), pictures, choices, task_id=self._task_token(answer is not None))
        return self.fit(logits)

    def batch(self, question: Sequence[str], choices: Sequence[Sequence[str]], regions: Sequence,
              right: Sequence[int], *, answer: Sequence[str] | None = None) -> TaskBatch:
        """Questions of one kind, with as many choices each, and which is right, to train on.

        Args:
            question, choices, regions, answer: B of what a call takes.
            right: B indices.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        counts = {len(part) for part in choices}
        if len(counts) != 1 or not len(question) == len(choices) == len(regions) == len(right):
            raise ValueError(f"VCR: {len(question)} questions, {len(choices)} lists of {sorted(counts)} choices, "
                             f"{len(regions)} pictures and {len(right)} answers; must be as many, of equal lists")
        pictures = [self.picture(part, f"regions[{i}]") for i, part in enumerate(regions)]
        count, premises = counts.pop(), question if answer is None else zip(question, answer, strict=True)
        texts = [premise for premise in premises for _ in range(count)]
        inputs = self.inputs(texts, [picture for picture in pictures for _ in range(count)],
                             [choice for part in choices for choice in part],
                             task_id=self._task_token(answer is not None))
        return TaskBatch(inputs, torch.as_tensor(right).long().to(self.device))

    def _task_token(self, rationale: bool) -> int:
        part = "vcr_rationale" if rationale else "vcr"
        return TASK_IDS[part] if self._own_task_id is None else self._own_task_id
