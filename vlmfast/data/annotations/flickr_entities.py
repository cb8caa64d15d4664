"""Flickr30k Entities: captions whose phrases are linked to boxes."""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from .records import Annotations, ImageName, Images, Skip, read_text

Box = tuple[float, float, float, float]
MAX_XML_BYTES = 1 << 22
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+)\s+([^\]]*?)\s*\]")


@dataclass(frozen=True)
class EntityPhrase:
    """Part of a caption that names something.

    Attributes:
        text: the words; first, last: numbers of the first word and of the one after the last in the sentence.
        entity: id of what it names, the same in all captions of a picture; "0" for what cannot be seen.
        types: such as ("people",) or ("vehicles", "other").
    """

    text: str
    first: int
    last: int
    entity: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class EntitySentence:
    """A caption: its text without markup, its words (split at white space) and its phrases."""

    text: str
    words: tuple[str, ...]
    phrases: tuple[EntityPhrase, ...]


@dataclass(frozen=True)
class EntityImage:
    """A picture with linked captions.

    Attributes:
        image_id: name of the picture's features.
        width, height: in pixels.
        sentences: mostly five.
        boxes: entity -> its boxes, x1, y1, x2, y2 in pixels counted from 0 (the files count from 1).
        scenes: entities that are the whole scene; without_box: entities that have no box.
    """

    image_id: str
    width: int
    height: int
    sentences: tuple[EntitySentence, ...]
    boxes: dict[str, tuple[Box, ...]] = field(hash=False)
    scenes: frozenset[str] = frozenset()
    without_box: frozenset[str] = frozenset()

    def groundings(self) -> Iterator[tuple[EntitySentence, EntityPhrase, tuple[Box, ...]]]:
        """(sentence, phrase, boxes) of every phrase with a box."""
        for sentence in self.sentences:
            for phrase in sentence.phrases:
                if phrase.entity in self.boxes:
                    yield sentence, phrase, self.boxes[phrase.entity]


def read_flickr_entities(
    root: str | os.PathLike,
    image_ids: str | os.PathLike | Iterable[str] | None = None,
    *,
    images: Container | None = None,
    image_name: ImageName = "{}",
) -> Annotations[EntityImage]:
    """Pictures of Flickr30k Entities.

    Args:
        root: the folder with `Sentences/ID.txt` and `Annotations/ID.xml`.
        image_ids: a split file (`train.txt`, an id a line), the ids, or None for all in `Sentences/`.
        images, image_name: pictures with features, and how their names are made of the id.

    Raises:
        FileNotFoundError: no such folder or split file; a picture's missing file is a counted skip.
        ValueError: damaged markup or XML, naming the file; XML with a DOCTYPE is refused unread.

    Paper: Flickr30k Entities (Plummer et al. 2015, arXiv:1505.04870).
    """
    root = Path(root)
    if not (root / "Sentences").is_dir():
        raise FileNotFoundError(f"read_flickr_entities: {root / 'Sentences'} is not a folder")
    if image_ids is None:
        image_ids = sorted(path.stem for path in (root / "Sentences").glob("*.txt"))
    elif isinstance(image_ids, (str, os.PathLike)):
        image_ids = read_text(Path(image_ids)).split()
    return Annotations(_images(root, image_ids, Images(images, image_name)))


def _images(root: Path, image_ids: Iterable[str], images: Images) -> Iterator[EntityImage | Skip]:
    for image_id in image_ids:
        if not re.fullmatch(r"[\w-]+", image_id):
            raise ValueError(f"read_flickr_entities: image id is {image_id[:60]!r}, must be letters and digits")
        name = images.name(image_id)
        texts, boxes = root / "Sentences" / f"{image_id}.txt", root / "Annotations" / f"{image_id}.xml"
        absent = next((path for path in (texts, boxes) if not path.is_file()), None)
        skip = Skip("missing file", str(absent)) if absent is not None else images.missing(str(texts), name)
        if skip is not None:
            yield skip
            continue
        sentences = tuple(
            parse_entity_sentence(line, f"{texts}: line {number}")
            for number, line in enumerate(read_text(texts).split("\n"), 1)
            if line.strip()
        )
        yield EntityImage(name, sentences=sentences, **_read_boxes(boxes))


def parse_entity_sentence(line: str, where: str = "sentence") -> EntitySentence:
    """A caption such as "[/EN#1/people Two men] wave ." taken apart.

    Raises:
        ValueError: damaged markup.
    """
    words: list[str] = []
    phrases = []
    at = 0
    for match in _PHRASE.finditer(line):
        words += line[at : match.start()].split()
        own = match[3].split()
        phrases.append(
            EntityPhrase(" ".join(own), len(words), len(words) + len(own), match[1], tuple(match[2][1:].split("/")))
        )
        words += own
        at = match.end()
    words += line[at:].split()
    if any("/EN#" in word for word in words) or any("/EN#" in phrase.text for phrase in phrases):
        raise ValueError(f"{where}: damaged phrase in {line.strip()[:80]!r}, must be [/EN#number/type words]")
    return EntitySentence(" ".join(words), tuple(words), tuple(phrases))


def _read_boxes(path: Path) -> dict:
    root = _safe_xml(path)
    boxes: dict[str, list[Box]] = {}
    scenes, without = set(), set()
    size = root.find("size")
    if size is None:
        raise ValueError(f"{path}: element 'size' is missing")
    for i, item in enumerate(root.iter("object")):
        where = f"{path}: object {i}"
        names = [(name.text or "").strip() for name in item.findall("name")]
        if not names:
            raise ValueError(f"{where}: element 'name' is missing")
        frame = item.find("bndbox")
        for name in names:
            if frame is not None:
                x1, y1, x2, y2 = (_number(frame, side, where) - 1.0 for side in ("xmin", "ymin", "xmax", "ymax"))
                boxes.setdefault(name, []).append((x1, y1, x2, y2))
                continue
            if item.find("scene") is not None and _number(item, "scene", where):
                scenes.add(name)
            if item.find("nobox") is not None and _number(item, "nobox", where):
                without.add(name)
    return {
        "width": _number(size, "width", str(path)),
        "height": _number(size, "height", str(path)),
        "boxes": {name: tuple(found) for name, found in boxes.items()},
        "scenes": frozenset(scenes),
        "without_box": frozenset(without),
    }


def _number(parent: ElementTree.Element, name: str, where: str) -> int:
    element = parent.find(name)
    if element is None:
        raise ValueError(f"{where}: element {name!r} is missing")
    text = (element.text or "").strip()
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise ValueError(f"{where}: {name} is {text[:40]!r}, must be an integer")
    return int(text)


def _safe_xml(path: Path) -> ElementTree.Element:
    """The root element. A document type is refused: entities can grow without end or name other files."""
    if path.stat().st_size > MAX_XML_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, must have at most {MAX_XML_BYTES}")
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_):
        raise ValueError(f"{path}: line {parser.CurrentLineNumber} declares a document type, which is not read")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"{path}: line {error.lineno} is malformed XML: {error}") from None
    return builder.close()
