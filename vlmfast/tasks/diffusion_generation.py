"""Pictures from texts with GLIDE, and holes in pictures filled: a small picture is drawn, then enlarged.

Paper: GLIDE (Nichol et al. 2021, arXiv:2112.10741); the presets are the settings of its published notebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion import SamplingStep, Schedule, sample
from ..models.glide import GLIDE, TextStates
from ..ops.diffusion import diffusion_noise

# tells the upsampler's noise from that of the base model with the same seed
UPSAMPLER_OFFSET = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is sampled.

    Args:
        steps:  as `Schedule.respace` takes them.
        sampler, eta:  see `vlmfast.ops.denoise_step`.
        guidance_scale:  s in u + s (c - u), u the noise seen without the text; None runs the model on the text alone.
        clip_scale:  of the gradient of a noised CLIP's similarity to the text; None leaves CLIP out.
        temperature:  what the first noise is multiplied by.
        dynamic_threshold:  see `vlmfast.ops.denoise_step`.
    """

    steps: str | int | tuple[int, ...] = "100"
    sampler: str = "ancestral"
    eta: float = 0.0
    guidance_scale: float | None = None
    clip_scale: float | None = None
    temperature: float = 1.0
    dynamic_threshold: float | None = None


_ENLARGE = Recipe(steps="fast27", sampler="ddim", temperature=0.997)
# of the base model and of the upsampler
PRESETS: dict[str, tuple[Recipe, Recipe]] = {
    "text2im": (Recipe(guidance_scale=3.0), _ENLARGE),
    "clip_guided": (Recipe(clip_scale=3.0), _ENLARGE),
    "inpaint": (Recipe(guidance_scale=5.0), replace(_ENLARGE, sampler="ancestral")),
}


def schedule_of(model: GLIDE) -> Schedule:
    """The noise schedule that a model's config names."""
    kinds = {"squaredcos_cap_v2": Schedule.cosine, "linear": Schedule.linear}
    return kinds[model.config.noise_schedule](model.config.diffusion_steps)


class GlidePipeline:
    """A GLIDE as a function from a text to pictures. What it lacks itself is the base model's: `pipe.config`,
    `pipe.state_dict()`.

    Args:
        base:  draws the small picture.
        upsampler:  enlarges it; None takes the one attached to `base`, if there is any.
        tokenizer:  a GPT2Tokenizer; None takes that of `base`.
        clip:  a `NoisedCLIP` with a tokenizer, for CLIP guidance.

    Raises:
        ValueError: `base` is an upsampler, `upsampler` is none, or there is no tokenizer.
    """

    def __init__(self, base: GLIDE, upsampler: GLIDE | None = None, tokenizer=None, clip=None):
        if base.config.super_res:
            raise ValueError("GlidePipeline: base is an upsampler, it must be a GLIDE without super_res")
        if upsampler is not None:
            base.attach_upsampler(upsampler)
        self.base, self.clip = base, clip
        self.tokenizer = base.tokenizer if tokenizer is None else tokenizer

    def __getattr__(self, name):
        if name.startswith("__") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def upsampler(self) -> GLIDE | None:
        return self.base.upsampler

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def to(self, *args, **kwargs) -> GlidePipeline:
        """Moves every model, as `nn.Module.to` does."""
        for model in (self.base, self.upsampler, self.clip):
            if model is not None:
                model.to(*args, **kwargs)
        return self

    def __call__(self, prompt: str, images: int | None = None, **options):
        """Pillow pictures of a prompt: a list of `images`, or where that is None a single picture. For `options` see
        `generate`."""
        from PIL import Image

        from .image_generation import to_arrays

        drawn = self.generate(prompt, images=1 if images is None else images, **options)
        found = [Image.fromarray(array) for array in to_arrays(drawn)]
        return found[0] if images is None else found

    @torch.no_grad()
    def generate(self, prompt: str, *, images: int = 1, seed: int | None = None, preset: str | None = None,
                 steps=None, sampler: str | None = None, eta: float | None = None,
                 guidance_scale: float | None = None, clip_scale: float | None = None,
                 dynamic_threshold: float | None = None, upsample_steps=None, upsample_sampler: str | None = None,
                 upsample_temperature: float | None = None, image=None, mask=None, batch_size: int = 16,
                 progress: bool = True, callback: Callable[[SamplingStep], object] | None = None) -> Tensor:
        """Pictures of a prompt as a tensor.

        Args:
            prompt:  the text.
            images:  how many.
            seed:  of the noise; None draws one. Equal seeds and settings give equal pictures.
            preset:  of PRESETS, the settings where the next arguments are None: "text2im"; "clip_guided" where a
                `clip_scale` is given and no `guidance_scale`; "inpaint" where an image is given.
            steps, sampler, eta, guidance_scale, clip_scale, dynamic_threshold:  of the base model, see `Recipe`; a
                guidance_scale of 1 is the model on the text alone, in half the time.
            upsample_steps, upsample_sampler, upsample_temperature:  of the upsampler.
            image, mask:  Pillow pictures of the same size (or paths of such): where the mask is white, the picture is
                painted anew. Both are cut to their centre square. Models that were not trained to inpaint have the
                known pixels put into every estimate, and do not see them otherwise.
            batch_size:  drawn at a time.
            progress:  show progress bars.
            callback:  called after every step of the base model, such as a `vlmfast.diffusion.Recorder`.

        Returns:
            [images, 3, side, side] float32 in [0, 1], on the device of the models.

        Raises:
            ValueError: a prompt over the text context, a mask of another size, an unknown preset, a missing tokenizer
                or CLIP, or an argument out of range.
        """
        base, enlarge = _recipes(preset, image is not None, clip_scale is not None and guidance_scale is None)
        base = _changed(base, steps=steps, sampler=sampler, eta=eta, guidance_scale=guidance_scale,
                        clip_scale=clip_scale, dynamic_threshold=dynamic_threshold)
        enlarge = _changed(enlarge, steps=upsample_steps, sampler=upsample_sampler, temperature=upsample_temperature)
        if images < 1 or batch_size < 1:
            raise ValueError(f"GlidePipeline: images is {images} and batch_size {batch_size}, must be at least 1")
        if (image is None) != (mask is None):
            raise ValueError(f"GlidePipeline: {'image' if image is None else 'mask'} is missing, image and mask go "
                             "together")
        if base.clip_scale is not None and (self.clip is None or self.clip.tokenizer is None):
            raise ValueError("GlidePipeline: clip_scale needs a noised CLIP with a tokenizer; set pipe.clip")
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        known = None if image is None else _known(image, mask)
        pictures = []
        for start in range(0, images, batch_size):
            count = min(batch_size, images - start)
            x = self.draw(prompt, count, base, seed=seed + start, known=known, progress=progress, callback=callback)
            if self.upsampler is not None:
                x = self.enlarge(prompt, x, enlarge, seed=seed + start, known=known, progress=progress)
            pictures.append(((x.float() + 1) / 2).clamp(0, 1))
        return torch.cat(pictures)

    def draw(self, prompt: str, count: int, recipe: Recipe, *, seed=None, noise=None, x_T: Tensor | None = None,
             known=None, progress: bool = True, callback=None) -> Tensor:
        """Pictures [count, 3, side, side] in [-1, 1] by the base model; see `generate`, and `vlmfast.diffusion.sample`
        for `noise`; x_T [count, 3, side, side] is the noise to start from."""
        cond_fn = None
        if recipe.clip_scale is not None:
            tokens = self.clip.tokenizer(prompt).to(self.device)
            cond_fn = self.clip.cond_fn(tokens, grad_scale=recipe.clip_scale)
        return self._sample(self.base, prompt, count, recipe, {}, known, cond_fn=cond_fn, seed=seed, noise=noise,
                            x_T=x_T, progress=progress, desc="drawing", callback=callback)

    def enlarge(self, prompt: str, pictures: Tensor, recipe: Recipe, *, seed=None, noise=None,
                x_T: Tensor | None = None, known=None, progress: bool = True, callback=None) -> Tensor:
        """Pictures [B, 3, h, w] in [-1, 1], rounded to 256 levels, enlarged by the upsampler; see `draw`."""
        low_res = ((pictures.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        return self._sample(self.upsampler, prompt, len(pictures), recipe, {"low_res": low_res}, known, seed=seed,
                            noise=noise, x_T=x_T, offset=UPSAMPLER_OFFSET, progress=progress, desc="enlarging",
                            callback=callback)

    def _sample(self, model: GLIDE, prompt: str, count: int, recipe: Recipe, conditions: dict, known, *, x_T, seed,
                offset: int = 0, **options) -> Tensor:
        device = next(model.parameters()).device
        side = model.config.image_size if x_T is None else x_T.shape[-1]
        scale = None if recipe.guidance_scale == 1 else recipe.guidance_scale
        copies = 1 if scale is None else 2
        text = self._text(model, prompt, count, copies == 2)
        kept = {}
        if known is not None:
            picture, mask = (part.to(device) for part in known(side))
            kept = {"image": picture.expand(count, -1, -1, -1), "mask": mask.expand(count, -1, -1, -1)}
            if model.config.inpaint:
                conditions = {**conditions, "inpaint_image": kept["image"], "inpaint_mask": kept["mask"]}
        conditions = {name: torch.cat([value] * copies) for name, value in conditions.items()}
        if x_T is None:
            x_T = diffusion_noise((count, 3, side, side), seed, offset, device=device) * recipe.temperature
        return sample(lambda x, t: model(x, t, text, **conditions), x_T, schedule_of(model).respace(recipe.steps),
                      sampler=recipe.sampler, eta=recipe.eta, prediction=model.config.prediction, guidance_scale=scale,
                      dynamic_threshold=recipe.dynamic_threshold, seed=seed, offset=offset, **kept, **options)

    def _text(self, model: GLIDE, prompt: str, count: int, guided: bool) -> TextStates:
        """The prompt `count` times, followed by no text as often; each is encoded once."""
        if self.tokenizer is None:
            raise ValueError("GlidePipeline: there is no tokenizer; set pipe.tokenizer")
        tokens, mask = self.tokenizer.tokens_and_mask(prompt, model.config.text_ctx)
        device = next(model.parameters()).device
        rows = [(tokens.to(device), mask.to(device))]
        if guided:
            rows.append(model.null_text(1, device))
        states = model.encode_text(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
        return TextStates(states.xf_proj.repeat_interleave(count, 0), states.xf_out.repeat_interleave(count, 0),
                          tuple(tuple(part.repeat_interleave(count, 0) for part in pair) for pair in states.encoder_kv))


def load(path, *parts, **options):
    """`vlmfast.checkpoints.load`, with a GLIDE that draws (an upsampler does not) as a `GlidePipeline`."""
    from .. import checkpoints

    model = checkpoints.load(path, *parts, **options)
    return GlidePipeline(model) if isinstance(model, GLIDE) and not model.config.super_res else model


def _recipes(preset: str | None, inpaint: bool, clip: bool) -> tuple[Recipe, Recipe]:
    if preset is None:
        preset = "inpaint" if inpaint else "clip_guided" if clip else "text2im"
    if preset not in PRESETS:
        raise ValueError(f"GlidePipeline: preset is {preset!r}, must be one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def _changed(recipe: Recipe, **values) -> Recipe:
    return replace(recipe, **{name: value for name, value in values.items() if value is not None})


def _known(image, mask) -> Callable[[int], Sequence[Tensor]]:
    """side -> (picture [1, 3, side, side] in [-1, 1] and 0 where unknown, mask [1, 1, side, side], 1 where known)."""
    import numpy as np
    from PIL import Image, ImageOps

    from ..data import ImagePreprocess, load_image

    image, mask = (part if isinstance(part, Image.Image) else load_image(part) for part in (image, mask))
    if image.size != mask.size:
        raise ValueError(f"GlidePipeline: mask has {mask.width} x {mask.height} pixels, must be {image.width} x "
                         f"{image.height} as the image")

    def at(side: int) -> tuple[Tensor, Tensor]:
        picture = ImagePreprocess(side, (0.5,) * 3, (0.5,) * 3)(image)[None]
        painted = ImageOps.fit(mask.convert("L"), (side, side), Image.Resampling.BOX)
        known = (torch.from_numpy(np.array(painted)) < 128).float()[None, None]
        return picture * known, known

    return at
