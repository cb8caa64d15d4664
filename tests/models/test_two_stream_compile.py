"""ViLBERT and LXMERT under torch.compile: one graph, the same numbers and gradients."""

import shutil

import pytest
import torch
from models.two_stream_helpers import inputs, tiny_lxmert, tiny_vilbert, with_lengths

MODELS = {
    "vilbert": tiny_vilbert,
    "vilbert-gates": lambda: tiny_vilbert(dynamic_attention=True),
    "vilbert-pairs": lambda: tiny_vilbert(in_batch_pairs=True),
    "lxmert": tiny_lxmert,
}


@pytest.mark.slow
@pytest.mark.parametrize("counts", [False, True], ids=["masks", "lengths"])
@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph_forward_and_backward(name, counts):
    model = MODELS[name]()
    compiled = check_compiled(model, counts, backend="aot_eager")
    other = inputs(model, batch=3, tokens=8, regions=6)
    other = with_lengths(other) if counts else other
    torch.testing.assert_close(compiled(**other).text_hidden, model(**other).text_hidden, rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make, counts", [(tiny_vilbert, True), (tiny_lxmert, False)],
                         ids=["vilbert-lengths", "lxmert-masks"])
def test_compiles_with_inductor(make, counts):
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler, and neither g++ nor clang++ is there")
    check_compiled(make(), counts, backend="inductor")


def check_compiled(model, counts: bool, backend: str):
    given = inputs(model)
    given = with_lengths(given) if counts else given
    names = [name for name in model.available() if name != "binary"]
    torch._dynamo.reset()

    def step(**given):
        return model(**given, heads=tuple(names))

    def run(step):
        model.zero_grad()
        output = step(**given)
        scores = {name: value.clamp(min=-100).sin() for name, value in output.logits.items()}
        (output.text_hidden.sin().sum() + sum(value.sum() for value in scores.values())).backward()
        return output, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    truth, expected = run(step)
    expected = {name: value.clone() for name, value in expected.items()}
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found, gradients = run(compiled)
    # padded rows are part of the loss here, and where they are known both paths leave them 0
    for field in ("text_hidden", "image_hidden"):
        torch.testing.assert_close(getattr(found, field), getattr(truth, field), rtol=0, atol=5e-5)
    assert found.logits.keys() == truth.logits.keys() and gradients.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (gradients[name] - value).norm() < 1e-4 * value.norm() + 1e-5 * largest, name
    return compiled
