"""Small ViLBERT and LXMERT models and inputs for the tests."""

import torch

from vlmfast.models import LXMERT, LXMERTConfig, ViLBERT, ViLBERTConfig
from vlmfast.models.vilbert import HEADS

VILBERT = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=24, v_feature_size=20, v_target_size=11, v_hidden_size=24, v_num_hidden_layers=2,
    v_num_attention_heads=3, v_intermediate_size=24, bi_hidden_size=24, bi_num_attention_heads=2,
    t_biattention_id=(1, 2), v_biattention_id=(0, 1), heads=HEADS, vqa_labels=17, gqa_labels=9,
)
LXMERT_SIZES = dict(
    vocab_size=97, hidden_size=32, num_attention_heads=4, intermediate_size=40, max_position_embeddings=16, l_layers=2,
    r_layers=1, x_layers=2, visual_feat_dim=20, num_qa_labels=9, num_object_labels=13, num_attr_labels=7,
)
# state-dict prefix of each head of a ViLBERT file -> name in the config
VILBERT_HEADS = {"cls": "pretraining", "vil_prediction": "vqa", "vil_prediction_gqa": "gqa",
                 "vil_binary_prediction": "binary", "vil_logit": "vil", "vil_tri_prediction": "tri",
                 "vision_logit": "vision", "linguisic_logit": "linguistic"}


def perturb(model, std=0.3):
    """Noise on every parameter, the zero-initialised ones too; evaluation mode."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=std)
    return model.eval()


def tiny_vilbert(std=0.3, **overrides) -> ViLBERT:
    return perturb(ViLBERT(ViLBERTConfig(**{**VILBERT, **overrides})), std)


def tiny_lxmert(std=0.3, **overrides) -> LXMERT:
    return perturb(LXMERT(LXMERTConfig(**{**LXMERT_SIZES, **overrides})), std)


def inputs(model, batch=4, tokens=9, regions=7) -> dict:
    """Ragged inputs: row i misses i tokens and i regions at the end."""
    vilbert = isinstance(model, ViLBERT)
    features = model.config.v_feature_size if vilbert else model.config.visual_feat_dim
    missing = torch.arange(batch)[:, None]
    return dict(
        input_ids=torch.randint(1, model.config.vocab_size, (batch, tokens)),
        image_feat=torch.randn(batch, regions, features),
        image_loc=torch.rand(batch, regions, 5 if vilbert else 4),
        token_type_ids=torch.randint(2, (batch, tokens)),
        attention_mask=(torch.arange(tokens) < tokens - missing).long(),
        image_mask=(torch.arange(regions) < regions - missing).long(),
    )


def with_lengths(given: dict) -> dict:
    """The same inputs with counts in place of masks."""
    given = dict(given)
    text, image = given.pop("attention_mask"), given.pop("image_mask")
    return {**given, "text_lengths": text.sum(1), "num_regions": image.sum(1)}


def rows_through(model, given: dict) -> set[int]:
    """How many rows of states the feed-forward networks of the model multiply."""
    found, hooks = set(), []
    for name, module in model.named_modules():
        if name.endswith(("intermediate.dense", "_inter.dense")):
            hooks.append(module.register_forward_hook(lambda _, args, __: found.add(args[0].shape[:-1].numel())))
    model(**given)
    for hook in hooks:
        hook.remove()
    return found


def assert_packs(model):
    """With counts, layers see only rows that exist; results and gradients are those with masks."""
    given = inputs(model)
    counts = with_lengths(given)
    texts, regions = int(counts["text_lengths"].sum()), int(counts["num_regions"].sum())
    assert rows_through(model, given) == {36, 28} and (texts, regions) == (30, 22)
    assert rows_through(model, counts) == {texts, regions}
    only_text = {**counts, "num_regions": None}
    assert rows_through(model, only_text) == {texts, 28}
    assert_same_live(model(**only_text), model(**{**given, "image_mask": None}),
                     {**given, "image_mask": torch.ones(4, 7)}, atol=2e-5)

    packed, padded, masked = model(**counts), model(**counts, output_attentions=True), model(**given)
    assert_same_live(packed, padded, given, atol=2e-5)
    for output in (packed, padded):
        assert output.text_hidden[given["attention_mask"] == 0].abs().max() == 0
        assert output.image_hidden[given["image_mask"] == 0].abs().max() == 0
    assert packed.text_to_image is None and len(padded.text_to_image) > 0

    def gradients(output):
        loss = output.text_hidden[given["attention_mask"] == 1].sin().sum()
        loss = loss + output.image_hidden[given["image_mask"] == 1].sin().sum()
        live = {name: value for name, value in model.named_parameters()}
        found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
        return dict(zip(live, found, strict=True))

    truth = {name: value for name, value in gradients(masked).items() if value is not None}
    largest, found = max(value.norm() for value in truth.values()), gradients(packed)
    for name, value in truth.items():  # key biases have gradient 0 up to rounding
        assert (found[name] - value).norm() < 2e-5 * value.norm() + 1e-6 * largest, name

    for i in range(4):
        one = {name: value[i : i + 1] for name, value in counts.items()}
        text, region = one["text_lengths"].item(), one["num_regions"].item()
        alone = model(one["input_ids"][:, :text], one["image_feat"][:, :region], one["image_loc"][:, :region],
                      one["token_type_ids"][:, :text])
        torch.testing.assert_close(packed.text_hidden[i, :text], alone.text_hidden[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(packed.image_hidden[i, :region], alone.image_hidden[0], rtol=0, atol=2e-5)


def assert_same_live(found, truth, given: dict, atol: float):
    """Two outputs agree wherever there is a token or a region."""
    text, image = given["attention_mask"].bool(), given["image_mask"].bool()
    for name, keep in (("text_hidden", text), ("image_hidden", image)):
        torch.testing.assert_close(getattr(found, name)[keep], getattr(truth, name)[keep], rtol=0, atol=atol)
    assert found.logits.keys() == truth.logits.keys()
    for name, value in truth.logits.items():
        keep = text if name in ("mlm", "linguistic") else image if value.ndim == 3 else slice(None)
        torch.testing.assert_close(found.logits[name][keep], value[keep], rtol=0, atol=atol,
                                   msg=lambda text, name=name: f"{name}: {text}")
