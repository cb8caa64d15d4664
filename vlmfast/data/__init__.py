"""Tokenizers, image preprocessing, image-text data sets and region features. Names load on first use."""

from importlib import import_module

_HOME = {
    "BartTokenizer": "bart_tokenizer",
    "CLIPTokenizer": "tokenizer",
    "GPT2Tokenizer": "gpt2_tokenizer",
    "clean_text": "tokenizer",
    "BertTokens": "wordpiece",
    "WordPieceTokenizer": "wordpiece",
    "ImagePreprocess": "images",
    "load_image": "images",
    "check_image": "images",
    "preprocess_batch": "images",
    "OPENAI_MEAN": "images",
    "OPENAI_STD": "images",
    "contact_sheet": "pictures",
    "retrieval_sheet": "pictures",
    "EmojiPairs": "emoji",
    "load_emoji": "emoji",
    "emoji_pairs": "emoji",
    "strata": "emoji",
    "LANGUAGES": "emoji",
    "ImageTextPairs": "pairs",
    "open_pairs": "pairs",
    "WebDatasetPairs": "webdataset",
    "PairLoader": "loader",
    "PairsReport": "report",
    "RegionFeatures": "regions",
    "Regions": "regions",
    "RegionBatch": "region_batches",
    "RegionsReport": "regions",
    "collate_regions": "region_batches",
    "encode_regions": "region_batches",
    "make_regions": "regions",
    "write_regions": "regions",
    "lxmert_boxes": "region_boxes",
    "vilbert_boxes": "region_boxes",
    "uniter_boxes": "region_boxes",
    "oscar_boxes": "region_boxes",
    "vl_bert_boxes": "region_boxes",
    "vd_bert_boxes": "region_boxes",
    "vilbert_global_region": "region_boxes",
    "vl_bert_global_region": "region_boxes",
    "uniter_region_count": "region_boxes",
}

_MODULES = {*_HOME.values(), "annotations", "bpe", "captions", "preprocess_config", "region_arrays", "region_formats",
            "region_tsv"}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
