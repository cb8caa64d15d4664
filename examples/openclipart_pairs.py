"""Pictures and texts for retrieval, from Open Clip Art.

    python examples/openclipart_pairs.py --data openclipart.zip --out pairs/

`--data` is a zip with `meta.json` (a list of {"i": N, "en": title, "kw": keywords, "desc": ..., "cat": ...}) and
`img/N.webp` (public domain; not part of this package).

Pictures with the same title but for its numbers ("arrow 01", "arrow 02"), the same whole text, or the same looks stay
on one side. Titles are the uploaders' words; many are terse, some are not English.

Written to the output folder:
    SPLIT/images/N.png, SPLIT/captions.csv   image, caption, category, as `vlmfast.data.open_pairs` reads it
    report.json                              counts, and recall of a random order
"""

import argparse
import csv
import json
import re
from collections import Counter
from pathlib import Path

from picture_packs import group_entries, leaks, plain_text, read_pack, split_groups

from vlmfast.data import open_pairs
from vlmfast.tasks.metrics import chance_recall, same_caption_ids

SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
TEXTS = ("title", "keywords", "both")


def text_of(record: dict, text: str = "both") -> str:
    """The text of a picture: "title", "keywords", or "both", where keywords that repeat the title are left out."""
    title = " ".join(record["en"].split())
    words = [" ".join(word.split()) for word in record.get("kw") or [] if isinstance(word, str) and word.strip()]
    if text == "title" or not words:
        return title
    if text == "keywords":
        return ", ".join(words)
    new = [word for word in dict.fromkeys(words) if word.lower() not in title.lower()]
    return ", ".join([title, *new])


def series(record: dict) -> str:
    """The title without numbers, which most often count pictures of a series."""
    title = plain_text(record["en"])
    return " ".join(re.sub(r"\b[a-z]?\d+[a-z]?\b", " ", title).split()) or title


def build(data: str | Path, out: str | Path, text: str = "both", seed: int = 0) -> dict:
    """Writes the set and returns what `report.json` holds."""
    if text not in TEXTS:
        raise ValueError(f"build: text is {text!r}, must be one of {TEXTS}")
    out = Path(out)
    entries, left_out = read_pack(data)
    texts = [text_of(entry.record, text) for entry in entries]
    keys = [[("series", series(entry.record)), ("text", plain_text(own))]
            for entry, own in zip(entries, texts, strict=True)]
    groups = group_entries(entries, keys)
    splits = split_groups(groups, SPLITS, seed)
    report = {
        "pictures": len(entries),
        "left_out": dict(left_out),
        "groups": len(set(groups)),
        "groups_in_several_splits": leaks(groups, splits),
        "splits": dict(Counter(splits)),
        "chance": {},
    }
    for split in SPLITS:
        (out / split / "images").mkdir(parents=True, exist_ok=True)
        with open(out / split / "captions.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "caption", "category"])
            for entry, own, side in zip(entries, texts, splits, strict=True):
                if side == split:
                    name = f"images/{entry.number}.png"
                    entry.image.save(out / split / name)
                    table.writerow([name, own, entry.record.get("cat", "")])
        report["chance"][split] = chance(out / split)
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def chance(folder: Path) -> dict[str, float]:
    """Recall of a random order over the split, equal captions counted as right."""
    pairs = open_pairs(folder)
    ids = same_caption_ids([pairs.caption(i) for i in range(len(pairs))])
    return {f"r{k}": chance_recall(ids, ids, k) for k in (1, 5, 10)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="the zip of pictures")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--text", choices=TEXTS, default="both")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = build(options.data, options.out, options.text, options.seed)
    print(f"{report['pictures']} pictures in {report['groups']} groups, left out {report['left_out'] or 'none'}")
    print(f"splits {report['splits']}, groups in several splits: {report['groups_in_several_splits']}")
    for split, recall in report["chance"].items():
        print(f"{split:5} random order: " + ", ".join(f"{k.upper().replace('R', 'R@')} {v:.4f}"
                                                      for k, v in recall.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
