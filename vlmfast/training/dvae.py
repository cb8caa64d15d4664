"""Training of discrete VAEs: temperature and weight of the divergence over the steps, a sheet of reconstructions."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from ..models.dvae import DVAE
from ..models.vqgan import VQGAN
from ..objectives.variational import RECONSTRUCTIONS, Annealing, dalle_loss, discrete_vae_loss
from ..tasks.reconstruction import reconstruction_sheet
from .config import TrainConfig
from .log import draw_curve
from .loop import LossTrainer

SHEET_NAME = "reconstruction.png"


@dataclass(frozen=True)
class DVAEObjective:
    """What is minimised, as a function of how far the run is.

    Attributes:
        reconstruction: "logit_laplace" (a DVAE's likelihood), "mse", "l1" or "smooth_l1".
        kl_weight: β of the divergence summed over positions, in a loss that is then divided by the C · H · W numbers of
            a picture, as DALL-E has it; reached after `kl_anneal`, a share of all steps.
        tau, tau_end: temperature at the start, and after `tau_anneal`, a share of all steps.
        shape: of both changes, see `vlmfast.objectives.Annealing`.

    Raises:
        ValueError: a value is out of range.
    """

    reconstruction: str = "mse"
    kl_weight: float = 0.0
    kl_anneal: float = 0.1
    tau: float = 1.0
    tau_end: float = 1 / 16
    tau_anneal: float = 0.75
    shape: str = "half_cosine"

    def __post_init__(self):
        def check(condition: bool, name: str, must: str) -> None:
            if not condition:
                raise ValueError(f"DVAEObjective: {name} is {getattr(self, name)!r}, must be {must}")

        check(self.reconstruction in RECONSTRUCTIONS, "reconstruction", f"one of {', '.join(RECONSTRUCTIONS)}")
        check(0 <= self.kl_weight < float("inf"), "kl_weight", "0 or more")
        for name in ("kl_anneal", "tau_anneal"):
            check(0 <= getattr(self, name) <= 1, name, "in 0 ... 1, a share of all steps")
        for name in ("tau", "tau_end"):
            check(0 < getattr(self, name) < float("inf"), name, "above 0")
        Annealing(1.0, 1.0, 1, self.shape)

    def at(self, step: int, total: int) -> tuple[float, float]:
        """(temperature, β) of a step, 0 being the first of `total`."""
        tau = Annealing(self.tau, self.tau_end, max(1, round(self.tau_anneal * total)), self.shape)(step)
        if not self.kl_weight or not self.kl_anneal:
            return tau, self.kl_weight
        start = 0.0 if self.shape != "exponential" else self.kl_weight / 1000  # an exponential cannot start at 0
        return tau, Annealing(start, self.kl_weight, max(1, round(self.kl_anneal * total)), self.shape)(step)

    def to_dict(self) -> dict:
        return asdict(self)


class DVAETrainer(LossTrainer):
    """Trains a DVAE, DiscreteVAE or VQGAN on pictures.

    Args:
        model, loader, config, options: see `Trainer`; a batch's first tensor holds pictures [B, C, H, W] in 0 ... 1.
        objective: loss and schedules. A VQGAN has its own weights for codebook and divergence.
        sheet: pictures [N, C, H, W] in 0 ... 1 for `reconstruction.png`; None writes none.
        sheet_every: steps between sheets, and one at each checkpoint.

    Raises:
        ValueError: "logit_laplace" with a model that gives no distribution.
    """

    def __init__(self, model: nn.Module, loader, config: TrainConfig, objective: DVAEObjective | None = None, *,
                 sheet: Tensor | None = None, sheet_every: int = 500, **options):
        self.schedule = objective or DVAEObjective()
        if (self.schedule.reconstruction == "logit_laplace") != isinstance(model, DVAE):
            raise ValueError(f"DVAETrainer: reconstruction is {self.schedule.reconstruction!r}, must be "
                             "'logit_laplace' for a DVAE and another one for any other model, this is a "
                             f"{type(model).__name__}")
        if sheet_every < 1:
            raise ValueError(f"DVAETrainer: sheet_every is {sheet_every}, must be at least 1")
        self.sheet, self.sheet_every = sheet, sheet_every
        super().__init__(model, loader, config, self._loss, **options)

    def _loss(self, model: nn.Module, image: Tensor, *_) -> tuple[Tensor, dict[str, float]]:
        tau, beta = self.schedule.at(self.step, self.total)
        # another noise for each step and process, the same when a run is resumed
        seed = (self.config.seed << 40) + self.step * self.process.world + self.process.rank
        if isinstance(self.model, VQGAN):
            out = model(image, tau, seed)
            beta, weight = 0.0, 1.0  # its quantizer weighs the divergence
        else:
            out = model(image, tau, seed, kl_weight=1.0 if beta else 0.0)
            weight = beta * out.codes[0].numel() / image[0].numel()
        if self.schedule.reconstruction == "logit_laplace":
            loss = dalle_loss(out.raw, out.kl, image, out.codes[0].numel(), beta)
        else:
            loss = discrete_vae_loss(out.raw, out.kl, self.model.target(image), self.schedule.reconstruction, weight,
                                     out.codebook_loss)
        return loss.total, {"reconstruction": loss.reconstruction.detach(), "kl": loss.kl.detach(), "tau": tau,
                            "kl_weight": beta}

    def after_step(self) -> dict:
        if (self.step + 1) % self.sheet_every == 0 and self.process.first:
            self.write_sheet()
        return {}

    def save(self) -> None:
        super().save()
        if self.process.first:
            self.write_sheet()

    def write_sheet(self) -> None:
        """Draws `reconstruction.png`, with averaged weights if there are any."""
        if self.out is None or self.sheet is None:
            return
        partial = self.out / (SHEET_NAME + ".partial")
        with self._evaluation():
            picture = reconstruction_sheet(self.model, self.sheet.to(self.process.device))
        with open(partial, "wb") as file:
            picture.save(file, format="PNG")
        os.replace(partial, self.out / SHEET_NAME)

    def draw(self, path: Path) -> None:
        draw_curve(self.log.records, path, {"psnr": "PSNR", "mean_colour_psnr": "PSNR of the mean colour"},
                   "validation PSNR, dB", None)

