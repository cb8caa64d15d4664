"""One step of writing an image, code by code: DALL-E over its 1280 positions, and DALL-E mini's decoder.

The shape is the number of images. A call is one step at each of a case's positions, with what came before in the peer's
cache (or recomputed). Weights are a fresh initialisation of the public or preset sizes; every peer has the same, and is
checked against the whole sequence in float64 before it is timed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import Floor, Peer, Row, Settings, Skip, Workload, relative_error
from .report import Target

NAME = "decoding"
TESTS = "tests/models/test_dalle.py"
OPS = ("dalle_step", "dalle_mini_step")
DTYPES = ("float32",)
SHAPES = ((1,), (4,))
QUICK_SHAPES = ((1,),)

OURS = "vlmfast"
EAGER, MASKED, RECOMPUTED = "cached, eager", "cached, SDPA with mask", "recomputed, eager"
MIN_DALLE, MIN_CACHED = "min-dalle's formula", "min-dalle's formula, text keys kept"
WEIGHTS = "weights read once"
BOUND = 1e-5  # relative error that a peer may have before it is timed


@dataclass(frozen=True)
class Case:
    """A model and the positions of its steps; the best position is the mean over an image."""

    preset: str
    positions: tuple[int, ...]
    text: int
    config: dict = field(default_factory=dict, hash=False)


CASES = {
    "dalle_step": Case("dalle-small", (128, 512, 896), 256),
    # a step reads the text's states, whatever made them
    "dalle_mini_step": Case("dalle-mini", (32, 128, 224), 64, {"encoder_layers": 1}),
}
RIVALS = {"dalle_step": (EAGER, MASKED, RECOMPUTED), "dalle_mini_step": (MIN_DALLE, MIN_CACHED)}
TARGETS = {("dalle_step", EAGER): (1.5, (4,)), ("dalle_mini_step", MIN_DALLE): (1.4, None)}


@functools.lru_cache(maxsize=1)
def model(case: Case) -> nn.Module:
    """The model of a case with seeded weights, in evaluation mode."""
    from vlmfast import models

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return models.create(case.preset, **case.config).eval().requires_grad_(False)


def inputs(workload: Workload) -> tuple[Tensor, Tensor]:
    """Text ids [B, T] and codes [B, N]; DALL-E mini's B is twice the images: without and with the prompt."""
    case, (images,) = CASES[workload.op], workload.shape
    config, generator = model(case).config, torch.Generator().manual_seed(0)
    mini = workload.op == "dalle_mini_step"
    entries = config.encoder_vocab_size if mini else config.num_text_tokens
    codes = config.num_image_codes if mini else config.num_image_tokens
    text = torch.randint(3, entries, (images, case.text), generator=generator)
    drawn = torch.randint(codes, (images, config.image_seq_len), generator=generator)
    if mini:
        text, drawn = torch.cat([model(case).null_text(images), text]), drawn.repeat(2, 1)
    return text.to(workload.device), drawn.to(workload.device)


# Peers: each takes the inputs and returns the logits of the next code for each position


def _ours(workload: Workload) -> Callable[..., list[Tensor]]:
    case, states = CASES[workload.op], {}
    net = model(case).to(workload.device)
    first = 1 if workload.op == "dalle_mini_step" else 0  # its position 0 is the start token

    def run(text, codes):
        found = []
        for position in case.positions:
            if position not in states:
                states[position] = net.prefill(text, codes[:, :position])[1]
            states[position].position = position + first  # the same step again
            found.append(net.step(codes[:, position], states[position]))
        return found

    return run


def _masks(net: nn.Module) -> list[Tensor]:
    """[L, L] of each layer."""
    from vlmfast.layers.axial import image_mask

    config = net.config
    length, prefix, found = config.prefix_len + config.image_seq_len, config.prefix_len, {}
    for kind in set(config.layer_kinds):
        found[kind] = torch.ones(length, length, dtype=torch.bool).tril()
        found[kind][prefix:, prefix:] = image_mask(config.image_grid, kind, config.conv_kernel)
    return [found[kind] for kind in config.layer_kinds]


def _layer(block, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """A layer of DALL-E from plain PyTorch; `attend` takes query, key, value [B, H, S, D]."""
    attention = block.attn.fn
    qkv = F.linear(block.attn.norm(x), attention.to_qkv.weight, attention.to_qkv.bias)
    out = attend(*qkv.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4))
    x = x + F.linear(out.transpose(1, 2).flatten(2), attention.to_out.weight, attention.to_out.bias)
    ff = block.ff.fn
    hidden = F.gelu(F.linear(block.ff.norm(x), ff.fc.weight, ff.fc.bias))
    return x + F.linear(hidden, ff.proj.weight, ff.proj.bias)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.masked_fill(~mask, -torch.finfo(scores.dtype).max).softmax(-1) @ value


def _dalle_embed(net: nn.Module, text: Tensor, codes: Tensor) -> Tensor:
    text = F.embedding(net.pad_text(text), net.text_emb.weight) + net.text_pos_emb.weight
    return torch.cat([text, net._embed_image(codes, 0)], 1)


def _dalle_logits(net: nn.Module, x: Tensor) -> Tensor:
    entries = net.config.text_entries
    return F.linear(net.norm(x[:, -1]), net.to_logits.weight[entries:], net.to_logits.bias[entries:])


def _dalle_cached(workload: Workload, sdpa: bool) -> Callable[..., list[Tensor]]:
    """All keys and values of all positions are kept; "eager" appends to them as DALLE-pytorch does."""
    case, caches = CASES[workload.op], {}
    net = model(case).to(workload.device)
    masks, prefix = [mask.to(workload.device) for mask in _masks(net)], net.config.prefix_len
    length = len(masks[0])

    def fill(text, codes, position):
        kept, x = [], _dalle_embed(net, text, codes[:, :position])
        for block, mask in zip(net.layers, masks, strict=True):
            live = mask[: x.shape[1], : x.shape[1]]

            def attend(query, key, value, live=live):
                if sdpa:  # room for what comes
                    room = F.pad(torch.stack([key, value]), (0, 0, 0, length - key.shape[2]))
                    kept.append((room[0], room[1]))
                else:
                    kept.append((key.contiguous(), value.contiguous()))
                return F.scaled_dot_product_attention(query, key, value, attn_mask=live)

            x = _layer(block, x, attend)
        return kept

    def step(code, position, kept):
        place = prefix + position
        x = net._embed_image(code[:, None], position)
        for block, mask, (keys, values) in zip(net.layers, masks, kept, strict=True):
            live = mask[place : place + 1, : place + 1]

            def eager(query, key, value, keys=keys, values=values, live=live):
                return _eager(query, torch.cat([keys, key], 2), torch.cat([values, value], 2), live)

            def fused(query, key, value, keys=keys, values=values, live=live):
                keys[:, :, place], values[:, :, place] = key[:, :, 0], value[:, :, 0]
                return F.scaled_dot_product_attention(query, keys[:, :, : place + 1], values[:, :, : place + 1],
                                                      attn_mask=live)

            x = _layer(block, x, fused if sdpa else eager)
        return _dalle_logits(net, x)

    def run(text, codes):
        for position in case.positions:
            if position not in caches:
                caches[position] = fill(text, codes, position)
        return [step(codes[:, position], position, caches[position]) for position in case.positions]

    return run


def _dalle_recomputed(workload: Workload, net: nn.Module | None = None) -> Callable[..., list[Tensor]]:
    case = CASES[workload.op]
    net = (net or model(case)).to(workload.device)
    masks = [mask.to(workload.device) for mask in _masks(net)]

    def run(text, codes):
        found = []
        for position in case.positions:
            x = _dalle_embed(net, text, codes[:, : position + 1])
            for block, mask in zip(net.layers, masks, strict=True):
                live = mask[: x.shape[1], : x.shape[1]]
                x = _layer(block, x, functools.partial(_eager, mask=live))
            found.append(_dalle_logits(net, x))
        return found

    return run


def _min_dalle(workload: Workload, keep: bool) -> Callable[..., list[Tensor]]:
    """min-dalle's decoder step: self-attention reads all slots, and, unless `keep`, the text's keys and values
    are projected anew at every step."""
    case, kept = CASES[workload.op], {}
    net = model(case).to(workload.device)

    def attend(layer, query, key, value, mask):
        query, key, value = (x.unflatten(-1, (layer.heads, -1)) for x in (query, key, value))
        query = query / query.shape[-1] ** 0.5
        weights = torch.einsum("bqhc,bkhc->bhqk", query, key) + (1 - mask.to(query.dtype)) * -1e12
        out = torch.einsum("bhqk,bkhc->bqhc", weights.softmax(-1), value)
        return F.linear(out.flatten(2), layer.out_proj.weight)

    def project(layer, x, names):
        return [F.linear(x, getattr(layer, name).weight) for name in names]

    def glu(part, x):
        x = part.ln0(x)
        return F.linear(part.ln1(F.gelu(F.linear(x, part.fc0.weight)) * F.linear(x, part.fc1.weight)), part.fc2.weight)

    def prepare(text, codes, position):
        states, lengths = net.encode_text(text)
        slots = net.prefill(text, codes[:, :position])[1].stores
        slots = [tuple(part.flatten(2) for part in pair) for pair in slots]
        mask = (torch.arange(text.shape[1], device=text.device) < lengths[:, None])[:, None, None]
        texts = [project(layer.encoder_attn, states, ("k_proj", "v_proj")) for layer in net.decoder.layers]
        return states, mask, slots, texts if keep else [None] * len(texts)

    def step(code, position, states, mask, slots, texts):
        x = net.decoder.embed(code[:, None], position)
        seen = (torch.arange(net.config.image_seq_len, device=x.device) <= position)[None, None, None]
        for layer, (keys, values), text in zip(net.decoder.layers, slots, texts, strict=True):
            y = layer.pre_self_attn_layer_norm(x)
            query, key, value = project(layer.self_attn, y, ("q_proj", "k_proj", "v_proj"))
            keys[:, position], values[:, position] = key[:, 0], value[:, 0]
            x = x + layer.self_attn_layer_norm(attend(layer.self_attn, query, keys, values, seen))
            y = layer.pre_encoder_attn_layer_norm(x)
            key, value = text or project(layer.encoder_attn, states, ("k_proj", "v_proj"))
            (query,) = project(layer.encoder_attn, y, ("q_proj",))
            x = x + layer.encoder_attn_layer_norm(attend(layer.encoder_attn, query, key, value, mask))
            x = x + glu(layer.glu, x)
        x = net.decoder.final_ln(x[:, 0])
        return F.linear(x, net.decoder.lm_head.weight[: net.config.num_image_codes])

    def run(text, codes):
        for position in case.positions:
            if position not in kept:
                kept[position] = prepare(text, codes, position)
        return [step(codes[:, position], position + 1, *kept[position]) for position in case.positions]

    return run


def _checked(make: Callable, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
    """Without gradients, and compared with the float64 truth on the first call.

    Raises:
        ValueError: the logits differ by more than BOUND, so that no time of this peer is reported.
    """
    run, compared = make(workload), []

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = tuple(run(*tensors))
        if not compared:
            compared.append(True)
            for (name, expected), value in zip(truth(workload, tensors).items(), found, strict=True):
                if not relative_error(value, expected) < BOUND:
                    raise ValueError(f"{name} differs from float64 by {relative_error(value, expected):.1e}, "
                                     f"must by less than {BOUND}")
        return found

    return call


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Ours with rolling windows and kept text keys, and what the public code does."""
    makers = {OURS: _ours}
    if workload.op == "dalle_step":
        makers |= {EAGER: functools.partial(_dalle_cached, sdpa=False),
                   MASKED: functools.partial(_dalle_cached, sdpa=True), RECOMPUTED: _dalle_recomputed}
    else:
        makers |= {MIN_DALLE: functools.partial(_min_dalle, keep=False),
                   MIN_CACHED: functools.partial(_min_dalle, keep=True)}
    return [Peer(name, functools.partial(_checked, make), name == OURS, WEIGHTS) for name, make in makers.items()]


@functools.lru_cache(maxsize=1)
def _truth(case: Case, workload: Workload) -> dict[str, Tensor]:
    double = copy.deepcopy(model(case)).double().to(workload.device)
    text, codes = inputs(workload)
    last = max(case.positions)
    with torch.no_grad():
        if workload.op == "dalle_step":
            logits = double(text, codes[:, : last + 1]).image_logits
        else:
            logits = double(text, codes[:, : last + 1]).logits[..., : double.config.num_image_codes]
    return {f"logits_{position}": logits[:, position + 1].clone() for position in case.positions}


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Logits from the whole sequence in float64; once for all thread counts."""
    return _truth(CASES[workload.op], Workload(workload.op, workload.shape, workload.dtype, workload.device))


def floors(workload: Workload) -> list[Floor]:
    """Reading the weights of a step from memory, once for each position."""
    net = model(CASES[workload.op])
    part = net.decoder.layers if workload.op == "dalle_mini_step" else net.layers
    weights = [value for value in part.parameters() if value.ndim == 2]
    count = len(CASES[workload.op].positions)

    def run():
        for _ in range(count):
            for weight in weights:
                weight.sum()

    return [Floor(WEIGHTS, run, "torch.sum")]


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    """Nothing beside the grid."""
    return iter(())


def targets(rows: Sequence[Row]) -> list[Target]:
    """How many times faster than each rival, at every number of images and threads measured on the CPU."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.kind == "time" and row.device == "cpu":
            groups.setdefault((row.op, tuple(row.shape), row.threads), {})[row.peer] = row
    found = []
    for (op, shape, threads), group in groups.items():
        for rival in RIVALS[op]:
            if OURS not in group or rival not in group:
                continue
            least, at = TARGETS.get((op, rival), (None, None))
            figure = f"against {rival}, {op} {'x'.join(map(str, shape))}, {threads} thread{'s' * (threads > 1)}"
            found.append(Target(figure, group[rival].min_s / group[OURS].min_s, ">=",
                                least if at is None or shape == at else None))
    return found
