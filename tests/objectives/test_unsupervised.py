"""Pretraining without pairs: tags of detected classes, their masks, and batches of one modality."""

import pytest
import torch
from pretraining_helpers import LXMERT, MASK, B, Puppet, R, V, assert_rate, negative_log, puppet_batch, real

from vlmfast.objectives import PRESETS, TagPieces, UnpairedPretraining
from vlmfast.objectives.unsupervised import mask_tags, tag_words

OBJECTS = [[20 + c] if c % 3 else [20 + c, 50 + c] for c in range(7)]  # some names have two pieces
ATTRIBUTES = [[80 + a] for a in range(4)]


def test_tag_words_are_first_alternatives():
    assert tag_words(["dog,puppy", "traffic light", " cup, mug "]) == ["dog", "traffic light", "cup"]


def test_tags_name_each_region_in_order():
    classes, keep = torch.tensor([[3, 1, 2], [1, 6, 0]]), torch.tensor([[True, True, False], [True, True, True]])
    found = TagPieces(OBJECTS)(classes, keep)
    assert found.input_ids[0][found.keep[0]].tolist() == [101, 23, 53, 21, 102]
    assert found.regions[0].tolist() == [-1, 0, 0, 1, -1, -1, -1]
    assert found.input_ids[1].tolist() == [101, 21, 26, 56, 20, 50, 102]
    assert found.regions[1].tolist() == [-1, 0, 1, 1, 2, 2, -1] and found.keep[1].all()


def test_attributes_replace_a_share_of_the_objects():
    classes, attributes = torch.ones(400, 10, dtype=torch.long), torch.full((400, 10), 2)
    found = TagPieces(OBJECTS, ATTRIBUTES)(classes, torch.ones(400, 10, dtype=torch.bool), attributes)
    names = found.input_ids[found.regions >= 0]
    assert set(names.unique().tolist()) == {21, 82}
    assert_rate(int((names == 82).sum()), 4000, 0.15)
    with pytest.raises(ValueError, match=r"region_classes run from 7 to 7, must lie in 0\.\.6"):
        TagPieces(OBJECTS)(torch.full((1, 1), 7), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="objects must have at least one token for each class"):
        TagPieces([[1], []])


def test_tags_of_masked_regions_are_masked_more_often():
    classes = torch.randint(7, (500, 8))
    tags = TagPieces(OBJECTS)(classes, torch.ones(500, 8, dtype=torch.bool))
    masked = torch.rand(500, 8) < 0.5
    found = mask_tags(tags, masked, mask_id=MASK, random_ids=(90, 97))
    selected = found.labels != -100
    assert not selected[tags.regions < 0].any() and (found.labels[selected] == tags.input_ids[selected]).all()
    by_region = torch.zeros(500, 8, dtype=torch.bool)
    for b, t in selected.nonzero().tolist():
        by_region[b, tags.regions[b, t]] = True
    for b, t in (tags.regions >= 0).nonzero().tolist():
        assert selected[b, t] == by_region[b, tags.regions[b, t]], "whole tags"
    assert_rate(int((by_region & masked).sum()), int(masked.sum()), 0.9)
    assert_rate(int((by_region & ~masked).sum()), int((~masked).sum()), 0.15)
    first = selected & (tags.regions >= 0) & (tags.regions != tags.regions.roll(1, 1))
    assert_rate(int((found.input_ids[first] == MASK).sum()), int(first.sum()), 0.8)


class Wide(LXMERT):
    """Takes any number of tokens."""

    def answer(self, given, heads):
        output = super().answer(given, heads)
        tokens = given["input_ids"].shape[1]
        output.logits = {name: x[:, :1].expand(-1, tokens, -1) if name == "mlm" else x
                         for name, x in output.logits.items()}
        return output


def test_texts_alone_give_masked_words():
    model, batch = Puppet("mlm"), puppet_batch()
    loss = UnpairedPretraining([], mask_id=MASK, preset="uniter")(model, batch.text_alone())
    assert list(loss.parts) == ["mlm"] and loss.total > 0 and model.calls[0].image_feat is None


def test_images_alone_give_tags_and_regions():
    model, batch = Wide("mlm", "matched", "obj", "attr", "feat"), puppet_batch()
    objective = UnpairedPretraining(["mrfr", "mrc", "mrc_attributes"], TagPieces(OBJECTS, first_id=1, last_id=2),
                                    mask_id=MASK, preset="lxmert", generator=torch.Generator().manual_seed(1))
    loss = objective(model, batch.image_alone())
    (call,) = model.calls
    assert list(loss.parts) == ["mrfr", "mrc", "mrc_attributes", "tags"]
    truth = TagPieces(OBJECTS, first_id=1, last_id=2)(batch.region_classes, batch.image_keep)
    assert call.input_ids.shape == truth.input_ids.shape and (call.input_ids != truth.input_ids).any()
    assert torch.equal(call.text_lengths, truth.keep.sum(1)) and set(call.heads) == {"mlm", "obj", "attr", "feat"}
    real_regions = batch.image_keep.nonzero().tolist()
    total = sum(batch.region_confidence[i, j] * negative_log(model.scores["obj"][i, j], batch.region_classes[i, j])
                for i, j in real_regions)
    torch.testing.assert_close(loss.parts["mrc"], total / (B * R) / 0.15)
    torch.testing.assert_close(loss.total, sum(loss.parts.values()))


def test_the_tag_loss_is_over_masked_tags_through_the_word_head():
    model, batch = Wide("mlm", "feat"), puppet_batch()
    rules = PRESETS["lxmert"]
    generator = torch.Generator().manual_seed(2)
    pieces = TagPieces(OBJECTS, first_id=1, last_id=2)
    loss = UnpairedPretraining([], pieces, mask_id=MASK, preset=rules, generator=generator)(model, batch.image_alone())
    again = torch.Generator().manual_seed(2)
    from vlmfast.objectives.masking import mask_regions

    regions = mask_regions(batch.image_feat, batch.image_keep, split=rules.region_split, generator=again)
    tags = pieces(batch.region_classes, batch.image_keep, batch.region_attributes, generator=again)
    tokens = mask_tags(tags, regions.masked, mask_id=MASK, random_ids=(0, V), generator=again)
    assert torch.equal(tokens.input_ids, model.calls[0].input_ids)
    each = [negative_log(model.scores["mlm"][b, 0], tokens.labels[b, t])
            for b, t in (tokens.labels != -100).nonzero().tolist()]
    torch.testing.assert_close(loss.parts["tags"], sum(each) / len(each))


def test_pairs_and_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="has input_ids and image_feat, must have one of them"):
        UnpairedPretraining([], mask_id=MASK)(Puppet("mlm"), puppet_batch())
    with pytest.raises(ValueError, match="region_objectives has 'itm', must be some of mrfr"):
        UnpairedPretraining(["itm"])
    with pytest.raises(ValueError, match="objective 'tags' needs region_classes"):
        UnpairedPretraining([], TagPieces(OBJECTS), mask_id=MASK)(
            Puppet("mlm"), puppet_batch(region_classes=None).image_alone())


@pytest.mark.parametrize("with_tags", [True, False])
@pytest.mark.parametrize("kind", ["ViLBERT", "LXMERT"])
def test_real_models_learn_from_either_modality(kind, with_tags):
    model, batch = real(kind)
    pieces = TagPieces([[6 + c] for c in range(13)], first_id=1, last_id=2) if with_tags else None
    objective = UnpairedPretraining(["mrc_kl"], pieces, mask_id=5)
    for part, side in (("mlm", batch.text_alone()), ("tags" if with_tags else "mrc_kl", batch.image_alone())):
        for _ in range(20):  # a draw may mask nothing
            loss = objective(model, side).parts[part]
            if loss > 0:
                break
        loss.backward()
        assert torch.isfinite(loss) and model.bert.embeddings.word_embeddings.weight.grad.isfinite().all()
