"""Hostile and damaged files: a clear error, never execution."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from checkpoint_helpers import tiny_model

from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.checkpoints.torchscript import read_torchscript

SHELL = f"{os.system.__module__}.system"  # posix.system or nt.system


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def script_archive(path, tree: bytes, blobs=(), compression=zipfile.ZIP_STORED, extra=("constants.pkl",)):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", tree)
        for key, blob in dict(blobs).items():
            archive.writestr(f"model/data/{key}", blob)
        for name in extra:
            archive.writestr(f"model/{name}", b"")
    return path


def module_tree(size=(2, 2), stride=(2, 1), offset=0, count=4, key="0", storage="FloatStorage") -> bytes:
    """A scripted module with one tensor `weight`, in the opcodes TorchScript writes."""

    def number(n):
        data = pickle.encode_long(n)
        return b"\x8a" + bytes([len(data)]) + data if n else b"K\x00"

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def numbers(values):
        return b"(" + b"".join(number(n) for n in values) + b"t"

    pid = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number(offset) + numbers(size) + numbers(stride)
    return b"\x80\x02c__torch__.m\nM\n)\x81}(" + text("weight") + tensor + b"\x89" + hooks + b"tRub."


def test_well_formed_archive_gives_its_tensor(tmp_path):
    values = torch.arange(4.0)
    path = script_archive(tmp_path / "a.pt", module_tree(), {"0": values.numpy().tobytes()})
    assert detect_format(path) == "openai"
    assert torch.equal(read_torchscript(path)["weight"], values.reshape(2, 2))


@pytest.mark.parametrize("protocol", range(6))
def test_script_archive_with_os_system_is_refused_and_not_run(tmp_path, protocol):
    target = tmp_path / "ran"
    path = script_archive(tmp_path / "a.pt", pickle.dumps(Attack(target), protocol=protocol))
    with pytest.raises(UnsafePickleError, match=SHELL):
        load(path)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle_with_os_system_is_refused_and_not_run(tmp_path, protocol):
    target = tmp_path / "ran"
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(Attack(target), protocol=protocol))
    with pytest.raises(UnsafePickleError, match=SHELL if protocol < 4 else "Unsupported operand"):
        load(path, "open_clip")
    for format, message in ((None, "unpickle|not a checkpoint"), ("openai", "damaged zip")):
        with pytest.raises(ValueError, match=message):
            load(path, format)
    assert not target.exists()


def test_torch_save_with_os_system_is_refused_and_not_run(tmp_path):
    target = tmp_path / "ran"
    torch.save({"weight": torch.zeros(2), "bomb": Attack(target)}, tmp_path / "a.pt")
    with pytest.raises(UnsafePickleError, match=SHELL):
        load(tmp_path / "a.pt")
    assert not target.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "builtins getattr", "torch load", "torch._utils _rebuild_tensor", "numpy.core.multiarray scalar",
     "collections OrderedDict.fromkeys", "torch._utils _rebuild_tensor_v2.__globals__", "torch BoolStorage.x"],
)
def test_every_other_global_is_refused_by_name(tmp_path, name):
    module, attribute = name.split()
    path = script_archive(tmp_path / "a.pt", f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UnsafePickleError, match=f"{module}.{attribute}, which is not on the allow-list"):
        load(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(size=(3, 2)), "exceeds its storage of 4 elements"),
        (dict(stride=(3, 1)), "exceeds its storage"),
        (dict(offset=1), "exceeds its storage"),
        (dict(offset=2**62), "exceeds its storage"),
        (dict(offset=-1), "offset -1"),
        (dict(size=(2, -2)), "size"),
        (dict(stride=(2, -1)), "stride"),
        (dict(size=(2,)), "size"),
        (dict(size=(2**40, 2**40), stride=(0, 0)), "exceeds its storage"),
        (dict(size=(0, 2**62), stride=(2**62, 1), offset=5), "exceeds its storage"),
        (dict(count=5), "has 16 bytes, must have 5 x 4"),
        (dict(count=2**60), "has 16 bytes"),
        (dict(count=-4), "-4 elements"),
        (dict(key="1"), "record model/data/1 is missing"),
        (dict(key="../../data/0"), "is missing"),
        (dict(storage="QInt8Storage"), "torch.QInt8Storage, which is not on the allow-list"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(tmp_path, fields, message):
    path = script_archive(tmp_path / "a.pt", module_tree(**fields), {"0": bytes(16)})
    with pytest.raises(ValueError, match=message):
        read_torchscript(path)


def test_empty_tensor_is_allowed(tmp_path):
    path = script_archive(tmp_path / "a.pt", module_tree(size=(0, 3), stride=(3, 1), count=0), {"0": b""})
    assert read_torchscript(path)["weight"].shape == (0, 3)


@pytest.mark.parametrize(
    "tree, message",
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo index 2147483647"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged or not a TorchScript archive"),
        (b"\x80\x02c__torch__.m\nM\n)\x81", "damaged or not a TorchScript archive"),
        (b"\x80\x02K\x01.", "data.pkl holds a int, must be a module"),
        (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", "data.pkl"),
        (b"", "damaged or not a TorchScript archive"),
        (b"\x80\x02c__torch__.m\nM\n)\x81)R.", "damaged or not a TorchScript archive"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "unknown storage reference"),
        (b"\x80\x02\x82\x01.", "unregistered extension code 1"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01K\x01tR.", "a int for its storage"),
    ],
)
def test_damaged_pickles_are_refused(tmp_path, tree, message):
    path = script_archive(tmp_path / "a.pt", tree)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_torchscript(path)


def test_pickles_cannot_alter_a_tensor_they_made(tmp_path):
    tensor = module_tree().partition(b"weight")[2].removesuffix(b"ub.")
    path = script_archive(tmp_path / "a.pt", b"\x80\x02" + tensor + b"(N}X\x01\x00\x00\x00aNstb.", {"0": bytes(16)})
    with pytest.raises(ValueError, match="damaged or not a TorchScript archive"):
        read_torchscript(path)


def test_modules_that_contain_themselves_end(tmp_path):
    tree = b"\x80\x02c__torch__.m\nM\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00ub."
    assert read_torchscript(script_archive(tmp_path / "a.pt", tree)) == {}


def test_deep_modules_are_refused(tmp_path):
    open_module = b"c__torch__.m\nM\n)\x81}(X\x01\x00\x00\x00a"
    tree = b"\x80\x02" + open_module * 200 + b"N" + b"ub" * 200 + b"."
    with pytest.raises(ValueError, match="nest deeper than 64"):
        read_torchscript(script_archive(tmp_path / "a.pt", tree))


@pytest.mark.parametrize("blob", [bytes(1 << 20), os.urandom(1 << 12)], ids=["bomb", "incompressible"])
def test_compressed_records_are_refused(tmp_path, blob):
    path = script_archive(tmp_path / "a.pt", module_tree(), {"0": blob}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or overlap"):
        load(path)


def test_archive_without_clip_tensors_says_what_is_missing(tmp_path):
    path = script_archive(tmp_path / "a.pt", module_tree(), {"0": bytes(16)})
    with pytest.raises(ValueError, match="not a CLIP checkpoint: positional_embedding is missing"):
        load(path)


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 100, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    save_pretrained(model, tmp_path / "folder")
    for path in (tmp_path / "weights.pt", tmp_path / "folder" / "model.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
        with pytest.raises(ValueError):
            load(path)


def test_truncated_script_archive_is_refused(golden, shared_dir, tmp_path):
    golden("encoders/clip_torchscript__vit")
    data = (shared_dir / "golden" / "encoders" / "clip_torchscript__vit.pt").read_bytes()
    for part in (0.1, 0.5, 0.99):
        (tmp_path / "a.pt").write_bytes(data[: int(len(data) * part)])
        with pytest.raises(ValueError, match="truncated or damaged zip"):
            load(tmp_path / "a.pt")


def test_flipped_bytes_are_noticed(golden, shared_dir, tmp_path):
    golden("encoders/clip_torchscript__vit")
    data = bytearray((shared_dir / "golden" / "encoders" / "clip_torchscript__vit.pt").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "a.pt")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "picture.pt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with pytest.raises(ValueError, match="neither a zip archive nor safetensors nor a pickle"):
        load(tmp_path / "picture.pt")
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").writestr("notes.txt", "hello")
    (tmp_path / "notes.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="without data.pkl"):
        load(tmp_path / "notes.pt")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="no checkpoint; must hold config.json"):
        load(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, must be a dict of tensors"):
        load(tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match="entry 'a' is a int, must be a tensor"):
        load(tmp_path / "number.pt")
    with pytest.raises(ValueError, match="format is 'onnx', must be one of openai, open_clip, huggingface, vlmfast"):
        load(tmp_path / "list.pt", "onnx")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "siglip"}, "model_type is 'siglip', must be 'clip'"),
        ({"text_config": [1]}, "wrong type"),
        ({"text_config": {"hidden_act": ["gelu"]}}, "wrong type|differs"),
        ({"vision_config": {"hidden_size": 0}}, "wrong sizes|positive"),
        ({"vision_config": {"num_hidden_layers": 10**12}}, "blocks, the file only"),
        ({"vision_config": {"image_size": 10**18}}, "absurd|exceed|must be"),
        ({"projection_dim": None}, "embed_dim is None"),
    ],
)
def test_wrong_hugging_face_configs_are_refused(tmp_path, change, message):
    save_pretrained(tiny_model(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(content[key], dict)
        content[key] = {**content[key], **value} if both else value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe", "[" * 100_000])
def test_damaged_json_is_refused(tmp_path, text):
    save_pretrained(tiny_model(), tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json"):
        load(tmp_path)
