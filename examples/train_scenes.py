"""UNITER on composed scenes by the package's own commands: pretraining, questions (VQA), statements on two pictures.

    python examples/train_scenes.py --pictures tuxpaint.zip --out run/

Minutes on one core. Each training is a `vlmfast train uniter ...` that is printed before it runs, so that it can be
repeated by hand. Scenes, questions and statements are those of `tuxpaint_scenes.py`, whose docstring says what is real:
the cut-outs are, the scenes are composed of them, and the language is a handful of templates. Captions name all objects
of a scene (`two_stream_data.caption`); region features are shifted and scaled by their mean and spread in training.

Held out are new scenes of cut-outs that training shows, and cut-outs that it never shows. Beside the accuracy stand
those of the most frequent answer to the same text and to any, with standard errors.

Written to the output folder: scenes/, features.tsv, captions.jsonl, the run folders pretraining/, vqa/ and nlvr/,
result.json and result.md.
"""

import argparse
import json
import math
import shlex
import time
from pathlib import Path

import tuxpaint_scenes
from two_stream_data import SPLITS, Scenes

from vlmfast.checkpoints import load
from vlmfast.cli import main as vlmfast_main
from vlmfast.data import RegionFeatures, write_regions
from vlmfast.tasks import NLVR2, VQA, read_answers

SIZE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
        "initializer_range": 0.08, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STEPS = {"pretraining": 2000, "vqa": 1500, "nlvr": 600}


def run(pictures, out: Path, *, steps: dict[str, int] | None = None, train: int = 6000, test: int = 300,
        seed: int = 0, size: dict | None = None, progress: bool = True) -> dict:
    """Composes scenes, trains and measures; returns what `result.json` holds.

    Args:
        pictures: zip for `tuxpaint_scenes.build`.
        out: folder of the run.
        steps: of the trainings named in STEPS. size: config fields. train, test: scenes.
    """
    out, steps, started = Path(out), {**STEPS, **(steps or {})}, time.process_time()
    tuxpaint_scenes.build(pictures, out / "scenes", train=train, test=test, per_scene=4, seed=seed)
    scenes = Scenes.read(out / "scenes")
    write_regions(out / "features.tsv", scenes.regions)
    lines = [json.dumps({"image_id": row["image_id"], "caption": row["text"]}) for row in scenes.captions(seed)]
    (out / "captions.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    fields = [part for name, value in {**SIZE, **(size or {})}.items() for part in ("--config", f"{name}={value}")]
    first, questions, statements = (out / name for name in ("pretraining", "scenes/questions.jsonl",
                                                            "scenes/statements.jsonl"))
    trainings = {
        "pretraining": ["--objectives", "mlm,itm,mrc", "--preset", "lxmert", "--captions", out / "captions.jsonl",
                        "--size", "tiny", *fields, "--lr", "2e-3"],
        "vqa": ["--task", "vqa", "--init", first, "--train", questions, "--train-splits", "train", "--lr", "1e-3"],
        "nlvr": ["--task", "nlvr2", "--init", first, "--train", statements, "--train-splits", "train", "--lr", "1e-3"],
    }  # fmt: skip
    seconds = {}
    for name, options in trainings.items():
        since = time.process_time()
        command = ["train", "uniter", "--data", out / "features.tsv", *options, "--val-fraction", "0", "--steps",
                   steps[name], "--seed", seed, "--device", "cpu", "--out", out / name]  # fmt: skip
        command = [str(part) for part in command] + ([] if progress else ["--no-progress"])
        print(f"vlmfast {shlex.join(command)}", flush=True)
        if status := vlmfast_main(command):
            raise SystemExit(status)
        seconds[name] = round(time.process_time() - since, 1)
    result = {"seed": seed, "scenes": {"train": train, "each test split": test}, "steps": steps, "seconds": seconds,
              "rows": [*_vqa(out, scenes), *_nlvr(out)]}  # fmt: skip
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "result.md").write_text(table(result), encoding="utf-8")
    return result


def _vqa(out: Path, scenes: Scenes) -> list[dict]:
    task, features = VQA(load(out / "vqa"), read_answers(out / "vqa")), RegionFeatures.open(out / "features.tsv")
    blind = tuxpaint_scenes.blind_accuracy(scenes.questions, "question", "answer")
    rows = []
    for split, title in SPLITS.items():
        asked = [row for row in scenes.questions if row["split"] == split]
        found = task([row["question"] for row in asked], [features[row["image_id"]] for row in asked], top=1)
        hits = [str(answer) == row["answer"] for answer, row in zip(found, asked, strict=True)]
        rows.append(_row(f"questions, {title}", hits, blind[split]["of the text"], _majority(
            scenes.questions, asked, "answer")))
    return rows


def _nlvr(out: Path) -> list[dict]:
    task, features = NLVR2(load(out / "nlvr")), RegionFeatures.open(out / "features.tsv")
    lines = (out / "scenes" / "statements.jsonl").read_text(encoding="utf-8").splitlines()
    statements = [row for row in map(json.loads, lines) if len(row["image_ids"]) == 2]
    blind = tuxpaint_scenes.blind_accuracy(statements, "statement", "label")
    rows = []
    for split, title in SPLITS.items():
        asked = [row for row in statements if row["split"] == split]
        found = task([row["statement"] for row in asked],
                     [[features[image] for image in row["image_ids"]] for row in asked])
        hits = [(answer["true"] > 0.5) == row["label"] for answer, row in zip(found, asked, strict=True)]
        rows.append(_row(f"statements on two pictures, {title}", hits, blind[split]["of the text"], _majority(
            statements, asked, "label")))
    return rows


def _majority(rows: list[dict], asked: list[dict], field: str) -> float:
    """Accuracy of the most frequent training answer of all."""
    given = [row[field] for row in rows if row["split"] == "train"]
    commonest = max(sorted(set(given)), key=given.count)
    return sum(row[field] == commonest for row in asked) / len(asked)


def _row(name: str, hits: list[bool], text: float, majority: float) -> dict:
    accuracy = sum(hits) / len(hits)
    return {"on": name, "count": len(hits), "accuracy": accuracy, "of the text": text, "majority": majority,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(hits))}  # fmt: skip


def table(result: dict) -> str:
    """Markdown."""
    lines = ["| accuracy on | count | UNITER | most frequent answer to the same text | most frequent answer |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in result["rows"]:
        lines.append(f"| {row['on']} | {row['count']} | {row['accuracy']:.3f} ± {row['standard_error']:.3f} | "
                     f"{row['of the text']:.3f} | {row['majority']:.3f} |")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    return "\n".join([*lines, "", f"CPU: {seconds}; {result['cpu_seconds']:.0f} s in all.", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pictures", required=True, help="tuxpaint.zip")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=6000, help="scenes to train on")
    parser.add_argument("--test", type=int, default=300, help="scenes of each held-out split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    print(table(run(options.pictures, options.out, train=options.train, test=options.test, seed=options.seed,
                    progress=not options.no_progress)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
