"""What a trained model is asked to do: zero-shot classification and retrieval, with their metrics."""

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
