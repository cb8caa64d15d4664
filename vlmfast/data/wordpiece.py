"""BERT's tokenizer: WordPiece over words and punctuation marks, as ViLBERT and LXMERT use it.

Paper: BERT (Devlin et al. 2019, arXiv:1810.04805), section 3. Ids equal those of the published tokenizers.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_LENGTH = 512
VOCAB_NAME, JSON_NAME, SETTINGS_NAME = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
_MAX_FILE_BYTES = 64 << 20
_LONGEST_WORD = 100  # characters; a longer one is [UNK], as in the published code


class BertTokens(NamedTuple):
    """`[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]` of B texts, padded to the longest.

    Attributes:
        input_ids: [B, T] int64, [PAD] behind a text.
        token_type_ids: [B, T] int64, 1 on `pair [SEP]`, else 0.
        attention_mask: [B, T] bool, True where a token is.
        lengths: [B] int64 tokens, the special ones included.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> "BertTokens":
        """The same on a device."""
        return BertTokens(*(part.to(device) for part in self))


class WordPieceTokenizer:
    """Text to BERT token ids.

    Args:
        vocabulary: token -> id, ids 0 ... V-1; must hold [PAD], [UNK], [CLS], [SEP] and [MASK].
        lowercase: lower-case the text (the `uncased` vocabularies).
        strip_accents: remove accents; None does so where `lowercase`.
        chinese_characters: make every CJK ideograph a word of its own.
        max_length: tokens of a sequence where a call does not say, the special ones included.

    Use :meth:`from_file` for published vocabularies and :meth:`train` for a small one of your own. A special token
    spelled out in a text, `[MASK]` for example, is that token.
    """

    def __init__(self, vocabulary: dict[str, int], lowercase: bool = True, strip_accents: bool | None = None,
                 chinese_characters: bool = True, max_length: int = MAX_LENGTH):
        self.vocabulary = dict(vocabulary)
        _check_vocabulary("WordPieceTokenizer: vocabulary", self.vocabulary)
        self.lowercase, self.strip_accents, self.chinese_characters = lowercase, strip_accents, chinese_characters
        self.max_length = _check_max_length(max_length, 2)
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.vocabulary[token] for token in SPECIALS)
        self._pieces = Tokenizer(WordPiece(self.vocabulary, unk_token=UNK, max_input_chars_per_word=_LONGEST_WORD))
        self._pieces.normalizer = BertNormalizer(clean_text=True, handle_chinese_chars=chinese_characters,
                                                 strip_accents=strip_accents, lowercase=lowercase)
        self._pieces.pre_tokenizer = BertPreTokenizer()
        self._pieces.decoder = decoders.WordPiece()
        self._pieces.add_special_tokens(list(SPECIALS))
        self._names = sorted(self.vocabulary, key=self.vocabulary.get)

    @classmethod
    def from_file(cls, path: str | os.PathLike, max_length: int | None = None) -> "WordPieceTokenizer":
        """Reads vocab.txt, tokenizer.json, or a folder that holds one of them.

        Args:
            path: the file or folder. Settings come from a tokenizer_config.json beside it; without one, from
                tokenizer.json, and a bare vocab.txt is lower-cased.
            max_length: None takes `model_max_length` of tokenizer_config.json, else 512.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged or is no BERT vocabulary.
        """
        path = Path(path)
        if path.is_dir():
            names = [name for name in (VOCAB_NAME, JSON_NAME) if (path / name).is_file()]
            if not names:
                raise FileNotFoundError(f"WordPieceTokenizer: {path} has neither {VOCAB_NAME} nor {JSON_NAME}")
            path = path / names[0]
        read = _read_json_vocabulary if path.suffix == ".json" else _read_text_vocabulary
        vocabulary, settings = read(path)
        _check_vocabulary(f"WordPieceTokenizer: {path}", vocabulary)
        beside = path.with_name(SETTINGS_NAME)
        if beside.is_file():
            settings |= _known(_read_json(beside), ("do_lower_case", "strip_accents", "tokenize_chinese_chars",
                                                    "model_max_length"))
        stored = settings.pop("max_length", MAX_LENGTH)
        return cls(vocabulary, **settings, max_length=stored if max_length is None else max_length)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True, *, min_frequency: int = 2,
              max_length: int = MAX_LENGTH) -> "WordPieceTokenizer":
        """Learns a vocabulary of at most `vocab_size` ids; equal texts in any order give the same one.

        Args:
            texts: what to learn from.
            vocab_size: at least the five special tokens and every character, alone and as a continuation. Fewer ids
                come out where no further pair of pieces occurs `min_frequency` times.

        Raises:
            ValueError: `vocab_size` is too small. TypeError: `texts` is one string, or one of them is not a string.
        """
        if isinstance(texts, str):
            raise TypeError("WordPieceTokenizer.train: texts is one string, must be an iterable of strings")
        learner = Tokenizer(WordPiece(unk_token=UNK))
        learner.normalizer, learner.pre_tokenizer = BertNormalizer(lowercase=lowercase), BertPreTokenizer()
        texts = list(texts)
        alphabet = set()
        for i, text in enumerate(texts):
            _check_text(text, "text", i)
            for word, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(text)):
                alphabet.update([*word, *(f"##{character}" for character in word[1:])])
        # the library numbers pieces in an order that changes from run to run, except those named here
        known = [*SPECIALS, *sorted(alphabet, key=lambda piece: (len(piece), piece))]
        if vocab_size < len(known):
            raise ValueError(f"WordPieceTokenizer.train: vocab_size is {vocab_size}, must be at least {len(known)}, "
                             "the special tokens and the characters of the texts")
        trainer = WordPieceTrainer(vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=known,
                                   show_progress=False)
        learner.train_from_iterator(texts, trainer)
        return cls(learner.get_vocab(with_added_tokens=False), lowercase, max_length=max_length)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without [CLS], [SEP] and padding."""
        _check_text(text, "text", 0)
        return self._pieces.encode(text, add_special_tokens=False).ids

    def __call__(self, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None,
                 max_length: int | None = None, truncate: bool = True) -> BertTokens:
        """One padded batch.

        Args:
            texts: one text or B texts.
            pairs: B second segments, or None.
            max_length: most tokens of a sequence; None takes the tokenizer's own.
            truncate: cut a sequence that is too long at the end of its longer segment, token by token, as BERT's own
                code does; False raises instead.

        Raises:
            ValueError: unequal numbers of texts and pairs, or a sequence is too long and `truncate` is False.
            TypeError: a text is not a string.
        """
        first = self._encode_all(texts, "text")
        second = None if pairs is None else self._encode_all(pairs, "pair")
        if second is not None and len(first) != len(second):
            raise ValueError(f"WordPieceTokenizer: pairs has {len(second)} entries, texts has {len(first)}")
        specials = 2 if second is None else 3
        most = self.max_length if max_length is None else max_length
        room = _check_max_length(most, specials) - specials
        rows = []
        for i, ids in enumerate(first):
            other = [] if second is None else second[i]
            if len(ids) + len(other) > room:
                if not truncate:
                    raise ValueError(f"WordPieceTokenizer: text {i} has {len(ids) + len(other) + specials} tokens, "
                                     f"max_length is {most}")
                kept = min(len(other), max(room // 2, room - len(ids)))
                ids, other = ids[: room - kept], other[:kept]
            ids = [self.cls, *ids, self.sep]
            tail = [] if second is None else [*other, self.sep]
            rows.append((ids + tail, len(ids)))
        return self._pad(rows)

    def _encode_all(self, texts: str | Sequence[str], what: str) -> list[list[int]]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            _check_text(text, what, i)
        return [found.ids for found in self._pieces.encode_batch(texts, add_special_tokens=False)]

    def _pad(self, rows: list[tuple[list[int], int]]) -> BertTokens:
        """Of (ids, length of the first segment)."""
        lengths = torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int64)
        longest = int(lengths.max()) if rows else 0
        column = torch.arange(longest)
        mask = column < lengths[:, None]
        input_ids = torch.full((len(rows), longest), self.pad, dtype=torch.int64)
        input_ids[mask] = torch.tensor([i for ids, _ in rows for i in ids], dtype=torch.int64)
        starts = torch.tensor([start for _, start in rows], dtype=torch.int64)
        return BertTokens(input_ids, (mask & (column >= starts[:, None])).long(), mask, lengths)

    def tokens(self, ids: Tensor | Sequence[int]) -> list[str]:
        """The tokens of one id sequence, special ones and padding included.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"WordPieceTokenizer: id {i} is outside 0 ... {self.vocab_size - 1}")
        return [self._names[i] for i in ids]

    def decode(self, ids: Tensor | Sequence[int]) -> str | list[str]:
        """Text of one id sequence without its special tokens; a [B, T] tensor gives B texts.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        rows = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if rows and isinstance(rows[0], (list, tuple, Tensor)):
            return [self.decode(row) for row in rows]
        self.tokens(rows)
        return self._pieces.decode(rows, skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes vocab.txt and tokenizer_config.json as Hugging Face's BertTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.chinese_characters,
            "model_max_length": self.max_length,
            "pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK,
        }
        for name, text in ((VOCAB_NAME, "\n".join(self._names)), (SETTINGS_NAME, json.dumps(settings, indent=2))):
            (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")

    def __eq__(self, other) -> bool:
        if not isinstance(other, WordPieceTokenizer):
            return NotImplemented
        return self._settings() == other._settings()

    __hash__ = None

    def _settings(self) -> tuple:
        return self.vocabulary, self.lowercase, self.strip_accents, self.chinese_characters, self.max_length

    def __reduce__(self):
        return WordPieceTokenizer, self._settings()

    def __repr__(self) -> str:
        return f"WordPieceTokenizer(vocab_size={self.vocab_size}, lowercase={self.lowercase})"


def _check_text(text: str, what: str, i: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"WordPieceTokenizer: {what} {i} is {type(text).__name__}, must be str")


def _check_max_length(length: int, least: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < least:
        raise ValueError(f"WordPieceTokenizer: max_length is {length!r}, must be an integer of at least {least}")
    return length


def _check_vocabulary(where: str, vocabulary: dict[str, int]) -> None:
    if set(vocabulary.values()) != set(range(len(vocabulary))):
        raise ValueError(f"{where} must have ids 0 ... {len(vocabulary) - 1}, each once")
    if absent := [token for token in SPECIALS if token not in vocabulary]:
        raise ValueError(f"{where} lacks {', '.join(absent)}, no BERT vocabulary")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"WordPieceTokenizer: no file {path}")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"WordPieceTokenizer: {path} has more than {_MAX_FILE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"WordPieceTokenizer: {path} is not UTF-8 ({error})") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"WordPieceTokenizer: {path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"WordPieceTokenizer: {path} holds a {type(content).__name__}, must be an object")
    return content


def _read_text_vocabulary(path: Path) -> tuple[dict[str, int], dict]:
    tokens = _read_text(path).split("\n")  # not splitlines: tokens may be exotic line separators
    if tokens[-1] == "":
        tokens.pop()
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens, 1):
        if token in vocabulary:
            raise ValueError(f"WordPieceTokenizer: {path} line {number} repeats {token!r}")
        vocabulary[token] = number - 1
    return vocabulary, {}


def _read_json_vocabulary(path: Path) -> tuple[dict[str, int], dict]:
    content = _read_json(path)
    model, normalizer = content.get("model"), content.get("normalizer")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or model.get("type", "WordPiece") != "WordPiece":
        raise ValueError(f"WordPieceTokenizer: {path} holds no WordPiece model")
    if model.get("continuing_subword_prefix", "##") != "##":
        raise ValueError(f"WordPieceTokenizer: {path} continues words with "
                         f"{model['continuing_subword_prefix']!r}, must be '##'")
    if not all(type(i) is int for i in vocabulary.values()):
        raise ValueError(f"WordPieceTokenizer: {path} must map tokens to integer ids")
    normalizer = normalizer if isinstance(normalizer, dict) else {}
    return vocabulary, _known(normalizer, ("lowercase", "strip_accents", "handle_chinese_chars"))


def _known(content: dict, names: tuple[str, ...]) -> dict:
    """Arguments of the constructor from a settings file; entries of another type are left out."""
    ours = ("lowercase", "strip_accents", "chinese_characters")
    found = {mine: content[name] for mine, name in zip(ours, names, strict=False)
             if type(content.get(name)) is bool}
    length = content.get(names[3]) if len(names) > 3 else None
    # files say 1e30 for "no limit"
    return found | ({"max_length": length} if type(length) is int and 3 <= length <= 1 << 20 else {})
