"""What a trained model is asked to do, with the metrics: zero-shot classification and retrieval of dual encoders;
questions, statements, choices, grounding, affect and retrieval of the BERT-like models, with the losses they are
fine-tuned by; re-ranking; decoding of texts; pictures from texts and their reconstruction; scores of captions,
translations, affect and navigation. `table()` says which model does what. Names load on first use."""

from importlib import import_module

_HOME = {
    "accuracy": "answer_metrics",
    "nlvr2_consistency": "answer_metrics",
    "normalize_answer": "answer_metrics",
    "vqa_accuracy": "answer_metrics",
    "vqa_score": "answer_metrics",
    "read_answers": "answers",
    "write_answers": "answers",
    "CrossEncoderRetriever": "cross_encoder",
    "RegionMatch": "cross_encoder",
    "Grounded": "grounding",
    "Grounding": "grounding",
    "box_iou": "grounding",
    "grounding_accuracy": "grounding",
    "RecallReport": "metrics",
    "best_ranks": "metrics",
    "chance_recall": "metrics",
    "recall_at_k": "metrics",
    "recall_of_scores": "metrics",
    "same_caption_ids": "metrics",
    "Affect": "affect",
    "load_affect": "affect",
    "save_affect": "affect",
    "Row": "catalogue",
    "add_rows": "catalogue",
    "table": "catalogue",
    "TaskBatch": "fine_tuning",
    "task_loss": "fine_tuning",
    "MODELS": "pair_models",
    "TASK_HEADS": "pair_models",
    "PairInputs": "pair_models",
    "TaskHead": "pair_models",
    "task_head_for": "pair_models",
    "with_head": "pair_models",
    "Reranked": "reranking",
    "Reranker": "reranking",
    "rerank_scores": "reranking",
    "NLVR": "reasoning",
    "NLVR2": "reasoning",
    "VCR": "reasoning",
    "Choice": "reasoning",
    "VisualEntailment": "reasoning",
    "Match": "retrieval",
    "Retriever": "retrieval",
    "PairAttention": "pair_inputs",
    "PairTask": "pair_inputs",
    "Picture": "pair_pictures",
    "as_picture": "pair_pictures",
    "as_regions": "pair_pictures",
    "GQA": "vqa",
    "VQA": "vqa",
    "Answer": "vqa",
    "TEMPLATES": "zero_shot",
    "ZeroShotClassifier": "zero_shot",
    "ClassificationScores": "affect_metrics",
    "IntensityScores": "affect_metrics",
    "MultiLabelScores": "affect_metrics",
    "classification_scores": "affect_metrics",
    "intensity_scores": "affect_metrics",
    "multi_label_scores": "affect_metrics",
    "pearson": "affect_metrics",
    "Captioner": "captioning",
    "Generation": "generation",
    "TextWriter": "generation",
    "join_words": "generation",
    "Translator": "translation",
    "Generated": "image_generation",
    "encode_prompts": "image_generation",
    "generate": "image_generation",
    "generate_codes": "image_generation",
    "prime_codes": "image_generation",
    "similarity": "image_generation",
    "ReconstructionReport": "reconstruction",
    "measure_reconstruction": "reconstruction",
    "psnr": "reconstruction",
    "reconstruction_sheet": "reconstruction",
    "DecodingRules": "decoding",
    "Hypothesis": "decoding",
    "beam_search": "decoding",
    "greedy": "decoding",
    "mask_step": "decoding",
    "sample": "decoding",
    "Demonstration": "navigation",
    "Navigator": "navigation",
    "Observation": "navigation",
    "RouteWalk": "navigation",
    "navigation_loss": "navigation",
    "NavigationScores": "navigation_metrics",
    "Trajectory": "navigation_metrics",
    "navigation_scores": "navigation_metrics",
    "ndtw": "navigation_metrics",
    "BleuCounts": "significance",
    "Difference": "significance",
    "paired_bootstrap": "significance",
    "CiderD": "text_metrics",
    "CiderScore": "text_metrics",
    "TextScore": "text_metrics",
    "bleu": "text_metrics",
    "chrf": "text_metrics",
    "cider_d": "text_metrics",
}

_MODULES = {*_HOME.values()}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
