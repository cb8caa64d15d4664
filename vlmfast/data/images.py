"""Pictures from untrusted files, and CLIP's preprocessing of them in Pillow and numpy.

Source: the transforms published with CLIP (Radford et al. 2021, arXiv:2103.00020) and OpenCLIP, reproduced bit for bit.
"""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB of RGB
MAX_ASPECT = 64  # beyond it, a one-pixel stripe would ask for gigabytes when its short side is enlarged

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# raster formats alone: Pillow hands PostScript to an external interpreter
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "QOI", "DIB")
_RESIZE_MODES = ("shortest", "squash", "longest")

Generator = torch.Generator | np.random.Generator
Source = str | os.PathLike | bytes | BinaryIO


def load_image(source: Source, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes one picture completely, in the mode it was stored in; the first frame of an animation.

    Orientation tags are not applied, as in the published preprocessing.

    Args:
        source: a path, the encoded bytes, or a binary file.
        name: what errors call the picture; None takes the path.
        max_pixels: largest width x height that is decoded, at most twice Pillow's own limit.

    Raises:
        FileNotFoundError: no such file. ValueError: empty, truncated, too large, or no picture. Both name the file.
    """
    return _read(source, name, max_pixels, decode=True)


def check_image(source: Source, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) from a picture's header alone; raises as :func:`load_image` does, but sees no damaged pixels."""
    return _read(source, name, max_pixels, decode=False)


def _read(source: Source, name: str | None, max_pixels: int, decode: bool):
    name = name or _source_name(source)
    if isinstance(source, (str, os.PathLike)):
        if not Path(source).is_file():
            kind = "is no regular file" if Path(source).exists() else "does not exist"
            raise FileNotFoundError(f"load_image: {name} {kind}")
        size = os.path.getsize(source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        size = len(source)
        source = io.BytesIO(source)
    elif hasattr(source, "read"):
        size = None
    else:
        raise TypeError(f"load_image: source is {type(source).__name__}, must be a path, bytes or a binary file")
    if size == 0:
        raise ValueError(f"load_image: {name} is empty (0 bytes)")
    try:
        with Image.open(source, formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{width} x {height} is {width * height} pixels, must be at most {max_pixels}")
            if not decode:
                return width, height
            image.load()
            return image.copy()
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"load_image: {name} is not a picture in a format that Pillow reads") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise ValueError(f"load_image: cannot read {name}: {error or type(error).__name__}") from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _source_name(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    return str(getattr(source, "name", None) or "picture")


@dataclass(frozen=True)
class ImagePreprocess:
    """Picture to normalised tensor, as CLIP models expect it.

    Evaluation: resize, crop or pad to a square, convert to RGB, scale to 0 ... 1, subtract `mean`, divide by `std`.
    The conversion to RGB follows the resize, as in the published code: it matters for palette pictures.
    Sixteen-bit and floating-point greyscale is first scaled to eight bits (Pillow's conversion would clip it to white).

    Args:
        image_size: S, the side of the square.
        mean, std: per channel, in units of 0 ... 1.
        resize_mode: "shortest" resizes the shorter side to `resize_size` and cuts the centre; "squash" ignores the
            aspect ratio; "longest" resizes the longer side and pads with `fill_color`.
        resize_size: shorter side before the crop of "shortest"; None means `image_size`.
        interpolation: "bicubic", "bilinear", "lanczos" or "nearest".
        fill_color: grey level of the padding, 0 ... 255.
        train: cut a random part of the picture (area in `scale`, aspect in `ratio`) and resize it to S x S instead;
            mirror it with probability `flip`.

    Raises:
        ValueError: an argument is out of range.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resize_mode: str = "shortest"
    resize_size: int | None = None
    interpolation: str = "bicubic"
    fill_color: int = 0
    train: bool = False
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0

    def __post_init__(self):
        size = _square_side(self.image_size, "image_size")
        object.__setattr__(self, "image_size", size)
        for field, length in (("mean", 3), ("std", 3), ("scale", 2), ("ratio", 2)):
            values = tuple(float(value) for value in getattr(self, field))
            if len(values) != length or not all(math.isfinite(value) for value in values):
                raise ValueError(f"ImagePreprocess: {field} is {values}, must be {length} finite numbers")
            object.__setattr__(self, field, values)
        if min(self.std) <= 0:
            raise ValueError(f"ImagePreprocess: std is {self.std}, must be positive")
        if self.resize_mode not in _RESIZE_MODES:
            raise ValueError(f"ImagePreprocess: resize_mode is {self.resize_mode!r}, must be one of {_RESIZE_MODES}")
        if self.resize_size is not None:
            if self.resize_mode != "shortest" or _square_side(self.resize_size, "resize_size") < size:
                raise ValueError(
                    f"ImagePreprocess: resize_size is {self.resize_size}, must be at least image_size ({size}) "
                    "and belongs to resize_mode 'shortest'"
                )
            if self.resize_size == size:
                object.__setattr__(self, "resize_size", None)
        if self.interpolation not in _FILTERS:
            raise ValueError(
                f"ImagePreprocess: interpolation is {self.interpolation!r}, must be one of {tuple(_FILTERS)}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"ImagePreprocess: scale {self.scale} and ratio {self.ratio} must be ordered and positive, scale <= 1"
            )
        if not 0 <= self.flip <= 1 or not 0 <= self.fill_color <= 255:
            raise ValueError(
                f"ImagePreprocess: flip is {self.flip}, must be in 0 ... 1; "
                f"fill_color is {self.fill_color}, must be in 0 ... 255"
            )

    def for_training(self, flip: float = 0.0, scale: tuple[float, float] = (0.9, 1.0)) -> "ImagePreprocess":
        """The same preprocessing with random crops."""
        return replace(self, train=True, flip=flip, scale=scale)

    def for_evaluation(self) -> "ImagePreprocess":
        """The same preprocessing without chance."""
        return replace(self, train=False, flip=0.0)

    def __call__(self, image: "Image.Image | np.ndarray | Source", generator: Generator | None = None) -> torch.Tensor:
        """One picture as a tensor.

        Args:
            image: a Pillow image, [H, W, 3] or [H, W] uint8 array, or anything :func:`load_image` reads.
            generator: source of chance when `train`; None draws from torch's global generator.

        Returns:
            [3, S, S] float32.

        Raises:
            ValueError: the picture has no pixels or cannot be converted to RGB. FileNotFoundError: from `load_image`.
        """
        pixels = np.array(self.square(image, generator), dtype=np.float32)  # [S, S, 3]
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return tensor.sub_(mean).div_(std)

    def square(self, image: "Image.Image | np.ndarray | Source", generator: Generator | None = None) -> Image.Image:
        """The S x S RGB picture before scaling and normalisation."""
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        elif not isinstance(image, Image.Image):
            image = load_image(image)
        if min(image.size) < 1:
            raise ValueError(f"ImagePreprocess: image is {image.width} x {image.height}, must have pixels")
        image = _limit_aspect(_eight_bit(image))
        if self.train:
            image = self._random_crop(image, generator)
        elif self.resize_mode == "squash":
            image = self._resize(image, self.image_size, self.image_size)
        elif self.resize_mode == "longest":
            image = self._fit(image)
        else:
            image = self._centre_crop(image)
        return _to_rgb(image)

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image if image.size == (width, height) else image.resize((width, height), _FILTERS[self.interpolation])

    def _centre_crop(self, image: Image.Image) -> Image.Image:
        n = self.resize_size or self.image_size
        short, long = sorted(image.size)
        other = int(n * long / short)
        image = self._resize(image, n, other) if image.width <= image.height else self._resize(image, other, n)
        left = int(round((image.width - self.image_size) / 2))
        top = int(round((image.height - self.image_size) / 2))
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _fit(self, image: Image.Image) -> Image.Image:
        n, longest = self.image_size, max(image.size)
        width, height = (max(1, round(side / (longest / n))) for side in image.size)
        image = _to_rgb(self._resize(image, width, height))
        canvas = Image.new("RGB", (n, n), (self.fill_color,) * 3)
        canvas.paste(image, ((n - width) // 2, (n - height) // 2))
        return canvas

    def _random_crop(self, image: Image.Image, generator: Generator | None) -> Image.Image:
        width, height = image.size
        box = self._random_box(width, height, generator)
        image = self._resize(image.crop(box), self.image_size, self.image_size)
        if self.flip and _uniform(generator) < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _random_box(self, width: int, height: int, generator: Generator | None) -> tuple[int, int, int, int]:
        low, high = (math.log(value) for value in self.ratio)
        for _ in range(10):
            area = width * height * _uniform(generator, *self.scale)
            aspect = math.exp(_uniform(generator, low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = (int(_uniform(generator) * (n + 1)) for n in (width - w, height - h))
                return left, top, left + w, top + h
        # no box of that area fits: the centre, at the nearest allowed aspect
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = min(width, max(1, round(height * aspect)))
        h = min(height, max(1, round(width / aspect)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def to_config(self, style: str = "huggingface") -> dict:
        """Settings of the evaluation transform as `preprocessor_config.json` or OpenCLIP's `preprocess_cfg` has them.

        Raises:
            ValueError: the style is unknown, or cannot express this preprocessing.
        """
        from .preprocess_config import to_config

        return to_config(self, style)

    @classmethod
    def from_config(cls, config: dict, image_size: int | None = None) -> "ImagePreprocess":
        """Reads `preprocessor_config.json`, `preprocess_cfg` or a whole `open_clip_config.json`.

        Args:
            image_size: S where the configuration does not tell.

        Raises:
            ValueError: a setting is missing or asks for what CLIP preprocessing does not do.
        """
        from .preprocess_config import from_config

        return from_config(config, image_size)


def preprocess_batch(images: Sequence, preprocess: ImagePreprocess, generator: Generator | None = None) -> torch.Tensor:
    """B pictures (anything `preprocess` takes) as one [B, 3, S, S] float32 tensor; no pictures give [0, 3, S, S]."""
    size = preprocess.image_size
    batch = torch.empty(len(images), 3, size, size)
    for i, image in enumerate(images):
        batch[i] = preprocess(image, generator)
    return batch


def _square_side(value, field: str) -> int:
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(set(sides)) != 1 or type(sides[0]) is not int or not 0 < sides[0] <= 1 << 14:
        raise ValueError(f"ImagePreprocess: {field} is {value!r}, must be one side of 1 ... {1 << 14} pixels")
    return sides[0]


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(
            f"ImagePreprocess: array is {array.dtype} {list(array.shape)}, must be uint8 [H, W, 3] or [H, W]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        finite = values[np.isfinite(values)]
        peak = finite.max() if finite.size else 0.0
        # "I" and "F" pictures hold either eight-bit or sixteen-bit levels; "F" may also hold 0 ... 1
        top = 65535 if image.mode.startswith("I;16") or peak > 255 else 1 if image.mode == "F" and peak <= 1 else 255
        levels = np.nan_to_num(values, nan=0.0, posinf=top, neginf=0.0) * (255 / top)
        return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
    return image


def _limit_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = min(width, height) * MAX_ASPECT
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ValueError(f"ImagePreprocess: a picture of mode {image.mode!r} has no conversion to RGB") from error


def _uniform(generator: Generator | None, low: float = 0.0, high: float = 1.0) -> float:
    if isinstance(generator, np.random.Generator):
        draw = generator.random()
    else:
        draw = torch.rand((), generator=generator, dtype=torch.float64).item()
    return low + (high - low) * draw
