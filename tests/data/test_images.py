"""Reading of untrusted pictures and CLIP preprocessing."""

import io
import random
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfast.data import ImagePreprocess, check_image, load_image, preprocess_batch
from vlmfast.data.images import OPENAI_MEAN, OPENAI_STD


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that resizing has something to average."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def published_transform(image: Image.Image, n: int) -> torch.Tensor:
    """Resize, centre crop, RGB, scale, normalise: the published steps in float64."""
    width, height = image.size
    if width <= height:
        size = (n, int(n * height / width))
    else:
        size = (int(n * width / height), n)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = int(round((size[0] - n) / 2.0)), int(round((size[1] - n) / 2.0))
    image = image.crop((left, top, left + n, top + n)).convert("RGB")
    pixels = np.asarray(image).astype(np.float64) / 255
    return torch.from_numpy(((pixels - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("size", [(64, 48), (65, 48), (48, 65), (33, 32), (7, 91), (200, 131), (32, 32)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_matches_published_steps(size, mode):
    image = noise(*size)
    image = image.convert("RGB").quantize(17) if mode == "P" else image.convert(mode)
    ours = ImagePreprocess(32)(image)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32 and ours.is_contiguous()
    torch.testing.assert_close(ours.double(), published_transform(image, 32), rtol=1e-6, atol=1e-6)


@pytest.mark.oracle
def test_matches_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, "CLIPImageProcessorPil", None)
    if theirs is None:
        pytest.skip("this transformers has no Pillow image processor")
    config = ImagePreprocess(32).to_config()
    for size in [(64, 48), (48, 64), (100, 200), (32, 32)]:
        image = noise(*size)
        wanted = theirs.from_dict(config)(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ImagePreprocess(32)(image), wanted.float(), rtol=1e-6, atol=1e-6)


def test_palette_is_converted_after_the_resize():
    image = noise(64, 64).quantize(9)
    late = ImagePreprocess(16).square(image)
    early = ImagePreprocess(16).square(image.convert("RGB"))
    assert np.asarray(late).reshape(-1, 3).tolist() != np.asarray(early).reshape(-1, 3).tolist()
    palette = {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}
    assert {tuple(c) for c in np.asarray(late).reshape(-1, 3).tolist()} <= palette


def test_squash_ignores_the_aspect_and_longest_pads():
    image = Image.new("RGB", (60, 30), (200, 10, 10))
    image.paste((10, 200, 10), (0, 0, 15, 30))
    squashed = np.asarray(ImagePreprocess(20, resize_mode="squash").square(image))
    assert squashed.shape == (20, 20, 3)
    assert squashed[10, 1].tolist() == [10, 200, 10] and squashed[10, 18].tolist() == [200, 10, 10]
    padded = np.asarray(ImagePreprocess(20, resize_mode="longest", fill_color=7).square(image))
    assert (padded[:5] == 7).all() and (padded[15:] == 7).all()
    assert (padded[5:15] != 7).all()
    upright = np.asarray(ImagePreprocess(21, resize_mode="longest").square(image.transpose(Image.Transpose.ROTATE_90)))
    # 10 of 21 columns: five black ones left of the picture, six right
    assert (upright[:, :5] == 0).all() and (upright[:, 5] != 0).any() and (upright[:, 15:] == 0).all()
    assert (upright[:, 14] != 0).any()


def test_resize_size_cuts_from_a_larger_picture():
    image = noise(80, 80)
    whole = ImagePreprocess(40).square(image)
    cut = ImagePreprocess(32, resize_size=40).square(image)
    assert np.array_equal(np.asarray(whole)[4:36, 4:36], np.asarray(cut))


def test_sixteen_bit_and_float_grey_keep_their_contrast():
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    wanted = np.rint(ramp * 255)
    for array in [
        np.rint(ramp * 65535).astype(np.uint16),
        np.rint(ramp * 65535).astype(np.int32),
        np.rint(ramp * 255).astype(np.int32),
        ramp.astype(np.float32),
        (ramp * 255).astype(np.float32),
    ]:
        image = load_image(encoded(Image.fromarray(array), "TIFF"))
        pixels = np.asarray(ImagePreprocess(64).square(image))[..., 0].astype(float)
        assert abs(pixels - wanted).max() <= 1, array.dtype
    broken = Image.fromarray(np.array([[np.nan, np.inf], [-np.inf, 0.5]], dtype=np.float32))
    assert torch.isfinite(ImagePreprocess(4)(broken)).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_every_pillow_mode_gives_a_finite_tensor(mode, resize_mode):
    image = Image.new(mode, (50, 40))
    for preprocess in (ImagePreprocess(24, resize_mode=resize_mode), ImagePreprocess(24, train=True)):
        tensor = preprocess(image)
        assert tensor.shape == (3, 24, 24) and torch.isfinite(tensor).all()


def test_unconvertible_mode_names_it():
    with pytest.raises(ValueError, match="mode 'La'"):
        ImagePreprocess(24)(Image.new("La", (50, 40)))


def test_stripes_cost_no_gigabytes():
    for size in [(1, 50_000), (50_000, 1), (3, 20_000)]:
        assert ImagePreprocess(224)(Image.new("RGB", size, (255, 0, 0))).shape == (3, 224, 224)


def test_training_crops_follow_the_generator():
    image = noise(90, 70)
    preprocess = ImagePreprocess(32, train=True, flip=0.5)
    a, b, c = (preprocess(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    d, e = (preprocess(image, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(d, e)
    torch.manual_seed(3)
    f = preprocess(image)
    torch.manual_seed(3)
    assert torch.equal(f, preprocess(image)) and not torch.equal(f, preprocess(image))


def test_training_boxes_keep_to_scale_ratio_and_picture():
    preprocess = ImagePreprocess(32, train=True, scale=(0.3, 0.6))
    chance = np.random.default_rng(0)
    boxes = np.array([preprocess._random_box(100, 80, chance) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= 100).all() and (boxes[:, 3] <= 80).all()
    area = width * height / 8000
    assert 0.29 < area.min() < 0.35 and 0.55 < area.max() < 0.61
    ratio = width / height
    assert 0.73 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.36
    assert boxes[:, 0].min() == 0 and boxes[:, 2].max() == 100
    # no box of nine tenths of the area fits a stripe: the centre, at the nearest aspect
    assert ImagePreprocess(32, train=True)._random_box(300, 30, chance) == (130, 0, 170, 30)


def test_flip_happens_as_often_as_asked():
    image = Image.new("RGB", (20, 20))
    image.paste((255, 255, 255), (0, 0, 10, 20))
    chance = np.random.default_rng(0)
    preprocess = ImagePreprocess(20, train=True, scale=(1, 1), ratio=(1, 1), flip=0.25)
    flipped = sum(np.asarray(preprocess.square(image, chance))[0, 0, 0] == 0 for _ in range(400))
    assert 70 < flipped < 130
    assert preprocess.for_evaluation().flip == 0 and not preprocess.for_evaluation().train
    assert preprocess.for_evaluation().for_training(flip=0.5).flip == 0.5


def test_arrays_paths_and_bytes_give_the_same_tensor(tmp_path):
    image = noise(40, 30)
    image.save(tmp_path / "a.png")
    preprocess = ImagePreprocess(32)
    wanted = preprocess(image)
    data = (tmp_path / "a.png").read_bytes()
    sources = [np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data)]
    batch = preprocess_batch(sources, preprocess)
    assert batch.shape == (5, 3, 32, 32)
    assert all(torch.equal(one, wanted) for one in batch)
    assert preprocess_batch([], preprocess).shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match=r"array is float64 \[4, 4, 3\]"):
        preprocess(np.zeros((4, 4, 3)))
    with pytest.raises(TypeError, match="source is int"):
        preprocess(3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_files_are_named(tmp_path):
    png, jpeg = encoded(noise(64, 64), "PNG"), encoded(noise(64, 64), "JPEG")
    header = b"\x89PNG\r\n\x1a\n"
    bomb = header + _chunk(b"IHDR", (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0") + _chunk(b"IDAT", b"")
    big = header + _chunk(b"IHDR", (10_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0") + _chunk(b"IDAT", b"")
    files = {
        "empty.png": (b"", "0 bytes"),
        "text.jpg": (b"this is no picture", "not a picture"),
        "page.jpg": (b"<html><body>404</body></html>", "not a picture"),
        "cut.png": (png[: len(png) // 2], "cannot read"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "cannot read"),
        "header.png": (png[:8], "cannot read|not a picture"),
        "bomb.png": (bomb, "cannot read.*(pixels|bomb)"),
        "big.png": (big, "100000000 pixels, must be at most"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n", "not a picture"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            load_image(tmp_path / name)
        assert name in str(error.value)
        with pytest.raises(ValueError, match="my picture"):
            load_image(data, name="my picture")
    for missing in ("absent.png", "."):
        with pytest.raises(FileNotFoundError, match="does not exist|no regular file"):
            load_image(tmp_path / missing)
    assert load_image(jpeg).size == (64, 64)
    with pytest.raises(ValueError, match="4096 pixels, must be at most 4000"):
        load_image(jpeg, max_pixels=4000)
    assert check_image(png[: len(png) // 2]) == (64, 64)  # a sound header, whatever follows
    with pytest.raises(ValueError, match="not a picture"):
        check_image(b"nonsense")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_nothing_but_value_error(kind):
    data = encoded(noise(24, 24), kind)
    chance = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        damaged = damaged[: chance.randint(0, len(damaged))] if chance.random() < 0.3 else damaged
        try:
            image = load_image(bytes(damaged))
        except ValueError:
            continue
        assert ImagePreprocess(16)(image).shape == (3, 16, 16)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("style", ["huggingface", "open_clip"])
@pytest.mark.parametrize(
    "preprocess",
    [
        ImagePreprocess(224),
        ImagePreprocess(32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.75), interpolation="bilinear"),
        ImagePreprocess(64, resize_mode="squash"),
    ],
    ids=["openai", "halves", "squash"],
)
def test_config_round_trip(style, preprocess):
    assert ImagePreprocess.from_config(preprocess.to_config(style)) == preprocess


def test_config_round_trip_of_what_only_one_style_has():
    longest = ImagePreprocess(64, resize_mode="longest", fill_color=3)
    cut = ImagePreprocess(224, resize_size=256)
    assert ImagePreprocess.from_config(longest.to_config("open_clip")) == longest
    assert ImagePreprocess.from_config(cut.to_config()) == cut
    for preprocess, style in [(longest, "huggingface"), (cut, "open_clip"), (cut, "timm")]:
        with pytest.raises(ValueError, match="to_config"):
            preprocess.to_config(style)


def test_reads_published_configs():
    old = {"crop_size": 224, "size": 224, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5] * 3, "resample": 3}
    assert ImagePreprocess.from_config(old) == ImagePreprocess(224, mean=(0.5,) * 3, std=(0.5,) * 3)
    open_clip = {
        "model_cfg": {"embed_dim": 512, "vision_cfg": {"image_size": 256}},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    wanted = ImagePreprocess(256, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    assert ImagePreprocess.from_config(open_clip) == wanted
    assert ImagePreprocess.from_config({"mean": [0.5] * 3, "std": [0.5] * 3, "size": [256, 256]}).image_size == 256
    plain = {"do_normalize": False, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    assert ImagePreprocess.from_config(plain).mean == (0, 0, 0)


@pytest.mark.parametrize(
    "config",
    [
        {"mean": [0.5] * 3},
        {"crop_size": {"height": 32, "width": 48}, "size": 32},
        {"crop_size": 32, "size": 32, "rescale_factor": 1.0},
        {"crop_size": 32, "size": 32, "resample": 9},
        {"crop_size": 32, "size": 32, "do_resize": False},
        {"crop_size": 32, "size": 32, "image_mean": [0.5, float("nan"), 0.5]},
        {"crop_size": 64, "size": 32},
        {"size": 1 << 30, "mean": [0.5] * 3},
        {"size": "large"},
        [1],
    ],
    ids=str,
)
def test_rejects_configs_that_clip_has_not(config):
    with pytest.raises(ValueError, match="ImagePreprocess"):
        ImagePreprocess.from_config(config)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_size": 0},
        {"image_size": 2.5},
        {"std": (0, 1, 1)},
        {"mean": (1, 2)},
        {"resize_mode": "crop"},
        {"resize_size": 100},
        {"interpolation": "box"},
        {"scale": (0.9, 1.5)},
        {"ratio": (2, 1)},
        {"flip": 2},
        {"fill_color": 300},
    ],
    ids=str,
)
def test_rejects_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ImagePreprocess(**arguments)
