"""Pictures of results: captioned grids, and retrieval rows with the query at the left."""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

Color = str | tuple[int, int, int]
RIGHT, WRONG = "#1a9850", "#d73027"
_INK, _PAPER = (24, 24, 24), (255, 255, 255)
_BORDER = 4  # pixels


def contact_sheet(
    images: Sequence["Image.Image | np.ndarray"],
    titles: Sequence[str] | None = None,
    columns: int = 6,
    *,
    size: int = 128,
    borders: Sequence[Color | None] | None = None,
    heading: str | None = None,
    font_size: int = 14,
    lines: int = 3,
    margin: int = 10,
) -> Image.Image:
    """A grid of pictures, each centred in a `size` x `size` cell with its title wrapped below.

    Args:
        images: N Pillow images or uint8 arrays [H, W, 3]; small ones are enlarged without smoothing.
        titles: N texts, cut with an ellipsis after `lines` lines; None leaves them out.
        borders: N colours (or None) of frames that set pictures off.
        heading: a line above the grid.

    Returns:
        An RGB Pillow image.

    Raises:
        ValueError: lengths differ, there is no picture, or a size is not positive.
    """
    count = len(images)
    if count == 0:
        raise ValueError("contact_sheet: images is empty, must hold at least one picture")
    for field, values in (("titles", titles), ("borders", borders)):
        if values is not None and len(values) != count:
            raise ValueError(f"contact_sheet: {field} has {len(values)} entries, images has {count}")
    if min(columns, size, font_size, lines) < 1 or margin < 0:
        raise ValueError(
            f"contact_sheet: columns {columns}, size {size}, font_size {font_size} and lines {lines} must be positive, "
            f"margin {margin} not negative"
        )
    columns = min(columns, count)
    wrapped = [_wrap(title, size, font_size, lines) for title in titles] if titles is not None else [[]] * count
    line_height = round(font_size * 1.3)
    rows = [range(i, min(i + columns, count)) for i in range(0, count, columns)]
    row_heights = [size + max(len(wrapped[i]) for i in row) * line_height + margin for row in rows]
    width = margin + columns * (size + margin)
    head = _wrap(heading, width - 2 * margin, font_size + 4, 2) if heading else []
    head_height = len(head) * (line_height + 6)

    sheet = Image.new("RGB", (width, margin + head_height + sum(row_heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_lines(draw, head, margin, margin // 2, None, font_size + 4, line_height + 6)
    top = margin + head_height
    for row, height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = margin + column * (size + margin)
            _paste(sheet, images[i], left, top, size)
            if borders is not None and borders[i] is not None:
                frame = (left - _BORDER, top - _BORDER, left + size + _BORDER - 1, top + size + _BORDER - 1)
                draw.rectangle(
                    frame,
                    outline=ImageColor.getrgb(borders[i]) if isinstance(borders[i], str) else tuple(borders[i]),
                    width=_BORDER,
                )
            _draw_lines(draw, wrapped[i], left, top + size + _BORDER, size, font_size, line_height)
        top += height
    return sheet


def retrieval_sheet(
    queries: Sequence["str | Image.Image | np.ndarray"],
    results: Sequence[Sequence["str | Image.Image | np.ndarray"]],
    titles: Sequence[Sequence[str]] | None = None,
    correct: Sequence[Sequence[bool]] | None = None,
    *,
    query_titles: Sequence[str] | None = None,
    size: int = 128,
    heading: str | None = None,
    font_size: int = 14,
) -> Image.Image:
    """One row a query: the query at the left, its best results at the right, the right ones framed green.

    Args:
        queries: Q texts or pictures.
        results: Q lists of K pictures or texts, best first; shorter lists leave cells empty.
        titles: Q lists of K captions of the results.
        correct: Q lists of K flags: true frames green, false red; None leaves frames out.
        query_titles: Q captions of picture queries.

    Returns:
        An RGB Pillow image.

    Raises:
        ValueError: lengths differ or there is no query.
    """
    count = len(queries)
    fields = {"results": results, "titles": titles, "correct": correct, "query_titles": query_titles}
    for field, values in fields.items():
        if values is not None and len(values) != count:
            raise ValueError(f"retrieval_sheet: {field} has {len(values)} rows, queries has {count}")
    if count == 0:
        raise ValueError("retrieval_sheet: queries is empty, must hold at least one query")
    best = max(len(row) for row in results)
    cells: list = []
    captions: list[str] = []
    frames: list[Color | None] = []
    for q, row in enumerate(results):
        for field, values in (("titles", titles), ("correct", correct)):
            if values is not None and len(values[q]) != len(row):
                raise ValueError(f"retrieval_sheet: {field}[{q}] has {len(values[q])} entries, results has {len(row)}")
        blank = best - len(row)
        cells += [_as_cell(item, size, font_size) for item in (queries[q], *row)]
        cells += [Image.new("RGB", (1, 1), _PAPER)] * blank
        captions += [query_titles[q] if query_titles else "", *(titles[q] if titles else [""] * len(row))]
        captions += [""] * blank
        flags = [RIGHT if flag else WRONG for flag in correct[q]] if correct else [None] * len(row)
        frames += ["#4575b4", *flags, *[None] * blank]
    return contact_sheet(
        cells, captions, best + 1, size=size, borders=frames, heading=heading, font_size=font_size, margin=14
    )


def _as_cell(item, size: int, font_size: int):
    if not isinstance(item, str):
        return item
    cell = Image.new("RGB", (size, size), (240, 244, 250))
    line_height = round(font_size * 1.3)
    lines = _wrap(item, size - 8, font_size, max(1, (size - 8) // line_height))
    top = (size - len(lines) * line_height) // 2
    _draw_lines(ImageDraw.Draw(cell), lines, 4, top, size - 8, font_size, line_height)
    return cell


def _paste(sheet: Image.Image, image, left: int, top: int, size: int) -> None:
    image = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    rgba = image.convert("RGBA")
    scale = size / max(rgba.size)
    width, height = (max(1, round(side * scale)) for side in rgba.size)
    # enlarged pixel art stays crisp, photographs are reduced smoothly
    rgba = rgba.resize((width, height), Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC)
    sheet.paste(rgba.convert("RGB"), (left + (size - width) // 2, top + (size - height) // 2), rgba.getchannel("A"))


def _draw_lines(draw, lines, left: int, top: int, width: int | None, font_size: int, line_height: int) -> None:
    for number, line in enumerate(lines):
        font = _font(font_size, line.isascii())
        indent = 0 if width is None else max(0, (width - font.getlength(line)) / 2)
        draw.text((left + indent, top + number * line_height), line, fill=_INK, font=font)


@lru_cache(maxsize=16)
def _font(size: int, ascii_only: bool):
    if not ascii_only:
        # Pillow's own font is Latin only; matplotlib brings one with Greek, Cyrillic, Arabic and more
        spec = importlib.util.find_spec("matplotlib")
        for folder in (spec.submodule_search_locations if spec else None) or []:
            path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
            if path.is_file():
                return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _wrap(text: str | None, width: int, font_size: int, lines: int) -> list[str]:
    """Greedy lines of at most `width` pixels; words too long for a line are broken, what is left over becomes '…'."""
    text = " ".join((text or "").split())
    font = _font(font_size, text.isascii())
    out: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            out.append(line)
        while font.getlength(word) > width and len(word) > 1:
            n = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
            out.append(word[:n])
            word = word[n:]
        line = word
    if line:
        out.append(line)
    if len(out) > lines:
        out = out[:lines]
        while out[-1] and font.getlength(out[-1] + "...") > width:
            out[-1] = out[-1][:-1]
        out[-1] = out[-1].rstrip() + "..."
    return out
