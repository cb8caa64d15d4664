"""Texts about pictures whose region features are at hand, by image id; batches of them: `region_text_batches`."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from .annotations.coco import read_coco_captions, read_karpathy
from .annotations.records import read_json
from .captions import CAPTION_COLUMNS, IMAGE_COLUMNS, Row, caption_list, read_captions
from .pairs import CAPTION_FILES, _clean
from .regions import RegionFeatures, Regions
from .report import PairsReport, Skip

JSON_NAMES = ("captions.json", "dataset.json", "dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
ID_COLUMNS = ("image_id", "img_id", *IMAGE_COLUMNS, "id")
CACHE_BYTES = 1 << 30
SUBSTITUTES = 32  # tried for a picture whose record turns out damaged
SCANNED = 4000  # pictures looked at for what the detector says


@dataclass(frozen=True)
class DetectorFacts:
    """What the detector wrote beside the features, by a look at some pictures or all.

    Attributes:
        classes, attributes: one more than the largest number found; 0: there are none.
        probabilities: width of the class distributions, 0: there are none.
        regions: most regions of a picture.
        complete: whether all pictures were looked at.
    """

    classes: int
    attributes: int
    probabilities: int
    regions: int
    complete: bool


class RegionTextPairs(Dataset):
    """Pairs of a picture's regions and one of its texts; open with :meth:`open`.

    `pairs[i]` is (Regions, text). Regions are kept in memory up to `cache_bytes` and else read anew.

    Args:
        features: the regions.
        entries: (image id, text).
        report: what was already left out; pictures without features are counted there.
        cache_bytes: of regions kept.

    Raises:
        ValueError: not one pair is usable.
    """

    def __init__(self, features: RegionFeatures, entries: Iterable[tuple[str, str]],
                 report: PairsReport | None = None, *, cache_bytes: int = CACHE_BYTES):
        self.features, self.cache_bytes = features, cache_bytes
        self._report = PairsReport() if report is None else report
        self.entries: list[tuple[str, str]] = []
        for number, (image_id, text) in enumerate(entries):
            if str(image_id) in features:
                self.entries.append((str(image_id), text))
            else:
                self._report.add(Skip("image without features", f"text {number}", f"image {image_id}"))
        self._report.used = len(self.entries)
        if not self.entries:
            raise ValueError(f"RegionTextPairs: no usable pair\n{self.report()}")
        self._cache: dict[str, Regions] = {}
        self._cached = 0
        self._damaged: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike, captions: str | os.PathLike | None = None, *, format: str | None = None,
             splits: str | Sequence[str] | None = None, image_name: str | Callable[[str], str] = "{}",
             image_column: str | None = None, caption_column: str | None = None,
             cache_bytes: int = CACHE_BYTES) -> "RegionTextPairs":
        """Opens captions with region features.

        Args:
            path: region features in any public format (see `RegionFeatures.open`), or a folder that holds one such
                file beside the captions.
            captions: a table (.csv, .tsv) or .jsonl with a column of image ids or picture names; Karpathy's or COCO's
                .json; a .json list of such records or an object image id -> captions. None: the file of a usual name
                (captions.jsonl, captions.csv, captions.json, dataset_coco.json ...) in the folder.
            format: of the features; None tells by content.
            splits: of Karpathy's files, for example ("train", "restval"), and of JSON records with a field `split`;
                None takes all.
            image_name: how a feature file names the picture of an id, for example "COCO_train2014_{:0>12}".
                Without it an id is also looked for without its folder or suffix.
            image_column, caption_column: of a table, where their names are unusual.

        Raises:
            FileNotFoundError: nothing there. ValueError: damaged, or not one pair is usable.
        """
        path = Path(path)
        features_path, found = (path, None) if captions is not None and not path.is_dir() else find_files(path)
        features_path = features_path or path
        captions = Path(captions) if captions is not None else found
        if captions is None:
            raise FileNotFoundError(f"RegionTextPairs: {path} holds no captions; name the file of captions")
        features = RegionFeatures.open(features_path, format)
        report = PairsReport()
        name = image_name.format if isinstance(image_name, str) else image_name
        known: dict[str, list[str]] = {}
        for row in _caption_rows(captions, splits, image_column, caption_column, report):
            if isinstance(row, Skip):
                report.add(row)
                continue
            where, image, texts = row
            image_id = next((x for x in _spellings(image, name) if x in features), None)
            if image_id is None:
                report.add(Skip("image without features", where, f"image {image.split(chr(0))[0]}"))
                continue
            known.setdefault(image_id, []).extend(_clean(where, texts, known.get(image_id, ()), report))
        entries = [(image_id, text) for image_id, texts in known.items() for text in texts]
        return cls(features, entries, report, cache_bytes=cache_bytes)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> tuple[Regions, str]:
        image_id, text = self.entries[i]
        return self.regions(image_id), text

    def regions(self, image_id: str) -> Regions:
        """The regions of a picture; ValueError, naming file and row, where the record is damaged."""
        found = self._cache.get(image_id)
        if found is None:
            found = self.features[image_id]
            size = found.features.nbytes + found.boxes.nbytes
            size += 0 if found.class_probabilities is None else found.class_probabilities.nbytes
            if self._cached + size <= self.cache_bytes:
                self._cache[image_id] = found
                self._cached += size
        return found

    def readable(self, i: int) -> int:
        """`i`, or the next pair whose picture can be read where its own cannot; that is counted in :meth:`report`."""
        for step in range(min(SUBSTITUTES, len(self))):
            k = (i + step) % len(self)
            image_id = self.entries[k][0]
            try:
                self.regions(image_id)
            except ValueError as error:
                if image_id not in self._damaged:
                    self._damaged.add(image_id)
                    self._report.add(Skip("damaged record", f"image {image_id}", str(error)))
                continue
            return k
        raise ValueError(f"RegionTextPairs: pictures of {SUBSTITUTES} pairs in a row cannot be read\n{self.report()}")

    @property
    def feature_dim(self) -> int:
        return self.features.feature_dim

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.entries]

    @property
    def images(self) -> list[str]:
        """Ids of the pictures that have a text, each once, in order."""
        return list(dict.fromkeys(image_id for image_id, _ in self.entries))

    def select(self, indices: Iterable[int]) -> "RegionTextPairs":
        """Some of the pairs, with the same features and a report of their own."""
        return RegionTextPairs(self.features, [self.entries[i] for i in indices], cache_bytes=self.cache_bytes)

    def split(self, fraction: float, seed: int = 0) -> tuple["RegionTextPairs", "RegionTextPairs"]:
        """(rest, held out): all texts of a picture on one side; at least one picture on each.

        Raises:
            ValueError: fraction is not in (0, 1), or there is one picture only.
        """
        images = self.images
        if not 0 < fraction < 1:
            raise ValueError(f"RegionTextPairs.split: fraction is {fraction}, must be in (0, 1)")
        if len(images) < 2:
            raise ValueError("RegionTextPairs.split: there is one picture, must be two at least")
        order = np.random.default_rng(seed).permutation(len(images))
        count = min(max(1, round(fraction * len(images))), len(images) - 1)
        held = {images[i] for i in order[:count]}
        sides = [[i for i, (image_id, _) in enumerate(self.entries) if (image_id in held) == side]
                 for side in (False, True)]
        return self.select(sides[0]), self.select(sides[1])

    def facts(self, limit: int = SCANNED) -> DetectorFacts:
        """What the detector says of the first `limit` pictures."""
        images = self.images
        classes = attributes = probabilities = regions = 0
        for image_id in images[:limit]:
            try:
                found = self.regions(image_id)
            except ValueError:
                continue  # counted where it is asked for
            regions = max(regions, len(found))
            if found.classes is not None:
                classes = max(classes, int(found.classes.max()) + 1)
            if found.attributes is not None:
                attributes = max(attributes, int(found.attributes.max()) + 1)
            if found.class_probabilities is not None:
                probabilities = found.class_probabilities.shape[1]
        return DetectorFacts(classes, attributes, probabilities, regions, len(images) <= limit)

    def report(self) -> PairsReport:
        """Pairs that can be used, and what was left out with reasons and examples."""
        return self._report


def find_files(folder: Path) -> tuple[Path | None, Path | None]:
    """(region features, captions) in a folder; None for what it does not hold, and (path, None) for a file.

    Raises:
        FileNotFoundError: no such folder. ValueError: it holds several region files.
    """
    if not folder.exists():
        raise FileNotFoundError(f"RegionTextPairs: {folder} does not exist")
    if folder.is_file():
        return folder, None
    names = sorted(os.listdir(folder))
    captions = next((folder / name for name in ("captions.jsonl", *CAPTION_FILES, *JSON_NAMES) if name in names), None)
    files = [name for name in names if name.endswith((".tsv", ".h5", ".hdf5", ".lmdb")) and name not in CAPTION_FILES]
    if len(files) > 1:
        raise ValueError(f"RegionTextPairs: {folder} holds several region files ({', '.join(files)}), name one")
    if files:
        return folder / files[0], captions
    inner = next((name for name in ("features", "regions") if (folder / name).is_dir()), None)
    return (folder if inner is None else folder / inner), captions


def _spellings(image: str, name: Callable[[str], str]) -> Iterator[str]:
    """What a feature file may call a picture; `image` is one name, or several with NUL between them."""
    for one in image.split("\0"):
        path = Path(one)
        yield from dict.fromkeys((name(one), one, str(path.with_suffix("")) if path.name else one, path.name,
                                  path.stem))


def _caption_rows(path: Path, splits, image_column: str | None, caption_column: str | None,
                  report: PairsReport) -> Iterator[Row | Skip]:
    if not path.is_file():
        raise FileNotFoundError(f"RegionTextPairs: no file of captions at {path}")
    if path.suffix.lower() == ".json":
        yield from _json_rows(path, splits, report)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _line_rows(path, _wanted(splits), image_column, caption_column)
    else:
        if image_column is None:
            with open(path, encoding="utf-8", errors="replace") as file:
                cells = [cell.strip(' "\ufeff\r\n').lower() for cell in file.readline().replace(";", ",").replace(
                    "\t", ",").split(",")]
            image_column = next((name for name in ID_COLUMNS if name in cells and name not in IMAGE_COLUMNS), None)
        yield from read_captions(path, image_column, caption_column, None)


def _wanted(splits: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (splits,) if isinstance(splits, str) else None if splits is None else tuple(splits)


def _line_rows(path: Path, splits: tuple[str, ...] | None, image_column: str | None,
               caption_column: str | None) -> Iterator[Row | Skip]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Skip("malformed JSON", f"{path}:{number}", str(error))
                    continue
                if splits is None or not isinstance(record, dict) or record.get("split") in splits:
                    yield _record_row(f"{path}:{number}", record, image_column, caption_column)


def _record_row(where: str, record, image_column: str | None, caption_column: str | None) -> Row | Skip:
    if not isinstance(record, dict):
        return Skip("malformed JSON", where, f"{type(record).__name__}, must be an object")
    found = [next((record[name] for name in names if name in record), None)
             for names in ((image_column,) if image_column else ID_COLUMNS,
                           (caption_column,) if caption_column else CAPTION_COLUMNS)]
    image, texts = found[0], caption_list(found[1])
    if isinstance(image, bool) or not isinstance(image, str | int) or texts is None:
        missing = "caption" if texts is None else "image"
        return Skip("missing field", where, f"no {missing} among {sorted(map(str, record))[:8]}")
    return where, str(image), texts


def _json_rows(path: Path, splits, report: PairsReport) -> Iterator[Row | Skip]:
    content = read_json(path)
    if isinstance(content, list):
        wanted = _wanted(splits)
        for i, record in enumerate(content):
            if wanted is not None and isinstance(record, dict) and record.get("split") not in wanted:
                continue
            yield _record_row(f"{path}: record {i}", record, None, None)
        return
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        if not isinstance(content, dict) or any(caption_list(texts) is None for texts in content.values()):
            raise ValueError(f"RegionTextPairs: {path} is neither Karpathy's nor COCO's layout, nor a list of records, "
                             "nor an object image id -> captions")
        for image, texts in content.items():
            yield f"{path}: {image}", image, caption_list(texts)
        return
    karpathy = bool(images) and isinstance(images[0], dict) and "sentences" in images[0]
    pictures = read_karpathy(path, splits) if karpathy else read_coco_captions(path)
    report.skipped.update(pictures.report().skipped)
    for reason, places in pictures.report().examples.items():
        report.examples.setdefault(reason, []).extend(places)
    for picture in pictures:
        yield f"{path}: {picture.file_name}", f"{picture.image_id}\0{picture.file_name}", list(picture.captions)
