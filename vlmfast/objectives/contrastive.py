r"""Contrastive losses as modules: open_clip's `ClipLoss` and `SigLipLoss` by signature, and the papers' own forms.

All of them rest on `vlmfast.ops.info_nce` and `vlmfast.ops.siglip_loss`: the N x N logits are never in memory, and over
a process group the DDP mean of the parameter gradients is the gradient of the global mean loss.
"""

import math
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.ops import info_nce, siglip_loss

MAX_SCALE = 100.0
# open_clip's dist_impl -> comm
COMM_OF = {None: "auto", "bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


class ClipLoss(nn.Module):
    """Symmetric contrastive loss with the constructor and the call of open_clip's `ClipLoss`.

    Over W processes the value is the loss of the global batch, on every rank, and the gradients after DDP's mean are
    its gradients, whatever the flags. open_clip's depend on them, relative to the true gradient:

    ========== ================ ============================== ===========
    local_loss gather_with_grad towers                         logit_scale
    ========== ================ ============================== ===========
    True       True             1                              1
    False      True             1                              1
    False      False (default)  1 / W                          1
    True       False            wrong direction                --
    ========== ================ ============================== ===========

    So a run that used open_clip's defaults on W processes sees tower gradients W times as large here; with an
    optimiser like Adam only the relation to weight decay, eps and clipping notices.

    Args:
        local_loss, gather_with_grad:  accepted; the result is exact either way.
        cache_labels:  accepted; there are no labels to cache.
        rank, world_size:  of the default process group. 1 keeps the loss on this process.
        use_horovod:  must be False with more than one process.

    Raises:
        ValueError: use_horovod with world_size > 1; at the call: world_size is not that of torch.distributed.

    Source: open_clip, src/open_clip/loss.py; CLIP (Radford et al. 2021, arXiv:2103.00020), Fig. 3.
    """

    def __init__(self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False,
                 rank: int = 0, world_size: int = 1, use_horovod: bool = False):
        super().__init__()
        if use_horovod and world_size > 1:
            raise ValueError("ClipLoss: use_horovod is True, it must be False: only torch.distributed is supported")
        if local_loss and not gather_with_grad and world_size > 1:
            warnings.warn("ClipLoss: local_loss without gather_with_grad has wrong gradients in open_clip; here they "
                          "are those of the global loss", stacklevel=2)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor,
                logit_bias: Tensor | None = None, output_dict: bool = False) -> Tensor | dict[str, Tensor]:
        """
        Args:
            image_features, text_features:  [n, D], L2-normalised by the caller; n may differ between processes.
            logit_scale:  [], the multiplier itself.
            logit_bias:  [] or None; it changes neither value nor gradient of a softmax loss.

        Returns:
            [] float32 (float64 for float64 features), or {"contrastive_loss": that}.
        """
        loss = info_nce(image_features, text_features, logit_scale, logit_bias=logit_bias,
                        group=_world("ClipLoss", self))
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Sigmoid loss with the constructor and the call of open_clip's `SigLipLoss`.

    Per image: the sum over all texts of the global batch, averaged over images. The value is that of the global batch
    on every rank (open_clip returns the mean over the local images); gradients after DDP's mean are equal to
    open_clip's, and exact with uneven batches too.

    Args:
        cache_labels:  accepted; there are no labels to cache.
        rank, world_size:  of the default process group. 1 keeps the loss on this process.
        dist_impl:  "bidir" and "shift" send texts around a ring, "reduce" and "gather" collect them; None chooses by
            size. The result is the same.
        chunk_size:  accepted; the logits are never in memory.

    Raises:
        ValueError: an unknown dist_impl, a chunk_size below 1; at the call: world_size is not that of
            torch.distributed.

    Source: open_clip, src/open_clip/loss.py; SigLIP (Zhai et al. 2023, arXiv:2303.15343), Alg. 1.
    """

    def __init__(self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None,
                 chunk_size: int | None = None):
        super().__init__()
        if dist_impl not in COMM_OF:
            raise ValueError(f"SigLipLoss: dist_impl is {dist_impl!r}, it must be one of {list(COMM_OF)}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"SigLipLoss: chunk_size is {chunk_size}, it must be at least 1 or None")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl, chunk_size

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor,
                output_dict: bool = False) -> Tensor | dict[str, Tensor]:
        """
        Args:
            image_features, text_features:  [n, D], L2-normalised by the caller; n may differ between processes.
            logit_scale, logit_bias:  [], the multiplier itself and what is added to it.

        Returns:
            [] float32 (float64 for float64 features), or {"contrastive_loss": that}.
        """
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, group=_world("SigLipLoss", self),
                           comm=COMM_OF[self.dist_impl])
        return {"contrastive_loss": loss} if output_dict else loss


class InfoNCE(nn.Module):
    """CLIP's loss with its learnable temperature.

    Args:
        temperature:  where the learnable logit scale starts, 1 / temperature (CLIP: 0.07).
        normalize:  L2-normalise the features first.
        label_smoothing, direction, reduction, group, comm, memory:  as for `vlmfast.ops.info_nce`.

    Attributes:
        logit_scale:  [] parameter, the logarithm of the multiplier.

    Paper: CLIP (Radford et al. 2021, arXiv:2103.00020), Fig. 3 and section 2.5.
    """

    def __init__(self, temperature: float = 0.07, *, normalize: bool = True, label_smoothing: float = 0.0,
                 direction: str = "both", reduction: str = "mean", group: "dist.ProcessGroup | None" = None,
                 comm: str = "auto", memory: str = "auto"):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"InfoNCE: temperature is {temperature}, it must be positive")
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.normalize, self.label_smoothing, self.direction = normalize, label_smoothing, direction
        self.reduction, self.group, self.comm, self.memory = reduction, group, comm, memory

    def forward(self, image: Tensor, text: Tensor, *, weight: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
        """[n, D], [n, D] -> [] (or [n] with reduction "none"); `weight` [n] and `mask` [n, N] as in the op."""
        if self.normalize:
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return info_nce(image, text, self.logit_scale.exp(), weight=weight, mask=mask, group=self.group, comm=self.comm,
                        label_smoothing=self.label_smoothing, direction=self.direction, reduction=self.reduction,
                        memory=self.memory)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the multiplier in [1, 100]; call it after each optimiser step."""
        self.logit_scale.clamp_(0.0, math.log(MAX_SCALE))


class AlignLoss(nn.Module):
    """ALIGN's loss: features divided by a learnable temperature, smoothed targets.

    The target of a row is 1 - eps on its pair plus eps / N on every text of the global batch.

    Args:
        temperature:  where the learnable temperature starts; it is neither exponentiated nor clamped.
        label_smoothing:  eps.
        reduction_directions:  "mean" of the two directions (Hugging Face), or their "sum" (the paper, COYO).
        group, comm:  as for `vlmfast.ops.info_nce`.

    Paper: ALIGN (Jia et al. 2021, arXiv:2102.05918), eq. 1-2.
    """

    def __init__(self, temperature: float = 1.0, label_smoothing: float = 0.1, reduction_directions: str = "sum",
                 group: "dist.ProcessGroup | None" = None, comm: str = "auto"):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.directions = _directions("AlignLoss", reduction_directions)
        self.label_smoothing, self.group, self.comm = label_smoothing, group, comm

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """[n, D], [n, D], normalised here -> []."""
        return self.directions * info_nce(F.normalize(image, dim=-1), F.normalize(text, dim=-1),
                                          self.temperature.reciprocal(), label_smoothing=self.label_smoothing,
                                          group=self.group, comm=self.comm)


class UniCLLoss(nn.Module):
    """UniCL's loss: pairs of one label are each other's positives; label 0 marks a web pair, alone with its text.

    Args:
        temperature:  where the learnable logit scale starts, 1 / temperature.
        label_smoothing:  eps / N of the target on every pair.
        reduction_directions:  "mean" of the two directions or their "sum".
        group, comm:  as for `vlmfast.ops.info_nce`.

    Paper: UniCL (Yang et al. 2022, arXiv:2204.03610), eq. 2-4, Alg. 1; Florence (arXiv:2111.11432), eq. 1-3.
    """

    def __init__(self, temperature: float = 0.07, label_smoothing: float = 0.0, reduction_directions: str = "mean",
                 group: "dist.ProcessGroup | None" = None, comm: str = "auto"):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"UniCLLoss: temperature is {temperature}, it must be positive")
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.directions = _directions("UniCLLoss", reduction_directions)
        self.label_smoothing, self.group, self.comm = label_smoothing, group, comm

    def forward(self, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """[n, D], [n, D], normalised here, and [n] integers, the same meaning on every rank -> []."""
        return self.directions * info_nce(F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.logit_scale.exp(),
                                          labels=fill_web_labels(labels, self.group), targets="labels",
                                          label_smoothing=self.label_smoothing, group=self.group, comm=self.comm)


def fill_web_labels(labels: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Gives each pair with label 0 an id of its own, above all labels in use.

    Args:
        labels:  [n] integers.
        group:  the ids are unique over this process group too; None means this process only. Every rank has to call.

    Returns:
        [n] int64. On one process the ids are max + 1, max + 2, ... in the order of the pairs.

    Raises:
        TypeError: labels are not integers.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"fill_web_labels: labels are {labels.dtype}, they must be integers")
    labels = labels.to(torch.int64)
    highest = labels.max() if len(labels) else labels.new_tensor(torch.iinfo(torch.int64).min)
    rank, world = 0, 1
    if group is not None and dist.get_world_size(group) > 1:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    web = labels == 0
    return torch.where(web, highest + 1 + rank + world * (web.cumsum(0) - 1), labels)


def _directions(name: str, reduction_directions: str) -> float:
    if reduction_directions not in ("sum", "mean"):
        raise ValueError(f'{name}: reduction_directions is {reduction_directions!r}, it must be "sum" or "mean"')
    return 2.0 if reduction_directions == "sum" else 1.0


def _world(name: str, loss: nn.Module) -> "dist.ProcessGroup | None":
    """The default group, if the loss is one over several processes."""
    if loss.world_size == 1:
        return None
    actual = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if actual != loss.world_size:
        raise ValueError(f"{name}: world_size is {loss.world_size}, torch.distributed runs {actual} process(es)")
    return dist.group.WORLD
