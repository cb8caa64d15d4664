"""VCR: questions about film scenes, four answers and four rationales each, with objects named inside the sentences."""

import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from .records import (
    Annotations,
    ImageName,
    Images,
    Skip,
    checked,
    choice,
    need,
    need_all,
    read_json,
    read_json_lines,
)

Tokens = tuple[str | tuple[int, ...], ...]
_CHOICES = 4
# people have no names in the files; these stand in for them, in the order of the public loaders
_NAMES = ("Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Peyton",
          "Skyler", "Frankie", "Pat", "Quinn")  # fmt: skip


@dataclass(frozen=True)
class VcrQuestion:
    """One question. A sentence is a tuple of words and of tuples of object numbers ("[person1, person2]").

    Attributes:
        annot_id: id of the question.
        image_id: name of the picture's features.
        image_file, metadata_file: below the folder of pictures; see :func:`read_vcr_objects`.
        objects: class name of each detected object.
        question: the sentence.
        answers, rationales: four sentences each.
        answer_label, rationale_label: which is right, 0 ... 3; None in a test set.
    """

    annot_id: str
    image_id: str
    image_file: str
    metadata_file: str
    objects: tuple[str, ...]
    question: Tokens
    answers: tuple[Tokens, ...]
    rationales: tuple[Tokens, ...]
    answer_label: int | None
    rationale_label: int | None

    def choices(self, task: str) -> tuple[Tokens, tuple[Tokens, ...], int | None]:
        """(premise, four choices, label) of "qa" (Q -> A) or "qar" (QA -> R, given the right answer).

        Raises:
            ValueError: another task, or "qar" without the right answer.
        """
        choice(task, ("qa", "qar"), "VcrQuestion.choices", "task")
        if task == "qa":
            return self.question, self.answers, self.answer_label
        if self.answer_label is None:
            raise ValueError(f"VcrQuestion.choices: {self.annot_id} has no answer_label; give the premise yourself")
        return self.question + self.answers[self.answer_label], self.rationales, self.rationale_label


@dataclass(frozen=True)
class VcrObjects:
    """The objects of one picture.

    Attributes:
        names: class name of each object.
        boxes: (x1, y1, x2, y2) of each in pixels; scores: of each, 0 ... 1.
        width, height: of the picture in pixels.
    """

    names: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    scores: tuple[float, ...]
    width: float
    height: float


def read_vcr(
    path: str | os.PathLike,
    *,
    labelled: bool = True,
    images: Container | None = None,
    image_name: ImageName = "{}",
    image_field: str = "img_id",
) -> Annotations[VcrQuestion]:
    """Questions of VCR (`train.jsonl`, `val.jsonl`, `test.jsonl`).

    Args:
        path: the file.
        labelled: False for the test set.
        images, image_name: pictures with features, and how their names are made of `image_field`.
        image_field: "img_id" ("train-0") or "img_fn" ("lsmdc_.../1054_...@0.jpg").

    Raises:
        FileNotFoundError, ValueError: see the package; also a sentence that names an object that is not there.

    Paper: From Recognition to Cognition (Zellers et al. 2019, arXiv:1811.10830).
    """
    choice(image_field, ("img_id", "img_fn"), "read_vcr", "image_field")
    return Annotations(_questions(path, labelled, Images(images, image_name), image_field))


def _questions(path, labelled: bool, images: Images, image_field: str) -> Iterator[VcrQuestion | Skip]:
    for where, record in read_json_lines(path):
        number = need(record, "annot_id", "text", where)
        where = f"{where} ({number})"
        objects = need_all(record, "objects", "text", where)
        question = VcrQuestion(
            number,
            images.name(need(record, image_field, "text", where)),
            need(record, "img_fn", "text", where),
            need(record, "metadata_fn", "text", where),
            objects,
            _tokens(need(record, "question", "list", where), len(objects), where, "question"),
            *(
                tuple(_tokens(item, len(objects), where, field)
                      for item in need_all(record, field, "list", where, _CHOICES))
                for field in ("answer_choices", "rationale_choices")
            ),
            *(_label(record, f"{field}_label", where) if labelled else None for field in ("answer", "rationale")),
        )
        skip = images.missing(where, question.image_id)
        yield question if skip is None else skip


def _tokens(items: list, objects: int, where: str, field: str) -> Tokens:
    tokens: list[str | tuple[int, ...]] = []
    for item in items:
        if isinstance(item, str):
            tokens.append(item)
            continue
        for number in checked(item, "list", where, f"a token of field {field!r}"):
            if not 0 <= checked(number, "integer", where, f"an object of field {field!r}") < objects:
                raise ValueError(f"{where}: field {field!r} names object {number}, there are {objects}")
        tokens.append(tuple(item))
    return tuple(tokens)


def _label(record: dict, field: str, where: str) -> int:
    return choice(need(record, field, "integer", where), range(_CHOICES), where, f"field {field!r}")


def vcr_words(tokens: Tokens, objects: Sequence[str], and_word: str | None = None) -> tuple[list[str], list[int]]:
    """Words of a sentence, and for each the number of the object it names, -1 for none.

    A person becomes one of fifteen names that tell no gender, by its rank among the persons; anything else its class
    name. Models ground a word by adding the features of its object.

    Args:
        tokens: a sentence of :class:`VcrQuestion`.
        objects: class names of the objects.
        and_word: stands between the objects of one token, for example "and"; None puts nothing there.
    """
    persons = [i for i, name in enumerate(objects) if name == "person"]
    words: list[str] = []
    named: list[int] = []
    for token in tokens:
        if isinstance(token, str):
            words.append(token)
            named.append(-1)
            continue
        for position, number in enumerate(token):
            if position and and_word is not None:
                words.append(and_word)
                named.append(-1)
            person = objects[number] == "person"
            words.append(_NAMES[persons.index(number) % len(_NAMES)] if person else objects[number])
            named.append(number)
    return words, named


def read_vcr_objects(root: str | os.PathLike, question: VcrQuestion) -> VcrObjects:
    """The objects of a question's picture, from its metadata file below `root` (the folder `vcr1images`).

    Raises:
        ValueError: `metadata_file` leads outside `root`, or a field is missing or does not fit.
        FileNotFoundError: the file is not there.
    """
    top = os.path.abspath(root)
    path = os.path.abspath(os.path.join(top, question.metadata_file))
    if os.path.commonpath([top, path]) != top:
        raise ValueError(f"read_vcr_objects: {question.metadata_file!r} of {question.annot_id} leads outside {top}")
    record = checked(read_json(path), "object", path, "the file")
    names = need_all(record, "names", "text", path)
    rows = [
        tuple(checked(value, "number", path, "a box coordinate") for value in row)
        for row in need_all(record, "boxes", "list", path, len(names))
    ]
    for i, row in enumerate(rows):
        if len(row) not in (4, 5):
            raise ValueError(f"{path}: box {i} has {len(row)} values, must be x1, y1, x2, y2 and perhaps a score")
    return VcrObjects(
        names,
        tuple(row[:4] for row in rows),
        tuple(row[4] if len(row) == 5 else 1.0 for row in rows),
        need(record, "width", "number", path),
        need(record, "height", "number", path),
    )
