"""LXMERT against the reference numbers, transformers, and its own contract."""

import dataclasses

import pytest
import torch
from models.two_stream_helpers import (
    LXMERT_SIZES,
    assert_packs,
    assert_same_live,
    inputs,
    perturb,
    tiny_lxmert,
    with_lengths,
)

from vlmfast import models
from vlmfast.layers.streams import Rows
from vlmfast.models import LXMERT, LXMERTConfig
from vlmfast.objectives import bert_like as losses

NAMES = {"mlm": "mlm_logits", "matched": "matched_logits", "obj": "obj_logits", "feat": "feat_logits"}


def golden_model(weights, config, case) -> LXMERT:
    sizes = {name: config[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
                                             "max_position_embeddings", "type_vocab_size", "l_layers", "r_layers",
                                             "x_layers", "visual_feat_dim", "visual_pos_dim")}
    kinds = config["visual_losses"].split(",")
    model = LXMERT(LXMERTConfig(
        **sizes, num_qa_labels=config["num_answers"], num_object_labels=config["obj_id_num"],
        num_attr_labels=config["attr_id_num"], visual_attr_loss="attr" in kinds,
        heads="vqa" if case.startswith("vqa") else "pretraining",
    ))
    ours = {}
    for key, value in weights.items():
        key = key.removeprefix("module.").removeprefix("lxrt_encoder.model.")
        ours[f"answer_head.{key}" if key.startswith("logit_fc") else key] = value
    ours.pop("cls.predictions.decoder.weight", None)
    model.load_state_dict(ours)
    return model.eval()


@pytest.mark.parametrize("case", ["pretrain_init", "pretrain_std03", "vqa_std03"])
def test_matches_reference(golden, case):
    weights, given, truth, metadata = golden(f"bert_like/lxmert__{case}")
    atol = float(metadata["atol"])
    model = golden_model(weights, metadata["config"], case)
    with torch.no_grad():
        output = model(**{name: given[name] for name in ("input_ids", "image_feat", "image_loc", "token_type_ids",
                                                         "attention_mask")})
    found = {NAMES.get(name, name): value for name, value in output.logits.items()}
    found |= {name: getattr(output, name) for name in ("text_hidden", "image_hidden", "pooled")}
    if case.startswith("vqa"):
        found["vqa_logits"] = found.pop("vqa")
        found["loss"] = losses.soft_target_bce(output.logits["vqa"], given["target"])
    else:
        found["answer_logits"] = found.pop("vqa")
        loss = losses.lxmert_pretraining_loss(
            output.logits, given["masked_lm_labels"], given["matched_label"], given["answer_label"],
            obj=(given["obj_label"], given["obj_conf"]), feat=(given["feat_label"], given["feat_conf"]),
            factor=metadata["config"]["visual_loss_weight"],
        )
        found["loss"] = loss.total
        found |= {f"loss_{'answer' if name == 'vqa' else name}": value for name, value in loss.parts.items()}
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        keep = given["attention_mask"].bool() if name in ("text_hidden", "mlm_logits") else ...
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(found[name][keep], value[keep], rtol=0, atol=atol,
                                   msg=lambda text, name=name: f"{name}: {text}")


def test_base_model_has_the_published_size():
    model = models.create("lxmert-base", device="meta")
    assert round(sum(value.numel() for value in model.bert.parameters()) / 1e6, 1) == 207.9
    assert round(sum(value.numel() for value in model.parameters()) / 1e6, 1) == 228.1
    assert [len(part) for part in (model.bert.encoder.layer, model.bert.encoder.r_layers,
                                   model.bert.encoder.x_layers)] == [9, 5, 5]


def test_attention_maps_of_both_directions_in_all_layers():
    model = tiny_lxmert()
    given = inputs(model)
    output = model(**given, output_attentions=True)
    shapes = {"text_attentions": (4, (4, 4, 9, 9)), "image_attentions": (3, (4, 4, 7, 7)),
              "text_to_image": (2, (4, 4, 9, 7)), "image_to_text": (2, (4, 4, 7, 9))}
    for name, (count, shape) in shapes.items():
        maps = getattr(output, name)
        assert len(maps) == count and all(probs.shape == shape for probs in maps), name
        keys = given["attention_mask" if name in ("text_attentions", "image_to_text") else "image_mask"]
        for probs in maps:
            torch.testing.assert_close(probs.sum(-1), torch.ones(shape[:-1]))
            assert (probs * (1 - keys)[:, None, None]).abs().max() == 0
    assert model(**given).image_to_text is None


def test_both_directions_share_weights_and_read_the_old_states():
    layer = tiny_lxmert().bert.encoder.x_layers[0]
    text, image = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    new_text, new_image, *_ = layer.visual_attention(text, image, Rows(), Rows())
    swapped_image, swapped_text, *_ = layer.visual_attention(image, text, Rows(), Rows())
    torch.testing.assert_close(new_text, swapped_text)
    torch.testing.assert_close(new_image, swapped_image)


def test_lengths_equal_masks():
    model = tiny_lxmert()
    given = inputs(model)
    assert_same_live(model(**with_lengths(given)), model(**given), given, atol=2e-5)


def test_counts_pack_whole_layers():
    assert_packs(tiny_lxmert())


def test_padding_does_not_reach_what_exists():
    model = tiny_lxmert()
    given = inputs(model)
    changed = {**given, "image_feat": given["image_feat"] + 9 * (1 - given["image_mask"])[..., None]}
    assert_same_live(model(**changed), model(**given), given, atol=0)
    changed = with_lengths(changed)
    changed["image_feat"][1, -1] = float("nan")
    assert_same_live(model(**changed), model(**with_lengths(given)), given, atol=2e-6)


def test_one_text_for_all_images_equals_copies():
    model = tiny_lxmert()
    given = inputs(model)
    one = {name: value if name.startswith("image") else value[1:2] for name, value in given.items()}
    copies = {name: value if name.startswith("image") else value[1:2].expand(4, -1) for name, value in given.items()}
    assert_same_live(model(**one), model(**copies), copies, atol=2e-5)
    assert_same_live(model(**with_lengths(one)), model(**copies), copies, atol=2e-5)


def test_answer_head_may_read_two_images():
    model = tiny_lxmert(heads="vqa", images_per_answer=2, num_qa_labels=2)
    given = inputs(model)
    output = model(**given)
    pairs = torch.cat([output.pooled[0::2], output.pooled[1::2]], dim=1)
    torch.testing.assert_close(output.logits["vqa"], model.answer_head(pairs))
    with pytest.raises(ValueError, match="image_feat: has 3 rows, must be a multiple of images_per_answer, 2"):
        model(**inputs(model, batch=3))


def test_heads_are_computed_on_request():
    model = tiny_lxmert(visual_attr_loss=False)
    given = inputs(model)
    assert list(model(**given).logits) == ["mlm", "matched", "obj", "feat", "vqa"]
    assert list(model(**given, heads=("vqa", "obj")).logits) == ["obj", "vqa"]
    with pytest.raises(ValueError, match="heads: has 'attr', this model has mlm, matched, obj, feat, vqa"):
        model(**given, heads=("attr",))
    assert tiny_lxmert(heads="none")(**given).logits == {}
    assert tiny_lxmert(task_obj_predict=False, task_qa=False).available() == ("mlm", "matched")


def test_every_parameter_gets_a_gradient_and_first_table_rows_none():
    model = tiny_lxmert()
    given = inputs(model)
    sum(value.square().sum() for value in model(**given).logits.values()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert not [name for name, grad in gradients.items() if grad is None or not grad.abs().sum() > 0]
    embeddings = model.bert.embeddings
    assert embeddings.position_embeddings.weight.grad[0].abs().sum() == 0
    assert embeddings.token_type_embeddings.weight.grad[0].abs().sum() == 0
    assert embeddings.position_embeddings.weight.grad[1].abs().sum() > 0


def test_training_mode_drops_and_is_reproducible():
    model = tiny_lxmert().train()
    given = inputs(model)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(**given).text_hidden)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("change, message", [
    (dict(input_ids=torch.rand(4, 9)), "input_ids: is torch.float32, must be integers"),
    (dict(image_loc=torch.rand(4, 7, 5)), r"image_loc: has shape \[4, 7, 5\], must be \[4, 7, 4\]"),
    (dict(image_mask=torch.ones(4, 6)), r"image_mask: has shape \[4, 6\], must be \[4, 7\]"),
])
def test_bad_input_is_named(change, message):
    model = tiny_lxmert()
    with pytest.raises((TypeError, ValueError), match=message):
        model(**{**inputs(model), **change})


@pytest.mark.parametrize("change, message", [
    (dict(hidden_size=33), "num_attention_heads is 4, must be a divisor of hidden_size, 33"),
    (dict(x_layers=-1), "x_layers is -1, must be an integer of at least 0"),
    (dict(heads="answer"), "heads is 'answer', must be one of"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LXMERTConfig(**{**LXMERT_SIZES, **change})


@pytest.mark.oracle
@pytest.mark.parametrize("std, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
def test_matches_transformers(std, atol):
    transformers = pytest.importorskip("transformers")
    names = {field.name for field in dataclasses.fields(LXMERTConfig)} - {"heads", "images_per_answer"}
    config = LXMERTConfig(**LXMERT_SIZES, visual_loss_normalizer=6.67)
    theirs = transformers.LxmertForPreTraining(transformers.LxmertConfig(
        **{name: value for name, value in config.to_dict().items() if name in names}
    ))
    perturb(theirs, std)
    model = LXMERT(config).eval()
    state = {key.replace("lxmert.", "bert.", 1) if key.startswith("lxmert.") else key: value
             for key, value in theirs.state_dict().items() if key != "cls.predictions.decoder.weight"}
    model.load_state_dict(state)
    given = inputs(model)
    text = given["attention_mask"].bool()
    words = torch.where(text & (torch.rand(4, 9) < 0.5), given["input_ids"], -100)
    labels = dict(matched_label=torch.tensor([1, 0, 1, 1]))
    confidence = torch.rand(4, 7)
    regions = dict(obj=(torch.randint(13, (4, 7)), confidence), attr=(torch.randint(7, (4, 7)), confidence),
                   feat=(torch.randn(4, 7, 20), (confidence > 0.5).float()))
    answers = torch.tensor([3, -100, 0, 8])
    ours = model(**given, output_attentions=True)
    arguments = dict(input_ids=given["input_ids"], visual_feats=given["image_feat"], visual_pos=given["image_loc"],
                     attention_mask=given["attention_mask"], visual_attention_mask=given["image_mask"],
                     token_type_ids=given["token_type_ids"])
    truth = theirs(**arguments, output_attentions=True, labels=words, obj_labels=regions, ans=answers, **labels)
    trunk = theirs.lxmert(**arguments)

    def same(found, expected, keep=...):
        torch.testing.assert_close(found[keep], expected[keep], rtol=0, atol=atol)

    same(ours.text_hidden, trunk.language_output, text)
    same(ours.image_hidden, trunk.vision_output, given["image_mask"].bool())
    same(ours.pooled, trunk.pooled_output)
    same(ours.logits["mlm"], truth.prediction_logits, text)
    same(ours.logits["matched"], truth.cross_relationship_score)
    same(ours.logits["vqa"], truth.question_answering_score)
    for found, expected in ((ours.text_attentions, truth.language_attentions),
                            (ours.image_attentions, truth.vision_attentions)):
        assert len(found) >= len(expected) > 0
        for mine, hers in zip(found, expected, strict=False):
            same(mine, hers)
    for mine, hers in zip(ours.text_to_image, truth.cross_encoder_attentions, strict=True):
        same(mine, hers)
    loss = losses.lxmert_pretraining_loss(ours.logits, words, labels["matched_label"], answers, **regions,
                                          factor=config.visual_loss_normalizer)
    torch.testing.assert_close(loss.total, truth.loss, rtol=2e-6, atol=atol)
