"""Data, model and measurements of `vlmfast demo`."""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import CLIPTokenizer, EmojiPairs, ImagePreprocess, load_emoji, retrieval_sheet
from ..data.emoji import strata
from ..models.clip import CLIP, CLIPConfig
from ..tasks import best_ranks, same_caption_ids
from ..tasks.metrics import chance_recall
from ..training import TensorLoader, TrainConfig, Trainer, TrainResult

CONCEPTS, RANDOM = 192, 365  # pictures held out as whole concepts, and one by one from the rest
BATCH = 256
KS = (1, 5, 10)
QUERIES = 8


@dataclass(frozen=True)
class RecallRow:
    """Recall of some held-out pairs among all candidates of their split."""

    name: str
    queries: int
    candidates: int
    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance: dict[int, float]


@dataclass
class Experiment:
    """One training run and its two held-out splits.

    Attributes:
        train, random, concepts: pairs to learn from; held out one by one; held out as whole concepts.
        loader: batches of `train`; model: what is trained; config: how.
    """

    train_pairs: EmojiPairs
    random: EmojiPairs
    concepts: EmojiPairs
    loader: TensorLoader
    model: CLIP
    config: TrainConfig

    @classmethod
    def prepare(cls, seed: int) -> "Experiment":
        """Splits, vocabulary and initial weights, all decided by the seed."""
        rest, concepts = load_emoji("en").split_concepts(CONCEPTS, seed)
        train, random = rest.split_random(RANDOM / len(rest), seed)
        tokenizer = CLIPTokenizer.train(train.captions, vocab_size=900, context_length=32)
        images = torch.from_numpy(train.images.copy()).permute(0, 3, 1, 2).contiguous()  # [N, 3, 32, 32] uint8
        mean = (images.float().mean((0, 2, 3)) / 255).tolist()
        std = (images.float().std((0, 2, 3)) / 255).tolist()
        torch.manual_seed(seed)
        model = CLIP(CLIPConfig(
            embed_dim=128, image_size=images.shape[-1], vision_layers=(1, 1, 1, 1), vision_width=12,
            vision_patch_size=None, vision_heads=6, context_length=tokenizer.context_length,
            vocab_size=tokenizer.vocab_size, text_width=96, text_heads=3, text_layers=2, image_mean=tuple(mean),
            image_std=tuple(std),
        ))
        model.visual.to(memory_format=torch.channels_last)
        model.tokenizer = tokenizer
        model.preprocess = ImagePreprocess(images.shape[-1], tuple(mean), tuple(std))
        loader = TensorLoader(images, tokenizer(train.captions), BATCH, mean, std, shift=2, channels_last=True,
                              seed=seed)
        config = TrainConfig(epochs=30, lr=2e-3, weight_decay=0.1, label_smoothing=0.1, ema=0.99, seed=seed)
        return cls(train, random, concepts, loader, model, config)

    def describe(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (f"CLIP with {parameters / 1e6:.2f}M parameters, {self.model.config.image_size} x "
                f"{self.model.config.image_size} pixels; {len(self.train_pairs)} emoji to learn from, "
                f"{len(self.random)} held out at random, {len(self.concepts)} as whole concepts; "
                f"batch {BATCH}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}")

    def train(self, seconds: float | None, progress: bool) -> TrainResult:
        """Trains to the end of the schedule, shortened to about `seconds` if given."""
        config = self.config
        if seconds is not None:
            steps = max(2, int(seconds / self._seconds_of_a_step()))
            config = TrainConfig(**{**config.to_dict(), "steps": min(steps, config.epochs * len(self.loader))})
        self.config = config
        trainer = Trainer(self.model, self.loader, config, device="cpu", progress=progress)
        result = trainer.run()
        if not result.interrupted:
            trainer.use_average()
        return result

    def _seconds_of_a_step(self) -> float:
        config = TrainConfig(steps=3, seed=self.config.seed)
        trial = Trainer(copy.deepcopy(self.model), self.loader, config, device="cpu", progress=False)
        trial.run(stop_after=1)
        start = time.perf_counter()
        trial.run(stop_after=3)
        return (time.perf_counter() - start) / 2

    @torch.no_grad()
    def embed(self, pairs: EmojiPairs) -> tuple[Tensor, Tensor]:
        """Unit features of pictures and captions, [N, E] each."""
        self.model.eval()
        pixels = torch.from_numpy(pairs.images.copy()).permute(0, 3, 1, 2).float() / 255
        pixels = ((pixels - self.loader.mean) / self.loader.std).contiguous(memory_format=torch.channels_last)
        tokens = self.model.tokenizer(pairs.captions)
        image = [self.model.encode_image(part, normalize=True) for part in pixels.split(256)]
        text = [self.model.encode_text(part, normalize=True) for part in tokens.split(256)]
        return torch.cat(image), torch.cat(text)

    def recalls(self) -> list[RecallRow]:
        """Both splits, the random one also in parts; ranks are always among all pictures of the split."""
        rows = []
        for name, pairs in (("random tenth", self.random), ("held-out concepts", self.concepts)):
            image, text = self.embed(pairs)
            ids = same_caption_ids(pairs.captions)
            ranks = best_ranks(image, text, ids, ids), best_ranks(text, image, ids, ids)
            masks = {name: np.ones(len(pairs), dtype=bool)}
            if pairs is self.random:
                parts = strata(self.train_pairs, pairs)
                masks |= {
                    "- new skin tone of a known figure": parts["skin_tone"] & parts["seen_base"],
                    "- all words of the caption known": parts["seen_words"],
                    "- base figures": parts["base"],
                }
            chance = {k: chance_recall(ids, ids, k) for k in KS}
            for part, mask in masks.items():
                chosen = [rank[torch.from_numpy(mask)] for rank in ranks]
                recalls = [{k: (r < k).double().mean().item() if len(r) else 0.0 for k in KS} for r in chosen]
                rows.append(RecallRow(part, int(mask.sum()), len(pairs), *recalls, chance))
        return rows

    def retrieval_sheet(self):
        """Captions of both splits, drawn by the seed, with their five best pictures among everything held out."""
        chance = np.random.default_rng(self.config.seed)
        queries = [int(i) for i in chance.choice(len(self.random), QUERIES - 3, replace=False)]
        queries += [len(self.random) + int(i) for i in chance.choice(len(self.concepts), 3, replace=False)]
        (image_a, text_a), (image_b, text_b) = self.embed(self.random), self.embed(self.concepts)
        image, text = torch.cat([image_a, image_b]), torch.cat([text_a, text_b])
        captions = self.random.captions + self.concepts.captions
        pictures = np.concatenate([self.random.images, self.concepts.images])
        best = (text[queries] @ image.T).topk(5).indices.tolist()
        return retrieval_sheet(
            [captions[q] for q in queries],
            [[pictures[i] for i in row] for row in best],
            [[captions[i] for i in row] for row in best],
            [[captions[i] == captions[q] for i in row] for q, row in zip(queries, best, strict=True)],
            heading=f"five best of {len(captions)} pictures the model never saw",
        )


def eager_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The loss in plain PyTorch, logits and all."""
    logits = logit_scale * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
