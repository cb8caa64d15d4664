"""Text-to-picture search and back on Open Clip Art: a small CLIP, then UNITER over its grid ranks the shortlist anew.

    python examples/train_retrieval.py --data openclipart.zip --out retrieval/

Pictures and texts are real, split as `openclipart_pairs.py` does; the embedded emoji are learned from beside them. Both
models start untrained. The cross-encoder reads the CLIP tower's maps of the second and third stage, and its feature of
the whole picture; half of its mismatches are what the CLIP itself takes for the picture or the text, half are any
others. They are drawn from pictures that the CLIP has learned, where its mistakes are not those of held-out pictures:
by itself the cross-encoder ranks worse than the CLIP. What is measured is the sum of both scores, with the weight that
is best on the validation split.

Written to the output folder: pairs/, dual/ and cross/ (as `vlmfast.load` reads them), result.json, result.md,
sheet.png.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from openclipart_pairs import build
from PIL import Image
from small_clip import SIZE, train_clip
from text_training import square_pixels
from torch import Tensor
from tqdm import tqdm

from vlmfast.checkpoints import save_pretrained
from vlmfast.data import WordPieceTokenizer, load_emoji, load_image, retrieval_sheet
from vlmfast.models import create
from vlmfast.models.clip import CLIP
from vlmfast.tasks import (
    CrossEncoderRetriever,
    Reranker,
    Retriever,
    paired_bootstrap,
    recall_of_scores,
    rerank_scores,
    same_caption_ids,
    task_loss,
)
from vlmfast.tasks.fine_tuning import TaskBatch

CELLS, KS = 4, (1, 5, 10)


def read_split(folder: Path) -> tuple[list[Path], list[str]]:
    with open(folder / "captions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [folder / row["image"] for row in rows], [row["caption"] for row in rows]


def train_dual(paths: list[Path], captions: list[str], epochs: int, seed: int, progress: bool) -> CLIP:
    """CLIP on clip art and emoji."""
    emoji = load_emoji()
    pixels = np.concatenate([np.stack([square_pixels(path, SIZE) for path in paths]), np.array(emoji.images)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return train_clip(images, [*captions, *emoji.captions], epochs, seed, progress)


@torch.no_grad()
def grid_regions(model: CLIP, paths: list[Path]) -> list[dict]:
    """For each picture 4 x 4 cells: both stages' maps and the feature of the whole, [16, F]."""
    maps = {}
    hooks = [getattr(model.visual, name).register_forward_hook(lambda _, __, out, name=name: maps.update({name: out}))
             for name in ("layer2", "layer3")]
    edge = torch.arange(CELLS) / CELLS
    y, x = torch.meshgrid(edge, edge, indexing="ij")
    boxes = torch.stack([x, y, x + 1 / CELLS, y + 1 / CELLS], -1).flatten(0, 1)
    found = []
    for start in range(0, len(paths), 128):
        batch = torch.stack([model.preprocess(load_image(path)) for path in paths[start : start + 128]])
        whole = model.encode_image(batch, normalize=True)[:, :, None, None].expand(-1, -1, CELLS, CELLS) * 8
        parts = [torch.nn.functional.interpolate(maps[name], size=(CELLS, CELLS)) for name in ("layer2", "layer3")]
        features = torch.cat([*parts, whole], 1).flatten(2).transpose(1, 2)
        found += [{"features": one.contiguous(), "boxes": boxes} for one in features]
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def dual_scores(model: CLIP, paths: list[Path], captions: list[str]) -> Tensor:
    """[texts, pictures]"""
    pixels = torch.stack([model.preprocess(load_image(path)) for path in paths])
    image = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(256)])
    text = torch.cat([model.encode_text(part, normalize=True) for part in model.tokenizer(captions).split(256)])
    return text @ image.T


def train_cross(regions: list[dict], captions: list[str], scores: Tensor, steps: int, seed: int, progress: bool,
                batch_size: int = 32, hardest: int = 24) -> CrossEncoderRetriever:
    """UNITER told a pair from two wrong texts and two wrong pictures, one of each ranked high by the dual encoder."""
    tokenizer = WordPieceTokenizer.train(captions, 2000, max_length=32)
    torch.manual_seed(seed)
    model = create("uniter-base", vocab_size=tokenizer.vocab_size, img_dim=regions[0]["features"].shape[1],
                   hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                   max_position_embeddings=64, heads=("rank",))
    model.tokenizer = tokenizer
    task = CrossEncoderRetriever(model, max_tokens=32)
    ids = same_caption_ids(captions)
    wrong = scores.masked_fill(ids[:, None] == ids, -2)
    most = min(hardest, len(captions) - 1)
    pictures, texts = wrong.topk(most, 1).indices, wrong.topk(most, 0).indices.T
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    model.train()
    for _ in tqdm(range(steps), desc="matching", unit="step", disable=not progress):
        rows = []
        for i in torch.randint(len(captions), (batch_size,)).tolist():
            a, b = torch.randint(most, (2,)).tolist()
            c, d = (int(torch.multinomial((ids != ids[i]).double(), 1)) for _ in range(2))
            rows += [(i, i), (int(texts[i, a]), i), (i, int(pictures[i, b])), (c, i), (i, d)]
        inputs = task.inputs([captions[t] for t, _ in rows], [task.picture(regions[p]) for _, p in rows])
        loss = task_loss(task, model, TaskBatch(inputs, torch.zeros(batch_size, dtype=torch.int64)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return task


@torch.no_grad()
def pair_scores(task: CrossEncoderRetriever, texts: list[str], regions: list[dict]) -> Tensor:
    """[B] of B texts with B pictures."""
    output = task.model(**task.inputs(texts, [task.picture(one) for one in regions]), heads=(task.head,))
    return task.fit(output.logits[task.head])


WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the dual encoder's cosine beside the cross-encoder's score


class Split:
    """Held-out pairs with both encoders' scores."""

    def __init__(self, model: CLIP, task: CrossEncoderRetriever, paths: list[Path], captions: list[str],
                 shortlist: int):
        self.ids, self.shortlist, self.count = same_caption_ids(captions), shortlist, len(captions)
        self.scores, self.regions = dual_scores(model, paths, captions), grid_regions(model, paths)
        self.cross = torch.full_like(self.scores, torch.nan)
        wanted = torch.zeros_like(self.scores, dtype=torch.bool)
        for dim in (0, 1):
            wanted.scatter_(dim, self.scores.topk(min(shortlist, self.count), dim).indices, True)
        rows, columns = wanted.nonzero(as_tuple=True)
        for part in torch.arange(len(rows)).split(256):
            own, other = rows[part], columns[part]
            self.cross[own, other] = pair_scores(task, [captions[i] for i in own], [self.regions[i] for i in other])

    def recall(self, weight: float | None = None):
        """Of both ways; None: of the dual encoder alone."""
        by_text = by_image = self.scores
        if weight is not None:
            by_text = rerank_scores(self.scores, lambda row, columns: self.cross[row, columns], self.shortlist, weight)
            by_image = rerank_scores(self.scores.T, lambda row, columns: self.cross[columns, row], self.shortlist,
                                     weight).T
        return [recall_of_scores(one, KS, text_ids=self.ids, image_ids=self.ids) for one in (by_text, by_image)]


def best_weight(split: Split) -> float:
    """The weight with the greatest sum of recalls both ways."""
    def total(weight: float) -> float:
        by_text, by_image = split.recall(weight)
        return sum((ranks < k).double().mean().item()
                   for ranks in (by_text.text_ranks, by_image.image_ranks) for k in KS)

    return max(WEIGHTS, key=total)


def compare(split: Split, weight: float) -> dict:
    """Recalls of chance, the dual encoder and re-ranking, both ways, with standard errors."""
    count = split.count
    (plain, _), (by_text, by_image) = split.recall(), split.recall(weight)
    found = {}
    for way, before, after, chance in (
        ("text to picture", plain.text_ranks, by_text.text_ranks, plain.chance_text_to_image),
        ("picture to text", plain.image_ranks, by_image.image_ranks, plain.chance_image_to_text),
    ):
        for k in KS:
            one, two = (before < k).double().numpy(), (after < k).double().numpy()
            gain = paired_bootstrap(lambda d, v=two: float(v[d].mean()), lambda d, v=one: float(v[d].mean()), count)
            above = paired_bootstrap(lambda d, v=one: float(v[d].mean()), lambda d, c=chance[k]: c, count)
            found[f"{way} R@{k}"] = {
                "chance": chance[k], "dual": float(one.mean()), "reranked": float(two.mean()),
                "dual_standard_error": float(one.std(ddof=1) / count**0.5),
                "reranked_standard_error": float(two.std(ddof=1) / count**0.5),
                "dual_minus_chance_in_standard_errors": above.errors_above,
                "reranked_minus_dual": gain.value, "difference_standard_error": gain.standard_error,
            }  # fmt: skip
    return found


def table(result: dict) -> str:
    """Markdown."""
    lines = [f"{result['held_out']} held-out pictures, shortlist {result['shortlist']}, the CLIP's cosine counted "
             f"{result['dual_weight']:g} times beside the cross-encoder's score; {result['cpu_seconds']:.0f} s "
             "of CPU.", "", "| | chance | dual encoder | re-ranked | re-ranked minus dual |", "|---|---|---|---|---|"]
    for name, own in result["scores"].items():
        lines.append(f"| {name} | {own['chance']:.3f} | {own['dual']:.3f} ± {own['dual_standard_error']:.3f} | "
                     f"{own['reranked']:.3f} ± {own['reranked_standard_error']:.3f} | "
                     f"{own['reranked_minus_dual']:+.3f} ± {own['difference_standard_error']:.3f} |")
    return "\n".join([*lines, ""])


def run(data: Path, out: Path, *, epochs: int = 16, steps: int = 700, shortlist: int = 20, seed: int = 0,
        progress: bool = True) -> dict:
    """Trains and measures both; returns what `result.json` holds."""
    started = time.process_time()
    build(data, out / "pairs", seed=seed)
    (paths, captions), (held, texts) = (read_split(out / "pairs" / split) for split in ("train", "test"))
    model = train_dual(paths, captions, epochs, seed, progress)
    save_pretrained(model, out / "dual")
    task = train_cross(grid_regions(model, paths), captions, dual_scores(model, paths, captions), steps, seed, progress)
    save_pretrained(task.model, out / "cross")
    weight = best_weight(Split(model, task, *read_split(out / "pairs" / "val"), shortlist))
    split = Split(model, task, held, texts, shortlist)
    result = {"held_out": len(held), "shortlist": shortlist, "epochs": epochs, "steps": steps, "seed": seed,
              "dual_weight": weight, "scores": compare(split, weight)}
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "result.md").write_text(table(result), encoding="utf-8")
    reranker = Reranker(Retriever(model).add(held), task, dict(zip(map(str, held), split.regions, strict=True)),
                        shortlist=shortlist, dual_weight=weight)
    sheet(reranker, held, texts, seed).save(out / "sheet.png")
    return result


def sheet(reranker: Reranker, paths: list[Path], captions: list[str], seed: int) -> Image.Image:
    """Eight texts and their five best pictures after re-ranking."""
    queries = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))[:8]]
    own = dict(zip(paths, captions, strict=True))
    found = [reranker.search(query, 5) for query in queries]
    return retrieval_sheet(queries, [[load_image(one.path) for one in row] for row in found],
                           [[own[one.path] for one in row] for row in found],
                           [[own[one.path] == query for one in row] for query, row in zip(queries, found, strict=True)],
                           heading=f"five best of {len(paths)} held-out pictures, re-ranked")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the zip of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=16, help="of the dual encoder")
    parser.add_argument("--steps", type=int, default=700, help="of the cross-encoder")
    parser.add_argument("--shortlist", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true")
    options = vars(parser.parse_args(arguments))
    progress = not options.pop("no_progress")
    print(table(run(**options, progress=progress)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
