"""LXMERT files: the authors' layouts, Hugging Face folders both ways, strictness, saving."""

import dataclasses
import json

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.two_stream_helpers import LXMERT_SIZES, inputs, perturb, tiny_lxmert
from safetensors.torch import load_file, save_file

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.models import LXMERTConfig

COPY, TABLE = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def hf_config(transformers, **overrides):
    return transformers.LxmertConfig(**{**LXMERT_SIZES, **overrides})


def assert_same_results(ours, theirs, atol):
    given = inputs(ours)
    arguments = dict(input_ids=given["input_ids"], visual_feats=given["image_feat"], visual_pos=given["image_loc"],
                     attention_mask=given["attention_mask"], visual_attention_mask=given["image_mask"],
                     token_type_ids=given["token_type_ids"])
    text, image = given["attention_mask"].bool(), given["image_mask"].bool()
    with torch.no_grad():
        output, truth = ours(**given), theirs(**arguments)
        trunk = getattr(theirs, "lxmert", theirs)(**arguments)
    pairs = [(output.pooled, trunk.pooled_output), (output.text_hidden[text], trunk.language_output[text]),
             (output.image_hidden[image], trunk.vision_output[image])]
    if "mlm" in output.logits:
        pairs.append((output.logits["mlm"][text], truth.prediction_logits[text]))
        pairs.append((output.logits["matched"], truth.cross_relationship_score))
    if "vqa" in output.logits:
        pairs.append((output.logits["vqa"], truth.question_answering_score))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    if "obj" in output.logits:
        regions = theirs.obj_predict_head(trunk.vision_output)
        assert regions.keys() == output.logits.keys() - {"mlm", "matched", "vqa"}
        for name, value in regions.items():
            torch.testing.assert_close(output.logits[name][image], value[image], rtol=0, atol=atol)


KINDS = {"LxmertForPreTraining": "pretraining", "LxmertForQuestionAnswering": "vqa", "LxmertModel": "none"}


@pytest.mark.oracle
@pytest.mark.parametrize("std, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
@pytest.mark.parametrize("kind", KINDS)
def test_loads_what_transformers_wrote(transformers, tmp_path, kind, std, atol):
    theirs = perturb(getattr(transformers, kind)(hf_config(transformers)), std)
    theirs.save_pretrained(tmp_path)
    assert detect_format(tmp_path) == "lxmert"
    ours = vlmfast.load(tmp_path)
    assert ours.config.heads == KINDS[kind] and ours.config.visual_loss_normalizer == 6.67
    assert_same_results(ours, theirs, atol)
    assert_same_model(load(tmp_path, "huggingface"), ours)
    assert_same_model(load(tmp_path / "model.safetensors"), ours)


@pytest.mark.oracle
@pytest.mark.parametrize("std, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
@pytest.mark.parametrize("fields", [{}, {"visual_attr_loss": False}, {"task_qa": False}, {"task_obj_predict": False},
                                    {"heads": "vqa"}, {"heads": "none"}], ids=str)
def test_transformers_reads_what_we_wrote(transformers, tmp_path, fields, std, atol):
    ours = tiny_lxmert(std, **fields)
    assert save_pretrained(ours, tmp_path) == "huggingface"
    kind = {heads: name for name, heads in KINDS.items()}[ours.config.heads]
    theirs, report = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same_results(ours, theirs.eval(), atol)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_round_trip_keeps_every_bit(transformers, tmp_path, kind):
    theirs = perturb(getattr(transformers, kind)(hf_config(transformers)))
    theirs.save_pretrained(tmp_path / "theirs")
    save_pretrained(load(tmp_path / "theirs"), tmp_path / "ours")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("case, heads", [("pretrain_init", "pretraining"), ("pretrain_std03", "pretraining"),
                                         ("vqa_std03", "vqa")])
def test_reference_weights_load(golden, tmp_path, case, heads):
    weights, given, truth, metadata = golden(f"bert_like/lxmert__{case}")
    torch.save(weights, tmp_path / "model_LXRT.pth")
    assert detect_format(tmp_path / "model_LXRT.pth") == "lxmert"
    model = vlmfast.load(tmp_path / "model_LXRT.pth", format="lxmert", config={"num_attention_heads": 4})
    assert model.config.heads == heads and not model.config.visual_attr_loss or heads == "vqa"
    placed = len(model.state_dict()) + any(key.endswith(COPY) for key in weights)
    assert placed == len(weights)
    with torch.no_grad():
        output = model(*(given[name] for name in ("input_ids", "image_feat", "image_loc", "token_type_ids",
                                                  "attention_mask")))
    expected = truth["vqa_logits" if heads == "vqa" else "answer_logits"]
    torch.testing.assert_close(output.logits["vqa"], expected, rtol=0, atol=float(metadata["atol"]))
    torch.testing.assert_close(output.pooled, truth["pooled"], rtol=0, atol=float(metadata["atol"]))


def as_public(model, prefix="module."):
    state = dict(model.state_dict())
    if model.config.heads == "pretraining":
        state[COPY] = state[TABLE]
    return {prefix + key: value for key, value in state.items()}


def public_sizes(**overrides):
    """64 channels per head as in the public model, so that nothing needs a config file."""
    return tiny_lxmert(hidden_size=64, num_attention_heads=1, **overrides)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("fields", [{}, {"visual_obj_loss": False, "visual_attr_loss": False}, {"task_qa": False},
                                    {"task_obj_predict": False}, {"r_layers": 0}], ids=str)
def test_sizes_are_read_off_the_tensors(tmp_path, prefix, fields):
    model = public_sizes(**fields)
    torch.save(as_public(model, prefix), tmp_path / "Epoch20_LXRT.pth")
    loaded = load(tmp_path / "Epoch20_LXRT.pth")
    absent = {"task_obj_predict": ("num_object_labels", "num_attr_labels", "visual_obj_loss", "visual_attr_loss",
                                   "visual_feat_loss"), "task_qa": ("num_qa_labels",),
              "visual_obj_loss": ("num_object_labels", "num_attr_labels")}
    unknown = [name for field in fields for name in absent.get(field, ())]  # no tensor tells these
    expected = dataclasses.replace(model.config, **{name: getattr(loaded.config, name) for name in unknown})
    model.config = expected
    assert_same_model(loaded, model)


@pytest.mark.parametrize("fields", [{}, {"images_per_answer": 2, "num_qa_labels": 2}], ids=str)
def test_fine_tuned_files_load(tmp_path, fields):
    model = public_sizes(heads="vqa", **fields)
    state = {}
    for key, value in model.state_dict().items():
        trunk = key.startswith("bert.")
        state[f"lxrt_encoder.model.{key}" if trunk else key.removeprefix("answer_head.")] = value
    torch.save(state, tmp_path / "BEST.pth")
    loaded = load(tmp_path / "BEST.pth")
    model.config = dataclasses.replace(model.config, num_object_labels=1600, num_attr_labels=400)
    assert_same_model(loaded, model)


@pytest.mark.parametrize("fields", [{}, {"heads": "vqa"}, {"heads": "none"}, {"visual_attr_loss": False},
                                    {"task_obj_predict": False}, {"heads": "vqa", "images_per_answer": 2},
                                    {"task_matched": False, "hidden_act": "relu"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = tiny_lxmert(**fields).to(dtype)
    save_pretrained(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path, "lxmert")):
        assert_same_model(loaded, model)


def test_missing_and_unknown_keys_carry_the_names_of_the_file(tmp_path):
    save_pretrained(tiny_lxmert(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lxmert.encoder.x_layers.0.visual_attention.att.key.bias"]
    state["lxmert.surprise"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert ("missing keys: lxmert.encoder.x_layers.0.visual_attention.att.key.bias; unknown keys: lxmert.surprise"
            in str(error.value))
    with pytest.warns(UserWarning, match="unknown keys: lxmert.surprise"):
        load(tmp_path, strict=False)


def test_old_hugging_face_pickle_with_a_tied_copy_loads(tmp_path):
    model = tiny_lxmert()
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    state[COPY] = state["lxmert.embeddings.word_embeddings.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_model(load(tmp_path), model)
    torch.save({**state, COPY: state[COPY] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{COPY} differs from lxmert.embeddings.word_embeddings.weight"):
        load(tmp_path)


def test_wrong_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"module.bert.encoder.x_layers.0": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not an LXMERT checkpoint: bert.embeddings.word_embeddings.weight is missing"):
        load(tmp_path / "other.pth", "lxmert")
    torch.save(as_public(tiny_lxmert()), tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="does not tell num_attention_heads; pass config="):
        load(tmp_path / "narrow.pth")
    assert load(tmp_path / "narrow.pth", config=LXMERTConfig(**LXMERT_SIZES)).config.num_attention_heads == 4
    save_pretrained(tiny_lxmert(), tmp_path / "folder")
    content = json.loads((tmp_path / "folder" / "config.json").read_text())
    for wrong, message in (({"model_type": "visual_bert"}, "model_type is 'visual_bert', must be 'lxmert'"),
                           ({"l_layers": 10**9}, "blocks"), ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
                           ({"hidden_size": "32"}, "hidden_size is '32'"),
                           ({"vocab_size": 5}, "must be torch.float32 .5"),
                           ({"num_attention_heads": 5}, "must be a divisor")):
        (tmp_path / "folder" / "config.json").write_text(json.dumps({**content, **wrong}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "folder", "lxmert")
    with pytest.raises(ValueError, match="config belongs to other models than CLIP"):
        load(tmp_path / "other.pth", "open_clip", config={})
