"""Contact sheets and retrieval pictures."""

import numpy as np
import pytest
from PIL import Image

from vlmfast.data import contact_sheet, load_emoji, retrieval_sheet
from vlmfast.data.pictures import _font, _wrap


def ink(sheet: Image.Image, box) -> int:
    """Dark pixels inside a box."""
    return int((np.asarray(sheet.crop(box).convert("L")) < 110).sum())


def test_cells_hold_pictures_titles_and_borders():
    images = [Image.new("RGB", (10, 10), color) for color in ("red", "green", "blue", "yellow", "cyan")]
    sheet = contact_sheet(
        images, list("abcde"), 3, size=60, borders=[None, "#ff00ff", None, None, (0, 0, 0)], margin=10, font_size=16
    )
    assert sheet.mode == "RGB" and sheet.width == 10 + 3 * 70
    centres = [sheet.getpixel((10 + 70 * (i % 3) + 30, 10 + (60 + 10 + 21) * (i // 3) + 30)) for i in range(5)]
    assert centres == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    assert sheet.getpixel((80 - 2, 40)) == (255, 0, 255)
    assert sheet.getpixel((10 - 2, 40)) == (255, 255, 255)
    assert ink(sheet, (10, 72, 70, 95)) > 15


def test_titles_are_drawn_large_enough_to_read():
    sheet = contact_sheet([Image.new("RGB", (8, 8), "white")], ["Hx"], size=60, font_size=20)
    rows = np.where((np.asarray(sheet.convert("L"))[74:] < 128).any(axis=1))[0]
    assert 13 <= rows.max() - rows.min() + 1 <= 20


def test_transparent_pictures_lie_on_white():
    image = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    assert contact_sheet([image], size=40).getpixel((30, 30)) == (255, 255, 255)


def test_wide_and_tall_pictures_keep_their_aspect():
    sheet = contact_sheet([Image.new("RGB", (40, 10), "red")], size=80, margin=10)
    red = (np.asarray(sheet) == (255, 0, 0)).all(axis=2)
    assert red.any(axis=1).sum() == 20 and red.any(axis=0).sum() == 80


@pytest.mark.parametrize(
    "text", ["a very long caption " * 9, "Donaudampfschifffahrtsgesellschaft" * 3, "большой красный круг " * 5]
)
def test_wrapped_lines_fit_and_are_cut_with_dots(text):
    lines = _wrap(text, 100, 14, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(_font(14, line.isascii()).getlength(line) <= 100 for line in lines)


def test_short_titles_stay_whole():
    assert _wrap("two words", 200, 14, 3) == ["two words"]
    assert _wrap("", 200, 14, 3) == [] == _wrap(None, 200, 14, 3)


def test_retrieval_rows_frame_right_and_wrong_results():
    pairs = load_emoji()
    images = [pairs[i][0] for i in range(6)]
    sheet = retrieval_sheet(
        ["a query in words", images[0]],
        [images[1:6], images[2:5]],
        [pairs.captions[1:6], pairs.captions[2:5]],
        [[False, True, False, False, False], [True, False, False]],
        size=64,
        heading="best five",
    )
    pixels = np.asarray(sheet).reshape(-1, 3)
    green, red = (pixels == (26, 152, 80)).all(axis=1).sum(), (pixels == (215, 48, 39)).all(axis=1).sum()
    frame = 72 * 72 - 64 * 64
    assert (green, red) == (2 * frame, 6 * frame)
    assert sheet.width == 14 + 6 * (64 + 14)


def test_rejects_mismatched_lengths():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="titles has 2 entries, images has 1"):
        contact_sheet([image], ["a", "b"])
    with pytest.raises(ValueError, match="images is empty"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns 0"):
        contact_sheet([image], columns=0)
    with pytest.raises(ValueError, match="results has 0 rows, queries has 1"):
        retrieval_sheet(["a"], [])
    with pytest.raises(ValueError, match=r"correct\[0\] has 2 entries"):
        retrieval_sheet(["a"], [[image]], correct=[[True, False]])
