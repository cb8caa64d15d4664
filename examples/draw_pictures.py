"""Draws pictures from captions: a DALL-E with its discrete VAE, or a GLIDE, on the embedded emoji and the stamps of Tux
Paint.

    python examples/draw_pictures.py --data tuxpaint.zip --out drawings/
    python examples/draw_pictures.py --data tuxpaint.zip --model glide --out drawings-glide/

The run of `vlmfast demo generate`, or of `vlmfast demo diffusion`, with more pictures. `--data` is a zip with
`meta.json` (a list of {"i": N, "en": ...}) and `img/N.webp`, the stamps of Tux Paint (GPL-2; they are not part of this
package, and what is made of them falls under their licence). Pictures that share a sentence, or that look the same,
stay on one side; a tenth is held out.

Written to the output folder: report.md, drawn.png, curves and model/; reconstruction.png, or samples/ and
denoising.gif.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from picture_packs import group_entries, plain_text, read_pack, split_groups
from PIL import Image

from vlmfast.cli import demo_diffusion, demo_pictures, set_threads
from vlmfast.cli.demo_pictures import SIDE, Pictures
from vlmfast.cli.info import collect

SPLITS = {"train": 0.9, "held out": 0.1}


def stamps(path: str | Path, seed: int = 0) -> tuple[Pictures, Pictures]:
    """The stamps to learn from and those held out, on white squares of 32 x 32 pixels."""
    entries, _ = read_pack(path)
    captions = [" ".join(entry.record["en"].split()) for entry in entries]
    groups = group_entries(entries, [[plain_text(caption)] for caption in captions])
    splits = split_groups(groups, SPLITS, seed)
    images = np.stack([_square(entry.image) for entry in entries])
    parts = []
    for split in SPLITS:
        chosen = [i for i, own in enumerate(splits) if own == split]
        name = "tuxpaint" if split == "train" else f"tuxpaint, {split}"
        parts.append(Pictures.of(name, images[chosen], [captions[i] for i in chosen]))
    return parts[0], parts[1]


def _square(image: Image.Image) -> np.ndarray:
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="zip of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", choices=("dalle", "glide"), default="dalle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop training after about so many seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    set_threads(args.threads)
    torch.set_flush_denormal(True)  # unused words' second moments fade into slow subnormal numbers
    command = (f"python examples/draw_pictures.py --data {args.data.name} --model {args.model} --threads "
               f"{args.threads}" + (f" --seconds {args.seconds:g}" if args.seconds is not None else ""))
    try:
        demo = demo_pictures if args.model == "dalle" else demo_diffusion
        run = demo_pictures.Drawing if args.model == "dalle" else demo_diffusion.Diffusion
        return demo.write(run.prepare(args.seed, stamps(args.data, args.seed)), args.out, command, collect(),
                          args.seconds, not args.no_progress)
    finally:
        torch.set_flush_denormal(False)


if __name__ == "__main__":
    raise SystemExit(main())
