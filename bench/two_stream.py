"""Whole two-stream models on ragged VQA batches: the forward that answers a question, padded and without padding.

The shape is the batch; tokens and regions are those of `CASES`. Questions have about 9 tokens in VQA (4 to the longest
here, normal), images 10 regions to all of them, evenly, or exactly 36 as in LXMERT's released features. Weights are the
fresh initialisation of the public sizes; every peer has the same, and is checked against float64 on the rows that exist
before it is timed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import Floor, Peer, Row, Settings, Skip, Workload, relative_error
from .report import Target

NAME = "two_stream"
TESTS = "tests/models/test_two_stream.py"
OPS = ("vilbert_fwd", "lxmert_ragged_fwd", "lxmert_fwd")
DTYPES = ("float32",)
SHAPES = ((64,),)
QUICK_SHAPES = ((2,),)

PACKED, MASKED = "vlmfast, lengths", "vlmfast, masks"
FORMULA, THEIRS = "padded formula", "transformers"
PRODUCTS = "matrix products"
BOUND = 1e-5  # relative error that a peer may have before it is timed
TARGET = 1.6


@dataclass(frozen=True)
class Case:
    """One model and the sizes of its batch; `least` regions an image has."""

    preset: str
    tokens: int
    regions: int
    least: int
    config: dict = field(default_factory=dict, hash=False)


CASES = {
    "vilbert_fwd": Case("vilbert-base", 23, 101, 10, {"heads": ("vqa",)}),
    "lxmert_ragged_fwd": Case("lxmert-base", 20, 36, 10, {"heads": "none"}),
    "lxmert_fwd": Case("lxmert-base", 20, 36, 36, {"heads": "none"}),
}


@functools.lru_cache(maxsize=1)
def model(case: Case) -> nn.Module:
    """The model of a case with seeded weights, in evaluation mode."""
    from vlmfast import models

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return models.create(case.preset, **case.config).eval().requires_grad_(False)


def inputs(workload: Workload) -> tuple[Tensor, ...]:
    """input_ids, image_feat, image_loc, attention_mask, image_mask, text_lengths, num_regions."""
    case, (batch,) = CASES[workload.op], workload.shape
    vilbert = case.preset.startswith("vilbert")
    config, generator = model(case).config, torch.Generator().manual_seed(0)
    width = config.v_feature_size if vilbert else config.visual_feat_dim
    ids = torch.randint(1, config.vocab_size, (batch, case.tokens), generator=generator)
    features = torch.randn(batch, case.regions, width, generator=generator).relu()
    boxes = torch.rand(batch, case.regions, 5 if vilbert else 4, generator=generator)
    words = torch.randn(batch, generator=generator) * 2.5 + 9
    words = words.round().long().clamp(4, case.tokens)
    regions = torch.randint(case.least, case.regions + 1, (batch,), generator=generator)
    masks = [torch.arange(size) < count[:, None] for size, count in ((case.tokens, words), (case.regions, regions))]
    tensors = ids, features, boxes, *(mask.to(torch.int64) for mask in masks), words, regions
    return tuple(x.to(workload.device) for x in tensors)


def _live(text: Tensor, image: Tensor, pooled: Tensor, text_mask: Tensor, image_mask: Tensor) -> tuple[Tensor, ...]:
    """The states of the rows that exist, which all peers compute, and what the answer is read from."""
    return text[text_mask.bool()], image[image_mask.bool()], pooled


def _answer(output, text_mask: Tensor, image_mask: Tensor) -> tuple[Tensor, ...]:
    pooled = output.logits["vqa"] if "vqa" in output.logits else output.pooled
    return _live(output.text_hidden, output.image_hidden, pooled, text_mask, image_mask)


# Peers: each takes the inputs and returns the live rows


def _packed(workload: Workload, net: nn.Module | None = None) -> Callable[..., tuple[Tensor, ...]]:
    net = net or model(CASES[workload.op]).to(workload.device)

    def run(ids, features, boxes, text_mask, image_mask, words, regions):
        output = net(ids, features, boxes, text_lengths=words, num_regions=regions)
        return _answer(output, text_mask, image_mask)

    return run


def _masked(workload: Workload, net: nn.Module | None = None) -> Callable[..., tuple[Tensor, ...]]:
    net = net or model(CASES[workload.op]).to(workload.device)

    def run(ids, features, boxes, text_mask, image_mask, words, regions):
        output = net(ids, features, boxes, attention_mask=text_mask, image_mask=image_mask)
        return _answer(output, text_mask, image_mask)

    return run


def _eager(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """matmul, softmax, matmul, as the authors wrote it."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return ((scores if bias is None else scores + bias).softmax(-1) @ value).transpose(1, 2)


@contextlib.contextmanager
def eager_attention() -> Iterator[None]:
    """Our layers with plain formulas in place of the attention ops."""
    def self_attend(query, key, value, rows, **_):
        return _eager(query, key, value, rows.bias), None

    def co_attend(a, b, rows_a, rows_b, **_):
        return _eager(a[0], b[1], b[2], rows_b.bias), _eager(b[0], a[1], a[2], rows_a.bias), None, None

    with mock.patch("vlmfast.layers.bert.self_attend", self_attend), \
            mock.patch("vlmfast.layers.co_attention.co_attend", co_attend):
        yield


def _formula(workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
    run = _masked(workload)

    def eager(*tensors):
        with eager_attention():
            return run(*tensors)

    return eager


def _transformers(workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
    from transformers import LxmertConfig, LxmertModel

    ours = model(CASES[workload.op]).to(workload.device)
    sizes = {name: value for name, value in ours.config.to_dict().items() if name not in ("heads", "images_per_answer")}
    net = LxmertModel(LxmertConfig(**sizes)).to(workload.device).eval()
    net.load_state_dict({key.removeprefix("bert."): value for key, value in ours.state_dict().items()}, assign=True)

    def run(ids, features, boxes, text_mask, image_mask, words, regions):
        output = net(ids, features, boxes, attention_mask=text_mask, visual_attention_mask=image_mask)
        return _live(output.language_output, output.vision_output, output.pooled_output, text_mask, image_mask)

    return run


def _checked(make: Callable, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
    """Without gradients, and compared with the float64 truth on the first call.

    Raises:
        ValueError: the outputs differ by more than BOUND, so that no time of this peer is reported.
    """
    run, compared = make(workload), []

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = run(*tensors)
        if not compared:
            compared.append(True)
            for (name, expected), value in zip(truth(workload, tensors).items(), found, strict=True):
                if not relative_error(value, expected) < BOUND:
                    raise ValueError(f"{name} differs from float64 by {relative_error(value, expected):.1e}, "
                                     f"must by less than {BOUND}")
        return found

    return call


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Without padding, with masks, and the padded eager model that a user has today."""
    lxmert = CASES[workload.op].preset.startswith("lxmert")
    missing = None
    if lxmert and importlib.util.find_spec("transformers") is None:
        missing = "transformers is not installed"
    rivals = {FORMULA: (_formula, None), **({THEIRS: (_transformers, missing)} if lxmert else {})}
    makers = {PACKED: (_packed, None), MASKED: (_masked, None), **rivals}
    return [Peer(name, functools.partial(_checked, make), name not in rivals, PRODUCTS, skip)
            for name, (make, skip) in makers.items()]


@functools.lru_cache(maxsize=1)
def _truth(case: Case, workload: Workload) -> dict[str, Tensor]:
    double = copy.deepcopy(model(case)).double()
    with torch.no_grad(), eager_attention():
        found = _masked(workload, double.to(workload.device))(*inputs(workload))
    return dict(zip(("text", "image", "pooled"), found, strict=True))


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The plain formulas in float64, on the rows that exist; once for all thread counts."""
    return _truth(CASES[workload.op], Workload(workload.op, workload.shape, workload.dtype, workload.device))


def floors(workload: Workload) -> list[Floor]:
    """The products with weights that the rows which exist need; attention itself is a few per cent beside them."""
    net, sizes, hooks = model(CASES[workload.op]), [], []
    for part in net.modules():
        if isinstance(part, nn.Linear):
            hooks.append(part.register_forward_hook(
                lambda layer, args, _: sizes.append((args[0].numel() // layer.in_features, layer.weight))))
    with torch.no_grad():
        _packed(workload)(*inputs(workload))
    for hook in hooks:
        hook.remove()
    rows = {(count, weight.shape[1]): torch.randn(count, weight.shape[1], device=workload.device)
            for count, weight in sizes}

    def run():
        for count, weight in sizes:
            F.linear(rows[count, weight.shape[1]], weight)

    return [Floor(PRODUCTS, run, "torch.linear")]


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    """Nothing beside the grid."""
    return iter(())


def targets(rows: Sequence[Row]) -> list[Target]:
    """How many times faster than the padded eager model, at every batch and thread count measured on the CPU."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.kind == "time" and row.device == "cpu":
            groups.setdefault((row.op, tuple(row.shape), row.threads), {})[row.peer] = row
    found = []
    for (op, shape, threads), group in groups.items():
        rival = THEIRS if op.startswith("lxmert") else FORMULA
        if PACKED not in group or rival not in group:
            continue
        figure = f"against {rival}, {op} {'x'.join(map(str, shape))}, {threads} thread{'s' * (threads > 1)}"
        fixed = op == "lxmert_fwd"
        found.append(Target(figure, group[rival].min_s / group[PACKED].min_s, ">=", None if fixed else TARGET,
                            note="all images have 36 regions: only the text has padding" if fixed else ""))
    return found
