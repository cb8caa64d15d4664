"""Autoregressive decoding of any model: greedy, beam search and sampling over one function that scores the next token.

The model is a function `step(tokens, state) -> (logits, state)`:
    tokens: [N, T] int64, everything so far, the prompt included; a model with a cache reads the last column only.
    state: whatever the model needs (picture features, caches): None, a tensor with N rows, or tuples, lists and dicts
        of such. Rows of it are repeated and reordered as hypotheses branch; other states need a `reorder` function.
    logits: [N, V] floating point, of the token that follows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Reorder = Callable[[Any, Tensor], Any]


@dataclass(frozen=True)
class DecodingRules:
    """When a text ends and what it may not contain.

    Attributes:
        eos: token that ends a text.
        max_length: most tokens to generate, `eos` counted.
        min_length: fewest tokens before `eos`.
        no_repeat_ngram: no sequence of this many generated tokens comes twice; 0 allows it.
        suppress: tokens that are never generated, such as [PAD] and [MASK].
    """

    eos: int
    max_length: int = 20
    min_length: int = 0
    no_repeat_ngram: int = 0
    suppress: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "suppress", tuple(self.suppress))
        if self.max_length < 1:
            raise ValueError(f"DecodingRules: max_length is {self.max_length}, must be positive")
        if not 0 <= self.min_length < self.max_length:
            raise ValueError(f"DecodingRules: min_length is {self.min_length}, must be 0 ... {self.max_length - 1}")
        if self.no_repeat_ngram < 0:
            raise ValueError(f"DecodingRules: no_repeat_ngram is {self.no_repeat_ngram}, must not be negative")
        if self.eos < 0 or self.eos in self.suppress:
            raise ValueError(f"DecodingRules: eos is {self.eos}, must be a token that is not suppressed")


@dataclass(frozen=True)
class Hypothesis:
    """One generated text.

    Attributes:
        tokens: what was generated, without prompt and `eos`.
        log_probability: of these tokens, and of `eos` where `finished`, under the model itself: without temperature,
            truncation or rules.
        score: what beam search ranks by, log_probability / length ** length_penalty with `eos` counted; the
            log_probability itself elsewhere.
        finished: whether it ended by `eos` rather than by `max_length` or because every token was forbidden.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    finished: bool


@torch.no_grad()
def greedy(
    step: Step, prompt: Tensor, state: Any, rules: DecodingRules, *, reorder: Reorder | None = None
) -> list[Hypothesis]:
    """The most probable token each time.

    Args:
        step: the model, see the module.
        prompt: [B, T0] int64, T0 >= 1.
        state: of B rows.
        rules: see :class:`DecodingRules`.
        reorder: `reorder(state, rows)` takes `rows` [M] int64 of the state; None handles tensors and containers.

    Returns:
        B hypotheses. Rows that ended are not computed further.

    Raises:
        ValueError: `prompt` or the logits have another shape, or the logits hold NaN.
    """
    return [drawn for [drawn] in _draw(step, prompt, state, rules, reorder, 1, lambda log_p: log_p.argmax(1))]


@torch.no_grad()
def sample(
    step: Step,
    prompt: Tensor,
    state: Any,
    rules: DecodingRules,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples: int = 1,
    generator: torch.Generator | None = None,
    reorder: Reorder | None = None,
) -> list[list[Hypothesis]]:
    """Draws texts.

    Args:
        step, prompt, state, rules, reorder: as in :func:`greedy`.
        temperature: logits are divided by it, must be positive.
        top_k: draw among the k most probable tokens only; 0 takes all.
        top_p: draw among the fewest most probable tokens that together reach this probability (nucleus sampling),
            after temperature and `top_k`.
        samples: texts per prompt.
        generator: on the prompt's device; None takes torch's.

    Returns:
        B lists of `samples` hypotheses, in the order drawn.

    Paper: The Curious Case of Neural Text Degeneration (Holtzman et al. 2020, arXiv:1904.09751).
    """
    if not temperature > 0:
        raise ValueError(f"sample: temperature is {temperature}, must be positive")
    if top_k < 0:
        raise ValueError(f"sample: top_k is {top_k}, must not be negative")
    if not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p is {top_p}, must be above 0 and at most 1")
    if samples < 1:
        raise ValueError(f"sample: samples is {samples}, must be positive")

    def choose(log_p: Tensor) -> Tensor:
        kept = truncate(log_p / temperature, top_k, top_p)
        dead = ~kept.isfinite().any(1)  # every token forbidden: the caller ends the row whatever is drawn
        weights = kept.masked_fill(dead[:, None], 0.0).softmax(1)
        return torch.multinomial(weights, 1, generator=generator)[:, 0]

    return _draw(step, prompt, state, rules, reorder, samples, choose)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [N, V] with -inf outside the k most probable tokens and outside the nucleus; one token is always left."""
    if top_k and top_k < logits.shape[1]:
        ranked = logits.sort(dim=1, descending=True, stable=True)[1]
        logits = logits.scatter(1, ranked[:, top_k:], -math.inf)
    if top_p < 1.0:
        values, ranked = logits.sort(dim=1, descending=True, stable=True)
        probability = values.softmax(1)
        before = probability.cumsum(1) - probability
        beyond = before >= top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, ranked, beyond), -math.inf)
    return logits


@torch.no_grad()
def beam_search(
    step: Step,
    prompt: Tensor,
    state: Any,
    rules: DecodingRules,
    *,
    beams: int = 5,
    best: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    reorder: Reorder | None = None,
) -> list[list[Hypothesis]]:
    """The texts of highest score among those that `beams` hypotheses a prompt lead to.

    Each step keeps the `beams` most probable continuations; a continuation by `eos` that is among them is put aside.
    A prompt is done, and not computed further, when no open hypothesis can score better than the worst of `beams`
    texts put aside; hypotheses still open at `max_length` compete as they are. One beam equals :func:`greedy`.

    Args:
        step, prompt, state, rules, reorder: as in :func:`greedy`.
        beams: open hypotheses per prompt.
        best: texts returned per prompt, at most `beams`.
        length_penalty: a in log_probability / length ** a; above 0 favours longer texts, 0 ranks by probability.
        early_stopping: a prompt is done as soon as `beams` texts are put aside.

    Returns:
        B lists of up to `best` hypotheses, best first; fewer where the rules leave fewer texts.

    Raises:
        ValueError: `best` over `beams`, or as in :func:`greedy`.
    """
    if not 1 <= best <= beams:
        raise ValueError(f"beam_search: best is {best}, must be 1 ... {beams}, the number of beams")
    search = _Beams(_checked_prompt(prompt), rules, beams, length_penalty, early_stopping)
    reorder = reorder or select_rows
    while len(search.items):
        logits, state = step(search.rows(), state)
        rows = search.advance(_log_probabilities(logits, search.rows()))
        if len(search.items):
            state = reorder(state, rows)
    return [found[:best] for found in search.results()]


class _Beams:
    """Open hypotheses of the prompts that are not done, and the texts put aside.

    Attributes:
        items: numbers of the prompts that are not done, A of them.
        tokens: [A, K, T0 + t]; totals: [A, K] float64 log-probabilities, -inf for an empty beam; K is 1 at first.
    """

    def __init__(self, prompt: Tensor, rules: DecodingRules, beams: int, penalty: float, early: bool):
        self.prompt_length = prompt.shape[1]
        self.rules, self.beams, self.penalty, self.early = rules, beams, penalty, early
        self.items = list(range(len(prompt)))
        self.tokens = prompt[:, None]
        self.totals = torch.zeros(len(prompt), 1, dtype=torch.float64, device=prompt.device)
        self.aside: list[list[Hypothesis]] = [[] for _ in range(len(prompt))]

    def rows(self) -> Tensor:
        return self.tokens.flatten(0, 1)

    def results(self) -> list[list[Hypothesis]]:
        return [sorted(found, key=lambda h: -h.score) for found in self.aside]

    def advance(self, log_p: Tensor) -> Tensor:
        """One token further; returns which row of the last step each open hypothesis continues."""
        count, width, length = self.tokens.shape
        length += 1 - self.prompt_length
        log_p = forbid(log_p, self.rows()[:, self.prompt_length :], self.rules)
        vocabulary = log_p.shape[1]
        totals = (self.totals.flatten()[:, None] + log_p.double()).view(count, width * vocabulary)
        # twice as many: up to `beams` of the best may end here
        values, places = totals.topk(min(2 * self.beams, width * vocabulary), dim=1)
        origin, token = places // vocabulary, places % vocabulary
        ends = (token == self.rules.eos) & values.isfinite()
        in_time = torch.arange(values.shape[1], device=values.device) < self.beams
        self._put_aside(ends & in_time, values, origin, length)
        values = values.masked_fill(token == self.rules.eos, -math.inf)
        # a stable sort keeps the order of equal totals, so that one beam equals greedy
        order = values.sort(dim=1, descending=True, stable=True)[1][:, : self.beams]
        values, origin, token = (part.gather(1, order) for part in (values, origin, token))
        last_tokens, last_totals = self.tokens, self.totals
        kept = last_tokens.gather(1, origin[..., None].expand(-1, -1, last_tokens.shape[2]))
        self.tokens, self.totals = torch.cat([kept, token[..., None]], 2), values
        going = [i for i in range(count) if not self._done(i, length, last_tokens[i], last_totals[i])]
        self.items = [self.items[i] for i in going]
        index = torch.tensor(going, dtype=torch.long, device=values.device)
        self.tokens, self.totals = self.tokens[index], self.totals[index]
        return (index[:, None] * width + origin[index]).flatten()

    def _put_aside(self, ends: Tensor, values: Tensor, origin: Tensor, length: int) -> None:
        for i, rank in ends.nonzero().tolist():
            tokens = self.tokens[i, origin[i, rank], self.prompt_length :].tolist()
            self._add(i, tokens, values[i, rank].item(), length, True)

    def _add(self, i: int, tokens: Sequence[int], total: float, length: int, finished: bool) -> None:
        found = self.aside[self.items[i]]
        found.append(Hypothesis(tuple(tokens), total, total / length**self.penalty, finished))
        if len(found) > self.beams:
            found.remove(min(found, key=lambda h: h.score))

    def _done(self, i: int, length: int, last_tokens: Tensor, last_totals: Tensor) -> bool:
        found = self.aside[self.items[i]]
        alive = self.totals[i].isfinite()
        if not alive.any():
            if not found:  # the rules forbid every token: what there was is the text
                for tokens, total in zip(last_tokens, last_totals.tolist(), strict=True):
                    if math.isfinite(total):
                        self._add(i, tokens[self.prompt_length :].tolist(), total, max(length - 1, 1), False)
            return True
        if length == self.rules.max_length:
            for tokens, total in zip(self.tokens[i][alive], self.totals[i][alive].tolist(), strict=True):
                self._add(i, tokens[self.prompt_length :].tolist(), total, length, False)
            return True
        if len(found) < self.beams:
            return False
        # log-probabilities only fall, so a hypothesis scores best at the length that divides by most
        longest = self.rules.max_length if self.penalty > 0 else length + 1
        reachable = self.totals[i].max().item() / longest**self.penalty
        return self.early or min(h.score for h in found) >= reachable


def mask_step(predict: Step, mask: int) -> Step:
    """A step for models that write by filling in [MASK] (OSCAR, UNITER and VD-BERT captioners).

    The text so far is followed by one [MASK]; the word predicted there replaces it. `predict(tokens, state)` gets
    [N, T + 1] tokens that end in `mask`, with the attention of its training (rows see what is before them, and the
    picture), and returns logits [N, V] of the last position. A cached state may hold all positions but the last two:
    at the last real token the previous call saw [MASK] still.

    Paper: Unified Vision-Language Pre-Training (Zhou et al. 2020, arXiv:1909.11059), section 3.3.
    """

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return predict(torch.cat([tokens, tokens.new_full((len(tokens), 1), mask)], 1), state)

    return step


def select_rows(state: Any, rows: Tensor) -> Any:
    """`rows` of every tensor in nested tuples, lists and dicts; None stays.

    Raises:
        TypeError: something else is in the state.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.index_select(0, rows.to(state.device))
    if isinstance(state, dict):
        return {key: select_rows(value, rows) for key, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(select_rows(value, rows) for value in state))
    if isinstance(state, (tuple, list)):
        return type(state)(select_rows(value, rows) for value in state)
    raise TypeError(f"state holds a {type(state).__name__}, must be tensors in tuples, lists and dicts; pass reorder")


def forbid(log_p: Tensor, generated: Tensor, rules: DecodingRules) -> Tensor:
    """Log-probabilities [N, V] with -inf where the rules forbid a token after `generated` [N, t]."""
    rows, length = generated.shape
    highest = max(rules.eos, *rules.suppress, 0)
    if highest >= log_p.shape[1]:
        raise ValueError(f"DecodingRules: token {highest} is not below the {log_p.shape[1]} of the logits")
    banned = torch.zeros_like(log_p, dtype=torch.bool)
    if rules.suppress:
        banned[:, list(rules.suppress)] = True
    if length < rules.min_length:
        banned[:, rules.eos] = True
    size = rules.no_repeat_ngram
    if 0 < size <= length:
        for i, tokens in enumerate(generated.tolist()):
            ending = tokens[length - size + 1 :]
            for at in range(length - size + 1):
                if tokens[at : at + size - 1] == ending:
                    banned[i, tokens[at + size - 1]] = True
    return log_p.masked_fill(banned, -math.inf)


def _draw(
    step: Step, prompt: Tensor, state: Any, rules: DecodingRules, reorder: Reorder | None, copies: int, choose
) -> list[list[Hypothesis]]:
    start = _checked_prompt(prompt).shape[1]
    reorder = reorder or select_rows
    tokens = prompt.repeat_interleave(copies, 0)
    if copies > 1:
        state = reorder(state, torch.arange(len(prompt), device=prompt.device).repeat_interleave(copies))
    totals = torch.zeros(len(tokens), dtype=torch.float64, device=prompt.device)
    places = list(range(len(tokens)))
    done: dict[int, Hypothesis] = {}
    while places:
        logits, state = step(tokens, state)
        log_p = _log_probabilities(logits, tokens)
        allowed = forbid(log_p, tokens[:, start:], rules)
        token = choose(allowed)
        chosen = allowed.gather(1, token[:, None])[:, 0]
        stuck = chosen == -math.inf
        totals = totals + chosen.masked_fill(stuck, 0.0).double()
        ended = token.eq(rules.eos) & ~stuck
        longer = torch.cat([tokens, token[:, None]], 1)
        full = longer.shape[1] - start == rules.max_length
        for i, (is_stuck, is_end) in enumerate(zip(stuck.tolist(), ended.tolist(), strict=True)):
            if is_stuck or is_end or full:
                text = (tokens if is_stuck or is_end else longer)[i, start:].tolist()
                done[places[i]] = Hypothesis(tuple(text), totals[i].item(), totals[i].item(), is_end)
        going = [i for i in range(len(places)) if places[i] not in done]
        if going and len(going) < len(places):
            rows = torch.tensor(going, device=tokens.device)
            longer, totals, state = longer[rows], totals[rows], reorder(state, rows)
        tokens, places = longer, [places[i] for i in going]
    return [[done[i * copies + k] for k in range(copies)] for i in range(len(prompt))]


def _checked_prompt(prompt: Tensor) -> Tensor:
    if prompt.ndim != 2 or prompt.shape[1] < 1 or prompt.dtype != torch.long:
        raise ValueError(f"prompt is {list(prompt.shape)} {prompt.dtype}, must be [B, T0] int64 with T0 >= 1")
    return prompt


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    if logits.ndim != 2 or len(logits) != len(tokens):
        raise ValueError(f"step returned logits {list(logits.shape)}, must be [{len(tokens)}, V]")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    if log_p.isnan().any():
        raise ValueError("step returned logits that hold NaN or +infinity, or only -infinity")
    return log_p
