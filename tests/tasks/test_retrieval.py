"""Search over a folder of pictures."""

import os

import pytest
import torch
from PIL import Image

from vlmfast.data import ImagePreprocess
from vlmfast.tasks import Retriever
from vlmfast.tasks.retrieval import list_images

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourModel(torch.nn.Module):
    """Features of a picture are its mean colour, of a text the colours it names."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.preprocess = ImagePreprocess(8, (0, 0, 0), (1, 1, 1))
        self.encoded = 0

    def tokenizer(self, texts):
        return torch.tensor([[colour in text for colour in COLOURS] for text in texts])

    def encode_text(self, tokens):
        return tokens.float() * self.weight

    def encode_image(self, image):
        self.encoded += len(image)
        return image.mean((2, 3)) * self.weight


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (12, 9), colour).save(root / ("sub" if name == "blue" else "") / f"{name}.PNG")
    Image.new("L", (5, 5), 200).save(root / "grey.jpg")
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes(b"")
    return root


def test_ranks_the_right_picture_first(folder):
    retriever = Retriever(ColourModel(), batch_size=2).add(folder)
    assert [path.name for path in retriever.paths] == ["green.PNG", "grey.jpg", "red.PNG", "blue.PNG"]
    for colour in COLOURS:
        matches = retriever.search(f"a {colour} wall", top=3)
        assert matches[0].path.name == f"{colour}.PNG" and matches[0].score == pytest.approx(1.0)
        assert matches[1].path.name == "grey.jpg"
        assert len(matches) == 3
        assert [m.score for m in matches] == sorted((m.score for m in matches), reverse=True)


def test_unreadable_pictures_are_counted_and_named(folder):
    (folder / "broken.jpg").write_bytes(b"this is no picture")
    (folder / "empty.png").write_bytes(b"")
    retriever = Retriever(ColourModel()).add([*list_images(folder), folder / "missing.png"])
    assert {path.name for path, _ in retriever.skipped} == {"broken.jpg", "empty.png", "missing.png"}
    assert all(path.name in reason for path, reason in retriever.skipped)
    assert len(retriever.paths) == len(retriever.features) == 4


def test_cache_spares_the_second_pass_and_follows_changes(folder, tmp_path):
    cache = tmp_path / "features.safetensors"
    Retriever(ColourModel()).add(folder, cache=cache)
    model = ColourModel()
    retriever = Retriever(model).add(folder, cache=cache)
    assert model.encoded == 0 and retriever.search("red")[0].path.name == "red.PNG"

    Image.new("RGB", (4, 4), (0, 0, 255)).save(folder / "red.PNG")
    os.utime(folder / "red.PNG", ns=(1, 1))
    retriever = Retriever(model).add(folder, cache=cache)
    assert model.encoded == 1 and retriever.search("red")[0].path.name != "red.PNG"

    with torch.no_grad():
        model.weight[0] = 2.0
    model.encoded = 0
    Retriever(model).add(folder, cache=cache)
    assert model.encoded == 4, "features of other weights are not used"
    cache.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no feature cache"):
        Retriever(model).add(folder, cache=cache)


def test_folder_errors_name_it(folder, tmp_path):
    retriever = Retriever(ColourModel())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        retriever.add(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="notes.txt is a file"):
        retriever.add(folder / "notes.txt")
    with pytest.raises(ValueError, match="empty holds no image"):
        retriever.add(tmp_path / "empty")
    with pytest.raises(ValueError, match="none of 1 files could be read"):
        retriever.add([folder / "notes.txt"])


def test_search_arguments(folder):
    retriever = Retriever(ColourModel())
    with pytest.raises(ValueError, match="call add first"):
        retriever.search("red")
    retriever.add(folder)
    with pytest.raises(ValueError, match="query is empty"):
        retriever.search("  ")
    with pytest.raises(ValueError, match="top is 0"):
        retriever.search("red", top=0)
    model = ColourModel()
    model.preprocess = None
    with pytest.raises(ValueError, match="no preprocess"):
        Retriever(model)
