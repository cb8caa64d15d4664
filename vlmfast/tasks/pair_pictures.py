"""Pictures as BERT-like models take them: region features with boxes, or pixels (Pixel-BERT)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.images import ImagePreprocess, load_image
from ..data.region_batches import encode_regions
from ..data.region_boxes import oscar_boxes
from ..data.regions import RegionFeatures, Regions, make_regions
from .pair_models import PairInputs, TaskHead

PIXEL_BERT_SIDE = 768  # pixels of the longer side in the third-party code


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture for a model that reads pixels: its id, the Pillow image, or the tensor [3, h, w] that the model takes.

    len() counts it as one.
    """

    image_id: str
    pixels: object = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return tuple(self.pixels.shape[:0:-1]) if isinstance(self.pixels, Tensor) else self.pixels.size


def as_regions(regions, name: str = "regions") -> Regions:
    """The regions of one picture.

    Args:
        regions: a `Regions`; an opened `RegionFeatures` that holds one picture; or a mapping with `features` [R, D] and
            `boxes` [R, 4] under any of the public names, in pixels beside `width` and `height`, else as fractions of
            the picture.
        name: of the argument, for errors.

    Raises:
        TypeError: something else. ValueError: several pictures, or arrays that do not fit.
    """
    if isinstance(regions, Regions):
        return regions
    if isinstance(regions, RegionFeatures):
        if len(regions) != 1:
            raise ValueError(f"{name}: holds {len(regions)} pictures, must be those of one; index it by image id")
        return regions[regions.ids[0]]
    if not isinstance(regions, Mapping):
        raise TypeError(f"{name}: is {type(regions).__name__}, must be Regions, an opened RegionFeatures or a mapping "
                        "with features and boxes")
    record = {key: value.detach().cpu().numpy() if isinstance(value, Tensor) else value
              for key, value in regions.items()}
    if "boxes" in record and not any(key.endswith(("width", "_w")) for key in record):
        if torch.as_tensor(record["boxes"]).max() > 1:
            raise ValueError(f"{name}: boxes reach {float(torch.as_tensor(record['boxes']).max()):g} and there is no "
                             "width and height; must be fractions of the picture, or pixels beside its size")
        record |= {"width": 1, "height": 1}
    try:
        return make_regions(str(record.get("image_id", "picture")), record)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def as_picture(picture, name: str = "picture") -> Picture:
    """One picture for a model that reads pixels.

    Args:
        picture: a `Picture`, a file, a Pillow image, or a float tensor [3, h, w] that is preprocessed already.
        name: of the argument, for errors.

    Raises:
        TypeError: something else, for instance regions. ValueError, FileNotFoundError: see `load_image`.
    """
    from PIL import Image

    if isinstance(picture, Picture):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Picture(str(picture), load_image(picture))
    if isinstance(picture, Image.Image):
        return Picture(str(getattr(picture, "filename", "") or "picture"), picture)
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or len(picture) != 3 or not picture.is_floating_point():
            raise ValueError(f"{name}: is {picture.dtype} {list(picture.shape)}, must be floating point [3, h, w]")
        return Picture("picture", picture)
    raise TypeError(f"{name}: is {type(picture).__name__}, must be a picture: a file, a Pillow image or a tensor "
                    "[3, h, w]; the model takes pixels, not regions")


def is_one_picture(pictures) -> bool:
    """Whether an argument is one picture, or the regions of one, and not a list of those."""
    return isinstance(pictures, (Regions, RegionFeatures, Mapping, str)) or not isinstance(pictures, Sequence)


def pixel_preprocess(config) -> ImagePreprocess:
    """Pixel-BERT's own: the longer side to 768 pixels, a black frame around it to a square, the mean subtracted."""
    mean, std = (tuple(value / 255 for value in values) for values in (config.img_pixel_mean, config.img_pixel_std))
    return ImagePreprocess(PIXEL_BERT_SIDE, mean, std, resize_mode="longest", interpolation="bilinear")


def pixel_batch(pictures: Sequence[Picture], preprocess: ImagePreprocess, many: int) -> dict[str, Tensor]:
    """image [I, 3, h, w], each picture once, and image_index [many] where texts share them.

    Raises:
        ValueError: tensors of different sizes.
    """
    places = {id(picture): i for i, picture in enumerate({id(p): p for p in pictures}.values())}
    unique = list({id(picture): picture for picture in pictures}.values())
    images = [p.pixels if isinstance(p.pixels, Tensor) else preprocess(p.pixels) for p in unique]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"pictures: have sizes {sorted({tuple(image.shape) for image in images})}, must be the same")
    if len(unique) == many:
        return {"image": torch.stack(images)}
    index = [places[id(picture)] for picture in pictures]
    return {"image": torch.stack(images), "image_index": torch.tensor(index * (many if len(index) == 1 else 1))}


def region_batch(pictures: Sequence[Regions], takes: PairInputs, width: int, task_head: TaskHead | None = None, *,
                 most: int | None = None, slots: int = 0) -> dict[str, Tensor]:
    """image_feat [N, R, D], image_loc [N, R, P] (models with boxes), num_regions [N], and image_type_ids [N, R] where
    the head tells two pictures apart; N is half of the pictures where two share a sequence.

    Args:
        pictures: regions of each; width: D.
        most: regions of a picture that are kept, the first ones, the whole picture included.
        slots: R, where the model fixes it.

    Raises:
        ValueError: features of another width, or what `encode_regions` raises.
    """
    kinds, joint = (task_head.picture_types, task_head.pictures == "joint") if task_head else (None, False)
    rows = []
    for i, regions in enumerate(pictures):
        features, boxes = _encoded(regions, takes, width)
        features, boxes = features[: most or None], boxes[: most or None]
        rows.append((features, boxes, torch.full((len(features),), kinds[i % 2] if kinds else 0)))
    if joint:
        rows = [tuple(map(torch.cat, zip(left, right, strict=True)))
                for left, right in zip(rows[::2], rows[1::2], strict=True)]
    if slots:
        rows = [tuple(part[:slots] for part in row) for row in rows]
    names = ["image_feat"] + ["image_loc"] * (takes.boxes is not None) + ["image_type_ids"] * (kinds is not None)
    parts = {"image_feat": 0, "image_loc": 1, "image_type_ids": 2}
    found = {name: torch.nn.utils.rnn.pad_sequence([row[parts[name]] for row in rows], batch_first=True)
             for name in names}
    if slots:
        found = {name: torch.nn.functional.pad(value, (0, 0, 0, slots - value.shape[1]))
                 for name, value in found.items()}
    return {**found, "num_regions": torch.tensor([len(row[0]) for row in rows])}


def _encoded(regions: Regions, takes: PairInputs, width: int) -> tuple[Tensor, Tensor]:
    """Features and box inputs of one picture, checked."""
    if takes.boxes is None and regions.features.shape[1] == width - 6:  # VisualBERT on Flickr30K: 2048 + 6
        boxes = oscar_boxes(regions.boxes, regions.width, regions.height)
        return torch.cat([regions.features, boxes], 1), boxes
    if regions.features.shape[1] != width:
        raise ValueError(f"regions of picture {regions.image_id} have {regions.features.shape[1]} values, the model "
                         f"takes {width}")
    return encode_regions(regions, takes.boxes)


def cell_regions(picture: Picture, states: Tensor, grid: Sequence[int], preprocess: ImagePreprocess | None) -> Regions:
    """The cells of Pixel-BERT's grid as regions of the picture: boxes [H W, 4] in its pixels, clipped to it.

    Args:
        states: [H W, C], kept as features.
        grid: H, W.
        preprocess: what put the picture into a square; None: the cells cover it.
    """
    (height, width), (w, h) = grid, picture.size
    row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    unit = torch.stack([column / width, row / height, (column + 1) / width, (row + 1) / height], 1)
    if preprocess is None or preprocess.resize_mode == "squash":
        boxes = unit * torch.tensor([w, h, w, h])
    else:
        side = max(w, h) if preprocess.resize_mode == "longest" else min(w, h)
        frame = torch.tensor([(w - side) / 2, (h - side) / 2] * 2)
        boxes = unit * side + frame
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([w, h, w, h], dtype=boxes.dtype))
    return Regions(picture.image_id, states, boxes, w, h)
