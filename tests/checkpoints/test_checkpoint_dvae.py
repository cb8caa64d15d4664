"""Discrete VAEs from public files: OpenAI's pickles, FLAVA's codebook, DALLE-pytorch's vae.pt; and from our folders."""

import os
import pickle
import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.layers.pixels import map_pixels
from vlmfast.models import DVAE, DVAEConfig

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
TINY = dict(image_size=32, vocab_size=40, n_hid=8, n_init=16, n_blk_per_group=2)
SMALL = dict(image_size=16, num_tokens=24, codebook_dim=12, num_layers=2, num_resnet_blocks=1, hidden_dim=10)


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Conv2d(nn.Module):
    """Stands in for `dall_e.utils.Conv2d`: parameters `w` and `b`, and attributes that a state dict lacks."""

    def __init__(self, conv):
        super().__init__()
        self.w, self.b = nn.Parameter(conv.weight.detach().clone()), nn.Parameter(conv.bias.detach().clone())
        self.n_in, self.use_float16, self.device = conv.in_channels, True, torch.device("cpu")


class Encoder(nn.Module):
    pass


class Decoder(nn.Module):
    pass


class EncoderBlock(nn.Module):
    """Stands in for `dall_e.encoder.EncoderBlock`, with an attribute that no tensor is."""

    n_layers = 8


@pytest.fixture
def dall_e(monkeypatch):
    """A stand-in package under which modules pickle as OpenAI's do; it is gone when they are read."""
    def write(module, kind, path, bomb=None, **options):
        homes = {"utils": (Conv2d,), "encoder": (Encoder, EncoderBlock), "decoder": (Decoder,)}
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            for name, classes in homes.items():
                file = types.ModuleType(f"dall_e.{name}")
                patch.setitem(sys.modules, f"dall_e.{name}", file)
                for home in classes:
                    setattr(file, home.__name__, home)
                    patch.setattr(home, "__module__", f"dall_e.{name}")
            root = {"encoder": Encoder, "decoder": Decoder}[kind]()
            root.n_hid, root.device, root.bomb = 8, torch.device("cpu"), bomb
            root.blocks = _published(module.blocks)
            torch.save(root, path, **options)
        return path

    return write


def _published(module):
    """A copy in which the classes of the published code stand for ours."""
    if isinstance(module, nn.Conv2d):
        return Conv2d(module)
    children = {name: _published(child) for name, child in module.named_children()}
    if isinstance(module, nn.Sequential):
        return nn.Sequential(OrderedDict(children))
    copy = EncoderBlock() if children else pickle.loads(pickle.dumps(module))
    for name, child in children.items():
        setattr(copy, name, child)
    return copy


def tiny(**overrides):
    model = vlmfast.create("openai-dvae", **{**TINY, **overrides}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return model


def assert_same(a, b):
    assert a.config == b.config
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before-1.6"])
def test_openai_pickles_are_read_without_their_classes(dall_e, tmp_path, options):
    model = tiny()
    files = [dall_e(getattr(model, kind), kind, tmp_path / f"{kind}.pkl", **options) for kind in ("encoder", "decoder")]
    assert "dall_e" not in sys.modules and b"dall_e.utils" in files[0].read_bytes()
    ours = load(*files, format="openai-dvae", config={"image_size": 32})
    assert_same(ours, model)
    assert not ours.training and all(value.requires_grad for value in ours.parameters())
    first, second = map(str, files)
    for found in (load(second, first), load(*files), load(tmp_path), load(first, second, "openai-dvae")):
        assert torch.equal(found.decoder.codebook, model.decoder.codebook)


def test_the_encoder_alone_gives_codes(dall_e, tmp_path):
    model = tiny()
    file = dall_e(model.encoder, "encoder", tmp_path / "encoder.pkl")
    ours, image = load(file), torch.rand(2, 3, 32, 24)
    assert detect_format(file) == "openai-dvae" and ours.config.decoder is False
    assert torch.equal(ours.encode(image), model.encode(image))
    with pytest.raises(ValueError, match="has no decoder"):
        ours.decode(ours.encode(image))
    other = dall_e(model.decoder, "decoder", tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match="encoder.blocks.input.weight is missing"):
        load(other)
    with pytest.raises(ValueError, match="must be an encoder and a decoder"):
        load(file, file)
    with pytest.raises(FileNotFoundError, match="absent.pkl"):
        load(file, tmp_path / "absent.pkl")
    with pytest.raises(ValueError, match="must be an encoder and a decoder"):
        load(file, other, other)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(dall_e, tmp_path, legacy, protocol):
    target, path = tmp_path / "ran", tmp_path / "encoder.pkl"
    dall_e(tiny().encoder, "encoder", path, Attack(target), _use_new_zipfile_serialization=not legacy,
           pickle_protocol=protocol)
    with pytest.raises(UnsafePickleError, match=r"posix.system|nt.system"):
        load(path, format="openai-dvae")
    path.write_bytes(pickle.dumps(Attack(target), protocol=protocol))
    with pytest.raises(ValueError, match="encoder.pkl"):
        load(path, format="openai-dvae")
    assert not target.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_pickles_give_a_clear_error(dall_e, tmp_path, legacy):
    path = dall_e(tiny().encoder, "encoder", tmp_path / "encoder.pkl", _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in [0, 1, 9, 100, 1000, 5000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="encoder.pkl"):
            load(path, format="openai-dvae")


def test_a_storage_of_another_size_is_refused(dall_e, tmp_path):
    path = dall_e(tiny().encoder, "encoder", tmp_path / "encoder.pkl", _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    last = (40).to_bytes(8, "little")  # the bias of the logits comes last, one number a code
    place = whole.rindex(last)
    path.write_bytes(whole[:place] + (39).to_bytes(8, "little") + whole[place + 8 : -4])
    with pytest.raises(ValueError, match="has 39 elements, must have 40"):
        load(path, format="openai-dvae")


def test_altered_bytes_never_escape_as_another_error(dall_e, tmp_path):
    path = dall_e(tiny(n_blk_per_group=1).encoder, "encoder", tmp_path / "encoder.pkl",
                  _use_new_zipfile_serialization=False)
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for place in torch.randint(0, 4000, (150,), generator=generator).tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            load(path, format="openai-dvae")
        except ValueError as error:
            assert "encoder.pkl" in str(error)


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import save_file

    state = tiny().state_dict()
    del state["decoder.blocks.group_2.block_1.id_path.bias"]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "dvae.safetensors")
    with pytest.raises(ValueError, match="missing keys: decoder.blocks.group_2.block_1.id_path.bias"):
        load(tmp_path / "dvae.safetensors")


@pytest.mark.parametrize("case", ["encode_decode_loss", "encode_decode_loss_cold"])
def test_openai_reference_numbers(golden, golden_close, tmp_path, case):
    from safetensors.torch import save_file

    weights, inputs, outputs, meta = golden(f"generative/openai_dvae__{case}")
    config = meta["config"]
    for kind in ("encoder", "decoder"):
        part = {key.removeprefix(f"{kind}."): value.float() for key, value in weights.items() if key.startswith(kind)}
        save_file(part, tmp_path / f"{kind}.safetensors")
    model = load(tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors")
    image = inputs["pixels"]
    assert torch.equal(model.encode(image), outputs["ids"])
    golden_close(model.target(image), outputs["mapped_pixels"])
    golden_close(model.logits(image), outputs["logits"])
    golden_close(model.statistics(outputs["ids"]), outputs["stats_from_ids"])
    golden_close(model.decode(outputs["ids"]), outputs["reconstruction_from_ids"])

    from vlmfast.objectives import dalle_loss, logit_laplace_loss

    out = model(image, config["tau"], noise=inputs["gumbel"])
    golden_close(out.raw, outputs["stats"])
    golden_close(logit_laplace_loss(out.raw, image), outputs["loss.recon_sum"])
    positions = out.codes[0].numel()
    golden_close(out.kl * positions, outputs["loss.kl_sum"].mean())
    loss = dalle_loss(out.raw, out.kl, image, positions, config["beta"])
    golden_close(loss.total, outputs["loss.total"])
    # codes that hardly matter have gradients of pure rounding error in float32
    model, image = model.double(), image.double()
    out = model(image, config["tau"], noise=inputs["gumbel"])
    dalle_loss(out.raw, out.kl, image, positions, config["beta"]).total.backward()
    cold = case.endswith("cold")
    for name, ours, tolerance in (
            ("encoder.blocks.output.conv.w", model.encoder.blocks.output.conv.weight, 1e-3 if cold else 1e-4),
            ("encoder.blocks.input.b", model.encoder.blocks.input.bias, 1e-4 if cold else 5e-5),
            ("decoder.blocks.input.w", model.decoder.blocks.input.weight, 5e-5)):
        golden_close(ours.grad, outputs[f"grad.{name}"], tolerance)


PUBLIC = dict(n_hid=256, n_blk_per_group=2, vocab_size=8192)


@pytest.mark.oracle
@pytest.mark.parametrize("sizes", [TINY, dict(TINY, n_hid=32, n_blk_per_group=1, vocab_size=300),
                                   pytest.param(PUBLIC, marks=pytest.mark.slow)], ids=["tiny", "wider", "public"])
def test_equal_to_transformers_flava_codebook(tmp_path, sizes):
    transformers = pytest.importorskip("transformers")
    settings = transformers.FlavaImageCodebookConfig(
        hidden_size=sizes["n_hid"], num_blocks_per_group=sizes["n_blk_per_group"], vocab_size=sizes["vocab_size"])
    theirs = transformers.FlavaImageCodebook(settings).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    image = torch.rand(2, 3, 48, 32)
    ours = load(tmp_path / "theirs")
    assert detect_format(tmp_path / "theirs") == "flava" and detect_format(
        tmp_path / "theirs" / "model.safetensors") == "flava"
    with torch.no_grad():
        assert torch.equal(ours.logits(image), theirs(map_pixels(image)))
        assert torch.equal(ours.encode(image), theirs.get_codebook_indices(map_pixels(image)))
    save_pretrained(ours, tmp_path / "ours")
    again = transformers.FlavaImageCodebook.from_pretrained(tmp_path / "ours").eval()
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert_same(load(tmp_path / "ours"), ours)


def test_flava_inside_a_larger_model_is_found(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny(decoder=False, n_init=128)
    save_pretrained(model, tmp_path / "alone")
    state = {f"image_codebook.{key}": value for key, value in load_file(tmp_path / "alone/model.safetensors").items()}
    save_file({**state, "flava.text_model.weight": torch.zeros(2)}, tmp_path / "whole.safetensors")
    found = load(tmp_path / "whole.safetensors", format="flava", config={"image_size": 32})
    assert_same(found, model)


@pytest.mark.parametrize("case", ["soft_mse", "straight_through"])
def test_dalle_pytorch_reference_numbers(golden, golden_close, tmp_path, case):
    from vlmfast.objectives import discrete_vae_loss

    weights, inputs, outputs, meta = golden(f"generative/dallepytorch_dvae__{case}")
    settings = meta["config"]["vae"]
    torch.save({"hparams": settings, "weights": {key: value.float() for key, value in weights.items()}, "epoch": 3},
               tmp_path / "vae.pt")
    assert detect_format(tmp_path / "vae.pt") == "dalle-pytorch-vae"
    model = load(tmp_path / "vae.pt")
    image, kl_weight = inputs["images"], settings["kl_div_loss_weight"]
    assert model.config.straight_through == settings.get("straight_through", False)
    golden_close(model.logits(image), outputs["logits"])
    assert torch.equal(model.encode(image).flatten(1), outputs["codebook_indices"])
    picture = model.decode(inputs["ids"])
    golden_close(picture, (outputs["decoded_ids"] * 0.5 + 0.5).clamp(0, 1))
    out = model(image, meta["config"]["temp"], noise=inputs["gumbel"])
    golden_close(out.raw, outputs["recon"])
    positions = out.codes.numel()
    golden_close(out.kl * positions, outputs["kl_as_in_code"])
    kind = "smooth_l1" if model.config.smooth_l1_loss else "mse"
    loss = discrete_vae_loss(out.raw, out.kl, model.target(image), kind, kl_weight * positions)
    golden_close(loss.total, outputs["loss"])
    loss.total.backward()
    golden_close(model.codebook.weight.grad, outputs["grad.codebook.weight"])
    golden_close(model.encoder[-1].weight.grad, outputs["grad.encoder.last.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, sizes", [
    ("openai-dvae", TINY), ("openai-dvae", dict(TINY, decoder=False, image_size=112, n_init=128)),
    ("dvae-small", SMALL), ("dvae-small", dict(SMALL, normalization=None))])
def test_save_and_load_is_exact(tmp_path, name, sizes, dtype):
    model = vlmfast.create(name, **sizes).to(dtype).eval()
    save_pretrained(model, tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same(load(path), model)
    found = load(tmp_path, "vlmfast")
    assert_same(found, model)
    picture = torch.full((50, 60, 3), 51, dtype=torch.uint8).numpy()
    assert found.preprocess(picture).shape == (3, model.config.image_size, model.config.image_size)
    assert found.preprocess(picture).unique().tolist() == pytest.approx([0.2])


def test_bare_weights_tell_the_sizes(tmp_path):
    model = vlmfast.create("dvae-small", **SMALL)
    torch.save(model.state_dict(), tmp_path / "vae.pt")
    assert_same(load(tmp_path / "vae.pt", config={"image_size": 16}), model)


def test_wrong_settings_are_refused(tmp_path):
    save_pretrained(tiny(), tmp_path)
    with pytest.raises(ValueError, match="unknown fields width"):
        load(tmp_path, config={"width": 3})
    with pytest.raises(ValueError, match="config has 4000 blocks"):
        load(tmp_path, config={"n_blk_per_group": 1000})
    with pytest.raises(ValueError, match=r"must be torch.float32 \[48"):
        load(tmp_path, config={"vocab_size": 48})
    with pytest.raises(ValueError, match="quick_gelu belong to CLIP"):
        load(tmp_path, quick_gelu=True)
    with pytest.raises(ValueError, match="n_hid is 6, must be a multiple of 4"):
        DVAE(DVAEConfig(n_hid=6))
