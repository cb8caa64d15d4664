"""GQA: compositional questions with one answer each."""

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from .answers import AnswerVocabulary
from .records import AnnotationReport, Annotations, ImageName, Images, Skip, checked, need, optional, read_json
from .vqa import outside


@dataclass(frozen=True)
class GqaQuestion:
    """One question.

    Attributes:
        question_id, question: id and text.
        image_id: name of the picture's features.
        answer: one or two words, None in a test set; full_answer: a sentence, or None.
        structural, semantic: type of question ("query", "verify", ...; "attr", "rel", ...), or None.
        entailed: ids of the questions whose answers follow from this one's, for the consistency metric.
        balanced: whether it belongs to the balanced set; None where the file does not tell.
    """

    question_id: str
    image_id: str
    question: str
    answer: str | None = None
    full_answer: str | None = None
    structural: str | None = None
    semantic: str | None = None
    entailed: tuple[str, ...] = ()
    balanced: bool | None = None


def read_gqa(
    path: str | os.PathLike,
    *,
    labelled: bool = True,
    vocabulary: AnswerVocabulary | None = None,
    images: Container | None = None,
    image_name: ImageName = "{}",
) -> Annotations[GqaQuestion]:
    """Questions of GQA (`train_balanced_questions.json`), or of all files of a folder (`train_all_questions/`).

    Args:
        path: the file, or the folder with its `.json` files.
        labelled: False for a test set, whose questions have no answers.
        vocabulary, images, image_name: as in `read_vqa`.

    Raises:
        FileNotFoundError, ValueError: see the package.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"read_gqa: {path} holds no .json file")
    report = AnnotationReport()
    return Annotations(_questions(files, labelled, vocabulary, Images(images, image_name), report), report)


def _questions(
    files: list[Path], labelled: bool, vocabulary: AnswerVocabulary | None, images: Images, report: AnnotationReport
) -> Iterator[GqaQuestion | Skip]:
    seen = set()
    for path in files:
        for number, record in checked(read_json(path), "object", str(path), "the file").items():
            where = f"{path}: question {number}"
            checked(record, "object", where, "the record")
            types = optional(record, "types", "object", where) or {}
            balanced = record.get("isBalanced")
            question = GqaQuestion(
                number,
                images.name(need(record, "imageId", "id", where)),
                need(record, "question", "text", where),
                need(record, "answer", "text", where) if labelled else None,
                optional(record, "fullAnswer", "text", where),
                optional(types, "structural", "text", where),
                optional(types, "semantic", "text", where),
                tuple(str(checked(e, "id", where, "an entailed question"))
                      for e in optional(record, "entailed", "list", where) or ()),
                balanced if isinstance(balanced, bool) else None,
            )
            skip = Skip("repeated question", where) if number in seen else images.missing(where, question.image_id)
            seen.add(number)
            if skip is None and labelled and vocabulary is not None:
                skip = outside((question.answer,), vocabulary, where, report)
            yield question if skip is None else skip
