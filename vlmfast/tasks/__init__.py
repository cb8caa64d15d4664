"""What a trained model is asked to do: zero-shot classification, retrieval, pictures from
texts, with their metrics."""

from .generation import Generated, encode_prompts, generate, generate_codes, prime_codes, similarity
from .metrics import RecallReport, best_ranks, chance_recall, recall_at_k, same_caption_ids
from .reconstruction import ReconstructionReport, measure_reconstruction, psnr, reconstruction_sheet
from .retrieval import Match, Retriever
from .zero_shot import TEMPLATES, ZeroShotClassifier

__all__ = [
    "TEMPLATES",
    "Generated",
    "Match",
    "RecallReport",
    "ReconstructionReport",
    "Retriever",
    "ZeroShotClassifier",
    "best_ranks",
    "chance_recall",
    "encode_prompts",
    "generate",
    "generate_codes",
    "measure_reconstruction",
    "prime_codes",
    "psnr",
    "recall_at_k",
    "reconstruction_sheet",
    "same_caption_ids",
    "similarity",
]
