"""Texts as the token sequences of BERT-like models: any number of segments, with a place for the answer."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .pair_models import TaskHead


def lay_out(tokenizer, texts: Sequence[str | Sequence[str]], task_head: TaskHead | None, segments, most: int, *,
            cut_front: bool = False, slots: int = 0) -> dict[str, Tensor]:
    """`[CLS] first [SEP] second [SEP] ...` of B texts, padded to the longest.

    Args:
        tokenizer: has `encode`, and the ids `cls`, `sep`, `mask`, `unk`, `pad`.
        texts: B texts, or B sequences of their segments.
        task_head: the head that is asked, which tells where a [MASK] stands; None: plain.
        segments: number of segments -> their segment ids.
        most: tokens of a sequence, the special ones included; the longest segment loses tokens until it fits.
        cut_front: at its beginning instead of its end.
        slots: image slots and a [SEP] behind [CLS] (VD-BERT), not counted in `most`; they take no segment ids.

    Returns:
        input_ids [B, T], token_type_ids [B, T] (not with slots), text_lengths [B], all int64.

    Raises:
        ValueError: `most` leaves no room for a text.
    """
    layout = "plain" if task_head is None else task_head.text
    rows, types = [], []
    for text in texts:
        parts = (text,) if isinstance(text, str) else tuple(text)
        tail: list[int] = []
        if layout == "question_mask":  # the public loader drops the question's own mark and adds one
            parts = (re.sub(r"[\s?]+$", "", parts[0]), *parts[1:])
            tail = [*tokenizer.encode("?"), tokenizer.mask]
        ids = [tokenizer.encode(part) for part in parts]
        if layout == "answer_mask":
            ids.append([tokenizer.mask])
        room = most - 1 - len(ids) - len(tail)
        if room < len(ids):
            raise ValueError(f"max_tokens: is {most}, must be at least {1 + 2 * len(ids) + len(tail)}")
        ids = _cut(ids, room, cut_front)
        ids[0] = ids[0] + tail
        kinds = segments[len(ids)]
        head = [tokenizer.cls] + ([tokenizer.unk] * slots + [tokenizer.sep] if slots else [])
        rows.append(head + [token for part in ids for token in (*part, tokenizer.sep)])
        types.append([kinds[0]] * len(head) + [kind for kind, part in zip(kinds, ids, strict=True)
                                               for _ in range(len(part) + 1)])  # fmt: skip
    found = {"input_ids": _padded(rows, tokenizer.pad), "token_type_ids": _padded(types, 0),
             "text_lengths": torch.tensor([len(row) for row in rows])}
    if slots:
        del found["token_type_ids"]
    return found


def _cut(parts: list[list[int]], room: int, front: bool) -> list[list[int]]:
    """Token by token off the longest segment, the last of equal ones, as BERT's own code does."""
    sizes = [len(part) for part in parts]
    while sum(sizes) > room:
        longest = max(range(len(sizes)), key=lambda i: (sizes[i], i))
        sizes[longest] -= 1
    return [part[len(part) - size :] if front else part[:size] for part, size in zip(parts, sizes, strict=True)]


def _padded(rows: list[list[int]], value: int) -> Tensor:
    found = torch.full((len(rows), max(map(len, rows))), value)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    return found
