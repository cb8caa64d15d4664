"""Captioning of the stamps of Tux Paint: trains a small encoder-decoder and says what it is worth.

    python examples/train_captioning.py --data tuxpaint.zip --out captioner/
    vlmfast caption captioner/ photo.jpg

Minutes on one core. `--data` is the zip that `tuxpaint_captions.py` describes; the split without leakage is made by it.
The model sees the 747 training stamps and, mostly at the beginning, the embedded emoji with their names
(`--no-emoji` leaves them out).

Baselines: the constant caption that is best by CIDEr-D on the training stamps, the most frequent one, and the caption
of the training stamp that looks most alike. The difference to the best constant comes with standard errors of the
paired bootstrap over pictures, and over whole categories of pictures (letters, for example, resemble one another).

Written to the output folder: the model, log.jsonl, loss.png, data/, captions.jsonl (test), result.json, result.md and
captions.png, a sheet of held-out pictures with what was written.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from text_training import (
    Batches,
    Example,
    emoji_examples,
    make_model,
    make_tokenizer,
    read_examples,
    short_enough,
    train,
)
from tuxpaint_captions import build

from vlmfast.checkpoints import save_pretrained
from vlmfast.data import contact_sheet
from vlmfast.tasks import Captioner, CiderD, Generation, bleu, paired_bootstrap
from vlmfast.training import TrainConfig

GENERATION = Generation(beams=4, length_penalty=0.5, max_tokens=24)


def nearest_captions(test: Sequence[Example], training: Sequence[Example]) -> list[str]:
    """The caption of the training picture with the nearest 16 x 16 thumbnail."""
    def small(examples: Sequence[Example]) -> np.ndarray:
        pixels = np.stack([example.pixels for example in examples]).astype(np.float32)
        side = pixels.shape[1] // 16
        return pixels.reshape(len(pixels), 16, side, 16, side, 3).mean((2, 4)).reshape(len(pixels), -1)

    known = small(training)
    return [training[int(np.square(known - row).sum(1).argmin())].target for row in small(test)]


def evaluate(texts: Sequence[str], test: Sequence[Example]) -> dict:
    """CIDEr-D with the statistics of the test set's references, and BLEU-4 without case."""
    references = [[example.target] for example in test]
    cider = CiderD(references).score(texts, references)
    letters = np.array([example.target.startswith("The letter ") for example in test])
    return {"cider_d": cider.value, "standard_error": cider.standard_error, "per_caption": cider.per_caption.tolist(),
            "cider_d_letters": float(cider.per_caption[letters].mean()) if letters.any() else None,
            "cider_d_others": float(cider.per_caption[~letters].mean()) if not letters.all() else None,
            "bleu": bleu(texts, references, lowercase=True).value,
            "exact": float(np.mean([text == own for text, [own] in zip(texts, references, strict=True)]))}  # fmt: skip


def run(data: Path, out: Path, config: TrainConfig, *, emoji: bool = True, vocab_size: int = 900, image_size: int = 64,
        generation: Generation = GENERATION, progress: bool = True, split: str = "test", **sizes) -> dict:
    """Trains, evaluates, writes the folder; returns what `result.json` holds."""
    start = time.perf_counter()
    report = build(data, out / "data")
    training, test = (read_examples(out / "data", name, image_size, "en") for name in ("train", split))
    extra = emoji_examples(image_size, "en") if emoji else []
    tokenizer = make_tokenizer([*training, *extra], vocab_size)
    used, extra = (short_enough(part, tokenizer, 24) for part in (training, extra))
    model = make_model(tokenizer, image_size=image_size, **{"hidden_dropout_prob": 0.1, **sizes})
    train(model, Batches(used, extra, tokenizer, config), config, out, progress)
    save_pretrained(model, out)
    texts = Captioner(model, generation)([_image(example) for example in test])
    constants = report["captions"][split]
    systems = {
        "model": texts,
        "best constant": [constants["best_constant"]["text"]] * len(test),
        "most frequent": [constants["most_frequent"]["text"]] * len(test),
        "nearest picture": nearest_captions(test, training),
    }
    scores = {name: evaluate(own, test) for name, own in systems.items()}
    result = {
        "split": split, "pictures": len(test), "training_pictures": len(used), "emoji": len(extra),
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "steps": config.steps,
        "seconds": round(time.perf_counter() - start, 1), "constant": constants["best_constant"]["text"],
        "scores": {name: {key: value for key, value in own.items() if key != "per_caption"}
                   for name, own in scores.items()},
        "model_minus": {name: compare(scores["model"], scores[name], test) for name in scores if name != "model"},
    }  # fmt: skip
    _write(out, result, texts, test, scores["model"]["per_caption"])
    return result


def compare(ours: dict, theirs: dict, test: Sequence[Example]) -> dict:
    """The difference in CIDEr-D over pictures and over categories."""
    values = [np.array(own["per_caption"]) for own in (ours, theirs)]
    categories = [example.category.split("/")[0] for example in test]
    found = {}
    for name, clusters in (("pictures", None), ("categories", categories)):
        if clusters is None or len(set(clusters)) > 1:
            own = paired_bootstrap(*(lambda drawn, v=v: float(v[drawn].mean()) for v in values), len(test),
                                   clusters=clusters)
            found[name] = {"difference": own.value, "standard_error": own.standard_error,
                           "standard_errors": own.errors_above}  # fmt: skip
    return found


def table(result: dict) -> str:
    """Markdown."""
    lines = [f"Captions of {result['pictures']} held-out stamps ({result['split']}); {result['training_pictures']} "
             f"stamps and {result['emoji']} emoji in training, {result['parameters'] / 1e6:.2f}M parameters, "
             f"{result['steps']} steps, {result['seconds']:.0f} s.", "",
             "| system | CIDEr-D | letters | others | BLEU-4 | exact | model minus it | over categories |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, own in result["scores"].items():
        cells = [name, f"{own['cider_d']:.3f} ± {own['standard_error']:.3f}"]
        cells += ["–" if own[key] is None else f"{own[key]:.3f}" for key in ("cider_d_letters", "cider_d_others")]
        cells += [f"{own['bleu']:.1f}", f"{100 * own['exact']:.0f} %"]
        for kind in ("pictures", "categories"):
            other = result["model_minus"].get(name, {}).get(kind)
            cells.append("" if other is None else f"{other['difference']:+.3f} ± {other['standard_error']:.3f} "
                                                  f"({other['standard_errors']:.1f} se)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"The best constant caption of training is {result['constant']!r}.", ""])


def _image(example: Example):
    from PIL import Image

    return Image.fromarray(example.pixels)


def _write(out: Path, result: dict, texts: list[str], test: Sequence[Example], scores: list[float]) -> None:
    rows = [{"image": example.name, "category": example.category, "caption": text, "reference": example.target,
             "cider_d": score} for example, text, score in zip(test, texts, scores, strict=True)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "captions.jsonl").write_text(lines, encoding="utf-8")
    (out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    (out / "result.md").write_text(table(result), encoding="utf-8")
    shown = list(range(0, len(test), max(1, len(test) // 24)))[:24]
    titles = [f"{texts[i]} ({test[i].target})" for i in shown]
    contact_sheet([_image(test[i]) for i in shown], titles, columns=6, lines=4,
                  heading="Held-out stamps: what the model writes (what people wrote)").save(out / "captions.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the zip of stamps")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-emoji", action="store_true", help="train on the stamps alone")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="what is evaluated (test)")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    config = TrainConfig(steps=options.steps, lr=options.lr, weight_decay=0.1, label_smoothing=0.1, ema=0.99,
                         seed=options.seed, log_every=5)
    result = run(options.data, options.out, config, emoji=not options.no_emoji, split=options.split,
                 progress=not options.no_progress)
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
