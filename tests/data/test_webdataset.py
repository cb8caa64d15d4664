"""Tar shards: layout, sharing out, damage, hostile members."""

import io
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlmfast.data import PairLoader, WebDatasetPairs
from vlmfast.data.webdataset import expand_braces, read_tar


def picture(i: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, members, mode="w", **options):
    with tarfile.open(path, mode, **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(keys, kind="png") -> list[tuple[str, bytes]]:
    return [m for i in keys for m in ((f"{i:04d}.{kind}", picture(i)), (f"{i:04d}.txt", f"picture {i}".encode()))]


@pytest.fixture
def shards(tmp_path):
    """Four shards of five samples."""
    for s in range(4):
        write_tar(tmp_path / f"s-{s:03d}.tar", samples(range(5 * s, 5 * s + 5)))
    return f"{tmp_path}/s-{{000..003}}.tar"


def captions_of(pairs) -> list[str]:
    return [caption for _, caption in pairs]


ALL = [f"picture {i}" for i in range(20)]


def test_reads_every_sample_in_order(shards):
    pairs = WebDatasetPairs(shards)
    assert captions_of(pairs) == ALL
    image, _ = next(iter(pairs))
    assert image.size == (24, 24)
    assert captions_of(pairs) == ALL and pairs.report().used == 20


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_compressed_shards(tmp_path, suffix):
    mode = {"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix.rpartition('.')[2]}")
    write_tar(tmp_path / f"a.{suffix}", samples(range(3)), mode)
    assert captions_of(WebDatasetPairs(tmp_path)) == ALL[:3]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_keys_run_to_the_first_dot_and_long_names_work(tmp_path, format):
    # the last folder has a dot of its own; 140 characters need a prefix or an extended header
    deep = "part.1/" + ("x" * 60 + "/") * 2
    members = [
        ("plain.jpg", picture(0, "JPEG")),
        ("plain.caption.txt", b"not this"),
        ("plain.txt", b"plain"),
        (f"{deep}a.webp", picture(1, "WEBP")),
        (f"{deep}a.json", json.dumps({"caption": "deep", "id": 7}).encode()),
        ("./b.JPEG", picture(2, "JPEG")),
        ("./b.TXT", b"upper case"),
    ]
    path = write_tar(tmp_path / "a.tar", members, format=format)
    assert captions_of(WebDatasetPairs(path)) == ["plain", "deep", "upper case"]
    with tarfile.open(path) as tar:
        assert [name for name, _ in read_tar(str(path))] == tar.getnames()


def test_json_captions_of_a_named_field_and_lists(tmp_path):
    rows = [{"alt": "named", "caption": "other"}, {"alt": ["x", "y"]}, {"caption": "no alt"}]
    members = [m for i, r in enumerate(rows) for m in ((f"{i}.png", picture(i)), (f"{i}.json", json.dumps(r).encode()))]
    pairs = WebDatasetPairs(write_tar(tmp_path / "a.tar", members), caption_field="alt")
    seen = set()
    for epoch in range(20):
        pairs.set_epoch(epoch)
        first, second = captions_of(pairs)
        assert first == "named" and captions_of(pairs)[1] == second
        seen.add(second)
    assert seen == {"x", "y"}
    assert pairs.report().skipped == {"malformed JSON": 1}


def test_every_loss_is_counted_with_its_reason(tmp_path):
    members = [
        *samples([0]),
        ("b.png", picture()),
        ("c.txt", b"no picture"),
        ("d.png", b"broken"),
        ("d.txt", b"broken"),
        ("e.png", picture()),
        ("e.json", b"{"),
        ("f.png", picture()),
        ("f.json", b"[" * 100_000),
        ("g.png", picture()),
        ("g.txt", b"  "),
        ("h.png", picture()),
        ("h.txt", b"\xff\xfe\xfd"),
        ("i.png", b""),
        ("i.txt", b"empty"),
        *samples([1]),
    ]
    pairs = WebDatasetPairs(write_tar(tmp_path / "a.tar", members))
    for _ in range(2):
        assert captions_of(pairs) == ALL[:2]
        assert pairs.report().skipped == {
            "no caption": 1,
            "no image": 1,
            "unreadable image": 2,
            "malformed JSON": 2,
            "empty caption": 1,
            "caption is not UTF-8": 1,
        }
        assert pairs.report().used == 2
    assert "a.tar:d" in str(pairs.report())


def test_truncated_tar_gives_what_it_holds_whole(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(range(4))).read_bytes()
    first = whole[: len(whole)].index(b"0001.png")
    end = 512 * (len(whole.rstrip(b"\0")) // 512 + 1)
    cuts = {
        "inside a picture": (first + 700, 1),
        "inside a header": (first + 100, 1),
        "between samples": (first, 1),
        "without its end mark": (end, 4),
    }
    for case, (length, count) in cuts.items():
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        pairs = WebDatasetPairs(path)
        assert captions_of(pairs) == ALL[:count], case
        assert pairs.report().skipped["damaged tar"] == 1, case
        assert "cut.tar" in pairs.report().examples["damaged tar"][0]
    # a break between picture and caption leaves half a sample, which is told
    middle = whole.index(b"0001.txt")
    (tmp_path / "half.tar").write_bytes(whole[:middle])
    pairs = WebDatasetPairs(tmp_path / "half.tar")
    assert captions_of(pairs) == ALL[:1]
    assert pairs.report().skipped == {"damaged tar": 1, "incomplete sample": 1}


def test_damage_in_one_shard_leaves_the_others(tmp_path, shards):
    path = tmp_path / "s-001.tar"
    path.write_bytes(b"\x07" * 2000)
    pairs = WebDatasetPairs(shards)
    assert captions_of(pairs) == ALL[:5] + ALL[10:]
    compressed = write_tar(tmp_path / "t.tar.gz", samples(range(5)), "w:gz").read_bytes()
    (tmp_path / "t.tar.gz").write_bytes(compressed[: len(compressed) * 2 // 3])
    pairs = WebDatasetPairs(tmp_path / "t.tar.gz")
    assert 1 <= len(captions_of(pairs)) < 5 and pairs.report().skipped["damaged tar"] == 1


def test_damaged_tars_raise_nothing_but_value_error(tmp_path):
    data = write_tar(tmp_path / "a.tar", samples(range(2)), format=tarfile.PAX_FORMAT).read_bytes()
    chance = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(4):
            damaged[chance.integers(1100) if chance.random() < 0.8 else chance.integers(len(data))] = chance.integers(
                256
            )
        (tmp_path / "b.tar").write_bytes(damaged)
        pairs = WebDatasetPairs(tmp_path / "b.tar")
        try:
            captions_of(pairs)
        except ValueError as error:
            assert "not one sample" in str(error)


def test_hostile_members_touch_nothing(tmp_path):
    evil = tmp_path / "evil"
    evil.mkdir()
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    members = [
        ("../../escape.png", picture(0)),
        ("../../escape.txt", b"escaped"),
        ("/absolute.png", picture(1)),
        ("/absolute.txt", b"absolute"),
        (link, b""),
        ("link.txt", b"a link"),
        (device, b""),
        *samples([1]),
    ]
    before = sorted(os.walk(tmp_path))
    path = write_tar(evil / "a.tar", members)
    before = sorted(os.walk(tmp_path))
    pairs = WebDatasetPairs(path)
    assert captions_of(pairs) == ["escaped", "absolute", "picture 1"]
    assert sorted(os.walk(tmp_path)) == before
    assert pairs.report().skipped == {"no image": 1}


def test_large_members_are_passed_over(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"x" * 5000), ("a.txt", b"large"), *samples([1])])
    pairs = WebDatasetPairs(path, max_member_bytes=4500)
    assert captions_of(pairs) == ["picture 1"]
    assert pairs.report().skipped == {"member too large": 1, "no image": 1}
    claim = tarfile.TarInfo("huge.png")
    claim.size = 1 << 60
    path.write_bytes(claim.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    with pytest.raises(ValueError, match="not one sample(.|\n)*damaged tar"):
        captions_of(WebDatasetPairs(path))


def test_nothing_usable_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"a")])
    with pytest.raises(ValueError, match="not one sample could be used(.|\n)*1 no image"):
        captions_of(WebDatasetPairs(path))
    empty = write_tar(tmp_path / "b.tar", [])
    with pytest.raises(ValueError, match="not one sample"):
        captions_of(WebDatasetPairs(empty))
    with pytest.raises(ValueError, match="not one batch came out.*no image"):
        list(PairLoader(WebDatasetPairs(path), 2))
    with pytest.raises(ValueError, match="too few pairs for a batch of 2"):
        list(PairLoader(WebDatasetPairs(empty), 2))


def test_shuffling_is_seeded_and_mixes_shards(shards):
    pairs = WebDatasetPairs(shards, shuffle=True, seed=3, buffer=8)
    first = captions_of(pairs)
    assert first != ALL and sorted(first) == sorted(ALL)
    assert captions_of(WebDatasetPairs(shards, shuffle=True, seed=3, buffer=8)) == first
    pairs.set_epoch(1)
    assert captions_of(pairs) != first and sorted(captions_of(pairs)) == sorted(ALL)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_all_samples_once(shards, world_size, shuffle):
    pairs = WebDatasetPairs(shards)
    seen = Counter()
    for rank in range(world_size):
        loader = PairLoader(pairs, 2, drop_last=False, rank=rank, world_size=world_size, shuffle=shuffle, seed=4)
        share = [text for _, texts in loader for text in texts]
        assert share
        seen.update(share)
    assert seen == Counter(ALL)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_workers_share_all_samples_once(shards, workers):
    loader = PairLoader(WebDatasetPairs(shards), 3, drop_last=False, workers=workers, shuffle=False)
    assert Counter(text for _, texts in loader for text in texts) == Counter(ALL)
    assert loader.pairs.report().used == 20


def test_losses_in_workers_reach_the_report(tmp_path):
    members = [("x.png", b"broken"), ("x.txt", b"x"), ("y.txt", b"y"), *samples(range(6))]
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(-len(path.read_bytes().rstrip(b"\0")) % 512))
    for workers in (0, 2):
        pairs = WebDatasetPairs(path)
        batches = list(PairLoader(pairs, 2, workers=workers))
        assert all(len(texts) == 2 for _, texts in batches)
        skipped = {"unreadable image": 1, "no image": 1, "damaged tar": 1}
        assert pairs.report().skipped == skipped, workers


def test_shard_patterns():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for pattern in ("{3..1}", "{0..99999999}", "{a}", "{0..999}{0..999}{0..999}"):
        with pytest.raises(ValueError, match="WebDatasetPairs"):
            expand_braces(pattern)


def test_shards_that_are_not_there(tmp_path, shards):
    assert len(WebDatasetPairs(f"{tmp_path}/s-*.tar").shards) == 4
    assert WebDatasetPairs(tmp_path).shards == WebDatasetPairs(shards).shards
    with pytest.raises(FileNotFoundError, match="1 of 5 shards are missing.*s-004.tar"):
        WebDatasetPairs(f"{tmp_path}/s-{{000..004}}.tar")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        WebDatasetPairs(f"{tmp_path}/q-*.tar")
    with pytest.raises(FileNotFoundError, match="has no tar files"):
        (tmp_path / "none").mkdir()
        WebDatasetPairs(tmp_path / "none")
    with pytest.raises(ValueError, match="shards is empty"):
        WebDatasetPairs([])
    for command in ("pipe:cat x.tar", "https://example.com/x.tar"):
        with pytest.raises(ValueError, match="must be a local path"):
            WebDatasetPairs(command)
