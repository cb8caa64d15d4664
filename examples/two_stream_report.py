"""Tables and pictures of a two-stream run; used by train_two_stream.py."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tuxpaint_scenes import COLORS, blind_accuracy
from two_stream_data import SPLITS, Pictures, Scenes, Texts, make_batch

from vlmfast.objectives.bert_like import IGNORE
from vlmfast.viz import attention

INK = "#b2182b"


def accuracies(texts: Texts, hits: Tensor) -> dict[str, dict[str, float]]:
    """{"questions" | "statements": {type or "all": accuracy}}."""
    out: dict = {}
    for name, wanted in (("questions", texts.truths == IGNORE), ("statements", texts.truths != IGNORE)):
        types = {row["type"] for row, keep in zip(texts.rows, wanted.tolist(), strict=True) if keep}
        own = {kind: wanted & torch.tensor([row["type"] == kind for row in texts.rows]) for kind in sorted(types)}
        own["all"] = wanted
        out[name] = {kind: round(hits[keep].double().mean().item(), 4) for kind, keep in own.items() if keep.any()}
    return out


def baselines(scenes: Scenes) -> dict:
    """{split: {"questions" | "statements": {type or "all": {"count", "text", "type"}}}}: how many there are, and the
    accuracy of the most frequent training answer of the very same text and of the type."""
    out: dict = {split: {"questions": {}, "statements": {}} for split in SPLITS}
    for name, rows, text, answer in (("questions", scenes.questions, "question", "answer"),
                                     ("statements", scenes.statements, "statement", "label")):
        for kind in (*sorted({row["type"] for row in rows}), "all"):
            found = blind_accuracy([row for row in rows if kind in (row["type"], "all")], text, answer)
            for split in SPLITS:
                entry = found[split]
                out[split][name][kind] = {"count": entry["count"], "text": entry["of the text"],
                                          "type": entry["of the type"]}
    return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up on a terminal too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
                     for line in lines)


def result_table(result: dict) -> str:
    """Accuracies of all models beside the baselines, one line for each split and type."""
    models = list(result["models"])
    head = ["accuracy on", "type", "count", *models, *(f"{name}, blind" for name in models), "same text", "same type"]
    rows = []
    for split, title in SPLITS.items():
        for name in ("questions", "statements"):
            for kind, base in result["baselines"][split][name].items():
                cells = [[result["models"][model][part][split][name].get(kind) for model in models]
                         for part in ("accuracy", "blind")]
                numbers = [*cells[0], *cells[1], base["text"], base["type"]]
                rows.append([f"{title}, {name}", kind, str(base["count"]),
                             *("-" if number is None else f"{number:.3f}" for number in numbers)])
    return table(head, rows)


def draw_boxes(image: Image.Image, regions, kinds: Sequence[str]) -> Image.Image:
    """The picture with its exact boxes, kinds and colours, at twice its size."""
    picture = image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    for box, kind, color in zip(regions.boxes.tolist(), regions.classes, regions.attributes, strict=True):
        x1, y1, x2, y2 = (2 * side for side in box)
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=INK, width=2)
        name = f"{[*COLORS, ''][color]} {kinds[kind]}".strip()
        pen.text((x1 + 3, y1 - 12 if y1 >= 12 else y1 + 2), name, fill=INK)
    return picture


@torch.no_grad()
def attention_pictures(model: nn.Module, scenes: Scenes, texts: Texts, pictures: Pictures, tokenizer, folder: Path,
                       source: Path) -> list[str]:
    """Writes the attention of the last cross layer for one question of each of three types whose scene lies in `source`
    as a picture; returns the names of the files."""
    model.eval()
    names, used = [], set()
    for kind in ("color", "relation", "count"):
        for i, row in enumerate(texts.rows):
            path = source / f"{row['image_id']}.png"
            if "question" in row and row["type"] == kind and path not in used and path.is_file():
                used.add(path)
                names.append(f"attention_{kind}.png")
                _attention_picture(model, scenes, texts, pictures, tokenizer, i, path).save(folder / names[-1])
                break
    return names


def _attention_picture(model, scenes, texts, pictures, tokenizer, i: int, path: Path) -> Image.Image:
    inputs, _ = make_batch(texts, pictures, torch.tensor([i]))
    output = model(**inputs, output_attentions=True)
    regions, row = scenes.regions[int(texts.scenes[i])], texts.rows[i]
    answer = scenes.answers[int(output.logits["vqa"][0].argmax())]
    with Image.open(path) as image:
        return attention(
            output, tokenizer.tokens(texts.input_ids[i, : int(texts.lengths[i])]), image, regions.boxes,
            global_region=bool(pictures.global_rows), region_names=[scenes.kinds[kind] for kind in regions.classes],
            title=f"{row['question']} {answer}" + ("" if answer == row["answer"] else f" (right: {row['answer']})"),
        )
