"""Region features from every public format: equal contents, clear errors, counted skips, and nothing executed."""

import base64
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from vlmfast.data import RegionFeatures, collate_regions, write_regions
from vlmfast.data.region_arrays import UnsafePickleError, read_npy, read_pickle

COUNTS = {"a": 3, "17": 1, "sub_z": 5}
DIM = 8
WIDTH, HEIGHT = 640, 480


def image(image_id: str) -> dict:
    """Arrays of one image, the same in every format."""
    count = COUNTS[image_id]
    rng = np.random.default_rng(sum(map(ord, image_id)))
    corner = rng.uniform(0, 200, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 200, (count, 2))], axis=1).astype(np.float32)
    return {
        "features": rng.standard_normal((count, DIM)).astype(np.float32),
        "boxes": boxes,
        "classes": rng.integers(0, 1600, count),
        "confidences": rng.random(count, dtype=np.float32),
        "attributes": rng.integers(0, 400, count),
        "attribute_confidences": rng.random(count, dtype=np.float32),
    }


def b64(array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def lxmert_row(image_id: str) -> list[str]:
    x = image(image_id)
    blobs = [b64(x[k]) for k in ("classes", "confidences", "attributes", "attribute_confidences")]
    return [image_id, str(HEIGHT), str(WIDTH), *blobs, str(COUNTS[image_id]), b64(x["boxes"]), b64(x["features"])]


def bottom_up_row(image_id: str) -> list[str]:
    x = image(image_id)
    return [image_id, str(WIDTH), str(HEIGHT), str(COUNTS[image_id]), b64(x["boxes"]), b64(x["features"])]


def write_tsv(path, rows, end="\n"):
    path.write_text("".join("\t".join(row) + end for row in rows), newline="")
    return path


def mmf_info(image_id: str) -> dict:
    x = image(image_id)
    return {
        "image_id": image_id, "bbox": x["boxes"], "num_boxes": COUNTS[image_id], "objects": x["classes"],
        "image_width": WIDTH, "image_height": HEIGHT, "conf": x["confidences"],
    }  # fmt: skip


def make_bottom_up(folder):
    return write_tsv(folder / "x.tsv", map(bottom_up_row, COUNTS), "\r\n")


def make_lxmert(folder):
    return write_tsv(folder / "x.tsv", map(lxmert_row, COUNTS))


def make_header(folder):
    names = ["image_id", "num_boxes", "features", "boxes", "image_h", "image_w"]
    rows = []
    for image_id in COUNTS:
        x = image(image_id)
        rows.append([image_id, str(COUNTS[image_id]), b64(x["features"]), b64(x["boxes"]), str(HEIGHT), str(WIDTH)])
    return write_tsv(folder / "x.tsv", [names, *rows])


def make_vinvl(folder):
    rows = []
    for image_id in COUNTS:
        x = image(image_id)
        objects = [
            {"class": f"c{i}", "conf": float(x["confidences"][i]), "rect": x["boxes"][i].tolist(), "feature": b64(f)}
            for i, f in enumerate(x["features"])
        ]
        rows.append([image_id, json.dumps({"image_w": WIDTH, "image_h": HEIGHT, "objects": objects})])
    return write_tsv(folder / "predictions.tsv", rows)


def make_mmf(folder):
    for image_id in COUNTS:
        np.save(folder / f"{image_id}.npy", image(image_id)["features"])
        np.save(folder / f"{image_id}_info.npy", mmf_info(image_id), allow_pickle=True)
    return folder


def make_vilbert_npy(folder):
    for image_id in COUNTS:
        record = {**mmf_info(image_id), "features": image(image_id)["features"]}
        np.save(folder / f"{image_id}.npy", record, allow_pickle=True)
    return folder


def make_bua_npz(folder):
    for image_id in COUNTS:
        x = image(image_id)
        info = {"image_id": image_id, "objects_id": x["classes"], "objects_conf": x["confidences"]}
        np.savez_compressed(
            folder / f"{image_id}.npz", x=x["features"], bbox=x["boxes"], num_bbox=COUNTS[image_id],
            image_h=HEIGHT, image_w=WIDTH, info=info,
        )  # fmt: skip
    return folder


def make_lmdb(folder):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder / "x.lmdb"), map_size=1 << 22) as environment, environment.begin(write=True) as store:
        for image_id in COUNTS:
            x = image(image_id)
            record = {
                "image_id": image_id.encode(), "image_h": str(HEIGHT), "image_w": np.int64(WIDTH),
                "num_boxes": str(COUNTS[image_id]), "boxes": b64(x["boxes"]).encode(), "features": b64(x["features"]),
            }  # fmt: skip
            if image_id == "a":  # the conversion script stores arrays instead
                record = {**mmf_info(image_id), "features": x["features"]}
            store.put(image_id.encode(), pickle.dumps(record, protocol=2 if image_id == "17" else 5))
        store.put(b"keys", pickle.dumps([key.encode() for key in COUNTS]))
    return folder / "x.lmdb"


def make_hdf5_groups(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "x.h5", "w") as file:
        for image_id in COUNTS:
            x = image(image_id)
            group = file.create_group(image_id)
            for name, key in (("features", "features"), ("boxes", "boxes"), ("obj_id", "classes")):
                group[name] = x[key]
            group["obj_conf"], group["img_w"], group["img_h"] = x["confidences"].astype(np.float16), WIDTH, HEIGHT
    return folder / "x.h5"


def make_hdf5_columns(folder):
    h5py = pytest.importorskip("h5py")
    most = max(COUNTS.values())
    with h5py.File(folder / "x.hdf5", "w") as file:
        file["image_id"] = np.array(list(COUNTS), dtype="S8")
        file["num_boxes"] = np.array(list(COUNTS.values()))
        file["image_w"], file["image_h"] = np.full(len(COUNTS), WIDTH), np.full(len(COUNTS), HEIGHT)
        for key in ("features", "boxes"):
            padded = [np.pad(image(i)[key], ((0, most - COUNTS[i]), (0, 0))) for i in COUNTS]
            file[key] = np.stack(padded)
    return folder / "x.hdf5"


FORMATS = {
    make_bottom_up: "bottom-up-attention", make_lxmert: "lxmert", make_header: "bottom-up-attention",
    make_vinvl: "oscar", make_mmf: "numpy", make_vilbert_npy: "numpy", make_bua_npz: "numpy", make_lmdb: "lmdb",
    make_hdf5_groups: "hdf5", make_hdf5_columns: "hdf5",
}  # fmt: skip


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__.removeprefix("make_"))
@pytest.mark.parametrize("named", [False, True], ids=["detected", "named"])
def test_every_format_gives_the_same_regions(tmp_path, make, named):
    features = RegionFeatures.open(make(tmp_path), FORMATS[make] if named else None)
    assert features.format == FORMATS[make] and features.feature_dim == DIM
    assert sorted(features.ids) == sorted(COUNTS) and len(features) == 3
    for regions in features:
        x = image(regions.image_id)
        assert regions.features.dtype == regions.boxes.dtype == torch.float32
        assert np.array_equal(regions.features, x["features"]) and np.array_equal(regions.boxes, x["boxes"])
        assert (regions.width, regions.height) == (WIDTH, HEIGHT) and len(regions) == COUNTS[regions.image_id]
        if regions.classes is not None:
            assert np.array_equal(regions.classes, x["classes"]) and regions.classes.dtype == torch.int64
        if regions.confidences is not None:
            assert np.allclose(regions.confidences, x["confidences"], atol=1e-3)
    assert str(features.report()) == "3 images used, 0 skipped"
    assert 17 in features and np.array_equal(features[17].features, image("17")["features"])
    with pytest.raises(KeyError, match="no image 'b' among its 3"):
        features["b"]
    features.close()
    assert len(features["a"]) == 3


def test_lxmert_columns_are_all_read(tmp_path):
    regions = RegionFeatures.open(make_lxmert(tmp_path))["a"]
    x = image("a")
    for field in ("classes", "confidences", "attributes", "attribute_confidences"):
        assert np.array_equal(getattr(regions, field), x[field]), field


def test_vinvl_keeps_the_class_names(tmp_path):
    assert RegionFeatures.open(make_vinvl(tmp_path))["a"].names == ("c0", "c1", "c2")


def test_written_regions_are_read_back(tmp_path):
    source = list(RegionFeatures.open(make_lxmert(tmp_path)))
    assert write_regions(tmp_path / "again.tsv", source) == 3
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "x.tsv").read_bytes()


@pytest.mark.parametrize("columns", [2, 3])
def test_oscar_boxes_come_from_the_last_six_values(tmp_path, columns):
    x = image("a")
    relative = x["boxes"] / np.float32([WIDTH, HEIGHT, WIDTH, HEIGHT])
    features = np.concatenate([x["features"], relative, relative[:, 2:] - relative[:, :2]], axis=1)
    tail = [json.dumps({"num_boxes": 3, "features": b64(features)})] if columns == 2 else ["3", b64(features)]
    regions = RegionFeatures.open(write_tsv(tmp_path / "f.tsv", [["a", *tail]]))["a"]
    assert np.array_equal(regions.features, features) and (regions.width, regions.height) == (1, 1)
    assert np.array_equal(regions.boxes, relative)
    assert np.allclose(regions.scaled(WIDTH, HEIGHT).boxes, x["boxes"], rtol=1e-5)


def test_uniter_boxes_are_fractions(tmp_path):
    x = image("a")
    relative = x["boxes"] / np.float32([WIDTH, HEIGHT, WIDTH, HEIGHT])
    np.savez(tmp_path / "a.npz", norm_bb=relative.astype(np.float16), features=x["features"].astype(np.float16),
             conf=x["confidences"], soft_labels=np.eye(3, 7))  # fmt: skip
    regions = RegionFeatures.open(tmp_path)["a"]
    assert np.allclose(regions.boxes, relative, atol=1e-3) and regions.width == 1
    assert np.array_equal(regions.class_probabilities, np.eye(3, 7)) and regions.features.dtype == torch.float32


def test_padded_rows_are_cut_by_num_boxes(tmp_path):
    record = {**mmf_info("a"), "num_boxes": 2, "features": image("a")["features"]}
    np.save(tmp_path / "a.npy", record, allow_pickle=True)
    assert len(RegionFeatures.open(tmp_path)["a"]) == 2


def change(row: list[str], column: int, value) -> list[str]:
    return [*row[:column], value, *row[column + 1 :]]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda row: row[:5], r"the row has 5 columns, must have 6 \(image_id, .*truncated"),
        (lambda row: change(row, 3, "4"), r"boxes has 48 bytes, must have 4 boxes x 4 x 4 = 64 \(float32\)"),
        (lambda row: change(row, 3, "0"), "num_boxes is 0, must be at least 1"),
        (lambda row: change(row, 3, "three"), "num_boxes is 'three', must be a number"),
        (lambda row: change(row, 3, "1e9999"), "num_boxes is '1e9999', must be a number"),
        (lambda row: change(row, 3, "999999999"), "must have 999999999 boxes"),
        (lambda row: change(row, 5, row[5][:-6]), "features (is not valid base64|has)"),
        (lambda row: change(row, 5, row[5][:40] + "????" + row[5][40:]), "features is not valid base64"),
        (lambda row: change(row, 5, ""), "features has 0 bytes, must be a multiple of 3 boxes"),
        (lambda row: change(row, 5, b64(image("a")["features"][:, :5])), "features have 5 values a region"),
        (lambda row: change(row, 5, b64(image("a")["features"].astype(np.float64))), "features have 16 values"),
        (lambda row: change(row, 4, b64(image("a")["boxes"].astype(np.float64))), "boxes has 96 bytes.*another type"),
        (lambda row: change(row, 4, b64(image("a")["boxes"][:, ::-1])), r"box 0 is .*must be x1, y1, x2, y2"),
        (lambda row: change(row, 4, b64(np.full((3, 4), np.nan, np.float32))), "boxes hold NaN or infinity"),
        (lambda row: change(row, 5, b64(np.full((3, 8), np.inf, np.float32))), "features hold NaN or infinity"),
        (lambda row: change(row, 1, "-5"), "width is -5, must be positive"),
        (lambda row: change(row, 2, "wide"), "image_h is 'wide', must be a number"),
    ],
)
def test_damaged_rows_name_file_and_row_and_are_counted(tmp_path, broken, message):
    rows = [bottom_up_row("17"), broken(bottom_up_row("a")), bottom_up_row("sub_z")]
    path = write_tsv(tmp_path / "x.tsv", rows)
    features = RegionFeatures.open(path)
    with pytest.raises(ValueError, match=rf"RegionFeatures: .*x\.tsv:2 \(image a\): .*{message}"):
        features["a"]
    for _ in range(2):
        assert [regions.image_id for regions in features] == ["17", "sub_z"]
    report = features.report()
    assert report.used == 2 and report.skipped == {"damaged record": 1}
    assert "x.tsv:2" in str(report) and str(report).startswith("2 images used, 1 skipped")


def test_truncated_file_loses_only_its_last_row(tmp_path):
    path = make_bottom_up(tmp_path)
    path.write_bytes(path.read_bytes()[:-60])
    features = RegionFeatures.open(path)
    assert [regions.image_id for regions in features] == ["a", "17"]
    with pytest.raises(ValueError, match=r"x.tsv:3 \(image sub_z\): features .*"):
        features["sub_z"]


def test_repeated_ids_and_stray_lines_are_counted(tmp_path):
    path = make_bottom_up(tmp_path)
    row = "\t".join(bottom_up_row("a"))
    path.write_text(path.read_text() + f"\nno tab here\n{row}\n")
    features = RegionFeatures.open(path)
    assert features.report().skipped == {"malformed row": 1, "repeated image id": 1}
    assert len(list(features)) == 3


@pytest.mark.parametrize("text", ["", "\n", "just one column\n", "a\tb\tc\td\n"])
def test_other_text_files_are_refused(tmp_path, text):
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(ValueError, match=r"RegionFeatures: .*x\.tsv"):
        RegionFeatures.open(tmp_path / "x.tsv")


def test_files_without_one_readable_image_fail_when_opened(tmp_path):
    path = write_tsv(tmp_path / "x.tsv", [change(bottom_up_row(i), 4, "AAAA") for i in COUNTS])
    with pytest.raises(ValueError, match=r"x.tsv:1 \(image a\): boxes has 3 bytes"):
        RegionFeatures.open(path)


def test_wrong_paths_and_formats_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.tsv does not exist"):
        RegionFeatures.open(tmp_path / "nowhere.tsv")
    with pytest.raises(ValueError, match="format is 'csv', must be one of bottom-up-attention, lxmert"):
        RegionFeatures.open(tmp_path, "csv")
    with pytest.raises(ValueError, match="format is 'lxmert', .* has the columns of 'bottom-up-attention'"):
        RegionFeatures.open(make_bottom_up(tmp_path), "lxmert")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data.mdb .* and no .npy or .npz"):
        RegionFeatures.open(tmp_path / "empty")
    with pytest.raises(ValueError, match="feature_dim is 0"):
        RegionFeatures.open(tmp_path / "x.tsv", feature_dim=0)
    with pytest.raises(ValueError, match="have 8 values a region, must have 2048"):
        RegionFeatures.open(tmp_path / "x.tsv", feature_dim=2048)["a"]


def test_rows_are_read_by_offset(tmp_path):
    path = make_bottom_up(tmp_path)
    features = RegionFeatures.open(path)
    opened = path.read_bytes()
    # rows other than the one asked for may change: they are not held in memory
    path.write_bytes(opened.replace(b64(image("17")["features"]).encode(), b"!" * len(b64(image("17")["features"]))))
    assert np.array_equal(features["sub_z"].features, image("sub_z")["features"])
    with pytest.raises(ValueError, match="x.tsv:2"):
        features["17"]


@pytest.mark.parametrize("stale", [False, True])
def test_lineidx_is_used_only_if_it_fits(tmp_path, monkeypatch, stale):
    path = make_lxmert(tmp_path)
    content = path.read_bytes()
    offsets = [0, *(i + 1 for i, c in enumerate(content[:-1]) if c == 10)]
    path.with_suffix(".lineidx").write_text("\n".join(map(str, [0, 5, offsets[-1]] if stale else offsets)))
    seen = []
    original = RegionFeatures.open.__func__.__globals__["open_source"].__globals__["TsvSource"]._listed_offsets
    monkeypatch.setattr(
        "vlmfast.data.region_tsv.TsvSource._listed_offsets", lambda *a: seen.append(original(*a)) or seen[-1]
    )
    assert [len(regions) for regions in RegionFeatures.open(path)] == list(COUNTS.values())
    assert seen == [None if stale else offsets]


@pytest.mark.parametrize("make", [make_bottom_up, make_mmf, make_lmdb, make_hdf5_groups], ids=lambda m: m.__name__[5:])
def test_workers_read_the_same(tmp_path, make):
    features = RegionFeatures.open(make(tmp_path))
    features["a"]
    # pickled as for a spawned worker, and used in a forked one
    assert np.array_equal(pickle.loads(pickle.dumps(features))["a"].boxes, image("a")["boxes"])
    loader = torch.utils.data.DataLoader(
        features, batch_sampler=[["a", "17"], ["sub_z"]], num_workers=1, collate_fn=collate_regions,
        multiprocessing_context="fork",
    )  # fmt: skip
    batches = list(loader)
    assert [batch.lengths.tolist() for batch in batches] == [[3, 1], [5]]
    assert np.array_equal(batches[1].features[0], image("sub_z")["features"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def evil_places(folder):
    good = image("a")["features"]
    np.save(folder / "a.npy", {"features": good, "bbox": Evil()}, allow_pickle=True)
    yield folder, None
    (folder / "a.npy").unlink()
    np.savez(folder / "a.npz", x=good, info=Evil())
    yield folder, None
    (folder / "a.npz").unlink()
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder / "x.lmdb"), map_size=1 << 20) as environment, environment.begin(write=True) as store:
        store.put(b"a", pickle.dumps({"features": good, "boxes": Evil()}))
    yield folder / "x.lmdb", "lmdb"


def test_pickles_are_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path, layout in evil_places(tmp_path / "data"):
        with pytest.raises(UnsafePickleError, match=r"\(image a\): the pickle refers to posix.mkdir.*allow-list"):
            RegionFeatures.open(path, layout)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_arrays_survive(protocol):
    record = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.float32(1.5),
        "flag": np.bool_(True),
        "texts": np.array(["a", "bc"]),
        "objects": np.array([{"x": 1}, None], dtype=object),
        "plain": [1, 2.5, "x", b"y", None, (True,)],
    }
    back = read_pickle(pickle.dumps(record, protocol=protocol))
    for name in ("f", "fortran", "big", "empty", "texts"):
        assert np.array_equal(back[name], record[name]) and back[name].shape == record[name].shape, name
    assert back["scalar"] == 1.5 and back["flag"] is True
    assert back["objects"] == [{"x": 1}, None] and back["plain"] == [1, 2.5, "x", b"y", None, [True]]


def test_damaged_and_swollen_pickles_are_refused():
    good = pickle.dumps({"f": np.ones(5)})
    for n in range(1, len(good) - 1, 7):
        with pytest.raises(ValueError):
            read_pickle(good[:n])
    swollen: list = []
    for _ in range(12):
        swollen = [swollen] * 10
    bombs = {
        "memo index": b"\x80\x02]r\xff\xff\xff\x7f.",
        "damaged pickle": b"\x80\x04\x96" + (1 << 60).to_bytes(8, "little") + b".",
        "values": pickle.dumps(swollen),
        "nested": pickle.dumps([[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]),
        "outside object": b"\x80\x02K\x01Q.",
    }
    for message, data in bombs.items():
        with pytest.raises(ValueError, match=message):
            read_pickle(data)


def test_npy_headers_must_tell_the_truth(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((2, 3), np.float32))
    data = buffer.getvalue()
    assert np.array_equal(read_npy(data), np.ones((2, 3)))
    with pytest.raises(ValueError, match="has 20 bytes, must have 24"):
        read_npy(data[:-4])
    with pytest.raises(ValueError, match="has 24 bytes, must have 12000000000000"):
        read_npy(swell(data))
    with pytest.raises(ValueError, match="not an .npy array"):
        read_npy(b"hello")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", data)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a.npz \(image a\): truncated or damaged .npz"):
        RegionFeatures.open(tmp_path)


def swell(data: bytes) -> bytes:
    """The same .npy file with a header that promises far more."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data[-24:]


def test_mismatched_rows_are_refused(tmp_path):
    x = image("a")
    for name, changes, message in (
        ("boxes", {"bbox": x["boxes"][:2]}, r"boxes are \[2, 4\], must be \[3, 4\]"),
        ("count", {"num_boxes": 4}, "num_boxes is 4, must be 1 ... 3"),
        ("classes", {"objects": x["classes"][:1]}, r"classes are \[1\], must have 3 rows"),
        ("kind", {"features": np.array(["x"] * 3)}, "features hold <U1, must be numbers"),
        ("size", {"image_width": None}, "no width of the image"),
        ("none", {"features": None}, "no features among"),
        ("empty", {"features": np.zeros((0, 8))}, "at least one region"),
        ("fraction", {"objects": x["classes"] + 0.5}, "classes hold float64, must be integers"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        record = {**mmf_info("a"), "features": x["features"], **changes}
        np.save(folder / "a.npy", record, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            RegionFeatures.open(folder)
    np.save(tmp_path / "bare.npy", x["features"])
    with pytest.raises(ValueError, match="no boxes, and the last six feature values are not"):
        RegionFeatures.open(tmp_path / "bare.npy")


@pytest.mark.parametrize(
    "json_text",
    ['{"num_boxes": 3}', "[1, 2]", '{"objects": []}', '{"objects": [1]}', '{"objects": [{"rect": [1]}]}',
     '{"objects": [{"rect": [1, 2, null, 4], "feature": "AAAAAA=="}]}', "[" * 5000, '{"num_boxes": 1, "features": 7}',
     '{"objects": [{"rect": [0, 0, 1, 1], "feature": 3}]}', '{"num_boxes": null, "features": "AAAA"}'],
)  # fmt: skip
def test_damaged_json_is_refused(tmp_path, json_text):
    with pytest.raises(ValueError, match=r"x.tsv:1 \(image a\): "):
        RegionFeatures.open(write_tsv(tmp_path / "x.tsv", [["a", json_text]]))


def test_hdf5_links_and_swollen_datasets_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = image("a")["features"]
    with h5py.File(make_hdf5_groups(tmp_path), "a") as file:
        for name in ("link", "huge"):
            group = file.create_group(name)
            group["boxes"], group["img_w"], group["img_h"] = image("a")["boxes"], WIDTH, HEIGHT
        file["link"]["features"] = h5py.ExternalLink("other.h5", "/secret")
        file["huge"].create_dataset("features", (1 << 40, 8), "f4", chunks=(1 << 10, 8))
    features = RegionFeatures.open(tmp_path / "x.h5")
    assert {"link", "huge"} < set(features.ids)
    for name, message in (("link", "features is no plain dataset"), ("huge", "bytes, must have at most")):
        with pytest.raises(ValueError, match=message):
            features[name]
    (tmp_path / "bad.h5").write_bytes((tmp_path / "x.h5").read_bytes()[:700])
    (tmp_path / "text.h5").write_text("hello")
    for name in ("bad.h5", "text.h5"):
        with pytest.raises(ValueError, match=name):
            RegionFeatures.open(tmp_path / name)


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ImportError, match="this format needs h5py: pip install h5py"):
        RegionFeatures.open(tmp_path / "x.h5")
