"""GLIDE's tokenizer: byte-level byte-pair encoding of GPT-2 (Radford et al. 2019), of lower-cased text.

A space belongs to the word behind it. Ids equal those of the public code.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from .bpe import Merge, byte_alphabet, read_text

END = "<|endoftext|>"
# English clitics, then letters, digits and other symbols with one space before them, then white space
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = regex.compile(PATTERN)
# ours and transformers', OpenAI's, OpenAI's as packed in the public code
_FILES = ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("encoder.json.gz", "vocab.bpe.gz")
_LEAST = 256 + 1  # bytes and the end


class GPT2Tokenizer:
    """Text to token ids.

    Args:
        vocabulary: token -> id, ids 0 ... V-1; `<|endoftext|>`, the greatest, also pads.
        merges: pairs of tokens in order of rank.

    Use :meth:`from_file` for published vocabularies and :meth:`train` for a small one of your own.
    """

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[Merge]):
        self.vocabulary, self.merges = dict(vocabulary), [tuple(merge) for merge in merges]
        _check(self.vocabulary, self.merges)
        self._bpe = Tokenizer(BPE(vocab=self.vocabulary, merges=self.merges))
        self._bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        code = {character: byte for byte, character in byte_alphabet().items()}
        self._bytes = {i: bytes(code[c] for c in token) for token, i in self.vocabulary.items() if token != END}

    @classmethod
    def from_file(cls, path: str | Path, merges: str | Path | None = None) -> "GPT2Tokenizer":
        """Reads a vocabulary.

        Args:
            path: a folder with vocab.json and merges.txt, or encoder.json and vocab.bpe, also packed as .gz; or the
                first of the two files.
            merges: the second file, where it does not lie beside the first under its usual name.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged or is no GPT-2 vocabulary.
        """
        path = Path(path)
        if path.is_dir():
            found = [pair for pair in _FILES if (path / pair[0]).is_file()]
            if not found:
                raise FileNotFoundError(f"GPT2Tokenizer: {path} has none of {', '.join(pair[0] for pair in _FILES)}")
            path = path / found[0][0]
        if merges is None:
            merges = path.with_name(dict(_FILES).get(path.name, _FILES[0][1]))
        try:
            vocabulary = json.loads(read_text(path, "GPT2Tokenizer"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"GPT2Tokenizer: {path} is not JSON ({error})") from error
        pairs = []
        for number, line in enumerate(read_text(Path(merges), "GPT2Tokenizer").split("\n"), 1):
            parts = line.split()
            if not parts or number == 1 and line.startswith("#version"):
                continue
            if len(parts) != 2:
                raise ValueError(f"GPT2Tokenizer: {merges} line {number}: a merge must be two tokens, got "
                                 f"{line[:60]!r}")
            pairs.append((parts[0], parts[1]))
        if not isinstance(vocabulary, dict):
            raise ValueError(f"GPT2Tokenizer: {path} holds a JSON {type(vocabulary).__name__}, must be an object")
        try:
            return cls(vocabulary, pairs)
        except ValueError as error:
            raise ValueError(f"{error} ({path})") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, min_frequency: int = 2) -> "GPT2Tokenizer":
        """Learns a vocabulary of at most `vocab_size` ids; equal captions in any order give the same one.

        Args:
            captions: texts.
            vocab_size: at least 257 (the bytes and the end). Fewer ids come out where the captions hold too few pairs
                that occur `min_frequency` times.

        Raises:
            ValueError: `vocab_size` is under 257. TypeError: a caption is not a string.
        """
        if type(vocab_size) is not int or vocab_size < _LEAST:
            raise ValueError(f"GPT2Tokenizer.train: vocab_size is {vocab_size!r}, must be an integer of at least "
                             f"{_LEAST}")
        if isinstance(captions, str):
            raise TypeError("GPT2Tokenizer.train: captions is one string, must be an iterable of strings")
        learner = Tokenizer(BPE())
        learner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = BpeTrainer(vocab_size=vocab_size - 1, min_frequency=min_frequency, show_progress=False,
                             initial_alphabet=ByteLevel.alphabet())
        learner.train_from_iterator((word for caption in captions for word in _words(caption)), trainer)
        merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
        tokens = dict.fromkeys([*byte_alphabet().values(), *(a + b for a, b in merges), END])
        return cls({token: i for i, token in enumerate(tokens)}, merges)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end included."""
        return len(self.vocabulary)

    @property
    def end_token(self) -> int:
        """The id that ends a text, and pads."""
        return len(self.vocabulary) - 1

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without end or padding; the empty text has none."""
        return self._bpe.encode(_words(text), is_pretokenized=True, add_special_tokens=False).ids

    def tokens_and_mask(self, text: str | Sequence[str], context: int,
                        truncate: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts as GLIDE reads them.

        Args:
            text: one text or B texts; the empty text is the one of guidance without text.
            context: N, positions of the model (`config.text_ctx`).
            truncate: cut a long text to N ids; False raises instead.

        Returns:
            tokens [B, N] int64 padded with `end_token`, mask [B, N] bool that is False at the padding.

        Raises:
            ValueError: a text is too long and `truncate` is False. TypeError: a text is not a string.
        """
        if type(context) is not int or context < 1:
            raise ValueError(f"GPT2Tokenizer: context is {context!r}, must be a positive integer")
        texts = [text] if isinstance(text, str) else list(text)
        tokens = torch.full((len(texts), context), self.end_token, dtype=torch.int64)
        mask = torch.zeros(len(texts), context, dtype=torch.bool)
        for i, one in enumerate(texts):
            ids = self.encode(one)
            if len(ids) > context and not truncate:
                raise ValueError(f"GPT2Tokenizer: text {i} ({one[:60]!r}) has {len(ids)} tokens, context is {context}; "
                                 "truncate=True cuts it")
            ids = ids[:context]
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[i, : len(ids)] = True
        return tokens, mask

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str | list[str]:
        """Lower-cased text of one id sequence, up to its first end; a [B, N] tensor gives B texts.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        rows = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        if rows and isinstance(rows[0], (list, tuple, torch.Tensor)):
            return [self.decode(row) for row in rows]
        data = b""
        for i in map(int, rows):
            if i == self.end_token:
                break
            if i not in self._bytes:
                raise ValueError(f"GPT2Tokenizer.decode: id {i} is outside 0 ... {self.end_token}")
            data += self._bytes[i]
        return data.decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json and merges.txt, and settings for transformers (which does not lower-case)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["#version: 0.2", *(" ".join(merge) for merge in self.merges)]
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False,
                    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END)}
        for name, content in ((_FILES[0][0], json.dumps(self.vocabulary, ensure_ascii=False)),
                              (_FILES[0][1], "\n".join(lines) + "\n"),
                              ("tokenizer_config.json", json.dumps(settings, indent=2) + "\n")):
            (folder / name).write_text(content, encoding="utf-8", newline="\n")

    def __eq__(self, other) -> bool:
        if not isinstance(other, GPT2Tokenizer):
            return NotImplemented
        return (self.vocabulary, self.merges) == (other.vocabulary, other.merges)

    __hash__ = None

    def __repr__(self) -> str:
        return f"GPT2Tokenizer(vocab_size={self.vocab_size})"


def has_gpt2_vocabulary(folder: Path) -> bool:
    """Whether a folder holds both files of a vocabulary."""
    return any(all((folder / name).is_file() for name in pair) for pair in _FILES)


def _words(text: str) -> list[str]:
    if not isinstance(text, str):
        raise TypeError(f"GPT2Tokenizer: a text is a {type(text).__name__}, must be a str")
    return _WORDS.findall(text.lower())


def _check(vocabulary: dict[str, int], merges: list[Merge]) -> None:
    if not vocabulary or not all(type(i) is int for i in vocabulary.values()):
        raise ValueError("GPT2Tokenizer: the vocabulary must map tokens to integer ids")
    if set(vocabulary.values()) != set(range(len(vocabulary))):
        raise ValueError(f"GPT2Tokenizer: ids must be 0 ... {len(vocabulary) - 1}, each once")
    if vocabulary.get(END) != len(vocabulary) - 1:
        raise ValueError(f"GPT2Tokenizer: {END} has id {vocabulary.get(END)}, must be the greatest, "
                         f"{len(vocabulary) - 1}")
    known = set(byte_alphabet().values())
    absent = [character for character in sorted(known) if character not in vocabulary]
    if absent:
        raise ValueError(f"GPT2Tokenizer: the vocabulary lacks the bytes {absent[:9]}")
    strange = next((token for token in vocabulary if token != END and not known.issuperset(token)), None)
    if strange is not None:
        raise ValueError(f"GPT2Tokenizer: token {strange!r} is no string of byte characters")
    for a, b in merges:
        for token in (a, b, a + b):
            if token not in vocabulary:
                raise ValueError(f"GPT2Tokenizer: merge {a} {b} needs {token!r}, which has no id")
