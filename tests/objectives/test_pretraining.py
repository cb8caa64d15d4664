"""`Pretraining`: what each objective hides, asks and divides by, against literal formulas on stored scores."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nn_f
from pretraining_helpers import (
    LXMERT,
    MASK,
    B,
    C,
    CausalPuppet,
    DecoderPuppet,
    F,
    Puppet,
    R,
    T,
    ViLBERT,
    negative_log,
    puppet_batch,
)

from vlmfast.objectives import PRESETS, Pretraining
from vlmfast.objectives.masking import box_iou, mask_regions
from vlmfast.objectives.pretraining import Step, passes
from vlmfast.objectives.regions import sample_region_negatives
from vlmfast.ops import info_nce
from vlmfast.ops.reference.alignment import optimal_transport_distance

UNITER_HEADS = ("mlm", "itm", "mrc", "mrfr")


def run(names, model, batch, **options):
    return Pretraining(names, mask_id=MASK, **options)(model, batch)


def masked_words(call, batch):
    """(example, position) of changed tokens; with a split of (1, 0, 0) those are all that were selected."""
    return [tuple(x) for x in (call.input_ids != batch.input_ids).nonzero().tolist()]


ONLY_MASK = replace(PRESETS["uniter"], word_split=(1.0, 0.0, 0.0), word_rate=0.4, region_rate=0.4)


@pytest.mark.parametrize("name", ["mlm", "mlm_whole_word"])
def test_masked_words_are_predicted_from_what_was_hidden(name):
    model, batch = Puppet(*UNITER_HEADS), puppet_batch()
    loss = run([name], model, batch, preset=ONLY_MASK)
    (call,) = model.calls
    places = masked_words(call, batch)
    assert call.heads == ("mlm",) and places and all(call.input_ids[p] == MASK for p in places)
    assert all(0 < t < batch.text_lengths[b] for b, t in places), "no special token, no padding"
    if name == "mlm_whole_word":
        chosen = set(places)
        partner = {t: t + 1 if t % 2 == 0 else t - 1 for t in range(T)}
        for b, t in places:
            assert (b, partner[t]) in chosen or partner[t] == 0 or partner[t] >= batch.text_lengths[b]
    truth = sum(negative_log(model.scores["mlm"][p], batch.input_ids[p]) for p in places) / len(places)
    torch.testing.assert_close(loss.parts[name], truth)
    torch.testing.assert_close(loss.total, truth)
    assert torch.equal(call.image_feat, batch.image_feat), "UNITER's words see whole images"


def test_words_without_special_field_spare_special_ids():
    model, batch = Puppet("mlm"), puppet_batch(special=None)
    batch.input_ids[:, 5] = 11
    run(["mlm"], model, batch, preset=replace(ONLY_MASK, word_rate=1.0), special_ids=(11,))
    keep = torch.arange(T) < batch.text_lengths[:, None]
    assert torch.equal(model.calls[0].input_ids == MASK, keep & (batch.input_ids != 11))


REGION_LOSSES = {
    "mrfr": lambda z, batch, i, j: (z - batch.image_feat[i, j]).square().sum() / F,
    "mrc": lambda z, batch, i, j: negative_log(z, 1 + int(batch.region_probs[i, j, 1:].argmax())),
    "mrc_kl": lambda z, batch, i, j: (batch.region_probs[i, j]
                                      * (batch.region_probs[i, j].log() - z.log_softmax(-1))).sum() / C,
}


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_masked_regions_are_uniters(name):
    model, batch = Puppet(*UNITER_HEADS), puppet_batch()
    batch.image_feat[1, 5] = batch.region_probs[1, 5] = torch.nan  # padding
    loss = run([name], model, batch, preset=ONLY_MASK)
    (call,) = model.calls
    head = "mrfr" if name == "mrfr" else "mrc"
    assert call.heads == (head,) and torch.equal(call.input_ids, batch.input_ids)
    places = [tuple(x) for x in call.image_masked.nonzero().tolist()]
    assert len(places) >= B and all(j < batch.num_regions[i] and not call.image_feat[i, j].any() for i, j in places)
    assert {i for i, _ in places} == set(range(B)), "at least one a picture"
    truth = sum(REGION_LOSSES[name](model.scores[head][p], batch, *p) for p in places) / len(places)
    torch.testing.assert_close(loss.parts[name], truth)


def test_region_classes_stand_in_for_the_distribution():
    model, batch = Puppet(*UNITER_HEADS), puppet_batch(region_probs=None)
    loss = run(["mrc"], model, batch, preset=ONLY_MASK)
    places = [tuple(x) for x in model.calls[0].image_masked.nonzero().tolist()]
    truth = sum(negative_log(model.scores["mrc"][p], batch.region_classes[p]) for p in places) / len(places)
    torch.testing.assert_close(loss.total, truth)


def test_nce_scores_features_against_sampled_ones():
    model, batch = Puppet(*UNITER_HEADS), puppet_batch()
    loss = run(["mrm_nce"], model, batch, preset=replace(ONLY_MASK, num_negative=10),
               generator=torch.Generator().manual_seed(4))
    places = [tuple(x) for x in model.calls[0].image_masked.nonzero().tolist()]
    generator = torch.Generator().manual_seed(4)
    mask_regions(batch.image_feat, batch.image_keep, rate=0.4, split=(1.0, 0.0, 0.0), generator=generator)
    index, rows, total = sample_region_negatives(B, R, 10, generator=generator), batch.image_feat.flatten(0, 1), 0
    for i, j in places:
        samples = torch.cat([batch.image_feat[i, j][None], rows[index[i, j]]])
        total = total + negative_log(samples @ model.scores["mrfr"][i, j], 0)
    torch.testing.assert_close(loss.total, total / len(places))


def test_lxmert_counts_every_region_by_its_confidence():
    model, batch = LXMERT("mlm", "matched", "obj", "attr", "feat"), puppet_batch()
    batch.region_classes[1, 5] = batch.region_attributes[1, 5] = 10**6  # padding
    names = ["mrc", "mrc_attributes", "mrfr"]
    loss = run(names, model, batch, preset=replace(PRESETS["lxmert"], region_split=(1.0, 0.0, 0.0), region_rate=0.4))
    (call,) = model.calls
    assert set(call.heads) == {"obj", "attr", "feat"}
    hidden, real = call.image_masked, batch.image_keep.nonzero().tolist()
    for name, head, labels, confidence in (("mrc", "obj", batch.region_classes, batch.region_confidence),
                                           ("mrc_attributes", "attr", batch.region_attributes,
                                            batch.attribute_confidence)):
        total = sum(confidence[i, j] * negative_log(model.scores[head][i, j], labels[i, j]) for i, j in real)
        torch.testing.assert_close(loss.parts[name], total / (B * R) / 0.15)
    each = [nn_f.smooth_l1_loss(model.scores["feat"][i, j], batch.image_feat[i, j])
            for i, j in hidden.nonzero().tolist()]
    torch.testing.assert_close(loss.parts["mrfr"], sum(each) / (B * R) / 0.15)


def test_vilbert_masks_jointly_and_ignores_mismatched_pairs():
    model = ViLBERT("mlm", "image", "nsp")
    batch = puppet_batch(matched=torch.tensor([True, False, True, True]))
    rules = replace(PRESETS["vilbert"], word_split=(1.0, 0.0, 0.0), word_rate=0.5, region_split=(1.0, 0.0, 0.0),
                    region_rate=0.5)
    loss = run(["mlm", "mrc_kl", "itm"], model, batch, preset=rules)
    (call,) = model.calls
    assert set(call.heads) == {"mlm", "image", "nsp"}
    words = [p for p in masked_words(call, batch) if p[0] != 1]
    truth = sum(negative_log(model.scores["mlm"][p], batch.input_ids[p]) for p in words) / len(words)
    torch.testing.assert_close(loss.parts["mlm"], truth)
    hidden = [tuple(x) for x in call.image_masked.nonzero().tolist()]
    places = [p for p in hidden if p[0] != 1]
    assert len(hidden) > len(places) > 0 and all(j > 0 for _, j in hidden), "row 0 is the whole image"
    truth = sum(REGION_LOSSES["mrc_kl"](model.scores["image"][p], batch, *p) * C for p in places) / len(places)
    torch.testing.assert_close(loss.parts["mrc_kl"], truth)
    pair = [negative_log(model.scores["nsp"][i], 0 if batch.matched[i] else 1) for i in range(B)]
    torch.testing.assert_close(loss.parts["itm"], sum(pair) / B)


def test_vilberts_whole_image_is_the_mean_of_what_nothing_masked_overlaps():
    model, batch, near = ViLBERT("mlm", "image", "nsp"), puppet_batch(), 0
    batch.image_loc[:, 2] = batch.image_loc[:, 1]  # one betrays the other
    rules = replace(PRESETS["vilbert"], region_split=(1.0, 0.0, 0.0), region_rate=0.3)
    overlaps = box_iou(batch.image_loc[..., :4]) > 0.4
    for _ in range(5):
        run(["mrc_kl"], model, batch, preset=rules)
        call = model.calls[-1]
        for i in range(B):
            rows = range(1, int(batch.num_regions[i]))
            hidden = [j for j in rows if call.image_masked[i, j]]
            out = [j for j in rows if any(overlaps[i, j, k] for k in hidden)]
            near += len(out) - len(hidden)
            mean = sum(call.image_feat[i, j] for j in rows) / max(len(rows) - len(out), 1)
            torch.testing.assert_close(call.image_feat[i, 0], mean)
            assert all(torch.equal(call.image_feat[i, j], batch.image_feat[i, j]) for j in rows if j not in hidden)
    assert near > 0


def test_vlbert_predicts_the_distribution_and_averages_the_rest():
    model, batch = Puppet("mlm", "mrc", "itm"), puppet_batch()
    rules = replace(PRESETS["vlbert"], region_split=(1.0, 0.0, 0.0), region_rate=0.5)
    loss = run(["mrc"], model, batch, preset=rules)
    call = model.calls[0]
    places = [tuple(x) for x in call.image_masked.nonzero().tolist()]
    total = sum(-(batch.region_probs[p] * model.scores["mrc"][p].log_softmax(-1)).sum() for p in places)
    torch.testing.assert_close(loss.total, total / len(places))
    for i in range(B):
        rest = [batch.image_feat[i, j] for j in range(1, int(batch.num_regions[i])) if (i, j) not in places]
        if rest:
            torch.testing.assert_close(call.image_feat[i, 0], sum(rest) / (len(rest) + 1e-5))


def found_pairs(call, batch):
    """Which text and which image of the batch each pair of a call has."""
    def of(rows, table):
        return [next(i for i in range(B) if torch.equal(row, table[i])) for row in rows]

    return list(zip(of(call.input_ids, batch.input_ids), of(call.image_feat, batch.image_feat), strict=True))


@pytest.mark.parametrize("replaces", ["text", "image"])
def test_in_batch_mismatches_exchange_one_side(replaces):
    model, batch = Puppet("itm"), puppet_batch()
    rules = replace(PRESETS["uniter"], replaces=replaces, match_rate=0.7)
    seen = set()
    for _ in range(20):
        loss = run(["itm"], model, batch, preset=rules)
        pairs = found_pairs(model.calls[-1], batch)
        assert [pair[replaces == "text"] for pair in pairs] == list(range(B)), "the other side stays"
        each = [negative_log(model.scores["itm"][i], int(t == j)) for i, (t, j) in enumerate(pairs)]
        torch.testing.assert_close(loss.total, sum(each) / B)
        seen |= set(pairs)
        lengths = model.calls[-1].text_lengths.tolist()
        assert lengths == [int(batch.text_lengths[t]) for t, _ in pairs], "lengths move with their texts"
    assert len(seen) == B * B
    grouped = replace(batch, groups=torch.tensor([1, 1, 2, 2]))
    for _ in range(20):
        run(["itm"], model, grouped, preset=rules)
        assert {(0, 1), (1, 0), (2, 3), (3, 2)}.isdisjoint(found_pairs(model.calls[-1], batch))


def test_hard_negatives_come_from_the_contrastive_similarity():
    model, batch = Puppet("itm"), puppet_batch()
    loss = run(["itm", "contrastive"], model, batch, negatives="hard", temperature=1e-3)
    image_call, text_call, call, *rest = model.calls
    assert not rest, "the two passes serve both objectives"
    assert image_call.input_ids is None and text_call.image_feat is None
    keep = batch.image_keep[..., None]
    image = nn_f.normalize((model.image[:B] * keep).sum(1) / keep.sum(1), dim=-1)
    text = nn_f.normalize(model.text[:B, 0], dim=-1)
    similarity = (image @ text.T).fill_diagonal_(-9)
    pairs = found_pairs(call, batch)
    assert pairs[:B] == [(i, i) for i in range(B)]
    assert pairs[B : 2 * B] == [(int(similarity[i].argmax()), i) for i in range(B)]
    assert pairs[2 * B :] == [(i, int(similarity[:, i].argmax())) for i in range(B)]
    each = [negative_log(model.scores["itm"][i], int(i < B)) for i in range(3 * B)]
    torch.testing.assert_close(loss.parts["itm"], sum(each) / (3 * B))
    logits = (image @ text.T) / 1e-3
    truth = (nn_f.cross_entropy(logits, torch.arange(B)) + nn_f.cross_entropy(logits.T, torch.arange(B))) / 2
    torch.testing.assert_close(loss.parts["contrastive"], truth, rtol=1e-6, atol=1e-9)
    assert torch.autograd.grad(loss.parts["contrastive"], model.text)[0].any()


def test_contrastive_leaves_duplicates_and_mismatches_out():
    model = Puppet()
    batch = puppet_batch(groups=torch.tensor([0, 0, 1, 2]), matched=torch.tensor([True, True, True, False]))
    loss = run(["contrastive"], model, batch)
    keep = batch.image_keep[..., None]
    image = nn_f.normalize((model.image[:B] * keep).sum(1) / keep.sum(1), dim=-1)
    text = nn_f.normalize(model.text[:B, 0], dim=-1)
    mask = torch.zeros(B, B, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = True
    truth = info_nce(image, text, 1 / 0.07, mask=mask, weight=torch.tensor([1.0, 1, 1, 0]))
    torch.testing.assert_close(loss.total, truth)
    model.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    assert run(["contrastive"], model, batch).total.requires_grad
    assert not torch.equal(run(["contrastive"], model, batch).total, loss.total)
    nothing = run(["contrastive"], model, replace(batch, matched=torch.zeros(B, dtype=torch.bool)))
    assert nothing.total == 0


def test_word_region_alignment_shares_the_pass_of_matching():
    model, batch = Puppet("itm"), puppet_batch(matched=torch.tensor([True, False, False, True]))
    loss = run(["itm", "wra"], model, batch, preset="uniter")
    assert len(model.calls) == 1
    distance = optimal_transport_distance(model.text[:B], model.image[:B], batch.text_keep, batch.image_keep)
    truth = (distance[0] + distance[3] - distance[1] - distance[2]) / B
    torch.testing.assert_close(loss.parts["wra"], 0.1 * truth)
    torch.testing.assert_close(run(["wra"], model, batch, weights={"wra": 2.0}).total, 2 * truth)
    with pytest.raises(ValueError, match="text is 8 wide, image 9"):
        run(["wra"], Puppet("itm", image_width=9), batch)


def test_next_sentence_has_berts_classes_or_the_models():
    batch = puppet_batch()
    for index, options in ((0, {}), (1, {"nsp_match_index": None})):
        model = Puppet("itm")
        loss = run(["nsp"], model, batch, **options)
        each = [negative_log(model.scores["itm"][i], index if batch.next_sentence[i] else 1 - index) for i in range(B)]
        torch.testing.assert_close(loss.total, sum(each) / B)


def test_prefix_lm_scores_what_lies_behind_the_prefix():
    model, batch = CausalPuppet("mlm"), puppet_batch(prefix_lengths=torch.tensor([0, 3, 8, 4]))
    loss = run(["prefix_lm"], model, batch)
    each = [negative_log(model.scores["mlm"][b, t - 1], batch.input_ids[b, t]) for b in range(B)
            for t in range(max(1, int(batch.prefix_lengths[b])), int(batch.text_lengths[b]))]
    torch.testing.assert_close(loss.total, sum(each) / len(each))
    assert torch.equal(model.calls[0].prefix_lengths, batch.prefix_lengths)
    run(["prefix_lm"], model, replace(batch, prefix_lengths=None), least_prefix=2)
    drawn = model.calls[1].prefix_lengths
    assert ((drawn >= 2) & (drawn < batch.text_lengths)).all()


def test_seq2seq_masks_the_target_or_feeds_a_decoder():
    batch = puppet_batch(prefix_lengths=torch.tensor([3, 2, 5, 1]))
    model = CausalPuppet("mlm")
    loss = run(["seq2seq"], model, batch, preset=ONLY_MASK)
    places = masked_words(model.calls[0], batch)
    assert places and all(batch.prefix_lengths[b] <= t < batch.text_lengths[b] for b, t in places)
    each = [negative_log(model.scores["mlm"][p], batch.input_ids[p]) for p in places]
    torch.testing.assert_close(loss.total, sum(each) / len(each))

    target = torch.randint(5, 90, (B, T + 1))
    target[1, 6:] = -100
    decoder = DecoderPuppet("lm")
    loss = run(["seq2seq"], decoder, replace(batch, target_ids=target))
    each = [negative_log(decoder.scores["lm"][b, t], target[b, t + 1]) for b in range(B) for t in range(T)
            if target[b, t + 1] >= 0]
    torch.testing.assert_close(loss.total, sum(each) / len(each))
    given = decoder.calls[0].decoder_input_ids
    assert torch.equal(given[0], target[0, :-1]) and (given >= 0).all()


def test_passes_follow_the_conventions():
    names = ("mlm", "mlm_whole_word", "nsp", "mrfr", "mrc", "itm", "wra", "contrastive")
    assert passes(names, True, False) == [("mlm", "mrfr", "mrc", "itm", "wra"), ("mlm_whole_word", "nsp"),
                                          ("contrastive",)]
    assert passes(names, False, False) == [("mlm", "nsp"), ("mlm_whole_word",), ("mrfr", "mrc"), ("itm", "wra"),
                                           ("contrastive",)]
    assert passes(("mlm", "itm", "nsp"), True, False) == [("mlm", "itm"), ("nsp",)]
    assert passes(("mlm", "itm"), True, True) == [("mlm",), ("itm",)]


def test_parts_are_weighted_summands_and_only_selects_some():
    model, batch = Puppet(*UNITER_HEADS), puppet_batch(matched=torch.tensor([True, False, True, True]))
    objective = Pretraining(["mlm", "itm"], mask_id=MASK, preset=ONLY_MASK, weights={"itm": 3.0})
    loss = objective(model, batch)
    each = [negative_log(model.scores["itm"][i], int(batch.matched[i])) for i in range(B)]
    torch.testing.assert_close(loss.parts["itm"], 3 * sum(each) / B)
    torch.testing.assert_close(loss.total, loss.parts["mlm"] + loss.parts["itm"])
    assert list(objective(model, batch, only=["itm"]).parts) == ["itm"]
    with pytest.raises(ValueError, match="only has 'mrc', must be some of mlm, itm"):
        objective(model, batch, only=["mrc"])


def test_the_same_generator_gives_the_same_losses():
    model, batch = Puppet(*UNITER_HEADS), puppet_batch()

    def losses(seed):
        return Pretraining(["mlm", "mrc_kl", "mrfr", "itm", "wra", "mrm_nce"], mask_id=MASK,
                           generator=torch.Generator().manual_seed(seed))(model, batch).parts

    first, again, other = losses(1), losses(1), losses(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("model, preset", [(ViLBERT("mlm"), "vilbert"), (LXMERT("mlm"), "lxmert"),
                                           (Puppet("mlm"), "uniter")], ids=str)
def test_a_model_has_its_authors_conventions(model, preset):
    assert Step(Pretraining(["mlm"]), model, puppet_batch(), ["mlm"]).rules is PRESETS[preset]
    assert Step(Pretraining(["mlm"], preset="vlbert"), model, puppet_batch(), ["mlm"]).rules is PRESETS["vlbert"]
