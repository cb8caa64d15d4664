"""English to German translation of the texts of Tux Paint's stamps with their pictures.

    python examples/train_translation.py --data tuxpaint.zip --out translator/
    vlmfast caption translator/concat photo.jpg --translate "A red apple."

Trains each variant for minutes on one core: `concat`, the encoder reads text and picture; `gated`, the pooled picture
is mixed into the text; `text`, the same model without a picture, the ablation. `--data` is the zip that
`tuxpaint_captions.py` describes; the split without leakage is made by it. Mostly at the beginning, the embedded emoji
with their English and German names are among the training pairs (`--no-emoji` leaves them out).

Baselines: the source text itself, and training's most frequent German text. Differences come with standard errors of
the paired bootstrap over texts. "other pictures" gives each text the picture of another one: what the score loses is
what the pictures are worth to the model.

Written to the output folder: for each variant a folder with the model, log.jsonl, loss.png and translations.jsonl;
data/, result.json and result.md, of all variants found there, and translations.png.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

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
from vlmfast.tasks import BleuCounts, Generation, Translator, bleu, chrf, paired_bootstrap
from vlmfast.training import TrainConfig

GENERATION = Generation(beams=5, max_tokens=40)
VARIANTS = {"concat": dict(fusion="concat"), "gated": dict(fusion="gated"), "text": dict(visual="none")}


def run(data: Path, out: Path, variants: Sequence[str], config: TrainConfig, *, emoji: bool = True,
        vocab_size: int = 1200, image_size: int = 64, generation: Generation = GENERATION,
        progress: bool = True, split: str = "test", **sizes) -> dict:  # fmt: skip
    """Trains and evaluates the variants, writes the folder; returns what `result.json` holds."""
    build(data, out / "data")
    training, test = (read_examples(out / "data", name, image_size, "de", "en") for name in ("train", split))
    extra = emoji_examples(image_size, "de", "en") if emoji else []
    tokenizer = make_tokenizer([*training, *extra], vocab_size)
    used, extra = (short_enough(part, tokenizer, 28) for part in (training, extra))
    for name in variants:
        start, folder = time.perf_counter(), out / name
        folder.mkdir(parents=True, exist_ok=True)
        model = make_model(tokenizer, image_size=image_size, encoder_layers=2, **{**VARIANTS[name], **sizes})
        train(model, Batches(used, extra, tokenizer, config, word_drop=0.1), config, folder, progress)
        save_pretrained(model, folder)
        systems = translations(model, test, generation)
        facts = {"variant": name, "parameters": sum(parameter.numel() for parameter in model.parameters()),
                 "steps": config.steps, "seconds": round(time.perf_counter() - start, 1), "split": split}  # fmt: skip
        (folder / "translations.json").write_text(json.dumps({**facts, "systems": systems}, ensure_ascii=False,
                                                             indent=1), encoding="utf-8")  # fmt: skip
    result = compare(out, test, used, extra, split)
    (out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    (out / "result.md").write_text(table(result), encoding="utf-8")
    return result


def translations(model, test: Sequence[Example], generation: Generation) -> dict[str, list[str]]:
    """What the model writes, with the right pictures and with those of other texts."""
    translator, sources = Translator(model, generation), [example.source for example in test]
    if model.config.visual == "none":
        return {"": translator(sources)}
    pictures = [_image(example) for example in test]
    turned = pictures[len(pictures) // 2 :] + pictures[: len(pictures) // 2]
    return {"": translator(sources, pictures), "other pictures": translator(sources, turned)}


def compare(out: Path, test: Sequence[Example], used: Sequence[Example], extra: Sequence[Example], split: str) -> dict:
    """Scores of every variant found, of the baselines, and the differences that matter."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*/translations.json"))]
    found = [own for own in found if own["split"] == split]
    references = [example.target for example in test]
    report = [example.target for example in used]
    systems = {f"{own['variant']}{', ' * bool(kind)}{kind}": texts for own in found
               for kind, texts in own["systems"].items()}  # fmt: skip
    systems["copy source"] = [example.source for example in test]
    systems["most frequent"] = [max(sorted(set(report)), key=report.count)] * len(test)
    counts = {name: BleuCounts(texts, references) for name, texts in systems.items()}
    pairs = [(name, "copy source") for name in VARIANTS if name in systems]
    pairs += [(name, "text") for name in ("concat", "gated") if name in systems and "text" in systems]
    pairs += [(name, f"{name}, other pictures") for name in ("concat", "gated") if name in systems]
    differences = {}
    for ours, theirs in pairs:
        own = paired_bootstrap(counts[ours], counts[theirs], len(test))
        differences[f"{ours} minus {theirs}"] = {"difference": own.value, "standard_error": own.standard_error,
                                                 "standard_errors": own.errors_above}  # fmt: skip
    _sheet(out, test, systems)
    return {
        "split": split, "texts": len(test), "training_texts": len(used), "emoji": len(extra),
        "variants": [{key: value for key, value in own.items() if key != "systems"} for own in found],
        "scores": {name: {"bleu": bleu(texts, references).value, "chrf": chrf(texts, references).value,
                          "exact": sum(map(str.__eq__, texts, references)) / len(test)}
                   for name, texts in systems.items()},
        "signature": bleu(references, references).signature,
        "bleu_differences": differences,
    }  # fmt: skip


def table(result: dict) -> str:
    """Markdown."""
    trained = "; ".join(f"{own['variant']} {own['parameters'] / 1e6:.2f}M parameters, {own['steps']} steps, "
                        f"{own['seconds']:.0f} s" for own in result["variants"])
    lines = [f"English to German, {result['texts']} held-out texts ({result['split']}); {result['training_texts']} "
             f"stamps and {result['emoji']} emoji in training. {trained}.", "",
             "| system | BLEU | chrF2 | exact |", "|---|---|---|---|"]  # fmt: skip
    for name, own in result["scores"].items():
        lines.append(f"| {name} | {own['bleu']:.1f} | {own['chrf']:.1f} | {100 * own['exact']:.0f} % |")
    lines += ["", "| BLEU difference | value | standard errors |", "|---|---|---|"]
    for name, own in result["bleu_differences"].items():
        lines.append(f"| {name} | {own['difference']:+.1f} ± {own['standard_error']:.1f} | "
                     f"{own['standard_errors']:.1f} |")
    return "\n".join([*lines, "", f"BLEU: {result['signature']}", ""])


def _image(example: Example):
    from PIL import Image

    return Image.fromarray(example.pixels)


def _sheet(out: Path, test: Sequence[Example], systems: dict[str, list[str]]) -> None:
    name = next((name for name in VARIANTS if name in systems), None)
    if name is None:
        return
    shown = list(range(0, len(test), max(1, len(test) // 24)))[:24]
    titles = [f"{test[i].source} → {systems[name][i]} ({test[i].target})" for i in shown]
    contact_sheet([_image(test[i]) for i in shown], titles, columns=6, lines=5,
                  heading=f"Held-out texts: {name} (reference)").save(out / "translations.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the zip of stamps")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--variants", nargs="+", default=["concat", "text"], choices=tuple(VARIANTS))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-emoji", action="store_true", help="train on the stamps alone")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="what is evaluated (test)")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    config = TrainConfig(steps=options.steps, lr=options.lr, weight_decay=0.1, label_smoothing=0.1, ema=0.99,
                         seed=options.seed, log_every=5)
    result = run(options.data, options.out, options.variants, config, emoji=not options.no_emoji, split=options.split,
                 progress=not options.no_progress)
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
