"""A toy set of pictures with captions, as users have them, and a command that trains on it in a second."""

import csv

from vlmfast.data import load_emoji

SMALL = ["--epochs", "2", "--batch-size", "12", "--accumulate", "2", "--lr", "1e-3", "--vocab-size", "560",
         "--no-progress", "--device", "cpu"]


def write_pairs(folder, count: int = 40, step: int = 90) -> None:
    """`count` emoji as PNG files with captions.csv."""
    folder.mkdir(parents=True)
    pairs = load_emoji().select(range(0, count * step, step))
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(count):
            image, caption = pairs[i]
            image.save(folder / f"{i:02d}.png")
            writer.writerow([f"{i:02d}.png", caption])
