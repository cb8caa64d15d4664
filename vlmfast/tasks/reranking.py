"""Search in two steps: a dual encoder finds a shortlist, a cross-encoder, slower and better, puts it in order.

As in practice since UNITER and ViLBERT; ALBEF (arXiv:2107.07651), sec. 4.1, ranks its k best pairs in this way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cross_encoder import CrossEncoderRetriever
from .retrieval import Retriever


@dataclass(frozen=True)
class Reranked:
    """One answer: the file, the cross-encoder's score, its probability sigmoid(score), and the dual encoder's cosine
    similarity with the rank, from 0, that this gave."""

    path: Path
    score: float
    probability: float
    similarity: float
    rank: int


class Reranker:
    """Ranks what a `Retriever` finds.

    Args:
        retriever: the dual encoder with its pictures.
        cross_encoder: scores a text with pictures.
        pictures: regions by file: a mapping or an opened RegionFeatures whose ids are the files' names, without or with
            suffix, or their paths; a function of the file. None: the files themselves, for Pixel-BERT.
        shortlist: pictures that are ranked anew.

    Raises:
        ValueError: `shortlist` under 1, or no regions for a model that needs them.
    """

    def __init__(self, retriever: Retriever, cross_encoder: CrossEncoderRetriever,
                 pictures: Mapping | Callable[[Path], object] | None = None, *, shortlist: int = 32):
        if shortlist < 1:
            raise ValueError(f"Reranker: shortlist is {shortlist}, must be at least 1")
        if pictures is None and not cross_encoder.pixels:
            raise ValueError(f"Reranker: pictures is None, must be the regions for a {cross_encoder.kind}")
        self.retriever, self.cross_encoder, self.pictures = retriever, cross_encoder, pictures
        self.shortlist = shortlist

    def search(self, query: str, top: int = 10) -> list[Reranked]:
        """The `top` best pictures for a text, best first, at most `shortlist` of them.

        Raises:
            ValueError: see `Retriever.search`. KeyError: a picture of the shortlist has no regions.
        """
        if top < 1:
            raise ValueError(f"Reranker.search: top is {top}, must be at least 1")
        found = self.retriever.search(query, self.shortlist)
        scores = self.cross_encoder.score(query, [self._picture(match.path) for match in found])[0]
        order = scores.argsort(descending=True, stable=True)[:top].tolist()
        return [Reranked(found[i].path, scores[i].item(), scores[i].sigmoid().item(), found[i].score, i)
                for i in order]

    def _picture(self, path: Path):
        if self.pictures is None:
            return path
        if callable(self.pictures):
            return self.pictures(path)
        for name in (path.stem, path.name, str(path), path):
            if name in self.pictures:
                return self.pictures[name]
        raise KeyError(f"Reranker: pictures has no {path.stem!r}, {path.name!r} or {str(path)!r}")


def rerank_scores(scores: Tensor, cross: Callable[[int, Sequence[int]], Tensor], shortlist: int = 32) -> Tensor:
    """A dual encoder's scores with the best of each row in a cross-encoder's order, for `recall_of_scores`.

    Args:
        scores: [T, I], for instance of T texts by I pictures; `scores.T` ranks texts for each picture.
        cross: of (row, columns) -> [len(columns)] scores of the cross-encoder.
        shortlist: columns of a row that are scored.

    Returns:
        [T, I] float64 on the CPU: in each row the shortlist has the cross-encoder's order and lies above all others,
        which keep theirs. Rows cannot be compared with each other.

    Raises:
        ValueError: shapes do not fit, or shortlist under 1.
    """
    if scores.ndim != 2 or shortlist < 1:
        raise ValueError(f"rerank_scores: scores is {list(scores.shape)} and shortlist {shortlist}, must be [T, I] and "
                         "at least 1")
    result = scores.detach().to("cpu", torch.float64, copy=True)
    best = result.topk(min(shortlist, result.shape[1]), dim=1).indices.tolist()
    for row, columns in enumerate(best):
        found = torch.as_tensor(cross(row, columns)).detach().to("cpu", torch.float64)
        if found.shape != (len(columns),):
            raise ValueError(f"rerank_scores: cross gives {list(found.shape)}, must be [{len(columns)}]")
        # ranks above the rest, whatever the cross-encoder's scale
        result[row, columns] = result[row].max() + 1 + found.argsort().argsort()
    return result
