"""Metrics of generated text: BLEU and chrF through sacrebleu, and CIDEr-D."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:['’.,][^\W_]+)*", re.UNICODE)
_WIDTH = 6.0  # of the penalty on a difference in length
_ORDERS = 4

References = Sequence[Sequence[str] | str]


@dataclass(frozen=True)
class TextScore:
    """A corpus score.

    Attributes:
        name: such as "BLEU" or "chrF2".
        value: 0 ... 100.
        signature: sacrebleu's, to be reported with the value; it tells tokenizer, case and version.
        precisions: BLEU's n-gram precisions, 0 ... 100, else empty.
        brevity_penalty: BLEU's, else 1.
    """

    name: str
    value: float
    signature: str
    precisions: tuple[float, ...] = ()
    brevity_penalty: float = 1.0

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1f} ({self.signature})"


def bleu(
    candidates: Sequence[str],
    references: References,
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    max_order: int = 4,
) -> TextScore:
    """Corpus BLEU.

    Args:
        candidates: N texts, not tokenised.
        references: N texts, or N lists of texts; their number may differ.
        tokenize: sacrebleu's tokenizer: "13a" (the standard), "intl", "zh", "ja-mecab", "char", "none", ...
        lowercase: ignore case, as for captions.
        max_order: longest n-gram; 4 is BLEU-4.

    Raises:
        ImportError: sacrebleu is not installed. ValueError: numbers differ, no texts, or a text without reference.

    Paper: BLEU (Papineni et al. 2002); A Call for Clarity in Reporting BLEU Scores (Post 2018, arXiv:1804.08771).
    """
    candidates, streams = _streams("bleu", candidates, references)
    metric = _sacrebleu().BLEU(tokenize=tokenize, lowercase=lowercase, max_ngram_order=max_order)
    score = metric.corpus_score(candidates, streams)
    name = "BLEU" if max_order == 4 else f"BLEU-{max_order}"
    return TextScore(name, score.score, str(metric.get_signature()), tuple(score.precisions), score.bp)


def chrf(candidates: Sequence[str], references: References, *, word_order: int = 0) -> TextScore:
    """Corpus chrF2, or chrF2++ with `word_order=2`; arguments as in :func:`bleu`.

    Paper: chrF (Popovic 2015); chrF++ (Popovic 2017).
    """
    candidates, streams = _streams("chrf", candidates, references)
    metric = _sacrebleu().CHRF(word_order=word_order)
    name = "chrF2" + "+" * word_order
    return TextScore(name, metric.corpus_score(candidates, streams).score, str(metric.get_signature()))


def caption_words(text: str) -> list[str]:
    """Lower-case words without punctuation, close to the Penn Treebank tokenizer of the COCO evaluation.

    That one is a Java program; ours differs in clitics ("don't" stays one word) and rare symbols.
    """
    return _WORD.findall(text.lower())


@dataclass(frozen=True, eq=False)
class CiderScore:
    """CIDEr-D.

    Attributes:
        value: the mean, 0 ... 10; papers report it times 100.
        per_caption: [N] float64.
        standard_error: of the mean over captions.
    """

    value: float
    per_caption: np.ndarray

    @property
    def standard_error(self) -> float:
        count = len(self.per_caption)
        return float(self.per_caption.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan

    def __str__(self) -> str:
        return f"CIDEr-D {self.value:.3f} ± {self.standard_error:.3f}"


class CiderD:
    r"""CIDEr-D with the n-gram statistics of one corpus, for evaluation or as a reward in training.

    .. math:: \frac{10}{4 R} \sum_{n=1}^4 \sum_{r=1}^R e^{-(l_c - l_r)^2 / 2\sigma^2}
              \frac{\min(g^n(c), g^n(r)) \cdot g^n(r)}{\lVert g^n(c) \rVert \lVert g^n(r) \rVert}

    with g the n-gram counts times log(N / pictures whose references hold the n-gram), and sigma = 6.

    Args:
        references: of the corpus, a list of texts per picture, N pictures; two at least, else nothing is rare.
        words: text -> words.

    Paper: CIDEr (Vedantam et al. 2015, arXiv:1411.5726), section 3 and 5 (CIDEr-D). Values agree with the COCO
    evaluation's on equal words.
    """

    def __init__(self, references: References, *, words: Callable[[str], list[str]] = caption_words):
        references = _lists("CiderD", references)
        if len(references) < 2:
            raise ValueError(f"CiderD: references has {len(references)} pictures, must have 2 at least")
        self.words = words
        frequency: Counter[tuple[str, ...]] = Counter()
        for texts in references:
            frequency.update({ngram for text in texts for ngram in _ngrams(words(text))})
        self._log_pictures = math.log(len(references))
        self._log_frequency = {ngram: math.log(count) for ngram, count in frequency.items()}

    def score(self, candidates: Sequence[str], references: References) -> CiderScore:
        """CIDEr-D of N texts against N lists of references, with this corpus' statistics.

        Raises:
            ValueError: numbers differ, no texts, or a text without reference.
        """
        references = _lists("CiderD", references, candidates)
        vectors: dict[str, tuple] = {}

        def vector(text: str) -> tuple:
            if text not in vectors:
                vectors[text] = self._vector(text)
            return vectors[text]

        values = np.array([
            10.0 / _ORDERS * np.mean([_similarity(vector(candidate), vector(text)) for text in texts])
            for candidate, texts in zip(candidates, references, strict=True)
        ])  # fmt: skip
        return CiderScore(float(values.mean()), values)

    def _vector(self, text: str) -> tuple[list[dict], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
        words = self.words(text)
        for ngram, count in _ngrams(words).items():
            weights[len(ngram) - 1][ngram] = count * (self._log_pictures - self._log_frequency.get(ngram, 0.0))
        return weights, [math.sqrt(sum(w * w for w in order.values())) for order in weights], len(words)


def cider_d(
    candidates: Sequence[str], references: References, *, words: Callable[[str], list[str]] = caption_words
) -> CiderScore:
    """CIDEr-D of N texts with the statistics of their own references, as test sets are evaluated; see `CiderD`.

    Raises:
        ValueError: numbers differ, fewer than two texts, or a text without reference.
    """
    return CiderD(_lists("cider_d", references, candidates), words=words).score(candidates, references)


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(words) - n + 1))


def _similarity(candidate: tuple, reference: tuple) -> float:
    """Sum over n of the clipped cosine, times the penalty on length."""
    total = 0.0
    for weights, norm, own, own_norm in zip(*candidate[:2], *reference[:2], strict=True):
        if norm and own_norm:
            common = weights.keys() & own.keys()
            # fsum, for the order of a set differs from run to run
            total += math.fsum(min(weights[ngram], own[ngram]) * own[ngram] for ngram in common) / (norm * own_norm)
    return total * math.exp(-((candidate[2] - reference[2]) ** 2) / (2 * _WIDTH**2))


def _lists(name: str, references: References, candidates: Sequence[str] | None = None) -> list[list[str]]:
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if candidates is not None and len(candidates) != len(lists):
        raise ValueError(f"{name}: references has {len(lists)} rows, candidates has {len(candidates)}")
    if not lists:
        raise ValueError(f"{name}: there are no texts")
    for i, texts in enumerate(lists):
        if not texts:
            raise ValueError(f"{name}: row {i} has no reference")
    return lists


def _streams(name: str, candidates: Sequence[str], references: References) -> tuple[list[str], list[list]]:
    # sacrebleu wants a list per number of reference, None where a text has fewer
    lists = _lists(name, references, candidates)
    longest = max(map(len, lists))
    return list(candidates), [[texts[k] if k < len(texts) else None for texts in lists] for k in range(longest)]


def _sacrebleu():
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ImportError("BLEU and chrF need sacrebleu: pip install 'vlmfast[metrics]'") from error
    return metrics
