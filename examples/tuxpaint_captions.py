"""Captions, and English to German translation with pictures, from the stamps of Tux Paint.

    python examples/tuxpaint_captions.py --data tuxpaint.zip --out captions/

`--data` is a zip with `meta.json` (a list of {"i": N, "en": ..., "de": ..., "cat": ...}) and `img/N.webp`, the stamps
of Tux Paint (GPL-2; they are not part of this package, and what is made of them falls under their licence).

Pictures that share an English or a German sentence, or that look the same, stay on one side, so no sentence and no
picture of the held-out splits occurs in training. What remains alike are kinds of things: another apple with another
sentence. The sets are small, about 90 pictures in each held-out split; quote standard errors. BLEU and chrF need the
extra `metrics`.

Written to the output folder:
    images/N.png             the pictures on white
    captions.json            Karpathy's layout (`read_karpathy`), splits train, val and test
    SPLIT.en, SPLIT.de, SPLIT.txt   Multi30k's layout (`read_multi30k`), with the pictures' names
    report.json              counts, and the trivial baselines of the held-out splits
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from picture_packs import group_entries, leaks, plain_text, read_pack, split_groups

from vlmfast.data.annotations import read_karpathy, read_multi30k
from vlmfast.tasks.text_metrics import CiderD, bleu, chrf

SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}


def build(data: str | Path, out: str | Path, source: str = "en", target: str = "de", seed: int = 0) -> dict:
    """Writes the set and returns what `report.json` holds."""
    out = Path(out)
    entries, left_out = read_pack(data, (source, target))
    texts = [[" ".join(entry.record[language].split()) for language in (source, target)] for entry in entries]
    groups = group_entries(entries, [[(k, plain_text(text)) for k, text in enumerate(own)] for own in texts])
    splits = split_groups(groups, SPLITS, seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for entry, own, split in zip(entries, texts, splits, strict=True):
        entry.image.save(out / "images" / f"{entry.number}.png")
        records.append({
            "filepath": "images", "filename": f"{entry.number}.png", "imgid": entry.number, "split": split,
            "category": entry.record.get("cat", ""),
            "sentences": [{"raw": own[0], "tokens": plain_text(own[0]).split(), "imgid": entry.number,
                           "sentid": entry.number}],
        })  # fmt: skip
    captions = {"dataset": "tuxpaint", "images": records}
    (out / "captions.json").write_text(json.dumps(captions, ensure_ascii=False, indent=1), encoding="utf-8")
    for split in SPLITS:
        rows = [(entry, own) for entry, own, side in zip(entries, texts, splits, strict=True) if side == split]
        for k, suffix in enumerate((source, target)):
            _write_lines(out / f"{split}.{suffix}", [own[k] for _, own in rows])
        _write_lines(out / f"{split}.txt", [f"{entry.number}.png" for entry, _ in rows])
    report = {
        "pictures": len(entries),
        "left_out": dict(left_out),
        "groups": len(set(groups)),
        "groups_in_several_splits": leaks(groups, splits),
        "splits": dict(Counter(splits)),
        "captions": {split: caption_baseline(out, split) for split in ("val", "test")},
        "translation": {split: translation_baseline(out, split, source, target) for split in ("val", "test")},
    }
    (out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    return report


def caption_baseline(out: Path, split: str) -> dict:
    """Scores of saying the same about every picture: training's most frequent caption, and its best by CIDEr-D there.

    Statistics of n-grams are the split's own, as test sets are evaluated.
    """
    train = [picture.captions[0] for picture in read_karpathy(out / "captions.json", "train")]
    held_out = [list(picture.captions) for picture in read_karpathy(out / "captions.json", split)]
    frequent = Counter(train).most_common(1)[0][0]
    texts = list(dict.fromkeys(train))
    every = CiderD(train).score([text for text in texts for _ in train], train * len(texts)).per_caption
    best = texts[int(every.reshape(len(texts), len(train)).mean(axis=1).argmax())]
    scores = {"count": len(held_out)}
    for name, text in (("most_frequent", frequent), ("best_constant", best)):
        value = CiderD(held_out).score([text] * len(held_out), held_out)
        scores[name] = {"text": text, "cider_d": value.value, "standard_error": value.standard_error,
                        "bleu": bleu([text] * len(held_out), held_out, lowercase=True).value}  # fmt: skip
    return scores


def translation_baseline(out: Path, split: str, source: str = "en", target: str = "de") -> dict:
    """Scores of handing back the source sentence, and of training's most frequent sentence."""
    pairs = {
        name: read_multi30k(*(out / f"{name}.{suffix}" for suffix in (source, target, "txt")))
        for name in ("train", split)
    }
    references = [pair.target for pair in pairs[split]]
    frequent = Counter(pair.target for pair in pairs["train"]).most_common(1)[0][0]
    answers = {"copy_source": [pair.source for pair in pairs[split]], "most_frequent": [frequent] * len(references)}
    scores = {
        name: {"bleu": bleu(texts, references).value, "chrf": chrf(texts, references).value}
        for name, texts in answers.items()
    }
    return {"count": len(references), **scores}


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="the zip of stamps")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--source", default="en")
    parser.add_argument("--target", default="de")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = build(options.data, options.out, options.source, options.target, options.seed)
    print(f"{report['pictures']} pictures in {report['groups']} groups, left out {report['left_out'] or 'none'}")
    print(f"splits {report['splits']}, groups in several splits: {report['groups_in_several_splits']}")
    for split, scores in report["captions"].items():
        for name in ("most_frequent", "best_constant"):
            own = scores[name]
            print(f"{split:5} caption, {name} {own['text']!r}: CIDEr-D {own['cider_d']:.3f} ± "
                  f"{own['standard_error']:.3f}, BLEU {own['bleu']:.1f}")
    for split, scores in report["translation"].items():
        for name in ("copy_source", "most_frequent"):
            print(f"{split:5} {options.source} -> {options.target}, {name}: BLEU {scores[name]['bleu']:.1f}, chrF2 "
                  f"{scores[name]['chrf']:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
