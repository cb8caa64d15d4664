"""Region features of pictures: detector features with their boxes, from every public file format."""

import base64
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .region_arrays import UnsafePickleError
from .region_formats import open_source
from .report import PairsReport, Skip

# field -> its names in public files
_NAMES = {
    "features": ("features", "feature", "x", "image_feat", "image_feature"),
    "boxes": ("boxes", "bbox", "image_bboxes"),
    "width": ("image_w", "img_w", "image_width", "width"),
    "height": ("image_h", "img_h", "image_height", "height"),
    "num_boxes": ("num_boxes", "num_bbox"),
    "classes": ("objects_id", "obj_id", "objects"),
    "confidences": ("objects_conf", "obj_conf", "conf"),
    "attributes": ("attrs_id", "attr_id"),
    "attribute_confidences": ("attrs_conf", "attr_conf"),
    "class_probabilities": ("cls_prob", "soft_labels"),
}
_PER_REGION = ("classes", "confidences", "attributes", "attribute_confidences")
_TRIES = 8


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one picture, R of them.

    Attributes:
        image_id: as the file spells it.
        features: [R, D] float32.
        boxes: [R, 4] float32, x1, y1, x2, y2 in pixels; fractions where the file does not tell the picture's size.
        width, height: of the picture in pixels; 1 and 1 where `boxes` are fractions.
        classes, attributes: [R] int64 detector numbers, or None.
        confidences, attribute_confidences: [R] float32, or None.
        class_probabilities: [R, C] float32, targets of masked-region classification, or None.
        names: R class names (VinVL), or None.
    """

    image_id: str
    features: Tensor
    boxes: Tensor
    width: float
    height: float
    classes: Tensor | None = None
    confidences: Tensor | None = None
    attributes: Tensor | None = None
    attribute_confidences: Tensor | None = None
    class_probabilities: Tensor | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def scaled(self, width: float, height: float) -> "Regions":
        """The same regions on a picture of another size, for example fractions to pixels."""
        factor = self.boxes.new_tensor([width / self.width, height / self.height] * 2)
        return replace(self, boxes=self.boxes * factor, width=width, height=height)

    def first(self, count: int) -> "Regions":
        """The first `count` regions; detectors store them in order of confidence."""
        cut = {
            field: value[:count]
            for field, value in vars(self).items()
            if isinstance(value, (Tensor, tuple)) and value is not None
        }
        return replace(self, **cut)


class RegionsReport(PairsReport):
    """Counts of images read and skipped, with reasons and examples."""

    def __str__(self) -> str:
        return super().__str__().replace(" pairs used", " images used", 1)


class RegionFeatures(Dataset):
    """Region features by image id, read from disk one image at a time; open with :meth:`open`.

    `features[image_id]` raises KeyError for an unknown id and ValueError, naming file and row, for a damaged record.
    Iteration counts damaged records in :meth:`report` and goes on. Integers are taken as ids, not as positions. Works
    in DataLoader workers: every process opens the file for itself.

    Args:
        source: one of the sources of `region_formats`.
        feature_dim: D of every region; None takes that of the first readable image, others are then refused.
    """

    def __init__(self, source, feature_dim: int | None = None):
        self._source = source
        self.format: str = source.format
        self.ids: list[str] = source.ids()
        self._known = set(self.ids)
        self._report = RegionsReport(used=len(self.ids))
        self._damaged: set[str] = set()
        for skip in source.skipped:
            self._report.add(skip)
        if not self.ids:
            raise ValueError(f"RegionFeatures: {source.path} holds no image\n{self._report}")
        self.feature_dim = feature_dim
        if feature_dim is None:
            self._probe()

    @classmethod
    def open(
        cls, path: str | os.PathLike, format: str | None = None, *, feature_dim: int | None = None
    ) -> "RegionFeatures":
        """Opens region features in any of the public formats.

        Args:
            path: a .tsv file, an .npz or .npy file, a folder of those (one an image, its id is the path without the
                suffix), an LMDB folder or file, or an HDF5 file.
            format: "bottom-up-attention" (6 columns, or 7 with class probabilities), "lxmert" (10 columns), "oscar" (id
                and JSON, as VinVL too; or id, number of boxes, features), "numpy", "lmdb", "hdf5"; None tells by suffix
                and content.
            feature_dim: D that every region must have; None takes the first readable image's.

        Raises:
            FileNotFoundError: nothing at `path`. ImportError: lmdb or h5py is needed and absent.
            ValueError: unknown format, no image, or not one of the first images can be read.
        """
        if feature_dim is not None and feature_dim < 1:
            raise ValueError(f"RegionFeatures: feature_dim is {feature_dim}, must be positive")
        return cls(open_source(Path(path), format), feature_dim)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image_id) -> bool:
        return str(image_id) in self._known

    def __getitem__(self, image_id: str | int) -> Regions:
        name = str(image_id)
        if name not in self._known:
            raise KeyError(f"RegionFeatures: {self._source.path} has no image {name!r} among its {len(self)}")
        try:
            regions = make_regions(name, self._source.read(name))
            if self.feature_dim not in (None, regions.features.shape[1]):
                raise ValueError(
                    f"features have {regions.features.shape[1]} values a region, must have {self.feature_dim}; "
                    "truncated?"
                )
        except ValueError as error:
            kind = UnsafePickleError if isinstance(error, UnsafePickleError) else ValueError
            raise kind(f"RegionFeatures: {self._source.where(name)} (image {name}): {error}") from error
        return regions

    def __iter__(self) -> Iterator[Regions]:
        found = False
        for image_id in self.ids:
            try:
                regions = self[image_id]
            except ValueError as error:
                self._skip(image_id, error)
                continue
            found = True
            yield regions
        if not found:
            raise ValueError(f"RegionFeatures: not one image could be read\n{self._report}")

    def report(self) -> RegionsReport:
        """Images that can be used, and what was left out so far with reasons and examples."""
        return self._report

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        self._source.close()

    def _probe(self) -> None:
        first_error = None
        for image_id in self.ids[:_TRIES]:
            try:
                self.feature_dim = self[image_id].features.shape[1]
                return
            except ValueError as error:
                first_error = first_error or error
        raise first_error

    def _skip(self, image_id: str, error: Exception) -> None:
        if image_id not in self._damaged:  # an epoch later it is the same loss
            self._damaged.add(image_id)
            self._report.add(Skip("damaged record", self._source.where(image_id), str(error)))
            self._report.used -= 1


def make_regions(image_id: str, record: dict) -> Regions:
    """Checked regions of one image from a record of a public file (its names for the arrays are known).

    `num_boxes` below the number of rows cuts them: MMF and HDF5 files are padded. Boxes come from `boxes` in pixels,
    from `norm_bb` (UNITER's fractions) or from the last six feature values (OSCAR, VinVL: 2048 + 6).

    Raises:
        ValueError: a field is missing, has another number of rows than the features, or holds NaN or infinity.
    """
    found = {
        field: next((record[name] for name in names if record.get(name) is not None), None)
        for field, names in _NAMES.items()
    }
    if found["features"] is None:
        raise ValueError(f"no features among {sorted(map(str, record))[:12]}")
    features = _floats(found["features"], "features")
    if features.ndim > 2:
        features = features.reshape(-1, features.shape[-1])
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features are {list(features.shape)}, must be [R, D] with at least one region")
    boxes, width, height = _boxes(found, record, features)
    if boxes.shape != (len(features), 4):
        raise ValueError(f"boxes are {list(boxes.shape)}, must be [{len(features)}, 4] as there are features")
    count = len(features)
    if found["num_boxes"] is not None:
        count = int(_scalar(found["num_boxes"], "num_boxes"))
        if not 1 <= count <= len(features):
            raise ValueError(f"num_boxes is {count}, must be 1 ... {len(features)}, the number of features")
    features, boxes = features[:count], boxes[:count]
    if (boxes[:, 2:] < boxes[:, :2]).any():
        row = int((boxes[:, 2:] < boxes[:, :2]).any(axis=1).argmax())
        raise ValueError(f"box {row} is {boxes[row].tolist()}, must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    extra: dict = {}
    for field in (*_PER_REGION, "class_probabilities"):
        if found[field] is not None:
            integers = field in ("classes", "attributes")
            values = _integers(found[field], field) if integers else _floats(found[field], field)
            if len(values) < count or values.ndim != (2 if field == "class_probabilities" else 1):
                raise ValueError(f"{field} are {list(values.shape)}, must have {count} rows")
            extra[field] = torch.from_numpy(values[:count].copy())
    names = record.get("names")
    return Regions(
        image_id,
        torch.from_numpy(features.copy()),
        torch.from_numpy(boxes.copy()),
        width,
        height,
        names=tuple(names[:count]) if names is not None else None,
        **extra,
    )


def _boxes(found: dict, record: dict, features: np.ndarray) -> tuple[np.ndarray, float, float]:
    if found["boxes"] is not None:
        size = []
        for field in ("width", "height"):
            if found[field] is None:
                raise ValueError(f"no {field} of the image among {sorted(map(str, record))[:12]}")
            value = _scalar(found[field], field)
            if value <= 0:
                raise ValueError(f"{field} is {value:g}, must be positive")
            size.append(value)
        return _floats(found["boxes"], "boxes"), *size
    if record.get("norm_bb") is not None:
        relative = _floats(record["norm_bb"], "norm_bb")
        if relative.ndim != 2 or relative.shape[1] < 4:
            raise ValueError(f"norm_bb are {list(relative.shape)}, must be [R, 6]")
        return relative[:, :4], 1.0, 1.0
    geometry = features[:, -6:]
    if features.shape[1] > 6 and (np.abs(geometry) <= 1.01).all():
        sides = geometry[:, 2:4] - geometry[:, 0:2]
        # papers name height first, files width first; the box is the same
        if any(np.allclose(sides, geometry[:, order], atol=1e-3) for order in ([4, 5], [5, 4])):
            return geometry[:, :4], 1.0, 1.0
    raise ValueError("no boxes, and the last six feature values are not x1, y1, x2, y2, w, h as fractions of the image")


def _floats(value, field: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{field} hold {array.dtype}, must be numbers")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{field} hold NaN or infinity")
    return array


def _integers(value, field: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{field} hold {array.dtype}, must be integers")
    return array.astype(np.int64)


def _scalar(value, field: str) -> float:
    try:  # some files keep the digits of the TSV they came from
        number = float(np.asarray(value).reshape(-1).item())
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < 1e12:
        raise ValueError(f"{field} is {str(value)[:40]!r}, must be one number")
    return number


def write_regions(path: str | os.PathLike, images: Iterable[Regions]) -> int:
    """Writes LXMERT's ten columns where all images have classes, confidences and attributes, bottom-up-attention's six
    where the first has not; returns the number of images."""
    count, wide = 0, None
    with open(path, "wb") as file:
        for regions in images:
            extra = [getattr(regions, field) for field in _PER_REGION]
            full = all(values is not None for values in extra)
            if wide is None:
                wide = full
            if wide and not full:
                missing = [field for field in _PER_REGION if getattr(regions, field) is None]
                raise ValueError(f"write_regions: image {regions.image_id} has no {missing[0]}, the first image has")
            if any(c in regions.image_id for c in "\t\r\n") or not regions.image_id:
                raise ValueError(f"write_regions: image_id {regions.image_id!r} is empty or holds a tab or line break")
            width, height = (f"{int(n) if n == int(n) else n}" for n in (regions.width, regions.height))
            blobs = [_base64(regions.boxes), _base64(regions.features)]
            if wide:
                cells = [regions.image_id, height, width, *map(_base64, extra), str(len(regions)), *blobs]
            else:
                cells = [regions.image_id, width, height, str(len(regions)), *blobs]
            file.write("\t".join(cells).encode() + b"\n")
            count += 1
    return count


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
