"""PairLoader: the same batches whatever the workers, full batches in spite of damage, exact resume, equal ranks."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlmfast.data import CLIPTokenizer, ImagePreprocess, PairLoader, load_emoji, open_pairs


@pytest.fixture(scope="module")
def emoji():
    return load_emoji().select(range(1000, 1050))


@pytest.fixture(scope="module")
def tokenizer(emoji):
    return CLIPTokenizer.train(emoji.captions, 600, context_length=16)


@pytest.fixture
def damaged(tmp_path):
    """Twelve pictures on disk, of which 3 and 7 break off behind a sound header."""
    rows = ["image,caption"]
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{i}")
    for i in (3, 7):
        path = tmp_path / f"{i}.png"
        path.write_bytes(path.read_bytes()[:-400])
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


def texts_of(loader) -> list[str]:
    return [text for _, texts in loader for text in texts]


def test_batches_have_the_documented_shapes(emoji, tokenizer):
    loader = emoji.batches(16, preprocess=ImagePreprocess(32), tokenizer=tokenizer)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for images, tokens in batches:
        assert images.shape == (16, 3, 32, 32) and images.dtype == torch.float32
        assert tokens.shape == (16, 16) and tokens.dtype == torch.int64
    images, texts = next(iter(emoji.batches(4, shuffle=False)))
    assert texts == emoji.captions[:4] and np.array_equal(np.asarray(images[2]), emoji.images[2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_workers(emoji, tokenizer):
    preprocess = ImagePreprocess(32, train=True, flip=0.5)
    runs = []
    for workers in (0, 1, 3):
        loader = emoji.batches(8, preprocess=preprocess, tokenizer=tokenizer, workers=workers, seed=9)
        loader.set_epoch(2)
        runs.append(list(loader))
    for run in runs[1:]:
        assert len(run) == 6
        for (a, s), (b, t) in zip(runs[0], run, strict=True):
            assert torch.equal(a, b) and torch.equal(s, t)


def test_epochs_and_seeds_change_order_and_crops(emoji):
    preprocess = ImagePreprocess(32, train=True)
    first = emoji.batches(50, preprocess=preprocess)
    images, texts = next(iter(first))
    again, _ = next(iter(first))
    assert torch.equal(images, again)
    first.set_epoch(1)
    other, order = next(iter(first))
    assert sorted(order) == sorted(texts) and order != texts
    i, j = texts.index(emoji.captions[0]), order.index(emoji.captions[0])
    assert not torch.equal(images[i], other[j])
    assert texts_of(emoji.batches(50, seed=1)) != texts


def test_random_state_of_the_caller_is_left_alone(emoji):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    list(emoji.batches(10, preprocess=ImagePreprocess(8, train=True, flip=0.5)))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_exactly(emoji, workers):
    preprocess = ImagePreprocess(16, train=True, flip=0.5)
    loader = emoji.batches(8, preprocess=preprocess, workers=workers, seed=3)
    loader.set_epoch(4)
    whole = list(loader)
    resumed = emoji.batches(8, preprocess=preprocess, workers=workers, seed=3)
    resumed.set_epoch(4, start=2)
    rest = list(resumed)
    assert len(rest) == 4
    for (a, s), (b, t) in zip(whole[2:], rest, strict=True):
        assert torch.equal(a, b) and s == t
    assert len(list(resumed)) == 6  # the pass after it is whole


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 4), (3, 1)])
def test_ranks_get_disjoint_shares_of_equal_length(emoji, world_size, batch_size):
    loaders = [emoji.batches(batch_size, rank=r, world_size=world_size, seed=1) for r in range(world_size)]
    shares = [texts_of(loader) for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1
    assert all(len(share) == batch_size * len(loaders[0]) for share in shares)
    assert len({text for share in shares for text in share}) == sum(map(len, shares))
    whole = [texts_of(emoji.batches(4, rank=r, world_size=world_size, drop_last=False)) for r in range(world_size)]
    assert sorted(text for share in whole for text in share) == sorted(emoji.captions)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_stay_full_in_spite_of_damage(damaged, workers):
    pairs = open_pairs(damaged)
    loader = pairs.batches(4, preprocess=ImagePreprocess(16), workers=workers)
    seen = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(texts) for _, texts in batches] == [4, 4, 4]
        seen.append([texts for _, texts in batches])
    assert not {"3", "7"} & {text for epoch in seen for texts in epoch for text in texts}
    assert pairs.report().skipped == {"unreadable image": 2} and pairs.report().used == 10
    assert "3.png" in str(pairs.report()) and "7.png" in str(pairs.report())
    loader.set_epoch(2, start=1)
    assert [texts for _, texts in loader] == seen[2][1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_damaged_pictures_out(damaged, workers):
    pairs = open_pairs(damaged)
    loader = pairs.batches(5, shuffle=False, drop_last=False, workers=workers)
    assert texts_of(loader) == [str(i) for i in range(12) if i not in (3, 7)]
    assert pairs.report().skipped == {"unreadable image": 2}


def test_nothing_readable_is_an_error(damaged):
    pairs = open_pairs(damaged)
    for path in damaged.glob("*.png"):
        path.write_bytes(b"gone bad")
    with pytest.raises(ValueError, match="no pair of a batch could be read.*png"):
        list(pairs.batches(4))
    with pytest.raises(ValueError, match="not one batch came out.*unreadable image"):
        list(pairs.batches(4, drop_last=False))


def test_sets_work_in_a_plain_data_loader(emoji):
    def collate(items):
        return torch.stack([ImagePreprocess(8)(image) for image, _ in items]), [text for _, text in items]

    batches = list(DataLoader(emoji, batch_size=25, num_workers=1, collate_fn=collate))
    assert [len(texts) for _, texts in batches] == [25, 25] and batches[0][0].shape == (25, 3, 8, 8)


def test_rejects_arguments_out_of_range(emoji):
    for arguments, message in [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 4, "workers": -1}, "workers is -1"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank is 2"),
        ({"batch_size": 51}, "50 pairs on 1 ranks make no batch of 51"),
    ]:
        with pytest.raises(ValueError, match=message):
            PairLoader(emoji, **arguments)
    with pytest.raises(ValueError, match="epoch is -1"):
        emoji.batches(4).set_epoch(-1)
    assert len(emoji.batches(51, drop_last=False)) == 1


def test_import_is_light():
    code = (
        "import sys, vlmfast.data as d\n"
        "heavy = {'tokenizers', 'ftfy', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'CLIPTokenizer' in dir(d)\n"
        "for name in d.__all__: getattr(d, name)\n"
        "from vlmfast.data import emoji; assert emoji.LANGUAGES\n"
        "try: d.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
