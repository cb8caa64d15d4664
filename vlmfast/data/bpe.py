"""Byte-pair encoding as CLIP uses it: the byte alphabet, the training of merges and the reading of vocabulary files.

Papers: Sennrich et al. 2016 (arXiv:1508.07909); byte alphabet from GPT-2 (Radford et al. 2019).
"""

import gzip
import heapq
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

END_OF_WORD = "</w>"
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
OPENAI_MERGES = 48894
MAX_FILE_BYTES = 64 << 20

Merge = tuple[str, str]


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[int, str]:
    """byte -> printable character, in vocabulary order: the 188 printable bytes as themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(rest)}


def to_symbols(word: str) -> tuple[str, ...]:
    """A word as its byte characters, the last one marked as the word's end."""
    characters = [byte_alphabet()[b] for b in word.encode("utf-8")]
    return (*characters[:-1], characters[-1] + END_OF_WORD)


def build_vocabulary(merges: Iterable[Merge]) -> dict[str, int]:
    """256 bytes, 256 bytes ending a word, merges, SOT, EOT; CLIP's text pooling relies on EOT as the greatest id."""
    alphabet = list(byte_alphabet().values())
    tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *(a + b for a, b in merges)]
    tokens = list(dict.fromkeys(tokens))  # two merges may spell the same token
    return {token: i for i, token in enumerate([*tokens, SOT, EOT])}


def train_merges(words: Counter[str], count: int, min_frequency: int = 2) -> list[Merge]:
    """Merges that give up to `count` new tokens; ties go to the lexicographically smallest pair, so runs agree."""
    symbols = [list(to_symbols(word)) for word in words]
    frequency = list(words.values())
    pairs: Counter[Merge] = Counter()
    where: dict[Merge, set[int]] = defaultdict(set)
    for i, word in enumerate(symbols):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += frequency[i]
            where[pair].add(i)

    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges: list[Merge] = []
    tokens: set[str] = set()
    while heap and len(tokens) < count:
        negative, best = heapq.heappop(heap)
        if -negative != pairs[best]:  # stale: pushed again below when its count changed
            continue
        if -negative < min_frequency:
            break
        merges.append(best)
        tokens.add(best[0] + best[1])
        changed: set[Merge] = set()
        for i in where.pop(best):
            old = symbols[i]
            new = apply_merge(old, best)
            for pair in zip(old, old[1:], strict=False):
                pairs[pair] -= frequency[i]
                changed.add(pair)
            for pair in zip(new, new[1:], strict=False):
                pairs[pair] += frequency[i]
                where[pair].add(i)
                changed.add(pair)
            symbols[i] = new
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            else:
                del pairs[pair]
    return merges


def apply_merge(symbols: list[str], merge: Merge) -> list[str]:
    """Every non-overlapping occurrence of the pair joined, left to right."""
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == merge:
            joined.append(merge[0] + merge[1])
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return joined


def read_vocabulary(path: str | Path, merges: str | Path | None = None) -> tuple[dict[str, int], list[Merge]]:
    """Reads a vocabulary in any of CLIP's public layouts.

    Args:
        path: `bpe_simple_vocab_16e6.txt(.gz)`; a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json`;
            or one of those files.
        merges: `merges.txt`, where it does not lie beside `vocab.json`.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged or is no CLIP vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "vocab.json" if (path / "vocab.json").is_file() else path / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"CLIPTokenizer: {path.parent} has neither vocab.json nor tokenizer.json")
    if path.name == "tokenizer.json":
        vocabulary, pairs = _read_tokenizer_json(path)
    elif path.suffix == ".json":
        beside = Path(merges) if merges is not None else path.with_name("merges.txt")
        vocabulary = _read_json(path)
        pairs = _parse_merges(beside, read_text(beside).splitlines()[1:])
    else:
        pairs = _parse_merges(path, read_text(path).split("\n")[1 : OPENAI_MERGES + 1])
        vocabulary = build_vocabulary(pairs)
    _check_vocabulary(path, vocabulary, pairs)
    return vocabulary, pairs


def read_text(path: Path, owner: str = "CLIPTokenizer") -> str:
    """A vocabulary file of at most MAX_FILE_BYTES, perhaps gzipped; errors begin with `owner`.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: no file {path}")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        return data.decode("utf-8")
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{owner}: cannot read {path}: {error}") from error


def _read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"CLIPTokenizer: {path} is not JSON: {error}") from error


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[Merge]]:
    content = _read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list) or "vocab" not in model:
        raise ValueError(f"CLIPTokenizer: {path} holds no BPE model")
    if model.get("end_of_word_suffix") != END_OF_WORD:
        raise ValueError(
            f"CLIPTokenizer: {path} marks word ends with {model.get('end_of_word_suffix')!r}, must be {END_OF_WORD!r}"
        )
    return model["vocab"], _parse_merges(path, model["merges"])


def _parse_merges(path: Path, lines: Iterable[str | list[str]]) -> list[Merge]:
    pairs: list[Merge] = []
    for number, line in enumerate(lines, 2):
        parts = line.split() if isinstance(line, str) else line
        if not parts:
            continue
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"CLIPTokenizer: {path} line {number}: a merge must be two tokens, got {str(line)[:60]!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _check_vocabulary(path: Path, vocabulary: dict[str, int], merges: list[Merge]) -> None:
    if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
        raise ValueError(f"CLIPTokenizer: {path} must map tokens to integer ids")
    if set(vocabulary.values()) != set(range(len(vocabulary))):
        raise ValueError(f"CLIPTokenizer: ids in {path} must be 0 ... {len(vocabulary) - 1}, each once")
    alphabet = byte_alphabet().values()
    for token in [SOT, EOT, *alphabet, *(c + END_OF_WORD for c in alphabet)]:
        if token not in vocabulary:
            raise ValueError(f"CLIPTokenizer: {path} lacks the token {token!r}")
    known = set(alphabet)
    for token in vocabulary:
        if token not in (SOT, EOT) and not known.issuperset(token.removesuffix(END_OF_WORD)):
            raise ValueError(f"CLIPTokenizer: token {token!r} in {path} is no string of byte characters")
    if vocabulary[EOT] != len(vocabulary) - 1:
        raise ValueError(
            f"CLIPTokenizer: {EOT} has id {vocabulary[EOT]} in {path}, must be the greatest ({len(vocabulary) - 1}): "
            "the text feature is read at the greatest id"
        )
    for a, b in merges:
        for token in (a, b, a + b):
            if token not in vocabulary:
                raise ValueError(f"CLIPTokenizer: merge {a} {b} in {path} needs {token!r}, which has no id")
