"""What a trained model is asked to do, with the metrics: zero-shot classification and retrieval of dual encoders;
questions, statements, choices, grounding and retrieval of ViLBERT and LXMERT."""

from .answer_metrics import accuracy, nlvr2_consistency, normalize_answer, vqa_accuracy, vqa_score
from .answers import read_answers, write_answers
from .cross_encoder import CrossEncoderRetriever, RegionMatch
from .grounding import Grounded, Grounding, box_iou, grounding_accuracy
from .metrics import RecallReport, best_ranks, chance_recall, recall_at_k, recall_of_scores, same_caption_ids
from .reasoning import ENTAILMENT, NLVR2, VCR, Choice, VisualEntailment
from .retrieval import Match, Retriever
from .two_stream import PairAttention, PairTask, as_regions
from .vqa import GQA, VQA, Answer
from .zero_shot import TEMPLATES, ZeroShotClassifier

__all__ = [
    "ENTAILMENT",
    "GQA",
    "NLVR2",
    "TEMPLATES",
    "VCR",
    "VQA",
    "Answer",
    "Choice",
    "CrossEncoderRetriever",
    "Grounded",
    "Grounding",
    "Match",
    "PairAttention",
    "PairTask",
    "RecallReport",
    "RegionMatch",
    "Retriever",
    "VisualEntailment",
    "ZeroShotClassifier",
    "accuracy",
    "as_regions",
    "best_ranks",
    "box_iou",
    "chance_recall",
    "grounding_accuracy",
    "nlvr2_consistency",
    "normalize_answer",
    "read_answers",
    "recall_at_k",
    "recall_of_scores",
    "same_caption_ids",
    "vqa_accuracy",
    "vqa_score",
    "write_answers",
]
