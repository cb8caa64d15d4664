"""What a trained model is asked to do: zero-shot classification and retrieval, with their metrics."""

from importlib import import_module

from .metrics import RecallReport, best_ranks, chance_recall, recall_at_k, same_caption_ids
from .retrieval import Match, Retriever
from .zero_shot import TEMPLATES, ZeroShotClassifier

__all__ = [
    "TEMPLATES",
    "Match",
    "RecallReport",
    "Retriever",
    "ZeroShotClassifier",
    "best_ranks",
    "chance_recall",
    "recall_at_k",
    "same_caption_ids",
]

_LATER = {
    "ClassificationScores": "affect_metrics",
    "IntensityScores": "affect_metrics",
    "MultiLabelScores": "affect_metrics",
    "classification_scores": "affect_metrics",
    "intensity_scores": "affect_metrics",
    "multi_label_scores": "affect_metrics",
    "pearson": "affect_metrics",
    "DecodingRules": "decoding",
    "Hypothesis": "decoding",
    "beam_search": "decoding",
    "greedy": "decoding",
    "mask_step": "decoding",
    "sample": "decoding",
    "NavigationScores": "navigation_metrics",
    "Trajectory": "navigation_metrics",
    "navigation_scores": "navigation_metrics",
    "ndtw": "navigation_metrics",
    "CiderD": "text_metrics",
    "CiderScore": "text_metrics",
    "TextScore": "text_metrics",
    "bleu": "text_metrics",
    "chrf": "text_metrics",
    "cider_d": "text_metrics",
}

__all__ += sorted(_LATER)


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
