"""VisualBERT files: the authors' layout, MMF's, Hugging Face folders both ways, strictness, saving."""

import dataclasses
import json

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.single_stream_helpers import SIZES, assert_near, inputs, tiny
from models.two_stream_helpers import perturb
from safetensors.torch import load_file, save_file

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained

COPY, TABLE = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
KINDS = {"VisualBertForPreTraining": ("pretraining",), "VisualBertForQuestionAnswering": ("vqa",),
         "VisualBertForVisualReasoning": ("nlvr2",), "VisualBertForMultipleChoice": ("vcr",),
         "VisualBertForRegionToPhraseAlignment": ("pretraining", "flickr"), "VisualBertModel": ()}
HEAD_COUNT = {"num_attention_heads": 4}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def sized(heads: tuple[str, ...] = (), **overrides):
    """64 channels a head as in the public models, so that nothing needs a config file; public class counts."""
    return tiny("visualbert", **{**dict(hidden_size=64, num_attention_heads=1, heads=heads), **overrides})


def as_public(model, prefix="bert.") -> dict:
    """The state dict as the authors' training code would save it."""
    state = {}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        state[prefix + (f"classifier.{rest}" if part.endswith("_classifier") else key)] = value
    if "pretraining" in model.config.heads:
        state[prefix + COPY] = state[prefix + TABLE]
    if "flickr" in model.config.heads:
        state |= {f"{prefix}flickr_attention.value.{kind}": torch.randn(3) for kind in ("weight", "bias")}
    return state


@pytest.mark.parametrize("case, heads, output", [
    ("pretrain_init", ("pretraining",), "nsp"), ("pretrain_std03", ("pretraining",), "nsp"),
    ("vqa_std03", ("vqa",), "vqa"), ("vcr_choice_init", ("vcr",), "choice"),
])
def test_reference_weights_load(golden, tmp_path, case, heads, output):
    weights, given, truth, metadata = golden(f"bert_like/visualbert__{case}")
    torch.save(weights, tmp_path / "model.th")
    assert detect_format(tmp_path / "model.th") == "visualbert"
    model = vlmfast.load(tmp_path / "model.th", config=HEAD_COUNT)
    assert model.config.heads == heads and model.config.visual_type == 0
    copies = sum(key.endswith("decoder.weight") for key in weights)
    assert len(model.state_dict()) + copies == len(weights)
    if case.startswith("vcr"):
        given = {name: value.flatten(0, 1) for name, value in given.items() if value.ndim > 1}
    with torch.no_grad():
        found = model(**{name: given[name] for name in ("input_ids", "image_feat", "token_type_ids", "attention_mask",
                                                        "image_mask")})
    atol = float(metadata["atol"])
    assert_near(found.pooled, truth["pooled"], atol, "pooled")
    expected = truth[f"{output}_logits"]
    assert_near(found.logits["vcr" if output == "choice" else output].view(expected.shape), expected, atol, output)


@pytest.mark.parametrize("fields", [
    dict(heads=("pretraining",)), dict(heads=("vqa",), vqa_labels=19), dict(heads=("nlvr2",)), dict(heads=("vcr",)),
    dict(heads=("pretraining", "flickr")), dict(heads=("classifier",), classifier_labels=7),
    dict(heads=("classifier",), classifier_labels=2, classifier_images=2), dict(heads=()),
    dict(heads=("pretraining",), bypass_transformer=True),
], ids=str)
@pytest.mark.parametrize("prefix", ["bert.", "", "module.bert.", "model."])
def test_sizes_and_heads_are_read_off_the_tensors(tmp_path, fields, prefix):
    model = sized(**fields)
    torch.save(as_public(model, prefix), tmp_path / "model.th")
    loaded = load(tmp_path / "model.th")
    # nothing in the file tells these
    free = {name: getattr(loaded.config, name) for name in ("vqa_labels", "nlvr2_labels", "classifier_labels")}
    model.config = dataclasses.replace(model.config, **{**free, **fields})
    assert_same_model(loaded, model)


def test_vcr_files_bring_a_detector_and_old_files_old_names(tmp_path):
    model = sized(("vcr",))
    state = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
             for key, value in as_public(model).items()}
    assert any(key.endswith("gamma") for key in state)
    state["detector.backbone.0.weight"] = torch.zeros(2)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.th")
    loaded = load(tmp_path / "model.th")
    assert loaded.config.heads == ("vcr",)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_config_says_which_task_a_classifier_is_for(tmp_path):
    model = sized(("vqa",), vqa_labels=2)
    torch.save(as_public(model), tmp_path / "model.th")
    assert load(tmp_path / "model.th").config.heads == ("nlvr2",)
    loaded = load(tmp_path / "model.th", config={"heads": ["vqa"], "visual_type": 1})
    assert loaded.config.heads == ("vqa",) and loaded.config.vqa_labels == 2 and loaded.config.visual_type == 1


def hf_config(transformers, **overrides):
    sizes = {name: value for name, value in SIZES.items() if name != "vqa_labels"}
    return transformers.VisualBertConfig(**{**sizes, "visual_embedding_dim": 20, "pad_token_id": 0, "num_labels": 17,
                                            **overrides})


def assert_same_results(ours, theirs, atol):
    given = inputs(ours)
    types = torch.randint(2, (4, 7))
    phrases = torch.tensor([[1, 4], [2, -1], [0, 3], [5, 5]])
    arguments = dict(input_ids=given["input_ids"], token_type_ids=given["token_type_ids"],
                     attention_mask=given["attention_mask"], visual_embeds=given["image_feat"],
                     visual_attention_mask=given["image_mask"], visual_token_type_ids=types)
    kind = type(theirs).__name__
    trunk = getattr(theirs, "visual_bert", theirs)
    with torch.no_grad():
        output = ours(**given, image_type_ids=types, phrase_positions=phrases)
        truth = trunk(**arguments)
        if kind == "VisualBertForMultipleChoice":
            several = {name: value.view(1, 4, *value.shape[1:]) for name, value in arguments.items()}
            scores = theirs(**several).logits.view(4, 1)
        elif kind == "VisualBertForRegionToPhraseAlignment":
            scores = theirs(**arguments, region_to_phrase_position=phrases).logits
        elif kind != "VisualBertModel":
            scores = theirs(**arguments)
    keep = torch.cat([given["attention_mask"], given["image_mask"]], dim=1).bool()
    assert_near(output.hidden, truth.last_hidden_state, atol, "hidden", keep)
    assert_near(output.pooled, truth.pooler_output, atol, "pooled")
    if kind == "VisualBertForPreTraining":
        assert_near(output.logits["mlm"], scores.prediction_logits[:, :9], atol, "mlm", keep[:, :9])
        assert_near(output.logits["nsp"], scores.seq_relationship_logits, atol, "nsp")
    elif kind == "VisualBertForRegionToPhraseAlignment":
        real = given["image_mask"].bool()[:, None].expand(-1, 2, -1)
        assert_near(output.logits["flickr"], scores, atol, "flickr", real)
    elif kind != "VisualBertModel":
        assert_near(output.logits[KINDS[kind][0]], getattr(scores, "logits", scores), atol, kind)


@pytest.mark.oracle
@pytest.mark.parametrize("std, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
@pytest.mark.parametrize("kind", KINDS)
def test_loads_what_transformers_wrote(transformers, tmp_path, kind, std, atol):
    labels = {} if kind != "VisualBertForVisualReasoning" else {"num_labels": 3}
    theirs = perturb(getattr(transformers, kind)(hf_config(transformers, **labels)), std)
    theirs.save_pretrained(tmp_path)
    assert detect_format(tmp_path) == "visualbert"
    ours = vlmfast.load(tmp_path)
    assert ours.config.heads == KINDS[kind] and ours.config.visual_type == 0
    assert_same_results(ours, theirs, atol)
    assert_same_model(load(tmp_path, "huggingface"), ours)
    assert_same_model(load(tmp_path / "model.safetensors"), ours)


@pytest.mark.oracle
@pytest.mark.parametrize("std, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_wrote(transformers, tmp_path, kind, std, atol):
    ours = tiny("visualbert", std, heads=KINDS[kind], nlvr2_labels=3)
    assert save_pretrained(ours, tmp_path) == "huggingface"
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
    assert all(torch.equal(a[key], b[key]) for key in a if not key.startswith("attention.value"))


@pytest.mark.parametrize("fields", [
    dict(heads=("pretraining",)), dict(heads=("vqa",)), dict(heads=("nlvr2",), visual_type=1), dict(heads=("vcr",)),
    dict(heads=("pretraining", "flickr"), layer_norm_eps=1e-6), dict(heads=()), {}, dict(heads=("vqa", "nlvr2")),
    dict(heads=("classifier",), classifier_images=2, classifier_pooling="vqa"), dict(bypass_transformer=True),
    dict(heads=("vqa",), vqa_labels=2),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = tiny("visualbert", **fields).to(dtype)
    assert save_pretrained(model, tmp_path) == "huggingface"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path, "visualbert")):
        assert_same_model(loaded, model)


def test_missing_and_unknown_keys_carry_the_names_of_the_file(tmp_path):
    save_pretrained(tiny("visualbert", heads=("pretraining",)), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_bert.embeddings.visual_position_embeddings.weight"]
    state["visual_bert.surprise"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert ("missing keys: visual_bert.embeddings.visual_position_embeddings.weight; unknown keys: visual_bert.surprise"
            in str(error.value))
    with pytest.warns(UserWarning, match="unknown keys: visual_bert.surprise"):
        load(tmp_path, strict=False)


@pytest.mark.parametrize("copy, original", [(COPY, TABLE), ("cls.predictions.decoder.bias", "cls.predictions.bias")])
def test_copies_must_be_copies(tmp_path, copy, original):
    state = as_public(sized(("pretraining",)), "")
    torch.save({**state, copy: state[original].clone()}, tmp_path / "model.bin")
    assert load(tmp_path / "model.bin").config.heads == ("pretraining",)
    torch.save({**state, copy: state[original] + 1}, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=f"{copy} differs from {original}, must be its copy"):
        load(tmp_path / "model.bin")


def test_wrong_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"bert.bert.embeddings.token_type_embeddings_visual.weight": Bomb()}, tmp_path / "bomb.th")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.th")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.th")
    with pytest.raises(ValueError, match="not a VisualBERT checkpoint: bert.bert.embeddings.word_embeddings.weight"):
        load(tmp_path / "other.th", "visualbert")
    model = tiny("visualbert", heads=("vqa",))
    torch.save(as_public(model), tmp_path / "narrow.th")
    with pytest.raises(ValueError, match="does not tell num_attention_heads; pass config="):
        load(tmp_path / "narrow.th")
    assert_same_model(load(tmp_path / "narrow.th", config=model.config), model)
    save_pretrained(model, tmp_path / "folder")
    content = json.loads((tmp_path / "folder" / "config.json").read_text())
    for wrong, message in (({"model_type": "lxmert"}, "model_type is 'lxmert', must be 'visual_bert'"),
                           ({"num_hidden_layers": 10**9}, "blocks"), ({"hidden_act": "gelu_new"}, "is 'gelu_new'"),
                           ({"hidden_size": "32"}, "hidden_size is '32'|wrong type"), ({"heads": 3}, "wrong type"),
                           ({"vocab_size": 5}, "must be torch.float32 .5"),
                           ({"num_attention_heads": 5}, "must be a divisor")):
        (tmp_path / "folder" / "config.json").write_text(json.dumps({**content, **wrong}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "folder", "visualbert")
    with pytest.raises(ValueError, match="image_size and quick_gelu belong to CLIP"):
        load(tmp_path / "narrow.th", image_size=224)
