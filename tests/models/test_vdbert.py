"""VD-BERT against the reference numbers, and its packing, masks and answer scoring against their definitions."""

import dataclasses

import pytest
import torch
from models.tiny_models import (
    VDBERT_SIZES,
    assert_attention_maps,
    assert_drops_reproducibly,
    assert_every_parameter_learns,
    assert_same_gradients,
    assert_same_rows,
    vdbert_inputs,
    with_counts,
)
from models.tiny_models import tiny_vdbert as tiny
from models.two_stream_helpers import rows_through

from vlmfast.models import vdbert
from vlmfast.models.vdbert import VDBERT, VDBERTConfig
from vlmfast.objectives import bert_like as losses

FIELDS = {field.name for field in dataclasses.fields(VDBERTConfig)}


def golden_model(weights, config) -> VDBERT:
    model = VDBERT(VDBERTConfig.from_dict({name: value for name, value in config.items() if name in FIELDS}))
    table = weights.pop("cls.predictions.decoder.weight")
    assert torch.equal(table, weights["bert.embeddings.word_embeddings.weight"])
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("layout", ["matrix", "lengths"])
@pytest.mark.parametrize("case", ["pretrain_bi_init", "pretrain_bi_std03", "pretrain_s2s_init", "pretrain_s2s_std03"])
def test_matches_reference(golden, case, layout):
    weights, given, truth, metadata = golden(f"bert_like/vdbert__{case}")
    model = golden_model(weights, metadata["config"])
    given_layout = {"attention_mask": given["attention_mask"], "token_type_ids": given["token_type_ids"]}
    if layout == "lengths":  # and the segments that the model takes by itself
        given_layout = {"text_lengths": given["lengths"]}
        if "s2s" in case:
            given_layout["prefix_lengths"] = given["attention_mask"][:, 0].sum(1)
    with torch.no_grad():
        output = model(given["input_ids"], given["image_feat"], given["image_loc"], **given_layout)
    logits = output.logits
    each = logits["mlm"].gather(1, given["masked_pos"][..., None].expand(-1, -1, 97)).log_softmax(-1)
    each = -each.gather(-1, given["masked_lm_labels"][..., None])[..., 0] * given["masked_weights"]
    found = {
        "hidden": output.hidden, "pooled": output.pooled, "mlm_logits": logits["mlm"], "nsp_logits": logits["nsp"],
        "loss_mlm": each.sum() / (given["masked_weights"].sum() + 1e-5),
        "loss_nsp": losses.cross_entropy(logits["nsp"], given["next_sentence_label"]),
    }
    assert found.keys() == truth.keys()
    live = torch.arange(given["input_ids"].shape[1]) < given["lengths"][:, None]
    for name, value in truth.items():
        keep = live if name in ("hidden", "mlm_logits") else ...
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(found[name][keep], value[keep], rtol=0, atol=float(metadata["atol"]),
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("padding", [0, 5])
def test_option_scores_match_the_step_by_step_reference(golden, padding):
    weights, given, truth, metadata = golden("bert_like/vdbert__generative_ranking_std03")
    model, atol = golden_model(weights, metadata["config"]), float(metadata["atol"])
    ids = torch.nn.functional.pad(given["input_ids"], (0, padding), value=9)
    prefix = ids, given["image_feat"], given["image_loc"]
    lengths = torch.tensor([16, 16])
    with torch.no_grad():
        scores = model.score_options(*prefix, given["options"], text_lengths=lengths)
        masked = model.score_options(*prefix, given["options"], attention_mask=torch.arange(16 + padding)[None] <
                                     lengths[:, None])
        states = model.option_states(model.read(*prefix, text_lengths=lengths), given["options"][:, :, :-1])
        logits = model.cls.predictions(states, model.word_table)
    for found in (scores, masked):
        torch.testing.assert_close(found, truth["option_scores"], rtol=0, atol=atol)
    torch.testing.assert_close(logits.amax(-1).flatten(0, 1), truth["max_scores"], rtol=0, atol=atol)


def test_base_model_has_the_published_sizes():
    model = vdbert.build("vdbert-base", device="meta")
    assert model.bert.embeddings.word_embeddings.weight.shape == (28996, 768)
    assert model.vis_embed[0].weight.shape == (768, 2048) and model.vis_pe_embed[0].weight.shape == (768, 7)
    older = vdbert.build("vdbert-base-v0.9", device="meta")
    assert older.vis_embed[0].weight.shape == (2048, 2048) and older.vis_embed[2].weight.shape == (768, 2048)
    assert older.vis_pe_embed[0].weight.shape == (768, 1607) and older.config.len_vis_input == 100


def test_lengths_equal_masks_and_pack_whole_layers():
    model, given = tiny(), vdbert_inputs()
    counts = with_counts(given)
    assert rows_through(model, given) == {4 * 18}
    assert rows_through(model, counts) == {4 * 18 - 6}
    packed, padded, masked = model(**counts), model(**counts, output_attentions=True), model(**given)
    keep = given["attention_mask"]
    assert_same_rows(packed, masked, keep)
    assert_same_rows(padded, masked, keep)
    for output in (packed, padded):
        assert output.hidden[keep == 0].abs().max() == 0
    assert packed.attentions is None
    for i in range(4):
        size = int(counts["text_lengths"][i])
        alone = model(given["input_ids"][i : i + 1, :size], given["image_feat"][i : i + 1],
                      given["image_loc"][i : i + 1], given["token_type_ids"][i : i + 1, :size])
        torch.testing.assert_close(packed.hidden[i, :size], alone.hidden[0], rtol=0, atol=2e-5)


def test_packed_gradients_equal_those_with_masks():
    given = vdbert_inputs()
    assert_same_gradients(tiny(), given, given["attention_mask"])


def test_unused_image_slots_are_left_out():
    model, given = tiny(), vdbert_inputs()
    regions = torch.tensor([7, 5, 3, 1])
    mask = (torch.arange(7) < regions[:, None]).long()
    keep = given["attention_mask"].clone()
    keep[:, 1:8] *= mask
    counts = {**with_counts(given), "num_regions": regions}
    assert rows_through(model, counts) == {int(keep.sum())}
    truth = model(**{**given, "attention_mask": keep})
    assert_same_rows(model(**given, image_mask=mask), truth, keep)
    assert_same_rows(model(**counts), truth, keep)
    counts["image_feat"] = torch.where(mask[..., None] == 1, given["image_feat"], torch.nan)
    assert_same_rows(model(**counts), truth, keep)


def test_attention_maps_are_those_of_the_whole_sequence():
    model, given = tiny(), vdbert_inputs()
    output = model(**given, output_attentions=True)
    assert output.text_to_image[0].shape == (4, 4, 18, 7) and output.image_to_text[0].shape == (4, 4, 7, 18)
    assert torch.equal(output.text_to_image[1], output.attentions[1][..., 1:8])
    assert torch.equal(output.image_hidden, output.hidden[:, 1:8])
    x = model.embed(given["input_ids"], given["image_feat"], given["image_loc"], given["token_type_ids"])
    assert_attention_maps(output, x, model.bert.encoder.layer[0], given["attention_mask"])


def test_prefix_mask_equals_its_matrix():
    model, given = tiny(), vdbert_inputs()
    del given["attention_mask"]
    lengths, prefix = torch.tensor([18, 17, 16, 15]), torch.tensor([10, 12, 9, 15])
    row, column = torch.arange(18)[:, None], torch.arange(18)
    matrix = (column < prefix[:, None, None]) | (column <= row)
    matrix = matrix & (column < lengths[:, None, None])
    truth = model(**given, attention_mask=matrix)
    live = column < lengths[:, None]
    assert_same_rows(model(**given, text_lengths=lengths, prefix_lengths=prefix), truth, live)
    assert_same_rows(model(**given, attention_mask=live, prefix_lengths=prefix), truth, live)
    other = dict(given, input_ids=given["input_ids"].clone())
    other["input_ids"][0, 15] = 5 + (other["input_ids"][0, 15] - 4) % 90
    changed = model(**other, text_lengths=lengths, prefix_lengths=prefix).hidden[0]
    torch.testing.assert_close(changed[:15], truth.hidden[0, :15], rtol=0, atol=2e-5)
    assert (changed[15:] - truth.hidden[0, 15:]).abs().amax(-1).min() > 1e-3


def test_padding_does_not_reach_what_exists():
    model, given = tiny(), vdbert_inputs()
    counts, keep = with_counts(given), given["attention_mask"]
    other = {**counts, "input_ids": torch.where(keep == 1, given["input_ids"], 9)}
    assert_same_rows(model(**other), model(**counts), keep, atol=0)


def test_slots_replace_words_and_positions_but_not_segments():
    model, given = tiny(), vdbert_inputs()
    other = dict(given, input_ids=given["input_ids"].clone())
    other["input_ids"][:, 1:8] = 3
    assert torch.equal(model(**other).hidden, model(**given).hidden)
    x = model.embed(given["input_ids"], given["image_feat"], given["image_loc"], given["token_type_ids"])
    table = model.bert.embeddings
    slot = torch.relu(model.vis_embed[0](given["image_feat"])) + torch.relu(model.vis_pe_embed[0](given["image_loc"]))
    expected = table.LayerNorm(slot + table.token_type_embeddings(given["token_type_ids"][:, 1:8]))
    torch.testing.assert_close(x[:, 1:8], expected)
    # without token_type_ids: [CLS], image and the [SEP] behind it are 0
    types = (torch.arange(18) > 8).long().expand(4, -1)
    del given["token_type_ids"]
    assert torch.equal(model(**given).hidden, model(**given, token_type_ids=types).hidden)


def test_text_alone_and_models_without_vision():
    model, given = tiny(), vdbert_inputs()
    text = {name: given[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    blind = VDBERT(dataclasses.replace(model.config, len_vis_input=0)).eval()
    blind.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("vis_")})
    assert_same_rows(blind(**text), model(**text), text["attention_mask"], atol=0)
    assert blind(**with_counts(text)).image_hidden.shape == (4, 0, 32)
    assert_same_rows(blind(**with_counts(text)), model(**text), text["attention_mask"])
    with pytest.raises(ValueError, match="image_feat: is given to a model without vision"):
        blind(**given)


def test_two_layer_projection_is_relu_after_each_linear():
    model, given = tiny(vis_embed_layers=2), vdbert_inputs()
    steps = model.vis_embed
    expected = torch.relu(steps[2](torch.relu(steps[0](given["image_feat"]))))
    torch.testing.assert_close(steps(given["image_feat"]), expected)
    assert model(**given).hidden.shape == (4, 18, 32)


def test_rank_is_the_matching_logit_of_each_answer():
    model, given = tiny(), vdbert_inputs(batch=2)
    ids, types = torch.randint(5, 97, (2, 3, 18)), torch.randint(2, (2, 3, 18))
    lengths = torch.tensor([[18, 15, 16], [17, 18, 12]])
    scores = model.rank(ids, given["image_feat"], given["image_loc"], types, text_lengths=lengths)
    for i in range(2):
        for j in range(3):
            size = int(lengths[i, j])
            alone = model(ids[i, j : j + 1, :size], given["image_feat"][i : i + 1], given["image_loc"][i : i + 1],
                          types[i, j : j + 1, :size])
            torch.testing.assert_close(scores[i, j], alone.logits["nsp"][0, 1], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"text_lengths: has shape \[2\], must be \[2, 3\]"):
        model.rank(ids, given["image_feat"], given["image_loc"], types, text_lengths=lengths[:, 0])


def likelihood(model, given, answer: list[int], words_only=False) -> float:
    """log p of an answer, one full forward per token with the triangular mask over [prefix, tokens, MASK]; words_only:
    token 0, padding, has no probability."""
    total, prefix = 0.0, given["input_ids"]
    for n in range(len(answer)):
        tail = torch.tensor([[*answer[:n], 4]])
        ids = torch.cat([prefix, tail], dim=1)
        types = torch.cat([given["token_type_ids"], torch.ones_like(tail)], dim=1)
        output = model(ids, given["image_feat"], given["image_loc"], types,
                       prefix_lengths=torch.tensor([prefix.shape[1]]), heads=("mlm",))
        logits = output.logits["mlm"][0, -1]
        total += float(logits[words_only:].log_softmax(-1)[answer[n] - words_only])
    return total


@pytest.fixture
def example():
    given = vdbert_inputs(batch=1, tokens=14)
    del given["attention_mask"]
    return given


def test_option_scores_equal_a_forward_per_token(example):
    model = tiny()
    answers = [[11, 12, 13, 14], [21, 22], [31]]
    options = torch.tensor([answer + [0] * (4 - len(answer)) for answer in answers])[None]
    with torch.no_grad():
        scores = model.score_options(example["input_ids"], example["image_feat"], example["image_loc"], options,
                                     example["token_type_ids"])
        expected = torch.tensor([[likelihood(model, example, answer) for answer in answers]])
    torch.testing.assert_close(scores, expected, rtol=0, atol=3e-5)


def test_option_scores_are_differentiable_and_finite_in_bfloat16(example):
    model = tiny(0.05)
    options = torch.randint(5, 97, (1, 3, 4))
    arguments = (example["input_ids"], example["image_feat"], example["image_loc"], options)
    scores = model.score_options(*arguments)
    scores.sum().backward()
    assert model.vis_embed[0].weight.grad.abs().sum() > 0
    half = model.to(torch.bfloat16).score_options(*arguments)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, rtol=0, atol=0.5)


def test_greedy_answer_takes_the_likeliest_token_each_time(example):
    model = tiny(0.1)
    tokens, score = model.generate(**example, max_tokens=5, end_id=96)
    context = model.read(**example)
    with torch.no_grad():
        for n in range(tokens.shape[1]):
            logits = model.next_logits(context, tokens[:, None, :n])[0, 0]
            logits[0] = -torch.inf
            assert int(logits.argmax()) == int(tokens[0, n])
        assert tokens.shape[1] == 5 or tokens[0, -1] == 96
        expected = likelihood(model, example, tokens[0].tolist(), words_only=True)
        torch.testing.assert_close(float(score), expected, rtol=0, atol=5e-5)


def test_wide_beam_finds_the_best_of_all_answers(example):
    model = tiny(0.1, vocab_size=9, mask_word_id=4)
    example["input_ids"] = example["input_ids"] % 9
    tokens, score = model.generate(**example, max_tokens=2, num_beams=9 * 9, end_id=2)
    with torch.no_grad():
        answers = [[2]] + [[a, b] for a in range(1, 9) if a != 2 for b in range(1, 9)]
        scores = [likelihood(model, example, answer, words_only=True) for answer in answers]
    best = max(range(len(answers)), key=scores.__getitem__)
    assert [token for token in tokens[0].tolist() if token] == answers[best]
    torch.testing.assert_close(float(score), scores[best], rtol=0, atol=2e-5)
    for penalty in (3.0, -3.0):  # short or long answers are preferred
        tokens, _ = model.generate(**example, max_tokens=2, num_beams=9 * 9, end_id=2, length_penalty=penalty)
        best = max(range(len(answers)), key=lambda i, p=penalty: scores[i] / len(answers[i]) ** p)
        assert [token for token in tokens[0].tolist() if token] == answers[best]


def test_answers_of_a_ragged_batch_are_those_of_each_example():
    model, given = tiny(), with_counts(vdbert_inputs(tokens=14))
    tokens, scores = model.generate(**given, max_tokens=6, num_beams=2, end_id=0)
    assert tokens.shape == (4, 6)
    for i in range(4):
        size = int(given["text_lengths"][i])
        alone = model.generate(given["input_ids"][i : i + 1, :size], given["image_feat"][i : i + 1],
                               given["image_loc"][i : i + 1], given["token_type_ids"][i : i + 1, :size], max_tokens=6,
                               num_beams=2, end_id=0)
        assert torch.equal(alone[0][0], tokens[i])
        torch.testing.assert_close(alone[1][0], scores[i], rtol=0, atol=5e-5)
    model.cls.predictions.bias.data[50] = 30.0
    stopped, _ = model.generate(**given, max_tokens=6, end_id=50)
    assert stopped.tolist() == [[50]] * 4


def test_answers_need_evaluation_mode_and_the_word_head(example):
    options = torch.ones(1, 2, 3, dtype=torch.long)
    arguments = (example["input_ids"], example["image_feat"], example["image_loc"], options)
    with pytest.raises(RuntimeError, match="read: the model must be in evaluation mode"):
        tiny().train().score_options(*arguments)
    with pytest.raises(RuntimeError, match="built with the head 'mlm'"):
        tiny(heads=("nsp",)).score_options(*arguments)
    with pytest.raises(ValueError, match="mask_word_id is 103, must be less than vocab_size, 97"):
        tiny(mask_word_id=103).score_options(*arguments)
    with pytest.raises(TypeError, match="options: is torch.float32, must be integers"):
        tiny().score_options(*arguments[:3], options.float())
    with pytest.raises(ValueError, match=r"options: has shape \[2, 3\], must be \[1, N, A\]"):
        tiny().score_options(*arguments[:3], options[0])
    with pytest.raises(ValueError, match="options: end at position 42, must end before 40"):
        tiny().score_options(*arguments[:3], torch.ones(1, 2, 29, dtype=torch.long))
    with pytest.raises(ValueError, match="num_beams: is 0, must be an integer of at least 1"):
        tiny().generate(**example, num_beams=0)


def test_every_parameter_gets_a_gradient():
    model = tiny(vis_embed_layers=2)
    assert_every_parameter_learns(model, model(**vdbert_inputs(), position_ids=torch.randint(40, (4, 18))))


def test_training_mode_drops_and_is_reproducible():
    assert_drops_reproducibly(tiny(), vdbert_inputs())


def test_heads_are_computed_on_request():
    model, given = tiny(), vdbert_inputs()
    assert list(model(**given).logits) == ["mlm", "nsp"]
    assert list(model(**given, heads=("nsp",)).logits) == ["nsp"]
    with pytest.raises(ValueError, match="heads: has 'vqa', this model has mlm, nsp"):
        model(**given, heads=("vqa",))
    assert tiny(heads=())(**given).logits == {}


@pytest.mark.parametrize("change, message", [
    (dict(input_ids=torch.rand(4, 18)), "input_ids: is torch.float32, must be integers"),
    (dict(input_ids=torch.ones(4, 41, dtype=torch.long), attention_mask=None, token_type_ids=None),
     "input_ids: has 41 tokens, must have at most 40"),
    (dict(input_ids=torch.ones(4, 8, dtype=torch.long), attention_mask=None, token_type_ids=None),
     "input_ids: has 8 tokens, must have at least 9 with the image"),
    (dict(image_feat=torch.rand(4, 7, 21)), r"image_feat: has shape \[4, 7, 21\], must be \[B, R, 20\]"),
    (dict(image_feat=torch.rand(4, 6, 20), image_loc=torch.rand(4, 6, 7)),
     r"image_feat: has 6 regions of 4 images, must have 7 \(len_vis_input\) of 4"),
    (dict(image_loc=None), "image_loc: is None, must be given with image_feat"),
    (dict(image_loc=torch.rand(4, 7, 5)), r"image_loc: has shape \[4, 7, 5\], must be \[4, 7, 7\]"),
    (dict(token_type_ids=torch.ones(4, 17, dtype=torch.long)), r"token_type_ids: has shape \[4, 17\], must be"),
    (dict(attention_mask=torch.ones(4, 17)), r"attention_mask: has shape \[4, 17\], must be \[4, 18\]"),
    (dict(attention_mask=torch.ones(4, 18, 17)), r"attention_mask: has shape \[4, 18, 17\], must be \[4, 18, 18\]"),
    (dict(attention_mask=torch.full((4, 18, 18), -1e4)), "attention_mask: holds values other than 0 and 1"),
    (dict(text_lengths=torch.ones(4, dtype=torch.long)), "text_lengths: given together with attention_mask"),
    (dict(attention_mask=torch.ones(4, 18, 18), text_lengths=torch.full((4,), 18)),
     "text_lengths: given together with attention_mask"),
    (dict(attention_mask=None, text_lengths=torch.tensor([18, 7, 18, 18])), "text_lengths: starts at 7, must be at"),
    (dict(attention_mask=None, text_lengths=torch.tensor([18, 19, 18, 18])), r"text_lengths: runs from 18 to 19"),
    (dict(num_regions=torch.tensor([7, 8, 7, 7])), r"num_regions: runs from 7 to 8, must lie in 0..7"),
    (dict(prefix_lengths=torch.ones(4)), "prefix_lengths: is torch.float32, must be integers"),
    (dict(image_feat=None, image_mask=torch.ones(4, 7)), "image_feat: is None, must be given with image_mask"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny()(**{**vdbert_inputs(), **change})


@pytest.mark.parametrize("change, message", [
    (dict(hidden_size=33), "num_attention_heads is 4, must be a divisor of hidden_size, 33"),
    (dict(vis_embed_layers=3), "vis_embed_layers is 3, must be one of"),
    (dict(len_vis_input=39), "len_vis_input is 39, must be at most max_position_embeddings - 2, 38"),
    (dict(len_vis_input=-1), "len_vis_input is -1, must be an integer of at least 0"),
    (dict(heads=("mlm", "itm")), "heads is .'mlm', 'itm'., must be a selection"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        VDBERTConfig(**{**VDBERT_SIZES, **change})
    assert VDBERTConfig.from_dict(VDBERTConfig(**VDBERT_SIZES).to_dict()) == VDBERTConfig(**VDBERT_SIZES)
