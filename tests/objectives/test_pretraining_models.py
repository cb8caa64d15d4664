"""`Pretraining` on ViLBERT and LXMERT, and its errors."""

from dataclasses import replace

import pytest
import torch
from pretraining_helpers import B, C, Puppet, R, ViLBERT, puppet_batch, real

from vlmfast.objectives import PRESETS, Conventions, Heads, Pretraining, PretrainingBatch
from vlmfast.objectives.models import WRAPPERS

MASK, UNITER_HEADS = 3, ("mlm", "itm", "mrc", "mrfr")


def run(names, model, batch, **options):
    return Pretraining(names, mask_id=MASK, **options)(model, batch)


SERVED = {
    "ViLBERT": (["mlm", "mlm_whole_word", "nsp", "mrc", "mrc_kl", "itm", "contrastive"], {}),
    "ViLBERT-features": (["mlm", "mrfr", "mrm_nce", "itm"], {"v_target_size": 20, "visual_target": 1}),
    "LXMERT": (["mlm", "mlm_whole_word", "nsp", "mrfr", "mrc", "mrc_kl", "mrc_attributes", "mrm_nce", "itm", "wra",
                "contrastive"], {}),
}


@pytest.mark.parametrize("options", [{}, {"negatives": "hard"}, {"preset": "uniter"}, {"preset": "vlbert"}], ids=str)
@pytest.mark.parametrize("kind", SERVED)
def test_real_models_learn_from_every_objective_they_serve(kind, options):
    names, overrides = SERVED[kind]
    model, batch = real(kind.split("-")[0], **overrides)
    preset = options.get("preset") or kind.split("-")[0].lower()
    options = {**options, "preset": replace(PRESETS[preset], word_rate=0.4, region_rate=0.4)}
    loss = Pretraining(names, mask_id=5, **options)(model, batch)
    assert list(loss.parts) == names and all(torch.isfinite(part) for part in loss.parts.values())
    for name, part in loss.parts.items():
        gradients = torch.autograd.grad(part, list(model.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in gradients), name


@pytest.mark.parametrize("kind", ["ViLBERT", "LXMERT"])
def test_contrastive_vectors_do_not_see_the_other_side(kind):
    from vlmfast.objectives.models import image_vectors, text_vectors

    model, batch = real(kind)
    changed = batch.pair(torch.arange(4), torch.tensor([2, 3, 0, 1]))
    torch.testing.assert_close(text_vectors(model, changed), text_vectors(model, batch))
    torch.testing.assert_close(image_vectors(model, changed), image_vectors(model, batch)[[2, 3, 0, 1]])
    for vectors in (text_vectors(model, batch), image_vectors(model, batch)):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
        assert (vectors @ vectors.T).fill_diagonal_(0).max() < 0.9999


def test_real_heads_that_do_not_fit_are_named():
    model, batch = real("ViLBERT")
    with pytest.raises(ValueError, match=r"'mrfr': image_feat has shape \[4, 7, 20\], head 'image' gives \[4, 7, 11\]"):
        Pretraining(["mrfr"], mask_id=5)(model, batch)
    with pytest.raises(ValueError, match="text is 32 wide, image 24"):
        Pretraining(["wra"], mask_id=5)(model, batch)
    model, batch = real("LXMERT", visual_feat_loss=False)
    with pytest.raises(ValueError, match="objective 'mrfr' needs 'feat', LXMERT has 'mlm', 'matched', 'obj'"):
        Pretraining(["mrfr"], mask_id=5)(model, batch)


def test_a_wrapped_model_is_known_by_its_class():
    class OptimizedModule(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, **given):
            return self._orig_mod(**given)

    model, batch = real("LXMERT")
    names = ["mlm", "mrc", "itm", "contrastive"]

    def losses(model):
        return Pretraining(names, mask_id=5, generator=torch.Generator().manual_seed(1))(model, batch).parts

    for name, part in losses(OptimizedModule(model)).items():
        assert torch.equal(part, losses(model)[name]), name
    with pytest.raises(ValueError, match="LXMERT's does not"):
        Pretraining(["prefix_lm"])(OptimizedModule(model), batch)
    assert torch.nn.parallel.DistributedDataParallel.__name__ in WRAPPERS


@pytest.mark.parametrize("kind", ["ViLBERT", "LXMERT"])
def test_a_step_of_training_lowers_the_loss(kind):
    model, batch = real(kind, std=0.02)
    names = ["mlm", "mrc_kl", "itm"]
    batch = replace(batch, matched=torch.tensor([True, False, True, False]))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    objective = Pretraining(names, mask_id=5, preset=kind.lower(), generator=torch.Generator())
    values = []
    for _ in range(8):
        objective.generator.manual_seed(3)
        loss = objective(model, batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("arguments, message", [
    ((["mlm", "mrfrr"],), "unknown objective 'mrfrr', must be one of mlm, mlm_whole_word, nsp, mrfr"),
    (([],), "objectives is empty, must name some of mlm"),
])
def test_unknown_objectives_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"Pretraining: {message}"):
        Pretraining(*arguments)
    with pytest.raises(TypeError, match="objectives is 'mlm', must be a list"):
        Pretraining("mlm")
    for options, text in ((dict(preset="bert"), "preset is 'bert', must be one of vilbert, lxmert, uniter"),
                          (dict(weights={"mlmm": 1.0}), "unknown objective in weights 'mlmm'"),
                          (dict(negatives="soft"), "negatives is 'soft', must be one of in_batch, hard, given"),
                          (dict(temperature=0.0), "temperature is 0.0")):
        with pytest.raises(ValueError, match=text):
            Pretraining(["mlm"], **options)


@pytest.mark.parametrize("names, model, message", [
    (["mrfr"], Puppet("mlm", "itm"), "objective 'mrfr' needs 'mrfr', Puppet has 'mlm', 'itm'"),
    (["mrc_attributes"], Puppet("mlm"), "needs a head that this architecture does not have, Puppet has 'mlm'"),
    (["mlm"], Puppet(), "objective 'mlm' needs 'mlm', Puppet has no heads"),
    (["prefix_lm"], Puppet("mlm"), "needs a model whose forward takes prefix_lengths, Puppet's does not"),
    (["seq2seq"], Puppet("mlm"), "takes decoder_input_ids or prefix_lengths, Puppet's does not"),
    (["itm"], ViLBERT("mlm", "itm"), "objective 'itm' needs 'nsp', ViLBERT has 'mlm', 'itm'"),
], ids=str)
def test_objectives_a_model_cannot_serve_are_named(names, model, message):
    with pytest.raises(ValueError, match=f"Pretraining: .*{message}"):
        run(names, model, puppet_batch())
    assert not model.calls


@pytest.mark.parametrize("names, missing, options", [
    (["mlm_whole_word"], "words", {}), (["nsp"], "next_sentence", {}), (["mrfr"], "image_feat", {}),
    (["mrc_kl"], "region_probs", {}), (["mrc"], "region_probs", {}), (["itm"], "matched", {"negatives": "given"}),
    (["mrc"], "region_classes", {"preset": "lxmert"}), (["mlm"], "input_ids", {}), (["itm"], "image_feat", {}),
    (["contrastive"], "image_feat", {}), (["mrc_attributes"], "region_attributes",
                                          {"heads": Heads(region_attribute="mrc")}),
])
def test_missing_fields_are_named(names, missing, options):
    batch = puppet_batch(**{missing: None, **({"region_classes": None} if names == ["mrc"] else {})})
    with pytest.raises(ValueError, match=f"Pretraining: objective '{names[0]}' needs {missing}, the batch has none"):
        run(names, Puppet(*UNITER_HEADS), batch, **options)


def test_other_bad_input_is_named():
    model = Puppet(*UNITER_HEADS)
    with pytest.raises(ValueError, match="mask_id is 97, must lie in 0..96"):
        Pretraining(["mlm"], mask_id=97)(model, puppet_batch())
    with pytest.raises(ValueError, match=r"region_probs has shape \[4, 6, 8\], head 'mrc' gives \[4, 6, 7\]"):
        run(["mrc_kl"], model, puppet_batch(region_probs=torch.rand(B, R, C + 1)))
    one = puppet_batch().pair(torch.tensor([2]), torch.tensor([2]))
    for negatives in ("in_batch", "hard"):
        with pytest.raises(ValueError, match=r"1 example\(s\), must have at least 2"):
            run(["itm"], model, one, negatives=negatives)
    with pytest.raises(ValueError, match="contrastive features need texts and images alone"):
        run(["contrastive"], model, puppet_batch(), heads=Heads(alone=False))
    with pytest.raises(ValueError, match="images are 9 wide, texts 8"):
        run(["contrastive"], Puppet(image_width=9), puppet_batch())
    with pytest.raises(ValueError, match="Conventions: replaces is 'both', must be one of"):
        Conventions(replaces="both")


def test_batches_check_their_fields():
    ids = torch.ones(2, 3, dtype=torch.long)
    for given, error, message in (
        ({}, ValueError, "input_ids, image_feat and image are None"),
        (dict(input_ids=ids, image_feat=torch.ones(3, 1, 1)), ValueError, "image_feat has 3 examples, input_ids 2"),
        (dict(input_ids=ids, text_lengths=torch.ones(2), attention_mask=ids), ValueError, "text_lengths given"),
        (dict(input_ids=ids, matched=torch.ones(2)), TypeError, "matched is torch.float32, must be bool"),
    ):
        with pytest.raises(error, match=f"PretrainingBatch: {message}"):
            PretrainingBatch(**given)
    batch = puppet_batch()
    mixed = batch.pair(torch.tensor([1, 1, 0]), torch.tensor([0, 2, 3]))
    assert len(mixed) == 3 and torch.equal(mixed.words, batch.words[[1, 1, 0]])
    assert torch.equal(mixed.region_probs, batch.region_probs[[0, 2, 3]]) and mixed.matched is None
    alone = batch.text_alone()
    assert alone.image_feat is None and alone.region_probs is None and alone.words is batch.words
    assert batch.image_alone().input_ids is None and batch.to("cpu").image_loc is batch.image_loc
