"""The reference files of DALL-E and DALL-E mini: their tolerance rule, and as the checkpoints that users have."""

import torch

PYTORCH_CASES = ("full", "axial_row", "axial_col", "conv_like", "mixed_rotary_shift")
MINI_CASE = "generative/mindalle_bart__prefix_and_supercondition"


def assert_golden(ours, truth, tol: float = 2e-5, what: str = "result") -> None:
    """max|a_i - b_i| <= tol max(max|b_i|, max|b| / 1000) for every slice i of the first dimension."""
    assert ours.shape == truth.shape, f"{what}: {tuple(ours.shape)}, must be {tuple(truth.shape)}"
    if not truth.is_floating_point():
        assert torch.equal(ours, truth), what
        return
    least = truth.abs().max().item() / 1000
    for i, (a, b) in enumerate(zip(ours.reshape(-1) if ours.ndim < 2 else ours, truth.reshape(-1)
                                   if truth.ndim < 2 else truth, strict=True)):
        error, bound = (a - b).abs().max().item(), tol * max(b.abs().max().item(), least)
        assert error <= bound, f"{what}: slice {i} differs by {error:.3g}, at most {bound:.3g}"


def pytorch_checkpoint(path, weights, config, **changes):
    """What DALLE-pytorch's train_dalle.py saves."""
    hparams = {**config["dalle"], "attn_types": tuple(config["dalle"]["attn_types"]), **changes.pop("hparams", {})}
    content = {"hparams": hparams, "vae_params": config["vae"], "epoch": 3, "version": "1.6.6",
               "vae_class_name": "DiscreteVAE", "weights": weights, "opt_state": {"state": {}, "param_groups": []},
               "scheduler_state": None, **changes}
    torch.save(content, path)
    return path


def min_dalle_folder(folder, weights, dtype=torch.float32):
    """encoder.pt and decoder.pt as min-dalle stores them."""
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("encoder", "decoder"):
        state = {key.removeprefix(f"{side}."): value.to(dtype) for key, value in weights.items()
                 if key.startswith(f"{side}.")}
        torch.save(state, folder / f"{side}.pt")
    return folder
