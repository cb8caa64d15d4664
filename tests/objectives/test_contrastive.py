"""Contrastive losses as modules, against open_clip, the UniCL reference numbers and the losses' definitions."""

import datetime
import importlib.util
import inspect
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from vlmfast.objectives import AlignLoss, ClipLoss, InfoNCE, SigLipLoss, UniCLLoss, fill_web_labels
from vlmfast.ops import info_nce
from vlmfast.ops.reference import info_nce as reference

UNICL_CASES = ("all_same", "all_unique_is_clip", "mixed_labels", "mixed_smoothing01", "web_pairs_zero")


def pair(n=6, width=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, width, generator=generator)).to(dtype).requires_grad_() for _ in range(2)]


def relative_error(ours, truth) -> float:
    assert ours.shape == truth.shape
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


@pytest.fixture(scope="module")
def open_clip_loss():
    """open_clip's loss.py alone: the package itself imports torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    spec = importlib.util.spec_from_file_location("open_clip_loss",
                                                  os.path.join(os.path.dirname(package.origin), "loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_signature_is_open_clips(open_clip_loss, name):
    ours, theirs = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name], getattr(open_clip_loss, name)
    for method in ("__init__", "forward"):
        mine, other = (inspect.signature(getattr(cls, method)).parameters for cls in (ours, theirs))
        mine = {key: mine[key] for key in mine if key != "chunk_size"}
        assert list(mine) == [key for key in other if key != "chunk_size"]
        assert [p.default for p in mine.values()] == [other[key].default for key in mine]


@pytest.mark.oracle
@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_equals_open_clip_on_one_process(open_clip_loss, name, dtype, bias):
    ours, theirs = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name](), getattr(open_clip_loss, name)()
    found = []
    for loss, precision in ((ours, dtype), (theirs, torch.float64)):
        image, text = pair(dtype=precision)
        scale = torch.tensor(9.0, dtype=precision, requires_grad=True)
        logit_bias = None if bias is None else torch.tensor(bias, dtype=precision, requires_grad=True)
        output = loss(image, text, scale, logit_bias, output_dict=True)
        assert list(output) == ["contrastive_loss"]
        assert torch.equal(loss(image, text, scale, logit_bias=logit_bias), output["contrastive_loss"])
        output["contrastive_loss"].backward()
        gradients = [image.grad, text.grad, scale.grad]
        if name == "SigLipLoss" and logit_bias is not None:
            gradients.append(logit_bias.grad)
        found.append([output["contrastive_loss"].detach(), *gradients])
    for mine, other in zip(*found, strict=True):
        assert relative_error(mine, other) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, True)])
def test_exact_flags_do_not_warn(flags):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipLoss(*flags, cache_labels=True, rank=0, world_size=2)
        ClipLoss(local_loss=True)


def test_wrong_flags_of_open_clip_warn_once():
    image, text = pair()
    with pytest.warns(UserWarning, match="local_loss without gather_with_grad") as caught:
        loss = ClipLoss(local_loss=True, world_size=2)
        loss.world_size = 1
        loss(image, text, torch.tensor(2.0))
    assert len(caught) == 1


def test_bad_arguments_are_named():
    image, text = pair()
    with pytest.raises(ValueError, match="use_horovod"):
        ClipLoss(use_horovod=True, world_size=2)
    with pytest.raises(ValueError, match="dist_impl is 'star'"):
        SigLipLoss(dist_impl="star")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        SigLipLoss(chunk_size=0)
    with pytest.raises(ValueError, match="ClipLoss: world_size is 2, torch.distributed runs 1"):
        ClipLoss(world_size=2)(image, text, torch.tensor(1.0))
    with pytest.raises(ValueError, match="InfoNCE: temperature is 0"):
        InfoNCE(0)
    for loss in (AlignLoss, UniCLLoss):
        with pytest.raises(ValueError, match="reduction_directions is 'max'"):
            loss(reduction_directions="max")
    with pytest.raises(TypeError, match="labels are torch.float32"):
        fill_web_labels(torch.zeros(2))


def test_info_nce_learns_its_scale():
    image, text = pair()
    loss = InfoNCE().double()
    assert loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    scale = torch.tensor(1 / 0.07, dtype=torch.float64, requires_grad=True)
    expected = reference.info_nce(image, text, scale)
    expected_grad, = torch.autograd.grad(expected, scale)
    value = loss(3 * image, 0.5 * text)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-7)
    assert loss.logit_scale.grad.item() == pytest.approx((expected_grad * scale).item(), rel=1e-6)
    unnormalised = InfoNCE(normalize=False).double()(3 * image, text)
    assert unnormalised.item() == pytest.approx(reference.info_nce(3 * image, text, scale).item(), rel=1e-7)


@pytest.mark.parametrize("value, expected", [(-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))])
def test_info_nce_clamps_its_parameter(value, expected):
    loss = InfoNCE()
    with torch.no_grad():
        loss.logit_scale.fill_(value)
    loss.clamp_logit_scale()
    assert loss.logit_scale.item() == pytest.approx(expected)
    assert loss.logit_scale.requires_grad


@pytest.mark.parametrize("directions", ["sum", "mean"])
def test_align_divides_and_smooths(directions):
    image, text = (F.normalize(x) for x in pair())
    loss = AlignLoss(temperature=0.5, reduction_directions=directions).double()
    value = loss(2 * image, text)
    logits = (image @ text.T / 0.5).detach()
    target = 0.9 * torch.eye(6, dtype=torch.float64) + 0.1 / 6
    both = [-(target * z.log_softmax(1)).sum(1).mean() for z in (logits, logits.T)]
    assert value.item() == pytest.approx((sum(both) / (1 if directions == "sum" else 2)).item(), rel=1e-12)
    value.backward()
    step = 1e-6
    with torch.no_grad():
        loss.temperature += step
        above = loss(image, text)
        loss.temperature -= 2 * step
        below = loss(image, text)
    assert loss.temperature.grad.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-6)


def test_align_temperature_starts_at_one():
    assert AlignLoss().temperature.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", UNICL_CASES)
def test_unicl_matches_reference_numbers(golden, case, dtype):
    _, inputs, outputs, metadata = golden(f"encoders/unicl_loss__{case}")
    tolerance = 1e-9 if dtype == torch.float64 else float(metadata["atol"])
    smoothing = metadata["config"]["label_smoothing"]
    labels = fill_web_labels(inputs["labels"])
    assert torch.equal(labels, outputs["filled_labels"])

    loss = UniCLLoss(label_smoothing=smoothing).to(dtype)
    total = UniCLLoss(label_smoothing=smoothing, reduction_directions="sum").to(dtype)
    with torch.no_grad():
        loss.logit_scale.copy_(inputs["logit_scale"])
        total.logit_scale.copy_(inputs["logit_scale"])
    image, text = (inputs[f"{name}_features"].to(dtype).requires_grad_() for name in ("image", "text"))
    value = loss(image, text, inputs["labels"])
    value.backward()
    found = {"loss_mean": value, "loss_sum": total(image, text, inputs["labels"]), "grad_image_features": image.grad,
             "grad_text_features": text.grad, "grad_logit_scale": loss.logit_scale.grad}
    for direction in ("image_to_text", "text_to_image"):
        for reduction, name in (("mean", f"loss_{direction}"), ("none", f"rows_{direction}")):
            found[name] = info_nce(F.normalize(image), F.normalize(text), loss.logit_scale.exp(), labels=labels,
                                   targets="labels", label_smoothing=smoothing, direction=direction,
                                   reduction=reduction)
    assert set(found) == set(outputs) - {"filled_labels"}
    for name, ours in found.items():
        assert (ours.detach().double() - outputs[name].double().reshape(ours.shape)).abs().max() <= tolerance, name


def test_web_pairs_get_ids_of_their_own():
    assert fill_web_labels(torch.tensor([0, 3, 0, 7, 3, 0], dtype=torch.int32)).tolist() == [8, 3, 9, 7, 3, 10]
    assert fill_web_labels(torch.zeros(3, dtype=torch.int64)).tolist() == [1, 2, 3]
    assert fill_web_labels(torch.tensor([-2, 5])).tolist() == [-2, 5]
    assert fill_web_labels(torch.zeros(0, dtype=torch.int64)).tolist() == []


SIZES = (4, 0, 3)
LABELS = torch.tensor([0, 2, 0, 0, 2, 0, 5])


def distributed_modules(rank: int, world: int):
    group = dist.group.WORLD
    return {
        "clip": lambda image, text, labels, scale, bias: ClipLoss(rank=rank, world_size=world)(image, text, scale),
        "siglip": lambda image, text, labels, scale, bias:
            SigLipLoss(rank=rank, world_size=world, dist_impl="bidir")(image, text, scale, bias),
        "align": lambda image, text, labels, scale, bias: AlignLoss(group=group).double()(image, text),
        "unicl": lambda image, text, labels, scale, bias: UniCLLoss(group=group).double()(image, text, labels),
        "info_nce": lambda image, text, labels, scale, bias: InfoNCE(group=group, comm="ring").double()(image, text),
    }


def modules_on_one_process():
    return {
        "clip": lambda image, text, labels, scale, bias: ClipLoss()(image, text, scale),
        "siglip": lambda image, text, labels, scale, bias: SigLipLoss()(image, text, scale, bias),
        "align": lambda image, text, labels, scale, bias: AlignLoss().double()(image, text),
        "unicl": lambda image, text, labels, scale, bias: UniCLLoss().double()(image, text, labels),
        "info_nce": lambda image, text, labels, scale, bias: InfoNCE().double()(image, text),
    }


def evaluate(module, start: int, stop: int):
    image, text = (x.detach()[start:stop].requires_grad_() for x in pair(sum(SIZES)))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (6.0, -2.0))
    loss = module(image, text, LABELS[start:stop], scale, bias)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad, "bias": bias.grad}


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    start, stop = sum(SIZES[:rank]), sum(SIZES[: rank + 1])
    found = {name: evaluate(module, start, stop) for name, module in distributed_modules(rank, world).items()}
    found["labels"] = fill_web_labels(LABELS[start:stop], dist.group.WORLD)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_modules_over_a_group_equal_one_process(tmp_path):
    mp.spawn(worker, (len(SIZES), str(tmp_path)), nprocs=len(SIZES))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    for name, module in modules_on_one_process().items():
        expected = evaluate(module, 0, sum(SIZES))
        for one in ranks:
            assert relative_error(one[name]["loss"], expected["loss"]) <= 1e-12, name
        for key in ("image", "text"):
            ours = torch.cat([one[name][key] for one in ranks]) / len(SIZES)
            assert relative_error(ours, expected[key]) <= 1e-10, (name, key)
        for key in ("scale", "bias"):
            if expected[key] is not None:
                mean = sum(one[name][key] for one in ranks) / len(SIZES)
                assert relative_error(mean, expected[key]) <= 1e-10, (name, key)
    labels = torch.cat([one["labels"] for one in ranks])
    assert torch.equal(labels[:, None] == labels, fill_web_labels(LABELS)[:, None] == fill_web_labels(LABELS))
