"""Fine-tuning of the BERT-like models: a task's examples as batches, its loss, its metric beside a trivial baseline."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..data.annotations import ENTAILMENT_LABELS, AnswerVocabulary
from ..data.annotations.records import AnnotationReport
from ..data.region_text import SUBSTITUTES, RegionTextPairs
from ..data.region_text_batches import LengthBatches, in_order
from ..data.report import Skip
from ..objectives.common import PretrainingLoss
from ..tasks.answer_metrics import accuracy, nlvr2_consistency, normalize_answer, vqa_accuracy
from ..tasks.cross_encoder import CrossEncoderRetriever
from ..tasks.fine_tuning import TaskBatch, task_loss
from ..tasks.metrics import recall_of_scores
from ..tasks.pair_inputs import PairTask
from ..tasks.reasoning import NLVR2, VisualEntailment
from ..tasks.vqa import GQA, VQA

RANKED = 100  # pictures that retrieval is evaluated on, each with all texts


@dataclass(frozen=True)
class Example:
    """A text with its pictures and what is right: an answer, a truth value, a label; None for a pair that matches.

    `answers`: what several people answered. `group`: examples of the same statement.
    """

    text: str
    images: tuple[str, ...]
    right: object = None
    answers: tuple[str, ...] = ()
    group: str | None = None


class Kind(Protocol):
    """What differs between tasks."""

    labels: int | None  # classes of the head, where the task does not fix them

    def make(self, model: nn.Module, **options) -> PairTask:
        """The task over a model that has its head."""

    def batch(self, task: PairTask, examples: Sequence[Example], pictures: list) -> TaskBatch:
        """Examples to train on; pictures holds a tuple for each."""

    def evaluate(self, task: PairTask, examples: Sequence[Example], pictures: list) -> list:
        """What the task answers to each example."""

    def figures(self, found: list, examples: Sequence[Example]) -> dict[str, float]:
        """The task's metrics, each with that of always giving the commonest training answer."""


class Questions:
    """VQA and GQA: soft accuracy where several people answered, else exact answers.

    Args:
        vocabulary: the answers of the head.
        train: whose commonest answer is the baseline.
        gqa: with the head of GQA.
    """

    def __init__(self, vocabulary: AnswerVocabulary, train: Sequence[Example], gqa: bool = False):
        self.vocabulary, self.task, self.labels = vocabulary, GQA if gqa else VQA, len(vocabulary)
        self.majority = _commonest(example.right for example in train)

    def make(self, model: nn.Module, **options) -> PairTask:
        return self.task(model, self.vocabulary.answers, **options)

    def target(self, example: Example) -> Tensor:
        """[V]: how many people gave each answer, as VQA scores it; or 1 for the only answer."""
        if len(example.answers) > 1:
            return self.vocabulary.soft_target(example.answers)
        target = torch.zeros(len(self.vocabulary))
        target[self.vocabulary.index(example.right)] = 1
        return target

    def batch(self, task, examples, pictures):
        targets = torch.stack([self.target(example) for example in examples])
        return task.batch([example.text for example in examples], [one for (one,) in pictures], targets)

    def evaluate(self, task, examples, pictures):
        return [str(answer) for answer in task([example.text for example in examples], [one for (one,) in pictures],
                                               top=1)]

    def figures(self, found, examples):
        return {"accuracy": self._score(found, examples),
                "accuracy of the majority": self._score([self.majority] * len(examples), examples)}

    def _score(self, answers, examples) -> float:
        if all(len(example.answers) > 1 for example in examples):
            return vqa_accuracy(answers, [example.answers for example in examples])
        return accuracy([normalize_answer(answer) for answer in answers],
                        [normalize_answer(str(example.right)) for example in examples])


class Statements:
    """NLVR2: accuracy, and consistency where statements come with several pairs of pictures."""

    labels = None

    def __init__(self, train: Sequence[Example]):
        self.majority = _commonest(example.right for example in train)

    def make(self, model, **options):
        return NLVR2(model, **options)

    def batch(self, task, examples, pictures):
        return task.batch([example.text for example in examples], pictures, [example.right for example in examples])

    def evaluate(self, task, examples, pictures):
        return [answer["true"] > 0.5 for answer in task([example.text for example in examples], pictures)]

    def figures(self, found, examples):
        truth, groups = [example.right for example in examples], [example.group for example in examples]
        constant = [self.majority] * len(truth)
        figures = {"accuracy": accuracy(found, truth), "accuracy of the majority": accuracy(constant, truth)}
        if len(set(groups)) < len(groups):
            figures |= {"consistency": nlvr2_consistency(found, truth, groups),
                        "consistency of the majority": nlvr2_consistency(constant, truth, groups)}
        return figures


class Entailment:
    """SNLI-VE: accuracy over three labels."""

    labels = None

    def __init__(self, train: Sequence[Example]):
        self.majority = _commonest(example.right for example in train)

    def make(self, model, **options):
        return VisualEntailment(model, **options)

    def batch(self, task, examples, pictures):
        return task.batch([example.text for example in examples], [one for (one,) in pictures],
                          [ENTAILMENT_LABELS[example.right] for example in examples])

    def evaluate(self, task, examples, pictures):
        found = task([example.text for example in examples], [one for (one,) in pictures])
        return [ENTAILMENT_LABELS.index(max(one, key=one.get)) for one in found]

    def figures(self, found, examples):
        truth = [example.right for example in examples]
        return {"accuracy": accuracy(found, truth),
                "accuracy of the majority": accuracy([self.majority] * len(truth), truth)}


class Retrieval:
    """Recall of texts by picture and of pictures by text, every text with every picture; beside it a random order.

    Args:
        options: choices of a training example, one of them right.
    """

    labels = None

    def __init__(self, options: int = 4):
        self.options = options

    def make(self, model, **options):
        return CrossEncoderRetriever(model, **options)

    def batch(self, task, examples, pictures):
        return task.batch([example.text for example in examples], [one for (one,) in pictures], options=self.options)

    def evaluate(self, task, examples, pictures):
        raise TypeError("Retrieval: scores all examples together, see `recall`")

    def recall(self, task, examples: Sequence[Example], pictures: dict) -> dict[str, float]:
        """Recall at 1, 5 and 10 with that of a random order; pictures: image id -> regions."""
        names = list(pictures)
        scores = task.score([example.text for example in examples], list(pictures.values()))
        own = torch.tensor([names.index(example.images[0]) for example in examples])
        return recall_of_scores(scores, text_ids=own, image_ids=torch.arange(len(names))).to_dict()


def _commonest(values):
    return Counter(values).most_common(1)[0][0]


class TaskExamples:
    """Examples with the regions of their pictures.

    Args:
        examples: at least one.
        store: holds the regions of all their pictures.
        report: gets what turns out damaged.
    """

    def __init__(self, examples: Sequence[Example], store: RegionTextPairs, report: AnnotationReport):
        self.examples, self.store, self._report = list(examples), store, report
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.examples)

    def report(self) -> AnnotationReport:
        return self._report

    def pictures(self, example: Example) -> tuple:
        return tuple(self.store.regions(image_id) for image_id in example.images)

    def readable(self, i: int) -> int:
        """`i`, or the next example whose pictures can be read where its own cannot; that is counted."""
        for step in range(min(SUBSTITUTES, len(self))):
            k = (i + step) % len(self)
            try:
                self.pictures(self.examples[k])
                return k
            except ValueError as error:
                if k not in self._damaged:
                    self._damaged.add(k)
                    self._report.add(Skip("damaged record", f"example {k}", str(error)))
        raise ValueError(f"pictures of {SUBSTITUTES} examples in a row cannot be read\n{self._report}")


class TaskCollate:
    """Indices of examples -> (batch, its targets)."""

    def __init__(self, kind: Kind, task: PairTask, examples: TaskExamples):
        self.kind, self.task, self.examples = kind, task, examples

    def __call__(self, indices: Sequence[int]) -> tuple[TaskBatch, Tensor]:
        chosen = [self.examples.examples[self.examples.readable(i)] for i in indices]
        batch = self.kind.batch(self.task, chosen, [self.examples.pictures(example) for example in chosen])
        return batch, batch.target


class TaskLoss:
    """`task_loss` as the loss of an `ObjectiveTrainer`."""

    def __init__(self, task: PairTask):
        self.task = task

    def __call__(self, model: nn.Module, batch: TaskBatch, target: Tensor, step: int) -> PretrainingLoss:
        loss = task_loss(self.task, model, replace(batch, target=target))
        return PretrainingLoss(loss, {self.task.task: loss})


def text_lengths(task: PairTask, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """([N] tokens of each text as it will be read, how many texts are cut)."""
    whole = np.array([len(task.tokenizer.encode(text)) + 2 for text in texts])
    return np.minimum(whole, task.max_tokens), int((whole > task.max_tokens).sum())


def task_loader(kind: Kind, task: PairTask, examples: TaskExamples, batch_size: int, *, seed: int = 0, rank: int = 0,
                world_size: int = 1) -> tuple[LengthBatches, int]:
    """(batches for an `ObjectiveTrainer`, how many texts are cut); the batch size shrinks to what there is.

    Raises:
        ValueError: no example for each process, or for retrieval fewer than two.
    """
    share, least = len(examples) // world_size, 2 if isinstance(kind, Retrieval) else 1
    if share < least:
        raise ValueError(f"task_loader: {len(examples)} examples for {world_size} processes, must be {least} for each")
    lengths, cut = text_lengths(task, [example.text for example in examples.examples])
    loader = LengthBatches(lengths, min(batch_size, share), TaskCollate(kind, task, examples), seed=seed, rank=rank,
                           world_size=world_size)
    return loader, cut


class TaskValidation:
    """Called with the task's model, the task's figures on held-out examples.

    Args:
        kind, task, examples: what to evaluate.
        batch_size: examples at a time.
        say: gets a line to show.
    """

    def __init__(self, kind: Kind, task: PairTask, examples: TaskExamples, batch_size: int, *,
                 say: Callable[[str], None] | None = None):
        self.kind, self.task, self.examples, self.say = kind, task, examples, say
        lengths, _ = text_lengths(task, [example.text for example in examples.examples])
        self.batches = in_order(lengths, batch_size)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        if isinstance(self.kind, Retrieval):
            figures, count = self._recall()
        else:
            found, asked = [], []
            for indices in self.batches:
                chosen = [self.examples.examples[self.examples.readable(i)] for i in indices]
                found += self.kind.evaluate(self.task, chosen, [self.examples.pictures(one) for one in chosen])
                asked += chosen
            figures, count = self.kind.figures(found, asked), len(asked)
        if self.say is not None:
            self.say("validation: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
                     + f" ({count} examples)")
        return figures

    def _recall(self) -> tuple[dict[str, float], int]:
        pictures: dict = {}
        asked = []
        for i in range(len(self.examples)):
            example = self.examples.examples[self.examples.readable(i)]
            image_id = example.images[0]
            if image_id not in pictures and len(pictures) == RANKED:
                continue
            pictures[image_id] = self.examples.pictures(example)[0]
            asked.append(example)
        return self.kind.recall(self.task, asked, pictures), len(asked)
