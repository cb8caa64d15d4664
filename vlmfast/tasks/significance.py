"""Whether one system's texts score better than another's on the same test set, by the paired bootstrap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Score of the first system minus score of the second.

    Attributes:
        value: on the whole test set.
        standard_error: deviation of the difference over resampled test sets.
        share_above: of the resampled test sets, those in which the first system is better.
    """

    value: float
    standard_error: float
    share_above: float

    @property
    def errors_above(self) -> float:
        """The difference in standard errors."""
        return self.value / self.standard_error if self.standard_error else float(np.sign(self.value)) * np.inf

    def __str__(self) -> str:
        return f"{self.value:+.3f} ± {self.standard_error:.3f} ({self.errors_above:.1f} standard errors)"


def paired_bootstrap(first: Callable[[np.ndarray], float], second: Callable[[np.ndarray], float], count: int, *,
                     clusters: Sequence | None = None, samples: int = 1000, seed: int = 0) -> Difference:
    """Draws test sets of the same size with replacement and scores both systems on each.

    Args:
        first, second: indices [M] of test examples, repeated where they are drawn repeatedly -> the score on those.
        count: examples of the test set, at least 2.
        clusters: a label for each example: whole clusters are drawn, for examples that resemble one another.
        samples: test sets drawn.

    Raises:
        ValueError: too few examples or clusters, or not a label for each.

    Paper: Statistical Significance Tests for Machine Translation Evaluation (Koehn 2004), section 5.
    """
    if clusters is not None and len(clusters) != count:
        raise ValueError(f"paired_bootstrap: clusters has {len(clusters)} entries, there are {count} examples")
    labels = np.arange(count) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    groups = [np.flatnonzero(labels == label) for label in range(labels.max() + 1 if count else 0)]
    if len(groups) < 2 or samples < 2:
        raise ValueError(f"paired_bootstrap: there are {len(groups)} examples or clusters and {samples} samples, must "
                         "be 2 at least")
    generator, every = np.random.default_rng(seed), np.arange(count)
    found = []
    for _ in range(samples):
        drawn = np.concatenate([groups[i] for i in generator.integers(len(groups), size=len(groups))])
        found.append(first(drawn) - second(drawn))
    return Difference(first(every) - second(every), float(np.std(found, ddof=1)), float(np.mean(np.array(found) > 0)))


class BleuCounts:
    """N-gram counts of each text, from which corpus BLEU of any selection is sacrebleu's own.

    Args:
        candidates, references: N texts and one reference of each.
        options: of sacrebleu's BLEU, such as `tokenize` and `lowercase`.
    """

    def __init__(self, candidates: Sequence[str], references: Sequence[str], **options):
        from sacrebleu.metrics import BLEU

        if len(candidates) != len(references):
            raise ValueError(f"BleuCounts: references has {len(references)} rows, candidates has {len(candidates)}")
        self.metric = BLEU(**options, effective_order=True)
        scores = [self.metric.sentence_score(text, [own]) for text, own in zip(candidates, references, strict=True)]
        self.counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])

    def __call__(self, drawn: np.ndarray) -> float:
        """Corpus BLEU of texts `drawn` [M], 0 ... 100."""
        total = self.counts[drawn].sum(0).tolist()
        return self.metric.compute_bleu(total[:4], total[4:8], *total[8:], smooth_method="exp").score
