"""Text-to-image search with a model that reads text and picture together, one pair at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.regions import RegionFeatures, Regions
from .two_stream import PairTask, as_regions, evaluating, is_one_picture


@dataclass(frozen=True)
class RegionMatch:
    """One answer: the picture's id and how well it fits; the probability is sigmoid(score)."""

    image_id: str
    score: float
    probability: float


class CrossEncoderRetriever(PairTask):
    """Scores texts against the region features of pictures.

    Every text is computed with every picture, `batch_size` pictures at a time; what belongs to the text alone is
    computed once for them.

    Args:
        model: a ViLBERT or LXMERT.
        head: "vil" (ViLBERT fine-tuned for retrieval, the logit), or the matching head of pretraining, "nsp" or
            "matched" (the log odds of a match). None takes the first of these that the model has.
        tokenizer, task_id, batch_size, max_tokens, max_regions: see `PairTask`.
    """

    task = "retrieval"

    def __init__(self, model, *, head: str | None = None, **options):
        super().__init__(model, **options)
        known = ("vil", "nsp", "matched")
        if head is not None and head not in known:
            raise ValueError(f"CrossEncoderRetriever: head is {head!r}, must be one of {', '.join(known)}")
        self.head = self.require_head(*(known if head is None else (head,)))
        self.pictures: Sequence[Regions] | RegionFeatures | None = None

    def score(self, texts: str | Sequence[str], regions, *, progress: bool = False) -> Tensor:
        """How well each text fits each picture.

        Args:
            texts: T texts, or one.
            regions: of I pictures: an opened RegionFeatures, read as it is needed, or a list (see `as_regions`).
            progress: show a progress bar.

        Returns:
            [T, I] float32 on the CPU, higher fits better; compare with `recall_of_scores`.
        """
        from tqdm.auto import tqdm

        texts, _, _ = self.examples(texts, ())
        many = regions if isinstance(regions, RegionFeatures) or not is_one_picture(regions) else [regions]
        if not len(many) or not texts:
            raise ValueError(f"CrossEncoderRetriever: {len(texts)} texts and regions of {len(many)} pictures, must be "
                             "at least one of either")
        columns = []
        with tqdm(total=len(texts) * len(many), unit="pair", disable=not progress) as bar:
            for chunk in self._chunks(many):
                rows = []
                for text in texts:
                    with evaluating(self.model):
                        output = self.model(**self.inputs([text], chunk), heads=(self.head,))
                    rows.append(self._fit(output.logits[self.head]))
                    bar.update(len(chunk))
                columns.append(torch.stack(rows))
        return torch.cat(columns, dim=1)

    def add(self, regions) -> "CrossEncoderRetriever":
        """Sets the pictures that `search` looks through: an opened RegionFeatures or a list of regions."""
        self.pictures = regions
        return self

    def search(self, query: str, top: int = 10, *, progress: bool = False) -> list[RegionMatch]:
        """The `top` best pictures for a text, best first; ties keep the order of the pictures.

        Raises:
            ValueError: nothing was added, the query is empty, or top is under 1.
        """
        if self.pictures is None:
            raise ValueError("CrossEncoderRetriever.search: no pictures yet, call add first")
        if top < 1:
            raise ValueError(f"CrossEncoderRetriever.search: top is {top}, must be at least 1")
        scores = self.score(query, self.pictures, progress=progress)[0]
        order = scores.argsort(descending=True, stable=True)[:top]
        names = self.pictures.ids if isinstance(self.pictures, RegionFeatures) else \
            [as_regions(picture).image_id for picture in self.pictures]
        return [RegionMatch(names[i], scores[i].item(), scores[i].sigmoid().item()) for i in order.tolist()]

    def _chunks(self, regions) -> Iterator[list[Regions]]:
        opened = isinstance(regions, RegionFeatures)
        for start in range(0, len(regions), self.batch_size):
            places = range(start, min(start + self.batch_size, len(regions)))
            yield [regions[regions.ids[i]] if opened else as_regions(regions[i], f"regions[{i}]") for i in places]

    def _fit(self, logits: Tensor) -> Tensor:
        logits = logits.float().cpu()
        if self.head == "vil":
            return logits[:, 0]
        match = 0 if self.head == "nsp" else 1  # ViLBERT's class of a match is 0, LXMERT's 1
        return logits[:, match] - logits[:, 1 - match]
