"""SNLI-VE: does a picture entail a sentence?"""

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from .records import Annotations, ImageName, Images, Skip, choice, need, read_json_lines

ENTAILMENT_LABELS = ("contradiction", "entailment", "neutral")  # classes 0, 1, 2 as in the public checkpoints
_IMAGE_FIELDS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID")  # the first releases misspell it


@dataclass(frozen=True)
class EntailmentPair:
    """A picture and a sentence.

    Attributes:
        pair_id: id of the pair, None in files that have none.
        image_id: name of the picture's features.
        hypothesis: the sentence; premise: the caption of the picture it was written for, or None.
        label: 0 contradiction, 1 entailment, 2 neutral; see `ENTAILMENT_LABELS`.
    """

    pair_id: str | None
    image_id: str
    hypothesis: str
    premise: str | None
    label: int


def read_snli_ve(
    path: str | os.PathLike, *, images: Container | None = None, image_name: ImageName = "{}"
) -> Annotations[EntailmentPair]:
    """Pairs of SNLI-VE (`snli_ve_train.jsonl`); pairs without a gold label ("-") are skipped and counted.

    Args:
        path: the file.
        images, image_name: pictures with features, and how their names are made of the Flickr30k id without ".jpg".

    Raises:
        FileNotFoundError, ValueError: see the package.

    Paper: Visual Entailment Task for Visually-Grounded Language Learning (Xie et al. 2018, arXiv:1811.10582).
    """
    return Annotations(_pairs(path, Images(images, image_name)))


def _pairs(path, images: Images) -> Iterator[EntailmentPair | Skip]:
    for where, record in read_json_lines(path):
        field = next((name for name in _IMAGE_FIELDS if name in record), _IMAGE_FIELDS[0])
        image = images.name(Path(str(need(record, field, "id", where))).name.removesuffix(".jpg"))
        hypothesis = need(record, "sentence2", "text", where)
        label = need(record, "gold_label", "text", where)
        skip = Skip("no gold label", where) if label == "-" else images.missing(where, image)
        if skip is not None:
            yield skip
            continue
        choice(label, ENTAILMENT_LABELS, where, "field 'gold_label'")
        yield EntailmentPair(
            record.get("pairID"), image, hypothesis, record.get("sentence1"), ENTAILMENT_LABELS.index(label)
        )
