"""VisualBERT against the reference numbers, transformers, and its own contract."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models.single_stream_helpers import (
    BAD_INPUTS,
    BAD_SETTINGS,
    KINDS,
    SIZES,
    assert_attention_maps,
    assert_near,
    assert_one_text_serves_all_images,
    assert_packs,
    assert_padding_is_not_read,
    assert_same_live,
    golden_model,
    inputs,
    tiny,
    with_lengths,
    without_gradient,
)
from models.two_stream_helpers import perturb

from vlmfast import models
from vlmfast.models import VisualBERT, VisualBERTConfig
from vlmfast.objectives import bert_like as losses

HEADS = {"pretrain": "pretraining", "vqa": "vqa", "vcr": "vcr"}


def golden_case(weights, config, case):
    head = HEADS[case.split("_")[0]]
    weights = {key.removeprefix("bert.").replace("classifier", f"{head}_classifier"): value
               for key, value in weights.items() if not key.endswith("decoder.weight")}
    return golden_model("visualbert", weights, config, heads=(head,), vqa_labels=config.get("num_answers", 1))


@pytest.mark.parametrize("case", ["pretrain_init", "pretrain_std03", "vqa_std03", "vcr_choice_init"])
def test_matches_reference(golden, case):
    weights, given, truth, metadata = golden(f"bert_like/visualbert__{case}")
    atol = float(metadata["atol"])
    model = golden_case(weights, metadata["config"], case)
    arguments = {name: given[name].flatten(0, given[name].ndim - (4 if name == "image_feat" else 3) + 1)
                 if case.startswith("vcr") else given[name]
                 for name in ("input_ids", "image_feat", "token_type_ids", "attention_mask", "image_mask")}
    with torch.no_grad():
        output = model(**arguments)
    text = arguments["attention_mask"].bool()
    keep = torch.cat([text, arguments["image_mask"].bool()], dim=1)
    found = {"hidden": output.hidden, "pooled": output.pooled}
    if case.startswith("pretrain"):
        words = given["masked_lm_labels"]
        found["mlm_logits"] = model.cls.predictions(output.hidden, model.word_table)
        assert torch.equal(output.logits["mlm"], model.cls.predictions(output.text_hidden, model.word_table))
        found["nsp_logits"] = output.logits["nsp"]
        found["loss_mlm"] = losses.cross_entropy(output.logits["mlm"], words)
        found["loss_nsp"] = losses.cross_entropy(output.logits["nsp"], given["next_sentence_label"])
        found["loss"] = found["loss_mlm"] + found["loss_nsp"]
    elif case.startswith("vqa"):
        found["vqa_logits"] = output.logits["vqa"]
        found["loss"] = F.kl_div(output.logits["vqa"].log_softmax(-1), given["target"], reduction="batchmean")
    else:
        found["choice_logits"] = output.logits["vcr"].view(-1, 4)
        found["loss"] = losses.cross_entropy(found["choice_logits"], given["label"])
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert_near(found[name], value, atol, name, keep if name in ("hidden", "mlm_logits") else ...)


def test_presets_have_the_published_sizes():
    for width, millions in ((512, 110.3), (1024, 110.7), (2048, 111.5)):
        model = models.create("visualbert-base", device="meta", visual_embedding_dim=width)
        assert round(sum(value.numel() for value in model.bert.parameters()) / 1e6, 1) == millions
    expected = {"vqa": (2048, ("vqa",)), "nlvr2": (1024, ("nlvr2",)), "vcr": (512, ("vcr",)),
                "flickr": (2054, ("mlm", "nsp", "flickr"))}
    for name, (width, heads) in expected.items():
        model = models.create(f"visualbert-{name}", device="meta")
        assert model.config.visual_embedding_dim == width and model.available() == heads
    assert models.create("visualbert-vqa", device="meta").vqa_classifier.weight.shape == (3129, 768)


def test_counts_pack_whole_layers():
    assert_packs(tiny("visualbert"))


def test_attention_maps_of_all_layers():
    assert_attention_maps(tiny("visualbert"))


def test_padding_does_not_reach_what_exists():
    assert_padding_is_not_read(tiny("visualbert"))


def test_one_text_for_all_images_equals_copies():
    assert_one_text_serves_all_images(tiny("visualbert"))


def test_text_alone_equals_a_plain_bert_and_an_image_without_regions():
    model = tiny("visualbert", heads=("pretraining",))
    given = inputs(model)
    alone = model(given["input_ids"], token_type_ids=given["token_type_ids"], attention_mask=given["attention_mask"])
    none = model(**{**with_lengths(given), "num_regions": torch.zeros(4, dtype=torch.long)})
    keep = given["attention_mask"].bool()
    assert alone.image_hidden.shape == (4, 0, 32)
    assert_near(none.text_hidden, alone.text_hidden, 2e-5, "text_hidden", keep)
    assert_near(none.logits["nsp"], alone.logits["nsp"], 2e-5, "nsp")


def test_regions_embed_as_segment_plus_first_visual_position_plus_mean_of_their_words():
    model = tiny("visualbert", visual_type=1)
    embeddings = model.bert.embeddings
    feat = torch.randn(1, 3, 20)
    plain = embeddings.projection(feat) + embeddings.token_type_embeddings_visual.weight[1]
    plain = plain + embeddings.position_embeddings_visual.weight[0]
    torch.testing.assert_close(embeddings.regions(feat, None, None), plain)
    words = embeddings.position_embeddings.weight
    alignment = torch.tensor([[[2, 5, -1], [-1, -1, -1], [0, -1, -1], [7, 7, 7]]])  # one row more than regions
    named = plain + torch.stack([(words[2] + words[5]) / 2, torch.zeros(32), words[0]])
    torch.testing.assert_close(embeddings.regions(feat, None, alignment), named)


def test_two_images_in_one_sequence_differ_by_their_segment():
    model = tiny("visualbert", heads=("nlvr2",))
    given = inputs(model)
    types = torch.tensor([0, 0, 0, 1, 1, 1, 1]).expand(4, -1)
    assert torch.equal(model(**given, image_type_ids=torch.zeros_like(types)).logits["nlvr2"],
                       model(**given).logits["nlvr2"])
    assert not torch.allclose(model(**given, image_type_ids=types).logits["nlvr2"], model(**given).logits["nlvr2"])


def test_visual_tables_start_as_copies_of_the_text_tables():
    config = VisualBERTConfig(**{**SIZES, **KINDS["visualbert"][2]})
    for special in (True, False):
        embeddings = VisualBERT(dataclasses.replace(config, special_visual_initialize=special)).bert.embeddings
        for name in ("position_embeddings", "token_type_embeddings"):
            same = torch.equal(getattr(embeddings, name).weight, getattr(embeddings, f"{name}_visual").weight)
            assert same is special


def test_answers_are_read_at_the_token_before_the_last():
    model = tiny("visualbert", heads=("vqa",))
    given = inputs(model)
    output = model(**given)
    expected = torch.stack([output.text_hidden[i, 9 - i - 2] for i in range(4)])
    torch.testing.assert_close(output.logits["vqa"], model.vqa_classifier(expected))
    everything = model(**{**given, "attention_mask": None})
    torch.testing.assert_close(everything.logits["vqa"], model.vqa_classifier(everything.text_hidden[:, 7]))
    with pytest.raises(ValueError, match="input_ids: has 1 tokens, must have at least 2 to be answered"):
        model(given["input_ids"][:, :1], given["image_feat"])


def test_bypass_shows_the_encoder_text_only_and_one_layer_both():
    model = tiny("visualbert", bypass_transformer=True)
    given = inputs(model)
    text = model.bert.embeddings.normalize(model.bert.embeddings.total(given["input_ids"], given["token_type_ids"]))
    image = model.bert.embeddings.normalize(model.bert.embeddings.regions(given["image_feat"], None, None))
    plain = VisualBERT(dataclasses.replace(model.config, bypass_transformer=False)).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "additional_layer" not in key})
    encoded = plain(given["input_ids"], token_type_ids=given["token_type_ids"], attention_mask=given["attention_mask"])
    layer, joint = model.bert.additional_layer, torch.cat([encoded.text_hidden, image], dim=1)
    scores = [part(joint).unflatten(-1, (4, 8)).transpose(1, 2) for part in
              (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)]
    mask = torch.cat([given["attention_mask"], given["image_mask"]], dim=1).bool()[:, None, None]
    context = F.scaled_dot_product_attention(*scores, attn_mask=mask).transpose(1, 2).flatten(-2)
    truth = layer.attention.output(context, joint)
    truth = layer.output(layer.intermediate(truth), truth)
    output = model(**given)
    assert_near(output.hidden, truth, 2e-5, "hidden", mask[:, 0, 0])
    assert_same_live(model(**with_lengths(given)), output, given, atol=2e-5)
    maps = model(**given, output_attentions=True).attentions
    assert [probs.shape[-1] for probs in maps] == [9, 9, 16] and text.shape == (4, 9, 32)
    assert torch.equal(model(given["input_ids"]).text_hidden, plain(given["input_ids"]).text_hidden)


def test_phrases_are_grounded_in_regions():
    model = tiny("visualbert", heads=("pretraining", "flickr"))
    given = inputs(model)
    assert "flickr" not in model(**given).logits
    positions = torch.tensor([[1, 4], [2, -1], [0, 3], [5, 5]])
    output = model(**given, phrase_positions=positions)
    scorer = model.flickr_attention
    assert scorer.query.weight.shape == (8, 32)
    phrase = scorer.query(output.text_hidden[0, 4])
    truth = scorer.key(output.image_hidden[0]) @ phrase / 8**0.5
    torch.testing.assert_close(output.logits["flickr"][0, 1], truth)
    assert output.logits["flickr"].shape == (4, 2, 7) and output.logits["flickr"][3, :, 4:].max() < -9000
    with pytest.raises(ValueError, match=r"phrase_positions: is None, must be \[4, E\] for 'flickr'"):
        model(**given, heads=("flickr",))


def test_general_classifier_reads_what_it_is_told_to():
    model = tiny("visualbert", heads=("classifier",), classifier_pooling="vqa")
    given = inputs(model)
    output = model(**given)
    read = torch.stack([output.text_hidden[i, 9 - i - 2] for i in range(4)])
    torch.testing.assert_close(output.logits["classifier"], model.classifier(read))
    model = tiny("visualbert", heads=("classifier",), classifier_images=2)
    output = model(**given)
    pairs = torch.cat([output.pooled[0::2], output.pooled[1::2]], dim=1)
    torch.testing.assert_close(output.logits["classifier"], model.classifier(pairs))
    odd = inputs(model, batch=3)
    assert model(**odd).logits == {}
    with pytest.raises(ValueError, match="input_ids: has 3 rows, must be a multiple of classifier_images, 2"):
        model(**odd, heads=("classifier",))


def test_every_parameter_gets_a_gradient():
    model = tiny("visualbert", bypass_transformer=True)
    given = inputs(model)
    alignment = torch.randint(9, (4, 7, 2))
    output = model(**given, image_text_alignment=alignment, phrase_positions=torch.ones(4, 2, dtype=torch.long))
    assert output.logits.keys() == set(model.available())
    sum(value.clamp(min=-100).square().sum() for value in output.logits.values()).backward()
    assert not without_gradient(model)


def test_training_mode_drops_and_is_reproducible():
    model = tiny("visualbert").train()
    given = inputs(model)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(**given).text_hidden)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_a_copy_for_another_task_keeps_what_both_have():
    model = tiny("visualbert", heads=("pretraining",))
    copy = model.adapted(heads=("nlvr2",))
    assert not copy.training and copy.available() == ("nlvr2",)
    given = inputs(model)
    assert torch.equal(copy(**given).text_hidden, model(**given).text_hidden)
    with pytest.raises(ValueError, match=r"adapted: bert.embeddings.projection.weight is \[32, 20\], the new model's"):
        model.adapted(visual_embedding_dim=21)
    with pytest.raises(ValueError, match="unknown fields layers"):
        model.adapted(layers=3)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 2e-5), (torch.bfloat16, 0.5)])
def test_other_dtypes(dtype, atol):
    model = tiny("visualbert", std=0.05, heads=("vqa",))
    given = inputs(model)
    truth = model(**given).logits["vqa"]
    found = model.to(dtype)(**given).logits["vqa"]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("change, message", [
    *BAD_INPUTS,
    (dict(image_type_ids=torch.zeros(4, 6, dtype=torch.long)), r"image_type_ids: has shape \[4, 6\], must be \[4, 7\]"),
    (dict(image_text_alignment=torch.zeros(4, 6, 2, dtype=torch.long)),
     r"image_text_alignment: has shape \[4, 6, 2\], must be \[4, at least 7, A\]"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change, message):
    model = tiny("visualbert")
    with pytest.raises((TypeError, ValueError), match=message):
        model(**{**inputs(model), **change})


@pytest.mark.parametrize("change, message", [
    *BAD_SETTINGS,
    (dict(visual_type=2), "visual_type is 2, must be less than type_vocab_size, 2"),
    (dict(classifier_pooling="mean"), "classifier_pooling is 'mean', must be one of"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        VisualBERTConfig(**{**SIZES, **change})


@pytest.mark.oracle
@pytest.mark.parametrize("std, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
def test_matches_transformers(std, atol):
    transformers = pytest.importorskip("transformers")
    sizes = {name: value for name, value in SIZES.items() if name != "vqa_labels"}
    theirs = transformers.VisualBertForPreTraining(transformers.VisualBertConfig(**sizes, visual_embedding_dim=20,
                                                                                 pad_token_id=0))
    perturb(theirs, std)
    model = VisualBERT(VisualBERTConfig(**sizes, visual_embedding_dim=20)).eval()
    names = {"visual_bert.": "bert.", "visual_token_type_embeddings": "token_type_embeddings_visual",
             "visual_position_embeddings": "position_embeddings_visual", "visual_projection": "projection"}
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    model.load_state_dict({key: value for key, value in state.items() if ".decoder." not in key})
    given = inputs(model)
    types, alignment = torch.randint(2, (4, 7)), torch.randint(-1, 9, (4, 7, 3))
    text = given["attention_mask"].bool()
    keep = torch.cat([text, given["image_mask"].bool()], dim=1)
    with torch.no_grad():
        arguments = {name: given[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        truth = theirs(**arguments, visual_embeds=given["image_feat"], visual_attention_mask=given["image_mask"],
                       visual_token_type_ids=types, image_text_alignment=alignment, output_attentions=True,
                       output_hidden_states=True)
        ours = model(**given, image_type_ids=types, image_text_alignment=alignment, output_attentions=True)
        packed = model(**with_lengths(given), image_type_ids=types, image_text_alignment=alignment)
    assert_near(ours.hidden, truth.hidden_states[-1], atol, "hidden", keep)
    assert_near(packed.hidden, truth.hidden_states[-1], atol, "packed hidden", keep)
    assert_near(ours.logits["mlm"], truth.prediction_logits[:, :9], atol, "mlm", text)
    assert_near(ours.logits["nsp"], truth.seq_relationship_logits, atol, "nsp")
    for mine, hers in zip(ours.attentions, truth.attentions, strict=True):
        assert_near(mine, hers, atol, "attention", keep[:, None, :, None].expand_as(hers))
