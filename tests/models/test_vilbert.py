"""ViLBERT against the reference numbers, and its options against their definitions."""

import dataclasses

import pytest
import torch
from models.two_stream_helpers import (
    VILBERT,
    VILBERT_HEADS,
    assert_packs,
    assert_same_live,
    inputs,
    perturb,
    tiny_vilbert,
    with_lengths,
)

from vlmfast import models
from vlmfast.layers.streams import Rows
from vlmfast.models import ViLBERT, ViLBERTConfig
from vlmfast.objectives import bert_like as losses

CASES = {
    "pretrain_kl_init": {}, "pretrain_kl_std03": {}, "pretrain_mse_std03": {}, "pretrain_nce_std03": {},
    "dynamic_attention_init": {}, "dynamic_attention_std03": {}, "in_batch_pairs_std03": {},
    "tasks_init": {}, "tasks_std03": {}, "task_tokens_std03": {}, "beta_vqa_std03": {"vqa_activation": "relu"},
}
NAMES = {"mlm": "mlm_logits", "image": "image_logits", "nsp": "nsp_logits", "vqa": "vqa_logits", "gqa": "gqa_logits",
         "binary": "binary_logits", "vil": "vil_logit", "tri": "tri_logits", "vision": "vision_logit",
         "linguistic": "linguistic_logit"}


def golden_model(weights, metadata, overrides) -> ViLBERT:
    names = {field.name for field in dataclasses.fields(ViLBERTConfig)}
    config = {name: value for name, value in metadata["config"].items() if name in names}
    found = {key.split(".")[0] for key in weights}
    config["heads"] = tuple(head for prefix, head in VILBERT_HEADS.items() if prefix in found)
    model = ViLBERT(ViLBERTConfig.from_dict({**config, "vqa_labels": 17, "gqa_labels": 9, **overrides}))
    weights = {key: value for key, value in weights.items()
               if "q_dense" not in key and key != "cls.predictions.decoder.weight"}
    for i in (0, 3):
        key = f"vil_prediction.main.{i}.weight"
        if f"{key}_v" in weights:
            value = weights.pop(f"{key}_v")
            weights[key] = weights.pop(f"{key}_g") * value / value.norm()
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_matches_reference(golden, case):
    weights, given, truth, metadata = golden(f"bert_like/vilbert__{case}")
    atol = float(metadata["atol"])
    model = golden_model(weights, metadata, CASES[case])
    with torch.no_grad():
        output = model(**{name: given[name] for name in ("input_ids", "image_feat", "image_loc", "token_type_ids",
                                                         "attention_mask", "image_mask")},
                       task_ids=given.get("task_ids"))
    text, image = given["attention_mask"], given["image_mask"]
    batch = len(text)
    if "task_ids" in given:
        text = torch.cat([torch.ones_like(text[:, :1]), text], dim=1)
    if len(truth["text_hidden"]) == batch**2 > batch:
        text, image = text.repeat_interleave(batch, 0), image.repeat(batch, 1)
    keeps = {"text_hidden": text, "mlm_logits": text, "linguistic_logit": text,
             "image_hidden": image, "image_logits": image, "vision_logit": image}
    found = {NAMES[name]: value for name, value in output.logits.items()}
    found |= {name: getattr(output, name) for name in ("text_hidden", "image_hidden", "pooled_text", "pooled_image")}
    compared = {name: value for name, value in truth.items() if not name.startswith("loss")}
    assert set(compared) <= set(found) and len(compared) >= 7
    for name, value in compared.items():
        keep = keeps[name].bool() if name in keeps else slice(None)
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(found[name][keep], value[keep], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in golden_losses(output.logits, given, metadata["config"]).items():
        torch.testing.assert_close(value, truth[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        truth = {key: value for key, value in truth.items() if key != name}
    assert not [name for name in truth if name.startswith("loss")]


def golden_losses(logits, given, config) -> dict:
    if "masked_lm_labels" in given:
        loss = losses.vilbert_pretraining_loss(
            logits, given["masked_lm_labels"], given["image_label"], given["image_target"],
            given["next_sentence_label"], visual_target=config["visual_target"],
            negative_index=given.get("negative_index"),
        )
        return {"loss_mlm": loss.parts["mlm"], "loss_img": loss.parts["image"], "loss_nsp": loss.parts["nsp"]}
    if "target_vqa" not in given:
        return {}
    return {
        "loss_vqa": losses.soft_target_bce(logits["vqa"], given["target_vqa"]),
        "loss_gqa": losses.soft_target_bce(logits["gqa"], given["target_gqa"]),
        "loss_grounding": losses.soft_target_bce(logits["vision"], given["target_grounding"]),
        "loss_options": losses.cross_entropy(logits["vil"].view(-1, int(given["num_options"])),
                                             given["target_options"]),
        "loss_nlvr2": losses.cross_entropy(logits["binary"], given["target_nlvr2"]),
        "loss_ve": losses.cross_entropy(logits["tri"], given["target_ve"]),
    }


def published_millions(model) -> float:
    """Trunk parameters as published, which counts two unused projections per co layer that we do not build."""
    unused = 1024 * 1024 + 1024 + 1024 * 768 + 768
    trunk = sum(value.numel() for value in model.bert.parameters())
    return round((trunk + unused * len(model.config.v_biattention_id)) / 1e6, 1)


def test_base_model_has_the_published_size_and_plan():
    model = models.create("vilbert-base", device="meta")
    assert published_millions(model) == 246.7
    plan = model.config.plan()
    assert plan[:6] == [("text", i) for i in range(6)]
    assert plan[6:12] == [("co", 0), ("text", 6), ("vision", 0), ("co", 1), ("text", 7), ("vision", 1)]
    assert plan[-2:] == [("vision", 5), ("text", 11)] and len(plan) == 12 + 6 + 6
    multitask = models.create("vilbert-base-multitask", device="meta")
    assert multitask.vil_prediction.logit_fc[3].weight.shape == (3129, 2048)
    assert multitask.vil_prediction_gqa.logit_fc[3].weight.shape == (1533, 2048)
    assert multitask.bert.embeddings.task_embeddings.weight.shape == (20, 768)


@pytest.mark.parametrize("layers, millions", [(2, 157.5), (4, 202.1), (8, 291.4)])
def test_other_public_depths_have_their_published_size(layers, millions):
    model = models.create("vilbert-base", device="meta", v_num_hidden_layers=layers,
                          v_biattention_id=tuple(range(layers)), t_biattention_id=tuple(range(12 - layers, 12)))
    assert published_millions(model) == millions


def test_attention_maps_of_both_directions_in_all_layers():
    model = tiny_vilbert()
    given = inputs(model)
    output = model(**given, output_attentions=True)
    shapes = {"text_attentions": (3, (4, 4, 9, 9)), "image_attentions": (2, (4, 3, 7, 7)),
              "text_to_image": (2, (4, 2, 9, 7)), "image_to_text": (2, (4, 2, 7, 9))}
    for name, (count, shape) in shapes.items():
        maps = getattr(output, name)
        assert len(maps) == count and all(probs.shape == shape for probs in maps), name
        keys = given["attention_mask" if name in ("text_attentions", "image_to_text") else "image_mask"]
        for probs in maps:
            torch.testing.assert_close(probs.sum(-1), torch.ones(shape[:-1]))
            assert (probs * (1 - keys)[:, None, None]).abs().max() == 0
    assert model(**given).text_to_image is None


def test_attention_maps_are_those_the_layer_used():
    model = tiny_vilbert(t_biattention_id=(0,), v_biattention_id=(0,), num_hidden_layers=1, v_num_hidden_layers=1)
    given = inputs(model)
    text = model.bert.embeddings(given["input_ids"], given["token_type_ids"])
    image = model.bert.v_embeddings(given["image_feat"], given["image_loc"])
    layer = model.bert.encoder.c_layer[0].biattention

    def heads(x):
        return x.unflatten(-1, (2, 12)).transpose(1, 2)

    scores = heads(layer.query2(text)) @ heads(layer.key1(image)).mT / 12**0.5
    scores = scores + (1 - given["image_mask"].float())[:, None, None] * -10000
    (probs,) = model(**given, output_attentions=True).text_to_image
    torch.testing.assert_close(probs, scores.softmax(-1))
    scores = heads(layer.query1(image)) @ heads(layer.key2(text)).mT / 12**0.5
    scores = scores + (1 - given["attention_mask"].float())[:, None, None] * -10000
    (probs,) = model(**given, output_attentions=True).image_to_text
    torch.testing.assert_close(probs, scores.softmax(-1))


def test_lengths_equal_masks():
    model = tiny_vilbert()
    given = inputs(model)
    assert_same_live(model(**with_lengths(given)), model(**given), given, atol=2e-5)


def test_task_tokens_and_gates_equal_with_lengths_and_masks():
    for option in ({"task_specific_tokens": True}, {"dynamic_attention": True}):
        model = tiny_vilbert(**option)
        given = inputs(model)
        task = {"task_ids": torch.tensor([1, 2, 3, 19])} if "task_specific_tokens" in option else {}
        found, truth = model(**with_lengths(given), **task), model(**given, **task)
        if task:
            given["attention_mask"] = torch.cat([torch.ones(4, 1), given["attention_mask"]], dim=1)
            assert truth.text_hidden.shape[1] == 10
        assert_same_live(found, truth, given, atol=2e-5)


def test_counts_pack_whole_layers():
    assert_packs(tiny_vilbert())


def test_padding_does_not_reach_what_exists():
    model = tiny_vilbert()
    given = inputs(model)
    changed = dict(given)
    text, image = given["attention_mask"], given["image_mask"]
    changed["input_ids"] = torch.where(text == 1, given["input_ids"], 5)
    changed["image_feat"] = given["image_feat"] + 9 * (1 - image)[..., None]
    assert_same_live(model(**changed), model(**given), given, atol=0)
    changed = with_lengths(changed)
    changed["image_feat"][1, -1] = float("nan")
    assert_same_live(model(**changed), model(**with_lengths(given)), given, atol=2e-6)


def test_masks_with_holes_equal_removed_rows():
    model = tiny_vilbert(heads=("vqa",))
    given = inputs(model, batch=1)
    keep = torch.tensor([0, 1, 3, 4, 6])
    holes = {**given, "attention_mask": None, "image_mask": torch.zeros(1, 7).index_fill(1, keep, 1)}
    fewer = {**given, "attention_mask": None, "image_mask": None, "image_feat": given["image_feat"][:, keep],
             "image_loc": given["image_loc"][:, keep]}
    torch.testing.assert_close(model(**holes).logits["vqa"], model(**fewer).logits["vqa"], rtol=0, atol=2e-5)


def test_fully_masked_text_sees_its_raw_scores():
    model = tiny_vilbert(heads=("vqa",))
    given = inputs(model, batch=1)
    given["image_mask"] = None
    blank = {**given, "attention_mask": torch.zeros(1, 9)}
    plain = {**given, "attention_mask": None}
    # -10000 leaves 12 mantissa bits of a score
    torch.testing.assert_close(model(**blank).pooled_image, model(**plain).pooled_image, rtol=0, atol=5e-2)


def test_in_batch_pairs_equal_explicit_pairs():
    for option in ({}, {"dynamic_attention": True}):
        paired = tiny_vilbert(in_batch_pairs=True, **option)
        model = ViLBERT(dataclasses.replace(paired.config, in_batch_pairs=False)).eval()
        model.load_state_dict(paired.state_dict())
        given = inputs(model, batch=3)
        text, image = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
        explicit = {name: value[image if name.startswith("image") else text] for name, value in given.items()}
        assert_same_live(paired(**given), model(**explicit), explicit, atol=2e-5)
        assert_same_live(paired(**with_lengths(given)), model(**explicit), explicit, atol=2e-5)


def test_one_text_for_all_images_equals_copies():
    model = tiny_vilbert(fast_mode=True)
    given = inputs(model)
    one = {name: value if name.startswith("image") else value[1:2] for name, value in given.items()}
    copies = {name: value if name.startswith("image") else value[1:2].expand(4, -1) for name, value in given.items()}
    assert_same_live(model(**one), model(**copies), copies, atol=2e-5)
    assert_same_live(model(**with_lengths(one)), model(**copies), copies, atol=2e-5)


def test_without_coattention_the_streams_never_meet():
    model = tiny_vilbert(with_coattention=False)
    given = inputs(model)
    output = model(**given, output_attentions=True)
    assert output.text_to_image == ()
    given["image_feat"] = given["image_feat"] + 1
    assert torch.equal(model(**given).text_hidden, output.text_hidden)
    assert not torch.equal(model(**given).image_hidden, output.image_hidden)


def test_fixed_layers_get_no_gradient_and_change_nothing():
    fixed = tiny_vilbert(fixed_t_layer=1, fixed_v_layer=0)
    model = ViLBERT(dataclasses.replace(fixed.config, fixed_t_layer=0)).eval()
    model.load_state_dict(fixed.state_dict())
    given = inputs(model)
    output = fixed(**given)
    torch.testing.assert_close(output.text_hidden, model(**given).text_hidden, rtol=0, atol=0)
    output.text_hidden.square().sum().backward()
    assert all(value.grad is None for value in fixed.bert.encoder.layer[0].parameters())
    assert fixed.bert.embeddings.word_embeddings.weight.grad is None
    assert all(value.grad.abs().max() > 0 for value in fixed.bert.encoder.layer[1].parameters()
               if value.shape[0] != 32 or value.ndim > 1)


def test_co_attention_mask_is_carried_and_left_out_unless_scaled():
    model = tiny_vilbert(heads=("vqa",))
    given = inputs(model)
    mask = torch.randint(2, (4, 7, 9)).float()
    plain = model(**given, output_attentions=True)
    assert torch.equal(model(**given, co_attention_mask=mask).logits["vqa"], plain.logits["vqa"])
    scaled = ViLBERT(dataclasses.replace(model.config, co_attention_scale=5.0)).eval()
    scaled.load_state_dict(model.state_dict())
    output = scaled(**given, co_attention_mask=mask, output_attentions=True)
    # the first co layer sees the same states, so its probabilities are reweighted by exp(5 mask)
    for name, weight in (("text_to_image", mask.transpose(1, 2)), ("image_to_text", mask)):
        expected = getattr(plain, name)[0] * (5 * weight).exp()[:, None]
        found = getattr(output, name)[0]
        torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"co_attention_mask: has shape \[4, 9, 7\], must be \[4, 7, 9\]"):
        model(**given, co_attention_mask=mask.transpose(1, 2))


def test_task_token_has_no_part_in_the_co_attention_mask():
    model = tiny_vilbert(heads=("vqa",), co_attention_scale=5.0, task_specific_tokens=True)
    given = {**inputs(model), "task_ids": torch.arange(4)}
    mask = torch.randint(2, (4, 7, 9)).float()
    mask[:, :, 0] = 1
    plain = model(**given, output_attentions=True).text_to_image[0]
    found = model(**given, co_attention_mask=mask, output_attentions=True).text_to_image[0]
    torch.testing.assert_close(found[:, :, 1], plain[:, :, 1])
    weight = torch.cat([mask[:, :, :1], torch.zeros(4, 7, 1), mask[:, :, 1:]], dim=2).transpose(1, 2)
    expected = plain * (5 * weight).exp()[:, None]
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_each_direction_has_its_own_dropout(packed):
    model = tiny_vilbert(attention_probs_dropout_prob=0.0, v_attention_probs_dropout_prob=0.5)
    layer = model.bert.encoder.c_layer[0].biattention
    rows = Rows(), Rows()
    text, image = torch.randn(1, 9, 32), torch.randn(1, 7, 24)
    if packed:
        rows = tuple(Rows(offsets=torch.tensor([0, n], dtype=torch.int32)) for n in (9, 7))
        text, image = text[0], image[0]
    words, regions, *_ = layer.eval()(text, image, *rows)
    dropped_words, dropped_regions, *_ = layer.train()(text, image, *rows)
    # weights of words over regions drop with the vision probability
    assert torch.equal(dropped_regions, regions) and not torch.allclose(dropped_words, words)


@pytest.mark.parametrize("counts", [False, True])
def test_autocast_runs_forward_and_backward(counts):
    model = tiny_vilbert(std=0.05).train()
    given = inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**(with_lengths(given) if counts else given))
    output.logits["vqa"].float().square().sum().backward()
    assert torch.isfinite(output.logits["vqa"]).all()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


def test_fusion_and_activations_are_separate_settings():
    model = tiny_vilbert(heads=("vil",))
    given = inputs(model)
    output = model(**given)
    torch.testing.assert_close(output.logits["vil"], model.vil_logit(output.pooled_text * output.pooled_image))
    state = model.state_dict()

    def other(**change):
        changed = ViLBERT(dataclasses.replace(model.config, **change)).eval()
        changed.load_state_dict(state)
        return changed(**given)

    torch.testing.assert_close(other(fusion_method="sum").logits["vil"],
                               model.vil_logit(output.pooled_text + output.pooled_image))
    assert not torch.allclose(other(v_hidden_act="relu").image_hidden, output.image_hidden)
    assert not torch.allclose(other(hidden_act="swish").text_hidden, output.text_hidden)
    alone = ViLBERTConfig(**{**VILBERT, "with_coattention": False})
    plain, vision = (perturb(ViLBERT(dataclasses.replace(alone, v_hidden_act=act))) for act in ("gelu", "relu"))
    vision.load_state_dict(plain.state_dict())
    assert torch.equal(plain(**given).text_hidden, vision(**given).text_hidden)


def test_roberta_positions_start_at_two():
    model = tiny_vilbert(model="roberta")
    plain = ViLBERT(dataclasses.replace(model.config, model="bert")).eval()
    state = model.state_dict()
    key = "bert.embeddings.position_embeddings.weight"
    plain.load_state_dict({**state, key: state[key].roll(-2, 0)})
    given = inputs(model)
    assert torch.equal(model(**given).text_hidden, plain(**given).text_hidden)
    with pytest.raises(ValueError, match="input_ids: has 23 tokens, must have at most 22"):
        model(**inputs(model, tokens=23))


def test_heads_are_computed_on_request():
    model = tiny_vilbert()
    given = inputs(model, batch=3)
    assert set(model(**given, heads=("vqa", "nsp")).logits) == {"vqa", "nsp"}
    assert "binary" not in model(**given).logits
    with pytest.raises(ValueError, match="'binary' scores pairs of examples, the batch has 3"):
        model(**given, heads=("binary",))
    with pytest.raises(ValueError, match="heads: has 'vqb', this model has mlm, image, nsp, vqa"):
        model(**given, heads=("vqb",))


def test_training_mode_drops_and_is_reproducible():
    model = tiny_vilbert().train()
    given = inputs(model)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(**given).text_hidden)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_every_parameter_gets_a_gradient_and_padding_ids_none():
    model = tiny_vilbert(dynamic_attention=True, task_specific_tokens=True)
    given = inputs(model)
    given["input_ids"][:, -2:] = 0
    output = model(**given, task_ids=torch.arange(4))
    sum(value.clamp(min=-100).square().sum() for value in output.logits.values()).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert not without
    trunk = tiny_vilbert(heads=())
    trunk(**{**given, "attention_mask": None}).text_hidden.square().sum().backward()
    assert trunk.bert.embeddings.word_embeddings.weight.grad[0].abs().sum() == 0


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 2e-5), (torch.bfloat16, 0.5)])
def test_other_dtypes(dtype, atol):
    model = tiny_vilbert(std=0.05, heads=("vqa",))
    given = inputs(model)
    truth = model(**given).logits["vqa"]
    found = model.to(dtype)(**given).logits["vqa"]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("change, message", [
    (dict(input_ids=torch.rand(4, 9)), "input_ids: is torch.float32, must be integers"),
    (dict(input_ids=torch.ones(3, 9, dtype=torch.long)), "input_ids: has 3 rows, image_feat 4; must be as many"),
    (dict(input_ids=torch.ones(4, 25, dtype=torch.long), attention_mask=None, token_type_ids=None),
     "input_ids: has 25 tokens, must have at most 24"),
    (dict(image_feat=torch.rand(4, 7, 21)), r"image_feat: has shape \[4, 7, 21\], must be \[B, R, 20\]"),
    (dict(image_loc=torch.rand(4, 7, 4)), r"image_loc: has shape \[4, 7, 4\], must be \[4, 7, 5\]"),
    (dict(attention_mask=torch.ones(4, 8)), r"attention_mask: has shape \[4, 8\], must be \[4, 9\]"),
    (dict(image_mask=torch.full((4, 7), -10000.0)), "image_mask: holds values other than 0 and 1"),
    (dict(text_lengths=torch.ones(4, dtype=torch.long)), "text_lengths: given together with attention_mask"),
    (dict(num_regions=torch.tensor([1, 2, 3, 8]), image_mask=None), r"num_regions: runs from 1 to 8, must lie in 0..7"),
    (dict(num_regions=torch.ones(4), image_mask=None), "num_regions: is torch.float32, must be integers"),
    (dict(text_lengths=torch.tensor([1, 2]), attention_mask=None), r"text_lengths: has shape \[2\], must be \[4\]"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change, message):
    model = tiny_vilbert()
    with pytest.raises((TypeError, ValueError), match=message):
        model(**{**inputs(model), **change})


def test_task_tokens_need_a_task():
    model = tiny_vilbert(task_specific_tokens=True)
    with pytest.raises(ValueError, match="task_ids: is None, must be given"):
        model(**inputs(model))


@pytest.mark.parametrize("change, message", [
    (dict(hidden_size=33), "num_attention_heads is 4, must be a divisor of hidden_size, 33"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0, must be an integer of at least 1"),
    (dict(vocab_size=2.0), "vocab_size is 2.0, must be an integer"),
    (dict(hidden_act="tanh"), "hidden_act is 'tanh', must be one of"),
    (dict(t_biattention_id=(2, 1)), "t_biattention_id is .2, 1., must be rising integers in 0..3"),
    (dict(v_biattention_id=(0, 3)), "v_biattention_id is .0, 3., must be rising integers in 0..2"),
    (dict(t_biattention_id=(1,)), "t_biattention_id is .1,., must be as long as v_biattention_id"),
    (dict(fixed_t_layer=2), "t_biattention_id is .1, 2., must be rising integers in 2..3"),
    (dict(heads=("vqa", "ocr")), "heads is .'vqa', 'ocr'., must be a selection"),
    (dict(hidden_dropout_prob=1.0), "hidden_dropout_prob is 1.0, must be less than 1"),
    (dict(dynamic_attention=1), "dynamic_attention is 1, must be True or False"),
    (dict(visual_target=3), "visual_target is 3, must be one of"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ViLBERTConfig(**{**VILBERT, **change})


def test_config_round_trip():
    config = ViLBERTConfig(**VILBERT)
    assert ViLBERTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown fields v_layers"):
        ViLBERTConfig.from_dict({"v_layers": 3})
