"""NLVR2: true or false statements about two photographs."""

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass

from .records import Annotations, ImageName, Images, Skip, need, optional, read_json_lines

_LABELS = {"true": True, "false": False}


@dataclass(frozen=True)
class Nlvr2Statement:
    """One statement with its pair of pictures.

    Attributes:
        identifier: "split-set-pair-sentence", for example "dev-850-0-0".
        sentence: the statement.
        left_id, right_id: names of the pictures' features, "dev-850-0-img0" and "dev-850-0-img1" by default.
        label: whether the statement is true; None in a hidden test set.
        group: statements of one group are the same sentence with other pictures; consistency is the share of groups
            answered right throughout.
        directory: folder of the training pictures, or None.
    """

    identifier: str
    sentence: str
    left_id: str
    right_id: str
    label: bool | None
    group: str
    directory: int | str | None = None


def read_nlvr2(
    path: str | os.PathLike, *, labelled: bool = True, images: Container | None = None, image_name: ImageName = "{}"
) -> Annotations[Nlvr2Statement]:
    """Statements of NLVR2 (`train.json`, `dev.json`, `test1.json`: an object a line).

    Args:
        path: the file.
        labelled: False for a hidden test set.
        images, image_name: pictures with features, and how their names are made of "dev-850-0-img0"; statements about
            others are skipped and counted.

    Raises:
        FileNotFoundError, ValueError: see the package.

    Paper: A Corpus for Reasoning About Natural Language Grounded in Photographs (Suhr et al. 2019, arXiv:1811.00491).
    """
    return Annotations(_statements(path, labelled, Images(images, image_name)))


def _statements(path, labelled: bool, images: Images) -> Iterator[Nlvr2Statement | Skip]:
    seen = set()
    for where, record in read_json_lines(path):
        identifier = need(record, "identifier", "text", where)
        where = f"{where} ({identifier})"
        parts = identifier.split("-")
        if len(parts) != 4 or not all(parts):
            raise ValueError(f"{where}: identifier is {identifier!r}, must be split-set-pair-sentence")
        split, number, pair, sentence = parts
        left, right = (images.name(f"{split}-{number}-{pair}-img{side}") for side in (0, 1))
        statement = Nlvr2Statement(
            identifier,
            need(record, "sentence", "text", where),
            left,
            right,
            _label(record, where) if labelled else None,
            f"{split}-{number}-{sentence}",
            optional(record, "directory", "id", where),
        )
        skip = Skip("repeated statement", where) if identifier in seen else images.missing(where, left, right)
        seen.add(identifier)
        yield statement if skip is None else skip


def _label(record: dict, where: str) -> bool:
    if isinstance(record.get("label"), bool):
        return record["label"]
    label = _LABELS.get(need(record, "label", "text", where).lower())
    if label is None:
        raise ValueError(f"{where}: label is {record['label']!r}, must be 'True' or 'False'")
    return label
