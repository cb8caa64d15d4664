"""VD-BERT files: the authors' layout, growing tables, strictness both ways, saving, untrusted content."""

import dataclasses
import json

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.tiny_models import VDBERT_SIZES, assert_text_equals_bert, save_tiny_bert, vdbert_inputs
from models.tiny_models import tiny_vdbert as tiny

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.checkpoints.vdbert import NEW_TYPES
from vlmfast.models.vdbert import VDBERTConfig

COPY, TABLE = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
TYPES, POSITIONS = "bert.embeddings.token_type_embeddings.weight", "bert.embeddings.position_embeddings.weight"


def as_public(model) -> dict:
    state = dict(model.state_dict())
    if "mlm" in model.config.heads:
        state[COPY] = state[TABLE]
    return state


def public_sizes(**overrides):
    """64 channels per head and 36 slots as in the public model, so that nothing needs a config file."""
    return tiny(hidden_size=64, num_attention_heads=1, len_vis_input=36, mask_word_id=103,
                **{"max_position_embeddings": 50, **overrides})


@pytest.mark.parametrize("case", ["pretrain_bi_init", "pretrain_s2s_std03", "generative_ranking_std03"])
def test_reference_weights_load_with_the_reference_configuration(golden, tmp_path, case):
    weights, given, truth, metadata = golden(f"bert_like/vdbert__{case}")
    file = tmp_path / "v1.0_from_BERT_e30.bin"
    torch.save(weights, file)
    assert detect_format(file) == "vdbert"
    model = vlmfast.load(file, config=metadata["config"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vdbert", **metadata["config"]}))
    assert_same_model(load(file, "vdbert"), model)
    assert model.config.layer_norm_eps == 1e-5 and not model.training
    assert set(weights) - set(model.state_dict()) == {COPY} and set(model.state_dict()) <= set(weights)
    atol = float(metadata["atol"])
    with torch.no_grad():
        if "options" in given:
            found = model.score_options(given["input_ids"], given["image_feat"], given["image_loc"], given["options"])
            torch.testing.assert_close(found, truth["option_scores"], rtol=0, atol=atol)
        else:
            output = model(given["input_ids"], given["image_feat"], given["image_loc"], given["token_type_ids"],
                           given["attention_mask"])
            torch.testing.assert_close(output.logits["nsp"], truth["nsp_logits"], rtol=0, atol=atol)


@pytest.mark.parametrize("fields", [
    {}, {"heads": ("mlm",)}, {"heads": ("nsp", "classifier"), "classifier_labels": 5, "classifier_images": 2},
    {"heads": ()}, {"type_vocab_size": 2}, {"vis_feat_dim": 30, "vis_pe_dim": 9},
    {"vis_embed_layers": 2, "len_vis_input": 100, "max_position_embeddings": 110}, {"len_vis_input": 0},
], ids=str)
def test_sizes_are_read_off_the_tensors(tmp_path, fields):
    model = public_sizes()
    model = tiny(**{**model.config.to_dict(), **fields})
    untold = {"vis_feat_dim": 2048, "vis_pe_dim": 7} if fields.get("len_vis_input") == 0 else {}
    torch.save(as_public(model), tmp_path / "model.bin")
    if model.config.len_vis_input:
        assert detect_format(tmp_path / "model.bin") == "vdbert"
    model.config = dataclasses.replace(model.config, **untold)
    assert_same_model(load(tmp_path / "model.bin", "vdbert"), model)


def test_older_wrapped_and_smoothed_files_load(tmp_path):
    model = public_sizes()
    state = as_public(model)
    old = {f"module.{key}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
           value for key, value in state.items()}
    assert any(key.endswith("gamma") for key in old)
    torch.save({"model": old, "epoch": 3}, tmp_path / "old.bin")
    assert_same_model(load(tmp_path / "old.bin"), model)
    trained = {**state, "crit_mask_lm_smoothed.one_hot": torch.zeros(1, 97), "crit_next_sent.weight": torch.ones(2)}
    torch.save(trained, tmp_path / "trained.bin", _use_new_zipfile_serialization=False)
    assert_same_model(load(tmp_path / "trained.bin"), model)


def test_segments_and_positions_grow_as_in_the_public_code(tmp_path):
    model = tiny(type_vocab_size=2)
    torch.save(as_public(model), tmp_path / "bert.bin")
    config = {**VDBERT_SIZES, "type_vocab_size": 6, "max_position_embeddings": 100}
    grown = load(tmp_path / "bert.bin", config=config).state_dict()
    stored = model.state_dict()
    assert torch.equal(grown[TYPES], stored[TYPES][[0, 1, 0, 0, 0, 1]])
    assert torch.equal(grown[POSITIONS][:40], stored[POSITIONS])
    assert torch.equal(grown[POSITIONS][40:80], stored[POSITIONS])
    assert torch.equal(grown[POSITIONS][80:], stored[POSITIONS][:20])
    for wrong in ({"type_vocab_size": 4}, {"max_position_embeddings": 20}, {"max_position_embeddings": 10**9}):
        with pytest.raises(ValueError, match=r"embeddings.weight is torch.float32 .*, must be torch.float32"):
            load(tmp_path / "bert.bin", config={**VDBERT_SIZES, "type_vocab_size": 2, **wrong})


@pytest.mark.parametrize("fields", [{}, {"heads": ("nsp",)}, {"heads": ("mlm", "classifier"), "classifier_labels": 3},
                                    {"vis_embed_layers": 2, "layer_norm_eps": 1e-6}, {"len_vis_input": 0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = tiny(**fields).to(dtype)
    assert save_pretrained(model, tmp_path) == "vdbert"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert detect_format(tmp_path) == "vdbert"
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path / "pytorch_model.bin", "vdbert")):
        assert_same_model(loaded, model)
    if model.config.len_vis_input:
        given = vdbert_inputs()
        given["image_feat"], given["image_loc"] = given["image_feat"].to(dtype), given["image_loc"].to(dtype)
        assert torch.equal(load(tmp_path)(**given).hidden, model(**given).hidden)


def test_saved_names_are_the_public_ones(golden, tmp_path):
    weights, _, _, metadata = golden("bert_like/vdbert__pretrain_bi_std03")
    torch.save(weights, tmp_path / "model.bin")
    save_pretrained(load(tmp_path / "model.bin", config=metadata["config"]), tmp_path / "ours")
    saved = torch.load(tmp_path / "ours" / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in saved)


def test_missing_and_unknown_keys_are_named(tmp_path):
    state = as_public(public_sizes())
    del state["bert.encoder.layer.1.output.dense.bias"]
    state["vis_extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "model.bin")
    message = "missing keys: bert.encoder.layer.1.output.dense.bias; unknown keys: vis_extra.weight"
    assert message in str(error.value)
    with pytest.warns(UserWarning, match="unknown keys: vis_extra.weight"):
        loaded = load(tmp_path / "model.bin", strict=False)
    assert torch.equal(loaded.bert.encoder.layer[1].output.dense.bias, torch.zeros(64))


def test_wrong_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"vis_pe_embed.0.weight": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=f"not a VD-BERT checkpoint: {TABLE} is missing"):
        load(tmp_path / "other.bin", "vdbert")
    model = public_sizes()
    torch.save({**as_public(model), COPY: model.word_table + 1}, tmp_path / "untied.bin")
    with pytest.raises(ValueError, match=f"{COPY} differs from {TABLE}"):
        load(tmp_path / "untied.bin")
    torch.save(as_public(tiny()), tmp_path / "narrow.bin")
    with pytest.raises(ValueError, match="does not tell num_attention_heads; pass config="):
        load(tmp_path / "narrow.bin")
    assert load(tmp_path / "narrow.bin", config=VDBERTConfig(**VDBERT_SIZES)).config.len_vis_input == 7
    for wrong, message in (({"layers": 3}, "unknown fields layers"), ({"model_type": "bert"}, "model_type is 'bert'"),
                           ({"num_hidden_layers": 10**9}, "blocks"), ({"hidden_size": 64}, "must be torch.float32"),
                           ({"hidden_act": 3}, "hidden_act is 3"), ({"vocab_size": 10**15}, "must be|absurd")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "narrow.bin", config={**VDBERT_SIZES, **wrong})


@pytest.mark.oracle
def test_text_stream_starts_from_bert(tmp_path):
    bert = save_tiny_bert(tmp_path, max_position_embeddings=40, layer_norm_eps=1e-5)
    model = tiny()
    assert_text_equals_bert(model, bert, tmp_path, "nsp", new_types=NEW_TYPES)
    assert torch.equal(model.state_dict()[TYPES], bert.bert.embeddings.token_type_embeddings.weight[[0, 1, 0, 0, 0, 1]])
