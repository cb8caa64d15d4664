"""ImageBERT: no reference exists, so its embedding, packing and heads are tested against their definitions."""

import pytest
import torch
from models.tiny_models import (
    IMAGEBERT_SIZES,
    assert_attention_maps,
    assert_drops_reproducibly,
    assert_every_parameter_learns,
    assert_same_gradients,
    assert_same_rows,
    with_counts,
)
from models.tiny_models import imagebert_inputs as inputs
from models.tiny_models import tiny_imagebert as tiny
from models.two_stream_helpers import rows_through

from vlmfast.models import imagebert
from vlmfast.models.imagebert import ImageBERTConfig

OPTIONS = [{}, {"image_position": "sequence"}, {"image_sep": False},
           {"image_position": "sequence", "image_sep": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("std, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
def test_equals_a_plain_bert_over_the_written_out_sequence(options, std, atol):
    model = tiny(std, **options)
    table, given = model.bert.embeddings, inputs(batch=1)
    positions, types = table.position_embeddings.weight, table.token_type_embeddings.weight
    text = table.word_embeddings(given["input_ids"][0]) + positions[:9] + types[given["token_type_ids"][0]]
    image = table.image_embeddings(given["image_feat"][0]) + table.image_location_embeddings(given["image_loc"][0])
    sequence = "image_position" in options
    image = image + types[1] + (positions[9:16] if sequence else table.image_position_embeddings.weight)
    rows = [text, image]
    if model.config.image_sep:
        rows.append(table.word_embeddings.weight[2:3] + types[1] + positions[16 if sequence else 9])
    x = torch.nn.functional.layer_norm(torch.cat(rows), (32,), table.LayerNorm.weight, table.LayerNorm.bias, 1e-12)
    for layer in model.bert.encoder.layer:
        own = layer.attention.self
        query, key, value = (part(x).unflatten(-1, (4, 8)).transpose(0, 1) for part in (own.query, own.key, own.value))
        context = (query @ key.mT / 8**0.5).softmax(-1) @ value
        for end, y in ((layer.attention.output, context.transpose(0, 1).flatten(1)), (layer.output, None)):
            if y is None:
                y = torch.nn.functional.gelu(layer.intermediate.dense(x))
            x = torch.nn.functional.layer_norm(end.dense(y) + x, (32,), end.LayerNorm.weight, end.LayerNorm.bias, 1e-12)
    output = model(**given)
    torch.testing.assert_close(output.hidden[0], x[:16], rtol=0, atol=atol)
    torch.testing.assert_close(output.pooled[0], torch.tanh(model.bert.pooler.dense(x[0])), rtol=0, atol=atol)
    torch.testing.assert_close(output.logits["moc"][0], model.cls.object_classifier(x[9:16]), rtol=0, atol=atol)
    torch.testing.assert_close(output.logits["mrfr"][0], model.cls.feature_regression(x[9:16]), rtol=0, atol=atol)
    torch.testing.assert_close(output.logits["itm"], model.cls.seq_relationship(output.pooled))
    torch.testing.assert_close(output.logits["rank"], model.rank_output(output.pooled))
    assert output.logits["mlm"].shape == (1, 9, 97) and output.logits["classifier"].shape == (1, 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lengths_equal_masks_and_examples_alone(options):
    model, given = tiny(**options), inputs()
    counts, end = with_counts(given), int(model.config.image_sep)
    assert rows_through(model, given) == {4 * (16 + end)}
    assert rows_through(model, counts) == {4 * (16 + end) - 12}
    packed, padded, masked = model(**counts), model(**counts, output_attentions=True), model(**given)
    for output in (packed, padded):
        assert_same_rows(output, masked, given["attention_mask"], given["image_mask"])
    for output in (packed, padded):
        assert output.text_hidden[given["attention_mask"] == 0].abs().max() == 0
        assert output.image_hidden[given["image_mask"] == 0].abs().max() == 0
    for i in range(4):
        tokens, regions = 9 - i, 7 - i
        alone = model(given["input_ids"][i : i + 1, :tokens], given["image_feat"][i : i + 1, :regions],
                      given["image_loc"][i : i + 1, :regions], given["token_type_ids"][i : i + 1, :tokens])
        torch.testing.assert_close(packed.text_hidden[i, :tokens], alone.text_hidden[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(packed.image_hidden[i, :regions], alone.image_hidden[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_gradients_equal_those_with_masks(options):
    given = inputs()
    assert_same_gradients(tiny(**options), given, given["attention_mask"])


def test_regions_are_a_set_with_the_dummy_position_only():
    for options, same in (({}, True), ({"image_position": "sequence"}, False)):
        model, given = tiny(**options), inputs(batch=2)
        del given["image_mask"]
        turned = {**given, "image_feat": given["image_feat"].flip(1), "image_loc": given["image_loc"].flip(1)}
        difference = (model(**turned).pooled - model(**given).pooled).abs().max()
        assert (difference < 2e-5) == same


def test_padding_does_not_reach_what_exists():
    model, given = tiny(), inputs()
    counts = with_counts(given)
    other = {**counts, "input_ids": torch.where(given["attention_mask"] == 1, given["input_ids"], 5),
             "image_feat": torch.where(given["image_mask"][..., None] == 1, given["image_feat"], torch.nan)}
    assert_same_rows(model(**other), model(**counts), given["attention_mask"], given["image_mask"], atol=0)


def test_attention_maps_are_those_of_the_whole_sequence():
    model, given = tiny(), inputs()
    embedded = []
    hook = model.bert.embeddings.dropout.register_forward_hook(lambda *call: embedded.append(call[2]))
    output = model(**given, output_attentions=True)
    hook.remove()
    keys = torch.cat([given["attention_mask"], given["image_mask"], torch.ones(4, 1)], dim=1)
    assert_attention_maps(output, embedded[0], model.bert.encoder.layer[0], keys)
    assert torch.equal(output.text_to_image[1], output.attentions[1][:, :, :9, 9:16])
    assert output.image_to_text[0].shape == (4, 4, 7, 9) and model(**given).attentions is None


def test_text_alone_and_regions_alone():
    model, given = tiny(heads=("pretraining",)), inputs()
    text = {name: given[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    regions = {name: given[name] for name in ("image_feat", "image_loc", "image_mask")}
    assert model(**text).image_hidden.shape == (4, 0, 32) and model(**text).text_hidden.shape == (4, 9, 32)
    output = model(**regions)
    assert output.text_hidden.shape == (4, 0, 32) and output.logits["mlm"].shape == (4, 0, 97)
    assert output.logits["mrfr"].shape == (4, 7, 20)
    counted = model(image_feat=regions["image_feat"], image_loc=regions["image_loc"],
                    num_regions=regions["image_mask"].sum(1))
    keep = regions["image_mask"].bool()
    torch.testing.assert_close(counted.image_hidden[keep], output.image_hidden[keep], rtol=0, atol=2e-5)


def test_one_text_for_all_images_equals_copies():
    model, given = tiny(heads=("pretraining", "rank")), inputs()
    one = {name: value if name.startswith("image") else value[:1] for name, value in given.items()
           if name != "attention_mask"}
    copies = {name: value if name.startswith("image") else value.expand(4, -1) for name, value in one.items()}
    assert_same_rows(model(**one), model(**copies), torch.ones(4, 9), given["image_mask"])


def test_presets():
    model = imagebert.build("imagebert-base", device="meta")
    assert model.available() == ("mlm", "itm", "moc", "mrfr")
    assert model.cls.object_classifier.weight.shape == (1600, 768)
    assert imagebert.build("imagebert-base-retrieval", device="meta").available() == ("rank",)


def test_every_parameter_gets_a_gradient_and_the_padding_id_none():
    model, given = tiny(), inputs()
    given["input_ids"][:, -3:] = 0
    assert_every_parameter_learns(model, model(**given))
    trunk = tiny(heads=())
    trunk(**given).hidden.square().sum().backward()
    assert trunk.word_table.grad[0].abs().sum() == 0 and trunk.word_table.grad[2].abs().sum() > 0


def test_training_mode_drops_and_is_reproducible():
    assert_drops_reproducibly(tiny(), inputs())


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 2e-5), (torch.bfloat16, 0.5)])
def test_other_dtypes(dtype, atol):
    model, given = tiny(0.05), inputs()
    truth = model(**given).logits["itm"]
    found = model.to(dtype)(**given).logits["itm"]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("change, message", [
    (dict(input_ids=torch.rand(4, 9)), "input_ids: is torch.float32, must be integers"),
    (dict(input_ids=None, attention_mask=None, image_feat=None, image_loc=None, image_mask=None),
     "input_ids: is None like image_feat, at least one must be given"),
    (dict(image_loc=None), "image_loc: goes together with image_feat, one of them is None"),
    (dict(image_loc=torch.rand(4, 7, 4)), r"image_loc: has shape \[4, 7, 4\], must be \[4, 7, 5\]"),
    (dict(image_feat=torch.rand(4, 7, 21)), r"image_feat: has shape \[4, 7, 21\], must be \[B, R, 20\]"),
    (dict(image_mask=torch.full((4, 7), -10000.0)), "image_mask: holds values other than 0 and 1"),
    (dict(num_regions=torch.ones(4, dtype=torch.long)), "num_regions: given together with image_mask"),
    (dict(text_lengths=torch.ones(4, dtype=torch.long)), "text_lengths: given together with attention_mask"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny()(**{**inputs(), **change})


def test_too_many_regions_for_the_positions_are_named():
    with pytest.raises(ValueError, match="image_feat: text, regions and .SEP. need 30 positions, must be at most 24"):
        tiny(image_position="sequence")(**inputs(regions=20))
    assert tiny()(**inputs(regions=20)).hidden.shape == (4, 29, 32)
    with pytest.raises(ValueError, match="image_feat: text, regions and .SEP. need 25 positions, must be at most 24"):
        tiny()(**inputs(tokens=24))
    assert tiny(image_sep=False)(**inputs(tokens=24)).hidden.shape == (4, 31, 32)


@pytest.mark.parametrize("change, message", [
    (dict(hidden_size=33), "num_attention_heads is 4, must be a divisor of hidden_size, 33"),
    (dict(image_position="box"), "image_position is 'box', must be one of"),
    (dict(sep_token_id=97), "sep_token_id is 97, must be less than vocab_size, 97"),
    (dict(type_vocab_size=1), "type_vocab_size is 1, must be at least 2"),
    (dict(heads=("moc",)), "heads is .'moc',., must be a selection"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ImageBERTConfig(**{**IMAGEBERT_SIZES, **change})
    assert ImageBERTConfig.from_dict(ImageBERTConfig(**IMAGEBERT_SIZES).to_dict()) == ImageBERTConfig(**IMAGEBERT_SIZES)
