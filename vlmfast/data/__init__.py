"""Tokenizer, image preprocessing and image-text data sets. Names load on first use, so this import stays light."""

from importlib import import_module

_HOME = {
    "CLIPTokenizer": "tokenizer",
    "clean_text": "tokenizer",
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
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in set(_HOME.values()) | {"bpe", "captions", "preprocess_config"}:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
