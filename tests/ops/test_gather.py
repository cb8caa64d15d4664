"""The distributed losses against the single-process reference: W processes of a gloo group on this machine.

One spawn per group size runs every case and leaves what each rank found in a folder; the tests compare.
"""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vlmfast.ops import gather as gather_module
from vlmfast.ops import gather_with_grad, info_nce, siglip_loss
from vlmfast.ops.reference import info_nce as reference

SIZES = {2: [3, 5], 3: [4, 0, 6]}
# texts per rank of the cases where their number is not that of the images
TEXT_SIZES = {2: [4, 2], 3: [0, 5, 2]}
WIDTH = 8
# relative Frobenius norm of the difference from the float64 reference
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOWERS = ("image", "text", "logit_scale", "logit_bias")

# name -> (options of info_nce, tensors that want a gradient)
CASES = {
    "plain": ({}, TOWERS[:3]),
    "bias": ({"bias": True}, TOWERS),
    "float_scale": ({"scale_is_float": True}, TOWERS[:2]),
    "frozen_image": ({}, ("text", "logit_scale")),
    "frozen_text": ({}, ("image", "logit_scale")),
    "only_scale": ({}, ("logit_scale",)),
    "labels": ({"labels": True}, TOWERS[:3]),
    "labels_frozen_image": ({"labels": True}, ("text",)),
    "labels_smoothing": ({"labels": True, "label_smoothing": 0.1}, TOWERS[:3]),
    "text_labels": ({"labels": True, "text_labels": True}, TOWERS[:3]),
    "more_images_than_texts": ({"labels": True, "text_labels": True, "rectangular": True}, TOWERS[:3]),
    "more_images_than_texts_frozen": ({"labels": True, "text_labels": True, "rectangular": True}, ("text",)),
    "smoothing": ({"label_smoothing": 0.1}, TOWERS[:3]),
    "weight": ({"weight": True}, TOWERS[:3]),
    "weight_frozen_image": ({"weight": True, "label_smoothing": 0.2}, ("text", "logit_scale")),
    "mask": ({"mask": True}, TOWERS[:3]),
    "mask_frozen_image": ({"mask": True}, ("text", "logit_scale")),
    "mask_labels": ({"mask": True, "labels": True, "label_smoothing": 0.1}, TOWERS[:3]),
    "image_to_text": ({"direction": "image_to_text"}, TOWERS[:3]),
    "text_to_image": ({"direction": "text_to_image"}, TOWERS[:3]),
    "text_to_image_mask": ({"direction": "text_to_image", "mask": True}, TOWERS[:3]),
    "text_to_image_weight": ({"direction": "text_to_image", "weight": True}, ("image", "text")),
    "image_to_text_frozen_image": ({"direction": "image_to_text", "weight": True}, ("text", "logit_scale")),
    "sum": ({"reduction": "sum"}, TOWERS[:3]),
    "sum_weight": ({"reduction": "sum", "weight": True}, TOWERS[:3]),
    "none": ({"reduction": "none"}, TOWERS[:3]),
    "none_weight_frozen_image": ({"reduction": "none", "weight": True}, ("text", "logit_scale")),
    "none_text_to_image": ({"reduction": "none", "direction": "text_to_image"}, TOWERS[:3]),
    "none_image_to_text_labels": ({"reduction": "none", "direction": "image_to_text", "labels": True}, TOWERS[:3]),
    "large_logits": ({"scale": 100.0}, TOWERS[:3]),
    "siglip": ({"siglip": True, "bias": True}, TOWERS),
    "siglip_no_bias": ({"siglip": True}, TOWERS[:3]),
    "siglip_frozen_image": ({"siglip": True, "bias": True}, ("text", "logit_bias")),
    "siglip_frozen_text": ({"siglip": True, "bias": True}, ("image", "logit_scale")),
    "siglip_sum": ({"siglip": True, "bias": True, "reduction": "sum"}, TOWERS),
    "siglip_none": ({"siglip": True, "bias": True, "reduction": "none"}, TOWERS),
    "siglip_none_frozen_image": ({"siglip": True, "bias": True, "reduction": "none"}, ("text", "logit_scale")),
}
NON_TENSORS = ("label_smoothing", "direction", "reduction")


def global_batch(options: dict, world: int, dtype=torch.float64) -> dict:
    """All tensors of a case for the whole batch; float32 values, whatever the dtype."""
    total, texts = sum(SIZES[world]), sum(text_sizes(options, world))
    generator = torch.Generator().manual_seed(total)
    image, text = (nn.functional.normalize(torch.randn(n, WIDTH, generator=generator)) for n in (total, texts))
    batch = {"image": image.to(dtype), "text": text.to(dtype),
             "logit_scale": torch.tensor(options.get("scale", 7.0), dtype=dtype),
             "logit_bias": torch.tensor(-1.5, dtype=dtype) if options.get("bias") else None,
             "labels": torch.randint(0, 4, (total,), generator=generator) if options.get("labels") else None,
             "weight": torch.rand(total, generator=generator).to(dtype) if options.get("weight") else None,
             "mask": torch.rand(total, texts, generator=generator) < 0.2 if options.get("mask") else None,
             "upstream": torch.rand(total, generator=generator).to(dtype)}
    batch["text_labels"] = torch.randint(1, 5, (texts,), generator=generator) if options.get("text_labels") else None
    return batch


def text_sizes(options: dict, world: int) -> list[int]:
    return (TEXT_SIZES if options.get("rectangular") else SIZES)[world]


def require(batch: dict, wanted) -> None:
    for name in wanted:
        batch[name] = batch[name].detach().clone().requires_grad_()


def objective(loss, batch):
    """A scalar whose upstream gradient is not one."""
    return (loss * batch["upstream"]).sum() if loss.dim() else loss ** 2


def truth(name: str, world: int) -> dict:
    options, wanted = CASES[name]
    batch = global_batch(options, world)
    require(batch, wanted)
    chosen = {key: options[key] for key in NON_TENSORS if key in options}
    if options.get("siglip"):
        loss = reference.siglip_loss(batch["image"], batch["text"], batch["logit_scale"], batch["logit_bias"], **chosen)
    else:
        tensors = {key: batch[key] for key in ("logit_bias", "labels", "text_labels", "weight", "mask")}
        loss = reference.info_nce(batch["image"], batch["text"], batch["logit_scale"], **tensors, **chosen)
    objective(loss, batch).backward()
    return {"loss": loss.detach(), **{key: batch[key].grad for key in wanted}}


def local_call(options: dict, batch: dict, group, comm: str):
    scale = float(batch["logit_scale"]) if options.get("scale_is_float") else batch["logit_scale"]
    reduction = options.get("reduction", "mean")
    if options.get("siglip"):
        return siglip_loss(batch["image"], batch["text"], scale, batch["logit_bias"], reduction=reduction, group=group,
                           comm=comm)
    tensors = {key: batch[key] for key in ("logit_bias", "labels", "text_labels", "weight", "mask")}
    chosen = {key: options[key] for key in NON_TENSORS if key in options}
    return info_nce(batch["image"], batch["text"], scale, **tensors, **chosen, group=group, comm=comm)


def local_batch(options: dict, world: int, rank: int, dtype) -> dict:
    batch = global_batch(options, world, dtype)
    for key in ("image", "text", "labels", "text_labels", "weight", "mask", "upstream"):
        sizes = text_sizes(options, world) if key.startswith("text") else SIZES[world]
        if batch[key] is not None:
            batch[key] = batch[key][sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    return batch


def run_case(name: str, world: int, rank: int, dtype, group, comm: str) -> dict:
    options, wanted = CASES[name]
    batch = local_batch(options, world, rank, dtype)
    require(batch, wanted)
    loss = local_call(options, batch, group, comm)
    objective(loss, batch).backward()
    return {"loss": loss.detach(), **{key: batch[key].grad for key in wanted}}


def message_of(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_errors(rank: int, world: int, group) -> dict:
    options = {"labels": True}

    def call(size=2, width=WIDTH, dtype=torch.float32, comm="gather", mask_columns=None, chosen=()):
        x = torch.ones(size, width, dtype=dtype, requires_grad=True)
        mask = None if mask_columns is None else torch.zeros(size, mask_columns, dtype=torch.bool)
        return local_call(dict(chosen), {"image": x, "text": x, "logit_scale": torch.tensor(1.0), "logit_bias": None,
                                         "labels": torch.zeros(size, dtype=torch.int64) if "labels" in chosen else None,
                                         "text_labels": None, "weight": None, "mask": mask}, group, comm)

    last = rank == world - 1

    def unpaired():
        x, labels = torch.ones(2, WIDTH), torch.zeros(2 + last, dtype=torch.int64)
        return info_nce(x, torch.ones(2 + last, WIDTH), 1.0, labels=labels[:2], text_labels=labels, reduction="none",
                        group=group)

    found = {
        "width": message_of(call, width=WIDTH + last),
        "dtype": message_of(call, dtype=torch.float64 if last else torch.float32),
        "comm": message_of(call, comm="ring" if last else "gather"),
        "labels": message_of(call, chosen=options if last else {}),
        "reduction": message_of(call, chosen={"reduction": "sum" if last else "mean"}),
        "op": message_of(call, chosen={"siglip": True} if last else {}),
        "empty": message_of(call, size=0),
        "empty siglip": message_of(call, size=0, chosen={"siglip": True}),
        "mask": message_of(call, mask_columns=2 * world + last),
        "pairs": message_of(unpaired),
        "gather": message_of(gather_with_grad, torch.ones(1, 2 + last), group),
        "gather dtype": message_of(gather_with_grad, torch.ones(1, 2).double() if last else torch.ones(1, 2), group),
    }

    def twice(loss, x):
        first, = torch.autograd.grad(loss, x, create_graph=True)
        (first.sum() + x.sum()).backward()

    for name, chosen in (("second backward", {}), ("second backward siglip", {"siglip": True})):
        x = torch.randn(2, WIDTH, requires_grad=True)
        batch = dict.fromkeys(("logit_bias", "labels", "text_labels", "weight", "mask"))
        loss = local_call(chosen, {**batch, "image": x, "text": x.detach(), "logit_scale": torch.tensor(1.0)}, group,
                          "gather")
        found[name] = message_of(twice, loss, x)
    x = torch.randn(2, WIDTH, requires_grad=True)
    found["second backward gather"] = message_of(twice, gather_with_grad(x, group).square().sum(), x)
    return found


def run_gather(sizes: list[int], rank: int, group) -> dict:
    found = {}
    for name, dtype, shape in (("matrix", torch.float64, (WIDTH,)), ("vector", torch.float32, ()),
                               ("half", torch.bfloat16, (2, 3))):
        torch.manual_seed(rank)
        x = torch.randn(sizes[rank], *shape).to(dtype).requires_grad_()
        gathered = gather_with_grad(x, group)
        torch.manual_seed(100 + rank)
        upstream = torch.randn(gathered.shape).to(dtype)
        gathered.backward(upstream)
        found[name] = (x.detach(), gathered.detach(), upstream, x.grad)
    nothing = torch.zeros(0, 3, requires_grad=True)
    gather_with_grad(nothing, group).sum().backward()
    found["nothing"] = nothing.grad
    found["integers"] = gather_with_grad(torch.arange(sizes[rank]) + 10 * rank, group)
    return found


def run_helpers(sizes: list[int], rank: int, group) -> dict:
    torch.manual_seed(rank)
    partial = torch.randn(sum(sizes), WIDTH, dtype=torch.float64)
    return {"partial": partial, "exchange": gather_module._sum_to_owners(partial, sizes, group),
            "reduce_scatter": gather_module._reduce_scatter(partial, sizes, group)}


def run_extras(world: int, rank: int, group) -> dict:
    found = {}
    for comm in ("gather", "ring"):
        batch = local_batch({}, world, rank, torch.float64)
        with torch.no_grad():
            found["no grad", comm] = local_call({}, batch, group, comm)
        # the header tells everyone that somebody wants the gradient of the texts
        require(batch, ("image", "text") if rank == 0 else ("image",))
        loss = local_call({}, batch, group, comm)
        loss.backward(retain_graph=True)
        found["once", comm] = [batch[key].grad.clone() for key in ("image", "text") if batch[key].requires_grad]
        loss.backward()
        found["twice", comm] = [batch[key].grad for key in ("image", "text") if batch[key].requires_grad]

        batch = local_batch({}, world, rank, torch.bfloat16)
        batch["logit_scale"] = batch["logit_scale"].float()
        require(batch, TOWERS[:3])
        loss = local_call({}, batch, group, comm)
        objective(loss, batch).backward()
        found["bfloat16", comm] = {"loss": loss.detach(), **{key: batch[key].grad for key in TOWERS[:3]}}
    sums, exchange = [], gather_module._sum_to_owners
    gather_module._sum_to_owners = lambda *args: sums.append(None) or exchange(*args)
    for name, options, wanted in (("both", {}, ("image", "text")), ("image frozen", {}, ("text",)),
                                  ("text frozen", {}, ("image",)), ("mask", {"mask": True}, ("text",)),
                                  ("siglip, image frozen", {"siglip": True}, ("text",))):
        batch = local_batch(options, world, rank, torch.float64)
        require(batch, wanted)
        sums.clear()
        local_call(options, batch, group, "gather").backward()
        found["sums", name] = len(sums)
    gather_module._sum_to_owners = exchange
    for name, wanted in (("stats", TOWERS[:3]), ("stats frozen image", ("text",))):
        batch = local_batch({}, world, rank, torch.float64)
        require(batch, wanted)
        _, found[name] = info_nce(batch["image"], batch["text"], batch["logit_scale"], group=group, return_stats=True)
    return found


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(5, WIDTH), nn.Linear(7, WIDTH)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, image, text):
        return (nn.functional.normalize(self.image(image)), nn.functional.normalize(self.text(text)),
                self.log_scale.exp(), self.bias)


def model_inputs(total: int):
    torch.manual_seed(2)
    return torch.randn(total, 5, dtype=torch.float64), torch.randn(total, 7, dtype=torch.float64)


def run_ddp(sizes: list[int], rank: int) -> dict:
    found = {}
    start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
    for loss_name in ("info_nce", "siglip"):
        for comm in ("gather", "ring"):
            model = nn.parallel.DistributedDataParallel(TwoTowers().double())
            image, text, scale, bias = model(*(x[start:stop] for x in model_inputs(sum(sizes))))
            if loss_name == "siglip":
                loss = siglip_loss(image, text, scale, bias, group=dist.group.WORLD, comm=comm)
            else:
                loss = info_nce(image, text, scale, logit_bias=bias, label_smoothing=0.1, group=dist.group.WORLD,
                                comm=comm)
            loss.backward()
            found[loss_name, comm] = {"loss": loss.detach(), **{k: p.grad for k, p in model.module.named_parameters()}}
    return found


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    sizes = SIZES[world]
    found = {"ddp": run_ddp(sizes, rank), "errors": run_errors(rank, world, dist.group.WORLD),
             "gather": run_gather(sizes, rank, dist.group.WORLD), "helpers": run_helpers(sizes, rank, dist.group.WORLD),
             "extras": run_extras(world, rank, dist.group.WORLD)}
    for name in CASES:
        for comm in ("gather", "ring"):
            for dtype_name, dtype in DTYPES.items():
                found[name, comm, dtype_name] = run_case(name, world, rank, dtype, dist.group.WORLD, comm)
    found["again"] = run_case("weight", world, rank, torch.float32, dist.group.WORLD, "gather")
    if world == 3:
        # numbers inside the group differ from those of the world
        group = dist.new_group([0, 2])
        if rank != 1:
            for comm in ("gather", "ring"):
                for name in ("plain", "labels", "siglip"):
                    found["subgroup", name, comm] = run_case(name, 2, rank // 2, torch.float64, group, comm)
            found["subgroup gather"] = gather_with_grad(torch.full((rank + 1,), rank), group)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks(W): what each of W processes found. A group that failed or hung is not started again."""
    cache = {}

    def run(world: int) -> list[dict]:
        if world not in cache:
            folder = tmp_path_factory.mktemp(f"gloo{world}")
            cache[world] = None
            mp.spawn(worker, (world, str(folder)), nprocs=world)
            cache[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
        assert cache[world] is not None, f"the group of {world} failed in an earlier test"
        return cache[world]

    return run


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    assert ours.shape == truth.shape
    scale = truth.double().norm()
    return float((ours.double() - truth.double()).norm() / (scale if scale > 0 else 1.0))


def compare(found: list[dict], name: str, world: int, dtype=torch.float64) -> None:
    """Loss and gradients of all ranks, put together under the documented contract, against the reference."""
    expected = truth(name, world)
    options, wanted = CASES[name]
    tolerance = TOLERANCE[dtype]
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        assert relative_error(torch.cat([one["loss"] for one in found]), expected["loss"]) <= tolerance
    else:
        assert all(torch.equal(one["loss"], found[0]["loss"]) for one in found)
        assert relative_error(found[0]["loss"], expected["loss"]) <= tolerance
    divisor = len(found) if reduction == "mean" else 1
    for key in wanted:
        parts = [one[key] for one in found]
        ours = (torch.cat(parts) if key in ("image", "text") else torch.stack(parts).sum(0)) / divisor
        if key == "logit_bias" and not options.get("siglip"):
            assert not ours.any() and abs(expected[key]) < 1e-12
        else:
            assert relative_error(ours, expected[key]) <= tolerance, key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("comm", ["gather", "ring"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", SIZES)
def test_matches_single_process(ranks, world, name, comm, dtype):
    found = [one[name, comm, dtype] for one in ranks(world)]
    compare(found, name, world, DTYPES[dtype])
    assert all(value.dtype == DTYPES[dtype] for one in found for value in one.values())


@pytest.mark.parametrize("comm", ["gather", "ring"])
@pytest.mark.parametrize("name", ["plain", "labels", "siglip"])
def test_subgroup_is_a_world_of_its_own(ranks, name, comm):
    everyone = ranks(3)
    assert ("subgroup", name, comm) not in everyone[1]
    compare([everyone[rank]["subgroup", name, comm] for rank in (0, 2)], name, 2)
    for rank in (0, 2):
        assert everyone[rank]["subgroup gather"].tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("comm", ["gather", "ring"])
@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
@pytest.mark.parametrize("world", SIZES)
def test_ddp_mean_of_gradients_is_global_gradient(ranks, world, loss, comm):
    model = TwoTowers().double()
    image, text, scale, bias = model(*model_inputs(sum(SIZES[world])))
    if loss == "siglip":
        expected = reference.siglip_loss(image, text, scale, bias)
    else:
        expected = reference.info_nce(image, text, scale, logit_bias=bias, label_smoothing=0.1)
    expected.backward()
    for one in ranks(world):
        found = one["ddp"][loss, comm]
        assert relative_error(found["loss"], expected.detach()) <= 1e-10
        for name, parameter in model.named_parameters():
            if name == "bias" and loss == "info_nce":
                assert found[name] == 0 and abs(parameter.grad) < 1e-12
            else:
                assert relative_error(found[name], parameter.grad) <= 1e-10, name


@pytest.mark.parametrize("world", SIZES)
def test_same_bits_again(ranks, world):
    for one in ranks(world):
        first, again = one["weight", "gather", "float32"], one["again"]
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("comm", ["gather", "ring"])
@pytest.mark.parametrize("world", SIZES)
def test_no_grad_and_retained_graph(ranks, world, comm):
    batch = global_batch({}, world)
    require(batch, ("image", "text"))
    loss = reference.info_nce(batch["image"], batch["text"], batch["logit_scale"])
    loss.backward()
    for rank, one in enumerate(ranks(world)):
        found = one["extras"]
        assert relative_error(found["no grad", comm], loss.detach()) <= 1e-10
        start, stop = sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1])
        expected = [batch[key].grad[start:stop] * world for key in ("image", "text")][: 2 if rank == 0 else 1]
        for times in ("once", "twice"):
            for ours, right in zip(found[times, comm], expected, strict=True):
                assert relative_error(ours, right * (2 if times == "twice" else 1)) <= 1e-10


@pytest.mark.parametrize("comm", ["gather", "ring"])
@pytest.mark.parametrize("world", SIZES)
def test_bfloat16_features_lose_one_rounding(ranks, world, comm):
    batch = global_batch({}, world, torch.bfloat16)
    batch = {key: None if value is None else value.double() for key, value in batch.items()}
    require(batch, TOWERS[:3])
    loss = reference.info_nce(batch["image"], batch["text"], batch["logit_scale"])
    objective(loss, batch).backward()
    found = [one["extras"]["bfloat16", comm] for one in ranks(world)]
    assert found[0]["loss"].dtype == torch.float32
    assert relative_error(found[0]["loss"], loss.detach()) <= 1e-6
    for key in ("image", "text"):
        assert found[0][key].dtype == torch.bfloat16
        assert relative_error(torch.cat([one[key] for one in found]) / world, batch[key].grad) <= 2**-8
    assert relative_error(sum(one["logit_scale"] for one in found) / world, batch["logit_scale"].grad) <= 1e-6


@pytest.mark.parametrize("world", SIZES)
def test_frozen_tower_travels(ranks, world):
    for one in ranks(world):
        found = {key[1]: value for key, value in one["extras"].items() if key[0] == "sums"}
        assert found == {"both": 1, "image frozen": 0, "text frozen": 0, "mask": 1, "siglip, image frozen": 0}


@pytest.mark.parametrize("name", ["stats", "stats frozen image"])
@pytest.mark.parametrize("world", SIZES)
def test_stats_are_those_of_the_local_lines(ranks, world, name):
    batch = global_batch({}, world)
    logits = 7.0 * batch["image"] @ batch["text"].T
    for rank, one in enumerate(ranks(world)):
        start, stop = sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1])
        rows, columns, found = logits[start:stop], logits.T[start:stop], one["extras"][name]
        assert relative_error(found["row_lse"], rows.logsumexp(1)) <= 1e-12
        assert relative_error(found["column_lse"], columns.logsumexp(1)) <= 1e-12
        if start == stop:
            continue
        positive = logits.diagonal()[start:stop]
        assert found["positive_logit"].item() == pytest.approx(positive.mean().item())
        negatives = (rows.sum() - positive.sum()) / (rows.numel() - len(rows))
        assert found["negative_logit"].item() == pytest.approx(negatives.item())
        for key, lines in (("image_to_text_accuracy", rows), ("text_to_image_accuracy", columns)):
            assert found[key].item() == pytest.approx((lines.argmax(1) == torch.arange(start, stop)).double().mean())


ERRORS = {
    "width": "ValueError: info_nce: width of image is 8 on rank 0 and 9 on rank {last}",
    "dtype": "ValueError: info_nce: dtype of image is torch.float32 on rank 0 and torch.float64 on rank {last}",
    "comm": "ValueError: info_nce: comm is gather on rank 0 and ring on rank {last}",
    "labels": "ValueError: info_nce: labels is False on rank 0 and True on rank {last}",
    "reduction": "ValueError: info_nce: reduction is mean on rank 0 and sum on rank {last}",
    "op": "ValueError: info_nce: op is info_nce on rank 0 and siglip_loss on rank {last}",
    "empty": "ValueError: info_nce: the batch is empty on every rank",
    "empty siglip": "ValueError: siglip_loss: the batch is empty on every rank",
    "mask": "ValueError: info_nce: mask has {columns} columns on rank {last}",
    "pairs": "ValueError: info_nce: reduction 'none' and weight need as many texts as images, rank {last} has 3 and 2",
    "gather": "ValueError: gather_with_grad: shape of a row of x is [2] on rank 0 and [3] on rank {last}",
    "gather dtype": "ValueError: gather_with_grad: dtype of x is torch.float32 on rank 0 and torch.float64 on rank",
    "second backward": "RuntimeError: info_nce: the second derivative is not implemented",
    "second backward siglip": "RuntimeError: siglip_loss: the second derivative is not implemented",
    "second backward gather": "RuntimeError: gather_with_grad: the second derivative is not implemented",
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("world", SIZES)
def test_every_rank_raises_the_same_error(ranks, world, name):
    messages = [one["errors"][name] for one in ranks(world)]
    expected = ERRORS[name].format(last=world - 1, columns=2 * world + 1)
    assert messages[0].startswith(expected)
    assert set(messages) == {messages[0]}


@pytest.mark.parametrize("world", SIZES)
def test_gather_with_grad_sums_gradients(ranks, world):
    everyone, sizes = ranks(world), SIZES[world]
    for name in ("matrix", "vector", "half"):
        found = [one["gather"][name] for one in everyone]
        rows = torch.cat([x for x, *_ in found])
        total = sum(upstream.double() for _, _, upstream, _ in found)
        for (_, gathered, _, grad), expected in zip(found, total.split(sizes), strict=True):
            assert torch.equal(gathered, rows)
            assert grad.dtype == rows.dtype
            assert relative_error(grad, expected) <= (4e-3 if name == "half" else 1e-6)
    assert all(one["gather"]["nothing"].shape == (0, 3) for one in everyone)
    integers = torch.cat([torch.arange(size) + 10 * rank for rank, size in enumerate(sizes)])
    assert all(torch.equal(one["gather"]["integers"], integers) for one in everyone)


@pytest.mark.parametrize("way", ["exchange", "reduce_scatter"])
@pytest.mark.parametrize("world", SIZES)
def test_partial_gradients_are_summed_to_owners(ranks, world, way):
    everyone = ranks(world)
    total = sum(one["helpers"]["partial"] for one in everyone)
    for one, expected in zip(everyone, total.split(SIZES[world]), strict=True):
        assert relative_error(one["helpers"][way], expected) <= 1e-12


def test_gather_without_a_group_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_grad(x) is x


def test_gather_rejects_a_scalar():
    with pytest.raises(ValueError, match=r"gather_with_grad: x has no dimensions"):
        gather_with_grad(torch.tensor(1.0))
