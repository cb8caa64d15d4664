"""UNITER files: the reference layout, every head, MMF's names, strictness, saving."""

import dataclasses
import json

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.single_stream_helpers import SIZES, assert_near, tiny

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.models import UNITERConfig
from vlmfast.models.uniter import HEADS

COPIES = {"cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
          "feat_regress.weight": "uniter.img_embeddings.img_linear.weight"}
CASES = {"pretrain_init": ("mlm", "mrfr", "mrc", "itm"), "pretrain_std03": ("mlm", "mrfr", "mrc", "itm"),
         "vqa_std03": ("vqa",), "referring_init": ("referring",)}


def sized(**overrides):
    """64 channels a head as in the public models, so that nothing needs a config file."""
    return tiny("uniter", **{**dict(hidden_size=64, num_attention_heads=1), **overrides})


def as_public(model) -> dict:
    state = dict(model.state_dict())
    for copy, original in COPIES.items():
        if copy.split(".")[0] in ("cls" if "mlm" in model.config.heads else "", "feat_regress" if "mrfr" in
                                  model.config.heads else ""):
            state[copy] = state[original]
    return state


@pytest.mark.parametrize("case", CASES)
def test_reference_weights_load(golden, tmp_path, case):
    weights, given, truth, metadata = golden(f"bert_like/uniter__{case}")
    torch.save(weights, tmp_path / "uniter-base.pt")
    assert detect_format(tmp_path / "uniter-base.pt") == "uniter"
    model = vlmfast.load(tmp_path / "uniter-base.pt", config={"num_attention_heads": 4})
    assert model.config.heads == CASES[case] and not model.training
    assert set(weights) - set(model.state_dict()) == set(weights) & set(COPIES)
    with torch.no_grad():
        output = model(given["input_ids"], given["image_feat"], given["image_loc"], None, given["text_mask"],
                       given["image_mask"])
    assert_near(output.pooled, truth["pooled"], float(metadata["atol"]), "pooled")
    assert_near(output.image_hidden, truth["image_hidden"], float(metadata["atol"]), "image",
                given["image_mask"].bool())


@pytest.mark.parametrize("fields", [
    dict(heads=("pretraining",)), dict(heads=("vqa",)), dict(heads=("ve",)), dict(heads=("vcr",), type_vocab_size=4),
    dict(heads=("nlvr2",)), dict(heads=("nlvr2",), nlvr2="paired"), dict(heads=("nlvr2",), nlvr2="triplet"),
    dict(heads=("referring",)), dict(heads=("referring",), mlp=2), dict(heads=("itm", "rank")), dict(heads=HEADS),
    dict(heads=()), dict(heads=("classifier",), classifier_images=2), dict(heads=("mlm",)),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = sized(**fields).to(dtype)
    assert save_pretrained(model, tmp_path) == "uniter"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert detect_format(tmp_path) == "uniter"
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path / "pytorch_model.bin", "uniter")):
        assert_same_model(loaded, model)
    (tmp_path / "config.json").unlink()  # sizes and heads are all in the tensors
    loaded = load(tmp_path / "pytorch_model.bin")
    told = {"heads", "vqa_labels", "ve_labels", "img_label_dim", "nlvr2", "mlp", "classifier_labels",
            "classifier_images"} - set(fields)
    model.config = dataclasses.replace(model.config, **{name: getattr(loaded.config, name) for name in told})
    assert_same_model(loaded, model)


def test_saved_names_are_the_public_ones(golden, tmp_path):
    for case in CASES:
        weights, *_ = golden(f"bert_like/uniter__{case}")
        torch.save(weights, tmp_path / "weights.pt")
        save_pretrained(load(tmp_path / "weights.pt", config={"num_attention_heads": 4}), tmp_path / case)
        saved = torch.load(tmp_path / case / "pytorch_model.bin", weights_only=True)
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[key], weights[key]) for key in weights)


def test_an_answer_head_of_three_classes_is_entailment_unless_told_otherwise(tmp_path):
    model = sized(heads=("vqa",), vqa_labels=3)
    torch.save(as_public(model), tmp_path / "three.pt")
    loaded = load(tmp_path / "three.pt")
    assert loaded.config.heads == ("ve",) and torch.equal(loaded.ve_output[3].weight, model.vqa_output[3].weight)
    told = load(tmp_path / "three.pt", config={"heads": ["vqa"]})
    assert told.config.heads == ("vqa",) and told.config.vqa_labels == 3
    save_pretrained(loaded, tmp_path / "folder")
    assert "vqa_output.3.weight" in torch.load(tmp_path / "folder" / "pytorch_model.bin", weights_only=True)
    assert_same_model(load(tmp_path / "folder"), loaded)


@pytest.mark.parametrize("prefix", ["uniter.", "model.uniter.", ""])
def test_mmf_names_of_the_trunk_load(tmp_path, prefix):
    model = sized(heads=())
    names = {"uniter.embeddings.": "text_embeddings.",
             "uniter.img_embeddings.LayerNorm.": "img_embeddings.final_layer_norm."}
    state = {}
    for key, value in model.state_dict().items():
        for old, new in names.items():
            key = f"uniter.{new}{key.removeprefix(old)}" if key.startswith(old) else key
        state[prefix + key.removeprefix("uniter.")] = value
    torch.save({"model": state}, tmp_path / "mmf.pth")
    loaded = load(tmp_path / "mmf.pth")
    assert loaded.config.heads == ()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_parallel_and_old_names_load(tmp_path):
    model = sized(heads=("pretraining",))
    state = {f"module.{key}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
             value for key, value in as_public(model).items()}
    torch.save(state, tmp_path / "old.pt")
    loaded = load(tmp_path / "old.pt")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_missing_and_unknown_keys_are_named(tmp_path):
    state = as_public(sized(heads=("itm",)))
    del state["uniter.img_embeddings.mask_embedding.weight"]
    state["uniter.surprise"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "model.pt")
    assert ("missing keys: uniter.img_embeddings.mask_embedding.weight; unknown keys: uniter.surprise"
            in str(error.value))
    with pytest.warns(UserWarning, match="unknown keys: uniter.surprise"):
        load(tmp_path / "model.pt", strict=False)


@pytest.mark.parametrize("copy", COPIES)
def test_copies_must_be_copies(tmp_path, copy):
    state = as_public(sized(heads=("pretraining",)))
    state[copy] = state[copy] + 1
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"{copy} differs from {COPIES[copy]}, must be its copy"):
        load(tmp_path / "model.pt")


def test_wrong_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"uniter.img_embeddings.pos_linear.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a UNITER checkpoint: uniter.embeddings.word_embeddings.weight is"):
        load(tmp_path / "other.pt", "uniter")
    model = tiny("uniter", heads=("itm",))
    torch.save(as_public(model), tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match="does not tell num_attention_heads; pass config="):
        load(tmp_path / "narrow.pt")
    assert_same_model(load(tmp_path / "narrow.pt", config=model.config), model)
    (tmp_path / "uniter-base.json").write_text(json.dumps(
        {name: value for name, value in SIZES.items() if name != "vqa_labels"}))
    assert load(tmp_path / "narrow.pt", config=tmp_path / "uniter-base.json").config.num_attention_heads == 4
    content = {"model_type": "uniter", **UNITERConfig(**SIZES).to_dict()}
    for wrong, message in (({"model_type": "bert"}, "model_type is 'bert', must be 'uniter'"),
                           ({"layers": 3}, "has unknown fields layers"), ({"num_hidden_layers": 10**9}, "blocks"),
                           ({"hidden_act": "gelu_new"}, "is 'gelu_new'"), ({"mlp": "1"}, "mlp is '1'"),
                           ({"vocab_size": 5}, "must be torch.float32 .5")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "narrow.pt", config={**content, **wrong})
