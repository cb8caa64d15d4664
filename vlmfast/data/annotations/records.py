"""What all annotation readers share: JSON with errors that name the place, checked fields, and counted skips."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar, overload

from ..report import PairsReport, Skip

T = TypeVar("T")
MISSING = object()
_KINDS = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "id": (str, int),
    "list": (list,),
    "object": (dict,),
}
ImageName = str | Callable[[str], str]


@dataclass
class AnnotationReport(PairsReport):
    """Counts of records used and skipped.

    Attributes:
        used, skipped, examples: as in :class:`PairsReport`.
        noted: what is odd about records that are used all the same -> count, such as answers outside the vocabulary.
    """

    noted: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [super().__str__().replace(" pairs used", " records used", 1)]
        return "\n".join(lines + [f"  {count} {what} (kept)" for what, count in self.noted.most_common()])


class Annotations(Sequence[T], Generic[T]):
    """The records of annotation files, in their order; `report()` tells what was left out."""

    def __init__(self, records: Iterable[T | Skip], report: AnnotationReport | None = None):
        self._report = AnnotationReport() if report is None else report
        kept = []
        for record in records:
            if isinstance(record, Skip):
                self._report.add(record)
            else:
                kept.append(record)
        self._records: tuple[T, ...] = tuple(kept)
        self._report.used = len(kept)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[T, ...]: ...
    def __getitem__(self, i):
        return self._records[i]

    def report(self) -> AnnotationReport:
        """Records used, and those skipped with reasons and examples."""
        return self._report

    def __repr__(self) -> str:
        return f"Annotations({len(self)} records, {self._report.total_skipped} skipped)"


class Images:
    """Which pictures there are features for.

    Args:
        known: anything with `in`, for example RegionFeatures, a set or a dict of names; None takes every picture.
        name: the name of a picture in `known`: a format such as "COCO_val2014_{:0>12}" or a function of the id as the
            annotation file spells it.
    """

    def __init__(self, known: Container | None, name: ImageName = "{}"):
        self._known = known
        self._name = name.format if isinstance(name, str) else name

    def name(self, image_id: str | int) -> str:
        return self._name(str(image_id))

    def missing(self, where: str, *names: str) -> Skip | None:
        """A skip for the first of `names` without features."""
        if self._known is not None:
            for name in names:
                if name not in self._known:
                    return Skip("image without features", where, f"image {name}")
        return None


def read_text(path: Path) -> str:
    """The UTF-8 text of a file.

    Raises:
        FileNotFoundError: nothing at `path`. ValueError: not UTF-8.
    """
    if not path.exists():
        raise FileNotFoundError(f"annotations: {path} does not exist")
    return decode(path.read_bytes(), path)


def decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 ({error.reason} at byte {error.start})") from None


def read_json(path: str | os.PathLike):
    """The value of a JSON file; ValueError names the file and the line where it is malformed."""
    path = Path(path)
    return _parse(read_text(path), str(path), 1)


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """("file: line N", object) per line that is not blank; ValueError names the file and the line."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"annotations: {path} does not exist")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason})") from None
            if text:
                where = f"{path}: line {number}"
                yield where, checked(_parse(text, str(path), number), "object", where, "the record")


def _parse(text: str, path: str, line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {line + error.lineno - 1} is malformed JSON: {error.msg}, column {error.colno}"
                         ) from None
    except (ValueError, RecursionError) as error:  # numbers of endless digits, brackets without end
        raise ValueError(f"{path}: line {line} is malformed JSON: {error}") from None


def checked(value, kind: str, where: str, name: str):
    """`value` if it is of this kind ("text", "integer", "number", "id", "list", "object"); ValueError otherwise."""
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool) or not finite:
        article = "a text or an integer" if kind == "id" else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        raise ValueError(f"{where}: {name} is {_short(value)}, must be {article}")
    return value


def need(record: dict, name: str, kind: str, where: str):
    """The field `name`; ValueError names the place and the field if it is missing or of another kind."""
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing, there are {sorted(map(str, record))[:12]}")
    return checked(record[name], kind, where, f"field {name!r}")


def optional(record: dict, name: str, kind: str, where: str):
    """As :func:`need`, None where the field is missing or null."""
    return None if record.get(name) is None else need(record, name, kind, where)


def need_all(record: dict, name: str, kind: str, where: str, length: int | None = None) -> tuple:
    """The items of the list `name`, each of this kind and `length` of them."""
    items = need(record, name, "list", where)
    if length is not None and len(items) != length:
        raise ValueError(f"{where}: field {name!r} has {len(items)} items, must have {length}")
    return tuple(checked(item, kind, where, f"item {i} of field {name!r}") for i, item in enumerate(items))


def choice(value, known: Sequence, where: str, name: str):
    if value not in known:
        raise ValueError(f"{where}: {name} is {_short(value)}, must be one of {', '.join(map(repr, known))}")
    return value


def _short(value) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 60 else text[:57] + "..."
