"""Scenes of cut-outs with exact boxes, questions with answers, and true or false statements.

    python examples/tuxpaint_scenes.py --data tuxpaint.zip --out scenes/

`--data` is a zip with `meta.json` (a list of {"i": N, "en": caption}) and `img/N.webp`, the stamps of Tux Paint (GPL-2;
they are not part of this package, and what is made of them falls under their licence).

What is real and what is not: kinds of objects come from the captions; colours from the captions or else from the
pixels (a name for more than half of them by fixed thresholds, so borderline shades are named by rule, not by people);
places and counts from how the scene was put together. The pictures are cut-outs pasted on a plain ground, and the
language is a handful of templates. Region features are no detector's: an 8 x 8 colour patch and a small convolution
with fixed random weights, nothing learned.

Three splits, so that one can see what a model has learned: `train`; `test_scene`, new scenes of cut-outs that training
shows too; `test_cutout`, scenes made only of cut-outs that training never shows.

Written to the output folder:
    features.tsv      LXMERT's columns; classes are kinds, attributes are colours
    questions.jsonl   question_id, image_id, question, answer, type, split
    statements.jsonl  statement_id, image_ids (one or two), statement, label, type, split
    vocabulary.json   kinds, colours and all answers
    report.json       counts, and how far one gets without looking: see :func:`blind_accuracy`
    pictures/         the first scenes of each split, and scenes.png with their questions
"""

import argparse
import json
import re
import sys
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmfast.data import Regions, contact_sheet, load_image, write_regions

# kind -> captions that name it; each has three cut-outs at least, so that one can be kept back
KINDS = {
    "airplane": r"airplane$", "apple": r"apple$", "ball": r"(ball|basketball|volleyball)$", "bear": r"bear$",
    "bus": r"bus$", "butterfly": r"butterfly$", "camera": r"camera$", "candle": r"candle$", "car": r"car$",
    "eye": r"eye$", "flag": r"flag$", "flower": r"flower$", "guitar": r"guitar$", "hat": r"hat$",
    "lion": r"(a|happy) lion$", "penguin": r"penguin$", "pepper": r"pepper$", "pig": r"pig$", "rabbit": r"rabbit$",
    "rocket": r"rocket$", "shirt": r"shirt$", "snowman": r"snowman$", "strawberry": r"strawberry$",
    "tree": r"tree$", "truck": r"truck$",
}  # fmt: skip
PLURALS = {"butterfly": "butterflies", "bus": "buses", "snowman": "snowmen", "strawberry": "strawberries"}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
NUMBERS = ("zero", "one", "two", "three")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
WIDTH, HEIGHT, GAP = 224, 160, 6
SPLITS = ("train", "test_scene", "test_cutout")
PATCH, CROP = 8, 32


@dataclass(frozen=True)
class Cutout:
    number: int
    kind: str
    color: str | None
    image: Image.Image  # RGBA, cut to its visible part


@dataclass(frozen=True)
class Scene:
    """Boxes are x1, y1, x2, y2 in pixels around the visible pixels of each object."""

    image_id: str
    image: Image.Image
    objects: tuple[tuple[Cutout, tuple[int, int, int, int]], ...]

    def count(self, kind: str) -> int:
        return sum(cutout.kind == kind for cutout, _ in self.objects)


def load_cutouts(data: str | Path) -> list[Cutout]:
    """The cut-outs of the known kinds, in the order of their numbers."""
    with zipfile.ZipFile(data) as archive:
        entries = json.loads(archive.read("meta.json"))
        captions = {entry["i"]: entry["en"].strip().rstrip(".!").lower() for entry in entries}
        cutouts = []
        for number, caption in sorted(captions.items()):
            kind = next((kind for kind, pattern in KINDS.items() if re.search(rf"\b{pattern}", caption)), None)
            if kind is None or len(caption) > 40 or " with " in caption:
                continue
            told = [color for color in COLORS if color in caption.split()]
            image = load_image(archive.read(f"img/{number}.webp"), name=f"img/{number}.webp").convert("RGBA")
            box = _visible(image)
            if box is not None:
                image = image.crop(box)
                color = dominant_color(image) if not told else told[0] if len(told) == 1 else None
                cutouts.append(Cutout(number, kind, color, image))
    if not cutouts:
        raise ValueError(f"load_cutouts: {data} has no caption of a known kind, for example 'A red car.'")
    return cutouts


def split_cutouts(cutouts: list[Cutout], rng: np.random.Generator) -> dict[str, list[Cutout]]:
    """A fifth of each kind, at least one of three, is kept for `test_cutout`; `test_scene` shares train's."""
    seen, kept = [], []
    for kind in KINDS:
        own = [cutout for cutout in cutouts if cutout.kind == kind]
        order = rng.permutation(len(own))
        keep = max(1, round(len(own) / 5)) if len(own) >= 3 else 0
        kept += [own[i] for i in order[:keep]]
        seen += [own[i] for i in order[keep:]]
    return {"train": seen, "test_scene": seen, "test_cutout": kept}


def dominant_color(image: Image.Image) -> str | None:
    """The colour name of most visible pixels, or None where no name has more than half."""
    pixels = np.asarray(image.convert("RGBA").resize((32, 32), Image.Resampling.BOX)).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 128][:, :3]
    if len(pixels) == 0:
        return None
    hsv = np.asarray(Image.fromarray(pixels[None]).convert("HSV"))[0].astype(np.float64) / 255
    hue, saturation, value = hsv[:, 0] * 360, hsv[:, 1], hsv[:, 2]
    edges = [(15, "red"), (40, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (290, "purple"), (345, "pink")]
    names = np.full(len(pixels), "red", dtype=object)
    for limit, name in reversed(edges):
        names[hue < limit] = name
    names[(names == "orange") & (value < 0.68) | (names == "red") & (value < 0.6) & (saturation < 0.65)] = "brown"
    names[(names == "yellow") & (value < 0.68)] = "green"
    names[(names == "red") & (saturation < 0.5) & (value > 0.75)] = "pink"
    names[saturation < 0.16] = "gray"
    names[(saturation < 0.16) & (value > 0.82)] = "white"
    names[value < 0.22] = "black"
    name, count = Counter(names.tolist()).most_common(1)[0]
    return name if count > len(pixels) / 2 else None


def compose(image_id: str, cutouts: list[Cutout], rng: np.random.Generator) -> Scene:
    """Two to six objects that do not overlap, on a light plain ground; some kinds come more than once."""
    kinds = sorted({cutout.kind for cutout in cutouts})
    wanted = [str(kind) for kind in rng.choice(kinds, min(int(rng.integers(2, 6)), len(kinds)), replace=False)]
    wanted += [wanted[0]] * int(rng.choice([0, 1, 2], p=[0.35, 0.35, 0.3]))
    wanted = wanted[:6]
    ground = tuple(int(c) for c in rng.integers(205, 250, 3))
    image = Image.new("RGB", (WIDTH, HEIGHT), ground)
    objects: list[tuple[Cutout, tuple[int, int, int, int]]] = []
    for kind in wanted:
        own = [cutout for cutout in cutouts if cutout.kind == kind]
        cutout = own[int(rng.integers(len(own)))]
        scale = float(rng.uniform(40, 64)) / max(cutout.image.size)
        size = [max(4, round(side * scale)) for side in cutout.image.size]
        part = cutout.image.resize(size, Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = _visible(part)
        if box is None:
            continue
        part = part.crop(box)
        for _ in range(40):
            x, y = int(rng.integers(WIDTH - part.width + 1)), int(rng.integers(HEIGHT - part.height + 1))
            place = (x, y, x + part.width, y + part.height)
            if all(_apart(place, other) for _, other in objects):
                image.paste(part, (x, y), part)
                objects.append((cutout, place))
                break
    order = rng.permutation(len(objects))  # the position in the list shall tell nothing
    return Scene(image_id, image, tuple(objects[i] for i in order))


def _visible(image: Image.Image) -> tuple[int, int, int, int] | None:
    return image.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox()


def _apart(a, b) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def holds(relation: str, a, b) -> bool | None:
    """Whether box a is left of / right of / above / below box b; None where they overlap in that direction."""
    axis, sign = RELATIONS[relation]
    if a[axis + 2] <= b[axis]:
        return sign < 0
    if b[axis + 2] <= a[axis]:
        return sign > 0
    return None


def questions(scene: Scene, kinds: list[str]) -> list[tuple[str, str, str]]:
    """Every (type, question, answer) that the scene answers without doubt."""
    out = []
    for kind in kinds:
        count = scene.count(kind)
        out.append(("exists", f"is there {_a(kind)}?", "yes" if count else "no"))
        if count < len(NUMBERS):
            out.append(("count", f"how many {_plural(kind)} are there?", str(count)))
    single = [(cutout, box) for cutout, box in scene.objects if scene.count(cutout.kind) == 1]
    for cutout, box in single:
        if cutout.color is not None:
            out.append(("color", f"what color is the {cutout.kind}?", cutout.color))
        for relation in RELATIONS:
            verdicts = [(other.kind, holds(relation, place, box)) for other, place in scene.objects if place != box]
            there = [kind for kind, verdict in verdicts if verdict]
            if len(there) == 1 and all(verdict is not None for _, verdict in verdicts):
                out.append(("relation", f"what is {relation} the {cutout.kind}?", there[0]))
    return out


def statements(scene: Scene, both: set[tuple[str, str]]) -> list[tuple[str, str, bool]]:
    """Every (type, statement, truth) about one scene; `both` holds (kind, colour) that cut-outs have and have not."""
    out = []
    for kind in sorted({cutout.kind for cutout, _ in scene.objects}):
        for number in (1, 2, 3):
            noun = kind if number == 1 else _plural(kind)
            verb = "is" if number == 1 else "are"
            out.append(("count", f"there {verb} exactly {NUMBERS[number]} {noun}.", scene.count(kind) == number))
    single = [(cutout, box) for cutout, box in scene.objects if scene.count(cutout.kind) == 1]
    for cutout, box in single:
        for kind, color in sorted(both):
            if kind == cutout.kind and cutout.color is not None:
                out.append(("color", f"the {kind} is {color}.", cutout.color == color))
        for other, place in single:
            for relation in RELATIONS:
                verdict = holds(relation, box, place) if other is not cutout else None
                if verdict is not None:
                    out.append(("relation", f"the {cutout.kind} is {relation} the {other.kind}.", verdict))
    return out


def pair_statements(left: Scene, right: Scene) -> list[tuple[str, str, bool]]:
    """Every (type, statement, truth) that compares two scenes."""
    out = []
    for kind in sorted({cutout.kind for scene in (left, right) for cutout, _ in scene.objects}):
        a, b = left.count(kind), right.count(kind)
        text = f"there are more {_plural(kind)} in the {{}} picture than in the {{}} picture."
        if a != b:
            out.append(("more", text.format("left", "right"), a > b))
            out.append(("more", text.format("right", "left"), b > a))
        out.append(("both", f"there is {_a(kind)} in both pictures.", a > 0 and b > 0))
    return out


class Balance:
    """Picks candidates so that, for the same words, every answer comes about equally often."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self.kinds: dict[str, Counter] = defaultdict(Counter)

    def pick(self, candidates: list[tuple], count: int) -> list[tuple]:
        """At most `count` of the candidates (type, text, answer), of different types as far as there are any."""
        by_type: dict[str, list[tuple]] = defaultdict(list)
        for candidate in candidates:
            by_type[candidate[0]].append(candidate)
        chosen = []
        rare = sorted(by_type, key=lambda kind: (sum(self.kinds[kind].values()), self.rng.random()))
        for kind in rare[:count]:
            ties = self.rng.random(len(by_type[kind]))
            best = min(range(len(ties)), key=lambda i: (*self._cost(by_type[kind][i]), ties[i]))
            _, text, answer = by_type[kind][best]
            self.answers[kind, text][answer] += 1
            self.kinds[kind][answer] += 1
            chosen.append(by_type[kind][best])
        return chosen

    def _cost(self, candidate: tuple) -> tuple:
        kind, text, answer = candidate
        own = self.answers[kind, text]
        known = max(2, len(self.kinds[kind]))
        return own[answer] - sum(own.values()) / known, self.kinds[kind][answer], sum(own.values())


def region_features(scene: Scene) -> torch.Tensor:
    """[R, 384] float32 of the boxes' pixels: an 8 x 8 RGB patch, and two convolutions with fixed random weights."""
    crops = [scene.image.crop(box).resize((CROP, CROP), Image.Resampling.BILINEAR) for _, box in scene.objects]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2).float() / 127.5 - 1
    patch = torch.nn.functional.adaptive_avg_pool2d(pixels, PATCH).flatten(1)
    generator = torch.Generator().manual_seed(0)  # the same for every scene and every run
    hidden = pixels
    for inputs, outputs, kernel in ((3, 24, 5), (24, 48, 3)):
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (inputs * kernel**2 / 2) ** 0.5
        hidden = torch.relu(torch.nn.functional.conv2d(hidden, weight, stride=2))
    return torch.cat([patch, torch.nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)], dim=1)


def as_regions(scene: Scene, kinds: list[str]) -> Regions:
    colors = [COLORS.index(cutout.color) if cutout.color else len(COLORS) for cutout, _ in scene.objects]
    count = len(scene.objects)
    return Regions(
        scene.image_id,
        region_features(scene),
        torch.tensor([box for _, box in scene.objects], dtype=torch.float32),
        WIDTH,
        HEIGHT,
        classes=torch.tensor([kinds.index(cutout.kind) for cutout, _ in scene.objects]),
        confidences=torch.ones(count),
        attributes=torch.tensor(colors),
        attribute_confidences=torch.tensor([float(color < len(COLORS)) for color in colors]),
    )


def blind_accuracy(rows: list[dict], text: str, answer: str) -> dict:
    """Accuracy on each test split of the most frequent training answer: of all, of the type, of the very same text."""
    train = [row for row in rows if row["split"] == "train"]
    keys = {"majority": lambda row: "", "of the type": lambda row: row["type"], "of the text": lambda row: row[text]}
    out: dict = {}
    for split in SPLITS[1:]:
        test = [row for row in rows if row["split"] == split]
        out[split] = {"count": len(test)}
        for name, key in keys.items():
            counts: dict = defaultdict(Counter)
            for row in train:
                counts[key(row)][row[answer]] += 1
            overall = Counter(row[answer] for row in train).most_common(1)
            guesses = [(counts[key(row)].most_common(1) or overall or [(None, 0)])[0][0] for row in test]
            hits = sum(guess == row[answer] for guess, row in zip(guesses, test, strict=True))
            out[split][name] = round(hits / max(len(test), 1), 4)
    return out


def build(
    data, out, *, train: int = 2000, test: int = 300, per_scene: int = 3, pictures: int = 12, seed: int = 0
) -> dict:
    """Writes everything to the folder `out` and returns the report.

    Args:
        train, test: scenes of the training split and of each test split.
        per_scene: questions and statements of a scene, of different types.
        pictures: scenes of each split to save as PNG.

    Raises:
        ValueError: numbers out of range, or no cut-out of a known kind. FileNotFoundError: no file at `data`.
    """
    if min(train, test, per_scene) < 1 or pictures < 0:
        numbers = f"train {train}, test {test}, per_scene {per_scene}"
        raise ValueError(f"build: {numbers} must be positive, pictures {pictures} not negative")
    out = Path(out)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cutouts = load_cutouts(data)
    pools = split_cutouts(cutouts, rng)
    kinds = sorted({cutout.kind for cutout in cutouts})
    asked, stated, samples = [], [], []

    def scenes():
        for split in SPLITS:
            pool = pools[split]
            own = sorted({cutout.kind for cutout in pool})
            colors = {(cutout.kind, cutout.color) for cutout in pool if cutout.color}
            both = {(kind, color) for kind, color in colors if any(k == kind and c != color for k, c in colors)}
            ask, state, compare = Balance(rng), Balance(rng), Balance(rng)
            last = None
            for n in range(train if split == "train" else test if own else 0):
                scene = compose(f"{split}_{n:05d}", pool, rng)
                picked = ask.pick(questions(scene, own), per_scene)
                claims = [((scene,), claim) for claim in state.pick(statements(scene, both), per_scene - 1)]
                if last is not None:
                    claims += [((last, scene), claim) for claim in compare.pick(pair_statements(last, scene), 1)]
                for kind, question, answer in picked:
                    entry = {"question_id": len(asked), "image_id": scene.image_id, "question": question}
                    asked.append({**entry, "answer": answer, "type": kind, "split": split})
                for shown, (kind, statement, label) in claims:
                    entry = {"statement_id": len(stated), "image_ids": [s.image_id for s in shown]}
                    stated.append({**entry, "statement": statement, "label": label, "type": kind, "split": split})
                if n < pictures:
                    scene.image.save(out / "pictures" / f"{scene.image_id}.png")
                    samples.append((scene.image, " / ".join(f"{q} {a}" for _, q, a in picked[:2])))
                last = scene
                yield as_regions(scene, kinds)

    count = write_regions(out / "features.tsv", scenes())
    for name, rows in (("questions", asked), ("statements", stated)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = sorted({row["answer"] for row in asked})
    vocabulary = {"kinds": kinds, "colors": list(COLORS), "answers": answers}
    (out / "vocabulary.json").write_text(json.dumps(vocabulary, indent=1))
    if samples:
        images, titles = zip(*samples, strict=True)
        contact_sheet(images, titles, 4, size=WIDTH, lines=4).save(out / "pictures" / "scenes.png")
    report = {
        "scenes": count,
        "cut-outs": {split: len(pool) for split, pool in pools.items()},
        "questions": dict(Counter(f"{row['split']} {row['type']}" for row in asked)),
        "statements": dict(Counter(f"{row['split']} {row['type']}" for row in stated)),
        "questions without looking": blind_accuracy(asked, "question", "answer"),
        "statements without looking": blind_accuracy(stated, "statement", "label"),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _plural(kind: str) -> str:
    return PLURALS.get(kind, f"{kind}s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="tuxpaint.zip")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--test", type=int, default=300, help="scenes of each of the two test splits")
    parser.add_argument("--per-scene", type=int, default=3, help="questions and statements of a scene")
    parser.add_argument("--pictures", type=int, default=12, help="scenes of each split to save as pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    print(json.dumps(build(options.pop("data"), options.pop("out"), **options), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
