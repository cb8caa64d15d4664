"""Zero-shot classification with prompt ensembles.

Paper: CLIP (Radford et al. 2021, arXiv:2103.00020), sec. 3.1.4: the class weight is the mean of the normalised
embeddings of several sentences that name the class, normalised again.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Varied in medium, quality, size and number, the idea of the paper's eighty ImageNet sentences in fewer words.
TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of many {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a blurry photo of a {}.",
    "a good photo of a {}.",
    "a bad photo of a {}.",
    "a black and white photo of a {}.",
    "a photo of a {} outdoors.",
    "a photo of a {} on a white background.",
    "a painting of a {}.",
    "a drawing of a {}.",
    "a sketch of a {}.",
    "a cartoon {}.",
    "an icon of a {}.",
    "a toy {}.",
)


class ZeroShotClassifier(nn.Module):
    """A classifier made of class names.

    Args:
        model: has `encode_image`, `encode_text` and `logit_scale` (its logarithm).
        classes: C names.
        tokenizer: strings -> [B, T] tokens; None takes `model.tokenizer`.
        templates: sentences with `{}` where the name goes.
        batch_size: sentences encoded at a time.

    Attributes:
        class_embeddings: [C, D] unit rows, in the dtype of the text features.

    Raises:
        ValueError: no class, a repeated class, no template, a template without `{}`, or no tokenizer.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str], *, tokenizer=None,
                 templates: Sequence[str] = TEMPLATES, batch_size: int = 256):
        super().__init__()
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("ZeroShotClassifier: the model carries no tokenizer, give one")
        if isinstance(classes, str) or not classes:
            raise ValueError(f"ZeroShotClassifier: classes is {classes!r}, must be a list of at least one name")
        if len(set(classes)) != len(classes):
            repeated = sorted({name for name in classes if list(classes).count(name) > 1})
            raise ValueError(f"ZeroShotClassifier: classes names {', '.join(repeated)} more than once")
        if isinstance(templates, str) or not templates or any("{}" not in template for template in templates):
            raise ValueError("ZeroShotClassifier: templates must be a list of sentences that contain {}")
        self.model = model
        self.classes = tuple(classes)
        self.register_buffer("class_embeddings", self._embed(tokenizer, templates, batch_size), persistent=False)

    @torch.no_grad()
    def _embed(self, tokenizer, templates: Sequence[str], batch_size: int) -> Tensor:
        device = self.model.logit_scale.device
        was_training = self.model.training
        self.model.eval()
        sentences = [template.replace("{}", name) for name in self.classes for template in templates]
        parts = []
        for start in range(0, len(sentences), batch_size):
            tokens = tokenizer(sentences[start : start + batch_size]).to(device)
            parts.append(F.normalize(self.model.encode_text(tokens), dim=-1))
        self.model.train(was_training)
        each = torch.cat(parts).unflatten(0, (len(self.classes), len(templates)))  # [C, templates, D]
        return F.normalize(each.mean(1), dim=-1)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] preprocessed images -> [B, C] logits, exp(logit_scale) times the cosine."""
        features = F.normalize(self.model.encode_image(image), dim=-1)
        return self.model.logit_scale.exp() * features @ self.class_embeddings.T

    @torch.no_grad()
    def predict(self, image: Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
        """The k most probable classes of each image with their probabilities, best first."""
        if k < 1:
            raise ValueError(f"ZeroShotClassifier.predict: k is {k}, must be at least 1")
        probability, index = self(image).float().softmax(-1).topk(min(k, len(self.classes)))
        return [
            [(self.classes[i], p) for i, p in zip(row, values, strict=True)]
            for row, values in zip(index.tolist(), probability.tolist(), strict=True)
        ]

    @torch.no_grad()
    def accuracy(self, batches: Iterable[tuple[Tensor, Tensor]], ks: Sequence[int] = (1, 5)) -> dict[int, float]:
        """Top-k accuracy over batches of ([B, 3, H, W] images, [B] class indices).

        Raises:
            ValueError: there is no image.
        """
        hits, total = dict.fromkeys(ks, 0), 0
        for image, label in batches:
            logits = self(image)
            correct = logits.gather(1, label.to(logits.device)[:, None])
            rank = (logits > correct).sum(1)
            total += len(label)
            for k in ks:
                hits[k] += int((rank < k).sum())
        if not total:
            raise ValueError("ZeroShotClassifier.accuracy: batches holds no image")
        return {k: count / total for k, count in hits.items()}
