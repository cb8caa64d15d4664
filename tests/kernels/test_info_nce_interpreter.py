"""Triton's info_nce kernels, interpreted on the CPU, against the float64 definition of the primitives."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch
from vlmfast.kernels import info_nce as kernels

from vlmfast.ops.reference import info_nce as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (N, M, D): one tile and more, ragged or not, in every dimension
SHAPES = [(1, 1, 1), (1, 2, 3), (2, 1, 16), (2, 15, 64), (15, 17, 100), (17, 1, 3), (64, 65, 16), (65, 64, 64),
          (64, 64, 1), (129, 17, 100), (130, 129, 64), (129, 130, 3)]
MODES = ["plain", "offset", "bias", "smoothing", "mask", "mask-smoothing", "labels", "labels-mask-smoothing"]


def unit_rows(n, d, dtype=torch.float32):
    # one number, normalised, is a sign: equal numbers' rounding errors add up instead of cancelling
    rows = torch.randn(n, d)
    return (F.normalize(rows, dim=1) if d > 1 else rows).to(dtype)


class Case:
    """Arguments of the primitives, for the kernels and, widened, for the definition."""

    def __init__(self, n, m, d, mode="plain", dtype=torch.float32, scale=14.3):
        self.image, self.text = unit_rows(n, d, dtype), unit_rows(m, d, dtype)
        self.scale, self.bias = torch.tensor(scale), torch.tensor(-2.5) if "bias" in mode else None
        self.offset = {"offset": 2 - n // 3}.get(mode, 0)
        self.smoothing = 0.1 if "smoothing" in mode else 0.0
        self.labels = self.text_labels = self.mask = None
        if "labels" in mode:
            self.labels, self.text_labels = torch.randint(-3, n // 3, (n,)), torch.randint(-3, n // 3, (m,))
            self.labels[0] = 2**40 + 3  # 64 bits count
            self.text_labels[-1] = 3
        if "mask" in mode:
            self.mask = torch.rand(n, m) < 0.3
        self.row_weight, self.column_weight = torch.randn(n) / max(n, 1), torch.tensor(0.5 / max(m, 1))

    def arguments(self, dtype=None):
        image, text, scale, bias = (x if x is None or dtype is None else x.to(dtype)
                                    for x in (self.image, self.text, self.scale, self.bias))
        return image, text, scale, bias, self.labels, self.text_labels, self.mask, self.offset

    def statistics(self, full, dtype=None, module=kernels):
        return module.forward(*self.arguments(dtype), full)

    def gradients(self, module=kernels, dtype=None, needs=(True, True, True), wide=False, sides=(True, True),
                  stats=None):
        """`dtype` widens the definition's arguments; the statistics are computed unless given."""
        full = self.labels is not None or self.smoothing > 0
        stats = self.statistics(full, dtype, module) if stats is None else stats
        weights = [weight.to(dtype or weight.dtype) if side else None
                   for weight, side in zip((self.row_weight, self.column_weight), sides, strict=True)]
        return module.backward(*self.arguments(dtype), *stats, *weights, self.smoothing, *needs, wide)

    def siglip(self, module=kernels, dtype=None, needs=(True, True, True), wide=False):
        image, text, scale, bias, *_ = self.arguments(dtype)
        return module.siglip(image, text, scale, bias, self.offset, self.row_weight.to(dtype or torch.float32), *needs,
                             wide)

    def eager(self):
        """(d_image, d_text, d_scale) of the formula people write, in the features' own dtype (offset 0)."""
        image, text, scale = (x.clone().requires_grad_() for x in (self.image, self.text, self.scale))
        logits = scale * (image @ text.T) + (0 if self.bias is None else self.bias)
        pairs = reference.targets_of(logits, self.labels, self.text_labels, self.mask)
        rows = reference.line_losses(logits, *pairs, self.smoothing)
        columns = reference.line_losses(logits.T, *(pair.T for pair in pairs), self.smoothing)
        ((self.row_weight * rows).sum() + (self.column_weight * columns).sum()).backward()
        return image.grad, text.grad, scale.grad


def relative(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_statistics(case, full):
    truths = case.statistics(full, torch.float64, reference)
    sames = case.statistics(full, None, reference)
    for side, ours, truth, same in zip(("row", "column"), case.statistics(full), truths, sames, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        for plane in range(len(truth)):
            infinite = truth[plane].isinf()
            assert torch.equal(ours[plane].isinf(), infinite), f"{side} statistic {plane}"
            assert_no_worse_than_torch(ours[plane][~infinite], truth[plane][~infinite], same[plane][~infinite],
                                       what=f"{side} statistic {plane}")


def assert_gradients(ours, truths, sames, names=("d_image", "d_text", "d_scale"), size=None):
    for name, our, truth, same in zip(names[:len(ours)], ours, truths, sames, strict=True):
        assert_no_worse_than_torch(our, truth, same, factor=3.0, size=size, what=name)
        if truth.ndim == 2 and size is None:
            assert_grad_not_dropped(our, truth, what=name)


@pytest.mark.parametrize("n, m, d", SHAPES, ids=lambda size: str(size))
def test_matches_the_definition_in_every_shape(n, m, d):
    case = Case(n, m, d, "bias")
    assert_statistics(case, full=False)
    assert_gradients(case.gradients(), case.gradients(reference, torch.float64), case.gradients(reference))
    loss, *gradients = case.siglip()
    true_loss, *truths = case.siglip(reference, torch.float64)
    same_loss, *sames = case.siglip(reference)
    assert_no_worse_than_torch(loss, true_loss, same_loss, what="row_loss")
    assert_gradients(gradients, truths, sames, ("d_image", "d_text", "d_scale", "d_bias"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_statistics_match_the_definition(dtype, mode):
    for full in (False, True):
        assert_statistics(Case(65, 130, 48, mode, dtype), full)


@pytest.mark.parametrize("mode", MODES)
def test_float32_gradients_match_the_definition(mode):
    case = Case(65, 130, 48, mode)
    assert_gradients(case.gradients(), case.gradients(reference, torch.float64), case.gradients(reference))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "offset"])
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=list(DTYPES)[1:])
def test_16_bit_gradients_are_no_worse_than_the_eager_formula(dtype, mode):
    case = Case(129, 129, 48, mode, dtype)
    d_image, d_text, d_scale = case.gradients()
    assert (d_image.dtype, d_text.dtype, d_scale.dtype) == (dtype, dtype, torch.float32)
    assert_gradients((d_image, d_text), case.gradients(reference, torch.float64)[:2], case.eager()[:2])
    # one number's error is a matter of luck: eight draws of the weights
    stats, draws = case.statistics(True), []
    for _ in range(8):
        case.row_weight = torch.rand(129) / 129
        draws.append((case.gradients(needs=(False, False, True), stats=stats)[2],
                      case.gradients(reference, torch.float64)[2], case.eager()[2]))
    ours, truth, eager = (torch.stack(values) for values in zip(*draws, strict=True))
    assert relative(ours, truth) <= relative(eager, truth)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_siglip_matches_the_definition(dtype):
    case = Case(65, 130, 48, "bias", dtype)
    case.offset = 40
    loss, *ours = case.siglip(wide=True)
    true_loss, *truths = case.siglip(reference, torch.float64)
    assert relative(loss, true_loss) < 1e-6
    for our, truth in zip(ours, truths, strict=True):
        assert our.dtype == torch.float32
        assert relative(our, truth) < (5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert torch.equal(case.siglip(needs=(False, False, False))[0], loss)


def test_siglip_loss_of_easy_negatives_keeps_its_relative_precision():
    case = Case(15, 33, 16, "bias")
    case.bias = torch.tensor(-25.0)
    case.offset = 1000
    assert relative(case.siglip()[0], case.siglip(reference, torch.float64)[0]) < 1e-5


@pytest.mark.parametrize("sides", [(True, False), (False, True), (False, False)], ids=["rows", "columns", "neither"])
@pytest.mark.parametrize("mode", ["plain", "labels-mask-smoothing"])
def test_a_direction_can_be_left_out(mode, sides):
    case = Case(65, 70, 32, mode)
    stats = case.statistics(True)
    if sides == (False, False):
        assert not any(x.any() for x in case.gradients(sides=sides, stats=stats))
    else:
        truth = case.gradients(reference, torch.float64, sides=sides)
        assert_gradients(case.gradients(sides=sides, stats=stats), truth, case.gradients(reference, sides=sides))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True),
                                   (False, True, True), (True, False, True)], ids=str)
def test_only_wanted_gradients_are_returned(needs):
    case = Case(65, 70, 32)
    stats = case.statistics(False)
    for run in (lambda needs: case.gradients(needs=needs, stats=stats),
                lambda needs: case.siglip(needs=needs)[1:]):
        for ours, everything, need in zip(run(needs), run((True, True, True)), (*needs, needs[2]), strict=False):
            assert (ours is not None) == need
            assert ours is None or relative(ours, everything) < 1e-6


def test_wide_gradients_are_float32():
    case = Case(33, 40, 32, dtype=torch.bfloat16)
    narrow, wide = case.gradients(), case.gradients(wide=True)
    assert wide[0].dtype == wide[1].dtype == torch.float32
    assert torch.equal(wide[0].bfloat16(), narrow[0]) and torch.equal(wide[1].bfloat16(), narrow[1])


def test_lanes_past_the_end_count_for_nothing():
    case = Case(129, 129, 32, scale=1 / 0.07)
    assert relative(case.statistics(False)[0][0], case.statistics(False, torch.float64, reference)[0][0]) < 1e-6
    # logits of -95 to -100: a padded logit of 0 in a maximum would make every sum underflow
    case = Case(100, 100, 1)
    case.image, case.text = torch.rand(100, 1) * 5 + 95, -torch.ones(100, 1)
    case.scale = torch.tensor(1.0)
    for ours, truth in zip(case.statistics(False), case.statistics(False, torch.float64, reference), strict=True):
        assert relative(ours, truth) < 1e-6


@pytest.mark.parametrize("kind", ["random", "collapsed", "opposite", "unnormalised"])
def test_extreme_logits_neither_overflow_nor_vanish(kind):
    case = Case(65, 70, 16, scale=100.0)
    if kind in ("collapsed", "opposite"):
        case.text = case.text[:1].expand(70, 16)
        case.image = (case.text if kind == "collapsed" else -case.text)[:65]
    elif kind == "unnormalised":
        case.image = case.image * torch.logspace(-3, 1, 65)[:, None]
        case.text = case.text * torch.logspace(1, -3, 70)[:, None]
    assert_statistics(case, False)
    # where all features are equal, every gradient is a sum that cancels
    size = 100 * case.row_weight.abs().sum().item() if kind in ("collapsed", "opposite") else None
    assert_gradients(case.gradients(), case.gradients(reference, torch.float64), case.gradients(reference), size=size)


@pytest.mark.parametrize("mode", ["mask", "labels-mask-smoothing"])
def test_a_line_without_pairs_gives_no_gradient_and_no_nan(mode):
    case = Case(65, 70, 32, mode)
    case.mask[3], case.mask[:, 66:] = True, True
    row_stats, column_stats = case.statistics(True)
    truth = case.statistics(True, torch.float64, reference)
    assert torch.equal(row_stats[0].isinf(), truth[0][0].isinf()) and row_stats[0, 3] == -torch.inf
    assert torch.equal(column_stats[0].isinf(), truth[1][0].isinf()) and column_stats[0, 66] == -torch.inf
    assert not row_stats.isnan().any() and not column_stats.isnan().any()
    d_image, d_text, d_scale = case.gradients()
    assert not d_text[66:].any()
    assert "labels" not in mode or not d_image[3].any()
    assert_gradients((d_image, d_text, d_scale), case.gradients(reference, torch.float64), case.gradients(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides_do_not_matter(dtype):
    case = Case(33, 40, 64, "mask", dtype)
    expected = case.statistics(True), case.gradients(), case.siglip()
    wide_image = torch.full((33, 3, 64), torch.nan, dtype=dtype)
    wide_text = torch.full((41, 70), torch.nan, dtype=dtype)
    wide_image[:, 1], wide_text[1:, 5:69] = case.image, case.text
    case.image, case.text = wide_image[:, 1], wide_text[1:, 5:69]
    case.mask = torch.stack([case.mask, ~case.mask], 1)[:, 0]
    for ours, theirs in zip((case.statistics(True), case.gradients(), case.siglip()), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_expanded_rows_are_rows():
    case = Case(20, 33, 32)
    case.text = case.text[:1].expand(33, 32)
    row_weight = case.row_weight
    case.row_weight = row_weight[:1].expand(20)
    expanded = *case.gradients(), *case.siglip()
    case.text, case.row_weight = case.text.contiguous(), row_weight[0]
    assert all(torch.equal(a, b) for a, b in zip(expanded, (*case.gradients(), *case.siglip()), strict=True))


def test_repeated_runs_are_bitwise_equal():
    case = Case(130, 129, 64, "smoothing", torch.bfloat16)
    first, second = ((*case.statistics(True), *case.gradients(), *case.siglip()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["plain", "labels-mask-smoothing"])
def test_chunks_of_rows_add_up(mode, monkeypatch):
    case = Case(200, 70, 32, mode)
    case.offset = 0 if case.labels is not None else -30
    whole = *case.gradients(), *case.siglip()
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 64 * 70 * 4)
    assert kernels._chunk_rows(200, 70, torch.float32, 64) == 64
    for ours, theirs in zip((*case.gradients(), *case.siglip()), whole, strict=True):
        assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_capability_gives_the_same_statistics(dtype, monkeypatch):
    case = Case(129, 300, 64, "plain", dtype)
    case.offset = 140
    expected = *case.statistics(False), *case.gradients(wide=True)
    monkeypatch.setattr(kernels, "_capability", lambda device: 90)
    monkeypatch.setattr(kernels, "_splits", lambda row_tiles, device: 7)
    for ours, theirs in zip((*case.statistics(False), *case.gradients(wide=True)), expected, strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_of_a_converged_batch_keep_their_precision(dtype):
    # positives of 14.3 beside negatives near 0: probability and target of the positives agree to 1e-4
    image = F.normalize(torch.eye(128, 128) + 0.01 * torch.randn(128, 128), dim=1)
    case = Case(128, 128, 128, dtype=dtype)
    case.image, case.text = image.to(dtype), image.to(dtype)
    case.row_weight, case.column_weight = torch.tensor(1 / 256), torch.tensor(1 / 256)
    loss = reference.info_nce(case.image.double(), case.text.double(), case.scale.double()).item()
    assert 1e-5 < loss < 7e-4
    ours, truth = case.gradients(wide=True), case.gradients(reference, torch.float64)
    limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for our, true in zip(ours, truth, strict=True):
        assert relative(our, true) < limit


def test_float16_gradients_survive_small_weights():
    case = Case(65, 70, 32, dtype=torch.float16)
    case.row_weight, case.column_weight = torch.full((65,), 1e-8), torch.tensor(2e-8)
    for ours, truth in zip(case.gradients(wide=True), case.gradients(reference, torch.float64), strict=True):
        assert relative(ours, truth) < 1e-3
    case.row_weight, case.column_weight = torch.zeros(65), torch.tensor(0.0)
    assert not any(x.any() for x in case.gradients())


@pytest.mark.parametrize("n, m, d", [(0, 5, 16), (5, 0, 16), (0, 0, 16), (5, 7, 0)], ids=str)
def test_empty_dimensions_work(n, m, d):
    case = Case(n, m, d)
    case.image, case.text = torch.randn(n, d), torch.randn(m, d)
    case.row_weight, case.column_weight = torch.ones(n), torch.tensor(1.0)
    for full in (False, True):
        ours, truth = case.statistics(full), case.statistics(full, None, reference)
        assert all(torch.allclose(a, b) for a, b in zip(ours, truth, strict=True))
    ours = *case.gradients(), *case.siglip()
    truth = *case.gradients(reference), *case.siglip(reference)
    assert all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(ours, truth, strict=True))


def test_rejects_float64():
    case = Case(3, 3, 4)
    with pytest.raises(TypeError, match="image is torch.float64"):
        case.statistics(False, torch.float64)
