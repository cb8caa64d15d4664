"""Train a small ViLBERT and a small LXMERT to answer questions about composed scenes.

    python examples/train_two_stream.py --pictures tuxpaint.zip --out run/

What is real and what is not. The pictures are real photographs and drawings (stamps of Tux Paint, GPL-2, not part of
this package), cut out and pasted on plain grounds by `tuxpaint_scenes.py`; so boxes are exact, kinds and colours are
known, and the language is a handful of templates. Nothing here says how the models do on photographs or free questions.
The region features are a fixed map of the pixels in each box; kinds and colours are never inputs. They are, besides
making the questions, targets of the region objectives on training scenes, in the place of the detector's labels that
the papers use.

Training, as in the papers: first on captions (which name all objects of a scene), some of them of other scenes, by
matching, masked words, and for ViLBERT the kinds of masked regions, for LXMERT the kinds and colours of all regions and
the features of masked ones; then on questions, and on statements that are true or false, judged by the matching head.
Without the captions both models stay at chance wherever a word has to be compared with the regions ("is there ...?").
Lengths go in instead of masks, so that padding is never computed.

Held out: `new scenes` of cut-outs that training shows, and `new cut-outs` that it never shows. Beside the accuracy
stand those of the same network that is trained without seeing ("blind"), and of the most frequent training answer to
the very same text, and to its type.

Written to the output folder:
    result.json, result.md      figures and table
    vilbert/, lxmert/           model as `vlmfast.load` reads it, vocab.txt, answers.json, log.jsonl, loss.png,
                                attention_*.png, and training_state.pt for --resume
    scenes/                     see `tuxpaint_scenes.py`
    held_out.tsv                region features of the held-out scenes as the models take them, LXMERT's columns
    feature_scale.npz           mean and spread that turn features of `tuxpaint_scenes.py` into those
    boxes/                      some scenes with their boxes
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tuxpaint_scenes
from PIL import Image
from two_stream_data import SPLITS, BatchLoader, Pictures, Scenes, Texts
from two_stream_models import RECIPES, Recipe, TwoStreamTrainer, correct
from two_stream_report import accuracies, attention_pictures, baselines, draw_boxes, result_table

from vlmfast.data import write_regions
from vlmfast.data.wordpiece import WordPieceTokenizer
from vlmfast.training import TrainConfig
from vlmfast.training.state import STATE_NAME

VOCAB_SIZE, MAX_TOKENS = 400, 32
PRETRAINING = 1 / 2  # of the steps
BLIND_STEPS = 1 / 6  # of the steps: text alone is learned soon


def run(pictures, out, *, models=("vilbert", "lxmert"), seed: int = 0, steps: int | None = None, train: int = 6000,
        test: int = 300, batch_size: int = 64, resume: bool = False, progress: bool = True) -> dict:
    """Composes scenes, trains and measures; returns what it writes to result.json.

    Args:
        pictures: zip for `tuxpaint_scenes.build`.
        out: folder of the run.
        steps: of each model, half of them pretraining; None takes the recipes'.
        train, test: scenes to train on, and scenes of each held-out split.
        resume: go on with interrupted trainings in `out`.
    """
    out = Path(out)
    started = time.process_time()
    tuxpaint_scenes.build(pictures, out / "scenes", train=train, test=test, per_scene=4, seed=seed)
    scenes = Scenes.read(out / "scenes")
    write_scenes(scenes, out)
    rows = {"captions": scenes.captions(seed), **{split: scenes.rows(split) for split in ("train", *SPLITS)}}
    words = [row["text"] for row in rows["captions"] + rows["train"]]
    tokenizer = WordPieceTokenizer.train(words, VOCAB_SIZE, max_length=MAX_TOKENS)
    texts = {name: Texts.of(own, scenes, tokenizer) for name, own in rows.items()}
    result = {"seed": seed, "scenes": {"train": train, "each test split": test},
              "texts": {name: len(own) for name, own in rows.items()},
              "cpu_seconds": round(time.process_time() - started, 1), "baselines": baselines(scenes), "models": {}}
    for name in models:
        result["models"][name] = train_one(name, scenes, tokenizer, texts, out, seed=seed, steps=steps,
                                           batch_size=batch_size, resume=resume, progress=progress)
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "result.md").write_text(result_table(result) + "\n", encoding="utf-8")
    return result


def train_one(name: str, scenes: Scenes, tokenizer, texts: dict[str, Texts], out: Path, *, seed: int,
              steps: int | None, batch_size: int, resume: bool, progress: bool) -> dict:
    """Trains one model and its blind twin in `out`/`name`; returns accuracies and CPU seconds."""
    recipe, folder = RECIPES[name], out / name
    steps = recipe.steps if steps is None else steps
    first = max(1, round(steps * PRETRAINING))
    pictures = Pictures.of(scenes, recipe.boxes)
    fit = Fit(recipe, texts, tokenizer, seed, batch_size, progress)
    started = time.process_time()
    model = fit.fresh(scenes)
    fit.pretrain(model, pictures, first, folder / "pretraining", resume)
    fit.fine_tune(model, pictures, steps - first, folder, resume)
    trained = time.process_time()
    tokenizer.save(folder)
    (folder / "answers.json").write_text(json.dumps(scenes.answers) + "\n", encoding="utf-8")
    attention_pictures(model, scenes, texts["test_scene"], pictures, tokenizer, folder, out / "scenes" / "pictures")
    blind, unseen = fit.fresh(scenes), pictures.unseen()
    fit.fine_tune(blind, unseen, max(1, int(steps * BLIND_STEPS)))

    def measured(model, pictures: Pictures) -> dict:
        return {split: accuracies(texts[split], correct(model, recipe, texts[split], pictures)) for split in SPLITS}

    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": {"pretraining": first, "fine-tuning": steps - first},
        "batch_size": batch_size,
        "cpu_seconds": round(trained - started, 1),
        "cpu_seconds_blind": round(time.process_time() - trained, 1),
        "accuracy": measured(model, pictures),
        "blind": measured(blind, unseen),
    }


@dataclass(frozen=True)
class Fit:
    """The trainings of one recipe; they leave the model in eval mode, and a Ctrl-C ends the program after saving."""

    recipe: Recipe
    texts: dict[str, Texts]
    tokenizer: WordPieceTokenizer
    seed: int
    batch_size: int
    progress: bool

    def fresh(self, scenes: Scenes):
        torch.manual_seed(self.seed)
        return self.recipe.make(scenes, self.tokenizer.vocab_size)

    def pretrain(self, model, pictures: Pictures, steps: int, out: Path, resume: bool) -> None:
        """On captions, by the objectives of the paper."""
        recipe = self.recipe
        self._train(model, "captions", pictures, steps, recipe.lr[0], recipe.pretraining, recipe.heads, out, resume)

    def fine_tune(self, model, pictures: Pictures, steps: int, out: Path | None = None, resume: bool = False) -> None:
        """On questions and statements."""
        recipe = self.recipe
        self._train(model, "train", pictures, steps, recipe.lr[1], recipe.task_loss, recipe.task_heads, out, resume)

    def _train(self, model, texts: str, pictures: Pictures, steps: int, lr: float, loss, heads, out: Path | None,
               resume: bool) -> None:
        loader = BatchLoader(self.texts[texts], pictures, self.batch_size, mask_id=self.tokenizer.mask,
                             vocab_size=self.tokenizer.vocab_size, pretraining=texts == "captions", seed=self.seed)
        config = TrainConfig(steps=steps, lr=lr, warmup=0.1, weight_decay=0.01, seed=self.seed)
        resume = resume and (out / STATE_NAME).is_file()
        trainer = TwoStreamTrainer(model, loader, config, loss, heads, out=out, resume=resume, device="cpu",
                                   progress=self.progress)
        if trainer.run().interrupted:
            raise KeyboardInterrupt
        model.eval()


def write_scenes(scenes: Scenes, out: Path) -> None:
    """held_out.tsv, feature_scale.npz, and the saved pictures of the held-out scenes with their boxes."""
    held_out = [regions for regions in scenes.regions if not regions.image_id.startswith("train")]
    write_regions(out / "held_out.tsv", held_out)
    np.savez(out / "feature_scale.npz", mean=scenes.mean.numpy(), spread=scenes.spread.numpy())
    shutil.rmtree(out / "boxes", ignore_errors=True)
    (out / "boxes").mkdir()
    for regions in held_out:
        path = out / "scenes" / "pictures" / f"{regions.image_id}.png"
        if path.is_file():
            with Image.open(path) as image:
                draw_boxes(image, regions, scenes.kinds).save(out / "boxes" / path.name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=(*RECIPES, "both"), default="both")
    parser.add_argument("--pictures", required=True, help="tuxpaint.zip")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each model, half of them pretraining (default: the recipe's)")
    parser.add_argument("--train", type=int, default=6000, help="scenes to train on")
    parser.add_argument("--test", type=int, default=300, help="scenes of each held-out split")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    models = tuple(RECIPES) if args.model == "both" else (args.model,)
    result = run(args.pictures, args.out, models=models, seed=args.seed, steps=args.steps, train=args.train,
                 test=args.test, batch_size=args.batch_size, resume=args.resume, progress=not args.no_progress)
    print(result_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
