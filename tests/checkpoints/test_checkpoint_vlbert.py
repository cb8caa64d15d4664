"""VL-BERT files: the reference layout, fine-tuned names, what is left out, strictness, saving."""

import dataclasses

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.single_stream_helpers import SIZES, assert_near, inputs, tiny

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.data.region_boxes import vl_bert_boxes
from vlmfast.models import VLBERTConfig

COPY, TABLE = "vlbert.mlm_head.predictions.decoder.weight", "vlbert.word_embeddings.weight"
FEATURE = "object_mask_visual_embedding.weight"
CASES = {"pretrain_init": ("mlm", "mvrc", "relationship"), "pretrain_std03": ("mlm", "mvrc", "relationship"),
         "vqa_std03": ("vqa",)}


def sized(**overrides):
    """64 channels a head and 256 coordinate frequencies as in the public models: nothing needs a config file."""
    return tiny("vlbert", **{**dict(hidden_size=64, num_attention_heads=1, coord_dim=256), **overrides})


def as_public(model, task="final_mlp") -> dict:
    state = {}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        state[f"{task}.{rest}" if part in ("vqa_mlp", "referring_mlp", "vcr_mlp") else key] = value
    if "mlm" in model.config.heads:
        state[COPY] = state[TABLE]
    return state


@pytest.mark.parametrize("case", CASES)
def test_reference_weights_load(golden, tmp_path, case):
    weights, given, truth, metadata = golden(f"bert_like/vlbert__{case}")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "vl-bert.model")
    assert detect_format(tmp_path / "vl-bert.model") == "vlbert"
    model = vlmfast.load(tmp_path / "vl-bert.model", config=metadata["config"])
    assert model.config.heads == CASES[case] and not model.config.text_only and model.config.coord_dim == 8
    assert len(model.state_dict()) + (COPY in weights) == len(weights)
    loc = torch.stack([vl_bert_boxes(box, *size[:2].tolist())
                       for box, size in zip(given["boxes"], given["image_info"], strict=True)])
    ids = given["input_ids"] if "input_ids" in given else truth["text_input_ids"]
    with torch.no_grad():
        output = model(ids, given["image_feat"], loc, truth.get("text_token_type_ids"), ids > 0, given["image_mask"],
                       image_masked=given.get("mvrc_ops"))
    assert_near(output.pooled, truth["pooled"], 2e-5, "pooled")
    name = "vqa" if "vqa" in CASES[case] else "relationship"
    assert_near(output.logits[name], truth[f"{name}_logits"], 2e-5, name)


@pytest.mark.parametrize("fields", [
    dict(heads=("pretraining",)), dict(heads=("pretraining",), with_pooler=False),
    dict(heads=("pretraining",), image_feat_precomputed=False, image_feat_dim=20), dict(heads=("vqa",)),
    dict(heads=("referring",), with_pooler=False), dict(heads=("vcr", "objects")),
    dict(heads=("vcr",), object_word_embed_mode=1), dict(heads=("vqa", "referring")), dict(heads=()),
    dict(heads=("mlm",), text_only=False), dict(heads=("vqa",), visual_ln=False), dict(heads=("mlm",), visual_size=24),
    dict(heads=("classifier",), classifier_images=2, first_position=2),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = tiny("vlbert", **fields).to(dtype)
    assert save_pretrained(model, tmp_path) == "vlbert"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert detect_format(tmp_path) == "vlbert"
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path / "pytorch_model.bin", "vlbert")):
        assert_same_model(loaded, model)


@pytest.mark.parametrize("fields", [
    dict(heads=("pretraining",)), dict(heads=("pretraining",), with_pooler=False), dict(heads=("vqa",)),
    dict(heads=("referring",)), dict(heads=("vcr",)), dict(heads=("vcr", "objects"), text_only=False),
    dict(heads=("pretraining",), image_feat_precomputed=False),
], ids=str)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_sizes_and_heads_are_read_off_the_tensors(tmp_path, fields, prefix):
    features = {"image_feat_dim": 24}
    model = sized(**{**features, **fields})
    state = as_public(model)
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "vl-bert.model")
    config = None if FEATURE in state else features | {"coord_dim": 256}
    loaded = load(tmp_path / "vl-bert.model", config=config)
    scales = ("visual_scale_text_init", "vqa_labels", "visual_region_classes", "classifier_labels",
              "image_feat_precomputed")
    free = {name: getattr(loaded.config, name) for name in scales if name not in fields}
    model.config = dataclasses.replace(model.config, **free)
    assert_same_model(loaded, model)


def test_public_width_needs_no_settings(tmp_path):
    model = sized(heads=("vqa",), image_feat_dim=2048)
    torch.save(as_public(model), tmp_path / "vl-bert.model")
    loaded = load(tmp_path / "vl-bert.model")
    assert (loaded.config.image_feat_dim, loaded.config.coord_dim) == (2048, 256)


def test_a_mask_embedding_tells_the_width_of_features_from_that_of_coordinates(tmp_path):
    model = sized(heads=("mvrc",), image_feat_dim=24, coord_dim=8)
    torch.save(as_public(model), tmp_path / "vl-bert.model")
    loaded = load(tmp_path / "vl-bert.model")
    assert (loaded.config.image_feat_dim, loaded.config.coord_dim) == (24, 8)


def test_the_cnn_and_unread_mask_embeddings_are_left_out(tmp_path):
    model = sized(heads=("vcr",), image_feat_dim=2048)
    state = {key.replace("vlbert.", "vlbert._module.", 1) if key.startswith("vlbert.") else key: value
             for key, value in as_public(model).items()}
    state |= {f"image_feature_extractor.{name}": torch.zeros(2) for name in
              ("backbone.conv1.weight", "roi_head_feature_extractor.0.conv1.weight", "head.0.0.conv1.weight")}
    state |= {"object_mask_visual_embedding.weight": torch.zeros(1, 2048), "object_mask_word_embedding.weight":
              torch.zeros(1, 64)}
    torch.save(state, tmp_path / "vl-bert.model")
    loaded = load(tmp_path / "vl-bert.model")
    assert loaded.config.heads == ("vcr",)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_saved_names_are_the_public_ones(golden, tmp_path):
    for case in CASES:
        weights, _, _, metadata = golden(f"bert_like/vlbert__{case}")
        torch.save(weights, tmp_path / "weights.model")
        save_pretrained(load(tmp_path / "weights.model", config=metadata["config"]), tmp_path / case)
        saved = torch.load(tmp_path / case / "pytorch_model.bin", weights_only=True)["state_dict"]
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[key], weights[key]) for key in weights)


def test_missing_and_unknown_keys_are_named(tmp_path):
    state = as_public(sized(heads=("mlm",), image_feat_dim=2048))
    del state["vlbert.position_embeddings.weight"]
    torch.save(state, tmp_path / "model.model")
    with pytest.raises(ValueError, match="not a VL-BERT checkpoint: vlbert.position_embeddings.weight is missing"):
        load(tmp_path / "model.model")
    state = as_public(sized(heads=("mlm",), image_feat_dim=2048))
    del state["vlbert.visual_ln_object.bias"]
    torch.save({**state, "vlbert.surprise": torch.zeros(1)}, tmp_path / "model.model")
    with pytest.raises(ValueError, match="missing keys: vlbert.visual_ln_object.bias; unknown keys: vlbert.surprise"):
        load(tmp_path / "model.model")
    with pytest.warns(UserWarning, match="unknown keys: vlbert.surprise"):
        load(tmp_path / "model.model", strict=False)


def test_copy_of_the_word_table_must_be_one(tmp_path):
    state = as_public(sized(heads=("mlm",)))
    torch.save({**state, COPY: state[COPY] + 1}, tmp_path / "model.model")
    with pytest.raises(ValueError, match=f"{COPY} differs from {TABLE}, must be its copy"):
        load(tmp_path / "model.model")


def test_public_settings_are_read_and_unsupported_ones_refused(tmp_path):
    model = tiny("vlbert", heads=("pretraining",), first_position=2)
    torch.save(as_public(model), tmp_path / "model.model")
    network = {**{name: value for name, value in SIZES.items() if name != "vqa_labels"}, "position_padding_idx": 1,
               "obj_pos_id_relative": True, "word_embedding_frozen": False, "from_scratch": False}
    config = {"NETWORK": {"VLBERT": network}, "coord_dim": 8, "image_feat_dim": 20}
    loaded = load(tmp_path / "model.model", config=config)
    assert loaded.config.first_position == 2
    given = inputs(model)
    assert torch.equal(loaded(**given).hidden, model(**given).hidden)
    for wrong, message in (({"obj_pos_id_relative": False}, "obj_pos_id_relative is False, must be True"),
                           ({"word_embedding_frozen": True}, "word_embedding_frozen is True, must be False"),
                           ({"layers": 3}, "has unknown fields layers"), ({"hidden_act": "gelu_new"}, "is 'gelu_new'"),
                           ({"num_hidden_layers": 10**9}, "blocks"), ({"vocab_size": 5}, "must be torch.float32 .5")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "model.model", config={**config, "NETWORK": {"VLBERT": {**network, **wrong}}})


def test_wrong_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"vlbert.end_embedding.weight": Bomb()}, tmp_path / "bomb.model")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.model")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.model")
    with pytest.raises(ValueError, match="not a VL-BERT checkpoint: vlbert.end_embedding.weight is missing"):
        load(tmp_path / "other.model", "vlbert")
    model = tiny("vlbert", heads=("mlm",), coord_dim=256, image_feat_dim=2048)
    torch.save(as_public(model), tmp_path / "narrow.model")
    with pytest.raises(ValueError, match="does not tell num_attention_heads; pass config="):
        load(tmp_path / "narrow.model")
    assert_same_model(load(tmp_path / "narrow.model", config=model.config), model)
    assert VLBERTConfig.from_dict(model.config.to_dict()) == model.config
