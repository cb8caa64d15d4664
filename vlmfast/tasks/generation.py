"""How captions and translations are written alike: settings, a base of the tasks, words put together."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.wordpiece import WordPieceTokenizer
from .decoding import DecodingRules, Hypothesis, Reorder, Step, beam_search, sample
from .pair_inputs import evaluating


@dataclass(frozen=True)
class Generation:
    """Settings of decoding.

    Attributes:
        beams: hypotheses of beam search; 1 takes the most probable token each time. Not read when drawing.
        top_p: draw from the nucleus of this probability (1: from all tokens) instead of searching; None searches.
        temperature: logits are divided by it when drawing.
        length_penalty: of beam search, above 0 favours longer texts.
        max_tokens: most tokens of a text, its end counted.
        no_repeat_ngram: no sequence of this many tokens comes twice; 0 allows it.

    Raises:
        ValueError: a value is out of range.
    """

    beams: int = 5
    top_p: float | None = None
    temperature: float = 1.0
    length_penalty: float = 1.0
    max_tokens: int = 30
    no_repeat_ngram: int = 0

    def __post_init__(self):
        for name in ("beams", "max_tokens"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"Generation: {name} is {getattr(self, name)!r}, must be a positive integer")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Generation: top_p is {self.top_p!r}, must be above 0 and at most 1, or None")

    def write(self, step: Step, prompt: Tensor, state: Any, eos: int, suppress: tuple[int, ...] = (), *,
              reorder: Reorder | None = None, generator: torch.Generator | None = None) -> list[Hypothesis]:
        """The best text behind each row of `prompt`, or one drawn text; arguments as in `tasks.decoding`."""
        rules = DecodingRules(eos, self.max_tokens, no_repeat_ngram=self.no_repeat_ngram, suppress=suppress)
        if self.top_p is None:
            found = beam_search(step, prompt, state, rules, beams=self.beams, length_penalty=self.length_penalty,
                                reorder=reorder)
        else:
            found = sample(step, prompt, state, rules, temperature=self.temperature, top_p=self.top_p,
                           generator=generator, reorder=reorder)
        return [texts[0] for texts in found]


class TextWriter:
    """A model that writes texts. Base of the tasks.

    Args:
        model: one of `models`.
        generation: settings of decoding; a text is never longer than the model's positions.
        tokenizer: a `WordPieceTokenizer`; None takes `model.tokenizer`.
        batch_size: texts written at a time.

    Raises:
        TypeError: another model. ValueError: no tokenizer, or one with more tokens than the model.
    """

    models: tuple[type[nn.Module], ...] = ()

    def __init__(self, model: nn.Module, generation: Generation | None = None, *,
                 tokenizer: WordPieceTokenizer | None = None, batch_size: int = 32):
        self.name = type(self).__name__
        if not isinstance(model, self.models):
            kinds = " or ".join(kind.__name__ for kind in self.models)
            raise TypeError(f"{self.name}: model is {type(model).__name__}, must be {kinds}")
        self.model, self.tokenizer, self.batch_size = model, tokenizer or model.tokenizer, batch_size
        if self.tokenizer is None:
            raise ValueError(f"{self.name}: tokenizer is None and the model carries none, give one")
        if self.tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{self.name}: tokenizer has {self.tokenizer.vocab_size} tokens, the model only "
                             f"{model.config.vocab_size}")
        if batch_size < 1:
            raise ValueError(f"{self.name}: batch_size is {batch_size}, must be at least 1")
        generation = generation or Generation()
        room = model.config.max_position_embeddings - getattr(model.config, "len_vis_input", 0) - 2
        self.generation = replace(generation, max_tokens=min(generation.max_tokens, room))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def in_batches(self, rows: list, write: Callable[[list, torch.Generator | None], list[Hypothesis]],
                   generator: torch.Generator | None) -> list[Hypothesis]:
        """`write` of `batch_size` rows at a time, in evaluation mode."""
        with evaluating(self.model):
            return [text for i in range(0, len(rows), self.batch_size)
                    for text in write(rows[i : i + self.batch_size], generator)]

    def decode(self, step: Step, prompt: Tensor, state: Any, *, reorder: Reorder | None = None,
               generator: torch.Generator | None = None) -> list[Hypothesis]:
        """A text behind each row of `prompt` [B, 1] that ends by [SEP], without other special tokens."""
        tokens, vocabulary = self.tokenizer, self.model.config.vocab_size
        never = (tokens.pad, tokens.unk, tokens.cls, tokens.mask, *range(tokens.vocab_size, vocabulary))
        return self.generation.write(step, prompt, state, tokens.sep, never, reorder=reorder, generator=generator)

    def text(self, hypothesis: Hypothesis) -> str:
        text = self.tokenizer.decode(hypothesis.tokens)
        return join_words(text.removeprefix("##"))  # a text may begin inside a word


_BEFORE = re.compile(r" (?=[.,;:!?%)\]}…”’])")  # marks that stand close behind a word
_BEHIND = re.compile(r"(?<=[(\[{“‘$#]) ")  # and those that stand close in front of one
_INSIDE = re.compile(r"(?<=\w) ?(['’/-]) ?(?=\w)")
_NUMBER = re.compile(r"(?<=\d)([.,:]) (?=\d)")
_PAIRS = re.compile(r"(»|\"|„) ([^»«\"„“]*) («|\"|“)")


def join_words(text: str) -> str:
    """Undoes the spaces that WordPiece puts around marks: "a 1 - cent piece ( 0 , 01 $ ) ." is "a 1-cent piece (0,01
    $).". What was written with unusual spaces ("left - right") is not restored."""
    text = _BEHIND.sub("", _BEFORE.sub("", _PAIRS.sub(r"\1\2\3 ", text)))
    return _NUMBER.sub(r"\1", _INSIDE.sub(r"\1", text)).replace("  ", " ").strip()
