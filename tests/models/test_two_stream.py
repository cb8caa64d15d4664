"""What ViLBERT and LXMERT share: exactness of the packed path, pairs by index."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models.two_stream_helpers import inputs, rows_through, tiny_lxmert, tiny_vilbert, with_lengths

from vlmfast.layers.co_attention import BiAttention
from vlmfast.layers.streams import Pairs, Rows, Streams, co_attend, self_attend

# whole vectors, so that no activation computes the last numbers of a row another way
WHOLE = dict(intermediate_size=64, v_hidden_size=96, v_intermediate_size=96, bi_hidden_size=64)
MODELS = {
    "vilbert": lambda: tiny_vilbert(**WHOLE),
    "vilbert-gates": lambda: tiny_vilbert(dynamic_attention=True, **WHOLE),
    "vilbert-task": lambda: tiny_vilbert(task_specific_tokens=True, **WHOLE),
    "lxmert": lambda: tiny_lxmert(intermediate_size=64),
}
PAIRED = {
    "in-batch": (lambda: tiny_vilbert(in_batch_pairs=True), False),
    "in-batch-gates": (lambda: tiny_vilbert(in_batch_pairs=True, dynamic_attention=True), False),
    "in-batch-without-co": (lambda: tiny_vilbert(in_batch_pairs=True, with_coattention=False), False),
    "vilbert-one-text": (tiny_vilbert, True),
    "vilbert-one-text-gates": (lambda: tiny_vilbert(dynamic_attention=True, t_biattention_id=(1, 2),
                                                    v_biattention_id=(1, 2)), True),
    "lxmert-one-text": (tiny_lxmert, True),
    "lxmert-one-text-without-cross": (lambda: tiny_lxmert(x_layers=0), True),
}


def row_by_row(x, weight, bias=None):
    """F.linear whose rows do not depend on how many there are, which no BLAS promises."""
    rows = [torch.mv(weight, row.clone()) for row in x.flatten(0, -2).unbind()] if x.ndim > 1 else [weight @ x]
    out = torch.stack(rows).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def extra(model) -> dict:
    return {"task_ids": torch.arange(4)} if getattr(model.config, "task_specific_tokens", False) else {}


def one_of(given: dict, i: int) -> dict:
    """Example i alone, without its padding."""
    cut = {"image": int(given["image_mask"][i].sum()), "text": int(given["attention_mask"][i].sum())}
    return {name: value[i : i + 1, : cut["image" if name.startswith("image") else "text"]]
            for name, value in given.items()}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_padded_and_single_sample_agree_bit_for_bit_but_for_the_matrix_products(name):
    model = MODELS[name]()
    given, task = inputs(model), extra(model)
    counts = with_lengths(given)
    with mock.patch.object(F, "linear", row_by_row):
        packed, padded = model(**counts, **task), model(**counts, **task, output_attentions=True)
        masked = model(**given, **task)
        for field in ("text_hidden", "image_hidden"):
            assert torch.equal(getattr(packed, field), getattr(padded, field))
        for i in range(4):
            alone = one_of(given, i)
            with_mask = model(**alone, **{key: value[i : i + 1] for key, value in task.items()})
            plain = model(**{**alone, "attention_mask": None, "image_mask": None},
                          **{key: value[i : i + 1] for key, value in task.items()})
            for field in ("text_hidden", "image_hidden"):
                for single, batch in ((plain, packed), (with_mask, masked)):
                    rows = getattr(single, field)[0]
                    assert torch.equal(rows, getattr(batch, field)[i, : len(rows)]), (field, i)
            for head in ("vqa", "nsp", "matched"):
                if head in plain.logits:
                    assert torch.equal(plain.logits[head][0], packed.logits[head][i])


def test_attention_of_streams_is_exact_packed_padded_single_and_on_two_threads():
    lengths = torch.tensor([9, 0, 4]), torch.tensor([7, 5, 1])
    streams = [[torch.randn(3, s, 2, 12) for _ in range(3)] for s in (9, 7)]

    def live(x, n):
        return torch.cat([x[i, :k] for i, k in enumerate(n.tolist())])

    def layout(n):
        return Rows(lengths=n, offsets=F.pad(n.cumsum(0), (1, 0)).int())

    def run():
        padded = co_attend(*streams, *map(Rows, (None, None), lengths))[:2]
        packed = co_attend(*([live(x, n) for x in s] for s, n in zip(streams, lengths, strict=True)),
                           *map(layout, lengths))[:2]
        alone = [self_attend(*(x[2:, : n[2]] for x in s), Rows())[0] for s, n in zip(streams, lengths, strict=True)]
        own = [self_attend(*(live(x, n) for x in s), layout(n))[0] for s, n in zip(streams, lengths, strict=True)]
        return padded, packed, alone, own

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for padded, packed, alone, own in found:
        for i, n in enumerate(lengths):
            assert torch.equal(packed[i], live(padded[i], n))
            assert torch.equal(own[i][-int(n[2]):], alone[i][0])
    assert all(torch.equal(a, b) for one, two in zip(*found, strict=True) for a, b in zip(one, two, strict=True))


# Pairs by index


def paired_inputs(model, one_text: bool) -> dict:
    given = inputs(model)
    return {name: value if name.startswith("image") or not one_text else value[1:2] for name, value in given.items()}


def copies(monkeypatch):
    """From here on every pair gets copies of its states before the layer that joins them."""
    original = Streams.paired

    def paired(self, *arguments, **options):
        text, image, streams, pairs = original(self, *arguments, **options)
        if pairs is not None:
            at = pairs.index
            copied = Pairs(at, pairs.rows, pairs.packing)
            text, image = copied.packed(text[at[0]], image[at[1]])
        return text, image, streams, None

    monkeypatch.setattr(Streams, "paired", paired)


def result_and_gradients(model, given):
    torch.manual_seed(3)  # dropout too must not depend on the path
    model.zero_grad()
    given = {**given, "image_feat": given["image_feat"].clone().requires_grad_()}
    output = model(**given)
    (output.text_hidden.sin().sum() + output.image_hidden.sin().sum()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return output, {**gradients, "image_feat": given["image_feat"].grad}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("counts", [False, True], ids=["masks", "lengths"])
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_by_index_equal_copies(monkeypatch, name, counts, training):
    make, one_text = PAIRED[name]
    model = make().train(training)
    given = paired_inputs(model, one_text)
    given = with_lengths(given) if counts else given
    found, gradients = result_and_gradients(model, given)
    copies(monkeypatch)
    truth, expected = result_and_gradients(model, given)
    assert len(found.text_hidden) == (4 if one_text else 16)
    for field in ("text_hidden", "image_hidden"):
        torch.testing.assert_close(getattr(found, field), getattr(truth, field), rtol=0, atol=2e-5)
    assert gradients.keys() == expected.keys() and "image_feat" in gradients
    largest = max(value.norm() for value in expected.values())
    for key, value in expected.items():  # key biases have gradient 0 up to rounding
        assert (gradients[key] - value).norm() < 2e-5 * value.norm() + 1e-6 * largest, key


@torch.no_grad()
def test_pairs_by_index_give_the_attention_maps_of_copies(monkeypatch):
    model = tiny_vilbert(in_batch_pairs=True)
    given = inputs(model)
    found = model(**given, output_attentions=True)
    copies(monkeypatch)
    truth = model(**given, output_attentions=True)
    for name in ("text_to_image", "image_to_text"):
        for mine, other in zip(getattr(found, name), getattr(truth, name), strict=True):
            assert mine.shape[0] == 16
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)


def test_first_co_layer_projects_every_example_once():
    model = tiny_vilbert(in_batch_pairs=True)
    given = inputs(model)
    seen = {}
    for k, layer in enumerate(model.bert.encoder.c_layer):
        for name in ("query1", "value2"):
            getattr(layer.biattention, name).register_forward_hook(
                lambda _, args, __, key=(k, name): seen.update({key: args[0].shape[:-1].numel()}))
    model(**given)
    assert seen == {(0, "query1"): 4 * 7, (0, "value2"): 4 * 9, (1, "query1"): 16 * 7, (1, "value2"): 16 * 9}
    model(**with_lengths(given))  # 22 regions and 30 tokens exist, each four times in the pairs
    assert seen == {(0, "query1"): 4 * 7, (0, "value2"): 4 * 9, (1, "query1"): 4 * 22, (1, "value2"): 4 * 30}


@pytest.mark.parametrize("make, name", [(tiny_vilbert, "v_embeddings.image_embeddings"),
                                        (tiny_lxmert, "encoder.visn_fc.visn_fc")], ids=["vilbert", "lxmert"])
def test_only_regions_that_exist_are_embedded(make, name):
    model, seen = make(), []
    model.bert.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1]))
    given = inputs(model)
    model(**given)
    model(**with_lengths(given))
    assert seen == [(4, 7), (22,)]


def test_layers_before_the_pairing_are_packed_too():
    model = tiny_vilbert(in_batch_pairs=True)
    given = inputs(model)
    assert rows_through(model, with_lengths(given)) == {30, 4 * 30, 4 * 22}
    lxmert = tiny_lxmert()
    one = {name: value if name.startswith("image") else value[1:2] for name, value in inputs(lxmert).items()}
    assert rows_through(lxmert, with_lengths(one)) == {8, 22, 4 * 8}


def test_pairs_reach_the_layer_by_index():
    layer = BiAttention(32, 24, 24, 2, 0.0, 0.0)
    text, image = torch.randn(2, 5, 32), torch.randn(3, 4, 24)
    index = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 2])
    rows = Rows(lengths=torch.tensor([5, 2])), Rows(lengths=torch.tensor([1, 4, 3]))
    found = layer(text, image, Rows(), Rows(), pairs=Pairs(index, rows))
    copied = layer(text[index[0]], image[index[1]], rows[0].take(index[0]), rows[1].take(index[1]))
    for mine, other in zip(found[:2], copied[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)
