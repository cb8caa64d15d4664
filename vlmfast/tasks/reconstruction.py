"""Pictures through a discrete VAE and back: how close they come, how many codes they take, and a sheet to look at."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

_LEAST_ERROR = 1e-10  # of a picture that comes back exactly: 100 dB


@dataclass(frozen=True)
class ReconstructionReport:
    """Figures of a set of pictures.

    Attributes:
        psnr: mean over pictures of the peak signal-to-noise ratio, in dB.
        mean_colour_psnr: the same of each picture's mean colour: what a code that knew nothing else would reach.
        codes_used: share of the vocabulary that occurs at all.
        perplexity: exponential of the entropy of the codes; the vocabulary's size if all were equally frequent.
        images: how many pictures.
    """

    psnr: float
    mean_colour_psnr: float
    codes_used: float
    perplexity: float
    images: int

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return (f"PSNR {self.psnr:.2f} dB (mean colour {self.mean_colour_psnr:.2f} dB), "
                f"{100 * self.codes_used:.1f} % of the codes used, perplexity {self.perplexity:.1f}, "
                f"{self.images} pictures")


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) of each picture in 0 ... 1: two [B, C, H, W] -> [B] float32, in dB."""
    error = (image.float() - truth.float()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=_LEAST_ERROR).log10()


@torch.no_grad()
def measure_reconstruction(model: nn.Module, batches: Iterable[Tensor]) -> ReconstructionReport:
    """Encodes and decodes batches [B, C, H, W] in 0 ... 1.

    Args:
        model: with `encode`, `decode` and `vocab_size`: `vlmfast.models.DVAE`, `DiscreteVAE` or `VQGAN`.

    Raises:
        ValueError: no picture.
    """
    scores, baselines, counts = [], [], torch.zeros(model.vocab_size, dtype=torch.float64)
    for image in batches:
        codes = model.encode(image)
        scores += psnr(model.decode(codes), image).tolist()
        baselines += psnr(image.mean((2, 3), keepdim=True).expand_as(image), image).tolist()
        counts += torch.bincount(codes.flatten().cpu(), minlength=model.vocab_size)
    if not scores:
        raise ValueError("measure_reconstruction: batches is empty, must hold at least one picture")
    share = counts[counts > 0] / counts.sum()
    return ReconstructionReport(sum(scores) / len(scores), sum(baselines) / len(scores),
                                float((counts > 0).double().mean()), math.exp(-float((share * share.log()).sum())),
                                len(scores))


@torch.no_grad()
def reconstruction_sheet(model: nn.Module, images: Tensor, columns: int = 8, size: int = 96):
    """Pictures [N, C, H, W] in 0 ... 1, each above what its codes give back, as one Pillow image."""
    from ..data.pictures import contact_sheet

    pictures, titles = [], []
    codes = model.encode(images)
    pairs = list(zip(_arrays(images), _arrays(model.decode(codes)), strict=True))
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        blank = [row[0][0] * 0 + 255] * (columns - len(row))
        for side, title in ((0, "original"), (1, "from codes")):
            pictures += [pair[side] for pair in row] + blank
            titles += [title] * len(row) + [""] * len(blank)
    height, width = codes.shape[1:]
    return contact_sheet(pictures, titles, columns, size=size, font_size=10, lines=1,
                         heading=f"{height} x {width} codes out of {model.vocab_size}")


def _arrays(images: Tensor) -> list:
    pixels = images.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(-1, -1, -1, 3)
    return list(pixels.numpy())
