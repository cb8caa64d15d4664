"""Text-to-image search with a model that reads text and picture together, one pair at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.regions import RegionFeatures
from .fine_tuning import TaskBatch
from .pair_inputs import PairTask, evaluating, is_one_picture


@dataclass(frozen=True)
class RegionMatch:
    """One answer: the picture's id and how well it fits; the probability is sigmoid(score)."""

    image_id: str
    score: float
    probability: float


class CrossEncoderRetriever(PairTask):
    """Scores texts against pictures, by region features or, for Pixel-BERT, pixels.

    Every text is computed with every picture, `batch_size` pictures at a time; what belongs to the text alone is
    computed once for them.

    Args:
        model: any of the BERT-like models with a retrieval head ("vil", "rank"; the logit), or with the matching head
            of pretraining ("nsp", "itm", "matched", "relationship"; the log odds of a match).
        head: one of them; None takes the first of the model's.
        options: see `PairTask`.
    """

    task = "retrieval"

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.pictures: Sequence | RegionFeatures | None = None

    def score(self, texts: str | Sequence[str], regions, *, progress: bool = False) -> Tensor:
        """How well each text fits each picture.

        Args:
            texts: T texts, or one.
            regions: of I pictures: an opened RegionFeatures, read as it is needed, or a list (see `as_regions`; for
                Pixel-BERT, `as_picture`).
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
                    rows.append(self.fit(output.logits[self.head].float().cpu()))
                    bar.update(len(chunk))
                columns.append(torch.stack(rows))
        return torch.cat(columns, dim=1)

    def batch(self, texts: Sequence[str], regions: Sequence, *, options: int = 4,
              generator: torch.Generator | None = None) -> TaskBatch:
        """B texts with their pictures, each beside mismatches drawn from the others, to train on.

        Option 0 is the pair, then come, in turn, another text for the picture and another picture for the text
        (12-in-1 takes 4 options, arXiv:1912.02315).

        Args:
            texts, regions: B each, B >= 2; equal texts count as one and are no mismatches of each other.
            options: of each example, at least 2.
            generator: of the draws; None: torch's.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        texts, pictures, _ = self.examples(list(texts), list(regions))
        if len(texts) != len(pictures) or len(set(texts)) < 2 or options < 2:
            raise ValueError(f"CrossEncoderRetriever: {len(texts)} texts, {len(set(texts))} of them different, "
                             f"{len(pictures)} pictures and {options} options; must be as many texts as pictures, at "
                             "least 2 different texts and 2 options")
        rows: list[tuple[int, int]] = []
        for i, text in enumerate(texts):
            others = [j for j, other in enumerate(texts) if other != text]
            draws = torch.randint(len(others), (options - 1,), generator=generator).tolist()
            rows += [(i, i)] + [(others[j], i) if k % 2 == 0 else (i, others[j]) for k, j in enumerate(draws)]
        inputs = self.inputs([texts[i] for i, _ in rows], [pictures[j] for _, j in rows])
        return TaskBatch(inputs, torch.zeros(len(texts), dtype=torch.int64, device=self.device))

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
        opened = isinstance(self.pictures, RegionFeatures)
        return [RegionMatch(self.pictures.ids[i] if opened else self.picture(self.pictures[i]).image_id,
                            scores[i].item(), scores[i].sigmoid().item()) for i in order.tolist()]

    def _chunks(self, regions) -> Iterator[list]:
        opened = isinstance(regions, RegionFeatures)
        for start in range(0, len(regions), self.batch_size):
            places = range(start, min(start + self.batch_size, len(regions)))
            yield [regions[regions.ids[i]] if opened else self.picture(regions[i], f"regions[{i}]") for i in places]
