"""VQGAN from taming's checkpoints and min-dalle's detokenizer, and from our folders."""

import argparse
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained

TINY = dict(resolution=256, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), z_channels=8, n_embed=20,
            embed_dim=8)


def tiny(**overrides):
    model = vlmfast.create("vqgan-f16-1024", **{**TINY, **overrides}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.05)
    return model


def assert_same(a, b):
    assert a.config == b.config
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), key


@pytest.fixture
def lightning(monkeypatch):
    """Saves with a class of pytorch_lightning as a key, as its checkpoints have; it is gone when they are read."""
    def write(content, path):
        kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
        with monkeypatch.context() as patch:
            for name in ("pytorch_lightning", "pytorch_lightning.callbacks",
                         "pytorch_lightning.callbacks.model_checkpoint"):
                module = types.ModuleType(name)
                module.ModelCheckpoint = kind
                patch.setitem(sys.modules, name, module)
            torch.save({**content, "callbacks": {kind: {"best_model_score": torch.tensor(0.5), "saver": kind()}}}, path)
        return path

    return write


def test_taming_checkpoints_with_callbacks_are_read(lightning, tmp_path):
    model = tiny()
    state = {**model.state_dict(), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1),
             "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4)}
    settings = argparse.Namespace(folder=Path("x"), rate=np.float64(0.5), best=np.arange(3), kind=int)
    path = lightning({"epoch": 3, "state_dict": state, "hyper_parameters": settings,
                      "optimizer_states": [{"state": {0: {"step": 5}}}]}, tmp_path / "last.ckpt")
    assert detect_format(path) == "taming"
    assert_same(load(path), model)
    assert_same(load(path, format="taming"), model)


@pytest.mark.parametrize("overrides", [{}, dict(quantizer="gumbel"), dict(double_z=True), dict(attn_resolutions=()),
                                       dict(ch_mult=(2, 1, 4), attn_resolutions=(256, 64), num_res_blocks=2)])
def test_sizes_come_from_the_tensors(tmp_path, overrides):
    model = tiny(**overrides)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    found = load(tmp_path / "last.ckpt")
    assert_same(found, model)


def test_malicious_and_truncated_checkpoints_are_refused(lightning, tmp_path):
    target = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {target}",)

    path = lightning({"state_dict": tiny().state_dict(), "bomb": Attack()}, tmp_path / "a.ckpt")
    with pytest.raises(UnsafePickleError, match="posix.system|nt.system"):
        load(path)
    path = lightning({"state_dict": tiny().state_dict()}, tmp_path / "a.ckpt")
    whole = path.read_bytes()
    for length in (len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.ckpt"):
            load(path, format="taming")
    path = lightning({"state_dict": {"decoder.up.0.block.0.": 3}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is a int, must be a tensor"):
        load(path, format="taming")
    assert not target.exists()


def test_taming_reference_numbers(golden, golden_close, tmp_path):
    weights, inputs, outputs, meta = golden("generative/taming_vqgan__encode_decode")
    torch.save({"state_dict": {key: value.float() for key, value in weights.items()}}, tmp_path / "last.ckpt")
    model = load(tmp_path / "last.ckpt")
    dd = meta["config"]["ddconfig"]
    for name in ("ch", "z_channels", "num_res_blocks", "in_channels", "out_ch", "double_z"):
        assert getattr(model.config, name) == dd[name], name
    assert list(model.config.ch_mult) == dd["ch_mult"] and [model.config.attends(i) for i in range(2)] == [False, True]
    # the reference's picture goes beyond -1 ... 1; only the range check is ours
    image = (inputs["x"] + 1) / 2
    with torch.no_grad():
        golden_close(model.encoder(inputs["x"]), outputs["encoder_output"])
        golden_close(model.features(image), outputs["quant_conv_output"])
        assert torch.equal(model.encode(image).flatten(), outputs["indices"])
        out = model(image)
        golden_close(out.raw, outputs["decoded"])
        golden_close(out.codebook_loss, outputs["emb_loss"])
        codes = outputs["indices"].view(1, 8, 8)
        golden_close(model.quantize.decode(codes), outputs["quant"])
        golden_close(model.render(model.quantize.decode(codes)), outputs["decoded"])
        golden_close(model.decode(codes), (outputs["decoded"] + 1).div(2).clamp(0, 1))


def test_min_dalle_reference_numbers(golden, golden_close, tmp_path):
    weights, inputs, outputs, _ = golden("generative/mindalle_detokenizer__grid2")
    torch.save({key: value.float() for key, value in weights.items()}, tmp_path / "detoker.pt")
    assert detect_format(tmp_path / "detoker.pt") == "min-dalle-vqgan"
    model = load(tmp_path / "detoker.pt")
    assert model.config.norm_eps == 1e-5 and model.config.encoder is False
    codes = inputs["image_tokens"]
    with torch.no_grad():
        z = model.quantize.decode(codes.view(-1, 2, 2))
        golden_close(model.render(z), outputs["decoder_output"], 5e-5)
        pictures = model.decode(codes)
    # the reference's grid is filled column by column
    columns = [torch.cat(list(column), 1) for column in pictures.unflatten(0, (2, 2))]
    grid = torch.cat(columns, 2).permute(1, 2, 0)
    golden_close(grid * 255, outputs["image_grid.seamless_False"], 5e-5)
    with pytest.raises(ValueError, match="has no encoder"):
        model.encode(pictures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, dict(quantizer="gumbel", beta=0.5), dict(encoder=False, pixel_range="unit")])
def test_save_and_load_is_exact(tmp_path, overrides, dtype):
    model = tiny(**overrides).to(dtype)
    save_pretrained(model, tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same(load(path), model)


def test_what_is_no_vqgan_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="not a VQGAN checkpoint: decoder.up.0 is missing"):
        load(tmp_path / "a.ckpt", format="taming")
    state = tiny().state_dict()
    state["decoder.extra.weight"] = state.pop("decoder.norm_out.weight")
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="missing keys: decoder.norm_out.weight; unknown keys: decoder.extra.weight"):
        load(tmp_path / "a.ckpt")
