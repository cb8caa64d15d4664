"""The embedded emoji set and its splits."""

import hashlib

import numpy as np
import pytest

from vlmfast.data import LANGUAGES, emoji_pairs, load_emoji, strata
from vlmfast.data.emoji import FOLDER, base_glyph


@pytest.fixture(scope="module")
def pairs():
    return load_emoji()


def test_set_is_whole(pairs):
    assert len(pairs) == 3786 == len(pairs.captions) == len(pairs.records)
    assert pairs.images.shape == (3786, 32, 32, 3) and pairs.images.dtype == np.uint8
    assert (FOLDER / "NOTICE").read_text().count("licen") + (FOLDER / "NOTICE").read_text().count("Licen") >= 4
    image, caption = pairs[3700]
    assert image.size == (32, 32) and image.mode == "RGB" and caption == pairs.captions[3700]
    # a rocket is mostly drawn in the middle, and pictures differ
    assert len({pairs.images[i].tobytes() for i in range(0, 3786, 50)}) == 76
    assert len(list(iter(pairs.select(range(5))))) == 5


def test_pack_equals_the_shared_data(shared_dir):
    for name in ("emoji32.bin.xz", "emoji32.json.xz"):
        ours, theirs = (hashlib.sha256((f / name).read_bytes()).digest() for f in (FOLDER, shared_dir / "data"))
        assert ours == theirs


def test_every_language_names_every_picture():
    assert len(LANGUAGES) == 14
    for language in LANGUAGES:
        assert all(load_emoji(language).captions)
    assert "pomme rouge" in load_emoji("fr").captions
    with pytest.raises(ValueError, match="language is 'xx'"):
        load_emoji("xx")


def test_images_cannot_be_changed_by_accident(pairs):
    with pytest.raises(ValueError, match="read-only"):
        pairs.images[0, 0, 0, 0] = 1


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1F44B-1F3FD", "1F44B"),
        ("26F9-1F3FC-200D-2640-FE0F", "26F9-200D-2640"),
        ("26F9-FE0F-200D-2640-FE0F", "26F9-200D-2640"),
        ("1F469-1F3FB-200D-1F91D-200D-1F469-1F3FC", "1F46D"),
        ("1FAF1-1F3FB-200D-1FAF2-1F3FC", "1F91D"),
        ("1F3FB", "1F3FB"),
    ],
)
def test_base_glyph_drops_skin_tones(variant, base):
    assert base_glyph(variant) == base


def test_every_variant_has_a_base_glyph_in_the_set(pairs):
    plain = {record["base"] for record in pairs.records if record["skin"] == ""}
    assert {record["base"] for record in pairs.records} == plain
    assert len(plain) == 1911


def test_random_split_is_a_partition_and_repeats(pairs):
    train, test = pairs.split_random(0.1, seed=3)
    assert (len(train), len(test)) == (3407, 379)
    codes = [{record["u"] for record in part.records} for part in (train, test)]
    assert not codes[0] & codes[1] and len(codes[0] | codes[1]) == 3786
    assert pairs.split_random(0.1, seed=3)[1].captions == test.captions
    assert pairs.split_random(0.1, seed=4)[1].captions != test.captions
    for i in (0, 100, 378):
        j = pairs.captions.index(test.captions[i])
        assert np.array_equal(pairs.images[j], test.images[i]) and pairs.records[j] == test.records[i]


@pytest.mark.parametrize("seed", range(5))
def test_concept_split_shares_no_glyph_and_no_picture(pairs, seed):
    train, test = pairs.split_concepts(seed=seed)
    assert len(test) == 192 and len(train) == 3786 - 192
    assert not {record["base"] for record in train.records} & {record["base"] for record in test.records}
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert any(record["skin"] for record in test.records)


def test_concept_split_repeats(pairs):
    assert pairs.split_concepts(seed=1)[1].captions == pairs.split_concepts(seed=1)[1].captions
    assert pairs.split_concepts(seed=1)[1].captions != pairs.split_concepts(seed=2)[1].captions


def test_splits_do_not_depend_on_the_order_of_the_set(pairs):
    turned = pairs.select(range(3785, -1, -1))
    assert set(turned.split_random(seed=5)[1].captions) == set(pairs.split_random(seed=5)[1].captions)


def test_strata_tell_composition_from_novelty(pairs):
    train, test = pairs.split_random(seed=0)
    masks = strata(train, test)
    assert all(mask.shape == (len(test),) and mask.dtype == bool for mask in masks.values())
    assert (masks["seen_words"] ^ masks["unseen_words"]).all() and (masks["base"] ^ masks["skin_tone"]).all()
    assert 100 < masks["seen_words"].sum() < len(test) and 100 < masks["base"].sum() < len(test)
    assert masks["seen_base"][masks["skin_tone"]].mean() > 0.95
    train_words = {word for caption in train.captions for word in caption.lower().replace("-", " ").split()}
    for caption, unseen in zip(test.captions, masks["unseen_words"], strict=True):
        if all(word in train_words for word in caption.lower().replace("-", " ").split()):
            assert not unseen, caption
    train, test = pairs.split_concepts(seed=0)
    assert not strata(train, test)["seen_base"].any()


def test_emoji_pairs_chooses_the_split(pairs):
    assert len(emoji_pairs()) == 3786
    assert emoji_pairs("de", "random", 2)[1].captions == load_emoji("de").split_random(seed=2)[1].captions
    assert len(emoji_pairs(split="concepts")[1]) == 192
    with pytest.raises(ValueError, match="split is 'half'"):
        emoji_pairs(split="half")
    for fraction in (0, 1, -1):
        with pytest.raises(ValueError, match="fraction"):
            pairs.split_random(fraction)
    for count in (0, 3786):
        with pytest.raises(ValueError, match="count"):
            pairs.split_concepts(count)
