"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that each single out one object of a COCO picture."""

import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..region_arrays import UnsafePickleError, read_pickle
from .records import Annotations, ImageName, Images, Skip, checked, need, read_json

MAX_NODES = 20_000_000  # values in a refs file; RefCOCO's has about three million


@dataclass(frozen=True)
class ReferringExpression:
    """One expression.

    Attributes:
        ref_id, sent_id: ids of the reference and of its sentence.
        image_id: name of the picture's features.
        text: the expression.
        box: x1, y1, x2, y2 of the object in pixels.
        width, height: of the picture in pixels.
        category: name of the object's class.
        ann_id: id of the object in the instances file.
        split: "train", "val", "testA", "testB" or "test".
    """

    ref_id: int
    sent_id: int
    image_id: str
    text: str
    box: tuple[float, float, float, float]
    width: float
    height: float
    category: str
    ann_id: int
    split: str


def read_refcoco(
    refs: str | os.PathLike,
    instances: str | os.PathLike,
    splits: str | Sequence[str] | None = None,
    *,
    images: Container | None = None,
    image_name: ImageName = "{}",
) -> Annotations[ReferringExpression]:
    """Expressions of `refs(unc).p`, `refs(umd).p` or `refs(google).p` with the boxes of `instances.json`.

    The pickle is read by an unpickler that knows plain containers and numbers only; one that names anything else is
    refused, not executed.

    Args:
        refs, instances: the two files.
        splits: one split or several; None takes all.
        images, image_name: pictures with features, and how their names are made of the COCO id.

    Raises:
        UnsafePickleError: the pickle asks for something to be executed.
        FileNotFoundError, ValueError: see the package; also no expression of these splits.
    """
    refs, instances = Path(refs), Path(instances)
    if not refs.exists():
        raise FileNotFoundError(f"read_refcoco: {refs} does not exist")
    try:
        records = read_pickle(refs.read_bytes(), max_nodes=MAX_NODES)
    except ValueError as error:
        kind = UnsafePickleError if isinstance(error, UnsafePickleError) else ValueError
        raise kind(f"{refs}: {error}") from error
    wanted = (splits,) if isinstance(splits, str) else splits
    found: Counter[str] = Counter()
    expressions = Annotations(
        _expressions(refs, checked(records, "list", str(refs), "the file"), _Instances(instances), wanted,
                     Images(images, image_name), found)
    )  # fmt: skip
    if wanted is not None and not any(split in found for split in wanted):
        raise ValueError(f"{refs}: splits is {tuple(wanted)}, the file has {sorted(found)}")
    return expressions


class _Instances:
    """Objects, pictures and class names of an instances file by id."""

    def __init__(self, path: Path):
        root = checked(read_json(path), "object", str(path), "the file")
        self.objects, self.sizes, self.categories = {}, {}, {}
        for field, read in (("images", self._image), ("annotations", self._object), ("categories", self._category)):
            for i, record in enumerate(need(root, field, "list", str(path))):
                where = f"{path}: item {i} of {field!r}"
                read(checked(record, "object", where, "the record"), where)

    def _image(self, record: dict, where: str) -> None:
        self.sizes[need(record, "id", "integer", where)] = tuple(
            need(record, side, "number", where) for side in ("width", "height")
        )

    def _object(self, record: dict, where: str) -> None:
        box = need(record, "bbox", "list", where)
        if len(box) != 4:
            raise ValueError(f"{where}: field 'bbox' has {len(box)} values, must be x, y, width, height")
        x, y, width, height = (float(checked(value, "number", where, "a value of field 'bbox'")) for value in box)
        self.objects[need(record, "id", "integer", where)] = (
            (x, y, x + width, y + height),
            need(record, "category_id", "integer", where),
        )

    def _category(self, record: dict, where: str) -> None:
        self.categories[need(record, "id", "integer", where)] = need(record, "name", "text", where)


def _expressions(
    path: Path, records: list, instances: _Instances, splits: Sequence[str] | None, images: Images, found: Counter
) -> Iterator[ReferringExpression | Skip]:
    for i, record in enumerate(records):
        where = f"{path}: reference {i}"
        checked(record, "object", where, "the record")
        split = need(record, "split", "text", where)
        found[split] += 1
        if splits is not None and split not in splits:
            continue
        ref, ann, image = (need(record, name, "integer", where) for name in ("ref_id", "ann_id", "image_id"))
        where = f"{where} (ref_id {ref})"
        skip = images.missing(where, images.name(image))
        if ann not in instances.objects or image not in instances.sizes:
            skip = Skip("object not in the instances file", where, f"ann_id {ann}, image_id {image}")
        box, category = instances.objects.get(ann, (None, None))
        for k, sentence in enumerate(need(record, "sentences", "list", where)):
            place = f"{where}, sentence {k}"
            checked(sentence, "object", place, "the record")
            text, number = need(sentence, "sent", "text", place), need(sentence, "sent_id", "integer", place)
            if skip is not None or not text.strip():
                yield skip or Skip("empty expression", place)
                continue
            if category not in instances.categories:
                raise ValueError(f"{place}: category {category} is not in the instances file")
            yield ReferringExpression(ref, number, images.name(image), text, box, *instances.sizes[image],
                                      instances.categories[category], ann, split)  # fmt: skip
