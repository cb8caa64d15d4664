"""VQA v2: questions with ten answers each."""

import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .answers import AnswerVocabulary
from .records import (
    AnnotationReport,
    Annotations,
    ImageName,
    Images,
    Skip,
    checked,
    need,
    need_all,
    optional,
    read_json,
)


@dataclass(frozen=True)
class VqaQuestion:
    """One question.

    Attributes:
        question_id: as the file spells it; result files want it back.
        image_id: name of the picture's features.
        question: the text.
        answers: what the annotators said, with repetitions; empty in a test set.
        answer: the most frequent of them, None in a test set.
        question_type, answer_type: such as "how many" and "number"; None where the file does not tell.
    """

    question_id: int | str
    image_id: str
    question: str
    answers: tuple[str, ...] = ()
    answer: str | None = None
    question_type: str | None = None
    answer_type: str | None = None

    @property
    def answer_counts(self) -> Counter[str]:
        return Counter(self.answers)


def read_vqa(
    questions: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    *,
    vocabulary: AnswerVocabulary | None = None,
    images: Container | None = None,
    image_name: ImageName = "{}",
) -> Annotations[VqaQuestion]:
    """Questions of VQA v2 (`v2_OpenEnded_mscoco_*_questions.json`), with `v2_mscoco_*_annotations.json`.

    Args:
        questions: the file of questions.
        annotations: the file of answers; None for a test set.
        vocabulary: for training: questions without any answer in it are skipped and counted, other answers outside it
            are counted under `noted`. Leave it out for evaluation, where such questions count as wrong.
        images, image_name: pictures with features and how their names are made, for example
            `image_name="COCO_val2014_{:0>12}"`; questions about others are skipped and counted.

    Raises:
        FileNotFoundError, ValueError: see the package.
    """
    report = AnnotationReport()
    answered = None if annotations is None else _annotations(Path(annotations), report)
    known = Images(images, image_name)
    return Annotations(_questions(Path(questions), answered, vocabulary, known, report), report)


def _questions(
    path: Path, answered: dict | None, vocabulary: AnswerVocabulary | None, images: Images, report: AnnotationReport
) -> Iterator[VqaQuestion | Skip]:
    seen = set()
    for i, record in enumerate(need(_root(path), "questions", "list", str(path))):
        where = f"{path}: question {i}"
        checked(record, "object", where, "the record")
        number, image = need(record, "question_id", "id", where), need(record, "image_id", "id", where)
        text = need(record, "question", "text", where)
        where = f"{path}: question {i} (question_id {number})"
        if number in seen:
            yield Skip("repeated question", where)
            continue
        seen.add(number)
        question = VqaQuestion(number, images.name(image), text)
        skip = images.missing(where, question.image_id)
        if answered is not None and skip is None:
            if number not in answered:
                skip = Skip("question without annotation", where)
            else:
                own_image, rest = answered[number]
                if own_image != image:
                    skip = Skip("annotation of another image", where, f"image {image}, the annotation has {own_image}")
                question = VqaQuestion(number, question.image_id, text, **rest)
                if skip is None and vocabulary is not None:
                    skip = outside(question.answers or (question.answer,), vocabulary, where, report)
        yield question if skip is None else skip
    if answered is not None:
        for number in answered.keys() - seen:
            yield Skip("annotation without question", str(path), f"question_id {number}")


def outside(
    answers: Sequence[str], vocabulary: AnswerVocabulary, where: str, report: AnnotationReport
) -> Skip | None:
    """A skip if none of the answers is in the vocabulary; else counts those that are not."""
    unknown = [answer for answer in answers if answer not in vocabulary]
    if len(unknown) == len(answers):
        return Skip("no answer in the vocabulary", where, ", ".join(sorted(set(unknown)))[:80])
    report.noted["answers outside the vocabulary"] += len(unknown)
    return None


def _annotations(path: Path, report: AnnotationReport) -> dict:
    answered: dict = {}
    for i, record in enumerate(need(_root(path), "annotations", "list", str(path))):
        where = f"{path}: annotation {i}"
        checked(record, "object", where, "the record")
        number = need(record, "question_id", "id", where)
        where = f"{path}: annotation {i} (question_id {number})"
        given = need_all(record, "answers", "object", where)
        fields = {
            "answers": tuple(need(item, "answer", "text", f"{where}, answer {k}") for k, item in enumerate(given)),
            "answer": need(record, "multiple_choice_answer", "text", where),
            "question_type": optional(record, "question_type", "text", where),
            "answer_type": optional(record, "answer_type", "text", where),
        }
        if number in answered:
            report.add(Skip("repeated annotation", where))
        else:
            answered[number] = (need(record, "image_id", "id", where), fields)
    return answered


def _root(path: Path) -> dict:
    return checked(read_json(path), "object", str(path), "the file")
