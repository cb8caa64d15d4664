"""The contrastive losses: symmetric InfoNCE (CLIP) and the pairwise sigmoid loss (SigLIP).

Inputs are seeded, L2-normalised random features; the scale 1/0.07 is a Parameter, so that its gradient is timed too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import memory
from .harness import (
    Floor,
    Peer,
    Row,
    Settings,
    Skip,
    Workload,
    compile_skip,
    describe,
    interleave,
    load_installed_file,
    summarise,
    wall_time,
)
from .report import Target

NAME = "info_nce"
TESTS = "tests/ops/test_info_nce.py"
OPS = ("info_nce", "siglip_loss")
DTYPES = ("float32", "bfloat16")
SHAPES = ((2048, 512), (8192, 512))  # (N, D)
QUICK_SHAPES = ((256, 512), (1024, 512))

CACHE, RECOMPUTE, SIGMOID = "vlmfast cache", "vlmfast recompute", "vlmfast siglip_loss"
OPEN_CLIP, COMPILED = "open_clip ClipLoss", "compiled log-sum-exp"
CHUNKED = "torch linear_cross_entropy x2"
STORE_FLOOR, RECOMPUTE_FLOOR = "gemm 6N^2D", "gemm 8N^2D"
LOGITS_AT_ONCE = 2**27  # of a floor: 512 MiB
OVERHEAD_SHAPE, OVERHEAD_CALLS = (8, 16), 5000
MEMORY_SHAPE, QUICK_MEMORY_SHAPE = (20000, 512), (4096, 512)


def inputs(workload: Workload) -> tuple[Tensor, ...]:
    """image [N, D], text [N, D], logit_scale [] fp32 and, for the sigmoid loss, logit_bias [] fp32; all want gradients.

    The generator runs on the CPU, so every device sees the same numbers.
    """
    generator = torch.Generator().manual_seed(0)
    features = [
        F.normalize(torch.randn(workload.shape, generator=generator), dim=1)
        .to(workload.device, workload.torch_dtype)
        .requires_grad_()
        for _ in range(2)
    ]
    numbers = (1 / 0.07,) if workload.op == "info_nce" else (1 / 0.07, -10.0)
    return (*features, *(torch.nn.Parameter(torch.tensor(x, device=workload.device)) for x in numbers))


# The formulas a user would write


def two_cross_entropies(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def log_sum_exp(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * image @ text.T
    return (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2


def log_sigmoid(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    logits = logit_scale * image @ text.T + logit_bias
    # -logsigmoid(-z) = softplus(z) off the diagonal, -logsigmoid(z) = softplus(z) - z on it
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(logits)


def linear_cross_entropies(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """PyTorch 2.13's chunked head, once per direction."""
    options = torch.nn.LinearCrossEntropyOptions()
    labels = torch.arange(len(image), device=image.device)
    rows = F.linear_cross_entropy(logit_scale * image, text, labels, options=options)
    return (rows + F.linear_cross_entropy(logit_scale * text, image, labels, options=options)) / 2


def upcast(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wide(image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
        return formula(image.float(), text.float(), *scalars)

    return wide


# The truth: both losses and their gradients in float64, by row chunks, since N x N doubles would not fit for large N


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    compute = {"info_nce": _info_nce_truth, "siglip_loss": _siglip_truth}[workload.op]
    with torch.no_grad():
        return compute(*(x.detach().double() for x in tensors))


def _info_nce_truth(image: Tensor, text: Tensor, scale: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
    count, diagonal = len(image), scale * (image * text).sum(1)
    spans = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    rows, columns = torch.empty_like(diagonal), torch.full_like(diagonal, -torch.inf)
    for span in spans:
        logits = scale * image[span] @ text.T
        rows[span] = logits.logsumexp(1)
        columns = torch.logaddexp(columns, logits.logsumexp(0))
    d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
    for span in spans:
        logits = scale * image[span] @ text.T
        grad = ((logits - rows[span, None]).exp() + (logits - columns).exp()) / (2 * count)
        grad.diagonal(span.start).sub_(1 / count)
        d_image[span] = scale * grad @ text
        d_text += scale * grad.T @ image[span]
    loss, d_scale = (rows + columns - 2 * diagonal).mean() / 2, (image * d_image).sum() / scale
    return {"loss": loss, "d_image": d_image, "d_text": d_text, "d_scale": d_scale}


def _siglip_truth(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
    count, loss, d_bias = len(image), torch.zeros_like(scale), torch.zeros_like(bias)
    d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
    for start in range(0, count, chunk):
        span = slice(start, min(start + chunk, count))
        logits = scale * image[span] @ text.T + bias
        signs = torch.full_like(logits, -1)
        signs.diagonal(start).fill_(1)
        loss -= F.logsigmoid(signs * logits).sum() / count
        grad = -signs * torch.sigmoid(-signs * logits) / count
        d_image[span] = scale * grad @ text
        d_text += scale * grad.T @ image[span]
        d_bias += grad.sum()
    d_scale = (image * d_image).sum() / scale
    return {"loss": loss, "d_image": d_image, "d_text": d_text, "d_scale": d_scale, "d_bias": d_bias}


# Peers and floors


def load_ops():
    """`vlmfast.ops`; a function of its own, so that the harness can be tested without the package."""
    from vlmfast import ops

    return ops


def _ours(name: str, op: str, floor: str, **options: str) -> Peer:
    try:
        function = getattr(load_ops(), op)
    except (ImportError, AttributeError) as error:
        return Peer(name, lambda workload: None, ours=True, skip=describe(error))
    return Peer(name, lambda workload: functools.partial(function, **options), ours=True, floor=floor)


def _open_clip(name: str, kind: str) -> Peer:
    try:
        module = load_installed_file("open_clip", "loss.py")  # the package itself needs torchvision
    except Exception as error:
        return Peer(name, lambda workload: None, skip=describe(error))
    return Peer(name, lambda workload: getattr(module, kind)(cache_labels=True), floor=STORE_FLOOR)


def _compiled(name: str, formula: Callable[..., Tensor], skip: str | None) -> Peer:
    def make(workload: Workload) -> Callable[..., Tensor]:
        # a reset per workload, else the eighth specialisation of one function falls back to eager in silence
        torch._dynamo.reset()
        return torch.compile(formula, fullgraph=True, dynamic=False)

    return Peer(name, make, floor=STORE_FLOOR, skip=compile_skip(skip))


def _too_large(workload: Workload) -> str | None:
    """The formulas hold about six N x N matrices at their peak; rather skip them than be killed."""
    need, free = 24 * workload.shape[0] ** 2, memory.available_bytes(workload.device)
    return f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free" if need > free else None


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Ours first, then everything a user could write or install instead, the strongest formulas compiled."""
    no_compile = "left out by --quick" if quick else None
    sigmoid = workload.op == "siglip_loss"
    formula, form = (log_sigmoid, "log-sigmoid") if sigmoid else (log_sum_exp, "log-sum-exp")
    wide = upcast(formula)
    found = [
        _ours(CACHE, "info_nce", STORE_FLOOR, memory="cache"),
        _ours(RECOMPUTE, "info_nce", RECOMPUTE_FLOOR, memory="recompute"),
        Peer("naive 2x cross entropy", lambda w: two_cross_entropies, floor=STORE_FLOOR),
    ]
    if workload.device != "cpu":
        del found[0]  # only the native backend keeps tiles
    if sigmoid:
        found = [_ours(SIGMOID, "siglip_loss", STORE_FLOOR)]
    rivals = [
        Peer(f"naive {form}", lambda w: formula, floor=STORE_FLOOR),
        _compiled(f"compiled {form}", formula, no_compile),
        _open_clip("open_clip SigLipLoss", "SigLipLoss") if sigmoid else _open_clip(OPEN_CLIP, "ClipLoss"),
    ]
    if workload.dtype in ("bfloat16", "float16"):
        # a user may also widen the features and do everything in float32: on a CPU that is the peer to beat
        rivals.append(Peer(f"naive {form}, upcast", lambda w: wide, floor=STORE_FLOOR))
        rivals.append(_compiled(f"compiled {form}, upcast", wide, no_compile))
    found += rivals
    if not sigmoid:
        missing = None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs PyTorch 2.13 or later"
        chunked = Peer(CHUNKED, lambda w: linear_cross_entropies, floor=STORE_FLOOR, skip=missing)
        found.append(chunked)
    too_large = _too_large(workload)
    if too_large:
        found = [p if p.ours or p.skip or p.name == CHUNKED else replace(p, skip=too_large) for p in found]
    return found


def floors(workload: Workload) -> list[Floor]:
    """The matrix products alone: one (cache) or two (recompute) for the logits, two for the gradients.

    On a CPU: float32 by torch.mm and by oneDNN, which is twice as fast as MKL on some processors and no faster on
    others; for bfloat16 features also in bfloat16 where the processor has instructions for it.
    """
    count, width = workload.shape
    if workload.device != "cpu":
        kinds = [("torch.mm", torch.mm, workload.torch_dtype)]
    else:
        kinds = [("torch.mm", torch.mm, torch.float32)]
        if _onednn_works():
            kinds.append(("oneDNN", _onednn_mm, torch.float32))
        if workload.dtype == "bfloat16" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
            kinds.append(("torch.mm bfloat16", torch.mm, torch.bfloat16))
    generator = torch.Generator().manual_seed(2)
    rows = min(count, max(1, LOGITS_AT_ONCE // count))
    shapes = (count, width), (rows, width), (rows, count)
    left, part, tile = (torch.randn(shape, generator=generator).to(workload.device) for shape in shapes)
    visits = {STORE_FLOOR: 1, RECOMPUTE_FLOOR: 2} if workload.op == "info_nce" else {STORE_FLOOR: 1}
    return [
        Floor(name, functools.partial(_products, product, count, *(x.to(dtype) for x in (left, part, tile)), times), by)
        for by, product, dtype in kinds
        for name, times in visits.items()
    ]


def _products(product: Callable, count: int, text: Tensor, part: Tensor, tile: Tensor, visits: int) -> None:
    for start in range(0, count, len(part)):
        rows = min(len(part), count - start)
        for _ in range(visits):
            product(part[:rows], text.T)
        product(tile[:rows], text)
        product(tile[:rows].T, part[:rows])


def _onednn_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


def _onednn_works() -> bool:
    try:
        a, b = torch.ones(2, 3), torch.ones(3, 4)
        return torch.equal(_onednn_mm(a, b), torch.mm(a, b))
    except (AttributeError, RuntimeError):
        return False


# Figures beside the grid


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    """Call overhead at a tiny size, and the peak memory of recompute mode where no formula would fit."""
    yield from _overhead(settings, device)
    yield _memory(settings, device)


def _overhead(settings: Settings, device: str) -> Iterator[Row | Skip]:
    workload = Workload("info_nce", OVERHEAD_SHAPE, device=device)
    torch.set_num_threads(1)
    arguments, chosen, calls = inputs(workload), {}, {}
    with torch.no_grad():
        for peer in peers(workload, quick=True):
            if peer.skip:
                continue
            try:
                call = functools.partial(peer.make(workload), *arguments)
                call()
            except Exception as error:
                yield Skip(f"{workload}, no_grad", peer.name, describe(error), peer.ours, failed=True)
                continue
            chosen[peer.name], calls[peer.name] = peer, call
        # turns of 100 calls: a loop that uses one loss meets warm caches, which single turns would never see
        turns = replace(settings, repeats=max(OVERHEAD_CALLS // (500 if settings.quick else 100), 1))
        samples = interleave(calls, wall_time, turns, warmup=20, block=100)
    for name, peer in chosen.items():
        yield Row.of("overhead", NAME, workload, peer, clock="wall", **summarise(samples[name]))


def _memory(settings: Settings, device: str) -> Row | Skip:
    shape = QUICK_MEMORY_SHAPE if settings.quick else MEMORY_SHAPE
    workload = Workload("info_nce", max(settings.shapes) if settings.shapes else shape, device=device)
    peer = next(p for p in peers(workload, quick=True) if p.name == RECOMPUTE)
    if peer.skip:
        return Skip(f"{workload}, fresh process", peer.name, peer.skip, ours=True)
    try:
        peak = memory.fresh_process_peak(NAME, workload, peer.name)
    except Exception as error:
        return Skip(f"{workload}, fresh process", peer.name, describe(error), ours=True, failed=True)
    return Row.of("memory", NAME, workload, peer, peak_extra_bytes=peak)


def targets(rows: Sequence[Row]) -> list[Target]:
    """The figures of the design, from the rows measured on the CPU with one thread; none for other devices."""
    rows = [row for row in rows if row.device == "cpu" and row.threads == 1]
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.kind == "time" and row.op == "info_nce":
            groups.setdefault((row.dtype, tuple(row.shape)), {})[row.peer] = row
    if not rows:
        return []
    shapes = list(dict.fromkeys([*SHAPES, *(shape for _, shape in groups)]))
    found = []
    for shape in shapes:
        group, at = groups.get(("float32", shape), {}), f"N={shape[0]} D={shape[1]}"
        for name, floor, limit in ((CACHE, STORE_FLOOR, 1.20), (RECOMPUTE, RECOMPUTE_FLOOR, 1.15)):
            row = group.get(name)
            over = row.min_s / row.floor_s if row and row.floor_s else None
            note = "; ".join(f"{row.min_s / s:.2f} over {by}" for by, s in row.floor_by.items()) if row else ""
            found.append(Target(f"{name} over {floor}, float32 {at}", over, "<=", limit, note=note))
        for rival, limit in ((OPEN_CLIP, 1.9), (COMPILED, 1.1)):
            found.append(_speedup(f"against {rival}, float32 {at}", group, [rival], limit))
    for shape in shapes:
        group, at = groups.get(("bfloat16", shape), {}), f"bfloat16 N={shape[0]} D={shape[1]}"
        rivals = [name for name, row in group.items() if not row.ours]
        found.append(_speedup(f"against the fastest peer, {at}", group, rivals, 2.5))
        native = [name for name in rivals if not name.endswith(", upcast")]
        found.append(_speedup(f"against the fastest peer that works in bfloat16, {at}", group, native, 2.5))
    found += _peak_target(rows) + _overhead_target(rows)
    return found + _error_targets(rows)


def _speedup(figure: str, group: dict[str, Row], rivals: Sequence[str], limit: float) -> Target:
    ours = min((row for row in group.values() if row.ours), key=lambda row: row.min_s, default=None)
    best = min((group[name] for name in rivals if name in group), key=lambda row: row.min_s, default=None)
    if ours is None or best is None:
        return Target(figure, None, ">=", limit)
    return Target(figure, best.min_s / ours.min_s, ">=", limit, note=f"{ours.peer} against {best.peer}")


def _peak_target(rows: Sequence[Row]) -> list[Target]:
    measured = [row for row in rows if row.kind == "memory" and row.peer == RECOMPUTE]
    found = []
    for row in measured:
        count, width = row.shape
        value = row.peak_extra_bytes / (4 * count * width)
        figure, unit = f"peak extra memory, recompute float32 N={count} D={width}", "N D 4 bytes"
        found.append(Target(figure, value, "<=", 6, unit, f"{row.peak_extra_bytes / 2**20:.0f} MiB"))
    if MEMORY_SHAPE not in [tuple(row.shape) for row in measured]:
        figure = f"peak extra memory, recompute float32 N={MEMORY_SHAPE[0]} D={MEMORY_SHAPE[1]}"
        found.insert(0, Target(figure, None, "<=", 6, "N D 4 bytes"))
    return found


def _overhead_target(rows: Sequence[Row]) -> list[Target]:
    row = max((r for r in rows if r.kind == "overhead" and r.ours), key=lambda r: r.median_s, default=None)
    figure = "call overhead, no_grad, N={} D={}".format(*OVERHEAD_SHAPE)
    if row is None:
        return [Target(figure, None, "<=", 15, "us")]
    note = f"median, {row.peer}; minimum {row.min_s * 1e6:.1f}"
    return [Target(figure, row.median_s * 1e6, "<=", 15, "us", note)]


def _error_targets(rows: Sequence[Row]) -> list[Target]:
    """Worst relative error of our rows by dtype; the design sets a bound for float32 only."""
    found = []
    for op in OPS:
        for dtype in dict.fromkeys(row.dtype for row in rows):
            ours = [r for r in rows if r.kind == "time" and r.ours and r.op == op and r.dtype == dtype and r.error]
            for what, limit in (("loss", 2e-6), ("gradients", 5e-6)):
                worst = [(v, k, r) for r in ours for k, v in r.error.items() if (k == "loss") == (what == "loss")]
                if worst:
                    value, key, row = max(worst, key=lambda item: item[0])
                    bound = limit if dtype == "float32" else None
                    note = f"{key} of {row.peer} at N={row.shape[0]}"
                    found.append(Target(f"error of {what}, {op} {dtype}", value, "<=", bound, "relative", note))
    return found
