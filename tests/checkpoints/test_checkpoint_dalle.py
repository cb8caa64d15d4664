"""DALL-E checkpoints: DALLE-pytorch's files and our folders."""

import os
import re

import pytest
import torch
from checkpoint_helpers import assert_same_model
from dalle_golden import PYTORCH_CASES, pytorch_checkpoint

from vlmfast import models
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.checkpoints.dalle import own_name
from vlmfast.data import CLIPTokenizer


def reference_file(golden, path, case="full", **changes):
    weights, _, _, metadata = golden(f"generative/dallepytorch__{case}")
    return pytorch_checkpoint(path, {**weights, **changes.pop("weights", {})}, metadata["config"], **changes)


@pytest.mark.parametrize("case", PYTORCH_CASES)
def test_settings_and_every_tensor_of_a_dalle_pytorch_file(golden, tmp_path, case):
    path = reference_file(golden, tmp_path / "dalle.pt", case)
    assert detect_format(path) == "dalle-pytorch"
    model = load(path)
    weights, _, _, metadata = golden(f"generative/dallepytorch__{case}")
    config, theirs = model.config, metadata["config"]["dalle"]
    assert not model.training and config.start_token and config.feed_forward == "geglu" and config.conv_kernel == 5
    for name in ("dim", "depth", "heads", "dim_head", "num_text_tokens", "text_seq_len", "shift_tokens"):
        assert getattr(config, name) == theirs[name], name
    assert config.rotary == theirs["rotary_emb"] and config.image_grid == (4, 4) and config.num_image_tokens == 24
    total = sum(value.numel() for key, value in weights.items() if not key.startswith("vae."))
    assert sum(value.numel() for value in model.state_dict().values()) == total
    assert model.vae.config.image_size == 16 and model.vae.vocab_size == 24


@pytest.mark.parametrize("fns", range(1, 6))
def test_names_are_told_by_their_ends(fns):
    start, path = "transformer.layers.layers.7.", None
    wrapped = "fn." * fns
    assert own_name(f"{start}0.{wrapped}to_qkv.weight", path) == "layers.7.attn.fn.to_qkv.weight"
    assert own_name(f"{start}0.{wrapped}to_out.0.bias", path) == "layers.7.attn.fn.to_out.bias"
    assert own_name(f"{start}1.{wrapped}net.0.weight", path) == "layers.7.ff.fn.fc.weight"
    assert own_name(f"{start}1.{wrapped}net.3.bias", path) == "layers.7.ff.fn.proj.bias"
    assert own_name(f"{start}1.fn.norm_out.bias", path) == "layers.7.ff.norm_out.bias"


def test_shared_embeddings_and_sandwich_norms(golden, tmp_path):
    """`share_input_output_emb` registers the output matrix once more under each embedding."""
    weights, _, _, metadata = golden("generative/dallepytorch__full")
    weights = dict(weights)
    for name in ("text", "image"):
        del weights[f"{name}_emb.weight"]
        for kind in ("weight", "bias"):
            weights[f"{name}_emb.linear.{kind}"] = weights[f"to_logits.1.{kind}"]
    for key in list(weights):
        if ".norm." in key:
            weights[key.replace(".norm.", ".norm_out.")] = weights[key] + 0.5
    model = load(pytorch_checkpoint(tmp_path / "a.pt", weights, metadata["config"]))
    assert model.config.shared_embeddings and model.config.sandwich_norm
    text, codes = torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 16, dtype=torch.int64)
    assert torch.isfinite(model(text, codes, return_loss=True).loss)
    assert torch.equal(model._tables()[1], weights["to_logits.1.weight"][46:])


@pytest.mark.parametrize("changes, match", [
    (dict(hparams={"reversible": True}), "trained with reversible layers"),
    (dict(hparams={"attn_types": ("full", "sparse")}), "attn_types holds sparse"),
    (dict(hparams={"sparse_attn": (False, True)}), "sparse attention"),
    (dict(hparams={"shared_attn_ids": (0, 0)}), "layers that share weights"),
    (dict(weights={"extra.weight": torch.zeros(3)}), "unknown keys: extra.weight"),
    (dict(weights={"text_emb.weight": torch.zeros(46)}), "text_emb.weight has shape"),
])
def test_refuses_what_it_would_read_wrongly(golden, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        load(reference_file(golden, tmp_path / "dalle.pt", **changes))


def test_missing_tensors_are_named(golden, tmp_path):
    weights, _, _, metadata = golden("generative/dallepytorch__full")
    weights = {key: value for key, value in weights.items() if not key.endswith("1.0.fn.norm.bias")}
    with pytest.raises(ValueError, match=re.escape("missing keys: layers.1.attn.norm.bias")):
        load(pytorch_checkpoint(tmp_path / "a.pt", weights, metadata["config"]))


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_malicious_pickle_is_refused_and_not_run(golden, tmp_path):
    path = reference_file(golden, tmp_path / "a.pt", opt_state=Attack(tmp_path / "ran"))
    with pytest.raises(UnsafePickleError):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_a_clear_error(golden, tmp_path):
    path = reference_file(golden, tmp_path / "a.pt")
    data = path.read_bytes()
    for share in (0.2, 0.6, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match="a.pt"):
            load(path, format="dalle-pytorch")


def test_a_file_without_weights_is_no_dalle(tmp_path):
    torch.save({"hparams": {}, "weights": "look into consolidating"}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no dict under 'weights'"):
        load(tmp_path / "a.pt", format="dalle-pytorch")


@pytest.mark.parametrize("changes", [{}, dict(rotary=True, shift_tokens=True, start_token=True, token_offset=1),
                                     dict(attn_types=("conv_wrap", "corner"), shared_embeddings=True)])
def test_own_folder_round_trip(tmp_path, changes):
    model = models.create("dalle-tiny", dim=64, depth=3, heads=2, dim_head=16, num_text_tokens=530, text_seq_len=7,
                          num_image_tokens=20, **changes).eval()
    model.tokenizer = CLIPTokenizer.train(["a green apple", "a red apple"] * 3, 520)
    model.attach_vae(models.create("dvae-small", num_tokens=20, codebook_dim=8, hidden_dim=8))
    assert save_pretrained(model, tmp_path / "run") == "dalle"
    other = load(tmp_path / "run")
    assert_same_model(model, other)
    assert other.tokenizer == model.tokenizer
    codes = torch.randint(20, (2, 8, 8))
    assert torch.equal(other.vae.decode(codes), model.vae.eval().decode(codes))
    assert not any(key.startswith("vae") for key in other.state_dict())


def test_own_folder_of_another_model_is_refused(tmp_path):
    save_pretrained(models.create("dalle-tiny", depth=1), tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace('"depth": 1', '"depth": 2'))
    with pytest.raises(ValueError, match="missing keys: layers.1.attn.norm.weight"):
        load(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(config.replace('"depth": 1', '"depth": 1, "colour": 2'))
    with pytest.raises(ValueError, match="unknown fields colour"):
        load(tmp_path / "run")


def test_a_vae_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="the discrete VAE has 512 codes, num_image_tokens is 256"):
        models.create("dalle-tiny", depth=1).attach_vae(models.create("dvae-small"))
