"""COCO captions, and Karpathy's splits of COCO, Flickr8k and Flickr30k."""

import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .records import Annotations, ImageName, Images, Skip, checked, need, optional, read_json


@dataclass(frozen=True)
class CaptionedImage:
    """A picture with its captions, mostly five.

    Attributes:
        image_id: name of the picture's features.
        file_name: of the picture, with its folder where the file tells it.
        captions: the texts.
        split: "train", "restval", "val" or "test" in Karpathy's files, else None.
    """

    image_id: str
    file_name: str
    captions: tuple[str, ...]
    split: str | None = None


def read_coco_captions(
    path: str | os.PathLike, *, images: Container | None = None, image_name: ImageName = "{}"
) -> Annotations[CaptionedImage]:
    """Pictures of a COCO caption file (`captions_train2014.json`).

    Args:
        path: the file.
        images, image_name: pictures with features, and how their names are made of the COCO id, for example
            "COCO_train2014_{:0>12}".

    Raises:
        FileNotFoundError, ValueError: see the package.
    """
    path = Path(path)
    root = checked(read_json(path), "object", str(path), "the file")
    return Annotations(_coco(path, root, Images(images, image_name)))


def _coco(path: Path, root: dict, images: Images) -> Iterator[CaptionedImage | Skip]:
    captions: dict[str | int, list[str]] = {}
    pictures = []
    for i, record in enumerate(need(root, "images", "list", str(path))):
        where = f"{path}: image {i}"
        checked(record, "object", where, "the record")
        number = need(record, "id", "id", where)
        name = need(record, "file_name", "text", where)
        if number in captions:
            yield Skip("repeated image", f"{where} (id {number})")
            continue
        captions[number] = []
        pictures.append((f"{where} (id {number})", number, name))
    for i, record in enumerate(need(root, "annotations", "list", str(path))):
        where = f"{path}: annotation {i}"
        checked(record, "object", where, "the record")
        number, text = need(record, "image_id", "id", where), need(record, "caption", "text", where).strip()
        if number not in captions:
            yield Skip("caption of an unlisted image", where, f"image_id {number}")
        elif not text:
            yield Skip("empty caption", where)
        else:
            captions[number].append(text)
    for where, number, name in pictures:
        picture = CaptionedImage(images.name(number), name, tuple(captions[number]))
        skip = images.missing(where, picture.image_id) if picture.captions else Skip("image without caption", where)
        yield picture if skip is None else skip


def read_karpathy(
    path: str | os.PathLike,
    splits: str | Sequence[str] | None = None,
    *,
    images: Container | None = None,
    image_name: ImageName = "{}",
) -> Annotations[CaptionedImage]:
    """Pictures of one of Karpathy's files (`dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`).

    Args:
        path: the file.
        splits: one split or several, for example ("train", "restval"), the usual training set of COCO; None takes all.
        images, image_name: pictures with features, and how their names are made of the COCO id or, where there is
            none, of the file's name without suffix.

    Raises:
        FileNotFoundError, ValueError: see the package; also no picture of these splits.
    """
    path = Path(path)
    wanted = (splits,) if isinstance(splits, str) else splits
    root = checked(read_json(path), "object", str(path), "the file")
    records = need(root, "images", "list", str(path))
    found: Counter[str] = Counter()
    pictures = Annotations(_karpathy(path, records, wanted, Images(images, image_name), found))
    if wanted is not None and not any(split in found for split in wanted):
        raise ValueError(f"{path}: splits is {tuple(wanted)}, the file has {sorted(found)}")
    return pictures


def _karpathy(
    path: Path, records: list, splits: Sequence[str] | None, images: Images, found: Counter
) -> Iterator[CaptionedImage | Skip]:
    for i, record in enumerate(records):
        where = f"{path}: image {i}"
        checked(record, "object", where, "the record")
        split, name = need(record, "split", "text", where), need(record, "filename", "text", where)
        found[split] += 1
        if splits is not None and split not in splits:
            continue
        number = optional(record, "cocoid", "id", where)
        folder = optional(record, "filepath", "text", where)
        texts = [
            need(checked(item, "object", where, f"sentence {k}"), "raw", "text", f"{where}, sentence {k}").strip()
            for k, item in enumerate(need(record, "sentences", "list", where))
        ]
        picture = CaptionedImage(
            images.name(Path(name).stem if number is None else number),
            f"{folder}/{name}" if folder else name,
            tuple(text for text in texts if text),
            split,
        )
        where = f"{where} ({name})"
        skip = images.missing(where, picture.image_id) if picture.captions else Skip("image without caption", where)
        yield picture if skip is None else skip
