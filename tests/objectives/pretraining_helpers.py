"""A model that answers with stored scores and remembers its calls, and batches for it and for real models."""

import math
import sys
import types
from pathlib import Path

import torch
from torch import nn

from vlmfast.objectives import PretrainingBatch

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))

B, T, R, F, C, V = 4, 9, 6, 5, 7, 97
MASK = 3
SHAPES = {"mlm": (T, V), "lm": (T, V), "itm": (2,), "mrc": (R, C), "mrfr": (R, F), "nsp": (2,), "matched": (2,),
          "obj": (R, C), "attr": (R, 4), "feat": (R, F), "image": (R, C)}


class Puppet(nn.Module):
    """Scores are parameters [3 B, ...], of which a batch takes the first rows."""

    def __init__(self, *heads, width=8, image_width=None):
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=V)
        self.heads = heads
        self.scores = nn.ParameterDict({name: torch.randn(3 * B, *SHAPES[name], dtype=torch.float64)
                                        for name in heads})
        self.text = nn.Parameter(torch.randn(3 * B, T, width, dtype=torch.float64))
        self.image = nn.Parameter(torch.randn(3 * B, R, image_width or width, dtype=torch.float64))
        self.calls = []

    def available(self):
        return self.heads

    def answer(self, given, heads):
        self.calls.append(types.SimpleNamespace(**given, heads=heads))
        size = len(next(x for x in given.values() if x is not None))
        return types.SimpleNamespace(logits={name: self.scores[name][:size] for name in heads},
                                     text_hidden=self.text[:size], image_hidden=self.image[:size])

    def forward(self, input_ids: torch.Tensor | None = None, image_feat=None, image_loc=None, token_type_ids=None,
                attention_mask=None, image_mask=None, *, text_lengths=None, num_regions=None, image_masked=None,
                heads=None):
        return self.answer(dict(input_ids=input_ids, image_feat=image_feat, image_loc=image_loc,
                                text_lengths=text_lengths, num_regions=num_regions, image_masked=image_masked), heads)


class CausalPuppet(Puppet):
    def forward(self, input_ids, image_feat=None, image_loc=None, *, text_lengths=None, num_regions=None,
                prefix_lengths=None, heads=None):
        return self.answer(dict(input_ids=input_ids, prefix_lengths=prefix_lengths), heads)


class DecoderPuppet(Puppet):
    def forward(self, input_ids, image_feat=None, image_loc=None, *, text_lengths=None, num_regions=None,
                decoder_input_ids=None, heads=None):
        return self.answer(dict(input_ids=input_ids, decoder_input_ids=decoder_input_ids), heads)


class ViLBERT(Puppet):
    """The same under a class name that `models.HEADS` has."""


class LXMERT(Puppet):
    """Likewise."""


def puppet_batch(**changes) -> PretrainingBatch:
    lengths, counts = torch.tensor([9, 7, 9, 4]), torch.tensor([6, 5, 3, 6])
    corner = torch.rand(B, R, 2)
    fields = dict(
        input_ids=torch.randint(10, V, (B, T)), image_feat=torch.randn(B, R, F, dtype=torch.float64),
        image_loc=torch.cat([corner, corner + torch.rand(B, R, 2), torch.rand(B, R, 1)], dim=-1),
        text_lengths=lengths, num_regions=counts, special=torch.arange(T).expand(B, T) == 0,
        words=torch.arange(T).expand(B, T) // 2, region_probs=torch.rand(B, R, C, dtype=torch.float64).softmax(-1),
        region_classes=torch.randint(C, (B, R)), region_confidence=torch.rand(B, R),
        region_attributes=torch.randint(4, (B, R)), attribute_confidence=torch.rand(B, R),
        next_sentence=torch.tensor([True, False, True, True]),
    )
    return PretrainingBatch(**{**fields, **changes})


def negative_log(logits, index):
    return -logits.log_softmax(-1)[..., index]


def assert_rate(count: int, total: int, rate: float):
    """Within 5 standard errors of a binomial share."""
    assert abs(count / total - rate) < 5 * math.sqrt(rate * (1 - rate) / total), (count / total, rate)


def real(kind, **overrides):
    from two_stream_helpers import inputs, tiny_lxmert, tiny_vilbert, with_lengths

    model = {"ViLBERT": tiny_vilbert, "LXMERT": tiny_lxmert}[kind](**overrides)
    given = with_lengths(inputs(model))
    classes = model.config.v_target_size if kind == "ViLBERT" else model.config.num_object_labels
    batch = PretrainingBatch(
        **given, special=torch.arange(9).expand(4, 9) == 0, words=torch.arange(9).expand(4, 9) // 2,
        next_sentence=torch.tensor([True, False, True, False]), region_probs=torch.rand(4, 7, classes).softmax(-1),
        region_classes=torch.randint(classes, (4, 7)), region_confidence=torch.rand(4, 7),
        region_attributes=torch.randint(7, (4, 7)))
    return model, batch
