"""CLIP's tokenizer: lower-cased byte-level byte-pair encoding.

Paper: CLIP (Radford et al. 2021, arXiv:2103.00020), section 2.4. Ids equal those of the published tokenizer.
"""

import html
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import regex
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from .bpe import END_OF_WORD, EOT, SOT, Merge, build_vocabulary, byte_alphabet, read_vocabulary, train_merges

CONTEXT_LENGTH = 77
# the special tokens, English clitics, letter runs, single digits, runs of other symbols
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# words are split here and not in `tokenizers`, whose Unicode tables differ from those of `regex` in newer letters
_WORDS = regex.compile(PATTERN, regex.IGNORECASE)
_SPACES = regex.compile(r"\s+")
_BYTES_OUTSIDE_VOCABULARY = 512 + 2  # the byte tokens and the two specials


def clean_text(text: str) -> str:
    """Mends mojibake and HTML entities, collapses white space, lower-cases: what CLIP does before it splits words."""
    # printable ASCII without entities is what ftfy and unescape leave alone, at a hundredth of their cost
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACES.sub(" ", text.strip()).strip().lower()


class CLIPTokenizer:
    """Text to CLIP token ids.

    Args:
        vocabulary: token -> id, ids 0 ... V-1, `<|endoftext|>` the greatest.
        merges: pairs of tokens in order of rank.
        context_length: tokens in a sequence, the two specials included.

    Use :meth:`from_file` for published vocabularies and :meth:`train` for a small one of your own.
    """

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[Merge], context_length: int = CONTEXT_LENGTH):
        self.vocabulary = dict(vocabulary)
        self.merges = [tuple(merge) for merge in merges]
        self.context_length = _check_context_length(context_length)
        self.sot = self.vocabulary[SOT]
        self.eot = self.vocabulary[EOT]
        self._bpe = Tokenizer(BPE(vocab=self.vocabulary, merges=self.merges, end_of_word_suffix=END_OF_WORD))
        self._bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        code = {character: byte for byte, character in byte_alphabet().items()}
        self._bytes: dict[int, bytes] = {}
        for token, i in self.vocabulary.items():
            if token not in (SOT, EOT):
                stem = token.removesuffix(END_OF_WORD)
                self._bytes[i] = bytes(code[c] for c in stem) + (b" " if token != stem else b"")

    @classmethod
    def from_file(
        cls, path: str | Path, merges: str | Path | None = None, context_length: int | None = None
    ) -> "CLIPTokenizer":
        """Reads `bpe_simple_vocab_16e6.txt.gz`, or a Hugging Face folder or its files.

        Args:
            path: the published merges file; a folder with vocab.json and merges.txt, or with tokenizer.json; or one of
                those files.
            merges: merges.txt, where it does not lie beside vocab.json.
            context_length: None takes `model_max_length` of a tokenizer_config.json beside the files, else 77.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged or is no CLIP vocabulary.
        """
        vocabulary, pairs = read_vocabulary(path, merges)
        if context_length is None:
            folder = Path(path) if Path(path).is_dir() else Path(path).parent
            context_length = _model_max_length(folder / "tokenizer_config.json") or CONTEXT_LENGTH
        return cls(vocabulary, pairs, context_length)

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, context_length: int = CONTEXT_LENGTH, min_frequency: int = 2
    ) -> "CLIPTokenizer":
        """Learns a vocabulary of at most `vocab_size` ids; equal captions in any order give the same one.

        Args:
            captions: texts, cleaned as in use.
            vocab_size: at least 514 (the byte tokens and the specials). Fewer ids come out where the captions hold
                too few pairs that occur `min_frequency` times.

        Raises:
            ValueError: `vocab_size` is under 514. TypeError: a caption is not a string.
        """
        if vocab_size < _BYTES_OUTSIDE_VOCABULARY:
            raise ValueError(
                f"CLIPTokenizer.train: vocab_size is {vocab_size}, must be at least {_BYTES_OUTSIDE_VOCABULARY}"
            )
        if isinstance(captions, str):
            raise TypeError("CLIPTokenizer.train: captions is one string, must be an iterable of strings")
        words: Counter[str] = Counter()
        for i, caption in enumerate(captions):
            _check_text(caption, i)
            words.update(_WORDS.findall(clean_text(caption)))
        for special in (SOT, EOT):
            del words[special]
        merges = train_merges(words, vocab_size - _BYTES_OUTSIDE_VOCABULARY, min_frequency)
        return cls(build_vocabulary(merges), merges, context_length)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the specials included."""
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without SOT, EOT or padding."""
        _check_text(text, 0)
        words = _WORDS.findall(clean_text(text))
        if SOT not in words and EOT not in words:
            return self._word_ids(words)
        # as in the published tokenizer, a special token spelled out as a word of its own is that token
        ids: list[int] = []
        for word in words:
            ids += [self.vocabulary[word]] if word in (SOT, EOT) else self._word_ids([word])
        return ids

    def _word_ids(self, words: list[str]) -> list[int]:
        return self._bpe.encode(words, is_pretokenized=True, add_special_tokens=False).ids

    def __call__(
        self, texts: str | Sequence[str], context_length: int | None = None, truncate: bool = True
    ) -> torch.Tensor:
        """`[SOT ... EOT]`, then zeros.

        Args:
            texts: one text or B texts.
            context_length: T; None takes the tokenizer's own.
            truncate: cut a long text to T ids, the last of them EOT; False raises instead.

        Returns:
            [B, T] int64.

        Raises:
            ValueError: a text is too long and `truncate` is False. TypeError: a text is not a string.
        """
        length = self.context_length if context_length is None else _check_context_length(context_length)
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for i, text in enumerate(texts):
            _check_text(text, i)
            ids = [self.sot, *self.encode(text), self.eot]
            if len(ids) > length:
                if not truncate:
                    raise ValueError(
                        f"CLIPTokenizer: text {i} ({text[:60]!r}) has {len(ids)} tokens, context_length is {length}"
                    )
                ids = [*ids[: length - 1], self.eot]
            tokens[i, : len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str | list[str]:
        """Cleaned text of one id sequence, up to its first EOT; a [B, T] tensor gives B texts.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        rows = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        if rows and isinstance(rows[0], (list, tuple, torch.Tensor)):
            return [self.decode(row) for row in rows]
        data = b""
        for token in rows:
            i = int(token)
            if i == self.eot:
                break
            if i != self.sot:
                if i not in self._bytes:
                    raise ValueError(f"CLIPTokenizer.decode: id {i} is outside 0 ... {self.vocab_size - 1}")
                data += self._bytes[i]
        return data.decode("utf-8", errors="replace").strip()

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json, merges.txt and their two settings files as Hugging Face reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        specials = {"bos_token": SOT, "eos_token": EOT, "pad_token": EOT, "unk_token": EOT}
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            "do_lower_case": True,
            "errors": "replace",
            **specials,
        }
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]
        _write(folder / "vocab.json", json.dumps(self.vocabulary, ensure_ascii=False))
        _write(folder / "merges.txt", "\n".join(lines) + "\n")
        _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        _write(folder / "special_tokens_map.json", json.dumps(specials, indent=2) + "\n")

    def __eq__(self, other) -> bool:
        if not isinstance(other, CLIPTokenizer):
            return NotImplemented
        mine = (self.vocabulary, self.merges, self.context_length)
        return mine == (other.vocabulary, other.merges, other.context_length)

    __hash__ = None

    def __repr__(self) -> str:
        return f"CLIPTokenizer(vocab_size={self.vocab_size}, context_length={self.context_length})"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _check_text(text: str, i: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"CLIPTokenizer: text {i} is {type(text).__name__}, must be str")


def _check_context_length(length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"CLIPTokenizer: context_length is {length!r}, must be an integer of at least 2")
    return length


def _model_max_length(path: Path) -> int | None:
    try:
        length = json.loads(path.read_text(encoding="utf-8")).get("model_max_length")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    # some published files say 1e30 for "no limit"
    return length if type(length) is int and 2 <= length <= 1 << 20 else None
