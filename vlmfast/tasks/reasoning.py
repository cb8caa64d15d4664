"""Statements about pictures, and choices: NLVR2 (arXiv:1811.00491), SNLI-VE (1901.06706), VCR (1811.10830)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .two_stream import TASK_IDS, PairTask, as_regions

ENTAILMENT = ("contradiction", "neutral", "entailment")  # labels of the public ViLBERT in their order


class NLVR2(PairTask):
    """Is a statement about two pictures true?

    Args:
        model: a ViLBERT with a "binary" head, or an LXMERT with `images_per_answer` 2 and two labels.
        tokenizer, task_id, batch_size, max_tokens, max_regions: see `PairTask`.
    """

    task = "nlvr2"

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.head = self.require_head("binary" if self.vilbert else "vqa")
        if not self.vilbert:
            for field in ("images_per_answer", "num_qa_labels"):
                if getattr(model.config, field) != 2:
                    raise ValueError(f"NLVR2: model.config.{field} is {getattr(model.config, field)}, must be 2")

    def __call__(self, statement: str | Sequence[str], regions) -> dict[str, float] | list[dict[str, float]]:
        """Probabilities {"true": p, "false": 1 - p}.

        Args:
            statement: one statement or several.
            regions: two pictures, left and right (each as in `as_regions`); or a pair for every statement.

        Returns:
            A dict, or a list of them where `statement` is a list.
        """
        one = isinstance(statement, str)
        pairs = [regions] if one else list(regions)
        for i, pair in enumerate(pairs):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                found = f"{len(pair)} pictures" if isinstance(pair, Sequence) else type(pair).__name__
                raise ValueError(f"NLVR2: regions{'' if one else f'[{i}]'} is {found}, must be two pictures")
        texts, pictures, _ = self.examples(statement, [picture for pair in pairs for picture in pair])
        if len(texts) != len(pairs):
            raise ValueError(f"NLVR2: {len(texts)} statements and {len(pairs)} pairs of pictures, must be as many")
        repeated = [text for text in texts for _ in range(2)]
        true = self.logits(repeated, pictures, head=self.head, together=2).softmax(-1)[:, 1].tolist()
        found = [{"true": p, "false": 1 - p} for p in true]
        return found[0] if one else found


class VisualEntailment(PairTask):
    """Does a picture entail a sentence, contradict it, or neither? A ViLBERT with a "tri" head.

    Args:
        labels: names of the head's classes in their order; the default is that of the public checkpoint.
        tokenizer, task_id, batch_size, max_tokens, max_regions: see `PairTask`.
    """

    task = "entailment"

    def __init__(self, model, *, labels: Sequence[str] = ENTAILMENT, **options):
        super().__init__(model, **options)
        self.head, self.labels = self.require_head("tri"), tuple(labels)
        if len(self.labels) != 3:
            raise ValueError(f"VisualEntailment: labels has {len(self.labels)} entries, the 'tri' head has 3")

    def __call__(self, sentence: str | Sequence[str], regions) -> dict[str, float] | list[dict[str, float]]:
        """Probabilities by label; a list of dicts where `sentence` or `regions` is a list."""
        texts, pictures, one = self.examples(sentence, regions)
        rows = self.logits(texts, pictures, head=self.head).softmax(-1).tolist()
        found = [dict(zip(self.labels, row, strict=True)) for row in rows]
        return found[0] if one else found


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

    Choices are ranked by how well `question [SEP] choice` fits the picture.

    Args:
        model: a ViLBERT with a "vil" head.
        tokenizer, task_id, batch_size, max_tokens, max_regions: see `PairTask`; None takes the task tokens of both
            parts of the task.
    """

    def __init__(self, model, *, task_id: int | None = None, **options):
        super().__init__(model, task_id=task_id, **options)
        self.head, self._own_task_id = self.require_head("vil"), task_id

    def __call__(self, question: str, choices: Sequence[str], regions, *, answer: str | None = None) -> Choice:
        """The best choice.

        Args:
            question: people and things of the picture are spelled by name, as in the public code.
            choices: at least two answers; or rationales, where
            answer: tells the answer they should explain (QA→R); None chooses an answer (Q→A).
            regions: of one picture, see `as_regions`.

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
        choices, _, _ = self.examples(choices, regions)
        texts, _, _ = self.examples(question, regions)
        part = "vcr_answer" if answer is None else "vcr_rationale"
        if answer is not None:
            texts = [f"{texts[0]} {self.tokenizer.tokens([self.tokenizer.sep])[0]} {answer}"]
        task_id = TASK_IDS[part] if self._own_task_id is None else self._own_task_id
        return self.logits(texts * len(choices), [as_regions(regions)], choices, head=self.head,
                           task_id=task_id).squeeze(-1)
