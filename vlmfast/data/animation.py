"""Animated GIFs of pictures."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def save_gif(frames: Sequence[Image.Image], path: str | Path, *, seconds: float = 0.08, hold: float = 2.0) -> None:
    """Writes frames of one size as a GIF that runs for ever.

    Args:
        frames: RGB Pillow images.
        seconds: that a frame stays, in hundredths.
        hold: that the last one stays.

    Raises:
        ValueError: there is no frame, or sizes differ.
    """
    if not frames:
        raise ValueError("save_gif: frames is empty, must hold at least one picture")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"save_gif: frames have the sizes {sorted(sizes)}, must have one")
    # one palette, that of the finished picture: several would flicker
    last = frames[-1].convert("RGB").quantize(256, dither=Image.Dither.NONE)
    coded = [frame.convert("RGB").quantize(palette=last, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = [round(100 * seconds) * 10] * (len(frames) - 1) + [round(100 * hold) * 10]
    # Pillow merges equal neighbours, so that durations must be given per frame
    coded[0].save(path, format="GIF", save_all=True, append_images=coded[1:], duration=milliseconds, loop=0)
