"""`vlmfast train uniter` and its relatives: pretraining, fine-tuning, resuming, starting points, errors."""

import json

import pytest
import torch
from data.region_text_helpers import COLORS, THINGS, picture, tokenizer, write_set

import vlmfast
from vlmfast.cli import main
from vlmfast.cli.bert_model import OBJECTIVES
from vlmfast.cli.train_bert import MODELS, Settings, summary
from vlmfast.tasks import VQA, read_answers
from vlmfast.training.log import read_log
from vlmfast.training.state import read_state

TINY = ["--size", "tiny", "--device", "cpu", "--no-progress", "--batch-size", "10"]


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """Forty pictures with captions, questions and statements."""
    return write_tasks(write_set(tmp_path_factory.mktemp("data") / "regions"), 40)


def write_tasks(folder, count):
    questions, statements = [], []
    for i in range(count):
        one, split = picture(i), "val" if i % 4 == 3 else "train"
        for thing in range(len(THINGS)):
            there = bool((one.classes == thing).any())
            questions.append({"image_id": one.image_id, "question": f"is there a {THINGS[thing]}?",
                              "answer": "yes" if there else "no", "split": split})
        statements.append({"image_ids": [one.image_id, picture((i + 1) % count).image_id], "split": split,
                           "statement": "the left picture has more things.", "label": i % 3 == 0})
    for name, rows in (("questions", questions), ("statements", statements)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(model, regions, out, *more, tiny=TINY):
    return main(["train", model, "--data", str(regions), "--out", str(out), *tiny, *map(str, more)])


@pytest.fixture(scope="module")
def uniter_run(regions, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train("uniter", regions, out, "--objectives", "mlm,itm,wra,mrfr", "--epochs", 4, "--lr", "3e-3",
                 "--batch-size", 6) == 0
    return out


def losses(out):
    return [record for record in read_log(out / "log.jsonl") if "parts" in record]


def test_the_run_of_the_issue(uniter_run):
    records = losses(uniter_run)
    assert list(records[0]["parts"]) == ["mlm", "itm", "wra", "mrfr"] and len(records) == 24
    assert sum(r["parts"]["mlm"] for r in records[-4:]) < 0.9 * sum(r["parts"]["mlm"] for r in records[:4])
    checks = [r["validation"] for r in read_log(uniter_run / "log.jsonl") if "validation" in r]
    assert len(checks) == 4 and checks[-1]["mlm"] < checks[0]["mlm"]
    model = vlmfast.load(uniter_run)
    assert type(model).__name__ == "UNITER" and model.config.img_dim == 12 and model.config.img_label_dim == 6
    assert "cat" in model.tokenizer.vocabulary
    trained = read_state(uniter_run)["model"]
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("model", MODELS)
def test_every_model_pretrains_and_loads(model, regions, tmp_path, capsys):
    assert train(model, regions, tmp_path / "run", "--steps", 2) == 0
    assert list(losses(tmp_path / "run")[0]["parts"]) == list(OBJECTIVES[model])
    assert type(vlmfast.load(tmp_path / "run")).__name__.lower() == model
    shown = capsys.readouterr().out
    assert "40 pairs used, 0 skipped" in shown and "first steps" in shown and "validation" in shown


@pytest.mark.parametrize("model, objectives", [
    ("vilbert", "mlm,itm,mrc"), ("vilbert", "mrm_nce"), ("lxmert", "mrc,mrc_attributes,contrastive"),
    ("vlbert", "itm,mrc"), ("imagebert", "mrc,wra"), ("vdbert", "seq2seq,prefix_lm"), ("uniter", "mlm_whole_word,mrc"),
])
def test_further_objectives(model, objectives, regions, tmp_path):
    assert train(model, regions, tmp_path, "--steps", 2, "--objectives", objectives) == 0
    record = losses(tmp_path)[-1]
    assert list(record["parts"]) == objectives.split(",")
    assert record["loss"] == pytest.approx(sum(record["parts"].values()), rel=1e-5)


def test_resumes_bit_for_bit(regions, tmp_path, monkeypatch):
    from vlmfast.training.loop import Trainer

    options = ("--objectives", "mlm,itm,mrfr", "--epochs", 2, "--mix", "sample", "--weights", "itm=2,mlm=1")
    assert train("lxmert", regions, tmp_path / "whole", *options) == 0
    whole = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: whole(self, 4))
    assert train("lxmert", regions, tmp_path / "parts", *options) == 130
    monkeypatch.undo()
    assert main(["train", "lxmert", "--out", str(tmp_path / "parts"), "--resume", "--no-progress"]) == 0
    one, two = (vlmfast.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [r["parts"] for r in losses(tmp_path / "whole")] == [r["parts"] for r in losses(tmp_path / "parts")]


def test_resumes_though_the_start_has_gone(regions, tmp_path, monkeypatch, uniter_run):
    import shutil

    from vlmfast.training.loop import Trainer

    shutil.copytree(uniter_run, tmp_path / "start")
    options = ("--init", tmp_path / "start", "--task", "vqa", "--train", regions / "questions.jsonl", "--epochs", 1)
    assert train("uniter", regions, tmp_path / "whole", *options, tiny=TINY[2:]) == 0
    whole = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: whole(self, 2))
    assert train("uniter", regions, tmp_path / "parts", *options, tiny=TINY[2:]) == 130
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "start")
    assert main(["train", "uniter", "--out", str(tmp_path / "parts"), "--resume", "--no-progress"]) == 0
    one, two = (vlmfast.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_weights_and_presets_matter(regions, tmp_path):
    def first(name, *options):
        assert train("uniter", regions, tmp_path / name, "--steps", 1, "--objectives", "mlm,mrfr", *options) == 0
        return losses(tmp_path / name)[0]["parts"]

    plain, heavy, other = first("a"), first("b", "--weights", "mlm=2"), first("c", "--preset", "lxmert")
    assert heavy["mlm"] == pytest.approx(2 * plain["mlm"]) and heavy["mrfr"] == pytest.approx(plain["mrfr"])
    assert other["mrfr"] != plain["mrfr"]


def test_starts_from_a_run(uniter_run, regions, tmp_path, capsys):
    still = ("--steps", 1, "--lr", "1e-12")
    assert train("uniter", regions, tmp_path / "a", "--init", uniter_run, *still, tiny=TINY[2:]) == 0
    before, after = vlmfast.load(uniter_run).state_dict(), vlmfast.load(tmp_path / "a").state_dict()
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)
    assert str(uniter_run) in capsys.readouterr().out
    assert train("uniter", regions, tmp_path / "b", "--init", uniter_run, "--task", "gqa", "--train",
                 regions / "questions.jsonl", *still, tiny=TINY[2:]) == 0
    after = vlmfast.load(tmp_path / "b").state_dict()
    kept = [key for key in before if key.startswith("uniter.")]
    assert kept and all(torch.allclose(before[key], after[key], atol=1e-9) for key in kept)
    assert any(key.startswith("vqa_output") for key in after)


def write_bert(folder):
    """A tiny BERT in Hugging Face's layout, without transformers."""
    from safetensors.torch import save_file

    from vlmfast.checkpoints.bert import text_keys

    sizes = dict(vocab_size=tokenizer().vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=48, max_position_embeddings=50)
    state = vlmfast.create("uniter-base", **sizes).state_dict()
    folder.mkdir()
    save_file({theirs: state[ours].clone() for ours, theirs in text_keys(state, "bert.").items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": "gelu", **sizes}))
    tokenizer().save(folder)
    return state


@pytest.mark.parametrize("model", ["uniter", "lxmert"])
def test_starts_from_a_bert(model, regions, tmp_path, capsys):
    state = write_bert(tmp_path / "bert")
    layers = ["--config", "l_layers=2", "--config", "r_layers=1", "--config", "x_layers=1"] if model == "lxmert" else []
    assert train(model, regions, tmp_path / "run", "--init", tmp_path / "bert", "--steps", 1, "--lr", "1e-12", *layers,
                 tiny=TINY[2:]) == 0
    assert "tensors of the BERT in" in capsys.readouterr().out
    loaded = vlmfast.load(tmp_path / "run")
    words = next(value for key, value in loaded.state_dict().items() if key.endswith("word_embeddings.weight"))
    assert torch.allclose(words, state["uniter.embeddings.word_embeddings.weight"], atol=1e-9)
    assert loaded.config.hidden_size == 32 and loaded.tokenizer == tokenizer()


def test_long_captions_are_cut_and_counted(regions, tmp_path, capsys):
    assert train("uniter", regions, tmp_path, "--steps", 1, "--max-tokens", 12) == 0
    shown = capsys.readouterr().out
    assert "captions have more than 12 tokens and are cut" in shown
    assert "pairs had a text longer than the model reads; it was cut" in shown


def test_vqa_learns_and_is_compared_with_the_majority(tmp_path, capsys):
    regions = write_tasks(write_set(tmp_path / "regions", 160), 160)
    assert train("uniter", regions, tmp_path, "--task", "vqa", "--train", regions / "questions.jsonl", "--train-splits",
                 "train", "--val-splits", "val", "--epochs", 8, "--lr", "1e-3", "--batch-size", 20, "--config",
                 "hidden_dropout_prob=0", "--config", "attention_probs_dropout_prob=0", "--config",
                 "initializer_range=0.1") == 0
    check = [r["validation"] for r in read_log(tmp_path / "log.jsonl") if "validation" in r][-1]
    assert check["accuracy"] > check["accuracy of the majority"] + 0.2
    assert "accuracy of the majority" in capsys.readouterr().out
    answers = read_answers(tmp_path)
    assert answers == ["no", "yes"] or answers == ["yes", "no"]
    model = vlmfast.load(tmp_path)
    rows = [json.loads(line) for line in (regions / "questions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "val"]
    found = VQA(model, answers)([row["question"] for row in rows], [picture(int(row["image_id"][3:])) for row in rows])
    share = sum(str(answer) == row["answer"] for answer, row in zip(found, rows, strict=True)) / len(rows)
    assert share == pytest.approx(check["accuracy"])


@pytest.mark.parametrize("task, options", [
    ("nlvr2", ["--train", "statements.jsonl", "--train-splits", "train", "--val-splits", "val"]),
    ("retrieval", []), ("gqa", ["--train", "questions.jsonl"]),
])
@pytest.mark.parametrize("model", ["vilbert", "vlbert"])
def test_other_tasks_train_evaluate_and_load(model, task, options, regions, tmp_path):
    options = [regions / part if part.endswith(".jsonl") else part for part in options]
    assert train(model, regions, tmp_path, "--task", task, "--steps", 2, "--accumulate", 2, *options) == 0
    assert losses(tmp_path)[0]["loss"] > 0 and vlmfast.load(tmp_path).tokenizer is not None
    check = [r["validation"] for r in read_log(tmp_path / "log.jsonl") if "validation" in r][-1]
    assert {"nlvr2": "accuracy of the majority", "gqa": "accuracy of the majority",
            "retrieval": "text_to_image_r1_chance"}[task] in check


def test_public_files_of_vqa_and_snli_ve(regions, tmp_path):
    ids = [f"pic{i:03d}" for i in range(30)]
    questions = [{"question_id": i, "image_id": one, "question": "what is it?"}
                 for i, one in enumerate([*ids, "absent"])]
    said = [{"question_id": q["question_id"], "image_id": q["image_id"], "multiple_choice_answer": "cat",
             "answers": [{"answer": "cat"}] * 7 + [{"answer": "dog"}] * 3} for q in questions]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": said}))
    files = f"{tmp_path / 'q.json'},{tmp_path / 'a.json'}"
    still = ("--steps", 20, "--lr", "3e-3")
    assert train("lxmert", regions, tmp_path / "vqa", "--task", "vqa", "--train", files, *still) == 0
    check = [r["validation"] for r in read_log(tmp_path / "vqa" / "log.jsonl") if "validation" in r][-1]
    assert check == {"accuracy": 1.0, "accuracy of the majority": 1.0}
    pairs = [{"Flickr30K_ID": one, "sentence2": "a thing", "gold_label": label, "pairID": one}
             for one, label in zip(ids, ["entailment", "neutral", "contradiction"] * 10, strict=True)]
    (tmp_path / "ve.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    file = tmp_path / "ve.jsonl"
    assert train("vilbert", regions, tmp_path / "ve", "--task", "ve", "--train", file, "--steps", 2) == 0
    assert losses(tmp_path / "ve")[0]["parts"].keys() == {"entailment"}


def error(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


ERRORS = [
    (["--objectives", "mlm,mrfrr"], "unknown objective 'mrfrr', must be one of mlm, mlm_whole_word, nsp"),
    (["--objectives", "mrc_kl"], "'mrc_kl' needs region_probs, which the region features do not have"),
    (["--objectives", "nsp"], "captions are one; 'itm' asks"),
    (["--objectives", ","], "objectives is empty"),
    (["--preset", "bert"], "preset is 'bert', must be one of vilbert, lxmert, uniter"),
    (["--weights", "itm=x"], "--weights: 'itm=x' must be name=number"),
    (["--weights", "nope=1"], "unknown objective in weights 'nope'"),
    (["--max-tokens", "999"], "--max-tokens is 999, the model has room for 128"),
    (["--size", "large", "--config", "hidden_size=30"], "num_attention_heads is 16, must be a divisor of hidden_size"),
    (["--config", "nonsense=1"], "unknown fields nonsense"),
    (["--config", "nonsense"], "'nonsense' must be name=value or a JSON file"),
    (["--init", "absent"], "absent"),
    (["--val-fraction", "2"], "--val-fraction is 2.0"),
    (["--train", "x.json"], "--train goes with --task"),
    (["--task", "vcr"], "--task is 'vcr', must be one of vqa, gqa, nlvr2, ve, entailment, retrieval"),
    (["--task", "vqa"], "--train: the annotations of vqa are missing"),
    (["--task", "vqa", "--train", "q.json"], "--train of vqa needs two files"),
    (["--task", "vqa", "--objectives", "mlm"], "give one of them"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[" ".join(options) for options, _ in ERRORS])
def test_errors_name_what_is_wrong(options, message, regions, tmp_path, capsys):
    assert message in error(capsys, "train", "uniter", "--data", regions, "--out", tmp_path / "run", *TINY, *options)
    assert not (tmp_path / "run").exists()


def test_errors_of_data_and_starting_points(uniter_run, regions, tmp_path, capsys):
    out = ["--out", tmp_path / "run", *TINY]
    assert "--data is missing" in error(capsys, "train", "uniter", *out)
    assert "does not exist" in error(capsys, "train", "uniter", "--data", tmp_path / "absent", *out)
    start = ["--data", regions, "--init", uniter_run, *out]
    assert "is a UNITER, must be a lxmert or a BERT folder" in error(capsys, "train", "lxmert", *start)
    (tmp_path / "few.jsonl").write_text('{"image_id": "elsewhere", "caption": "x"}\n')
    message = error(capsys, "train", "uniter", "--data", regions, "--captions", tmp_path / "few.jsonl", *out)
    assert "no usable pair" in message and "1 image without features" in message
    both = ["--objectives", "mrfr,mrc"]
    assert "one head for regions" in error(capsys, "train", "vilbert", "--data", regions, *both, *out)
    assert "already holds a run" in error(capsys, "train", "uniter", "--data", regions, "--out", uniter_run)
    resume = ["train", "uniter", "--out", uniter_run, "--resume"]
    assert "--lr is 0.5, the run in" in error(capsys, *resume, "--lr", "0.5")
    assert "holds no train.json" in error(capsys, "train", "uniter", "--out", tmp_path / "none", "--resume")


def test_features_of_another_width_are_refused(uniter_run, tmp_path, capsys):
    from dataclasses import replace

    from vlmfast.data import write_regions

    pictures = [replace(picture(i), features=torch.zeros(len(picture(i)), 7)) for i in range(4)]
    write_regions(tmp_path / "f.tsv", pictures)
    (tmp_path / "captions.jsonl").write_text("".join(
        json.dumps({"image_id": one.image_id, "caption": "a red cat"}) + "\n" for one in pictures))
    message = error(capsys, "train", "uniter", "--data", tmp_path, "--init", uniter_run, "--out", tmp_path / "run")
    assert "reads region features of 12 values, these have 7" in message


def test_summary_averages_ends_and_shows_validation():
    records = [{"parts": {"mlm": float(k), "itm": 1.0}, "loss": k + 1.0} for k in range(20)]
    records += [{"validation": {"accuracy": 0.25}}, {"validation": {"accuracy": 0.5}}]
    rows = [line.split() for line in summary(records, 3, "pairs").splitlines()]
    assert ["mlm", "0.5000", "18.5000"] in rows and ["loss", "1.5000", "19.5000"] in rows
    assert ["accuracy", "0.2500", "0.5000"] in rows and rows[-1][:4] == ["3", "pairs", "had", "a"]
    sampled = summary([{"parts": {"mlm": 2.0}, "loss": 2.0}, {"parts": {"itm": 1.0}, "loss": 1.0}], 0, "pairs")
    assert "loss" not in sampled and "mlm" in sampled


def test_defaults_and_vocabulary_file(regions, tmp_path):
    assert Settings().size == "small"
    tokenizer().save(tmp_path / "words")
    assert train("visualbert", regions, tmp_path / "run", "--steps", 1, "--vocab", tmp_path / "words") == 0
    assert vlmfast.load(tmp_path / "run").tokenizer == tokenizer()
    assert len(COLORS) * len(THINGS) == 15
