"""UNITER against the reference numbers and its own contract."""

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
from vlmfast.models import UNITERConfig
from vlmfast.objectives import bert_like as losses

HEADS = {"pretrain": ("pretraining",), "vqa": ("vqa",), "referring": ("referring",)}


@pytest.mark.parametrize("case", ["pretrain_init", "pretrain_std03", "vqa_std03", "referring_init"])
def test_matches_reference(golden, case):
    weights, given, truth, metadata = golden(f"bert_like/uniter__{case}")
    atol, config = float(metadata["atol"]), metadata["config"]
    weights = {key: value for key, value in weights.items()
               if key not in ("cls.predictions.decoder.weight", "feat_regress.weight")}
    model = golden_model("uniter", weights, config, heads=HEADS[case.split("_")[0]],
                         vqa_labels=config.get("num_answer", 1))
    text, image = given["text_mask"].bool(), given["image_mask"].bool()
    arguments = dict(input_ids=given["input_ids"], image_feat=given["image_feat"], image_loc=given["image_loc"],
                     attention_mask=given["text_mask"], image_mask=given["image_mask"])
    with torch.no_grad():
        output = model(**arguments)
    found = {name: getattr(output, name) for name in ("text_hidden", "image_hidden", "pooled")}
    if case.startswith("pretrain"):
        found |= pretraining(model, arguments, output, given)
    elif case.startswith("vqa"):
        found["vqa_logits"] = output.logits["vqa"]
        found["loss"] = losses.soft_target_bce(output.logits["vqa"], given["target"])
    else:
        found["re_scores"] = output.logits["referring"]
        assert (output.logits["referring"][~image] == -1e4).all()
        found["loss"] = F.cross_entropy(output.logits["referring"], given["target"], reduction="none")
    assert found.keys() == truth.keys() - {"hidden"}
    keeps = {"text_hidden": text, "image_hidden": image, "re_scores": image}
    for name, value in found.items():
        assert_near(value, truth[name], atol, name, keeps.get(name, ...))
    if "hidden" in truth:  # the authors' layout: padding at the end of each row
        both = output.hidden.gather(1, given["gather_index"][..., None].expand(-1, -1, output.hidden.shape[-1]))
        assert_near(both, truth["hidden"], atol, "hidden", given["attention_mask"].bool())


def pretraining(model, arguments, output, given) -> dict:
    masked, words = given["image_masked"], given["masked_lm_labels"]
    with torch.no_grad():
        spoken = model(**{**arguments, "input_ids": given["masked_input_ids"]}).logits["mlm"]
        # features of masked regions need not be zeroed: the mask embedding stands in their place
        seen = model(**arguments, image_masked=masked, heads=("mrfr", "mrc")).logits
        zeroed = model(**{**arguments, "image_feat": given["masked_image_feat"]}, image_masked=masked).logits
    for name in seen:
        assert torch.equal(seen[name], zeroed[name])
    best = given["label_targets"][:, 1:].argmax(-1) + 1
    found = {"mlm_logits": spoken[words >= 0], "mrfr_pred": seen["mrfr"][masked], "mrc_logits": seen["mrc"][masked],
             "itm_logits": output.logits["itm"], "loss_mlm": losses.cross_entropy(spoken, words),
             "loss_itm": losses.cross_entropy(output.logits["itm"], given["itm_labels"])}
    found["loss_mlm_each"] = F.cross_entropy(found["mlm_logits"], words[words >= 0], reduction="none")
    found["loss_itm_each"] = F.cross_entropy(found["itm_logits"], given["itm_labels"], reduction="none")
    found["loss_mrc_each"] = F.cross_entropy(found["mrc_logits"], best, reduction="none")
    found["loss_mrc"] = found["loss_mrc_each"].mean()
    found["loss_mrfr"] = F.mse_loss(found["mrfr_pred"], given["feat_targets"])
    return found


def test_presets_have_the_published_sizes():
    for name, trunk, whole in (("uniter-base", 109.9, 112.9), ("uniter-large", 335.7, 340.5)):
        model = models.create(name, device="meta")
        assert round(sum(value.numel() for value in model.uniter.parameters()) / 1e6, 1) == trunk
        assert round(sum(value.numel() for value in model.parameters()) / 1e6, 1) == whole
        assert model.word_table.shape[0] == 28996 and model.available() == ("mlm", "mrfr", "mrc", "itm")


def test_counts_pack_whole_layers():
    assert_packs(tiny("uniter"))


def test_attention_maps_of_all_layers():
    assert_attention_maps(tiny("uniter"))


def test_padding_does_not_reach_what_exists():
    assert_padding_is_not_read(tiny("uniter"))


def test_one_text_for_all_images_equals_copies():
    assert_one_text_serves_all_images(tiny("uniter"))


def test_trunk_takes_text_alone_and_images_alone():
    model = tiny("uniter", heads=())
    given = with_lengths(inputs(model))
    none = torch.zeros(4, dtype=torch.long)
    text = model(given["input_ids"], token_type_ids=given["token_type_ids"], text_lengths=given["text_lengths"])
    without = model(**{**given, "num_regions": none})
    assert text.image_hidden.shape == (4, 0, 32)
    assert_near(text.text_hidden, without.text_hidden, 2e-5, "text")
    image = model(None, given["image_feat"], given["image_loc"], num_regions=given["num_regions"])
    without = model(**{**given, "text_lengths": none})
    assert image.text_hidden.shape == (4, 0, 32)
    assert_near(image.image_hidden, without.image_hidden, 2e-5, "image")
    assert torch.isfinite(image.pooled).all()
    with pytest.raises(ValueError, match="input_ids: is None like image_feat, at least one must be given"):
        model(None)
    with pytest.raises(ValueError, match="input_ids: is None, must be given with attention_mask or text_lengths"):
        model(None, given["image_feat"], given["image_loc"], text_lengths=none)


def test_regions_have_segment_one_and_a_masked_one_is_the_mask_embedding():
    model = tiny("uniter", heads=("itm",))
    given = inputs(model)
    plain = model(**given).logits["itm"]
    ones = torch.ones(4, 7, dtype=torch.long)
    assert torch.equal(model(**given, image_type_ids=ones).logits["itm"], plain)
    assert not torch.allclose(model(**given, image_type_ids=ones + 1).logits["itm"], plain)
    masked = torch.rand(4, 7) < 0.5
    replaced = torch.where(masked[..., None], model.uniter.img_embeddings.mask_embedding.weight[1], given["image_feat"])
    truth = model(**{**given, "image_feat": replaced}).logits["itm"]
    assert_near(model(**given, image_masked=masked).logits["itm"], truth, 0, "itm")


def test_paired_attention_reads_the_other_image():
    model = tiny("uniter", heads=("nlvr2",))
    given = inputs(model)
    output = model(**given)
    keep = torch.cat([given["attention_mask"], given["image_mask"]], dim=1).bool()

    def side(module, k, other):
        x, y = output.hidden[k][keep[k]], output.hidden[other][keep[other]]
        truth = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
        truth.load_state_dict(module.state_dict())
        read = truth(x[None], y[None], y[None], need_weights=False)[0][0]
        new = F.relu(F.linear(torch.cat([read, x], -1), model.fc[0].weight, model.fc[0].bias))
        return F.relu(new @ model.attn_pool.fc[0].weight[0] + model.attn_pool.fc[0].bias).softmax(0) @ new

    truth = torch.stack([torch.cat([side(model.attn1, k, k + 1), side(model.attn2, k + 1, k)]) for k in (0, 2)])
    assert_near(output.logits["nlvr2"], model.nlvr2_output(truth), 2e-5, "nlvr2")
    assert_near(model(**with_lengths(given)).logits["nlvr2"], model.nlvr2_output(truth), 2e-5, "nlvr2")
    odd = inputs(model, batch=3)
    assert model(**odd).logits == {}
    with pytest.raises(ValueError, match="input_ids: has 3 rows, must be a multiple of images per statement, 2"):
        model(**odd, heads=("nlvr2",))


def test_other_nlvr2_layouts_read_pooled_vectors():
    given = inputs(tiny("uniter"))
    model = tiny("uniter", heads=("nlvr2",), nlvr2="paired")
    output = model(**given)
    pairs = torch.cat([output.pooled[0::2], output.pooled[1::2]], dim=1)
    torch.testing.assert_close(output.logits["nlvr2"], model.nlvr2_output(pairs))
    model = tiny("uniter", heads=("nlvr2",), nlvr2="triplet")
    output = model(**given)
    torch.testing.assert_close(output.logits["nlvr2"], model.nlvr2_output(output.pooled))
    assert not hasattr(model, "attn1")


def test_head_shapes_and_activations():
    model = tiny("uniter", mlp=2)
    output = model(**inputs(model))
    shapes = {"mlm": (4, 9, 97), "mrfr": (4, 7, 20), "mrc": (4, 7, 11), "itm": (4, 2), "rank": (4, 1), "vqa": (4, 17),
              "ve": (4, 3), "vcr": (4, 2), "nlvr2": (2, 2), "referring": (4, 7), "classifier": (4, 5)}
    assert {name: value.shape for name, value in output.logits.items()} == shapes
    assert isinstance(model.vcr_output[1], torch.nn.ReLU) and isinstance(model.ve_output[1], torch.nn.GELU)
    assert [tuple(model.re_output[i].weight.shape) for i in (0, 2, 3)] == [(32, 32), (32,), (1, 32)]


def test_copies_for_tasks_grow_tables_and_inherit_the_matching_head():
    model = tiny("uniter", heads=("pretraining",), type_vocab_size=2)
    given = inputs(model)
    rank = model.adapted(heads=("rank",))
    torch.testing.assert_close(rank(**given).logits["rank"][:, 0], model(**given).logits["itm"][:, 1])
    nlvr2, vcr = model.adapted(heads=("nlvr2",), new_types=(1,)), model.adapted(new_types=(0, 0), new_words=81)
    old = model.uniter.embeddings.token_type_embeddings.weight
    assert torch.equal(nlvr2.uniter.embeddings.token_type_embeddings.weight, old[[0, 1, 1]])
    assert torch.equal(vcr.uniter.embeddings.token_type_embeddings.weight, old[[0, 1, 0, 0]])
    assert vcr.config.vocab_size == 178 and torch.equal(vcr.word_table[:97], model.word_table)
    assert torch.equal(vcr.cls.predictions.bias[:97], model.cls.predictions.bias)
    assert vcr.word_table[97:].abs().max() > 0
    assert torch.equal(vcr(**given).logits["itm"], model(**given).logits["itm"])


def test_every_parameter_gets_a_gradient_and_padding_ids_none():
    model = tiny("uniter")
    given = inputs(model)
    given["input_ids"][:, 1] = 0
    output = model(**given, image_masked=torch.rand(4, 7) < 0.5)
    assert output.logits.keys() == set(model.available())
    sum(value.clamp(min=-100).square().sum() for value in output.logits.values()).backward()
    assert not without_gradient(model)
    assert model.uniter.img_embeddings.mask_embedding.weight.grad[0].abs().sum() == 0
    trunk = tiny("uniter", heads=())
    trunk(**given).text_hidden.square().sum().backward()
    assert trunk.word_table.grad[0].abs().sum() == 0


@pytest.mark.parametrize("change, message", [
    *BAD_INPUTS,
    (dict(image_loc=torch.rand(4, 7, 5)), r"image_loc: has shape \[4, 7, 5\], must be \[4, 7, 7\]"),
    (dict(image_loc=None), "image_loc: is None, must be given with image_feat"),
    (dict(image_masked=torch.ones(4, 6)), r"image_masked: has shape \[4, 6\], must be \[4, 7\]"),
    (dict(image_type_ids=torch.ones(3, 7, dtype=torch.long)), r"image_type_ids: has shape \[3, 7\], must be \[4, 7\]"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change, message):
    model = tiny("uniter")
    with pytest.raises((TypeError, ValueError), match=message):
        model(**{**inputs(model), **change})


@pytest.mark.parametrize("change, message", [
    *BAD_SETTINGS,
    (dict(nlvr2="pair"), "nlvr2 is 'pair', must be one of"),
    (dict(mlp=3), "mlp is 3, must be one of"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        UNITERConfig(**{**SIZES, **change})


def test_pretraining_stands_for_its_four_heads():
    config = UNITERConfig(**SIZES, heads=("vqa", "pretraining", "itm"))
    assert config.heads == ("mlm", "mrfr", "mrc", "itm", "vqa")
    assert UNITERConfig.from_dict(config.to_dict()) == config
