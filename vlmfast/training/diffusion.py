"""Training of GLIDE: noise at random steps, texts left out for guidance, sheets of samples on the way."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data import contact_sheet
from ..diffusion import Schedule, sample
from ..models.glide import GLIDE
from ..objectives.diffusion import PADDING, text_diffusion_loss
from ..tasks.diffusion_generation import schedule_of
from ..tasks.image_generation import to_arrays
from .config import TrainConfig
from .loop import LossTrainer

SHEET_NAME = "samples.png"


def glide_tokens(model: GLIDE, captions: Sequence[str]) -> Tensor:
    """[B, N] ids, PADDING behind each text; what is longer than the context is cut."""
    tokens, mask = model.tokenizer.tokens_and_mask(list(captions), model.config.text_ctx, truncate=True)
    return tokens.masked_fill(~mask, PADDING)


@torch.no_grad()
def draw(model: GLIDE, tokens: Tensor, *, low_res: Tensor | None = None, steps: int = 50, sampler: str = "ddim",
         guidance_scale: float | None = 3.0, seed: int = 0, side: int | None = None, progress: bool = False,
         callback=None) -> Tensor:
    """Pictures [B, 3, side, side] in [-1, 1] of tokens as `glide_tokens` makes them; of an upsampler those of
    `low_res`."""
    device, side = next(model.parameters()).device, side or model.config.image_size
    rows, options = [tokens.to(device)], {}
    if guidance_scale is not None:
        rows.append(torch.full_like(rows[0], PADDING))
    rows = torch.cat(rows)
    known = rows != PADDING
    text = model.encode_text(rows.masked_fill(~known, model.config.n_vocab - 1), known)
    if low_res is not None:
        options["low_res"] = low_res.to(device).repeat(len(rows) // len(tokens), 1, 1, 1)
    return sample(lambda x, t: model(x, t, text, **options), (len(tokens), 3, side, side),
                  schedule_of(model).respace(steps), sampler=sampler, prediction=model.config.prediction,
                  guidance_scale=guidance_scale, seed=seed, device=device, progress=progress, desc="drawing",
                  callback=callback)


class DiffusionTrainer(LossTrainer):
    """Trains a GLIDE on pictures with texts.

    Args:
        model, loader, config, options: see `Trainer`; a batch is pictures [B, 3, H, W] in [-1, 1] and tokens [B, N]
            with PADDING behind each text. `config.ema` averages the weights, which samples and the saved model use.
        drop_text: share of texts left out, without which guidance has nothing to go by.
        scale: of an upsampler, how many times smaller the pictures are that it enlarges.
        captions: drawn on a sheet every `sheet_every` steps and at each checkpoint; none writes no sheet.
        sheet_steps, guidance_scale: of the drawing.
        low_res: for an upsampler the small pictures [N, 3, h, w] that belong to the captions.

    Raises:
        ValueError: `scale` is missing for an upsampler, or given for another model.
    """

    def __init__(self, model: GLIDE, loader, config: TrainConfig, *, drop_text: float = 0.2, scale: int | None = None,
                 captions: Sequence[str] = (), sheet_every: int = 500, sheet_steps: int = 50,
                 guidance_scale: float = 3.0, low_res: Tensor | None = None, **options):
        if (scale is not None) != model.config.super_res:
            raise ValueError(f"DiffusionTrainer: scale is {scale}, it must be given for an upsampler and for no other")
        if sheet_every < 1:
            raise ValueError(f"DiffusionTrainer: sheet_every is {sheet_every}, it must be at least 1")
        self.schedule, self.drop_text, self.scale = schedule_of(model), drop_text, scale
        self.captions, self.sheet_every, self.sheet_steps = list(captions), sheet_every, sheet_steps
        self.guidance_scale, self.low_res = guidance_scale, low_res
        super().__init__(model, loader, config, self._loss, **options)

    def _loss(self, model: nn.Module, images: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return measured(model, self.schedule, images, tokens, self.model.config, self.drop_text, self.scale)

    def after_step(self) -> dict:
        if (self.step + 1) % self.sheet_every == 0 and self.process.first:
            self.write_sheet(self.step + 1)
        return {}

    def save(self) -> None:
        super().save()
        if self.process.first:
            self.write_sheet(self.step)

    def write_sheet(self, step: int) -> None:
        """samples.png of the captions, with averaged weights if there are any; also under the step's number."""
        if self.out is None or not self.captions:
            return
        with self._evaluation():
            side = None if self.low_res is None else self.low_res.shape[-1] * self.scale
            images = draw(self.model, glide_tokens(self.model, self.captions), low_res=self.low_res, side=side,
                          steps=self.sheet_steps, guidance_scale=self.guidance_scale)
        picture = contact_sheet(to_arrays((images + 1) / 2), self.captions, columns=6,
                                heading=f"step {step}, guidance {self.guidance_scale:g}")
        folder = self.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / f"{step:07d}.png", self.out / SHEET_NAME):
            partial = path.with_name(path.name + ".partial")
            with open(partial, "wb") as file:
                picture.save(file, format="PNG")
            os.replace(partial, path)


def measured(model: nn.Module, schedule: Schedule, images: Tensor, tokens: Tensor, config, drop_text: float,
             scale: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean loss [], its parts)."""
    found = text_diffusion_loss(model, schedule, images, tokens, prediction=config.prediction,
                                padding=config.n_vocab - 1, drop_text=drop_text, scale=scale, inpaint=config.inpaint)
    return found.loss.mean(), {"mse": found.mse.detach().mean(), "vb": found.vb.detach().mean()}
