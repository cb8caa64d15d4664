"""Readers of the public annotation files of vision-language tasks. Names load on first use.

Every `read_*` returns :class:`Annotations`, a sequence of frozen records with `report()`. A missing field, a field of
another type and malformed JSON raise ValueError naming file, record and field, or file and line; pictures without
features and records that cannot be used are skipped, counted and reported. Nothing in a file is ever executed.
"""

from importlib import import_module

_HOME = {
    "Annotations": "records",
    "AnnotationReport": "records",
    "VqaQuestion": "vqa",
    "read_vqa": "vqa",
    "GqaQuestion": "gqa",
    "read_gqa": "gqa",
    "AnswerVocabulary": "answers",
    "soft_score": "answers",
    "Nlvr2Statement": "nlvr2",
    "read_nlvr2": "nlvr2",
    "VcrQuestion": "vcr",
    "VcrObjects": "vcr",
    "read_vcr": "vcr",
    "read_vcr_objects": "vcr",
    "vcr_words": "vcr",
    "CaptionedImage": "coco",
    "read_coco_captions": "coco",
    "read_karpathy": "coco",
    "EntityImage": "flickr_entities",
    "EntityPhrase": "flickr_entities",
    "EntitySentence": "flickr_entities",
    "parse_entity_sentence": "flickr_entities",
    "read_flickr_entities": "flickr_entities",
    "ReferringExpression": "refcoco",
    "read_refcoco": "refcoco",
    "EntailmentPair": "snli_ve",
    "ENTAILMENT_LABELS": "snli_ve",
    "read_snli_ve": "snli_ve",
    "RouteInstruction": "r2r",
    "NavigationGraph": "r2r",
    "read_r2r": "r2r",
    "read_connectivity": "r2r",
    "TranslationPair": "multi30k",
    "read_multi30k": "multi30k",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
