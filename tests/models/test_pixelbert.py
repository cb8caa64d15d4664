"""Pixel-BERT against the reference numbers, and its grid, sampling and packing against their definitions."""

import dataclasses

import pytest
import torch
from models.tiny_models import (
    PIXELBERT_SIZES,
    assert_attention_maps,
    assert_drops_reproducibly,
    assert_every_parameter_learns,
    assert_same_gradients,
    assert_same_rows,
    with_counts,
)
from models.tiny_models import pixelbert_inputs as inputs
from models.tiny_models import tiny_pixelbert as tiny
from models.tiny_models import tiny_pixelbert_on_maps as on_maps
from models.two_stream_helpers import rows_through

from vlmfast.models import pixelbert
from vlmfast.models.pixelbert import PixelBERT, PixelBERTConfig
from vlmfast.objectives import bert_like as losses

FIELDS = {field.name for field in dataclasses.fields(PixelBERTConfig)}


@pytest.mark.parametrize("layout", ["mask", "lengths"])
@pytest.mark.parametrize("case", ["pretrain_init", "pretrain_std03", "vqa_std03"])
def test_matches_reference(golden, case, layout):
    weights, given, truth, metadata = golden(f"bert_like/pixelbert__{case}")
    config = {name: value for name, value in metadata["config"].items() if name in FIELDS}
    head = "vqa" if "vqa" in case else "pretraining"
    model = PixelBERT(PixelBERTConfig.from_dict({**config, "backbone": "none", "heads": (head,)})).eval()
    unused = {"transformer.bert.visual_embeddings.position_embeddings.weight",
              "transformer.cls.predictions.decoder.weight", "transformer.cls.predictions.decoder.bias"}
    model.load_state_dict({key: value for key, value in weights.items() if key not in unused})
    mask = given["attention_mask"]
    text = {"attention_mask": mask} if layout == "mask" else {"text_lengths": mask.sum(1)}
    with torch.no_grad():
        output = model(given["input_ids"], image_feat=given["c5_feat"], **text)
    logits = output.logits
    found = {"grid": output.grid, "hidden": output.hidden, "pooled": output.pooled}
    if head == "vqa":
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits["vqa"], given["target"], reduction="none")
        found |= {"logits": logits["vqa"], "loss_each": each,
                  "loss": losses.soft_target_bce(logits["vqa"], given["target"], normalizer="elements")}
    else:
        words, pairs = given["masked_lm_labels"], given["itm_labels"]
        found |= {"mlm_logits": logits["mlm"], "itm_logits": logits["itm"],
                  "loss_mlm": losses.cross_entropy(logits["mlm"], words),
                  "loss_itm": losses.cross_entropy(logits["itm"], pairs)}
        for name, value, labels in (("mlm", logits["mlm"], words), ("itm", logits["itm"], pairs)):
            found[f"loss_{name}_each"] = torch.nn.functional.cross_entropy(
                value.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    assert found.keys() == truth.keys()
    live = torch.cat([mask, torch.ones(2, 12)], dim=1).bool()
    for name, value in truth.items():
        keep = live if name == "hidden" else mask.bool() if name in ("mlm_logits", "loss_mlm_each") else ...
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(found[name][keep], value[keep], rtol=0, atol=float(metadata["atol"]),
                                   msg=lambda text, name=name: f"{name}: {text}")


def test_presets_have_the_sizes_of_the_public_parts():
    model = pixelbert.build("pixelbert-resnet50", device="meta")
    assert sum(value.numel() for value in model.cnn.feature.parameters()) == 25557032 - 2049000 - 2 * 26560
    assert model.cnn.grid_encoder[0].weight.shape == (768, 2048, 3, 3) and model.cnn.grid_encoder[0].bias is None
    assert model.transformer.bert.visual_embeddings.row_position_embeddings.weight.shape == (100, 768)
    large = pixelbert.build("pixelbert-resnext152", device="meta")
    assert len(large.cnn.feature.layer3) == 36 and large.cnn.feature.layer1[0].conv2.groups == 32
    assert pixelbert.build("pixelbert-resnet50-vqa", device="meta").available() == ("vqa",)
    assert pixelbert.build("pixelbert-resnet50-nlvr2", device="meta").classifier[1].weight.shape == (2, 1536)
    assert pixelbert.build("pixelbert-resnet50-retrieval", device="meta").available() == ("rank",)


def test_image_goes_through_backbone_convolution_maximum_and_relu():
    model, image = tiny(), torch.randn(2, 3, 128, 192)
    ids = torch.randint(1, 97, (2, 5))
    output = model(ids, image)
    maps = model.cnn.feature(image[:, [2, 1, 0]])  # the backbone reads BGR
    assert maps.shape == (2, 128, 4, 6) and output.grid.shape == (2, 2, 3, 32)
    cells = torch.nn.functional.conv2d(maps, model.cnn.grid_encoder[0].weight, padding=1)
    cells = cells.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5)).relu()
    torch.testing.assert_close(output.grid, cells.permute(0, 2, 3, 1))
    assert_same_rows(model(ids, image_feat=maps), output, torch.ones(2, 5), torch.ones(2, 6), atol=0)
    same_order = PixelBERT(dataclasses.replace(model.config, img_input_format="RGB")).eval()
    same_order.load_state_dict(model.state_dict())
    assert torch.equal(same_order(ids, image[:, [2, 1, 0]]).grid, output.grid)


def test_cells_get_their_row_their_column_and_the_semantic_vector():
    embeddings = on_maps().transformer.bert.visual_embeddings
    grid = torch.randn(1, 3, 4, 32)
    row, column = embeddings.row_position_embeddings.weight, embeddings.col_position_embeddings.weight
    total = grid[0, 2, 1] + row[2] + column[1] + embeddings.token_type_embeddings.weight[0]
    torch.testing.assert_close(embeddings(grid)[0, 2 * 4 + 1], embeddings.LayerNorm(total))
    bare = on_maps(max_grid_row_position_embeddings=0, max_grid_col_position_embeddings=0).transformer.bert
    assert not [name for name, _ in bare.named_parameters() if "row_" in name or "col_" in name]
    bare = bare.visual_embeddings
    total = grid[0, 2, 1] + bare.token_type_embeddings.weight[0]
    torch.testing.assert_close(bare(grid)[0, 9], bare.LayerNorm(total))
    assert bare(torch.randn(1, 30, 40, 32)).shape == (1, 1200, 32)


def test_lengths_equal_masks_and_pack_whole_layers():
    model, given = on_maps(), inputs()
    counts = with_counts(given)
    assert rows_through(model, given) == {4 * 21}
    assert rows_through(model, counts) == {4 * 21 - 6 - 12}
    packed, padded, masked = model(**counts), model(**counts, output_attentions=True), model(**given)
    for output in (packed, padded):
        assert_same_rows(output, masked, given["attention_mask"], given["image_mask"])
    for output in (packed, padded):
        assert output.text_hidden[given["attention_mask"] == 0].abs().max() == 0
        assert output.image_hidden[given["image_mask"] == 0].abs().max() == 0
    for i in range(4):
        size = int(counts["text_lengths"][i])
        mask = {"image_mask": given["image_mask"][i : i + 1]}
        alone = model(given["input_ids"][i : i + 1, :size], None, given["token_type_ids"][i : i + 1, :size],
                      image_feat=given["image_feat"][i : i + 1], **mask)
        torch.testing.assert_close(packed.text_hidden[i, :size], alone.text_hidden[0], rtol=0, atol=2e-5)


def test_packed_gradients_equal_those_with_masks():
    given = inputs()
    assert_same_gradients(on_maps(), given, given["attention_mask"])


def test_training_mode_reads_a_random_selection_of_cells():
    model, given = on_maps(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), inputs()
    assert model(**given).cells is None
    model.train()
    output, again = model(**given), model(**given)
    cells = output.cells
    assert cells.tolist() == sorted(set(cells.tolist())) and len(cells) == 5 and cells.max() < 12
    assert not torch.equal(cells, again.cells)
    assert output.image_hidden.shape == (4, 5, 32)
    # the same as evaluation with all other cells masked
    chosen = torch.zeros(12, dtype=torch.long).index_fill(0, cells, 1)
    model.eval()
    truth = model(**{**given, "image_mask": given["image_mask"] * chosen})
    text = given["attention_mask"].bool()
    torch.testing.assert_close(output.text_hidden[text], truth.text_hidden[text], rtol=0, atol=2e-5)
    keep = given["image_mask"][:, cells].bool()
    torch.testing.assert_close(output.image_hidden[keep], truth.image_hidden[:, cells][keep], rtol=0, atol=2e-5)


def test_selection_is_drawn_alike_for_masks_and_counts():
    model, given = on_maps(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(), inputs()
    torch.manual_seed(3)
    truth = model(**given)
    torch.manual_seed(3)
    found = model(**with_counts(given))
    assert torch.equal(found.cells, truth.cells)
    assert_same_rows(found, truth, given["attention_mask"], given["image_mask"][:, truth.cells])


@pytest.mark.parametrize("size", [0, 12, 100])
def test_no_selection_where_it_would_keep_all(size):
    model = on_maps(pixel_random_sampling_size=size).train()
    output = model(**inputs())
    assert output.cells is None and output.image_hidden.shape == (4, 12, 32)


def test_every_cell_is_drawn_equally_often():
    model, counts = on_maps().train(), torch.zeros(12)
    grid = torch.zeros(1, 3, 4, 32)
    for _ in range(600):
        counts[model._sampled(grid, None, None)[0]] += 1
    assert (counts / 600 - 5 / 12).abs().max() < 0.1


def test_attention_maps_are_those_of_the_whole_sequence():
    model, given = on_maps(), inputs()
    output, bert = model(**given, output_attentions=True), model.transformer.bert
    text = bert.embeddings(given["input_ids"], given["token_type_ids"])
    x = torch.cat([text, bert.visual_embeddings(output.grid)], dim=1)
    keys = torch.cat([given["attention_mask"], given["image_mask"]], dim=1)
    assert_attention_maps(output, x, bert.encoder.layer[0], keys)
    assert output.text_to_image[0].shape == (4, 4, 9, 12) and model(**given).attentions is None


def test_texts_may_share_images():
    model, given = on_maps(), inputs()
    maps, index = given["image_feat"][:2], torch.tensor([1, 0, 1, 1])
    shared = model(**{**given, "image_feat": maps, "image_index": index})
    copied = model(**{**given, "image_feat": maps[index]})
    assert_same_rows(shared, copied, given["attention_mask"], given["image_mask"])
    one = model(given["input_ids"][:1], image_feat=given["image_feat"])
    copies = model(given["input_ids"][:1].expand(4, -1), image_feat=given["image_feat"])
    torch.testing.assert_close(one.hidden, copies.hidden, rtol=0, atol=2e-5)


def test_text_alone():
    model, given = on_maps(heads=("pretraining",)), inputs()
    text = {name: given[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    output = model(**text)
    assert output.image_hidden.shape == (4, 0, 32) and output.grid is None
    everything_masked = model(**text, image_feat=given["image_feat"], image_mask=torch.zeros(4, 12))
    torch.testing.assert_close(output.pooled, everything_masked.pooled, rtol=0, atol=2e-5)


def test_heads_are_computed_on_request():
    model, given = on_maps(), inputs(batch=3)
    assert list(model(**given).logits) == ["mlm", "itm", "vqa", "rank"]
    assert list(model(**inputs()).logits) == ["mlm", "itm", "vqa", "rank", "classifier"]
    output = model(**inputs(), heads=("classifier", "rank"))
    assert list(output.logits) == ["rank", "classifier"]
    pairs = torch.cat([output.pooled[0::2], output.pooled[1::2]], dim=1)
    torch.testing.assert_close(output.logits["classifier"], model.classifier(pairs))
    torch.testing.assert_close(output.logits["rank"], model.rank_output(output.pooled))
    with pytest.raises(ValueError, match="input_ids: has 3 rows, must be a multiple of classifier_images, 2"):
        model(**given, heads=("classifier",))
    with pytest.raises(ValueError, match="heads: has 'gqa', this model has mlm, itm, vqa, rank, classifier"):
        model(**given, heads=("gqa",))


def test_every_parameter_gets_a_gradient():
    model = tiny(frozen_norm=False, pixel_random_sampling_size=0)
    given = inputs()
    del given["image_feat"], given["image_mask"]
    # batch statistics: with the stored ones some channels of this small network are never positive
    output = model.train()(**given, image=torch.randn(4, 3, 160, 192))
    assert_every_parameter_learns(model, output)


def test_training_mode_drops_and_is_reproducible():
    assert_drops_reproducibly(on_maps(pixel_random_sampling_size=0), inputs())


def test_bfloat16_runs():
    model = tiny(0.05).to(torch.bfloat16)
    output = model(torch.randint(1, 97, (2, 5)), torch.randn(2, 3, 64, 64))
    assert output.logits["vqa"].dtype == torch.bfloat16 and torch.isfinite(output.logits["vqa"]).all()


@pytest.mark.parametrize("change, message", [
    (dict(input_ids=torch.rand(4, 9)), "input_ids: is torch.float32, must be integers"),
    (dict(input_ids=torch.ones(3, 9, dtype=torch.long), attention_mask=None),
     "input_ids: has 3 rows, image_feat 4; must be as many"),
    (dict(image_feat=torch.rand(4, 15, 6, 8)), r"image_feat: has shape \[4, 15, 6, 8\], must be \[B, 16, height"),
    (dict(image_feat=torch.rand(4, 16, 1, 8)), "with sides of at least 2"),
    (dict(image_feat=torch.ones(4, 16, 6, 8, dtype=torch.long)), "image_feat: is torch.int64, must be floating point"),
    (dict(image_feat=torch.rand(4, 16, 12, 8), image_mask=None), "image: has 6 x 4 cells, must have at most 5 x 6"),
    (dict(image=torch.rand(4, 3, 64, 64)), "image_feat: given together with image, must be one or the other"),
    (dict(image=torch.rand(4, 3, 64, 64), image_feat=None), "image: given to a model without a backbone"),
    (dict(image_mask=torch.ones(4, 11)), r"image_mask: has shape \[4, 11\], must be \[4, 12\]"),
    (dict(image_index=torch.tensor([0, 1, 2, 4])), r"image_index: runs from 0 to 4, must lie in 0..3"),
    (dict(image_index=torch.ones(4)), "image_index: is torch.float32, must be integers"),
    (dict(image_index=torch.tensor(1)), r"image_index: has shape \[\], must be \[B\]"),
    (dict(num_regions=torch.ones(4, dtype=torch.long)), "num_regions: given together with image_mask"),
    (dict(text_lengths=torch.tensor([1, 2]), attention_mask=None), r"text_lengths: has shape \[2\], must be \[4\]"),
    (dict(image_feat=None, image_mask=None, image_index=torch.zeros(4)), "image: is None, must be given with image_i"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        on_maps()(**{**inputs(), **change})


def test_small_and_flat_images_are_named():
    for shape in ((2, 3, 63, 64), (2, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match="image: has shape .*, must be .B, 3, height, width. with sides of at le"):
            tiny()(torch.ones(2, 5, dtype=torch.long), torch.rand(shape))


@pytest.mark.parametrize("change, message", [
    (dict(hidden_size=33), "num_attention_heads is 4, must be a divisor of hidden_size, 33"),
    (dict(backbone="vgg16"), "backbone is 'vgg16', must be one of"),
    (dict(backbone_channel_in_size=64), "backbone_channel_in_size is 64, must be what resnet50 gives, 128"),
    (dict(max_grid_row_position_embeddings=0), "max_grid_row_position_embeddings is 0, must be 0 exactly where"),
    (dict(backbone_layers=(1, 0)), "backbone_layers is .1, 0., must be integers of at least 1"),
    (dict(heads=("itm",)), "heads is .'itm',., must be a selection"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        PixelBERTConfig(**{**PIXELBERT_SIZES, **change})
    assert PixelBERTConfig.from_dict(PixelBERTConfig(**PIXELBERT_SIZES).to_dict()) == PixelBERTConfig(**PIXELBERT_SIZES)
