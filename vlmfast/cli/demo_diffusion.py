"""Data, model and measurements of `vlmfast demo diffusion`: a small GLIDE that draws from captions, and the demo's CLIP
to judge it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import contact_sheet
from ..data.animation import save_gif
from ..data.gpt2_tokenizer import GPT2Tokenizer
from ..diffusion import Recorder
from ..models.clip import CLIP
from ..models.glide import GLIDE, GLIDEConfig
from ..objectives.diffusion import text_diffusion_loss
from ..tasks import best_ranks, same_caption_ids
from ..tasks.diffusion_generation import schedule_of
from ..tasks.image_generation import to_arrays
from ..training import TensorLoader, TrainConfig, TrainResult
from ..training.diffusion import DiffusionTrainer, draw, glide_tokens
from .demo_model import Experiment
from .demo_pictures import SIDE, Pictures, split_pictures

BATCH = 32
EPOCHS = 28
STEPS, GUIDANCE = 30, 2.0
SHOWN = 12  # captions on a sheet
JUDGED = 96  # pictures that CLIP judges, of each split


@dataclass(frozen=True)
class Judgement:
    """How often pictures lie nearest to their own caption, among all of their split, by a CLIP's features.

    Attributes:
        recall: share of the pictures whose own caption is among the k nearest, by k.
    """

    name: str
    pictures: int
    candidates: int
    recall: dict[int, float]


@dataclass
class Diffusion:
    """A GLIDE, the CLIP that judges it, and their data, of which neither sees `held_out`."""

    train: Pictures
    held_out: list[Pictures]
    seed: int
    model: GLIDE
    config: TrainConfig
    judge: Experiment
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def prepare(cls, seed: int, more: tuple[Pictures, Pictures] | None = None) -> Diffusion:
        """Splits, vocabulary and initial weights, all decided by the seed; `more` as in `Drawing.prepare`."""
        train, held_out = split_pictures(seed, more)
        tokenizer = GPT2Tokenizer.train(train.captions, vocab_size=1200)
        longest = max(len(tokenizer.encode(caption)) for caption in train.captions)
        torch.manual_seed(seed)
        model = GLIDE(GLIDEConfig(image_size=SIDE, num_channels=32, num_res_blocks=1, channel_mult=(1, 2, 2),
                                  attention_resolutions=(16, 8), num_head_channels=32, dropout=0.0, prediction="v",
                                  n_vocab=tokenizer.vocab_size, text_ctx=min(longest, 24) + 1, xf_width=128,
                                  xf_layers=2, xf_heads=4))
        model.tokenizer = tokenizer
        config = TrainConfig(epochs=EPOCHS, lr=2e-3, beta2=0.999, eps=1e-8, weight_decay=0.01, warmup=0.05, ema=0.995,
                             amp=_amp(), seed=seed, log_every=10)
        return cls(train, held_out, seed, model, config, Experiment.prepare(seed))

    def describe(self) -> str:
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        held = ", ".join(f"{len(split)} {split.name}" for split in self.held_out)
        return (f"GLIDE with {size:.2f}M parameters, {SIDE} x {SIDE} pixels, {self.model.config.text_ctx} text "
                f"positions; {len(self.train)} pictures to learn from ({self.train.name}); held out: {held}; "
                f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}")

    def train_model(self, out: Path, seconds: float | None = None, progress: bool = True) -> TrainResult:
        """To the end of the schedule, shortened to about `seconds` if given; sheets of samples go to `out`/samples."""
        tokens = glide_tokens(self.model, self.train.captions)
        loader = TensorLoader(self.train.images, tokens, BATCH, (0.5,) * 3, (0.5,) * 3, shift=1, seed=self.seed)
        total = self.config.epochs * len(loader)
        if seconds is not None:
            total = min(total, max(2, int(seconds / self._seconds_of_a_step(loader))))
        self.config = replace(self.config, steps=total)
        trainer = self._trainer(loader, self.config, out, max(total // 5, 1), progress)
        start = time.perf_counter()
        result = trainer.run()
        self.seconds["glide"] = time.perf_counter() - start
        if not result.interrupted:
            trainer.use_average()
        return result

    def _trainer(self, loader, config: TrainConfig, out: Path | None, every: int, progress: bool) -> DiffusionTrainer:
        captions = [split.captions[i] for split in self.held_out for i in self._spread(len(split), 6)]
        return _Quiet(self.model, loader, config, drop_text=0.15, captions=captions[:SHOWN], sheet_every=every,
                      sheet_steps=STEPS, guidance_scale=GUIDANCE, device="cpu", progress=progress, out=out)

    def _seconds_of_a_step(self, loader) -> float:
        import copy

        kept, self.model = self.model, copy.deepcopy(self.model)
        trial = self._trainer(loader, replace(self.config, steps=3), None, 10**6, False)
        self.model = kept
        trial.run(stop_after=1)
        start = time.perf_counter()
        trial.run(stop_after=3)
        return (time.perf_counter() - start) / 2

    def train_judge(self, seconds: float | None = None, progress: bool = True) -> TrainResult:
        start = time.perf_counter()
        result = self.judge.train(seconds, progress)
        self.seconds["clip"] = time.perf_counter() - start
        return result

    @torch.no_grad()
    def losses(self) -> dict[str, tuple[float, float]]:
        """Mean squared error of the prediction on each held-out split, with the pictures' own captions and without."""
        found, schedule = {}, schedule_of(self.model)
        for split in self.held_out:
            images, tokens = split.pixels() * 2 - 1, glide_tokens(self.model, split.captions)
            row = []
            for text in (tokens, torch.full_like(tokens, -1)):
                generator, total = torch.Generator().manual_seed(self.seed), 0.0
                for x, c in zip(images.split(128), text.split(128), strict=True):
                    total += float(text_diffusion_loss(self.model, schedule, x, c, generator=generator,
                                                       prediction=self.model.config.prediction).mse.sum())
                row.append(total / len(split))
            found[split.name] = (row[0], row[1])
        return found

    def judgements(self, progress: bool = True) -> list[Judgement]:
        """True pictures, and those drawn with and without guidance, by CLIP."""
        rows = []
        for split in self.held_out[:2]:  # the judge has seen no other kind of picture
            chosen = self._spread(len(split), JUDGED)
            captions = [split.captions[i] for i in chosen]
            tokens = glide_tokens(self.model, captions)
            pictures = {"the true pictures": split.pixels()[chosen]}
            for name, scale in (("drawn without guidance", None), (f"drawn with guidance {GUIDANCE:g}", GUIDANCE)):
                parts = [draw(self.model, part, steps=STEPS, guidance_scale=scale, seed=self.seed + at,
                              progress=progress) for at, part in enumerate(tokens.split(32))]
                pictures[name] = (torch.cat(parts) + 1) / 2
            for name, images in pictures.items():
                rows.append(judge(self.judge.model, f"{split.name}: {name}", images, captions, split.captions))
        return rows

    def contact_sheet(self, progress: bool = True):
        """Captions that training never saw: the true picture, one without guidance, two with."""
        each = -(-SHOWN // len(self.held_out))
        chosen = [(split, i) for split in self.held_out for i in self._spread(len(split), each)]
        tokens = glide_tokens(self.model, [split.captions[i] for split, i in chosen])
        columns = [torch.cat([split.pixels(i, i + 1) for split, i in chosen])]
        for scale, seed in ((None, 0), (GUIDANCE, 0), (GUIDANCE, 1)):
            columns.append((draw(self.model, tokens, steps=STEPS, guidance_scale=scale, seed=self.seed + seed,
                                 progress=progress) + 1) / 2)
        pictures = [to_arrays(column[row : row + 1])[0] for row in range(len(chosen)) for column in columns]
        titles = [title for split, i in chosen for title in
                  (f"{split.captions[i]} (the true picture)", "no guidance", *[f"guidance {GUIDANCE:g}"] * 2)]
        return contact_sheet(pictures, titles, columns=len(columns), size=96, font_size=11,
                             heading="drawn from captions kept from training")

    def animation(self, path: Path, progress: bool = True) -> None:
        """A GIF of what the model takes the pictures for, from the first step to the last."""
        captions = [split.captions[i] for split in self.held_out for i in self._spread(len(split), 3)][:6]
        recorder = Recorder(STEPS)
        draw(self.model, glide_tokens(self.model, captions), steps=STEPS, guidance_scale=GUIDANCE, seed=self.seed,
             progress=progress, callback=recorder)
        frames = [contact_sheet(to_arrays(frame), captions, columns=3, size=96, font_size=11)
                  for frame in recorder.frames]
        save_gif(frames, path)

    def _spread(self, count: int, wanted: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed)
        return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())


def _amp() -> str:
    """bfloat16 where the processor multiplies it: elsewhere it would take longer."""
    from .. import _native

    return "bf16" if "bf16" in _native.build_info()["isa"] else "none"


class _Quiet(DiffusionTrainer):
    """Saves nothing but sheets: the command writes the model when all is done."""

    def save(self) -> None:
        if self.step == self.total:
            self.write_sheet(self.step)


@torch.no_grad()
def judge(clip: CLIP, name: str, images: Tensor, captions: Sequence[str], candidates: Sequence[str],
          ks: Sequence[int] = (1, 10)) -> Judgement:
    """Ranks of pictures [N, 3, H, W] in 0 ... 1 among the candidates' captions, their own among them."""
    clip.eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (clip.preprocess.mean, clip.preprocess.std))
    image = F.normalize(clip.encode_image((images - mean) / std), dim=-1)
    text = torch.cat([clip.encode_text(part, normalize=True) for part in clip.tokenizer(list(candidates)).split(256)])
    ids = same_caption_ids([*captions, *candidates])
    ranks = best_ranks(image, text, ids[: len(captions)], ids[len(captions) :])
    return Judgement(name, len(captions), len(candidates), {k: float((ranks < k).double().mean()) for k in ks})


def judgement_table(rows: Sequence[Judgement]) -> str:
    from .demo_report import table

    return table(["CLIP's nearest caption", "pictures", "captions", "own at 1", "own in 10", "chance at 1"],
                 [[row.name, str(row.pictures), str(row.candidates), f"{100 * row.recall[1]:.1f} %",
                   f"{100 * row.recall[10]:.1f} %", f"{100 / row.candidates:.1f} %"] for row in rows]) + "\n"


def loss_table(losses: dict[str, tuple[float, float]]) -> str:
    from .demo_report import table

    return table(["squared error of the model", "own caption", "without text"],
                 [[name, f"{own:.4f}", f"{none:.4f}"] for name, (own, none) in losses.items()]) + "\n"


def document(run: Diffusion, facts: dict, command: str, result: TrainResult, losses: dict[str, tuple[float, float]],
             rows: Sequence[Judgement]) -> str:
    """The text of report.md."""
    return f"""# What a small GLIDE draws

Made by `{command}` with vlmfast {facts['vlmfast']}, PyTorch {facts['torch']}, Python {facts['python']} on
{facts['platform']}.

{run.describe()}.

{result.step} steps of {BATCH} pairs in {run.seconds['glide']:.0f} s, loss.png; sheets from the way there are in
samples/. Pictures that training never saw, averaged over the steps of the noise:

{loss_table(losses)}
A CLIP trained on the same pictures ({run.seconds['clip']:.0f} s) says which caption of the split lies nearest to a
picture. Drawn in {STEPS} steps of DDIM from captions that neither model saw:

{judgement_table(rows)}
![drawn from captions kept from training](drawn.png)

![from noise to pictures](denoising.gif)
"""


def write(run: Diffusion, out: Path, command: str, facts: dict, seconds: float | None, progress: bool) -> int:
    """Trains both, measures, draws and writes the folder; the command's exit status."""
    from ..checkpoints import save_pretrained
    from ..training.log import draw_curve

    print(run.describe(), flush=True)
    result = run.train_model(out, None if seconds is None else 0.7 * seconds, progress)
    if result.interrupted:
        print(f"stopped at step {result.step} of {result.total}; nothing of it is kept but the sheets")
        return 130
    save_pretrained(run.model, out / "model")
    draw_curve(result.records, out / "loss.png")
    losses = run.losses()
    print(f"GLIDE: {result.step} steps in {run.seconds['glide']:.0f} s\n{loss_table(losses)}", flush=True)
    if run.train_judge(None if seconds is None else 0.3 * seconds, progress).interrupted:
        print(f"stopped; the model is in {out}/model")
        return 130
    rows = run.judgements(progress)
    print(judgement_table(rows), flush=True)
    run.contact_sheet(progress).save(out / "drawn.png")
    run.animation(out / "denoising.gif", progress)
    (out / "report.md").write_text(document(run, facts, command, result, losses, rows), encoding="utf-8")
    print(f"wrote {out}/report.md, drawn.png, denoising.gif, samples/, loss.png and model/; try\n"
          f"  vlmfast generate {out}/model 'red heart' --out heart.png")
    return 0
