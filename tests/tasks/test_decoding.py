"""Decoding against exhaustive search over a toy model, its rules, and models with state."""

import itertools
import math

import pytest
import torch

from vlmfast.tasks.decoding import DecodingRules, beam_search, forbid, greedy, mask_step, sample, select_rows, truncate

VOCABULARY, EOS, START = 4, 3, 0


class ToyModel:
    """Logits that depend on the last two tokens and on a state per row; counts the rows it computes."""

    def __init__(self, rows=3, vocabulary=VOCABULARY, seed=0, scale=2.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(rows, vocabulary, vocabulary, vocabulary, generator=generator)
        self.rows = []

    @property
    def state(self):
        return {"table": torch.arange(len(self.table)), "seen": None}

    def __call__(self, tokens, state):
        assert len(state["table"]) == len(tokens)
        self.rows.append(len(tokens))
        before = tokens[:, -2] if tokens.shape[1] > 1 else tokens[:, -1]
        seen = tokens[:, -1:] if state["seen"] is None else torch.cat([state["seen"], tokens[:, -1:]], 1)
        assert torch.equal(seen, tokens)  # the state follows its hypothesis through every branch
        return self.table[state["table"], before, tokens[:, -1]], {"table": state["table"], "seen": seen}

    def log_probability(self, row, tokens):
        total, context = 0.0, [START]
        for token in tokens:
            before = context[-2] if len(context) > 1 else context[-1]
            total += self.table[row, before, context[-1]].log_softmax(0)[token].item()
            context.append(token)
        return total


def prompt(rows=3):
    return torch.full((rows, 1), START)


def all_texts(max_length):
    """(tokens with eos, whether it ends) of every text up to the length."""
    words = [token for token in range(VOCABULARY) if token != EOS]
    for length in range(max_length):
        for text in itertools.product(words, repeat=length):
            yield [*text, EOS], True
    for text in itertools.product(words, repeat=max_length):
        yield list(text), False


def repeats(tokens, size):
    ngrams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(ngrams)) < len(ngrams)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.7, 2.0])
@pytest.mark.parametrize("rules", [{}, {"min_length": 2}, {"no_repeat_ngram": 2}, {"suppress": (1,)}])
def test_wide_beam_equals_exhaustive_search(penalty, rules):
    model, length = ToyModel(), 4
    found = beam_search(model, prompt(), model.state, DecodingRules(EOS, length, **rules), beams=200, best=5,
                        length_penalty=penalty)  # fmt: skip
    for row in range(3):
        scored = []
        for tokens, finished in all_texts(length):
            text = tokens[:-1] if finished else tokens
            if finished and len(text) < rules.get("min_length", 0) or set(text) & set(rules.get("suppress", ())):
                continue
            if rules.get("no_repeat_ngram") and repeats(text, rules["no_repeat_ngram"]):
                continue
            total = model.log_probability(row, tokens)
            scored.append((total / len(tokens) ** penalty, total, tuple(text), finished))
        scored.sort(reverse=True)
        assert [(h.tokens, h.finished) for h in found[row]] == [(text, end) for _, _, text, end in scored[:5]]
        for ours, (score, total, *_) in zip(found[row], scored, strict=False):
            assert ours.score == pytest.approx(score, abs=1e-5)
            assert ours.log_probability == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_equals_greedy(seed):
    model = ToyModel(rows=8, seed=seed)
    rules = DecodingRules(EOS, 7, min_length=1)
    beams = beam_search(model, prompt(8), model.state, rules, beams=1, length_penalty=0.0)
    assert [(h.tokens, h.finished) for [h] in beams] == [
        (h.tokens, h.finished) for h in greedy(model, prompt(8), model.state, rules)
    ]


def test_wider_beams_do_not_score_worse():
    model = ToyModel(rows=16, seed=3)
    rules = DecodingRules(EOS, 5)
    best = [
        torch.tensor([h.score for [h] in beam_search(model, prompt(16), model.state, rules, beams=beams)]).mean()
        for beams in (1, 3, 300)
    ]
    assert best[0] < best[1] <= best[2]


def test_beams_return_n_best_without_repeats_and_stop_early():
    rules = DecodingRules(EOS, 8)
    model = ToyModel(rows=4, seed=1)
    found = beam_search(model, prompt(4), model.state, rules, beams=4, best=4)
    for row, hypotheses in enumerate(found):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True) and len({h.tokens for h in hypotheses}) == len(hypotheses) == 4
        for h in hypotheses:
            tokens = [*h.tokens, EOS] if h.finished else h.tokens
            assert h.log_probability == pytest.approx(model.log_probability(row, tokens), abs=1e-5)
            assert h.score == pytest.approx(h.log_probability / len(tokens), abs=1e-6)
    steps = len(model.rows)
    model.rows.clear()
    early = beam_search(model, prompt(4), model.state, rules, beams=4, best=4, early_stopping=True)
    assert len(model.rows) <= steps and sum(model.rows) < 4 * 4 * steps
    assert all(a[0].score <= b[0].score + 1e-6 for a, b in zip(early, found, strict=True))


class Countdown:
    """Row i is certain of token 1 for i steps, then of the end."""

    def __init__(self, rows):
        self.state = torch.arange(rows)[:, None]
        self.computed = []

    def __call__(self, tokens, state):
        self.computed.append(len(tokens))
        logits = torch.full((len(tokens), VOCABULARY), -30.0)
        left = state[:, 0] - (tokens.shape[1] - 1)
        logits[torch.arange(len(tokens)), torch.where(left > 0, 1, EOS)] = 30.0
        return logits, state


@pytest.mark.parametrize("decode", [greedy, sample, beam_search])
def test_every_prompt_finishes_by_itself(decode):
    model = Countdown(4)
    options = {"beams": 2} if decode is beam_search else {}
    found = decode(model, prompt(4), model.state, DecodingRules(EOS, 10), **options)
    found = found if decode is greedy else [row[0] for row in found]
    assert [h.tokens for h in found] == [(), (1,), (1, 1), (1, 1, 1)]
    assert all(h.finished and h.log_probability == pytest.approx(0, abs=1e-6) for h in found)
    if decode is not beam_search:
        assert model.computed == [4, 3, 2, 1]  # rows that ended are not computed


def test_a_prompt_goes_on_while_a_longer_text_can_win():
    # ending at once has probability .4, going on .35 and is certain afterwards
    def step(tokens, state):
        first = torch.tensor([0.25, 0.35, 1e-9, 0.4]).log()
        later = torch.tensor([1e-9, 1.0, 1e-9, 1e-9]).log()
        return (first if tokens.shape[1] == 1 else later).expand(len(tokens), -1), state

    def best(**options):
        return beam_search(step, prompt(1), None, DecodingRules(EOS, 5), beams=1, **options)[0][0]

    assert best().tokens == (1,) * 5 and best().score == pytest.approx(math.log(0.35) / 5, abs=1e-5)
    assert best(early_stopping=True).tokens == () and best(length_penalty=0.0).tokens == ()
    assert best(length_penalty=-1.0).score == pytest.approx(math.log(0.4), abs=1e-6)


def test_a_negative_penalty_still_looks_one_token_ahead():
    # two texts are put aside, the second a poor one, while a likely text ends one token later
    following = {(): [1e-9, 0.5, 0.2, 0.3], (1,): [1e-9, 1.0, 1e-9, 1e-9], (2,): [1e-9, 1e-9, 1e-9, 1.0]}

    def step(tokens, state):
        end = [1e-9, 1e-9, 1e-9, 1.0]
        return torch.tensor([following.get(tuple(row[1:]), end) for row in tokens.tolist()]).log(), state

    found = beam_search(step, prompt(1), None, DecodingRules(EOS, 8), beams=2, best=2, length_penalty=-1.0)[0]
    assert [h.tokens for h in found] == [(), (1, 1)]
    assert found[1].score == pytest.approx(3 * math.log(0.5), abs=1e-5)


def test_beam_rows_of_done_prompts_are_not_computed():
    model = Countdown(3)
    beam_search(model, prompt(3), model.state, DecodingRules(EOS, 10), beams=2, early_stopping=True)
    assert model.computed[0] == 3 and model.computed[-1] < 6


def test_greedy_keeps_the_rules():
    def step(tokens, state):
        return torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(len(tokens), -1), state

    def text(**rules):
        return greedy(step, prompt(1), None, DecodingRules(EOS, 6, **rules))[0]

    assert text().tokens == (1,) * 6 and not text().finished
    assert text(suppress=(1,)).tokens == (2,) * 6
    assert text(no_repeat_ngram=1).tokens == (1, 2) and text(no_repeat_ngram=1).finished
    assert text(no_repeat_ngram=1, min_length=3).tokens == (1, 2, 0)
    assert text(no_repeat_ngram=2).tokens == (1, 1, 2, 1) and text(no_repeat_ngram=2).finished
    assert not repeats(text(no_repeat_ngram=3).tokens, 3)


def test_scores_are_the_models_whatever_the_rules():
    model = ToyModel()
    found = greedy(model, prompt(), model.state, DecodingRules(EOS, 5, suppress=(1,)))
    for row, h in enumerate(found):
        tokens = [*h.tokens, EOS] if h.finished else h.tokens
        assert h.score == h.log_probability == pytest.approx(model.log_probability(row, tokens), abs=1e-5)


@pytest.mark.parametrize("decode", [greedy, sample, beam_search])
def test_a_text_ends_where_every_token_is_forbidden(decode):
    model = ToyModel(rows=2)
    rules = DecodingRules(EOS, 9, min_length=8, no_repeat_ngram=1, suppress=(2,))
    found = decode(model, prompt(2), model.state, rules)
    found = found if decode is greedy else [row[0] for row in found]
    assert all(sorted(h.tokens) == [0, 1] and not h.finished and math.isfinite(h.score) for h in found)


def test_an_empty_batch_gives_no_texts():
    model = ToyModel(rows=0)
    empty = torch.zeros(0, 1, dtype=torch.long)
    assert beam_search(model, empty, model.state, DecodingRules(EOS)) == []
    assert greedy(model, empty, model.state, DecodingRules(EOS)) == []


def test_truncation_keeps_the_nucleus():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    assert truncate(logits, top_k=2).isfinite().tolist() == [[False, True, False, True]]
    assert truncate(logits, top_p=0.5).isfinite().tolist() == [[False, True, False, False]]
    assert truncate(logits, top_p=0.51).isfinite().tolist() == [[False, True, False, True]]
    assert truncate(logits, top_p=0.8).isfinite().tolist() == [[False, True, True, True]]
    assert truncate(logits, top_p=1e-9).isfinite().sum() == 1
    assert torch.equal(truncate(logits), logits)
    tied = torch.zeros(1, 4)
    assert truncate(tied, top_k=2).isfinite().tolist() == [[True, True, False, False]]


def test_samples_follow_the_distribution_and_the_generator():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()

    def step(tokens, state):
        return logits.expand(len(tokens), -1), state

    def draw(seed=0, **options):
        rules = DecodingRules(EOS, 1)
        rows = sample(step, prompt(1), None, rules, samples=20_000, generator=torch.Generator().manual_seed(seed),
                      **options)[0]  # fmt: skip
        tokens = torch.tensor([h.tokens[0] if h.tokens else EOS for h in rows])
        return torch.bincount(tokens, minlength=4) / len(tokens), rows

    share, rows = draw()
    torch.testing.assert_close(share, logits.exp(), atol=0.015, rtol=0)  # three standard errors are .011
    for h in rows[:50]:
        assert h.log_probability == pytest.approx(logits[h.tokens[0] if h.tokens else EOS].item(), abs=1e-6)
    assert draw()[1] == rows and draw(1)[1] != rows
    torch.testing.assert_close(draw(temperature=0.5)[0], (2 * logits).softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(draw(top_k=2)[0], torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.015, rtol=0)
    torch.testing.assert_close(draw(top_p=0.8)[0], torch.tensor([0, 5, 1.5, 2.5]) / 9, atol=0.015, rtol=0)


def test_samples_come_per_prompt():
    model = ToyModel(rows=2)
    found = sample(model, prompt(2), model.state, DecodingRules(EOS, 4), samples=3)
    assert [len(row) for row in found] == [3, 3]
    for row, hypotheses in enumerate(found):
        for h in hypotheses:
            tokens = [*h.tokens, EOS] if h.finished else h.tokens
            assert h.log_probability == pytest.approx(model.log_probability(row, tokens), abs=1e-5)


def test_mask_step_appends_one_mask_and_replaces_it():
    mask, seen = 9, []

    def predict(tokens, state):
        seen.append(tokens[0].tolist())
        logits = torch.zeros(len(tokens), 10)
        logits[:, {2: 5, 3: 7, 4: EOS}[tokens.shape[1]]] = 9.0
        return logits, state

    found = greedy(mask_step(predict, mask), torch.tensor([[START]]), None, DecodingRules(EOS, 8, suppress=(mask,)))
    assert found[0].tokens == (5, 7) and found[0].finished
    assert seen == [[START, mask], [START, 5, mask], [START, 5, 7, mask]]


def test_state_rows_are_selected_in_containers():
    rows = torch.tensor([1, 1, 0])
    state = {"a": torch.tensor([[1.0], [2.0]]), "b": [(torch.tensor([3, 4]), None)]}
    taken = select_rows(state, rows)
    assert taken["a"].tolist() == [[2], [2], [1]] and taken["b"][0][0].tolist() == [4, 4, 3]
    assert isinstance(taken["b"], list) and taken["b"][0][1] is None
    with pytest.raises(TypeError, match="state holds a str"):
        select_rows(["text"], rows)


def test_custom_reorder_is_used():
    model = ToyModel()

    def step(tokens, state):
        logits, new = model(tokens, {"table": state.table, "seen": None if state.seen is None else state.seen})
        return logits, Custom(new["table"], new["seen"])

    class Custom:
        def __init__(self, table, seen):
            self.table, self.seen = table, seen

    def reorder(state, rows):
        return Custom(state.table[rows], None if state.seen is None else state.seen[rows])

    rules = DecodingRules(EOS, 5)
    ours = beam_search(step, prompt(), Custom(torch.arange(3), None), rules, beams=3, reorder=reorder)
    assert ours == beam_search(model, prompt(), model.state, rules, beams=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 3, "min_length": 3}, "min_length is 3, must be 0 ... 2"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"suppress": (EOS,)}, "eos is 3, must be a token that is not suppressed"),
    ],
)
def test_rules_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DecodingRules(EOS, **options)


def test_arguments_and_logits_are_checked():
    model, rules = ToyModel(), DecodingRules(EOS)
    with pytest.raises(ValueError, match=r"prompt is \[3\] torch.int64, must be \[B, T0\] int64"):
        greedy(model, torch.zeros(3, dtype=torch.long), model.state, rules)
    with pytest.raises(ValueError, match="best is 4, must be 1 ... 3"):
        beam_search(model, prompt(), model.state, rules, beams=3, best=4)
    for options, message in (({"temperature": 0.0}, "temperature is 0.0"), ({"top_p": 0.0}, "top_p is 0.0"),
                             ({"top_k": -1}, "top_k is -1"), ({"samples": 0}, "samples is 0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sample(model, prompt(), model.state, rules, **options)
    with pytest.raises(ValueError, match=r"logits \[1, 4\], must be \[3, V\]"):
        greedy(lambda tokens, state: (torch.zeros(1, 4), state), prompt(), None, rules)
    with pytest.raises(ValueError, match="hold NaN"):
        beam_search(lambda tokens, state: (torch.full((len(tokens), 4), math.nan), state), prompt(), None, rules)
    with pytest.raises(ValueError, match="token 7 is not below the 4"):
        forbid(torch.zeros(1, 4), torch.zeros(1, 0, dtype=torch.long), DecodingRules(7))
