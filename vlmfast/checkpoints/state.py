"""From a state dict under a source's names to a model: what every format does alike."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def list_names(names: list[str], limit: int = 50) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def report_keys(path: Path, missing: list[str], unknown: list[str], strict: bool) -> None:
    """ValueError (or a warning, if not strict) naming the keys that found no counterpart."""
    kinds = {"missing": missing, "unknown": unknown}
    found = [f"{kind} keys: {list_names(names)}" for kind, names in kinds.items() if names]
    if found and strict:
        raise ValueError(f"{path}: {'; '.join(found)}")
    if found:
        warnings.warn(f"{path}: {'; '.join(found)}", stacklevel=4)


def check_shapes(state: dict[str, Tensor], target: dict[str, Tensor], path: Path) -> None:
    """ValueError naming every tensor whose shape or kind of number is not the target's."""
    wrong = [
        f"{key} is {value.dtype} {list(value.shape)}, must be {target[key].dtype} {list(target[key].shape)}"
        for key, value in state.items()
        if value.shape != target[key].shape or value.is_floating_point() != target[key].is_floating_point()
    ]
    if wrong:
        raise ValueError(f"{path}: {list_names(wrong)}")


def common_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """The floating point type of all tensors, float32 where several are mixed."""
    found = {value.dtype for value in state.values() if value.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without DataParallel's `module.`, and with LayerNorm's old `gamma` and `beta` as `weight` and `bias`."""
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    old = {".gamma": ".weight", ".beta": ".bias"}
    return {_renamed(key, old): value for key, value in state.items()}


def _renamed(key: str, endings: dict[str, str]) -> str:
    for old, new in endings.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def check_tied(state: dict[str, Tensor], copy: str, table: str, path: Path) -> None:
    """A stored copy of the word table must be that table; ValueError otherwise."""
    if copy in state and table in state and not torch.equal(state[copy], state[table]):
        raise ValueError(f"{path}: {copy} differs from {table}, must be its copy")


def shape_reader(state: dict[str, Tensor], path: Path, kind: str) -> Callable[..., tuple[int, ...]]:
    """`shape(key, ndim)` of a tensor that fixes sizes; ValueError where it is absent or of another rank."""

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != ndim:
            found = f"has shape {list(state[key].shape)}" if key in state else "is missing"
            raise ValueError(f"{path}: not a {kind} checkpoint: {key} {found}, must have {ndim} dimensions")
        return tuple(state[key].shape)

    return shape


def count_layers(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules lie under `prefix`."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def require_heads(values: dict, path: Path) -> None:
    """ValueError where a head count could not be inferred (0) and no config told it."""
    absent = [name for name, value in values.items() if name.endswith("_heads") and value == 0]
    if absent:
        raise ValueError(f"{path}: does not tell {', '.join(absent)}; pass config= or put config.json beside it")


def build_filled(
    build: Callable[..., nn.Module],
    blocks: int,
    state: dict[str, Tensor],
    source_name: Callable[[str], str],
    dropped: Callable[[str], bool],
    path: Path,
    *,
    strict: bool,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> nn.Module:
    """A model in evaluation mode with the tensors of `state`.

    Args:
        build: `build(device=...)` makes the model; it is called with "meta" first, so nothing is allocated for
            sizes that the file does not back.
        blocks: layers of the config; a file has more tensors than that.
        source_name: our key -> the source's.
        dropped: which source keys have no place here, on purpose.
        strict, device, dtype: as in `load`.
    """
    if blocks > len(state):
        raise ValueError(f"{path}: the config has {blocks} blocks, the file only {len(state)} tensors")
    try:
        model = build(device="meta")
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: sizes in the config are absurd ({error})") from error
    target = model.state_dict()
    names = {key: source_name(key) for key in target}
    missing = [key for key, name in names.items() if name not in state]
    used = set(names.values())
    unknown = sorted(key for key in state if key not in used and not dropped(key))
    report_keys(path, [names[key] for key in missing], unknown, strict)
    filled = {key: state[name] for key, name in names.items() if name in state}
    check_shapes(filled, target, path)
    if missing:
        model = build(device="cpu")
    dtype = dtype or common_dtype(filled)
    for key in list(filled):  # copies, one at a time: a mapped file may change or vanish under the model
        kind = dtype if filled[key].is_floating_point() else None
        filled[key] = filled[key].to(device=device, dtype=kind, copy=True).contiguous()
    model.load_state_dict(filled, strict=not missing, assign=True)
    return (model.to(device=device, dtype=dtype) if missing else model).eval()
