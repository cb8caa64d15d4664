"""Small VisualBERT, UNITER and VL-BERT models, inputs, and what must hold for all of them."""

import dataclasses

import torch
from models.two_stream_helpers import perturb, with_lengths

from vlmfast.models import UNITER, VLBERT, UNITERConfig, VisualBERT, VisualBERTConfig, VLBERTConfig, uniter, vlbert
from vlmfast.models.visualbert import HEADS

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
             max_position_embeddings=24, vqa_labels=17)
KINDS = {
    "visualbert": (VisualBERT, VisualBERTConfig, dict(visual_embedding_dim=20, heads=HEADS, classifier_labels=5)),
    "uniter": (UNITER, UNITERConfig, dict(img_dim=20, img_label_dim=11, type_vocab_size=3, heads=uniter.HEADS,
                                          classifier_labels=5)),
    "vlbert": (VLBERT, VLBERTConfig, dict(image_feat_dim=20, coord_dim=8, visual_region_classes=11, with_pooler=True,
                                          heads=vlbert.HEADS, classifier_labels=5)),
}
WORD_LOGITS, REGION_LOGITS = ("mlm",), ("mrfr", "mrc", "mvrc", "objects", "referring")


def tiny(kind: str, std=0.3, **overrides):
    model, config, sizes = KINDS[kind]
    return perturb(model(config(**{**SIZES, **sizes, **overrides})), std)


def inputs(model, batch=4, tokens=9, regions=7) -> dict:
    """Ragged inputs: row i misses i tokens and i regions at the end."""
    config = model.config
    boxes = {VisualBERT: None, UNITER: 7, VLBERT: 4}[type(model)]
    features = 20 if not isinstance(model, VisualBERT) else config.visual_embedding_dim
    missing = torch.arange(batch)[:, None]
    return dict(
        input_ids=torch.randint(1, config.vocab_size, (batch, tokens)),
        image_feat=torch.randn(batch, regions, features),
        image_loc=None if boxes is None else torch.rand(batch, regions, boxes) * (100 if boxes == 4 else 1),
        token_type_ids=torch.randint(2, (batch, tokens)),
        attention_mask=(torch.arange(tokens) < tokens - missing).long(),
        image_mask=(torch.arange(regions) < regions - missing).long(),
    )


def golden_model(kind: str, weights: dict, config: dict, **overrides):
    """A model with reference weights, by the names that both configurations share."""
    model, config_class, _ = KINDS[kind]
    names = {field.name for field in dataclasses.fields(config_class)}
    model = model(config_class(**{**{name: value for name, value in config.items() if name in names}, **overrides}))
    model.load_state_dict(weights)
    return model.eval()


def assert_near(found, truth, atol: float, name: str, keep=...):
    assert found.shape == truth.shape, name
    torch.testing.assert_close(found[keep], truth[keep], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


def assert_same_live(found, truth, given: dict, atol: float):
    """Two outputs agree wherever there is a token or a region."""
    text, image = given["attention_mask"].bool(), given["image_mask"].bool()
    assert_near(found.text_hidden, truth.text_hidden, atol, "text_hidden", text)
    assert_near(found.image_hidden, truth.image_hidden, atol, "image_hidden", image)
    assert found.logits.keys() == truth.logits.keys() and len(truth.logits)
    for name, value in truth.logits.items():
        keep = text if name in WORD_LOGITS else image if name in REGION_LOGITS else ...
        assert_near(found.logits[name], value, atol, name, keep)


def rows_through(model, given: dict) -> set[int]:
    """How many rows of states the feed-forward networks of the model multiply."""
    found, hooks = set(), []
    for name, module in model.named_modules():
        if name.endswith("intermediate.dense"):
            hooks.append(module.register_forward_hook(lambda _, args, __: found.add(args[0].shape[:-1].numel())))
    model(**given)
    for hook in hooks:
        hook.remove()
    return found


def assert_packs(model, extra: int = 0):
    """With counts, layers see only rows that exist; results and gradients are those with masks.

    extra: rows behind the regions that every example has.
    """
    given = inputs(model)
    counts = with_lengths(given)
    texts, regions = int(counts["text_lengths"].sum()), int(counts["num_regions"].sum())
    assert (texts, regions) == (30, 22)
    assert rows_through(model, given) == {4 * (9 + 7 + extra)}
    assert rows_through(model, counts) == {texts + regions + 4 * extra}
    assert rows_through(model, {**counts, "num_regions": None}) == {texts + 4 * (7 + extra)}
    assert rows_through(model, {**counts, "text_lengths": None}) == {4 * (9 + extra) + regions}
    everything = {**given, "image_mask": torch.ones(4, 7)}
    assert_same_live(model(**{**counts, "num_regions": None}), model(**everything), everything, atol=2e-5)

    packed, padded, masked = model(**counts), model(**counts, output_attentions=True), model(**given)
    assert_same_live(packed, masked, given, atol=2e-5)
    assert_same_live(padded, masked, given, atol=2e-5)
    for output in (packed, padded):
        assert output.text_hidden[given["attention_mask"] == 0].abs().max() == 0
        assert output.image_hidden[given["image_mask"] == 0].abs().max() == 0
    assert packed.attentions is None and len(padded.attentions) == 2
    mixed = {**given, "image_mask": None, "num_regions": counts["num_regions"]}
    assert_same_live(model(**mixed), masked, given, atol=2e-5)
    _assert_same_gradients(model, packed, masked, given)

    for i in range(4):
        one = {name: value[i : i + 1] for name, value in counts.items() if value is not None}
        text, region = one.pop("text_lengths").item(), one.pop("num_regions").item()
        alone = model(**{name: value[:, : region if name.startswith("image") else text] for name, value in one.items()},
                      heads=())
        assert_near(packed.text_hidden[i, :text], alone.text_hidden[0], 2e-5, f"text of {i}")
        assert_near(packed.image_hidden[i, :region], alone.image_hidden[0], 2e-5, f"regions of {i}")


def _assert_same_gradients(model, packed, masked, given):
    def gradients(output):
        loss = output.text_hidden[given["attention_mask"] == 1].sin().sum()
        loss = loss + output.image_hidden[given["image_mask"] == 1].sin().sum()
        live = dict(model.named_parameters())
        return dict(zip(live, torch.autograd.grad(loss, list(live.values()), allow_unused=True), strict=True))

    truth = {name: value for name, value in gradients(masked).items() if value is not None}
    largest, found = max(value.norm() for value in truth.values()), gradients(packed)
    assert len(truth) > 30
    for name, value in truth.items():  # key biases have gradient 0 up to rounding
        assert (found[name] - value).norm() < 2e-5 * value.norm() + 1e-6 * largest, name


def assert_attention_maps(model, extra: int = 0):
    """Maps of every layer, rows summing to 1, nothing on masked keys; the two cross parts are cut out of them."""
    given = inputs(model)
    output = model(**given, output_attentions=True)
    size = 9 + 7 + extra
    keys = torch.cat([given["attention_mask"], given["image_mask"], torch.ones(4, extra)], dim=1)
    assert len(output.attentions) == 2
    for probs in output.attentions:
        assert probs.shape == (4, 4, size, size)
        torch.testing.assert_close(probs.sum(-1), torch.ones(4, 4, size))
        assert (probs * (1 - keys)[:, None, None]).abs().max() == 0
    assert torch.equal(output.text_to_image[1], output.attentions[1][:, :, :9, 9:16])
    assert torch.equal(output.image_to_text[0], output.attentions[0][:, :, 9:16, :9])
    plain = model(**given)
    assert plain.attentions is None and plain.text_to_image is None
    assert_same_live(output, plain, given, atol=2e-5)
    counted = model(**with_lengths(given), output_attentions=True).attentions
    rows = keys.bool()[:, None, :, None].expand_as(counted[0])
    for found, truth in zip(counted, output.attentions, strict=True):
        torch.testing.assert_close(found[rows], truth[rows], rtol=0, atol=2e-6)


def assert_padding_is_not_read(model):
    given = inputs(model)
    text, image = given["attention_mask"], given["image_mask"]
    changed = {**given, "input_ids": torch.where(text == 1, given["input_ids"], 5),
               "image_feat": given["image_feat"] + 9 * (1 - image)[..., None]}
    assert_same_live(model(**changed), model(**given), given, atol=0)
    changed = with_lengths(changed)
    changed["image_feat"][1, -1] = float("nan")
    for maps in (False, True):  # packed and padded
        output = model(**changed, output_attentions=maps)
        assert_same_live(output, model(**with_lengths(given)), given, atol=2e-5)
        loss = output.text_hidden.sin().sum() + output.image_hidden.sin().sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert all(value is None or value.isfinite().all() for value in found)


def assert_one_text_serves_all_images(model):
    given = inputs(model)
    text = [name for name, value in given.items() if value is not None and not name.startswith("image")]
    one = {**given, **{name: given[name][1:2] for name in text}}
    copies = {**given, **{name: given[name][1:2].expand(4, -1) for name in text}}
    assert_same_live(model(**one), model(**copies), copies, atol=2e-5)
    assert_same_live(model(**{**given, **with_lengths(copies), **{name: one[name] for name in ("input_ids",
                     "token_type_ids")}, "attention_mask": None, "image_mask": None,
                     "text_lengths": one["attention_mask"].sum(1)}), model(**copies), copies, atol=2e-5)


def without_gradient(model) -> list[str]:
    """Names of the parameters that a backward pass left out."""
    return [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]


BAD_INPUTS = [
    (dict(input_ids=torch.rand(4, 9)), "input_ids: is torch.float32, must be integers"),
    (dict(input_ids=torch.ones(3, 9, dtype=torch.long), attention_mask=None),
     "input_ids: has 3 rows, image_feat 4; must be as many"),
    (dict(input_ids=torch.ones(4, 25, dtype=torch.long), attention_mask=None, token_type_ids=None),
     r"input_ids: has 25 tokens, must have at most 2\d"),
    (dict(token_type_ids=torch.zeros(4, 8, dtype=torch.long)), r"token_type_ids: has shape \[4, 8\], must be \[4, 9\]"),
    (dict(image_feat=torch.rand(4, 7, 21)), r"image_feat: has shape \[4, 7, 21\], must be \[B, R, 20\]"),
    (dict(attention_mask=torch.ones(4, 8)), r"attention_mask: has shape \[4, 8\], must be \[4, 9\]"),
    (dict(image_mask=torch.full((4, 7), -10000.0)), "image_mask: holds values other than 0 and 1"),
    (dict(text_lengths=torch.ones(4, dtype=torch.long)), "text_lengths: given together with attention_mask"),
    (dict(num_regions=torch.tensor([1, 2, 3, 8]), image_mask=None), r"num_regions: runs from 1 to 8, must lie in 0..7"),
    (dict(num_regions=torch.ones(4), image_mask=None), "num_regions: is torch.float32, must be integers"),
    (dict(text_lengths=torch.tensor([1, 2]), attention_mask=None), r"text_lengths: has shape \[2\], must be \[4\]"),
    (dict(image_feat=None), "image_feat: is None, must be given with image_mask"),
    (dict(heads=("vqb",)), "heads: has 'vqb', this model has mlm, "),
]
BAD_SETTINGS = [
    (dict(hidden_size=33), "num_attention_heads is 4, must be a divisor of hidden_size, 33"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0, must be an integer of at least 1"),
    (dict(vocab_size=2.0), "vocab_size is 2.0, must be an integer"),
    (dict(hidden_act="tanh"), "hidden_act is 'tanh', must be one of"),
    (dict(heads=("vqa", "ocr")), "heads is .'vqa', 'ocr'., must be a selection"),
    (dict(hidden_dropout_prob=1.0), "hidden_dropout_prob is 1.0, must be less than 1"),
]
