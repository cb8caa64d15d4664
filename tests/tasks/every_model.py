"""A small model of each BERT-like kind, and its inputs for one example, written out by hand from the papers' layouts:
nothing padded, nothing shared with the package's own input code."""

import numpy as np
import torch
from models.single_stream_helpers import KINDS as SINGLE
from models.single_stream_helpers import tiny
from models.tiny_models import tiny_imagebert, tiny_pixelbert, tiny_vdbert
from models.two_stream_helpers import tiny_lxmert, tiny_vilbert
from PIL import Image
from tasks.pair_helpers import PICTURES, TOKENIZER

SLOTS = 7
SIDE = 128  # pixels of Pixel-BERT's squares: 2 x 2 cells
BUILD = {
    "ViLBERT": lambda **more: tiny_vilbert(0.15, **{"heads": ("pretraining",), **more}),
    "LXMERT": lambda **more: tiny_lxmert(0.15, max_position_embeddings=24, **more),
    "VisualBERT": lambda **more: tiny("visualbert", 0.15, **{"heads": ("pretraining",), **more}),
    "UNITER": lambda **more: tiny("uniter", 0.15, **{"heads": ("pretraining",), "type_vocab_size": 2, **more}),
    "VLBERT": lambda **more: tiny("vlbert", 0.15, **{"heads": ("mlm", "mvrc"), "with_pooler": False, **more}),
    "VDBERT": lambda **more: tiny_vdbert(0.15, **more),
    "ImageBERT": lambda **more: tiny_imagebert(0.15, **{"heads": ("pretraining",), "sep_token_id": TOKENIZER.sep,
                                                        **more}),
    "PixelBERT": lambda **more: tiny_pixelbert(0.1, **{"heads": ("pretraining",), **more}),
}
assert {"visualbert", "uniter", "vlbert"} == set(SINGLE)


def build(kind: str, **more):
    """A pretrained model without task heads, in evaluation mode."""
    torch.manual_seed(3)
    model = BUILD[kind](**more)
    model.tokenizer = TOKENIZER
    return model


def photo(i: int) -> Image.Image:
    """A picture of its own size and colours."""
    generator = torch.Generator().manual_seed(i)
    pixels = torch.randint(0, 256, (60 + 10 * i, 90, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).resize((90 + 10 * i, 60))


PHOTOS = [photo(i) for i in range(4)]


def pictures(kind: str) -> list:
    return PHOTOS if kind == "PixelBERT" else PICTURES


def options(kind: str, model) -> dict:
    """What tasks of this model need besides it."""
    if kind != "PixelBERT":
        return {}
    from vlmfast.data import ImagePreprocess

    return {"preprocess": ImagePreprocess(SIDE, [v / 255 for v in model.config.img_pixel_mean], (1 / 255,) * 3,
                                          resize_mode="longest", interpolation="bilinear")}


def words(*parts: str) -> tuple[list[int], list[int]]:
    """[CLS] part [SEP] part [SEP] ..., and the number of the part that each token belongs to."""
    ids, part = [TOKENIZER.cls], [0]
    for i, text in enumerate(parts):
        piece = [*TOKENIZER.encode(text), TOKENIZER.sep]
        ids, part = ids + piece, part + [i] * len(piece)
    return ids, part


def fractions(regions) -> torch.Tensor:
    return regions.boxes / torch.tensor([regions.width, regions.height] * 2)


def square(image: Image.Image) -> torch.Tensor:
    """[3, SIDE, SIDE]: the longer side to SIDE, black around, the mean subtracted."""
    scale = SIDE / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (SIDE, SIDE))
    canvas.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    pixels = torch.from_numpy(np.asarray(canvas).copy()).float()
    return (pixels - torch.tensor([123.675, 116.28, 103.53])).permute(2, 0, 1)


def image_inputs(kind: str, picture) -> dict[str, torch.Tensor]:
    if kind == "PixelBERT":
        return {"image": square(picture)[None]}
    loc, feat = fractions(picture), picture.features
    x1, y1, x2, y2 = loc.T
    size = torch.stack([x2 - x1, y2 - y1], 1)
    if kind == "VisualBERT":
        return {"image_feat": feat[None]}
    if kind in ("ViLBERT", "ImageBERT"):
        loc = torch.cat([loc, size.prod(1, keepdim=True)], 1)
    elif kind == "UNITER":
        loc = torch.cat([loc, size, size.prod(1, keepdim=True)], 1)
    elif kind == "VLBERT":
        loc = 100 * torch.cat([(loc[:, :2] + loc[:, 2:]) / 2, size], 1)
    elif kind == "VDBERT":
        most = picture.boxes.view(-1, 2, 2).amax((0, 1)) + 1e-5
        scaled = picture.boxes / most.repeat(2)
        area = (scaled[:, 2:] - scaled[:, :2]).prod(1)
        loc = torch.cat([scaled, torch.stack([area, picture.classes.float(), picture.confidences], 1)], 1)[:SLOTS]
        feat = feat[:SLOTS]
    if kind in ("ViLBERT", "VLBERT"):  # the whole picture comes first
        w, h = picture.width, picture.height
        whole = [0, 0, 1, 1, 1] if kind == "ViLBERT" else [50 * (w - 1) / w, 50 * (h - 1) / h, 100 * (w - 1) / w,
                                                           100 * (h - 1) / h]  # fmt: skip
        loc, feat = torch.cat([torch.tensor([whole]), loc]), torch.cat([feat.mean(0, keepdim=True), feat])
    return {"image_feat": feat[None], "image_loc": loc[None]}


def example(kind: str, parts: tuple[str, ...], picture, *, asked: str = "", types=None) -> dict[str, torch.Tensor]:
    """All arguments of one example.

    asked: "question" for the layout that an answer head reads. types: segment of each part, None for 0, 1 ...
    """
    ids, part = words(*parts)
    if asked == "question" and kind == "VisualBERT":
        ids, part = words(parts[0].rstrip("?") + "? [MASK]")
    elif asked == "question" and kind == "VLBERT":
        ids, part = words(parts[0], "[MASK]")
    segment = [types[i] if types else i for i in part]
    image = image_inputs(kind, picture)
    if kind == "VDBERT":
        missing = SLOTS - image["image_feat"].shape[1]
        ids = [TOKENIZER.cls] + [TOKENIZER.unk] * SLOTS + [TOKENIZER.sep] + ids[1:]
        mask = torch.ones(1, len(ids))
        mask[0, 1 + SLOTS - missing : 1 + SLOTS] = 0
        image = {name: torch.nn.functional.pad(value, (0, 0, 0, missing)) for name, value in image.items()}
        return {"input_ids": torch.tensor([ids]), "attention_mask": mask, **image}
    return {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([segment]), **image}
