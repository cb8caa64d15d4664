"""DALL-E mini checkpoints: min-dalle's files, dalle-mini's flax arrays, our folders."""

import json
import os

import numpy as np
import pytest
import torch
from checkpoint_helpers import assert_same_model
from dalle_golden import MINI_CASE, min_dalle_folder

from vlmfast import models
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.checkpoints.dalle_mini import from_flax
from vlmfast.data import BartTokenizer
from vlmfast.tasks import encode_prompts

HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.fixture
def weights(golden):
    return golden(MINI_CASE)[0]


def write_vocabulary(folder):
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *"abcdelnpr", "Ġa", "pp", "le", "pple", "Ġapple"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    merges = ["Ġ a", "p p", "l e", "pp le", "Ġa pple"]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def test_every_tensor_of_min_dalles_files(weights, tmp_path):
    folder = min_dalle_folder(tmp_path / "mini", weights)
    assert detect_format(folder) == "min-dalle"
    model = load(folder, config=HEADS)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert model.config.image_grid == 16 and model.config.decoder_start_token_id == 48
    assert model.tokenizer is None and model.vae is None


def test_heads_of_unusual_widths_have_to_be_told(weights, tmp_path):
    with pytest.raises(ValueError, match="does not tell encoder_attention_heads, decoder_attention_heads"):
        load(min_dalle_folder(tmp_path / "mini", weights))


def test_half_precision_stays_and_can_be_widened(weights, tmp_path):
    folder = min_dalle_folder(tmp_path / "mini", weights, torch.float16)
    assert load(folder, config=HEADS).dtype == torch.float16
    assert load(folder, config=HEADS, dtype=torch.float32).dtype == torch.float32


def test_norms_without_scale_have_scale_1(weights, tmp_path):
    scaleless = ("pre_self_attn_layer_norm.weight", "pre_encoder_attn_layer_norm.weight", "glu.ln0.weight",
                 "glu.ln1.weight")
    few = {key: value for key, value in weights.items() if not key.endswith(scaleless)}
    assert len(few) == len(weights) - 2 * 3 - 2 * 4
    model = load(min_dalle_folder(tmp_path / "a", few), config=HEADS)
    for key, value in model.state_dict().items():
        if key.endswith(scaleless):
            assert (value == 1).all(), key
    few = {key: value for key, value in few.items() if not key.endswith("self_attn_layer_norm.weight")}
    with pytest.raises(ValueError, match="missing keys: .*self_attn_layer_norm.weight"):
        load(min_dalle_folder(tmp_path / "b", few), config=HEADS)


def flax_params(weights, scales: bool):
    """The same arrays as dalle-mini's flax model has them: kernels transposed, layers stacked, other names."""
    parts = {"self_attn_layer_norm": "LayerNorm_1", "pre_self_attn_layer_norm": "LayerNorm_0",
             "pre_encoder_attn_layer_norm": "LayerNorm_2", "encoder_attn_layer_norm": "LayerNorm_3",
             "self_attn": "FlaxBartAttention_0", "encoder_attn": "FlaxBartAttention_1", "glu": "GLU_0",
             "ln0": "LayerNorm_0", "ln1": "LayerNorm_1", "fc0": "Dense_0", "fc1": "Dense_1", "fc2": "Dense_2"}
    params = {"model": {"encoder": {}, "decoder": {}}}

    def put(tree, names, value):
        for name in names[:-1]:
            tree = tree.setdefault(name, {})
        tree[names[-1]] = value

    stacked = {}
    for key, value in weights.items():
        side, *names, kind = key.split(".")
        value = value.numpy()
        if kind == "weight":
            embedding, norm = "embed_" in names[0], "ln" in names[-1] or "norm" in names[-1]
            kind = "embedding" if embedding else "scale" if norm else "kernel"
            value = value.T if kind == "kernel" else value
        if key == "decoder.lm_head.weight":
            params["lm_head"] = {"kernel": value}
        elif names[0] == "layers":
            path = (side, *(parts.get(name, name) for name in names[2:]), kind)
            stacked.setdefault(path, {})[int(names[1])] = value
        else:
            put(params["model"][side], (*names, kind), value)
    for (side, *names, kind), layers in stacked.items():
        free = names[-1] in ("LayerNorm_0", "LayerNorm_2") or names[0] == "GLU_0"
        if kind == "scale" and free and not scales:
            continue
        array = np.stack([layers[i] for i in range(len(layers))])
        put(params["model"][side], ("layers", f"FlaxBart{side.title()}Layers", *names, kind), array)
    return params


def test_flax_arrays_are_the_same_model(weights):
    model = from_flax(flax_params(weights, scales=True), HEADS)
    state = model.state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    model = from_flax(flax_params(weights, scales=False), HEADS)
    assert (model.decoder.layers[1].glu.ln1.weight == 1).all()
    with pytest.raises(ValueError, match="params lacks 'lm_head'"):
        from_flax({"model": {"encoder": {}, "decoder": {}}})


def test_vocabulary_beside_the_files(weights, tmp_path):
    folder = min_dalle_folder(tmp_path / "mini", weights)
    write_vocabulary(folder)
    model = load(folder, config=HEADS)
    tokens = model.tokenizer.vocabulary
    assert model.tokenizer.encode("An  APPLE né") == [tokens["Ġa"], tokens["n"], tokens["Ġapple"], tokens["Ġ"],
                                                      tokens["n"]]
    assert model.tokenizer.encode("xa") == [tokens["Ġ"], tokens["<unk>"], tokens["a"]]
    ids = encode_prompts(model, ["an apple", ""])
    assert ids.tolist() == [[0, tokens["Ġa"], tokens["n"], tokens["Ġapple"], 2] + [1] * 5, [0, 2] + [1] * 8]
    with pytest.raises(ValueError, match="'apple apple.* has 12 tokens, the text context is 10"):
        encode_prompts(model, "apple " * 10)


def test_damaged_vocabulary_is_a_clear_error(tmp_path):
    write_vocabulary(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="merges.txt has a line that is no pair"):
        BartTokenizer.from_file(tmp_path)
    (tmp_path / "vocab.json").write_text("[")
    with pytest.raises(ValueError, match="damaged vocabulary"):
        BartTokenizer.from_file(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt does not exist"):
        BartTokenizer.from_file(tmp_path)


def test_own_folder_round_trip(tmp_path):
    model = models.create("dalle-mini-tiny", d_model=32, encoder_layers=1, decoder_layers=1).eval()
    write_vocabulary(tmp_path)
    model.tokenizer = BartTokenizer.from_file(tmp_path)
    assert save_pretrained(model, tmp_path / "run") == "dalle-mini"
    assert detect_format(tmp_path / "run") == "min-dalle"
    other = load(tmp_path / "run")
    assert_same_model(model, other)
    assert other.tokenizer.merges == model.tokenizer.merges


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_hostile_and_cut_off_files(weights, tmp_path):
    folder = min_dalle_folder(tmp_path / "mini", weights)
    whole = (folder / "decoder.pt").read_bytes()
    (folder / "decoder.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="decoder.pt"):
        load(folder, config=HEADS)
    torch.save({"embed_tokens.weight": Attack(tmp_path / "ran")}, folder / "decoder.pt")
    with pytest.raises(UnsafePickleError):
        load(folder, config=HEADS)
    assert not (tmp_path / "ran").exists()
    (folder / "decoder.pt").unlink()
    with pytest.raises(FileNotFoundError, match="must hold one of decoder.pt"):
        load(folder, format="min-dalle", config=HEADS)


def test_detokenizer_in_the_neighbouring_folder(golden, weights, tmp_path):
    """The fp16 file of min-dalle, in the folder that its downloader makes."""
    detokenizer = {key: value.float() for key, value in golden("generative/mindalle_detokenizer__grid2")[0].items()}
    folder = min_dalle_folder(tmp_path / "mini", weights)
    (tmp_path / "vqgan").mkdir()
    torch.save(detokenizer, tmp_path / "vqgan" / "detoker.pt")
    with pytest.raises(ValueError, match="the VQGAN has 64 codes, num_image_codes is 48"):
        load(folder, config=HEADS)
