"""ImageBERT folders: no public weights exist, so the own round trip, strictness and untrusted content."""

import dataclasses
import json

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.tiny_models import IMAGEBERT_SIZES, assert_text_equals_bert, imagebert_inputs, save_tiny_bert
from models.tiny_models import tiny_imagebert as tiny

from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.models.imagebert import ImageBERTConfig

TABLE = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("fields", [{}, {"heads": ("rank",)}, {"heads": (), "image_sep": False},
                                    {"image_position": "sequence"}, {"classifier_images": 2, "classifier_labels": 7},
                                    {"layer_norm_eps": 1e-5, "hidden_act": "relu"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = tiny(**fields).to(dtype)
    assert save_pretrained(model, tmp_path) == "imagebert"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert detect_format(tmp_path) == detect_format(tmp_path / "pytorch_model.bin") == "imagebert"
    given = imagebert_inputs()
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path / "pytorch_model.bin")):
        assert_same_model(loaded, model)
        assert torch.equal(loaded(**given).hidden, model(**given).hidden)


@pytest.mark.parametrize("fields", [{}, {"heads": ("pretraining",)}, {"image_position": "sequence"}, {"heads": ()},
                                    {"heads": ("classifier",), "classifier_images": 2}], ids=str)
def test_sizes_are_read_off_the_tensors(tmp_path, fields):
    model = tiny(**{"hidden_size": 64, "num_attention_heads": 1, "vocab_size": 120, "sep_token_id": 102, **fields})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    untold = {"pretraining": ("num_object_labels",), "classifier": ("classifier_labels", "classifier_images")}
    names = [name for head, names in untold.items() if head not in model.config.heads for name in names]
    model.config = dataclasses.replace(model.config, **{name: getattr(loaded.config, name) for name in names})
    assert_same_model(loaded, model)


def test_missing_and_unknown_keys_are_named(tmp_path):
    save_pretrained(tiny(), tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del state["bert.embeddings.image_location_embeddings.bias"]
    state["cls.surprise"] = torch.zeros(1)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert ("missing keys: bert.embeddings.image_location_embeddings.bias; unknown keys: cls.surprise"
            in str(error.value))
    with pytest.warns(UserWarning, match="unknown keys: cls.surprise"):
        load(tmp_path, strict=False)


def test_wrong_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"bert.embeddings.image_location_embeddings.bias": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="not an ImageBERT checkpoint: bert.embeddings.image_location_embeddings.weig"):
        load(tmp_path / "other.bin", "imagebert")
    torch.save(tiny().state_dict(), tmp_path / "narrow.bin")
    with pytest.raises(ValueError, match="does not tell num_attention_heads; pass config="):
        load(tmp_path / "narrow.bin")
    assert load(tmp_path / "narrow.bin", config=ImageBERTConfig(**IMAGEBERT_SIZES)).config.sep_token_id == 2
    save_pretrained(tiny(), tmp_path / "folder")
    content = json.loads((tmp_path / "folder" / "config.json").read_text())
    for wrong, message in (({"layers": 3}, "unknown fields layers"), ({"model_type": "vdbert"}, "model_type is 'vdb"),
                           ({"num_hidden_layers": 10**9}, "blocks"), ({"vocab_size": 5}, "must be torch.float32 .5"),
                           ({"hidden_size": "32"}, "hidden_size is '32'")):
        (tmp_path / "folder" / "config.json").write_text(json.dumps({**content, **wrong}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "folder", "imagebert")


@pytest.mark.oracle
def test_text_stream_starts_from_bert(tmp_path):
    bert = save_tiny_bert(tmp_path, max_position_embeddings=24)
    assert_text_equals_bert(tiny(heads=("pretraining",)), bert, tmp_path, "itm")
