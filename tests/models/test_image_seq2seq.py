"""The image-conditioned encoder-decoder: its cache, its masks, its variants, its checkpoints."""

import pytest
import torch
from checkpoints.checkpoint_helpers import assert_same_model
from models.seq2seq_helpers import seq2seq_inputs as inputs
from models.seq2seq_helpers import tiny_seq2seq as tiny

import vlmfast
from vlmfast.checkpoints import detect_format, load, save_pretrained
from vlmfast.models import ImageSeq2SeqConfig, create
from vlmfast.objectives import Pretraining
from vlmfast.objectives.batch import PretrainingBatch
from vlmfast.tasks.decoding import select_rows

KINDS = [dict(visual="grid"), dict(visual="grid", fusion="gated"), dict(visual="regions"), dict(visual="none"),
         dict(visual="regions", fusion="gated", region_loc_dim=0)]


def logits(model, given):
    return model(**given).logits["lm"]


def encoder_side(given):
    return {name: value for name, value in given.items() if name != "decoder_input_ids"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_steps_with_a_cache_equal_full_recomputation(kind):
    model = tiny(**kind)
    given = inputs(model)
    tokens, wanted = given["decoder_input_ids"], logits(model, given)
    state = model.start(model.encode(**encoder_side(given)))
    for count in range(1, tokens.shape[1] + 1):
        found, state = model.step(tokens[:, :count], state)
        assert state.past[0][0].shape[1] == count
        torch.testing.assert_close(found, wanted[:, count - 1], rtol=0, atol=1e-5)
    # a prompt of several tokens is read at once
    found, _ = model.step(tokens[:, :5], model.start(model.encode(**encoder_side(given))))
    torch.testing.assert_close(found, wanted[:, 4], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_follows_its_rows():
    model = tiny()
    given = inputs(model)
    tokens, rows = given["decoder_input_ids"], torch.tensor([3, 0, 0, 2, 1])
    _, state = model.step(tokens[:, :3], model.start(model.encode(**encoder_side(given))))
    found, _ = model.step(tokens[rows, :4], select_rows(state, rows))
    torch.testing.assert_close(found, logits(model, given)[rows, 3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_padding_and_later_tokens_reach_nothing(kind):
    model = tiny(**kind)
    given = inputs(model)
    wanted = logits(model, given)
    changed = dict(given)
    for name, lengths in (("input_ids", "text_lengths"), ("image_feat", "num_regions"), ("image_loc", "num_regions")):
        if name in given:
            keep = torch.arange(given[name].shape[1]) < given[lengths][:, None]
            keep = keep if given[name].ndim == 2 else keep[..., None]
            filler = 9 if name == "input_ids" else torch.nan
            changed[name] = torch.where(keep, given[name], filler)
    changed["decoder_input_ids"] = given["decoder_input_ids"].clone()
    changed["decoder_input_ids"][:, 5:] = 7
    found = logits(model, changed)
    torch.testing.assert_close(found[:, :5], wanted[:, :5], rtol=0, atol=1e-5)
    assert (found[:, 5:] - wanted[:, 5:]).abs().amax() > 1e-2
    # row 2 alone, without its padding
    alone = {name: value[2:3] for name, value in given.items()}
    alone["input_ids"] = alone["input_ids"][:, : given["text_lengths"][2]]
    for name in ("image_feat", "image_loc"):
        if name in alone:
            alone[name] = alone[name][:, : given["num_regions"][2]]
    del alone["text_lengths"]
    alone.pop("num_regions", None)
    torch.testing.assert_close(logits(model, alone), wanted[2:3], rtol=0, atol=1e-5)


@torch.no_grad()
def test_lengths_equal_masks():
    model = tiny(visual="regions")
    given = inputs(model)
    masked = dict(given)
    masked["attention_mask"] = torch.arange(7) < masked.pop("text_lengths")[:, None]
    masked["image_mask"] = torch.arange(5) < masked.pop("num_regions")[:, None]
    torch.testing.assert_close(logits(model, masked), logits(model, given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind["visual"] != "none"], ids=str)
@torch.no_grad()
def test_the_picture_and_the_source_matter(kind):
    model = tiny(**kind)
    given = inputs(model)
    wanted = logits(model, given)
    picture = "image" if kind["visual"] == "grid" else "image_feat"
    other = {**given, picture: given[picture] + 1}
    assert (logits(model, other) - wanted).abs().amax() > 1e-2
    other = {**given, "input_ids": (given["input_ids"] + 1).clamp(max=60)}
    assert (logits(model, other) - wanted).abs().amax() > 1e-2
    text = {name: value for name, value in given.items() if not name.startswith(("image", "num_"))}
    assert (logits(model, text) - wanted).abs().amax() > 1e-2  # the text alone is an input too


@torch.no_grad()
def test_concat_reads_a_picture_alone_and_the_gate_is_its_formula():
    model = tiny()
    given = inputs(model)
    output = model(image=given["image"], decoder_input_ids=given["decoder_input_ids"])
    assert output.logits["lm"].shape == (4, 8, 61)
    assert output.text_hidden.shape == (4, 0, 32) and output.image_hidden.shape == (4, 16, 32)
    gated = tiny(fusion="gated")
    text = {name: given[name] for name in ("input_ids", "text_lengths")}
    plain, mixed = gated.encode(**text).states, gated.encode(image=given["image"], **text).states
    visual = gated.visual(given["image"], None, gated.embeddings.token_type_embeddings.weight[1]).mean(1)
    for b, t in ((0, 6), (3, 2)):
        joined = torch.cat([plain[b, t], visual[b]])
        share = torch.sigmoid(gated.gate.gate.weight @ joined + gated.gate.gate.bias)
        wanted = plain[b, t] + share * (gated.gate.value.weight @ visual[b] + gated.gate.value.bias)
        torch.testing.assert_close(mixed[b, t], wanted, rtol=0, atol=1e-5)


def test_every_parameter_learns_and_the_table_is_shared():
    for kind in KINDS:
        model = tiny(0.1, **kind).train()
        given = inputs(model)
        logits(model, given).square().mean().backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # a bias of keys moves all scores of a row alike
        assert [name for name in idle if not name.endswith("key.bias")] == [], kind
    assert sum(p.shape == (61, 32) for p in model.parameters()) == 1


def test_it_takes_the_seq2seq_objective():
    model = tiny().train()
    given = inputs(model)
    target = torch.cat([given["decoder_input_ids"], torch.full((4, 1), -100)], 1)
    batch = PretrainingBatch(input_ids=given["input_ids"], text_lengths=given["text_lengths"], image=given["image"],
                             target_ids=target)
    loss = Pretraining(["seq2seq"])(model, batch)
    assert torch.isfinite(loss.total) and loss.total > 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tmp_path, kind, dtype):
    model = tiny(**kind).to(dtype).eval()
    assert save_pretrained(model, tmp_path) == "image_seq2seq"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert detect_format(tmp_path) == detect_format(tmp_path / "model.safetensors") == "image_seq2seq"
    given = inputs(model)
    for loaded in (vlmfast.load(tmp_path), load(tmp_path / "model.safetensors"), load(tmp_path, "vlmfast")):
        assert_same_model(loaded, model)
        assert not loaded.training and torch.equal(logits(loaded, given), logits(model, given))


def test_damaged_checkpoints_are_named(tmp_path):
    save_pretrained(tiny(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"decoder_layers": 2', '"decoder_layers": 3'))
    with pytest.raises(ValueError, match=r"missing keys: decoder\.2\.attention"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"grid"', '"pixels"'))
    with pytest.raises(ValueError, match="visual is 'pixels', must be one of"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="sizes are unknown; pass config="):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("change, text", [
    (dict(image=None, input_ids=None, text_lengths=None), "input_ids: is None like the picture"),
    (dict(image=torch.zeros(4, 3, 8, 8)), r"image: has shape \[4, 3, 8, 8\], must be \[B, 3, 16, 16\]"),
    (dict(image=torch.zeros(3, 3, 16, 16)), "input_ids: has 4 rows, the picture 3"),
    (dict(image_feat=torch.zeros(4, 5, 20)), "image_feat: given together with image"),
    (dict(decoder_input_ids=torch.zeros(4, 13, dtype=torch.long)), "tokens: has 13 columns, must have 1 to 12"),
    (dict(decoder_input_ids=torch.zeros(2, 3, dtype=torch.long)), "decoder_input_ids: has 2 rows, the input 4"),
    (dict(input_ids=torch.zeros(4, 13, dtype=torch.long)), "input_ids: has 13 tokens, must have at most 12"),
    (dict(input_ids=None), "input_ids: is None, must be given with attention_mask or text_lengths"),
    (dict(heads=("mlm",)), "heads: has 'mlm', this model has lm"),
], ids=str)  # fmt: skip
def test_wrong_input_is_named(change, text):
    model = tiny()
    with pytest.raises(ValueError, match=text):
        model(**{**inputs(model), **change})


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="image_size is 20, must be a multiple of 8"):
        ImageSeq2SeqConfig(image_size=20)
    with pytest.raises(ValueError, match="num_attention_heads is 7, must be a divisor"):
        ImageSeq2SeqConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match="bos_token_id is 101, must be less than vocab_size"):
        ImageSeq2SeqConfig(vocab_size=50)
    with pytest.raises(ValueError, match="input_ids: is None, must be given to a model with fusion 'gated'"):
        tiny(fusion="gated").encode(image=torch.zeros(1, 3, 16, 16))
    assert create("image-seq2seq-tiny", device="meta").config.hidden_size == 192
