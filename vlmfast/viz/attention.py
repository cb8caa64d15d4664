"""Attention between words and image regions as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[TASK]", "<s>", "</s>", "<pad>")
_PAIRS = (("text_to_image", "image_to_text"), ("probs_a", "probs_b"))
_WORD_COLOR, _REGION_COLOR = "#b2182b", "#2166ac"
_INK, _QUIET = "#1a1a1a", "#6b6b6b"
_PANEL, _ROW = 3.05, 0.27  # inches: the width of one picture, the height of one word
_DPI = 110


class AttentionMaps(NamedTuple):
    """Weights of one picture and text: text_to_image [T, R], rows sum to 1 over the regions; image_to_text [R, T]."""

    text_to_image: np.ndarray
    image_to_text: np.ndarray | None


def attention_maps(probs, *, layer: int = -1, sample: int = 0, head: int | None = None) -> AttentionMaps:
    """The maps of one layer, sample and head from what models and ops give out.

    Args:
        probs: the output of a model (`text_to_image` and `image_to_text`, a tensor a layer) or of co_attention with
            text as stream a (`probs_a`, `probs_b`); a pair (text→image, image→text); a list of layers of pairs; or
            text→image alone. Tensors or arrays are [T, R], [H, T, R] or [B, H, T, R], the other way with T and R
            exchanged.
        layer: of a list of layers. sample: of a batch. head: None averages over the heads.

    Raises:
        TypeError, ValueError: not one of those, or an index out of range.
    """
    forward, backward = probs, None
    names = next((names for names in _PAIRS if hasattr(probs, names[0])), None)
    if names is not None:
        forward, backward = (getattr(probs, name, None) for name in names)
        if forward is None:
            raise ValueError(f"attention: probs.{names[0]} is None; ask the model or op for its attention")
    elif isinstance(probs, tuple) and len(probs) == 2:
        forward, backward = probs
    elif isinstance(probs, (list, tuple)):
        entry = _pick(probs, layer, "layer")
        forward, backward = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
    if isinstance(forward, (list, tuple)):
        forward = _pick(forward, layer, "layer")
    if isinstance(backward, (list, tuple)):
        backward = _pick(backward, layer, "layer")
    return AttentionMaps(
        _matrix(forward, sample, head, "text to image"),
        None if backward is None else _matrix(backward, sample, head, "image to text"),
    )


def attention(
    probs,
    tokens: Sequence[str],
    image: Image.Image | np.ndarray,
    boxes,
    *,
    words: Sequence[int | str] | None = None,
    max_words: int = 4,
    max_regions: int = 12,
    global_region: bool = False,
    layer: int = -1,
    sample: int = 0,
    head: int | None = None,
    region_names: Sequence[str] | None = None,
    title: str | None = None,
    special: Sequence[str] = SPECIAL,
) -> Image.Image:
    """Word→region and region→word attention over the picture.

    The upper row shows the picture once for each of a few words: regions keep their colour as far as the word attends
    to them, the strongest are framed and carry their share in per cent. Below, the matrix of words and regions with a
    thumbnail of each region: one for each direction that `probs` holds.

    Args:
        probs: see :func:`attention_maps`. Rows and columns beyond the tokens and boxes are padding and left out.
        tokens: T pieces of text; "##" pieces are joined to the word before them for display.
        image: the picture, Pillow or uint8 [H, W, 3].
        boxes: [R, 4] x1, y1, x2, y2 in pixels of `image`.
        words: words of the upper row, by position in `tokens` or by text; None takes the ones with the most pointed
            attention.
        max_words: pictures in the upper row. max_regions: columns of the matrix, the most attended first.
        global_region: the first region of `probs` is the whole picture (ViLBERT) and has no entry in `boxes`.
        layer, sample, head: see :func:`attention_maps`.
        region_names: R names under the thumbnails, for example detector classes.
        title: above the picture, for example question and answer.
        special: tokens left out of the words (they stay in the weights).

    Returns:
        An RGB Pillow image; `.save("attention.png")` writes it.

    Raises:
        TypeError, ValueError: shapes, lengths or indices do not fit.
    """
    scene = _scene(probs, tokens, image, boxes, global_region, layer, sample, head, region_names, special)
    if max_words < 1 or max_regions < 1:
        raise ValueError(f"attention: max_words is {max_words} and max_regions {max_regions}, must be positive")
    chosen = _choose_words(scene, words, max_words)
    columns = _choose_regions(scene, max_regions)
    return _draw(scene, chosen, columns, title)


@dataclass(frozen=True)
class _Scene:
    image: Image.Image
    boxes: np.ndarray  # [R, 4]
    words: list[str]
    forward: np.ndarray  # [words, R]
    backward: np.ndarray | None  # [R, words]
    positions: list[list[int]]  # tokens of each word
    names: list[str]


def _scene(probs, tokens, image, boxes, global_region, layer, sample, head, region_names, special) -> _Scene:
    maps = attention_maps(probs, layer=layer, sample=sample, head=head)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = image.convert("RGB")
    boxes = np.asarray(boxes.detach().cpu() if isinstance(boxes, torch.Tensor) else boxes, dtype=np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) == 0 or not np.isfinite(boxes).all():
        raise ValueError(f"attention: boxes are {list(boxes.shape)}, must be finite [R, 4] with at least one region")
    if boxes.max() <= 1.5 < max(image.size):
        size = f"{image.width} x {image.height}"
        raise ValueError(f"attention: boxes reach {boxes.max():.3g}, must be in pixels of the {size} image")
    names = list(region_names) if region_names is not None else [""] * len(boxes)
    if len(names) != len(boxes):
        raise ValueError(f"attention: region_names has {len(names)} entries, boxes has {len(boxes)}")
    if global_region:
        boxes = np.concatenate([[[0, 0, image.width, image.height]], boxes])
        names = ["whole picture", *names]
    rows, regions = len(tokens), len(boxes)
    needs = (("text to image", maps[0], (rows, regions)), ("image to text", maps[1], (regions, rows)))
    for name, weights, need in needs:
        if weights is not None and (weights.shape[0] < need[0] or weights.shape[1] < need[1]):
            raise ValueError(
                f"attention: {name} is {list(weights.shape)}, must be at least {list(need)} for {rows} tokens and "
                f"{regions} regions" + ("" if global_region else " (global_region is False)")
            )
    forward = maps.text_to_image[:rows, :regions]
    backward = None if maps.image_to_text is None else maps.image_to_text[:regions, :rows]
    words, positions = _join_pieces(tokens, special)
    if not words:
        raise ValueError(f"attention: tokens are {list(tokens)[:8]}, must hold a word that is not special")
    return _Scene(
        image,
        boxes,
        words,
        np.stack([forward[where].mean(axis=0) for where in positions]),
        # a word of several pieces is read with all of them
        None if backward is None else np.stack([backward[:, where].sum(axis=1) for where in positions], axis=1),
        positions,
        names,
    )


def _pick(values, index: int, what: str):
    if not -len(values) <= index < len(values):
        raise ValueError(f"attention: {what} is {index}, there are {len(values)}")
    return values[index]


def _matrix(weights, sample: int, head: int | None, name: str) -> np.ndarray:
    if isinstance(weights, torch.Tensor):
        weights = weights.detach().float().cpu().numpy()
    if not isinstance(weights, np.ndarray):
        raise TypeError(f"attention: {name} is {type(weights).__name__}, must be a tensor or array")
    if weights.ndim == 4:
        weights = _pick(weights, sample, "sample")
    if weights.ndim == 3:
        weights = weights.mean(axis=0) if head is None else _pick(weights, head, "head")
    if weights.ndim != 2:
        raise ValueError(f"attention: {name} has {weights.ndim} dimensions, must have 2, 3 or 4 ([B, H, T, R])")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"attention: {name} holds negative or non-finite weights; pass probabilities, not scores")
    return weights.astype(np.float64)


def _join_pieces(tokens: Sequence[str], special: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    words, positions = [], []
    for position, token in enumerate(tokens):
        if token in special:
            continue
        if token.startswith("##") and positions and positions[-1][-1] == position - 1:
            words[-1] += token[2:]
            positions[-1].append(position)
        else:
            words.append(token.removesuffix("</w>").strip("Ġ▁") or token)
            positions.append([position])
    return words, positions


def _choose_words(scene: _Scene, wanted: Sequence[int | str] | None, limit: int) -> list[int]:
    if wanted is None:
        pointed = np.argsort(-scene.forward.max(axis=1), kind="stable")
        chosen: list[int] = []
        for i in pointed.tolist():
            known = [scene.words[j] for j in chosen]
            if scene.words[i] not in known and any(c.isalnum() for c in scene.words[i]):
                chosen.append(i)
        return sorted((chosen or pointed.tolist())[:limit])
    chosen = []
    for word in wanted:
        if isinstance(word, str):
            found = [i for i, text in enumerate(scene.words) if text.lower() == word.lower()]
        else:
            found = [i for i, where in enumerate(scene.positions) if word in where]
        if not found:
            raise ValueError(f"attention: words has {word!r}, must be a position or one of {scene.words}")
        chosen.append(found[0])
    return chosen[:limit]


def _choose_regions(scene: _Scene, limit: int) -> list[int]:
    score = scene.forward.max(axis=0)
    if scene.backward is not None:
        peak = scene.backward.max(axis=1)
        score = score / max(score.max(), 1e-12) + peak / max(peak.max(), 1e-12)
    best = np.argsort(-score, kind="stable")[:limit]
    centres = (scene.boxes[:, 0] + scene.boxes[:, 2]) / 2
    return sorted((int(i) for i in best), key=lambda i: (centres[i], i))  # from left to right, as in the picture


def spotlight(image: Image.Image, boxes: np.ndarray, weights: np.ndarray) -> Image.Image:
    """The picture in colour where the weights are high, pale and grey elsewhere.

    Args:
        boxes: [R, 4] pixels. weights: [R], relative to the largest; the strongest box wins where several overlap.
    """
    strength = np.zeros((image.height, image.width), dtype=np.float32)
    peak = max(float(weights.max()), 1e-12)
    for i in np.argsort(weights):
        x1, y1, x2, y2 = _pixels(boxes[i], image)
        area = strength[y1:y2, x1:x2]
        np.maximum(area, float(weights[i]) / peak, out=area)
    mask = Image.fromarray((strength * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(max(image.size) / 160))
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.72)
    return Image.composite(image, pale, mask)


def _pixels(box: np.ndarray, image: Image.Image) -> tuple[int, int, int, int]:
    x1, y1 = int(np.clip(np.floor(box[0]), 0, image.width - 1)), int(np.clip(np.floor(box[1]), 0, image.height - 1))
    x2, y2 = int(np.clip(np.ceil(box[2]), x1 + 1, image.width)), int(np.clip(np.ceil(box[3]), y1 + 1, image.height))
    return x1, y1, x2, y2


def _draw(scene: _Scene, chosen: list[int], columns: list[int], title: str | None) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(chosen)
    width = max(panels * _PANEL, 7.2, 1.9 + 0.62 * len(columns) + 0.4)
    picture_height = min(_PANEL * scene.image.height / scene.image.width, 1.6 * _PANEL)
    maps = [("each word over the regions, per cent", scene.forward[:, columns], _WORD_COLOR)]
    if scene.backward is not None:
        maps.append(("each region over the words, per cent", scene.backward[columns].T, _REGION_COLOR))
    thumbs = 0.62 + (0.22 if any(scene.names) else 0)
    labels = 0.35 + 0.085 * max(4, *(len(word) for word in scene.words))
    abreast = len(maps) * (labels + 0.55 * len(columns) + 0.35) <= width
    block = thumbs + _ROW * len(scene.words) + 0.62
    heights = [0.5 if title else 0.12, picture_height + 0.42, *[block] * (1 if abreast else len(maps))]
    figure = Figure(figsize=(width, sum(heights)), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top = sum(heights)

    def place(left: float, down: float, wide: float, tall: float):
        return figure.add_axes((left / width, (top - down - tall) / top, wide / width, tall / top))

    if title:
        figure.text(0.25 / width, 1 - 0.3 / top, title, fontsize=13, color=_INK, va="center", weight="bold")
    margin = (width - panels * _PANEL) / 2
    for k, word in enumerate(chosen):
        axes = place(margin + k * _PANEL + 0.08, heights[0] + 0.32, _PANEL - 0.16, picture_height)
        _draw_word(axes, scene, word)
    down = heights[0] + heights[1]
    wide = width / len(maps) if abreast else width
    for k, (heading, weights, color) in enumerate(maps):
        corner = (k * wide, down) if abreast else (0.0, down + k * block)
        _draw_matrix(place, scene, columns, heading, weights, color, corner, wide, labels, thumbs, chosen)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw_word(axes, scene: _Scene, word: int) -> None:
    from matplotlib.patches import Rectangle

    weights = scene.forward[word]
    axes.imshow(spotlight(scene.image, scene.boxes, weights), interpolation="antialiased")
    total = max(float(weights.sum()), 1e-12)
    inch = scene.image.width / (_PANEL - 0.16)  # in pixels of the picture
    label_wide, label_tall = 0.40 * inch, 0.19 * inch
    taken: list[tuple[float, float]] = []
    strongest = [i for i in np.argsort(-weights, kind="stable")[:3] if weights[i] >= 0.25 * weights.max()]
    for rank, i in enumerate(strongest):
        x1, y1, x2, y2 = scene.boxes[i]
        line = 1.2 if rank else 2.4
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_WORD_COLOR, linewidth=line))
        # over the box, or under it at the upper edge; further down where another label is
        x = float(np.clip(x1, 0, scene.image.width - label_wide))
        y = y1 - label_tall if y1 >= label_tall else min(y2, scene.image.height - label_tall)
        while any(abs(x - a) < label_wide and abs(y - b) < label_tall for a, b in taken):
            y += label_tall * 1.1
        y = min(y, scene.image.height - label_tall)
        taken.append((x, y))
        axes.add_patch(Rectangle((x, y), label_wide, label_tall, facecolor=_WORD_COLOR, edgecolor="none"))
        place = {"ha": "center", "va": "center_baseline", "fontsize": 8.5, "color": "white", "clip_on": True}
        axes.text(x + label_wide / 2, y + label_tall / 2, f"{weights[i] / total:.0%}", **place)
    axes.set_title(scene.words[word], fontsize=12, color=_INK, pad=5)
    axes.set_xlim(0, scene.image.width)
    axes.set_ylim(scene.image.height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#cccccc")


def _draw_matrix(place, scene, columns, heading, weights, color, corner, wide, labels, thumbs, chosen) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    down = corner[1] + 0.08
    cell = min((wide - labels - 0.35) / len(columns), 0.95)
    left = corner[0] + labels + (wide - labels - 0.25 - cell * len(columns)) / 2
    shown = "" if len(columns) == len(scene.boxes) else f" ({len(columns)} of {len(scene.boxes)} regions)"
    axes = place(left, down, cell * len(columns), 0.3)
    axes.axis("off")
    axes.text(0, 0.5, heading + shown, fontsize=10, color=_QUIET, va="center")
    for k, i in enumerate(columns):
        side = min(cell, 0.62) * 0.92
        axes = place(left + k * cell + (cell - side) / 2, down + 0.32, side, side)
        axes.imshow(_thumbnail(scene.image, scene.boxes[i]), interpolation="antialiased")
        axes.axis("off")
        if scene.names[i]:
            size = 7.5 if len(scene.names[i]) <= 10 else 6.5
            axes.text(0.5, -0.16, scene.names[i][:14], transform=axes.transAxes, ha="center", va="top", fontsize=size)
    rows = len(scene.words)
    axes = place(left, down + 0.32 + thumbs, cell * len(columns), _ROW * rows)
    peak = max(float(weights.max()), 1e-12)
    scale = LinearSegmentedColormap.from_list("weights", ["white", color])
    axes.imshow(weights, aspect="auto", cmap=scale, vmin=0, vmax=peak, interpolation="nearest")
    axes.set_yticks(range(rows), scene.words, fontsize=9.5, color=_INK)
    for tick, label in enumerate(axes.get_yticklabels()):
        if tick in chosen:
            label.set_weight("bold")
    axes.set_xticks([])
    axes.tick_params(length=0)
    for edge in range(rows + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=1)
    for edge in range(len(columns) + 1):
        axes.axvline(edge - 0.5, color="white", linewidth=1)
    for r in range(rows):
        for c in range(len(columns)):
            if weights[r, c] >= 0.2 * peak and cell > 0.3:
                ink = "white" if weights[r, c] > 0.55 * peak else _INK
                axes.text(c, r, f"{100 * weights[r, c]:.0f}", ha="center", va="center", fontsize=8, color=ink)
    for side in axes.spines.values():
        side.set_color("#cccccc")


def _thumbnail(image: Image.Image, box: np.ndarray) -> Image.Image:
    part = image.crop(_pixels(box, image))
    side = max(part.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square.resize((96, 96), Image.Resampling.BICUBIC)
