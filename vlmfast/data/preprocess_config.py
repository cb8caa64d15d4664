"""`ImagePreprocess` to and from the settings files published beside checkpoints."""

import math

from .images import OPENAI_MEAN, OPENAI_STD, ImagePreprocess

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which the files hold


def to_config(preprocess: ImagePreprocess, style: str) -> dict:
    """See :meth:`ImagePreprocess.to_config`."""
    size, mode = preprocess.image_size, preprocess.resize_mode
    if style == "open_clip":
        if preprocess.resize_size is not None or preprocess.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(
                f"ImagePreprocess.to_config: open_clip has no resize_size ({preprocess.resize_size}) "
                f"and no interpolation {preprocess.interpolation!r}"
            )
        return {
            "size": size,
            "mode": "RGB",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": mode,
            "fill_color": preprocess.fill_color,
        }
    if style != "huggingface":
        raise ValueError(f"ImagePreprocess.to_config: style is {style!r}, must be 'huggingface' or 'open_clip'")
    if mode == "longest":
        raise ValueError("ImagePreprocess.to_config: huggingface CLIP files cannot say resize_mode 'longest'")
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if mode == "squash" else {"shortest_edge": preprocess.resize_size or size},
        "resample": next(number for number, name in _RESAMPLE.items() if name == preprocess.interpolation),
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }


def from_config(config: dict, image_size: int | None) -> ImagePreprocess:
    """See :meth:`ImagePreprocess.from_config`."""
    if not isinstance(config, dict):
        raise ValueError(f"ImagePreprocess.from_config: config is {type(config).__name__}, must be a dict")
    if isinstance(config.get("preprocess_cfg"), dict) or isinstance(config.get("model_cfg"), dict):
        vision = (config.get("model_cfg") or {}).get("vision_cfg") or {}
        return _from_open_clip(config.get("preprocess_cfg") or {}, vision.get("image_size") or image_size)
    if any(key in config for key in ("image_mean", "crop_size", "do_resize", "do_normalize")):
        return _from_hugging_face(config, image_size)
    return _from_open_clip(config, image_size)


def _from_open_clip(config: dict, image_size: int | None) -> ImagePreprocess:
    size = config.get("size") or image_size
    if size is None:
        raise ValueError("ImagePreprocess.from_config: the configuration has no size, pass image_size")
    if config.get("mode", "RGB") != "RGB":
        raise ValueError(f"ImagePreprocess.from_config: mode is {config['mode']!r}, must be 'RGB'")
    return ImagePreprocess(
        size,
        mean=_triple(config.get("mean"), OPENAI_MEAN),
        std=_triple(config.get("std"), OPENAI_STD),
        interpolation=config.get("interpolation") or "bicubic",
        resize_mode=config.get("resize_mode") or "shortest",
        fill_color=config.get("fill_color") or 0,
    )


def _from_hugging_face(config: dict, image_size: int | None) -> ImagePreprocess:
    factor = config.get("rescale_factor", 1 / 255)
    if not config.get("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"ImagePreprocess.from_config: rescale_factor is {factor}, must be 1/255 and in use")
    if not config.get("do_resize", True):
        raise ValueError("ImagePreprocess.from_config: do_resize is false, pictures must be resized")
    resample = config.get("resample", 3)
    if resample not in _RESAMPLE:
        raise ValueError(f"ImagePreprocess.from_config: resample is {resample!r}, must be one of {list(_RESAMPLE)}")
    normalize = config.get("do_normalize", True)
    resize = config.get("size", image_size)
    crop = _side(config.get("crop_size", image_size)) if config.get("do_center_crop", True) else None
    squash = isinstance(resize, dict) and "height" in resize
    resize = _side(resize)
    if crop is None and not squash:
        raise ValueError("ImagePreprocess.from_config: without do_center_crop, size must have a height and a width")
    if crop is not None and squash and crop != resize:
        raise ValueError(f"ImagePreprocess.from_config: squashing to {resize} and cutting {crop} is not supported")
    return ImagePreprocess(
        resize if squash else crop,
        mean=_triple(config.get("image_mean"), OPENAI_MEAN) if normalize else (0.0,) * 3,
        std=_triple(config.get("image_std"), OPENAI_STD) if normalize else (1.0,) * 3,
        interpolation=_RESAMPLE[resample],
        resize_mode="squash" if squash else "shortest",
        resize_size=None if squash else resize,
    )


def _side(value) -> int:
    if isinstance(value, dict):
        if "shortest_edge" in value:
            return value["shortest_edge"]
        if "height" in value and value.get("height") == value.get("width"):
            return value["height"]
    if type(value) is int:
        return value
    raise ValueError(
        f"ImagePreprocess.from_config: size is {value!r}, must be a side, a shortest_edge or an equal height and width"
    )


def _triple(value, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if value is None:
        return default
    return (float(value),) * 3 if isinstance(value, (int, float)) else tuple(value)
