r"""The contrastive losses over the batch of a process group.

One tower travels; the other one stays. Every rank sees its rows of the N x N logits once (a strip of n x N), so the
cost per rank falls as 1 / W. Lines along the strip (rows) are complete at once; lines across it (columns) are merged by
an exchange of O(N) numbers. Backward, the gradient of the tower that stays is local and final; that of the travelling
tower is a partial sum, which is reduce-scattered in float32 (or float64) to its owners.

Which tower travels: the frozen one if exactly one is frozen; otherwise the one that is not the query of a one-sided
loss; otherwise text. With a mask always text, because the mask's rows are the local images.

Contract. The value returned with "mean" and "sum" is that of the global batch, the same on every rank.

========== ===================================== =========================================================
reduction  value                                 gradients, scale and bias included
========== ===================================== =========================================================
mean       mean over the global batch            their *mean* over ranks (DDP's way) is the gradient of the value
sum        sum over the global batch             their *sum* over ranks (DDP's mean times W) is that gradient
none       [n], the losses of the local pairs    as for "sum", of sum over ranks and pairs of upstream * loss
========== ===================================== =========================================================

For "mean" and "sum" the upstream gradient has to be the same on every rank. Ranks may hold batches of different sizes,
empty ones included. All ranks first exchange a header of 512 bytes (on a GPU this waits for the device), so that a
disagreement in width, dtype or options raises the same ValueError everywhere instead of a hang.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .autograd import first_order
from .reference.info_nce import BEST, LSE

# bytes of the travelling tower and its partial gradient on one rank above which "auto" takes the ring
GATHER_BUDGET = 1 << 30

HEADER_BYTES, HEADER_NUMBERS = 512, 8


def gather_with_grad(x: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Rows of all ranks in rank order; the gradient is summed over ranks and returned to the rows' owner.

    Args:
        x:  [n, ...], n may differ between ranks and may be 0; the other sizes and the dtype may not.
        group:  None is the default group. Without an initialised group, or in a group of one, x comes back unchanged.

    Returns:
        [sum of n, ...], the dtype of x. The backward is a reduce-scatter (a sum, not a mean; float32 at least).

    Raises:
        ValueError: x has no dimension, or ranks differ in dtype or in the trailing sizes.
    """
    if x.dim() == 0:
        raise ValueError("gather_with_grad: x has no dimensions, it must be [n, ...]")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return x
    shared = {"op": "gather_with_grad", "dtype of x": str(x.dtype), "shape of a row of x": list(x.shape[1:])}
    numbers = _headers(group, x.device, [len(x)], shared)
    return _Gather.apply(x, [row[0] for row in numbers], group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        return _all_gather(x, sizes, group)

    @staticmethod
    @first_order("gather_with_grad")
    def backward(ctx, grad):
        wide = torch.promote_types(grad.dtype, torch.float32)
        return _sum_to_owners(grad.to(wide), ctx.sizes, ctx.group).to(grad.dtype), None, None


def info_nce_distributed(image, text, logit_scale, logit_bias, labels, text_labels, label_smoothing, weight, mask,
                         direction, reduction, group, comm, return_stats):
    """`info_nce` over the batch of `group`; the arguments of `info_nce`, already checked on this rank.

    Args:
        image, text:  [n, D], [m, D]: the local rows; n and m differ only with labels.
        labels, text_labels:  [n], [m] with global meaning, or None for diagonal targets.
        weight:  [n], of the local pairs; "mean" divides by the sum over all ranks.
        mask:  [n, M] bool, the local images against the texts of all ranks in rank order.
        comm:  "gather", "ring" or "auto" (gather unless it takes more than GATHER_BUDGET bytes).

    Returns:
        The loss, [] or [n], under the contract at the top of this file; with `return_stats` (loss, stats): those of
        `info_nce` for the local images and texts against all others (means are NaN on an empty rank).

    Raises:
        ValueError: on every rank, where ranks disagree or the global batch is empty.
    """
    from .info_nce import statistics

    shared = {"op": "info_nce", "labels": labels is not None, "weight": weight is not None, "mask": mask is not None,
              "label_smoothing": float(label_smoothing), "direction": direction, "reduction": reduction,
              "return_stats": return_stats, "logit_bias": logit_bias is not None}
    if labels is not None and text_labels is None:
        text_labels = labels
    plan = _plan(image, text, logit_scale, logit_bias, mask, direction, group, comm, shared)
    towers, line_labels = (image, text), (labels, text_labels)
    use = direction != "text_to_image", direction != "image_to_text"
    if plan.swapped:
        towers, line_labels, use = towers[::-1], line_labels[::-1], use[::-1]
    column_labels = None if labels is None else _all_gather(line_labels[1], plan.columns, plan.group)
    targets = _Targets(line_labels[0], column_labels, mask, weight, float(label_smoothing), *use, reduction,
                       full=labels is not None or label_smoothing != 0 or return_stats, return_stats=return_stats)
    loss, row_stats, column_stats = _InfoNCE.apply(*towers, logit_scale, logit_bias, plan, targets)
    if not return_stats:
        return loss
    lines = (column_stats, row_stats) if plan.swapped else (row_stats, column_stats)
    return loss, statistics(*lines, labels is None)


def siglip_distributed(image, text, logit_scale, logit_bias, reduction, group, comm):
    """`siglip_loss` over the batch of `group`; the arguments of `siglip_loss`, already checked on this rank.

    Args:
        image, text:  [n, D]: the local pairs.

    Returns:
        The loss, [] or [n] (a local image against the texts of all ranks), under the contract at the top of this
        file. "mean" divides by the global number of images.

    Raises:
        ValueError: on every rank, where ranks disagree or the global batch is empty.
    """
    shared = {"op": "siglip_loss", "reduction": reduction, "logit_bias": logit_bias is not None}
    plan = _plan(image, text, logit_scale, logit_bias, None, "image_to_text" if reduction == "none" else "both", group,
                 comm, shared, may_swap=reduction != "none")
    towers = (text, image) if plan.swapped else (image, text)
    return _SigLip.apply(*towers, logit_scale, logit_bias, plan, reduction)


@dataclass(frozen=True)
class _Plan:
    """What every rank knows of the others. Rows are the tower that stays, columns the one that travels."""

    group: object
    rank: int
    rows: list[int]  # per rank
    columns: list[int]
    swapped: bool  # image travels
    ring: bool
    grad: bool  # some rank wants some gradient
    grad_columns: bool  # some rank wants that of the travelling tower
    grad_rows: bool  # this rank wants that of its rows
    grad_scale: bool

    @property
    def world(self) -> int:
        return len(self.rows)

    def positive_column(self) -> int:
        """Column of this rank's first row's positive."""
        return sum(self.columns[: self.rank])


@dataclass(frozen=True)
class _Targets:
    row_labels: Tensor | None
    column_labels: Tensor | None  # of all columns
    mask: Tensor | None
    weight: Tensor | None  # of the local pairs
    label_smoothing: float
    use_rows: bool
    use_columns: bool
    reduction: str
    full: bool
    return_stats: bool


def _plan(image, text, logit_scale, logit_bias, mask, direction, group, comm, shared, may_swap=True) -> _Plan:
    op = shared["op"]
    shared |= {"dtype of image": str(image.dtype), "dtype of text": str(text.dtype), "comm": comm,
               "width of image": image.shape[1], "width of text": text.shape[1]}
    enabled = torch.is_grad_enabled()
    needs = [enabled and x is not None and x.requires_grad for x in (image, text, logit_scale, logit_bias)]
    mask_columns = -1 if mask is None else mask.shape[1]
    numbers = _headers(group, image.device, [len(image), len(text), mask_columns, *needs[:2], needs[2] or needs[3]],
                       shared)
    images, texts, mask_columns, need_image, need_text, need_scale = map(list, zip(*numbers, strict=True))
    if sum(images) == 0 or sum(texts) == 0:
        raise ValueError(f"{op}: the batch is empty on every rank of the group, one rank at least must have a pair")
    for rank, (n, m, columns) in enumerate(zip(images, texts, mask_columns, strict=True)):
        if n != m and (shared.get("weight") or shared["reduction"] == "none"):
            raise ValueError(f"{op}: reduction 'none' and weight need as many texts as images, rank {rank} has "
                             f"{m} and {n}")
        if mask is not None and columns != sum(texts):
            raise ValueError(f"{op}: mask has {columns} columns on rank {rank}, the ranks have {sum(texts)} texts")
    if any(need_image) != any(need_text):
        swapped = any(need_text)
    else:
        swapped = direction == "text_to_image"
    swapped = swapped and mask is None and may_swap
    rows, columns = (texts, images) if swapped else (images, texts)
    grad_columns = any(need_image if swapped else need_text)
    rank = dist.get_rank(group)
    if comm == "auto":
        bytes_per_number = image.element_size() + (max(4, image.element_size()) if grad_columns else 0)
        comm = "ring" if sum(columns) * image.shape[1] * bytes_per_number > GATHER_BUDGET else "gather"
    return _Plan(group, rank, rows, columns, swapped, comm == "ring" and len(rows) > 1,
                 any(need_image + need_text + need_scale), grad_columns,
                 bool((need_text if swapped else need_image)[rank]), bool(need_scale[rank]))


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, columns, logit_scale, logit_bias, plan, targets):
        from .info_nce import line_losses, line_statistics

        visited = columns if plan.ring else _all_gather(columns, plan.columns, plan.group)
        seen = []

        def look(start, stop, block):
            seen.append((start, stop, *line_statistics(
                rows, block, logit_scale, logit_bias, targets.row_labels, _cut(targets.column_labels, start, stop),
                _cut(targets.mask, start, stop), plan.positive_column() - start, targets.full)))

        _visit(plan, visited, look, pull=False)
        # rank order, whatever the order of arrival
        seen.sort(key=lambda part: part[:2])
        row_stats = _merge(torch.stack([part[2] for part in seen]))
        own_stats = all_stats = None
        if targets.use_columns or targets.return_stats:
            partial = torch.cat([part[3] for part in seen], 1)
            own_stats = _merge(_to_owners(partial.T.contiguous(), plan.columns, plan.group).transpose(1, 2))
            if plan.grad and targets.use_columns:
                all_stats = _all_gather(own_stats.T.contiguous(), plan.columns, plan.group).T.contiguous()

        diagonal = targets.row_labels is None
        row_loss = line_losses(row_stats, diagonal, targets.label_smoothing) if targets.use_rows else None
        column_loss = line_losses(own_stats, diagonal, targets.label_smoothing) if targets.use_columns else None
        weight = None if targets.weight is None else targets.weight.detach().to(logit_scale.dtype)
        directions = targets.use_rows + targets.use_columns
        ctx.row_factor = ctx.column_factor = 1 / directions
        all_weight = None
        if targets.reduction == "none":
            loss = (_add(row_loss, column_loss) / directions).to(logit_scale.dtype)
            if weight is not None:
                loss = weight * loss
        else:
            sums = [0 if line is None else (line if weight is None else weight * line).double().sum()
                    for line in (row_loss, column_loss)]
            sums.append(0 if weight is None else weight.double().sum())
            row_sum, column_sum, weight_sum = _global_sums(sums, plan, rows.device)
            if targets.reduction == "mean":
                row_count, column_count = sum(plan.rows), sum(plan.columns)
                if weight is not None:
                    row_count = column_count = weight_sum
                row_sum, column_sum = row_sum / row_count, column_sum / column_count
                ctx.row_factor, ctx.column_factor = (plan.world * ctx.row_factor / row_count,
                                                     plan.world * ctx.column_factor / column_count)
            loss = ((row_sum + column_sum) / directions).to(logit_scale.dtype)
            if weight is not None and plan.grad and targets.use_columns:
                all_weight = _all_gather(weight, plan.columns, plan.group)
        ctx.plan, ctx.targets = plan, targets
        ctx.save_for_backward(rows, columns, visited, logit_scale, logit_bias, row_stats, all_stats, weight, all_weight)
        ctx.set_materialize_grads(False)
        stats = (row_stats, own_stats) if targets.return_stats else (None, None)
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return loss, *stats

    @staticmethod
    @first_order("info_nce")
    def backward(ctx, grad, *_):
        from .info_nce import line_gradients

        plan, targets = ctx.plan, ctx.targets
        rows, columns, visited, logit_scale, logit_bias, row_stats, column_stats, weight, all_weight = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        row_weight, column_weight = (grad * factor for factor in (ctx.row_factor, ctx.column_factor))
        if weight is not None:
            row_weight = row_weight * weight
        if targets.reduction == "none":
            column_weight = _all_gather(row_weight, plan.columns, plan.group) if targets.use_columns else None
        elif all_weight is not None:
            column_weight = column_weight * all_weight
        if not targets.use_rows:
            row_weight = None
        if not targets.use_columns:
            column_weight = None
        d_rows = d_scale = None

        def stats_of(start, stop):
            if column_stats is None:  # a one-sided loss does not read them
                return row_stats.new_empty((len(row_stats), stop - start))
            return _cut(column_stats, start, stop)

        def pull(start, stop, block):
            nonlocal d_rows, d_scale
            more_rows, d_block, more_scale = line_gradients(
                rows, block, logit_scale, logit_bias, targets.row_labels, _cut(targets.column_labels, start, stop),
                _cut(targets.mask, start, stop), plan.positive_column() - start, row_stats,
                stats_of(start, stop), row_weight, _cut(column_weight, start, stop),
                targets.label_smoothing, plan.grad_rows, plan.grad_columns, plan.grad_scale, True)
            d_rows, d_scale = _add(d_rows, more_rows), _add(d_scale, more_scale)
            return d_block

        d_columns = _visit(plan, visited, pull, plan.grad_columns)
        # a constant added to all logits leaves a softmax as it is
        d_bias = torch.zeros_like(logit_bias) if ctx.needs_input_grad[3] else None
        return (_like(d_rows, rows, ctx.needs_input_grad[0]), _like(d_columns, columns, ctx.needs_input_grad[1]),
                _like(d_scale, logit_scale, ctx.needs_input_grad[2]), d_bias, None, None)


class _SigLip(torch.autograd.Function):
    """No normaliser has to be known first, so "mean" and "sum" find their gradients while they find the loss."""

    @staticmethod
    def forward(ctx, rows, columns, logit_scale, logit_bias, plan, reduction):
        factor = plan.world / sum(plan.rows) if reduction == "mean" else 1.0
        wide = torch.promote_types(rows.dtype, torch.float32)
        loss, *gradients = _siglip_pass(plan, rows, columns, logit_scale, logit_bias,
                                        torch.tensor(factor, dtype=wide, device=rows.device),
                                        plan.grad and reduction != "none")
        ctx.plan, ctx.reduction = plan, reduction
        ctx.save_for_backward(rows, columns, logit_scale, logit_bias, *gradients)
        if reduction == "none":
            return loss
        total, = _global_sums([loss.double().sum()], plan, rows.device)
        return (total / sum(plan.rows) if reduction == "mean" else total).to(loss.dtype)

    @staticmethod
    @first_order("siglip_loss")
    def backward(ctx, grad):
        rows, columns, logit_scale, logit_bias, *gradients = ctx.saved_tensors
        if ctx.reduction == "none":
            gradients = _siglip_pass(ctx.plan, rows, columns, logit_scale, logit_bias, grad, ctx.plan.grad)[1:]
        else:
            gradients = [None if gradient is None else grad * gradient for gradient in gradients]
        inputs = rows, columns, logit_scale, logit_bias
        return *(_like(*each) for each in zip(gradients, inputs, ctx.needs_input_grad[:4], strict=True)), None, None


def _siglip_pass(plan, rows, columns, logit_scale, logit_bias, row_weight, grad: bool):
    """(losses of the local rows, d_rows, d_columns of the own columns, d_scale, d_bias)."""
    from .info_nce import siglip_rows

    if not plan.ring:
        columns = _all_gather(columns, plan.columns, plan.group)
    sums = dict.fromkeys(("loss", "rows", "scale", "bias"))

    def body(start, stop, block):
        loss, d_rows, d_block, d_scale, d_bias = siglip_rows(
            rows, block, logit_scale, logit_bias, plan.positive_column() - start, row_weight, grad and plan.grad_rows,
            grad and plan.grad_columns, grad and plan.grad_scale, True)
        for key, more in zip(sums, (loss, d_rows, d_scale, d_bias), strict=True):
            sums[key] = _add(sums[key], more)
        return d_block

    d_columns = _visit(plan, columns, body, grad and plan.grad_columns)
    return sums["loss"], sums["rows"], d_columns, sums["scale"], sums["bias"]


def _merge(parts: Tensor) -> Tensor:
    """Statistics of whole lines from those of their W pieces, [W, K, lines] -> [K, lines]."""
    merged = parts.sum(0)
    merged[LSE] = parts[:, LSE].logsumexp(0)
    if len(merged) > BEST:
        merged[BEST] = parts[:, BEST].amax(0)
    return merged


def _visit(plan: _Plan, columns: Tensor, body: Callable, pull: bool) -> Tensor | None:
    """Calls body(start, stop, block) for all blocks of columns; with `pull` it returns the block's gradient.

    `columns` are those of all ranks, or with a ring the own ones, which then travel from rank to rank: while a block is
    worked on, the next one is under way. Its gradient follows it, one step behind, and comes home after W steps.
    Blocks are padded to one size, so that empty and uneven ranks take part in every exchange.
    """
    if not plan.ring:
        partial = body(0, sum(plan.columns), columns)
        return _sum_to_owners(partial, plan.columns, plan.group) if pull else None
    longest = max(plan.columns)
    block = _padded(columns, longest)
    carried = carrying = None
    for step in range(plan.world):
        owner = (plan.rank - step) % plan.world
        start, size = sum(plan.columns[:owner]), plan.columns[owner]
        arriving, under_way = _pass_on(plan, block, 0) if step + 1 < plan.world else (None, [])
        gradient = body(start, start + size, block[:size])
        if pull:
            gradient = _padded(gradient, longest)
            if carrying is not None:
                _wait(carrying)
                gradient = gradient + carried
            carried, carrying = _pass_on(plan, gradient, 1)
        _wait(under_way)
        block = arriving
    if not pull:
        return None
    _wait(carrying)
    return carried[: plan.columns[plan.rank]]


def _pass_on(plan: _Plan, outgoing: Tensor, tag: int):
    """Starts sending to the next rank and receiving the like from the previous one: (arriving tensor, works)."""
    def peer(step):
        return dist.get_global_rank(plan.group, (plan.rank + step) % plan.world)

    arriving = torch.empty_like(outgoing)
    return arriving, dist.batch_isend_irecv([dist.P2POp(dist.isend, outgoing, peer(1), plan.group, tag),
                                             dist.P2POp(dist.irecv, arriving, peer(-1), plan.group, tag)])


def _wait(works) -> None:
    for work in works:
        work.wait()


def _headers(group, device, numbers: list[int], shared: dict) -> list[list[int]]:
    """The numbers of every rank, after all have found that `shared` is the same everywhere."""
    words = json.dumps(shared).encode()
    packed = struct.pack(f"<{HEADER_NUMBERS}q", *numbers, *[0] * (HEADER_NUMBERS - len(numbers))) + words
    if len(packed) > HEADER_BYTES:
        raise ValueError(f"{shared['op']}: the shape of x has too many dimensions")
    local = torch.frombuffer(bytearray(packed.ljust(HEADER_BYTES)), dtype=torch.uint8).to(device)
    world = dist.get_world_size(group)
    if world < 1:
        raise ValueError(f"{shared['op']}: this process is not a member of group")
    table = local.new_empty(world * HEADER_BYTES)
    _all_gather_single(table, local, group)
    headers = [bytes(row) for row in table.cpu().view(world, HEADER_BYTES).numpy()]
    split = 8 * HEADER_NUMBERS
    for rank, header in enumerate(headers):
        if header[split:] != headers[0][split:]:
            first, other = json.loads(headers[0][split:]), json.loads(header[split:])
            name = next(key for key in [*first, *other] if first.get(key) != other.get(key))
            raise ValueError(f"{first['op']}: {name} is {first.get(name)} on rank 0 and {other.get(name)} on rank "
                             f"{rank}, it must be the same on every rank of the group")
    return [list(struct.unpack(f"<{HEADER_NUMBERS}q", header[:split])[: len(numbers)]) for header in headers]


def _all_gather_single(output: Tensor, local: Tensor, group) -> None:
    # renamed in torch 2.14
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, local, group=group)


def _all_gather(local: Tensor, sizes: list[int], group) -> Tensor:
    """[sizes[rank], ...] -> [sum of sizes, ...] in rank order."""
    longest = max(sizes)
    output = local.new_empty((len(sizes) * longest, *local.shape[1:]))
    if output.numel():
        _all_gather_single(output, _padded(local.detach(), longest), group)
    if min(sizes) == longest:
        return output
    return torch.cat([block[:size] for block, size in zip(output.split(longest), sizes, strict=True)])


def _to_owners(partial: Tensor, sizes: list[int], group) -> Tensor:
    """[sum of sizes, ...] -> [W, sizes[rank], ...]: what each rank has for the own rows."""
    world, own = len(sizes), sizes[dist.get_rank(group)]
    output = partial.new_empty((world * own, *partial.shape[1:]))
    dist.all_to_all_single(output, partial.contiguous(), [own] * world, sizes, group=group)
    return output.view(world, own, *partial.shape[1:])


def _sum_to_owners(partial: Tensor, sizes: list[int], group) -> Tensor:
    """[sum of sizes, ...] -> [sizes[rank], ...], summed over ranks."""
    # older gloo has no reduce-scatter; the same volume travels this way and is added in rank order
    return _reduce_scatter(partial, sizes, group) if partial.is_cuda else _to_owners(partial, sizes, group).sum(0)


def _reduce_scatter(partial: Tensor, sizes: list[int], group) -> Tensor:
    longest, own = max(sizes), sizes[dist.get_rank(group)]
    if not partial.numel():
        return partial[:own]
    if min(sizes) < longest:
        partial = torch.cat([_padded(block, longest) for block in partial.split(sizes)])
    output = partial.new_empty((longest, *partial.shape[1:]))
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, partial.contiguous(), group=group)
    return output[:own]


def _global_sums(values: list, plan: _Plan, device) -> Tensor:
    """Sums over the ranks, in rank order, so that every rank has the same bits."""
    local = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    return _all_gather(local[None], [1] * plan.world, plan.group).sum(0)


def _padded(x: Tensor, size: int) -> Tensor:
    """x with zero rows up to `size`, contiguous."""
    if len(x) == size:
        return x.contiguous()
    output = x.new_zeros((size, *x.shape[1:]))
    output[: len(x)] = x
    return output


def _cut(x: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The columns start:stop of something that has one entry a column, or one for all of them."""
    return x if x is None or x.dim() == 0 else x[..., start:stop].contiguous()


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _like(gradient: Tensor | None, x: Tensor, needed: bool) -> Tensor | None:
    if not needed:
        return None
    gradient = gradient.to(x.dtype)
    return gradient.reshape(x.shape) if gradient.dim() == 0 else gradient
