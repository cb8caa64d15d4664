"""DALL-E mini's tokenizer: BART's byte-pair encoding of lower-cased ASCII words.

Ids equal min-dalle's for text without emoji; what is not ASCII is dropped.
"""

import json
from collections.abc import Sequence
from pathlib import Path

SPACE = chr(ord(" ") + 256)  # how the published vocabulary writes the space before a word
UNKNOWN = "<unk>"
_FILES = "vocab.json", "merges.txt"


class BartTokenizer:
    """Text to token ids.

    Args:
        vocabulary: token -> id, with `<unk>`.
        merges: pairs of tokens in order of rank.
    """

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]):
        if UNKNOWN not in vocabulary:
            raise ValueError(f"BartTokenizer: vocabulary lacks {UNKNOWN}")
        self.vocabulary, self.merges = dict(vocabulary), [tuple(merge) for merge in merges]
        self._ranks = {merge: rank for rank, merge in enumerate(self.merges)}

    @classmethod
    def from_file(cls, folder: str | Path) -> "BartTokenizer":
        """Reads vocab.json and merges.txt of a folder.

        Raises:
            FileNotFoundError: one is missing. ValueError: one is damaged.
        """
        paths = [Path(folder) / name for name in _FILES]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"BartTokenizer: {path} does not exist")
        try:
            vocabulary = json.loads(paths[0].read_text(encoding="utf-8"))
            lines = paths[1].read_text(encoding="utf-8").splitlines()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"BartTokenizer: {folder} holds a damaged vocabulary ({error})") from error
        if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
            raise ValueError(f"BartTokenizer: {paths[0]} is no object of token ids")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"BartTokenizer: {paths[1]} has a line that is no pair of tokens")
        return cls(vocabulary, pairs)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without start and end."""
        words = text.lower().encode("ascii", errors="ignore").decode().split()
        return [self.vocabulary.get(part, self.vocabulary[UNKNOWN]) for word in words for part in self._parts(word)]

    @property
    def vocab_size(self) -> int:
        return max(self.vocabulary.values()) + 1

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json and merges.txt."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILES[0]).write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in self.merges)]
        (folder / _FILES[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _parts(self, word: str) -> list[str]:
        parts = [SPACE, *word]
        while len(parts) > 1:
            rank, at = min((self._ranks.get(pair, len(self._ranks)), i) for i, pair in
                           enumerate(zip(parts, parts[1:], strict=False)))
            if rank == len(self._ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts
