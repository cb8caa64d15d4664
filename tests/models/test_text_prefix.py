"""UNITER with the sequence-to-sequence mask."""

import pytest
import torch
from models.single_stream_helpers import inputs, tiny

from vlmfast.objectives import Pretraining
from vlmfast.objectives.batch import PretrainingBatch


def given_of(model):
    given = inputs(model)
    given["text_lengths"], given["num_regions"] = (given.pop(name).sum(1) for name in ("attention_mask", "image_mask"))
    return given


@torch.no_grad()
def test_text_behind_the_prefix_is_causal_and_unseen_by_the_rest():
    model = tiny("uniter").eval()
    given, prefix = given_of(model), torch.tensor([0, 3, 2, 5])
    wanted = model(**given, prefix_lengths=prefix)
    changed = dict(given, input_ids=given["input_ids"].clone())
    at = 5
    changed["input_ids"][:, at] = (changed["input_ids"][:, at] + 1) % 90 + 1
    found = model(**changed, prefix_lengths=prefix)
    torch.testing.assert_close(found.text_hidden[:, :at], wanted.text_hidden[:, :at], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.image_hidden, wanted.image_hidden, rtol=0, atol=1e-5)
    assert (found.text_hidden[:, at] - wanted.text_hidden[:, at]).abs().amax(-1).min() > 1e-2
    # inside the prefix all see all
    changed["input_ids"] = given["input_ids"].clone()
    changed["input_ids"][3, 4] = changed["input_ids"][3, 4] % 90 + 1
    found = model(**changed, prefix_lengths=prefix)
    assert (found.text_hidden[3, 0] - wanted.text_hidden[3, 0]).abs().max() > 1e-3
    assert (found.image_hidden[3, 0] - wanted.image_hidden[3, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_prefix_of_the_whole_text_is_no_mask():
    model = tiny("uniter").eval()
    given = given_of(model)
    whole = model(**given, prefix_lengths=torch.full((4,), 9)).hidden
    torch.testing.assert_close(whole, model(**given).hidden, rtol=0, atol=1e-5)


def test_it_takes_the_seq2seq_objective_and_wrong_prefixes_are_named():
    model = tiny("uniter")
    given = given_of(model)
    batch = PretrainingBatch(**given, prefix_lengths=torch.zeros(4, dtype=torch.long))
    assert torch.isfinite(Pretraining(["seq2seq"], mask_id=4, random_ids=(5, 97))(model, batch).total)
    with pytest.raises(ValueError, match="prefix_lengths: runs from 0 to 10"):
        model(**given, prefix_lengths=torch.tensor([0, 1, 2, 10]))
