"""Data, models and measurements of `vlmfast demo generate`: a discrete VAE, then a DALL-E over its codes."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.dvae import picture_preprocess
from ..data import CLIPTokenizer, contact_sheet, load_emoji
from ..models import DALLE, DALLEConfig, DiscreteVAE, DiscreteVAEConfig
from ..tasks import ReconstructionReport, encode_prompts, generate_codes, measure_reconstruction, reconstruction_sheet
from ..tasks.image_generation import to_arrays
from ..training import DVAEObjective, DVAETrainer, LossTrainer, TensorLoader, TrainConfig, Trainer, TrainResult
from .dalle_data import captions_to_tokens, code_loss

SIDE = 32
RANDOM = 365  # emoji held out one by one, after the whole concepts
CONCEPTS = 192
BATCH = 64
MAX_TEXT = 32  # tokens of a caption; longer ones are cut
SHOWN, DRAWN = 8, 4  # captions on a sheet, and pictures drawn from each
DVAE_EPOCHS, DALLE_EPOCHS = 20, 10


@dataclass(frozen=True)
class Pictures:
    """N pictures uint8 [N, 3, 32, 32] with captions, under a name for tables."""

    name: str
    images: Tensor
    captions: Sequence[str]

    @classmethod
    def of(cls, name: str, images: np.ndarray, captions: Sequence[str]) -> "Pictures":
        """From [N, 32, 32, 3]."""
        return cls(name, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), list(captions))

    def __len__(self) -> int:
        return len(self.captions)

    def pixels(self, start: int = 0, stop: int | None = None) -> Tensor:
        """float32 in 0 ... 1."""
        return self.images[start:stop].float() / 255


def split_pictures(seed: int, more: tuple[Pictures, Pictures] | None = None) -> tuple[Pictures, list[Pictures]]:
    """Emoji to learn from and those held out, one by one and as whole concepts; `more` pictures likewise."""
    rest, concepts = load_emoji("en").split_concepts(CONCEPTS, seed)
    emoji, random = rest.split_random(RANDOM / len(rest), seed)
    train = Pictures.of("emoji", emoji.images, emoji.captions)
    held_out = [Pictures.of("emoji, random tenth", random.images, random.captions),
                Pictures.of("emoji, held-out concepts", concepts.images, concepts.captions)]
    if more is not None:
        train = Pictures(f"{train.name} and {more[0].name}", torch.cat([train.images, more[0].images]),
                         [*train.captions, *more[0].captions])
        held_out.append(more[1])
    return train, held_out


@dataclass(frozen=True)
class CodeRow:
    """How well the codes of some pictures are foreseen, in nats per code.

    Attributes:
        loss: with each picture's own caption; other: with the caption of another picture; frequency: of a model that
            knows only how frequent each code is in training.
    """

    name: str
    pictures: int
    loss: float
    other: float
    frequency: float


@dataclass
class Drawing:
    """The two models and their data.

    Attributes:
        train: what both learn from; held_out: splits that neither sees.
        dvae, dalle: the models; dvae_config, dalle_config: how they are trained.
        seconds: of either training, once done.
    """

    train: Pictures
    held_out: list[Pictures]
    seed: int
    dvae: DiscreteVAE
    dalle: DALLE
    dvae_config: TrainConfig
    dalle_config: TrainConfig
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def prepare(cls, seed: int, more: tuple[Pictures, Pictures] | None = None) -> "Drawing":
        """Splits of the emoji, vocabulary and initial weights, all decided by the seed.

        Args:
            more: further pictures to learn from, and held out.
        """
        train, held_out = split_pictures(seed, more)
        torch.manual_seed(seed)
        dvae = DiscreteVAE(DiscreteVAEConfig(image_size=SIDE, num_tokens=256, codebook_dim=64, num_layers=2,
                                             num_resnet_blocks=1, hidden_dim=64))
        dvae.preprocess = picture_preprocess(SIDE)
        tokenizer = CLIPTokenizer.train(train.captions, vocab_size=1200)
        longest = max(len(tokenizer.encode(caption)) for caption in train.captions)
        tokenizer.context_length = min(longest, MAX_TEXT)
        dalle = DALLE(DALLEConfig(dim=128, depth=4, heads=4, dim_head=32, num_text_tokens=tokenizer.vocab_size + 1,
                                  token_offset=1, text_seq_len=tokenizer.context_length, num_image_tokens=256,
                                  image_grid=(SIDE // dvae.downsample,) * 2, conv_kernel=5))
        dalle.tokenizer = tokenizer
        # the paper's, app. A.2 and B.2, with the learning rates of small models and short runs
        common = TrainConfig(seed=seed, warmup=0.05)
        return cls(train, held_out, seed, dvae, dalle,
                   replace(common, epochs=DVAE_EPOCHS, lr=6e-3, beta2=0.999, eps=1e-8, weight_decay=1e-4, ema=0.99),
                   replace(common, epochs=DALLE_EPOCHS, lr=2e-3, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, ema=0.99))

    def describe(self) -> str:
        sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (self.dvae, self.dalle)]
        grid = self.dalle.config.image_grid
        held = ", ".join(f"{len(split)} {split.name}" for split in self.held_out)
        return (f"discrete VAE with {sizes[0]:.2f}M parameters, {SIDE} x {SIDE} pixels to {grid[0]} x {grid[1]} of "
                f"{self.dvae.vocab_size} codes; DALL-E with {sizes[1]:.2f}M parameters, "
                f"{self.dalle.config.prefix_len} text positions; {len(self.train)} pictures to learn from "
                f"({self.train.name}); held out: {held}; {torch.get_num_threads()} thread"
                f"{'s' if torch.get_num_threads() > 1 else ''}")

    def _loader(self, tokens: Tensor, shift: int) -> TensorLoader:
        return TensorLoader(self.train.images, tokens, BATCH, (0.0,) * 3, (1.0,) * 3, shift=shift, seed=self.seed)

    def train_dvae(self, seconds: float | None = None, progress: bool = True) -> TrainResult:
        """To the end of the schedule, shortened to about `seconds` if given."""
        loader = self._loader(torch.ones(len(self.train), 1, dtype=torch.int64), 2)

        def make(model: nn.Module, config: TrainConfig, bar: bool) -> Trainer:
            objective = DVAEObjective("mse", kl_weight=0.3, kl_anneal=0.0, tau=1.0, tau_end=1 / 16)
            return DVAETrainer(model, loader, config, objective, device="cpu", progress=bar)

        result, self.dvae_config = self._run("dvae", self.dvae, make, self.dvae_config, loader, seconds, progress)
        self.dvae.eval().requires_grad_(False)
        return result

    def train_dalle(self, seconds: float | None = None, progress: bool = True) -> TrainResult:
        """The same for the transformer, over the finished codes."""
        self.dalle.attach_vae(self.dvae)
        loader = self._loader(captions_to_tokens(self.dalle)(list(self.train.captions)), 1)

        def make(model: nn.Module, config: TrainConfig, bar: bool) -> Trainer:
            return LossTrainer(model, loader, config, code_loss(0.1), device="cpu", progress=bar)

        result, self.dalle_config = self._run("dalle", self.dalle, make, self.dalle_config, loader, seconds, progress)
        return result

    def _run(self, name: str, model: nn.Module, make, config: TrainConfig, loader, seconds: float | None,
             progress: bool) -> tuple[TrainResult, TrainConfig]:
        if seconds is not None:
            trial = make(copy.deepcopy(model), replace(config, steps=3), False)
            trial.run(stop_after=1)
            start = time.perf_counter()
            trial.run(stop_after=3)
            steps = max(2, int(2 * seconds / (time.perf_counter() - start)))
            config = replace(config, steps=min(steps, config.epochs * len(loader)))
        trainer, start = make(model, config, progress), time.perf_counter()
        result = trainer.run()
        self.seconds[name] = time.perf_counter() - start
        if not result.interrupted:
            trainer.use_average()
        return result, config

    def reconstructions(self) -> dict[str, ReconstructionReport]:
        """Figures of the discrete VAE on each held-out split."""
        return {split.name: measure_reconstruction(self.dvae, split.pixels().split(256)) for split in self.held_out}

    @torch.no_grad()
    def code_rows(self) -> list[CodeRow]:
        """How much of the codes the transformer foresees from a caption, and how much of that is the caption's."""
        counts = torch.ones(self.dvae.vocab_size, dtype=torch.float64)
        for start in range(0, len(self.train), 256):
            codes = self.dvae.encode(self.train.pixels(start, start + 256))
            counts += torch.bincount(codes.flatten(), minlength=len(counts))
        log_share = (counts / counts.sum()).log()
        rows = []
        for split in self.held_out:
            codes = torch.cat([self.dvae.encode(part) for part in split.pixels().split(256)])
            tokens = encode_prompts(self.dalle, split.captions, truncate=True)
            losses = [sum(float(self.dalle(t, c, return_loss=True).image_loss) * len(t)
                          for t, c in zip(text.split(256), codes.split(256), strict=True)) / len(split)
                      for text in (tokens, tokens.roll(len(tokens) // 2, 0))]
            rows.append(CodeRow(split.name, len(split), *losses, float(-log_share[codes].mean())))
        return rows

    def reconstruction_sheet(self):
        """Held-out pictures above what their codes give back."""
        each = 16 // len(self.held_out)
        shown = torch.cat([split.pixels()[self._spread(len(split), each)] for split in self.held_out])
        return reconstruction_sheet(self.dvae, shown)

    def contact_sheet(self, progress: bool = True):
        """Captions that training never saw, each with the true picture and those drawn from it."""
        from tqdm.auto import tqdm

        each = -(-SHOWN // len(self.held_out))
        chosen = [(split, i) for split in self.held_out for i in self._spread(len(split), each)]
        tokens = encode_prompts(self.dalle, [split.captions[i] for split, i in chosen], truncate=True)
        steps = len(tokens) * DRAWN * self.dalle.config.image_seq_len
        with tqdm(total=steps, unit="code", desc="drawing", disable=not progress) as bar:
            codes = generate_codes(self.dalle, tokens, images=DRAWN, guidance_scale=2.0, temperature=0.8,
                                   seed=self.seed, on_step=bar.update)
        drawn = to_arrays(self.dvae.decode(codes))
        pictures, titles = [], []
        for row, (split, i) in enumerate(chosen):
            pictures += [*to_arrays(split.pixels(i, i + 1)), *drawn[row * DRAWN : (row + 1) * DRAWN]]
            titles += [f"{split.captions[i]} (the true picture)", *["drawn"] * DRAWN]
        return contact_sheet(pictures, titles, columns=1 + DRAWN, size=96, font_size=11,
                             heading="drawn from captions kept from training")

    def _spread(self, count: int, wanted: int) -> list[int]:
        return sorted(int(i) for i in np.random.default_rng(self.seed).choice(count, min(count, wanted), replace=False))


def document(drawing: Drawing, facts: dict, command: str, dvae: TrainResult, dalle: TrainResult,
             reconstructions: dict[str, ReconstructionReport], rows: Sequence[CodeRow]) -> str:
    """The text of report.md."""
    return f"""# What a small DALL-E draws

Made by `{command}` with vlmfast {facts['vlmfast']}, PyTorch {facts['torch']}, Python {facts['python']} on
{facts['platform']}.

{drawing.describe()}.

## Discrete VAE
{dvae.step} steps of {BATCH} pictures in {drawing.seconds['dvae']:.0f} s. Pictures that training never saw, beside their
mean colour:

{reconstruction_table(reconstructions)}
![originals and what their codes give back](reconstruction.png)

## DALL-E
{dalle.step} steps of {BATCH} pairs in {drawing.seconds['dalle']:.0f} s. Nats per code of pictures that training never
saw, by chance {math.log(drawing.dvae.vocab_size):.3f}:

{code_table(rows)}
![drawn from captions kept from training](drawn.png)
"""


def reconstruction_table(reports: dict[str, ReconstructionReport]) -> str:
    from .demo_report import table

    return table(["reconstruction", "pictures", "PSNR dB", "mean colour dB", "codes used", "perplexity"],
                 [[name, str(r.images), f"{r.psnr:.2f}", f"{r.mean_colour_psnr:.2f}", f"{100 * r.codes_used:.0f} %",
                   f"{r.perplexity:.0f}"] for name, r in reports.items()]) + "\n"


def code_table(rows: Sequence[CodeRow]) -> str:
    from .demo_report import table

    return table(["nats per code", "pictures", "own caption", "another's caption", "frequencies alone"],
                 [[row.name, str(row.pictures), f"{row.loss:.3f}", f"{row.other:.3f}", f"{row.frequency:.3f}"]
                  for row in rows]) + "\n"


def write(drawing: Drawing, out: Path, command: str, facts: dict, seconds: float | None, progress: bool) -> int:
    """Trains both, measures, draws and writes the folder; the command's exit status."""
    from ..checkpoints import save_pretrained
    from ..checkpoints.dalle import VAE_FOLDER
    from ..training.log import draw_curve

    print(drawing.describe(), flush=True)
    half = None if seconds is None else seconds / 2
    dvae = drawing.train_dvae(half, progress)
    if dvae.interrupted:
        print(f"stopped at step {dvae.step} of {dvae.total}; nothing of it is kept")
        return 130
    reconstructions = drawing.reconstructions()
    drawing.reconstruction_sheet().save(out / "reconstruction.png")
    save_pretrained(drawing.dvae, out / "model" / VAE_FOLDER)
    print(f"discrete VAE: {dvae.step} steps in {drawing.seconds['dvae']:.0f} s\n"
          f"{reconstruction_table(reconstructions)}", flush=True)
    dalle = drawing.train_dalle(half, progress)
    if dalle.interrupted:
        print(f"stopped at step {dalle.step} of {dalle.total}; the discrete VAE is in {out}/model/{VAE_FOLDER}")
        return 130
    rows = drawing.code_rows()
    print(f"DALL-E: {dalle.step} steps in {drawing.seconds['dalle']:.0f} s\n{code_table(rows)}", flush=True)
    drawing.contact_sheet(progress).save(out / "drawn.png")
    for name, result in (("dvae", dvae), ("dalle", dalle)):
        draw_curve(result.records, out / f"loss_{name}.png")
    save_pretrained(drawing.dalle, out / "model")
    text = document(drawing, facts, command, dvae, dalle, reconstructions, rows)
    (out / "report.md").write_text(text, encoding="utf-8")
    print(f"wrote {out}/report.md, reconstruction.png, drawn.png, loss_*.png and model/; try\n"
          f"  vlmfast generate {out}/model 'red heart' --guidance 2 --out heart.png")
    return 0
