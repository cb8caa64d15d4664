"""VL-BERT against the reference numbers and its own contract."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models.single_stream_helpers import (
    BAD_INPUTS,
    BAD_SETTINGS,
    SIZES,
    assert_attention_maps,
    assert_near,
    assert_one_text_serves_all_images,
    assert_packs,
    assert_padding_is_not_read,
    golden_model,
    inputs,
    tiny,
    with_lengths,
    without_gradient,
)

from vlmfast import models
from vlmfast.data.region_boxes import vl_bert_boxes
from vlmfast.models import VLBERT, VLBERTConfig
from vlmfast.models.vlbert import ObjectFeatures
from vlmfast.objectives import bert_like as losses


def boxes(given):
    return torch.stack([vl_bert_boxes(box, *size[:2].tolist())
                        for box, size in zip(given["boxes"], given["image_info"], strict=True)])


@pytest.mark.parametrize("from_objects", [False, True], ids=["boxes", "objects"])
@pytest.mark.parametrize("case", ["pretrain_init", "pretrain_std03", "vqa_std03"])
def test_matches_reference(golden, monkeypatch, case, from_objects):
    weights, given, truth, metadata = golden(f"bert_like/vlbert__{case}")
    config = metadata["config"]
    atol = float(metadata["atol"]) if from_objects else 2e-5  # sines of up to 100 before that
    heads = "pretraining" if case.startswith("pretrain") else "vqa"
    weights = {key.replace("final_mlp", "vqa_mlp"): value for key, value in weights.items()
               if not key.endswith("decoder.weight")}
    model = golden_model("vlbert", weights, config["NETWORK"]["VLBERT"], heads=(heads,), text_only=False, vqa_labels=15,
                         coord_dim=config["coord_dim"], image_feat_dim=config["image_feat_dim"])
    ids = given["input_ids"] if heads == "pretraining" else truth["text_input_ids"]
    text, image, masked = ids > 0, given["image_mask"].bool(), given.get("mvrc_ops")
    objects = model.objects(given["image_feat"], boxes(given), masked)
    if from_objects:
        monkeypatch.setattr(model, "objects", lambda *_: truth["object_reps"])
    with torch.no_grad():
        output = model(ids, given["image_feat"], boxes(given), truth.get("text_token_type_ids"), text, image,
                       image_masked=masked)
    found = {name: getattr(output, name) for name in ("text_hidden", "image_hidden", "pooled")}
    found |= {f"{name}_logits": value for name, value in output.logits.items()}
    found["object_reps"] = objects.detach()
    if heads == "vqa":
        found["loss"] = losses.soft_target_bce(output.logits["vqa"], given["target"])
    else:
        found |= pretraining_losses(output.logits, given)
    assert found.keys() == {name for name in truth if not name.startswith("text_") or name == "text_hidden"}
    keeps = {"text_hidden": text, "mlm_logits": text, "image_hidden": image, "mvrc_logits": image, "object_reps": image}
    for name, value in found.items():
        assert_near(value, truth[name], 2e-5 if name == "object_reps" else atol, name, keeps.get(name, ...))


def pretraining_losses(logits, given) -> dict:
    target = given["mvrc_labels"]
    valid = (target.sum(-1) - 1).abs() < 0.1
    found = {
        "loss_relationship": losses.cross_entropy(logits["relationship"], given["relationship_label"]),
        "loss_mlm": losses.cross_entropy(logits["mlm"], given["masked_lm_labels"]),
        "loss_mvrc": F.cross_entropy(logits["mvrc"][valid], target[valid]),
    }
    return {**found, "loss": sum(found.values())}


def test_box_front_end_matches_reference_at_its_full_size(golden):
    weights, given, truth, metadata = golden("bert_like/vlbert__coordinates_init")
    front = ObjectFeatures(VLBERTConfig(visual_size=16, image_feat_dim=12)).eval()
    front.load_state_dict({key.removeprefix("image_feature_extractor."): value for key, value in weights.items()})
    loc, keep = boxes(given), given["image_mask"].bool()
    found, atol = front.coordinates(loc[0]), float(metadata["atol"])
    assert_near(found, truth["coordinate_embeddings"], atol, "coordinates", keep[0])
    assert_near(front(given["image_feat"], loc), truth["object_reps"], atol, "objects", keep)


def test_presets_have_the_published_sizes():
    for name, millions, width in (("vlbert-base", 109.5, 768), ("vlbert-large", 335.1, 1024)):
        model = models.create(name, device="meta", heads=(), with_pooler=True)
        assert round(sum(value.numel() for value in model.vlbert.parameters()) / 1e6, 1) == millions
        assert model.image_feature_extractor.obj_downsample[1].weight.shape == (width, 4096)
        assert models.create(name, device="meta").available() == ("mlm", "mvrc")


def test_counts_pack_whole_layers():
    assert_packs(tiny("vlbert"), extra=1)


def test_attention_maps_of_all_layers():
    assert_attention_maps(tiny("vlbert"), extra=1)


def test_padding_does_not_reach_what_exists():
    assert_padding_is_not_read(tiny("vlbert"))


def test_one_text_for_all_images_equals_copies():
    assert_one_text_serves_all_images(tiny("vlbert"))


def test_a_new_model_does_not_see_its_image():
    model = VLBERT(VLBERTConfig(**{**SIZES, "image_feat_dim": 20})).eval()
    given = inputs(model)
    assert model.vlbert.visual_ln_text.weight.abs().max() == 0 == model.object_mask_visual_embedding.weight.abs().max()
    other = {**given, "image_feat": torch.randn_like(given["image_feat"])}
    assert torch.equal(model(**given).text_hidden, model(**other).text_hidden)
    seeing = VLBERT(dataclasses.replace(model.config, visual_scale_text_init=1.0)).eval()
    assert not torch.allclose(seeing(**given).text_hidden, seeing(**other).text_hidden)


def test_objects_share_the_position_behind_the_text_and_end_takes_the_next():
    model = tiny("vlbert", heads=())
    given = with_lengths(inputs(model))
    seen = []
    model.vlbert.position_embeddings.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model.vlbert.token_type_embeddings.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(**given)
    for i, tokens in enumerate(given["text_lengths"].tolist()):
        assert seen[0][i].tolist() == [*range(9), *[tokens] * 7, tokens + 1]
    assert (seen[1][:, 9:] == 2).all() and torch.equal(seen[1][:, :9], given["token_type_ids"])
    later = VLBERT(dataclasses.replace(model.config, first_position=2)).eval()
    key = "vlbert.position_embeddings.weight"
    later.load_state_dict({**model.state_dict(), key: model.state_dict()[key].roll(2, 0)})
    assert torch.equal(later(**given).hidden, model(**given).hidden)


def test_words_see_the_object_they_are_about():
    model = tiny("vlbert", heads=("relationship",))
    given = inputs(model)
    plain = model(**given).logits["relationship"]
    tags = torch.zeros(4, 9, dtype=torch.long)
    torch.testing.assert_close(model(**given, text_tags=tags).logits["relationship"], plain)
    tags[:, 3] = 2
    seen = []
    model.vlbert.embedding_LayerNorm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    assert not torch.allclose(model(**given, text_tags=tags).logits["relationship"], plain)
    model(**given)
    objects = model.vlbert.visual("text", model.objects(given["image_feat"], given["image_loc"]))
    torch.testing.assert_close((seen[0] - seen[1])[:, 3], objects[:, 2] - objects[:, 0])
    assert (seen[0] - seen[1]).abs().amax((0, 2)).nonzero().flatten().tolist() == [3]


def test_masked_objects_lose_feature_and_word():
    model = tiny("vlbert", heads=("mvrc",))
    given = inputs(model)
    masked = torch.zeros(4, 7, dtype=torch.bool)
    masked[:, 2] = True
    output = model(**given, image_masked=masked)
    other = {**given, "image_feat": given["image_feat"].index_fill(1, torch.tensor([2]), 5.0)}
    assert torch.equal(model(**other, image_masked=masked).hidden, output.hidden)
    raw = tiny("vlbert", heads=("mvrc",), image_feat_precomputed=False)
    assert not torch.allclose(raw(**other, image_masked=masked).hidden, raw(**given, image_masked=masked).hidden)
    assert not torch.allclose(raw(**given, image_masked=masked).hidden, raw(**given).hidden)
    with pytest.raises(ValueError, match="image_masked: given to a model without the head 'mvrc'"):
        tiny("vlbert", heads=())(**given, image_masked=masked)


def test_text_alone_has_its_own_visual_embedding_and_no_objects():
    model = tiny("vlbert", heads=("mlm",))
    given = inputs(model)
    text = {name: given[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    alone = model(**text)
    counted = model(given["input_ids"], token_type_ids=given["token_type_ids"],
                    text_lengths=given["attention_mask"].sum(1))
    keep = given["attention_mask"].bool()
    assert_near(counted.text_hidden, alone.text_hidden, 2e-5, "text", keep)
    assert alone.image_hidden.shape == (4, 0, 32) and alone.logits["mlm"].shape == (4, 9, 97)
    with torch.no_grad():
        model.aux_text_visual_embedding.weight.add_(torch.randn(1, 32))
    assert not torch.allclose(model(**text).text_hidden, alone.text_hidden)
    with pytest.raises(ValueError, match="image_feat: is None, must be given to a model without text_only"):
        tiny("vlbert", text_only=False)(**text)


def test_visual_scales_replace_the_layer_norms_and_leave_inputs_alone():
    model = tiny("vlbert", visual_ln=False, visual_size=24)
    assert model.vlbert.visual_scale_text.shape == () and not hasattr(model.vlbert, "visual_ln_text")
    assert model.vlbert.visual_1x1_object.weight.shape == (32, 24)
    given = inputs(model)
    before = {name: value.clone() for name, value in given.items()}
    model(**given)
    assert all(torch.equal(given[name], value) for name, value in before.items())
    x = torch.randn(2, 24)
    torch.testing.assert_close(model.vlbert.visual("text", x),
                               model.vlbert.visual_1x1_text(x) * model.vlbert.visual_scale_text)
    fresh = VLBERT(dataclasses.replace(model.config, visual_scale_text_init=0.25))
    assert fresh.vlbert.visual_scale_text == 0.25 and fresh.vlbert.visual_scale_object == 0


def test_head_shapes():
    model = tiny("vlbert")
    output = model(**inputs(model))
    shapes = {"mlm": (4, 9, 97), "mvrc": (4, 7, 11), "relationship": (4, 2), "vqa": (4, 17), "referring": (4, 7),
              "vcr": (4, 1), "objects": (4, 7, 81), "classifier": (4, 5)}
    assert {name: value.shape for name, value in output.logits.items()} == shapes
    assert (output.logits["referring"][1:, -1] == -10000).all() and output.logits["referring"][0].min() > -1000
    torch.testing.assert_close(output.logits["vqa"][2], model.vqa_mlp(output.text_hidden[2, 5]))
    without = tiny("vlbert", with_pooler=False, heads=("pretraining",))
    assert without.available() == ("mlm", "mvrc") and without(**inputs(without)).pooled is None
    assert tiny("vlbert", heads=("pretraining",)).available() == ("mlm", "mvrc", "relationship")


def test_objects_may_have_a_word_for_each_class():
    model = tiny("vlbert", heads=(), object_word_embed_mode=1)
    given = inputs(model)
    classes = torch.randint(81, (4, 7))
    output = model(**given, object_classes=classes)
    assert not torch.allclose(model(**given, object_classes=(classes + 1) % 81).hidden, output.hidden)
    with pytest.raises(ValueError, match=r"object_classes: must be \[4, 7\] for object_word_embed_mode 1"):
        model(**given)


def test_copies_for_tasks_start_their_heads_from_the_pretraining_heads():
    model = tiny("vlbert", heads=("pretraining",))
    copy = model.adapted(heads=("vqa", "referring", "vcr", "objects"))
    words, regions = model.vlbert.mlm_head["predictions"].transform, model.vlbert.mvrc_head.transform
    assert torch.equal(copy.vqa_mlp[0].LayerNorm.weight, words.LayerNorm.weight)
    assert torch.equal(copy.vqa_mlp[0].dense.weight, words.dense.weight)
    assert torch.equal(copy.referring_mlp[0].dense.bias, regions.dense.bias)
    assert torch.equal(copy.cnn_loss_reg[0].dense.weight, regions.dense.weight)
    given = inputs(model)
    logits = model(**given).logits["relationship"]
    torch.testing.assert_close(copy(**given).logits["vcr"][:, 0], logits[:, 1] - logits[:, 0])


def test_every_parameter_gets_a_gradient():
    model = tiny("vlbert")
    given = inputs(model)
    output = model(**given, image_masked=torch.rand(4, 7) < 0.5)
    loss = sum(value.clamp(min=-100).square().sum() for value in output.logits.values())
    loss = loss + model(given["input_ids"]).text_hidden.square().sum()
    loss.backward()
    assert not without_gradient(model)


@pytest.mark.parametrize("change, message", [
    *BAD_INPUTS,
    (dict(image_loc=torch.rand(4, 7, 7)), r"image_loc: has shape \[4, 7, 7\], must be \[4, 7, 4\]"),
    (dict(image_loc=None), "image_loc: is None, must be given with image_feat"),
    (dict(input_ids=None), "input_ids: is None, must be given"),
    (dict(image_masked=torch.ones(4, 6)), r"image_masked: has shape \[4, 6\], must be \[4, 7\]"),
    (dict(text_tags=torch.ones(4, 8, dtype=torch.long)), r"text_tags: has shape \[4, 8\], must be \[4, 9\]"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change, message):
    model = tiny("vlbert")
    with pytest.raises((TypeError, ValueError), match=message):
        model(**{**inputs(model), **change})


@pytest.mark.parametrize("change, message", [
    *BAD_SETTINGS,
    (dict(object_word_embed_mode=3), "object_word_embed_mode is 3, must be one of"),
    (dict(type_vocab_size=2), "type_vocab_size is 2, must be at least 3"),
    (dict(heads=("vcr",)), "with_pooler is False, must be True for the heads vcr"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        VLBERTConfig(**{**SIZES, **change})
