"""Small VD-BERT, Pixel-BERT and ImageBERT models, inputs, and what their tests compare alike."""

import pytest
import torch
from models.two_stream_helpers import perturb

from vlmfast.checkpoints import load_bert_text
from vlmfast.models import VDBERT, ImageBERT, ImageBERTConfig, PixelBERT, PixelBERTConfig, VDBERTConfig

BERT = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
VDBERT_SIZES = dict(**BERT, max_position_embeddings=40, len_vis_input=7, vis_feat_dim=20, mask_word_id=4)
PIXELBERT_SIZES = dict(
    **BERT, max_position_embeddings=20, max_grid_row_position_embeddings=5, max_grid_col_position_embeddings=6,
    backbone="resnet50", backbone_layers=(1, 1, 1, 1), backbone_width=4, backbone_channel_in_size=128,
    pixel_random_sampling_size=5, num_labels=9, heads=("pretraining", "vqa", "rank", "classifier"),
    classifier_images=2,
)
IMAGEBERT_SIZES = dict(
    **BERT, max_position_embeddings=24, visual_feat_dim=20, num_object_labels=11, sep_token_id=2,
    heads=("pretraining", "rank", "classifier"),
)


def tiny_vdbert(std=0.3, **overrides) -> VDBERT:
    return perturb(VDBERT(VDBERTConfig(**{**VDBERT_SIZES, **overrides})), std)


def tiny_pixelbert(std=0.3, **overrides) -> PixelBERT:
    return perturb(PixelBERT(PixelBERTConfig(**{**PIXELBERT_SIZES, **overrides})), std)


def tiny_pixelbert_on_maps(std=0.3, **overrides) -> PixelBERT:
    """Without a backbone: maps of 16 channels are given."""
    return tiny_pixelbert(std, backbone="none", backbone_channel_in_size=16, **overrides)


def tiny_imagebert(std=0.3, **overrides) -> ImageBERT:
    return perturb(ImageBERT(ImageBERTConfig(**{**IMAGEBERT_SIZES, **overrides})), std)


def noisy(model, std=0.1):
    """Noise on every parameter and on the statistics of every norm; evaluation mode."""
    perturb(model, std)
    for name, value in model.named_buffers():
        if value.is_floating_point():
            value.add_(torch.randn_like(value), alpha=0.1)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return model


def _text(batch: int, tokens: int) -> dict:
    """Row i misses i tokens at the end."""
    return dict(
        input_ids=torch.randint(5, 97, (batch, tokens)),
        token_type_ids=torch.randint(2, (batch, tokens)),
        attention_mask=(torch.arange(tokens) < tokens - torch.arange(batch)[:, None]).long(),
    )


def vdbert_inputs(batch=4, tokens=18) -> dict:
    return dict(**_text(batch, tokens), image_feat=torch.randn(batch, 7, 20), image_loc=torch.rand(batch, 7, 7))


def pixelbert_inputs(batch=4, tokens=9) -> dict:
    """Maps of 3 x 4 cells, of which row i misses 2 i at the end."""
    mask = (torch.arange(12) < 12 - 2 * torch.arange(batch)[:, None]).long()
    return dict(**_text(batch, tokens), image_feat=torch.randn(batch, 16, 6, 8), image_mask=mask)


def imagebert_inputs(batch=4, tokens=9, regions=7) -> dict:
    """Row i misses i regions at the end."""
    mask = (torch.arange(regions) < regions - torch.arange(batch)[:, None]).long()
    return dict(**_text(batch, tokens), image_feat=torch.randn(batch, regions, 20),
                image_loc=torch.rand(batch, regions, 5), image_mask=mask)


def with_counts(given: dict) -> dict:
    """The same inputs with counts in place of masks."""
    names = {"attention_mask": "text_lengths", "image_mask": "num_regions"}
    return {names.get(name, name): value.sum(1) if name in names else value for name, value in given.items()}


def assert_same_rows(found, truth, text, image=None, atol=2e-5):
    """Two outputs agree wherever a row exists; text [B, T], image [B, R] masks, None where text is all."""
    keeps = {"text_hidden": text.bool(), "mlm": text.bool()}
    if image is not None:
        keeps |= dict.fromkeys(("image_hidden", "moc", "mrfr"), image.bool())
    assert found.logits.keys() == truth.logits.keys()
    pairs = {name: (value, truth.logits[name]) for name, value in found.logits.items()}
    pairs |= {name: (getattr(found, name), getattr(truth, name)) for name in ("text_hidden", "image_hidden", "pooled")
              if name != "image_hidden" or image is not None}
    for name, (a, b) in pairs.items():
        keep = keeps.get(name, ...)
        torch.testing.assert_close(a[keep], b[keep], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_gradients(model, given: dict, text):
    """Gradients with counts are those with masks, for every parameter."""
    def gradients(arguments):
        output = model(**arguments)
        loss = output.text_hidden[text.bool()].sin().sum() + output.pooled.square().sum()
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    truth, found = gradients(given), gradients(with_counts(given))
    largest = max(value.norm() for value in truth if value is not None)
    assert sum(value is not None for value in truth) > 30
    for (name, _), a, b in zip(model.named_parameters(), found, truth, strict=True):
        assert (a is None) == (b is None), name
        assert b is None or (a - b).norm() < 2e-5 * b.norm() + 1e-6 * largest, name


def assert_attention_maps(output, embedded, layer, keys):
    """Maps of both layers over keys [B, S]: rows sum to 1, nothing on masked keys, and the first layer's are the
    softmax of its own scores over `embedded` [B, S, C]."""
    batch, size = keys.shape
    assert [probs.shape for probs in output.attentions] == [(batch, 4, size, size)] * 2
    for probs in output.attentions:
        torch.testing.assert_close(probs.sum(-1), torch.ones(batch, 4, size))
        assert (probs * (1 - keys)[:, None, None]).abs().max() == 0
    own = layer.attention.self
    query, key = (part(embedded).unflatten(-1, (4, 8)).transpose(1, 2) for part in (own.query, own.key))
    scores = query @ key.mT / 8**0.5 + (1 - keys)[:, None, None] * -10000.0
    torch.testing.assert_close(output.attentions[0], scores.softmax(-1))


def assert_drops_reproducibly(model, given: dict):
    """Training mode is random, and the same for the same seed."""
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model.train()(**given).text_hidden)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def assert_every_parameter_learns(model, output):
    sum(value.square().sum() for value in output.logits.values()).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert not without


def save_tiny_bert(folder, **overrides):
    """A BERT of transformers, saved to a folder; skips where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertForPreTraining(transformers.BertConfig(**BERT, **overrides))
    perturb(bert, 0.05).save_pretrained(folder)
    return bert


def assert_text_equals_bert(model, bert, folder, pair_head: str, **options):
    """A model whose text stream was read from the folder is that BERT on text alone, except for the pair head."""
    load_bert_text(model, folder, **options)
    given = _text(4, 9)
    with torch.no_grad():
        found = model(**given)
        truth = bert(**given)
        trunk = bert.bert(**given)
    text = given["attention_mask"].bool()
    torch.testing.assert_close(found.text_hidden[text], trunk.last_hidden_state[text], rtol=0, atol=4e-6)
    torch.testing.assert_close(found.pooled, trunk.pooler_output, rtol=0, atol=4e-6)
    torch.testing.assert_close(found.logits["mlm"][text], truth.prediction_logits[text], rtol=0, atol=4e-6)
    assert not torch.allclose(found.logits[pair_head], truth.seq_relationship_logits, atol=1e-3)
