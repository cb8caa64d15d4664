"""The attention picture: which weights it takes, what it shows where, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfast.viz import attention, attention_maps
from vlmfast.viz.attention import _choose_regions, _choose_words, _scene, spotlight

TOKENS = ["[CLS]", "is", "the", "snow", "##man", "red", "?", "[SEP]"]
BOXES = [[0, 0, 40, 40], [60, 0, 100, 40], [0, 60, 100, 80]]
COLORS = [(220, 30, 30), (30, 200, 30), (30, 30, 220)]


@pytest.fixture
def picture() -> Image.Image:
    image = Image.new("RGB", (100, 80), (240, 240, 240))
    for box, color in zip(BOXES, COLORS, strict=True):
        image.paste(color, tuple(box))
    return image


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


def scene(probs, picture, **options):
    defaults = {"global_region": False, "layer": -1, "sample": 0, "head": None, "region_names": None}
    defaults["special"] = ("[CLS]", "[SEP]")
    return _scene(probs, TOKENS, picture, BOXES, *{**defaults, **options}.values())


def colored(image: Image.Image, color, box) -> int:
    """Pixels near a colour inside a box."""
    part = np.asarray(image.crop(tuple(box))).astype(int)
    return int((np.abs(part - color).max(axis=-1) < 40).sum())


def test_every_way_to_pass_weights_means_the_same():
    forward, backward = weights(2, 4, 8, 3), weights(2, 4, 3, 8, seed=1)
    layers = [(weights(2, 4, 8, 3, seed=2), weights(2, 4, 3, 8, seed=3)), (forward, backward)]
    expected = forward[1].mean(dim=0).numpy()
    for probs in (
        (forward, backward),
        layers,
        tuple([*layers[:1], *layers]),
        ((layers[0][0], forward), (layers[0][1], backward)),
        SimpleNamespace(probs_a=forward, probs_b=backward),
        SimpleNamespace(text_to_image=(layers[0][0], forward), image_to_text=(layers[0][1], backward)),
    ):
        maps = attention_maps(probs, sample=1)
        np.testing.assert_allclose(maps.text_to_image, expected, rtol=1e-6)
        np.testing.assert_allclose(maps.image_to_text, backward[1].mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(attention_maps(layers, layer=0).text_to_image, layers[0][0][0].mean(dim=0), rtol=1e-6)
    for probs in (forward, [forward], (forward, None), forward.numpy(), forward.double().requires_grad_()):
        maps = attention_maps(probs, sample=1, head=2)
        np.testing.assert_allclose(maps.text_to_image, forward[1, 2], rtol=1e-6)
        assert maps.image_to_text is None
    np.testing.assert_allclose(attention_maps(forward[1, 2].bfloat16()).text_to_image, forward[1, 2], atol=5e-3)


def test_attention_of_the_op_can_be_drawn(picture):
    ops = pytest.importorskip("vlmfast.ops.attention")
    q, k = torch.randn(1, 8, 2, 16), torch.randn(1, 3, 2, 16)
    out = ops.co_attention(q, q, q, k, k, k, return_probs=True)
    assert attention(out, TOKENS, picture, BOXES).width > 300


def test_maps_of_the_models_can_be_drawn(picture):
    vilbert = pytest.importorskip("vlmfast.models.vilbert")
    text, image = torch.zeros(1, 8, 4), torch.zeros(1, 4, 4)
    maps = {"text_to_image": (weights(1, 2, 8, 4),) * 2, "image_to_text": (weights(1, 2, 4, 8),) * 2}
    output = vilbert.ViLBERTOutput(text, image, text[:, 0], image[:, 0], **maps)
    made = scene(output, picture, global_region=True)
    np.testing.assert_allclose(made.forward[0], maps["text_to_image"][1][0, :, 1].mean(dim=0), rtol=1e-6)
    with pytest.raises(ValueError, match="probs.text_to_image is None; ask the model"):
        attention(vilbert.ViLBERTOutput(text, image, text[:, 0], image[:, 0]), TOKENS, picture, BOXES)


def test_pieces_are_joined_and_special_tokens_left_out(picture):
    forward, backward = weights(8, 3), weights(3, 8, seed=1)
    made = scene((forward, backward), picture)
    assert made.words == ["is", "the", "snowman", "red", "?"]
    np.testing.assert_allclose(made.forward[2], forward[3:5].mean(dim=0), rtol=1e-6)
    np.testing.assert_allclose(made.backward[:, 2], backward[:, 3:5].sum(dim=1), rtol=1e-6)


def test_padding_is_cut_and_the_global_region_comes_first(picture):
    forward = weights(11, 6)
    np.testing.assert_allclose(scene(forward, picture).forward[0], forward[1, :3], rtol=1e-6)
    made = scene(forward, picture, global_region=True, region_names=["a", "b", "c"])
    assert made.boxes[0].tolist() == [0, 0, 100, 80] and made.names == ["whole picture", "a", "b", "c"]
    np.testing.assert_allclose(made.forward[0], forward[1, :4], rtol=1e-6)


def test_pointed_words_and_attended_regions_are_chosen(picture):
    forward = torch.full((8, 3), 1 / 3)
    forward[5] = torch.tensor([0.05, 0.05, 0.9])
    forward[6] = torch.tensor([1.0, 0.0, 0.0])  # the question mark is no word to show
    made = scene(forward, picture)
    assert _choose_words(made, None, 1) == [3] and made.words[3] == "red"
    assert _choose_words(made, ["Snowman", 4, 1], 4) == [2, 2, 0]
    assert sorted(_choose_regions(made, 2)) == [0, 2]
    assert _choose_regions(made, 3) == [0, 2, 1]  # from left to right by their centres


def test_spotlight_keeps_the_colour_of_what_is_attended_to(picture):
    shown = spotlight(picture, np.array(BOXES), np.array([0.9, 0.1, 0.0]))
    assert shown.size == picture.size
    saturation = [np.asarray(shown.convert("HSV").crop(tuple(box)))[8:-8, 8:-8, 1].mean() for box in BOXES]
    assert saturation[0] > 200 and saturation[0] > 3 * saturation[1] > 3 * saturation[2]
    assert shown.getpixel((50, 50))[0] > 230


def test_the_picture_shows_each_word_and_both_matrices(picture):
    forward = torch.full((8, 3), 0.01)
    forward[:, 0] = 0.98
    forward[5] = torch.tensor([0.01, 0.98, 0.01])
    one = attention(forward, TOKENS, picture, BOXES, words=["snowman", "red"])
    assert one.mode == "RGB"
    half = one.width // 2
    top = one.height // 2
    red, green = (colored(one, color, (0, 0, half, top)) for color in COLORS[:2])
    assert red > 20 * max(green, 1) and red > 500
    red, green = (colored(one, color, (half, 0, one.width, top)) for color in COLORS[:2])
    assert green > 500
    pair = (forward, forward.T.contiguous())
    both = attention(pair, TOKENS, picture, BOXES, words=["snowman", "red"], title="Is it?")
    blue = np.array((33, 102, 172))
    assert colored(both, blue, (0, 0, *both.size)) > 300 > colored(one, blue, (0, 0, *one.size))
    assert both.height > one.height


def test_many_regions_and_words_are_limited(picture):
    corner = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([70.0, 50.0])
    boxes = torch.cat([corner, corner + 20], dim=1)
    tokens = ["[CLS]", *[f"word{i}" for i in range(20)], "[SEP]"]
    image = attention(weights(22, 40), tokens, np.asarray(picture), boxes, max_words=3, max_regions=12)
    assert 600 < image.width < 1400 and image.height < 1600
    tall = attention(weights(8, 3), TOKENS, picture.resize((20, 400)), np.array(BOXES) / [5, 1, 5, 1])
    assert tall.height < 2000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probs": weights(5, 3)}, r"text to image is \[5, 3\], must be at least \[8, 3\] for 8 tokens and 3 regions"),
        ({"probs": (weights(8, 3), weights(8, 3))}, r"image to text is \[8, 3\], must be at least \[3, 8\]"),
        ({"probs": weights(8, 3), "global_region": True}, r"must be at least \[8, 4\]"),
        ({"probs": weights(8, 3) - 1}, "negative or non-finite weights"),
        ({"probs": weights(8, 3) * float("nan")}, "negative or non-finite weights"),
        ({"probs": weights(3)}, "has 1 dimensions, must have 2, 3 or 4"),
        ({"probs": weights(2, 2, 8, 3), "sample": 2}, "sample is 2, there are 2"),
        ({"probs": weights(2, 8, 3), "head": 5}, "head is 5, there are 2"),
        ({"probs": [weights(1, 1, 8, 3)], "layer": 3}, "layer is 3, there are 1"),
        ({"probs": []}, "layer is -1, there are 0"),
        ({"probs": SimpleNamespace(probs_a=None, probs_b=None)}, "probs.probs_a is None; ask the model or op"),
        ({"boxes": [[0, 0, 1]]}, r"boxes are \[1, 3\], must be finite \[R, 4\]"),
        ({"boxes": np.array(BOXES) / 100}, "boxes reach 1, must be in pixels of the 100 x 80 image"),
        ({"region_names": ["a"]}, "region_names has 1 entries, boxes has 3"),
        ({"words": ["dog"]}, r"words has 'dog', must be a position or one of \['is', 'the', 'snowman'"),
        ({"words": [0]}, "words has 0, must be a position"),
        ({"tokens": ["[CLS]", "[SEP]"]}, "must hold a word that is not special"),
        ({"max_regions": 0}, "max_regions 0, must be positive"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told(picture, changes, message):
    arguments = {"probs": weights(8, 3), "tokens": TOKENS, "image": picture, "boxes": BOXES, **changes}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_other_objects_are_refused(picture):
    with pytest.raises(TypeError, match="text to image is str, must be a tensor"):
        attention("weights", TOKENS, picture, BOXES)
