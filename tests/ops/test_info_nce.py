"""info_nce and siglip_loss on the CPU against their definitions in float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import assert_agree
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch

import vlmfast
from vlmfast.ops import cached_loss, info_nce, siglip_loss
from vlmfast.ops.info_nce import line_statistics
from vlmfast.ops.reference import info_nce as reference

LOSSES = {"info_nce": (info_nce, reference.info_nce), "siglip_loss": (siglip_loss, reference.siglip_loss)}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-1": {"label_smoothing": 1.0},
    "labels": {"labels": "thirds"},
    "labels-smoothing": {"labels": "thirds", "label_smoothing": 0.1},
    "labels-same": {"labels": "same"},
    "labels-unique": {"labels": "unique"},
    "mask": {"mask": 0.5},
    "mask-labels-smoothing": {"mask": 0.5, "labels": "thirds", "label_smoothing": 0.2},
    "image_to_text": {"direction": "image_to_text"},
    "text_to_image-smoothing": {"direction": "text_to_image", "label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "sum-weight": {"reduction": "sum", "weight": True},
    "mean-weight": {"weight": True, "label_smoothing": 0.1},
    "none-weight": {"weight": True, "reduction": "none"},
}


def unit_rows(n, d, dtype=torch.float32):
    # one number, normalised, is a sign: rounding errors of equal numbers add up instead of cancelling
    rows = torch.randn(n, d)
    return (F.normalize(rows, dim=1) if d > 1 else rows).to(dtype)


def options_for(n, name):
    options = dict(OPTIONS[name])
    if "labels" in options:
        kind = options["labels"]
        options["labels"] = {"thirds": torch.randint(-5, max(n // 3, 1) - 5, (n,)), "same": torch.full((n,), 7),
                             "unique": torch.randperm(n)}[kind]
    if "mask" in options:
        options["mask"] = torch.rand(n, n) < options["mask"]
    if "weight" in options:
        options["weight"] = torch.rand(n) + 0.1
    return options


def run(loss, image, text, scale, bias, **options):
    """Loss and gradients of its square, so that the upstream gradient is neither 1 nor constant."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, text, scale)]
    if bias is not None:
        leaves.append(bias.detach().clone().requires_grad_())
    value = loss(*leaves[:3], logit_bias=leaves[3] if bias is not None else None, **options)
    gradients = torch.autograd.grad((value * value).sum(), leaves)
    return value.detach(), *gradients


def as_double(options):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}


def check(name, image, text, scale, bias, **options):
    """Ours against the definition in float64 and in the same dtype; also ours in float64."""
    ours_loss, definition = LOSSES[name]
    ours = run(ours_loss, image, text, scale, bias, **options)
    plain = {k: v for k, v in options.items() if k != "memory"}
    wide = as_double(plain)
    double = image.double(), text.double(), scale.double(), None if bias is None else bias.double()
    truth = run(definition, *double, **wide)
    # the definition computes in float32 from 16-bit inputs; their gradients are rounded to the input's dtype
    eager = run(definition, image, text, scale, bias, **plain)
    sizes = {}
    if bias is not None and name == "siglip_loss":
        signs = 1 - 2 * torch.eye(len(image), dtype=torch.float64)
        sizes["d_bias"] = (2 * truth[0] * (signs * reference.logits_of(*double)).sigmoid().mean(1).sum()).item()
    # the scale's gradient is a sum over rows, whose signs differ
    sizes["d_scale"] = (double[0] * truth[1]).sum(1).abs().sum().item() / abs(scale.item())
    parts = "loss", "d_image", "d_text", "d_scale", "d_bias"
    for part, mine, true, same in zip(parts, ours, truth, eager, strict=False):
        if part == "d_bias" and name == "info_nce":
            assert not mine.any(), "the bias of a softmax has no gradient"
            continue
        # below this, float64's own error in the formula is larger than the result
        if true.norm() < 1e-9:
            assert mine.double().norm() < 1e-6, part
            continue
        assert_no_worse_than_torch(mine, true, same, factor=2.0 if part == "loss" else 3.0, size=sizes.get(part),
                                   what=part)
    if truth[1].norm() > 1e-9:
        assert_grad_not_dropped(ours[1], truth[1], what="d_image")
        assert_grad_not_dropped(ours[2], truth[2], what="d_text")


@pytest.mark.parametrize("memory", ["cache", "recompute"])
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_definition(name, memory):
    for n, d in ((2, 3), (17, 64), (130, 100)):
        for scale in (14.3, 100.0):
            check("info_nce", unit_rows(n, d), unit_rows(n, d), torch.tensor(scale), torch.tensor(-2.0), memory=memory,
                  **options_for(n, name))


@pytest.mark.parametrize("d", [1, 3, 16, 64, 100, 384, 640, 1152])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_shapes(n, d):
    image, text, scale = unit_rows(n, d), unit_rows(n, d), torch.tensor(14.3)
    check("info_nce", image, text, scale, None, memory="recompute" if n % 2 else "cache")
    check("siglip_loss", image, text, scale, torch.tensor(-2.0))


@pytest.mark.parametrize("shape", [(1000, 512), (600, 768)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_tiles(shape, dtype):
    n, d = shape
    image, text = unit_rows(n, d, dtype), unit_rows(n, d, dtype)
    for memory in ("cache", "recompute"):
        check("info_nce", image, text, torch.tensor(14.3), None, memory=memory)
    check("siglip_loss", image, text, torch.tensor(10.0), torch.tensor(-10.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "labels-smoothing", "mask"])
def test_narrow_inputs_have_a_float32_loss(name, dtype):
    image, text = unit_rows(129, 64, dtype), unit_rows(129, 64, dtype)
    options = options_for(129, name)
    assert info_nce(image, text, 14.3, **options).dtype == torch.float32
    check("info_nce", image, text, torch.tensor(14.3), None, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    for n in (1, 5, 8):
        options = as_double(options_for(n, name))
        image, text = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        for memory in ("cache", "recompute"):
            assert torch.autograd.gradcheck(lambda a, b, s, o=options, m=memory: info_nce(a, b, s, memory=m, **o),
                                            (image, text, scale))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_siglip(reduction):
    inputs = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.7, -0.3)]
    assert torch.autograd.gradcheck(lambda *x: siglip_loss(*x, reduction=reduction), inputs)


def test_rectangular_batches_with_labels():
    image, text = unit_rows(40, 24), unit_rows(93, 24)
    labels, text_labels = torch.randint(0, 12, (40,)), torch.randint(0, 12, (93,), dtype=torch.int32)
    check("info_nce", image, text, torch.tensor(9.0), None, labels=labels, text_labels=text_labels)


def test_a_line_without_positives_has_no_loss_and_no_gradient():
    image = unit_rows(4, 8).requires_grad_()
    loss = info_nce(image, unit_rows(3, 8), 5.0, labels=torch.tensor([0, 1, 2, 9]), text_labels=torch.arange(3),
                    direction="image_to_text")
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient[3].any() and gradient[:3].all(dim=1).all()


def test_large_logits_do_not_overflow():
    # unnormalised rows spread a tile's logits over thousands, beyond what one exponent can share
    image, text = 30 * torch.randn(150, 16), 30 * torch.randn(150, 16)
    for memory in ("cache", "recompute"):
        check("info_nce", image, text, torch.tensor(1.0), None, memory=memory)
        check("info_nce", image, text, torch.tensor(-1.0), None, memory=memory)
    check("siglip_loss", image, text, torch.tensor(1.0), torch.tensor(3.0))


def test_antipodal_features_at_scale_100():
    image = unit_rows(64, 32)
    check("info_nce", image, -image, torch.tensor(100.0), None, memory="cache")
    check("info_nce", image, -image, torch.tensor(100.0), None, memory="recompute")


def test_converged_batch_keeps_relative_precision():
    # the loss is about 1e-11 of a logit: without leaving the positive out of the sum nothing would remain
    image = torch.eye(96)
    ours = run(info_nce, image, image, torch.tensor(30.0), None)
    truth = run(reference.info_nce, image.double(), image.double(), torch.tensor(30.0).double(), None)
    exact_loss = torch.log1p(95 * torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    assert abs(ours[0].double() / exact_loss - 1) < 1e-6
    assert ((ours[1].double() - truth[1]).norm() / truth[1].norm()) < 1e-2
    assert ours[0] > 0 and ours[1].norm() > 0


@pytest.mark.parametrize("memory", ["cache", "recompute"])
@pytest.mark.parametrize("leaves", ["image", "text", "scale", "image scale", "text scale", "image text"])
def test_gradients_one_by_one(leaves, memory):
    tensors = {"image": unit_rows(33, 20), "text": unit_rows(33, 20), "scale": torch.tensor(12.0)}
    wanted = [tensors[name].requires_grad_() for name in leaves.split()]
    ours = torch.autograd.grad(info_nce(*tensors.values(), memory=memory), wanted)
    truth = torch.autograd.grad(reference.info_nce(*(x.double() for x in tensors.values())), wanted)
    for mine, true in zip(ours, truth, strict=True):
        assert ((mine - true).norm() / true.norm()) < 1e-6
    ours = torch.autograd.grad(siglip_loss(*tensors.values(), -1.0), wanted)
    truth = torch.autograd.grad(reference.siglip_loss(*(x.double() for x in tensors.values()), -1.0), wanted)
    for mine, true in zip(ours, truth, strict=True):
        assert ((mine - true).norm() / true.norm()) < 1e-6


def test_scale_as_float_tensor_parameter_or_expression():
    image, text = unit_rows(20, 8), unit_rows(20, 8)
    parameter = torch.nn.Parameter(torch.tensor(2.0))
    losses = [info_nce(image, text, scale) for scale in (parameter.exp().item(), parameter.detach().exp(),
                                                         parameter.exp(), parameter.exp().reshape(1),
                                                         parameter.detach().exp().double())]
    assert torch.stack([loss.detach() for loss in losses]).std() < 1e-6
    losses[2].backward()
    exact = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    reference.info_nce(image.double(), text.double(), exact.exp()).backward()
    assert abs(parameter.grad - exact.grad) < 1e-6


LAYOUTS = {
    "strided rows": lambda x: torch.cat([x, x], 1)[:, :x.shape[1]],
    "offset": lambda x: torch.cat([x[:3], x])[3:],
    "every second row": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "transposed": lambda x: x.T.contiguous().T,
    "expanded": lambda x: x[:1].expand(len(x), -1),
    "reversed view": lambda x: x.flip(0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    image, text = LAYOUTS[layout](unit_rows(37, 24, dtype)), LAYOUTS[layout](unit_rows(37, 24, dtype))
    scale = torch.tensor(8.0)
    views = [image.detach().requires_grad_(), text.detach().requires_grad_()]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (image, text)]
    for loss in (info_nce, siglip_loss):
        ours, plain = loss(*views, scale), loss(*copies, scale)
        assert torch.equal(ours, plain)
        for mine, same in zip(torch.autograd.grad(ours, views), torch.autograd.grad(plain, copies), strict=True):
            assert torch.equal(mine, same)


def test_backward_can_run_twice():
    for memory in ("cache", "recompute"):
        image, text = unit_rows(200, 8).requires_grad_(), unit_rows(200, 8).requires_grad_()
        loss = info_nce(image, text, 10.0, memory=memory)
        first = torch.autograd.grad(loss, (image, text), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (image, text)), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_is_refused(name):
    image = unit_rows(4, 8).requires_grad_()
    loss = LOSSES[name][0](image, unit_rows(4, 8), 3.0)
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: the second derivative is not implemented"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_deterministic_and_independent_of_threads(threads):
    image, text = unit_rows(700, 48), unit_rows(700, 48)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for loss, options in ((info_nce, {"memory": "cache"}), (info_nce, {"memory": "recompute"}), (siglip_loss, {})):
            first, second = (run(loss, image, text, torch.tensor(14.3), None, **options) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            torch.set_num_threads(1)
            single = run(loss, image, text, torch.tensor(14.3), None, **options)
            torch.set_num_threads(threads)
            for mine, one in zip(first, single, strict=True):
                assert ((mine - one).norm() / one.norm()) < 1e-6
    finally:
        torch.set_num_threads(before)


def test_cached_tiles_survive_a_change_of_threads():
    image, text = unit_rows(900, 16).requires_grad_(), unit_rows(900, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loss = info_nce(image, text, 14.3, memory="cache")
        torch.set_num_threads(1)
        (gradient,) = torch.autograd.grad(loss, image)
    finally:
        torch.set_num_threads(before)
    (truth,) = torch.autograd.grad(reference.info_nce(image.double(), text.double(), 14.3), image)
    assert ((gradient - truth).norm() / truth.norm()) < 1e-6


def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)
    try:
        for n in (1, 3, 40, 300):
            results = run(info_nce, unit_rows(n, 5), unit_rows(n, 5), torch.tensor(3.0), None, label_smoothing=0.1)
            results += run(siglip_loss, unit_rows(n, 5), unit_rows(n, 5), torch.tensor(3.0), torch.tensor(1.0))
            assert all(torch.isfinite(x).all() for x in results)
    finally:
        torch.use_deterministic_algorithms(False)


def test_zero_width():
    loss = info_nce(torch.empty(6, 0), torch.empty(6, 0), 3.0)
    assert abs(loss - torch.tensor(6.0).log()) < 1e-6


def test_saved_memory_is_linear_in_recompute_mode():
    n, d = 1024, 64
    image, text = unit_rows(n, d).requires_grad_(), unit_rows(n, d).requires_grad_()
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        info_nce(image, text, 14.3, memory="recompute")
    assert sum(sizes.values()) <= 4 * 2 * n * d + 8 * 4 * n + 64


# labels need the full statistics
@pytest.mark.parametrize("name, full", [("plain", False), ("plain", True), ("mask", False), ("mask", True),
                                        ("labels", True), ("mask-labels-smoothing", True)])
def test_line_statistics_match_the_primitive(name, full):
    # a strip of a larger batch: most columns have their positive elsewhere, some rows have none
    options = options_for(220, name)
    image, text, scale = unit_rows(40, 9), unit_rows(220, 9), torch.tensor(7.0)
    image[3:9] = text[103:109]
    labels, mask = options.get("labels"), options.get("mask")
    arguments = (None if labels is None else labels[:40], labels, None if mask is None else mask[:40], 100, full)
    ours = line_statistics(image, text, scale, None, *arguments)
    truth = reference.forward(image.double(), text.double(), scale.double(), None, *arguments)
    for mine, true in zip(ours, truth, strict=True):
        assert mine.shape == true.shape
        assert torch.equal(mine.isinf(), true.isinf())
        assert (mine - true)[~true.isinf()].abs().max() < 2e-5


def test_statistics():
    image, text, scale = unit_rows(50, 16), unit_rows(50, 16), 9.0
    image[:20] = text[:20]
    loss, stats = info_nce(image, text, scale, return_stats=True)
    logits = scale * image.double() @ text.double().T
    diagonal = logits.diagonal()
    expected = {
        "row_lse": logits.logsumexp(1), "column_lse": logits.logsumexp(0), "positive_logit": diagonal.mean(),
        "negative_logit": (logits.sum() - diagonal.sum()) / (50 * 49),
        "image_to_text_accuracy": (logits.argmax(1) == torch.arange(50)).double().mean(),
        "text_to_image_accuracy": (logits.argmax(0) == torch.arange(50)).double().mean(),
    }
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        assert (stats[key].double() - value).abs().max() < 1e-5, key
    assert abs(loss - info_nce(image, text, scale)) < 1e-6
    assert not any(value.requires_grad for value in stats.values())


def test_cached_loss_gives_the_feature_gradients():
    image, text, log_scale = unit_rows(30, 8), unit_rows(30, 8), torch.tensor(2.0, requires_grad=True)
    loss, d_image, d_text = cached_loss(image, text, log_scale.exp(), label_smoothing=0.1)
    leaves = [x.double().requires_grad_() for x in (image, text, log_scale.detach())]
    truth = reference.info_nce(leaves[0], leaves[1], leaves[2].exp(), label_smoothing=0.1)
    truth.backward()
    assert not loss.requires_grad and abs(loss - truth) < 1e-6
    assert (d_image - leaves[0].grad).norm() < 1e-6 and (d_text - leaves[1].grad).norm() < 1e-6
    assert abs(log_scale.grad - leaves[2].grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    image, text = unit_rows(9, 6, dtype), torch.cat([unit_rows(9, 6, dtype)] * 2, 1)[:, :6]
    wide = torch.promote_types(dtype, torch.float32)
    scale, bias, weight = (torch.tensor(x, dtype=wide) for x in (5.0, -1.0, 0.3))
    labels, mask = torch.randint(0, 4, (9,)), torch.rand(9, 9) < 0.3
    ops = torch.ops.vlmfast
    for extra in ((None, None, None), (labels, labels, mask)):
        full = extra[0] is not None
        for keep in (False, True):
            arguments = image, text, scale, bias, *extra, 0
            torch.library.opcheck(ops.info_nce_fwd.default, (*arguments, full, keep, 3, 0.0),
                                  test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
            _, rows, columns, tiles = ops.info_nce_fwd(*arguments, full, keep, 3, 0.0)
            torch.library.opcheck(ops.info_nce_bwd.default, (*arguments, rows, columns, tiles, weight, weight, 0.0,
                                                             True, True, True, False))
    torch.library.opcheck(ops.siglip.default, (image, text, scale, bias, 0, weight, True, True, True, False))


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["cache", "recompute"])
def test_compiles_to_one_graph(memory):
    image, text = unit_rows(65, 12).requires_grad_(), unit_rows(65, 12).requires_grad_()
    log_scale = torch.tensor(2.0, requires_grad=True)

    def step(image, text, log_scale):
        return info_nce(image * 1.0, text, log_scale.exp(), memory=memory, label_smoothing=0.1) \
            + siglip_loss(image, text, log_scale.exp(), -3.0)

    leaves = image, text, log_scale
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, ours = step(*leaves), compiled(*leaves)
    assert abs(plain - ours) < 1e-6
    for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(ours, leaves), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_autocast_promotes_mixed_features():
    image, text = unit_rows(12, 8, torch.bfloat16), unit_rows(12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(image, text, 5.0)
    assert loss.dtype == torch.float32 and abs(loss - info_nce(image.float(), text, 5.0)) < 1e-6


def test_reference_backend_computes_the_same():
    image, text = unit_rows(31, 8), unit_rows(31, 8)
    for loss, options in ((info_nce, {"label_smoothing": 0.1}), (info_nce, {"mask": torch.rand(31, 31) < 0.4}),
                          (siglip_loss, {})):
        native = run(loss, image, text, torch.tensor(6.0), torch.tensor(-1.0), **options)
        with vlmfast.backend("reference"):
            plain = run(loss, image, text, torch.tensor(6.0), torch.tensor(-1.0), **options)
        for mine, same in zip(native, plain, strict=True):
            assert (mine - same).norm() <= 2e-6 * same.norm() + 1e-7


def bad_calls():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    yield "not a tensor", TypeError, "image is a list", lambda: info_nce([[1.0]], b, 1.0)
    yield "rank", ValueError, r"text has shape \(4, 8, 1\)", lambda: info_nce(a, b[..., None], 1.0)
    yield "rows", ValueError, "text has 3 rows, image has 4", lambda: info_nce(a, b[:3], 1.0)
    yield "width", ValueError, "text has width 7, image has 8", lambda: info_nce(a, b[:, :7], 1.0)
    yield "mixed dtypes", ValueError, "text is torch.float64, image is torch.float32", lambda: info_nce(
        a, b.double(), 1.0)
    yield "integers", TypeError, "image is torch.int64", lambda: info_nce(a.long(), b.long(), 1.0)
    yield "device", ValueError, "text is on meta, image on cpu", lambda: info_nce(a, b.to("meta"), 1.0)
    yield "NaN scale", ValueError, "logit_scale or logit_bias is NaN", lambda: info_nce(a, b, float("nan"))
    yield "NaN bias", ValueError, "logit_scale or logit_bias is NaN", lambda: siglip_loss(a, b, 1.0, float("nan"))
    yield "scale shape", ValueError, r"logit_scale has shape \(2,\)", lambda: info_nce(a, b, torch.ones(2))
    yield "labels length", ValueError, r"labels has shape \(3,\), it must be \[4\]", lambda: info_nce(
        a, b, 1.0, labels=torch.arange(3))
    yield "float labels", TypeError, "labels is torch.float32", lambda: info_nce(a, b, 1.0, labels=torch.ones(4))
    yield "lone text_labels", ValueError, "text_labels need labels", lambda: info_nce(
        a, b, 1.0, text_labels=torch.arange(4))
    yield "empty batch", ValueError, "the batch is empty", lambda: info_nce(a[:0], b[:0], 1.0)
    yield "empty siglip", ValueError, "the batch is empty", lambda: siglip_loss(a[:0], b[:0], 1.0)
    yield "direction", ValueError, "direction is 'up'", lambda: info_nce(a, b, 1.0, direction="up")
    yield "reduction", ValueError, "reduction is 'max'", lambda: info_nce(a, b, 1.0, reduction="max")
    yield "smoothing", ValueError, "label_smoothing is 1.5", lambda: info_nce(a, b, 1.0, label_smoothing=1.5)
    yield "memory", ValueError, "memory is 'disk'", lambda: info_nce(a, b, 1.0, memory="disk")
    yield "comm", ValueError, "comm is 'pigeon'", lambda: info_nce(a, b, 1.0, comm="pigeon")
    yield "targets", ValueError, "targets is 'labels'", lambda: info_nce(a, b, 1.0, targets="labels")
    yield "mask shape", ValueError, r"mask is \(3, 4\)", lambda: info_nce(a, b, 1.0, mask=torch.zeros(3, 4) > 0)
    yield "mask dtype", ValueError, "mask is .* it must be", lambda: info_nce(a, b, 1.0, mask=torch.zeros(4, 4))
    yield "weight", ValueError, r"weight is \(2,\)", lambda: info_nce(a, b, 1.0, weight=torch.ones(2))


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_input_is_named(case):
    _, error, message, call = case
    with pytest.raises(error, match=message):
        call()


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="backend is 'tpu'"), vlmfast.backend("tpu"):
        pass
    with vlmfast.backend("cuda"), pytest.raises(ValueError, match="backend 'cuda' cannot run on a cpu tensor"):
        info_nce(torch.ones(2, 2), torch.ones(2, 2), 1.0)
    assert set(vlmfast.backends()) == {"reference", "native", "triton", "cuda"}


ISA_SCRIPT = """
import torch, vlmfast._native
from vlmfast.ops import info_nce, siglip_loss
torch.manual_seed(3)
image, text = torch.randn(300, 40, requires_grad=True), torch.randn(300, 40, requires_grad=True)
scale = torch.tensor(0.7, requires_grad=True)
loss = info_nce(image, text, scale, label_smoothing=.1) + siglip_loss(image, text, scale, -1.)
loss.backward()
print(vlmfast._native.build_info()["isa"], loss.item(), image.grad.norm().item(), text.grad.abs().sum().item(),
      scale.grad.item())
"""


def test_instruction_sets_agree():
    assert_agree(ISA_SCRIPT)


def test_an_unknown_instruction_set_is_named():
    done = subprocess.run([sys.executable, "-c", ISA_SCRIPT], capture_output=True, text=True,
                          env={**os.environ, "VLMFAST_ISA": "avx9000"}, check=False)
    assert done.returncode != 0
    assert "VLMFAST_ISA is 'avx9000', it must be scalar, avx2, avx512 or avx512bf16" in done.stderr
