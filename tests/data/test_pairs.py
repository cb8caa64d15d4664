"""Pairs from folders and caption files: layouts, hostile and damaged input, and a report that adds up."""

import json

import pytest
from PIL import Image

from vlmfast.data import ImageTextPairs, WebDatasetPairs, open_pairs


@pytest.fixture
def folder(tmp_path):
    """Six pictures of six colours, in a folder of their own below tmp_path."""
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (20 + i, 16), (40 * i, 0, 0)).save(root / "images" / f"{i}.png")
    return root


def write_csv(folder, *lines, header="image,caption", name="captions.csv", encoding="utf-8"):
    (folder / name).write_bytes("\n".join([header, *lines, ""]).encode(encoding))
    return folder


def captions_of(pairs) -> list[str]:
    return [caption for _, caption in pairs]


@pytest.mark.parametrize(
    ("name", "header", "separator", "encoding"),
    [
        ("captions.csv", "image,caption", ",", "utf-8"),
        ("captions.csv", "filepath\ttitle", "\t", "utf-8"),
        ("captions.tsv", "file_name\tTEXT", "\t", "utf-8-sig"),
        ("captions.csv", "Image;Caption", ";", "utf-8"),
        ("captions.txt", "image,caption", ",", "utf-8"),
        ("metadata.csv", "file_name,text", ",", "utf-8"),
        ("captions.csv", "image\tcaption", "\t", "utf-16"),
    ],
)
def test_tables_are_recognised(folder, name, header, separator, encoding):
    write_csv(
        folder,
        f"images/0.png{separator}a bläck square",
        f'images/1.png{separator}"a dark, red; square"',
        header=header,
        name=name,
        encoding=encoding,
    )
    pairs = open_pairs(folder)
    assert isinstance(pairs, ImageTextPairs) and len(pairs) == 2
    assert captions_of(pairs) == ["a bläck square", "a dark, red; square"]
    assert pairs[1][0].size == (21, 16)
    assert str(pairs.report()) == "2 pairs used, 0 skipped"


def test_columns_and_delimiter_can_be_named(folder):
    write_csv(folder, "7|images/2.png|deep red", header="id|where|what", name="list.csv")
    pairs = ImageTextPairs.open(folder / "list.csv", image_column="where", caption_column="what", delimiter="|")
    assert captions_of(pairs) == ["deep red"]
    with pytest.raises(ValueError, match=r"columns \['id', 'where', 'what'\].*pass image_column"):
        open_pairs(folder / "list.csv", delimiter="|")
    with pytest.raises(ValueError, match="caption_column is 'who'"):
        open_pairs(folder / "list.csv", image_column="where", caption_column="who", delimiter="|")
    with pytest.raises(ValueError, match="delimiter is 'ab'"):
        open_pairs(folder / "list.csv", delimiter="ab")


def test_json_lines(folder):
    rows = [
        json.dumps({"image": "images/0.png", "caption": "one"}),
        "",
        '{"image": "images/1.png", "caption": "cut',
        "[1, 2]",
        "[" * 100_000,
        json.dumps({"image": "images/2.png"}),
        json.dumps({"image": 5, "caption": "five"}),
        json.dumps({"image": "images/3.png", "caption": ["three", "drei"]}),
        json.dumps({"image": "images/4.png", "caption": 4}),
    ]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    pairs = open_pairs(folder)
    assert [pairs.captions(i) for i in range(len(pairs))] == [("one",), ("three", "drei")]
    report = pairs.report()
    assert report.skipped == {"malformed JSON": 3, "missing field": 3}
    assert "captions.jsonl:3" in report.examples["malformed JSON"][0]


def test_texts_beside_pictures(folder):
    for i in range(3):
        (folder / "images" / f"{i}.txt").write_text(f"square {i}\n\nquadrat {i}\n")
    (folder / "images" / "orphan.txt").write_text("nothing")
    (folder / "images" / "3.txt").write_text(" \n")
    pairs = open_pairs(folder)
    assert [pairs.captions(i) for i in range(3)] == [(f"square {i}", f"quadrat {i}") for i in range(3)]
    assert pairs.report().skipped == {"no caption file": 2, "no image": 1, "empty caption": 1}


def test_every_loss_is_counted_with_its_reason(folder):
    (folder / "images" / "empty.png").write_bytes(b"")
    (folder / "images" / "page.png").write_bytes(b"<html>not found</html>")
    good = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(good[: len(good) - 30])
    rows = [
        "images/0.png,good",
        "images/0.png,good",
        "images/absent.png,absent",
        "images/absent.png,absent again",
        "images/empty.png,empty",
        "images/page.png,page",
        "images/1.png,",
        "images/1.png,   ",
        ",no picture",
        "images/2.png",
        "images/cut.png,cut",
        "images,a folder",
    ]
    write_csv(folder, *rows)
    pairs = open_pairs(folder)
    report = pairs.report()
    assert report.skipped == {
        "repeated pair": 1,
        "missing image": 4,
        "unreadable image": 2,
        "empty caption": 2,
        "malformed row": 1,
    }
    assert report.used == len(pairs) == 2
    # the damage behind a sound header shows when it is read
    with pytest.raises(ValueError, match="cut.png"):
        pairs[1]
    for _ in range(2):
        assert captions_of(pairs) == ["good"]
    assert report.used == 1 and report.skipped["unreadable image"] == 3
    assert report.used + report.total_skipped == len(rows)
    assert "captions.csv:4" in report.examples["missing image"][0] and "absent.png" in str(report)
    assert len(open_pairs(folder, check="decode")) == 1
    assert len(open_pairs(folder, check="size")) == 3


def test_nothing_usable_is_an_error(folder, tmp_path):
    write_csv(folder, "images/absent.png,absent")
    with pytest.raises(ValueError, match="no usable pair(.|\n)*1 missing image.*absent.png"):
        open_pairs(folder)
    (folder / "captions.csv").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty, must start with a header"):
        open_pairs(folder)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no usable pair"):
        open_pairs(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_pairs(tmp_path / "nowhere")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet must be a folder, a tar"):
        open_pairs(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="check is 'all'"):
        open_pairs(folder, check="all")


def test_only_damaged_pictures_are_an_error_on_reading(folder):
    data = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "0.png").write_bytes(data[:-30])
    pairs = open_pairs(write_csv(folder, "images/0.png,cut"))
    with pytest.raises(ValueError, match="not one picture could be read(.|\n)*0.png"):
        list(pairs)


def test_names_outside_the_root_are_skipped(folder, tmp_path):
    outside = tmp_path / "secret.png"
    Image.new("RGB", (9, 9)).save(outside)
    sibling = tmp_path / "set2"
    sibling.mkdir()
    Image.new("RGB", (9, 9)).save(sibling / "a.png")
    write_csv(
        folder,
        "images/0.png,inside",
        "images/../images/1.png,still inside",
        f"{folder}/images/2.png,absolute inside",
        "../secret.png,up",
        "images/../../secret.png,up again",
        f"{outside},absolute",
        "../set2/a.png,a sibling whose name begins alike",
        "/etc/passwd,password",
        "../../../../../../../../etc/passwd,password",
        "images/0.png\0.txt,zero byte",
    )
    pairs = open_pairs(folder)
    assert captions_of(pairs) == ["inside", "still inside", "absolute inside"]
    assert pairs.report().skipped["outside the root"] == 6
    assert pairs.report().total_skipped == 7
    allowed = open_pairs(folder, allow_outside=True)
    assert len(allowed) == 5  # secret.png under three names
    assert allowed.captions(3) == ("up", "up again", "absolute")
    assert allowed.report().skipped["unreadable image"] + allowed.report().skipped["missing image"] == 3


def test_root_can_be_elsewhere(folder, tmp_path):
    (tmp_path / "lists").mkdir()
    write_csv(tmp_path / "lists", "0.png,zero", name="train.csv")
    assert captions_of(open_pairs(tmp_path / "lists" / "train.csv", root=folder / "images")) == ["zero"]


def test_stray_quotes_lose_no_other_row(folder):
    write_csv(
        folder,
        'images/0.png,"starts a quote',
        "images/1.png,plain",
        'images/2.png,6" tall',
        'images/3.png,"quoted, ""well"""',
        'images/4.png,"two\nlines"',
        'images/5.png,"bad, "quote" here',
    )
    pairs = open_pairs(folder)
    assert captions_of(pairs) == ['"starts a quote', "plain", '6" tall', 'quoted, "well"', "two\nlines"]
    assert pairs.report().skipped == {"malformed row": 1}
    assert "captions.csv:8" in pairs.report().examples["malformed row"][0]


def test_unquoted_delimiters_cut_no_caption(folder):
    write_csv(folder, "images/0.png,a cat, sitting", "images/1.png,a dog,,", "images/2.png,a bird")
    pairs = open_pairs(folder)
    assert captions_of(pairs) == ["a dog", "a bird"]
    assert "3 cells, the header has 2" in pairs.report().examples["malformed row"][0]


def test_files_that_are_no_tables_give_a_clear_error(folder):
    for content in (b"x" * 300_000, bytes(range(256)) * 20, b"\x89PNG\r\n\x1a\n"):
        (folder / "captions.csv").write_bytes(content)
        with pytest.raises(ValueError, match="captions.csv"):
            open_pairs(folder)


def test_undecodable_captions_are_counted_and_names_still_work(folder):
    (folder / "captions.csv").write_bytes(b"image,caption\nimages/0.png,caf\xe9\nimages/1.png,tea\n")
    pairs = open_pairs(folder)
    assert captions_of(pairs) == ["tea"]
    assert pairs.report().skipped == {"caption is not UTF-8": 1}


def test_one_of_several_captions_is_drawn_anew_each_epoch(folder):
    rows = [f"images/{i}.png,caption {k} of {i}" for k in range(4) for i in range(6)]
    pairs = open_pairs(write_csv(folder, *rows), seed=5)
    assert len(pairs) == 6 and len(pairs.every_caption()) == 24
    assert pairs.captions(2) == tuple(f"caption {k} of 2" for k in range(4))
    epochs = []
    for epoch in range(30):
        pairs.set_epoch(epoch)
        epochs.append(captions_of(pairs))
        assert captions_of(pairs) == epochs[-1]
        assert pairs.caption(-1) == pairs.caption(5)
    assert {caption for epoch in epochs for caption in epoch} == {row.split(",")[1] for row in rows}
    again = open_pairs(folder, seed=5)
    again.set_epoch(7)
    assert captions_of(again) == epochs[7]
    assert captions_of(open_pairs(folder, seed=6)) != epochs[0]


def test_shuffling_is_seeded_and_changes_with_the_epoch(folder):
    write_csv(folder, *[f"images/{i}.png,{i}" for i in range(6)])
    pairs = open_pairs(folder, shuffle=True, seed=1)
    first = captions_of(pairs)
    assert sorted(first) == list("012345") and captions_of(pairs) == first
    pairs.set_epoch(1)
    assert captions_of(pairs) != first
    assert captions_of(open_pairs(folder)) == list("012345")
    with pytest.raises(ValueError, match="seed is -1"):
        open_pairs(folder, seed=-1)


def test_split_is_by_picture_and_stable(folder):
    rows = [f"images/{i}.png,{k}{i}" for k in "ab" for i in range(6)]
    pairs = open_pairs(write_csv(folder, *rows))
    train, test = pairs.split(0.5, seed=1)
    sides = [{part.where(i) for i in range(len(part))} for part in (train, test)]
    assert len(sides[0] | sides[1]) == 6 and not sides[0] & sides[1] and sides[1]
    fewer = open_pairs(write_csv(folder, *rows[:4]))
    kept = {fewer.where(i) for i in range(len(fewer))}
    assert {p for p in kept if p in sides[1]} == {
        part.where(i) for part in [fewer.split(0.5, 1)[1]] for i in range(len(part))
    }
    with pytest.raises(ValueError, match="fraction is 0"):
        pairs.split(0)


def test_open_chooses_tar_shards(tmp_path, folder):
    import tarfile

    with tarfile.open(tmp_path / "a-000.tar", "w") as tar:
        (folder / "images" / "0.txt").write_text("zero")
        for name in ("0.png", "0.txt"):
            tar.add(folder / "images" / name, name)
    for path in (tmp_path / "a-000.tar", [tmp_path / "a-000.tar"], tmp_path, f"{tmp_path}/a-{{000..000}}.tar"):
        pairs = open_pairs(path)
        assert isinstance(pairs, WebDatasetPairs) and captions_of(pairs) == ["zero"]
