"""The task sampler, dynamic stop-and-go and tasks on a shared trunk."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmfast.objectives import MultiTask, StopAndGo, Task, TaskSampler

SIZES = {"vqa": 800, "nlvr": 100, "ve": 100}


def shares(sampler, draws=4000):
    found = list(itertools.islice(sampler, draws))
    return {name: found.count(name) / draws for name in sampler.sizes}


def test_proportional_follows_the_sizes():
    sampler = TaskSampler(SIZES)
    assert sampler.probabilities() == pytest.approx({"vqa": 0.8, "nlvr": 0.1, "ve": 0.1})
    assert shares(sampler) == pytest.approx({"vqa": 0.8, "nlvr": 0.1, "ve": 0.1}, abs=0.03)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_temperature_flattens_the_sizes(temperature):
    sampler = TaskSampler(SIZES, "temperature", temperature=temperature)
    powers = {name: size ** (1 / temperature) for name, size in SIZES.items()}
    assert sampler.probabilities() == pytest.approx({n: p / sum(powers.values()) for n, p in powers.items()})


def test_annealed_goes_from_the_sizes_to_nearly_equal():
    sampler = TaskSampler(SIZES, "annealed", total_steps=11)
    for step, power in ((0, 1.0), (5, 0.6), (10, 0.2), (50, 0.2)):
        powers = {name: size**power for name, size in SIZES.items()}
        assert sampler.probabilities(step) == pytest.approx({n: p / sum(powers.values()) for n, p in powers.items()})


def test_round_robin_takes_turns():
    assert list(itertools.islice(TaskSampler(SIZES, "round_robin"), 7)) == ["vqa", "nlvr", "ve"] * 2 + ["vqa"]


def test_the_sampler_resumes_where_it_stopped():
    sampler = TaskSampler(SIZES, "annealed", total_steps=40, seed=3)
    start = list(itertools.islice(sampler, 10))
    state = sampler.state_dict()
    rest = list(itertools.islice(sampler, 20))
    other = TaskSampler(SIZES, "annealed", total_steps=40, seed=9)
    other.load_state_dict(state)
    assert list(itertools.islice(other, 20)) == rest
    again = TaskSampler(SIZES, "annealed", total_steps=40, seed=3)
    assert list(itertools.islice(again, 30)) == start + rest


@pytest.mark.parametrize("arguments, message", [
    (({},), "sizes are {}, must be positive"), (({"a": 0},), "sizes are {'a': 0}"),
    ((SIZES, "random"), "strategy is 'random', must be one of proportional"),
    ((SIZES, "annealed"), "total_steps is None, must be at least 1"),
])
def test_the_sampler_names_bad_input(arguments, message):
    with pytest.raises(ValueError, match=f"TaskSampler: {message}"):
        TaskSampler(*arguments)
    with pytest.raises(ValueError, match="temperature is 0"):
        TaskSampler(SIZES, "temperature", temperature=0)


def test_a_task_stops_after_two_checks_without_gain_and_goes_on_when_it_falls():
    dynamic = StopAndGo(["vqa", "ve"], cooldown=0)
    assert [dynamic.update("vqa", score) for score in (50.0, 60.0, 60.05)] == [False] * 3  # +.05 is less than .1 %
    assert dynamic.update("vqa", 60.02)  # the second check without gain
    assert [step for step in range(10) if dynamic.runs("vqa", step)] == [0, 4, 8]
    assert dynamic.active(3) == ["ve"] and dynamic.active(4) == ["vqa", "ve"]
    assert dynamic.update("vqa", 59.8)  # within .5 % of the best
    assert not dynamic.update("vqa", 59.6)
    assert dynamic.active(3) == ["vqa", "ve"]
    assert not dynamic.update("vqa", 59.9) and dynamic.update("vqa", 59.9)


def test_stop_and_go_waits_after_a_change_and_forgets_on_reset():
    dynamic = StopAndGo(["a"])
    for score in (1.0, 1.0, 1.0):
        stopped = dynamic.update("a", score)
    assert stopped and not dynamic.update("a", 0.9)  # falls: goes on, one check of grace
    assert [dynamic.update("a", 0.9) for _ in range(3)] == [False, False, True]
    calm = StopAndGo(["a"])
    calm.update("a", 1.0), calm.update("a", 1.0)
    calm.reset()
    assert not calm.update("a", 1.0) and calm.update("a", 1.0)
    negative = StopAndGo(["a"], cooldown=0)
    assert [negative.update("a", -x) for x in (4.0, 3.0, 2.0, 2.0, 2.0)] == [False, False, False, False, True]


def test_stop_and_go_is_saved_whole():
    dynamic = StopAndGo(["a", "b"])
    for score in (1.0, 1.0, 1.0):
        dynamic.update("a", score)
    other = StopAndGo(["a", "b"])
    other.load_state_dict(dynamic.state_dict())
    assert other.tasks == dynamic.tasks and other.active(1) == ["b"]
    with pytest.raises(ValueError, match=r"the state has tasks \['a', 'b'\], must have \['a'\]"):
        StopAndGo(["a"]).load_state_dict(dynamic.state_dict())
    with pytest.raises(ValueError, match="unknown task 'c', must be one of a, b"):
        dynamic.update("c", 1.0)
    with pytest.raises(ValueError, match="gap is 0"):
        StopAndGo(["a"], gap=0)


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.answer = nn.Linear(4, 6), nn.Linear(6, 3)

    def available(self):
        return ("vqa",)

    def forward(self, x, heads=None):
        pooled = self.inner(x)
        return types.SimpleNamespace(pooled=pooled, logits={"vqa": self.answer(pooled)} if "vqa" in heads else {})


def test_tasks_share_the_trunk_and_have_their_own_heads_and_weights():
    trunk = Trunk()
    tasks = {"vqa": Task(F.cross_entropy, head_name="vqa", weight=0.5),
             "score": Task(lambda z, y: (z[:, 0] - y).abs().mean(), head=nn.Linear(6, 1))}
    model = MultiTask(trunk, tasks)
    x, classes, scores = torch.randn(5, 4), torch.randint(3, (5,)), torch.randn(5)
    truth = 0.5 * F.cross_entropy(trunk.answer(trunk.inner(x)), classes)
    torch.testing.assert_close(model("vqa", {"x": x}, classes), truth)
    loss = model("score", {"x": x}, scores)
    torch.testing.assert_close(loss, (tasks["score"].head(trunk.inner(x))[:, 0] - scores).abs().mean())
    loss.backward()
    assert trunk.inner.weight.grad.any() and trunk.answer.weight.grad is None
    assert model.heads["score"].weight.grad.any()
    assert {"trunk.inner.weight", "heads.score.weight"} <= dict(model.named_parameters()).keys()
    with pytest.raises(ValueError, match="unknown task 'nlvr', must be one of vqa, score"):
        model("nlvr", {"x": x}, classes)
    with pytest.raises(ValueError, match="task 'a' must have one of head and head_name"):
        MultiTask(trunk, {"a": Task(F.cross_entropy)})
    with pytest.raises(ValueError, match="task 'a' has head_name 'itm', the trunk has vqa"):
        MultiTask(trunk, {"a": Task(F.cross_entropy, head_name="itm")})
