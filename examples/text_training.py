"""Training of an image-conditioned encoder-decoder on few pictures, shared by the captioning and translation runs.

Pictures are shifted, scaled, turned and tinted afresh each time they are read, never mirrored: letters and signs would
change their meaning. More pairs than the set has come from the embedded emoji, whose names are written like sentences.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlmfast.data import ImagePreprocess, WordPieceTokenizer, load_emoji, load_image
from vlmfast.data.annotations import read_multi30k
from vlmfast.models import ImageSeq2Seq, create
from vlmfast.models.image_seq2seq import Memory
from vlmfast.objectives.language import seq2seq_loss
from vlmfast.training import TrainConfig
from vlmfast.training.log import CURVE_NAME, JSONLog, draw_curve
from vlmfast.training.schedule import WeightAverage, learning_rate, make_optimizer


@dataclass(frozen=True, eq=False)
class Example:
    """A picture [P, P, 3] uint8 on white, the text to write, and the text to translate (None for captions)."""

    pixels: np.ndarray
    target: str
    source: str | None = None
    name: str = ""
    category: str = ""


def square_pixels(image: Image.Image | str | Path, size: int) -> np.ndarray:
    image = load_image(image) if isinstance(image, str | Path) else image
    return np.asarray(ImagePreprocess(size, resize_mode="longest", fill_color=255).square(image.convert("RGB")))


def read_examples(folder: Path, split: str, size: int, target: str, source: str | None = None) -> list[Example]:
    """One split of what `tuxpaint_captions.build` wrote."""
    records = json.loads((folder / "captions.json").read_text(encoding="utf-8"))["images"]
    categories = {Path(record["filename"]).stem: record["category"] for record in records}
    files = [folder / f"{split}.{suffix}" for suffix in (source or target, target, "txt")]
    return [
        Example(square_pixels(folder / "images" / f"{pair.image_id}.png", size), pair.target,
                None if source is None else pair.source, pair.image_id, categories[pair.image_id])
        for pair in read_multi30k(*files)
    ]  # fmt: skip


def make_tokenizer(examples: Sequence[Example], vocab_size: int) -> WordPieceTokenizer:
    """Of sources and targets, with capital letters."""
    texts = [text for example in examples for text in (example.target, example.source) if text is not None]
    return WordPieceTokenizer.train(texts, vocab_size, lowercase=False, max_length=128)


def short_enough(examples: Sequence[Example], tokenizer: WordPieceTokenizer, most: int) -> list[Example]:
    """Those of at most this many tokens: a few very long texts would make every batch slow."""
    return [example for example in examples
            if all(len(tokenizer.encode(text)) <= most for text in (example.target, example.source or ""))]


def emoji_examples(size: int, target: str, source: str | None = None) -> list[Example]:
    """The embedded emoji without skin tones, each different picture once, with names like sentences."""
    pairs, found, seen = load_emoji(target), [], set()
    for i, record in enumerate(pairs.records):
        pixels = pairs.images[i]
        if record["skin"] == "" and pixels.tobytes() not in seen:
            seen.add(pixels.tobytes())
            texts = [None if language is None else sentence(record[language]) for language in (target, source)]
            found.append(Example(square_pixels(Image.fromarray(np.array(pixels)), size), *texts, record["u"]))
    return found


def sentence(name: str) -> str:
    """A name with a capital letter and a full stop, as the stamps' texts have them."""
    name = name.strip()
    return f"{name[:1].upper()}{name[1:].rstrip('.')}."


class Batches:
    """Shuffled, augmented batches of examples; the more a batch takes from `extra`, the earlier it comes.

    Args:
        examples, extra: the set, and further pairs that make up `extra_share` of the first batch and none of the last.
        tokenizer: of both languages.
        word_drop: share of source tokens that are replaced by [MASK].
    """

    def __init__(self, examples: Sequence[Example], extra: Sequence[Example], tokenizer: WordPieceTokenizer,
                 config: TrainConfig, batch_size: int = 48, extra_share: float = 0.5, word_drop: float = 0.0):
        self.sets = [_Shuffled(part, config.seed + k) for k, part in enumerate((examples, extra))]
        self.tokenizer, self.steps, self.size = tokenizer, config.steps, batch_size
        self.extra_share, self.word_drop = extra_share if extra else 0.0, word_drop
        self.generator = torch.Generator().manual_seed(config.seed)

    def __getitem__(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the model without the picture's normalisation, and labels [B, S]."""
        if not 0 <= step < self.steps:
            raise IndexError(step)
        foreign = round(self.size * self.extra_share * max(0.0, 1 - step / (0.7 * self.steps)))
        rows = self.sets[0].take(self.size - foreign) + self.sets[1].take(foreign)
        pixels = torch.from_numpy(np.stack([row.pixels for row in rows])).permute(0, 3, 1, 2).float() / 255
        target = self.tokenizer([row.target for row in rows]).input_ids
        given = {"image": augment(pixels, self.generator), "decoder_input_ids": target[:, :-1]}
        if rows[0].source is not None:
            source = self.tokenizer([row.source for row in rows])
            drop = torch.rand(source.input_ids.shape, generator=self.generator) < self.word_drop
            given["input_ids"] = source.input_ids.masked_fill(drop & source.attention_mask, self.tokenizer.mask)
            given["text_lengths"] = source.lengths
        return given, target[:, 1:].masked_fill(target[:, 1:] == self.tokenizer.pad, -100)


class _Shuffled:
    """Endless draws without replacement within a pass."""

    def __init__(self, rows: Sequence[Example], seed: int):
        self.rows, self.generator, self.order = rows, torch.Generator().manual_seed(seed), []

    def take(self, count: int) -> list[Example]:
        while len(self.order) < count:
            self.order += torch.randperm(len(self.rows), generator=self.generator).tolist()
        taken, self.order = self.order[:count], self.order[count:]
        return [self.rows[i] for i in taken]


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 3, P, P] in 0 ... 1 -> the same on white, turned by up to 12 degrees, scaled by 0.8 to 1.2, shifted by up to
    8 %, with other brightness and tint."""
    count = len(pixels)

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * 2 - 1

    angle, scale, shift = draw() * math.radians(12), 1 + 0.2 * draw(), draw(2) * 0.16
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1) / scale[:, None]
    move = torch.cat([turn.view(count, 2, 2), shift[..., None]], 2)
    grid = F.affine_grid(move, list(pixels.shape), align_corners=False)
    ink = F.grid_sample(1 - pixels, grid, align_corners=False)  # what lies outside is 0, no ink
    return (1 - ink * (1 + 0.15 * draw(3))[:, :, None, None] * (1 + 0.15 * draw(1))[:, :, None, None]).clamp(0, 1)


def make_model(tokenizer: WordPieceTokenizer, **overrides) -> ImageSeq2Seq:
    """A model of about a million parameters over this vocabulary."""
    sizes = dict(hidden_size=128, num_attention_heads=4, intermediate_size=256, encoder_layers=1, decoder_layers=2,
                 stem_widths=(24, 48, 96, 128), hidden_dropout_prob=0.2)
    words = dict(vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad, bos_token_id=tokenizer.cls,
                 eos_token_id=tokenizer.sep)
    model = create("image-seq2seq-tiny", **{**sizes, **overrides}, **words)
    model.tokenizer = tokenizer
    return model


class WordBag(nn.Module):
    """Predicts which words the text has, from the mean of what the encoder made of the input: a second loss that
    reaches the picture without the detour through the decoder. Training only.
    """

    def __init__(self, model: ImageSeq2Seq):
        super().__init__()
        self.scores = nn.Linear(model.config.hidden_size, model.config.vocab_size)

    def forward(self, memory: Memory, labels: Tensor) -> Tensor:
        """Cross entropy with the distribution that is even over a text's tokens, `labels` [B, S]."""
        keep = memory.keep[..., None]
        pooled = memory.states.masked_fill(~keep, 0).sum(1) / keep.sum(1)
        each = -self.scores(pooled).log_softmax(-1).gather(1, labels.clamp(min=0))
        return each.masked_fill(labels < 0, 0).sum() / (labels >= 0).sum()


def train(model: ImageSeq2Seq, batches: Batches, config: TrainConfig, out: Path | None = None,
          progress: bool = True, bag_weight: float = 1.0) -> list[dict]:
    """Trains in place and leaves the averaged weights, in evaluation mode; returns the log.

    Args:
        bag_weight: of the loss of `WordBag`.
    """
    from tqdm.auto import tqdm

    torch.manual_seed(config.seed)
    bag = WordBag(model)
    optimizer = make_optimizer(nn.ModuleList([model, bag]) if bag_weight else model, config)
    average = WeightAverage(model, config.ema)
    log = JSONLog(out)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.image_mean, model.config.image_std))
    model.train()
    with tqdm(range(config.steps), desc="training", unit="step", disable=not progress) as bar:
        for step in bar:
            given, labels = batches[step]
            picture = given.pop("image")
            if model.config.visual == "grid":
                given["image"] = (picture - mean) / std
            for group in optimizer.param_groups:
                group["lr"] = lr = learning_rate(step, config.steps, config)
            output = model(**given)
            loss = words = seq2seq_loss(output.logits["lm"], labels, label_smoothing=config.label_smoothing)
            if bag_weight:
                loss = words + bag_weight * bag(output.memory, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            average.update(model)
            if not math.isfinite(loss.item()):
                raise ValueError(f"training stopped at step {step + 1}: the loss is {loss.item()}")
            bar.set_postfix(loss=f"{words.item():.3f}", refresh=False)
            if step % config.log_every == 0 or step + 1 == config.steps:
                log.write(step=step + 1, loss=words.item(), lr=lr)
    model.load_state_dict(average.values)
    if out is not None:
        draw_curve(log.records, out / CURVE_NAME)
    return log.records
