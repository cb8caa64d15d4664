"""ViLBERT files: every reference layout, strictness both ways, saving, untrusted content."""

import dataclasses
import json

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.two_stream_helpers import inputs, perturb, tiny_vilbert

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.models import ViLBERT, ViLBERTConfig

CASES = ["pretrain_kl_init", "pretrain_mse_std03", "pretrain_nce_std03", "dynamic_attention_std03",
         "in_batch_pairs_std03", "tasks_std03", "task_tokens_std03", "beta_vqa_std03"]
COPY, TABLE = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


def as_public(model: ViLBERT) -> dict:
    """The state dict as the authors' code would save it: tied copy and unused projections included."""
    state = dict(model.state_dict())
    if "pretraining" in model.config.heads:
        state[COPY] = state[TABLE]
    for k in range(len(model.config.v_biattention_id)):
        for side in (1, 2):
            for kind in ("weight", "bias"):
                dense = state[f"bert.encoder.c_layer.{k}.biOutput.dense{side}.{kind}"]
                state[f"bert.encoder.c_layer.{k}.biOutput.q_dense{side}.{kind}"] = torch.randn_like(dense)
    return state


def write(state, folder, config=None, name="pytorch_model.bin"):
    torch.save(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / name


@pytest.mark.parametrize("case", CASES)
def test_reference_weights_load_with_the_reference_configuration(golden, tmp_path, case):
    weights, given, truth, metadata = golden(f"bert_like/vilbert__{case}")
    file = write(weights, tmp_path, metadata["config"])
    model = vlmfast.load(file, format="vilbert")
    for source in (load(file), load(tmp_path), load(file, config=metadata["config"])):
        assert_same_model(source, model)
    assert not model.training
    used = set(model.state_dict())
    folded = {f"vil_prediction.main.{i}.weight{end}" for i in (0, 3) for end in ("", "_g", "_v")}
    unplaced = {key for key in weights if key not in used and key != COPY and "q_dense" not in key}
    assert unplaced - folded == set() and used - set(weights) - folded == set()
    with torch.no_grad():
        output = model(*(given[name] for name in ("input_ids", "image_feat", "image_loc", "token_type_ids",
                                                  "attention_mask", "image_mask")), task_ids=given.get("task_ids"))
    for name in ("pooled_text", "pooled_image"):
        torch.testing.assert_close(getattr(output, name), truth[name], rtol=0, atol=float(metadata["atol"]))
    if "vqa_logits" in truth:
        torch.testing.assert_close(output.logits["vqa"], truth["vqa_logits"], rtol=0, atol=float(metadata["atol"]))


def public_sizes(**overrides) -> ViLBERT:
    """Few and narrow layers, but the public channels per head, so that nothing needs a config file."""
    return tiny_vilbert(hidden_size=64, num_attention_heads=1, v_hidden_size=128, v_num_attention_heads=1,
                        bi_hidden_size=128, bi_num_attention_heads=1, **overrides)


@pytest.mark.parametrize("fields", [
    {}, {"heads": ("pretraining",)}, {"heads": ()}, {"heads": ("pretraining", "vqa", "vil"), "vqa_activation": "relu"},
    {"dynamic_attention": True}, {"task_specific_tokens": True}, {"v_target_size": 20, "visual_target": 1},
], ids=str)
def test_sizes_are_read_off_the_tensors(tmp_path, fields):
    model = public_sizes(**fields)
    file = write(as_public(model), tmp_path, name="multi_task_model.bin")
    assert detect_format(file) == "vilbert"
    loaded = load(file)
    needs = {"vqa_labels": "vqa", "gqa_labels": "gqa", "v_target_size": "pretraining"}
    untold = [name for name, head in needs.items() if head not in model.config.heads]
    model.config = dataclasses.replace(model.config, **{name: getattr(loaded.config, name) for name in untold})
    assert_same_model(loaded, model)


def test_older_and_wrapped_files_load(tmp_path):
    model = public_sizes()
    state = as_public(model)
    old = {f"module.{key}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
           value for key, value in state.items()}
    assert any(key.endswith("gamma") for key in old)
    assert_same_model(load(write({"model_state_dict": old, "epoch_id": 3}, tmp_path, name="resume.tar")), model)
    torch.save(state, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    assert_same_model(load(tmp_path / "legacy.bin"), model)
    trunk = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    loaded = load(write(trunk, tmp_path, name="trunk.bin"))
    assert loaded.config.heads == ()
    assert torch.equal(loaded.bert.t_pooler.dense.weight, model.bert.t_pooler.dense.weight)


@pytest.mark.parametrize("fields", [
    {}, {"vqa_activation": "relu"}, {"dynamic_attention": True, "task_specific_tokens": True},
    {"fusion_method": "sum", "in_batch_pairs": True, "co_attention_scale": 5.0, "v_hidden_act": "relu"},
    {"model": "roberta", "heads": ("pretraining",)}, {"heads": ()},
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = tiny_vilbert(**fields).to(dtype)
    assert save_pretrained(model, tmp_path) == "vilbert"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert detect_format(tmp_path) == "vilbert"
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path / "pytorch_model.bin", "vilbert")):
        assert_same_model(loaded, model)
    assert_same_model(vlmfast.load(tmp_path, dtype=torch.float64), model.double())


def test_saved_names_are_the_public_ones(golden, tmp_path):
    for case in ("pretrain_kl_std03", "tasks_std03", "beta_vqa_std03"):
        weights, _, _, metadata = golden(f"bert_like/vilbert__{case}")
        write(weights, tmp_path, metadata["config"])
        save_pretrained(load(tmp_path), tmp_path / case)
        saved = torch.load(tmp_path / case / "pytorch_model.bin", weights_only=True)
        assert set(saved) == set(weights)
        for key, value in saved.items():
            assert value.shape == weights[key].shape, key
            if "q_dense" in key:
                assert not value.any()
            elif "vil_prediction.main" not in key:
                assert torch.equal(value, weights[key]), key


def test_a_strict_load_by_the_public_code_finds_every_key(tmp_path):
    for fields in ({}, {"dynamic_attention": True, "task_specific_tokens": True}, {"heads": ("pretraining",)}):
        model = tiny_vilbert(**fields)
        save_pretrained(model, tmp_path)
        saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        public = as_public(model)
        assert set(saved) == set(public) and all(saved[key].shape == value.shape for key, value in public.items())


def test_missing_and_unknown_keys_are_named(tmp_path):
    model = public_sizes()
    state = as_public(model)
    del state["bert.encoder.c_layer.1.biOutput.dense2.bias"]
    state["bert.surprise"] = torch.zeros(1)
    file = write(state, tmp_path, name="model.bin")
    with pytest.raises(ValueError) as error:
        load(file)
    assert "missing keys: bert.encoder.c_layer.1.biOutput.dense2.bias; unknown keys: bert.surprise" in str(error.value)
    with pytest.warns(UserWarning, match="unknown keys: bert.surprise"):
        loaded = load(file, strict=False)
    assert torch.equal(loaded.bert.encoder.c_layer[1].biOutput.dense2.bias, torch.zeros(64))
    assert torch.equal(loaded.vil_logit.weight, model.vil_logit.weight)


def test_copy_of_the_word_table_must_be_one(tmp_path):
    state = as_public(public_sizes())
    state[COPY] = state[COPY] + 1
    with pytest.raises(ValueError, match=f"{COPY} differs from {TABLE}, must be its copy"):
        load(write(state, tmp_path, name="model.bin"))


def test_head_counts_that_cannot_be_known_are_asked_for(tmp_path):
    model = tiny_vilbert()
    file = write(as_public(model), tmp_path, name="model.bin")
    message = "does not tell num_attention_heads, v_num_attention_heads, bi_num_attention_heads; pass config="
    with pytest.raises(ValueError, match=message):
        load(file)
    assert_same_model(load(file, config=model.config), model)
    (tmp_path / "sizes.json").write_text(json.dumps(model.config.to_dict()))
    assert_same_model(load(file, config=tmp_path / "sizes.json"), model)


def test_fields_that_no_code_reads_are_accepted_and_others_refused(tmp_path):
    model = tiny_vilbert(heads=("pretraining",))
    public = {**model.config.to_dict(), "pooling_method": "mul", "bi_intermediate_size": 1024, "bi_attention_type": 1}
    for name in ("heads", "vqa_labels", "gqa_labels", "vqa_activation", "co_attention_scale"):
        del public[name]
    file = write(as_public(model), tmp_path, public)
    assert load(file).config.hidden_size == 32
    write(as_public(model), tmp_path, {**public, "predict_feature": True})
    assert load(file).config.visual_target == 1
    for wrong, message in (({"layers": 3}, "has unknown fields layers"), ({"model_type": "bert"}, "another model"),
                           ({"intra_gate": True}, "another model"), ({"num_hidden_layers": 10**9}, "blocks"),
                           ({"hidden_size": 64}, "must be torch.float32"), ({"hidden_act": 3}, "hidden_act is 3"),
                           ({"t_biattention_id": 3}, "wrong type"), ({"vocab_size": 10**15}, "must be|absurd")):
        write(as_public(model), tmp_path, {**public, **wrong})
        with pytest.raises(ValueError, match=message):
            load(file, "vilbert")


def test_damaged_and_hostile_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"bert.encoder.c_layer.0": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.bin", "vilbert")
    with pytest.raises(ValueError, match="not a ViLBERT checkpoint: bert.embeddings.word_embeddings.weight is missing"):
        load(write({"a": torch.zeros(1)}, tmp_path, name="other.bin"), "vilbert")
    state = as_public(tiny_vilbert(vqa_activation="relu"))
    state["vil_prediction.main.0.weight_v"] = state.pop("vil_prediction.main.0.weight")
    with pytest.raises(ValueError, match="vil_prediction.main.0.weight_g is missing"):
        load(write(state, tmp_path, name="half.bin"), "vilbert")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "absent.bin", "vilbert")
    with pytest.raises(ValueError, match="image_size and quick_gelu belong to CLIP"):
        load(tmp_path / "half.bin", "vilbert", image_size=224)


def test_loaded_model_trains(tmp_path):
    model = perturb(ViLBERT(ViLBERTConfig(**{**tiny_vilbert().config.to_dict()})), 0.1)
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path).train()
    loaded(**inputs(loaded)).logits["vqa"].sum().backward()
    assert loaded.bert.v_embeddings.image_embeddings.weight.grad.abs().sum() > 0
