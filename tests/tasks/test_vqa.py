"""Question answering: inputs, ranking, batches, attention maps, answer lists and errors."""

import json
import pickle
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tasks.pair_helpers import (
    ANSWERS,
    GQA_ANSWERS,
    PICTURES,
    TEXTS,
    TOKENIZER,
    both,
    by_hand,
    close,
    lxmert,
    picture,
    vilbert,
)

import vlmfast
from vlmfast.data import RegionFeatures, Regions, write_regions
from vlmfast.tasks import GQA, VQA, Answer, read_answers, write_answers


def test_answers_are_the_heads_best_labels():
    for model, answers in both():
        task = VQA(model, answers, probabilities="sigmoid")
        wanted = by_hand(model, TEXTS[0], PICTURES[0]).logits["vqa"][0]
        answer = task(question=TEXTS[0], regions=PICTURES[0], top=3)
        assert isinstance(answer, Answer) and answer.attention is None
        order = wanted.argsort(descending=True)[:3].tolist()
        assert [text for text, _ in answer.top] == [answers[i] for i in order]
        close([value for _, value in answer.top], wanted[order].sigmoid())
        assert answer.answer == str(answer) == answer.top[0][0] and answer.probability == answer.top[0][1]


def test_batches_agree_with_single_questions_in_every_layout():
    for model, answers in both():
        task = VQA(model, answers, batch_size=3)
        scores = task.scores(TEXTS, PICTURES)
        assert scores.shape == (4, len(answers))
        assert (scores[0] - scores[1]).abs().max() > 1e-3  # texts and pictures matter
        for i in range(4):
            close(task.scores(TEXTS[i], PICTURES[i]), scores[i : i + 1])
        found = task(TEXTS, PICTURES)
        assert [answer.answer for answer in found] == [answers[i] for i in scores.argmax(1).tolist()]
        one_text = task.scores(TEXTS[0], PICTURES)
        one_picture = task.scores(TEXTS, PICTURES[0])
        for i in range(4):
            close(one_text[i], task.scores(TEXTS[0], PICTURES[i])[0])
            close(one_picture[i], task.scores(TEXTS[i], PICTURES[0])[0])
        assert (one_text[0] - one_text[1]).abs().max() > 1e-3


def test_probabilities_follow_how_the_head_is_trained():
    fine_tuned, pretrained = lxmert(heads="vqa"), lxmert()
    for model, kind in ((fine_tuned, "sigmoid"), (pretrained, "softmax"), (vilbert(), "sigmoid")):
        task = VQA(model, GQA_ANSWERS if kind == "softmax" or model is fine_tuned else ANSWERS)
        wanted = by_hand(model, TEXTS[1], PICTURES[1]).logits["vqa"]
        close(task.scores(TEXTS[1], PICTURES[1]), wanted.sigmoid() if kind == "sigmoid" else wanted.softmax(-1))
    close(VQA(fine_tuned, GQA_ANSWERS, probabilities="softmax").scores(TEXTS[1], PICTURES[1]).sum(), 1.0)


def test_gqa_uses_its_own_head():
    model = vilbert()
    wanted = by_hand(model, TEXTS[0], PICTURES[0]).logits["gqa"].sigmoid()
    close(GQA(model, GQA_ANSWERS).scores(TEXTS[0], PICTURES[0]), wanted)
    assert GQA(lxmert(), GQA_ANSWERS)(TEXTS[0], PICTURES[0]).answer in GQA_ANSWERS


def test_task_tokens_are_those_of_the_public_checkpoint():
    model = vilbert(task_specific_tokens=True)
    for task, answers, head, number in ((VQA, ANSWERS, "vqa", 1), (GQA, GQA_ANSWERS, "gqa", 15)):
        wanted = [by_hand(model, TEXTS[0], PICTURES[0], task_id=i).logits[head].sigmoid() for i in range(20)]
        found = task(model, answers).scores(TEXTS[0], PICTURES[0])
        close(found, wanted[number])
        assert all((found - wanted[i]).abs().max() > 1e-4 for i in range(20) if i != number)
        close(task(model, answers, task_id=3).scores(TEXTS[0], PICTURES[0]), wanted[3])


@pytest.mark.parametrize("task_tokens", [False, True])
def test_attention_maps_of_a_batch_are_those_of_the_single_example(task_tokens):
    models = [(vilbert(task_specific_tokens=task_tokens), ANSWERS)] + ([] if task_tokens else [(lxmert(), GQA_ANSWERS)])
    for model, answers in models:
        task = VQA(model, answers, batch_size=3)
        batches = [task(TEXTS, PICTURES, attention=True), task(TEXTS[2], PICTURES, attention=True)]
        for texts, found in zip((TEXTS, [TEXTS[2]] * 4), batches, strict=True):
            for text, regions, answer in zip(texts, PICTURES, found, strict=True):
                maps, alone = answer.attention, by_hand(model, text, regions, task_id=1)
                words = ["[CLS]", *TOKENIZER.tokens(TOKENIZER.encode(text)), "[SEP]"]
                if task_tokens:
                    words.insert(1, "[TASK]")
                assert list(maps.tokens) == words and maps.regions.image_id == regions.image_id
                assert maps.global_region is (len(answers) == len(ANSWERS))
                assert len(maps.text_to_image) == len(alone.text_to_image) > 1
                for name in ("text_to_image", "image_to_text"):
                    for layer, truth in zip(getattr(maps, name), getattr(alone, name), strict=True):
                        close(layer, truth[0])


def test_attention_draws_over_the_picture():
    for model, answers in both():
        answer = VQA(model, answers)(TEXTS[0], PICTURES[0], attention=True)
        image = Image.new("RGB", (160, 100), "teal")  # half the size that the boxes are in
        drawn = answer.attention.draw(image, title="who?")
        assert drawn.width > 300 and np.asarray(drawn).std() > 10
        maps = answer.attention
        wanted = vlmfast.viz.attention(maps, maps.tokens, image, PICTURES[0].boxes / 2, title="who?",
                                       global_region=maps.global_region)
        assert np.array_equal(drawn, wanted)


def test_regions_come_as_objects_files_and_mappings(tmp_path):
    model, regions = vilbert(), PICTURES[0]
    task = VQA(model, ANSWERS)
    wanted = task.scores(TEXTS[0], regions)
    write_regions(tmp_path / "one.tsv", [regions])
    write_regions(tmp_path / "two.tsv", PICTURES[:2])
    close(task.scores(TEXTS[0], RegionFeatures.open(tmp_path / "one.tsv")), wanted)
    pixels = {"features": regions.features.numpy(), "boxes": regions.boxes, "image_w": 320, "image_h": 200}
    fractions = {"features": regions.features, "bbox": regions.boxes / torch.tensor([320.0, 200.0] * 2)}
    fractions["boxes"] = fractions.pop("bbox")
    for given in (pixels, fractions):
        close(task.scores(TEXTS[0], given), wanted)
        close(task.scores(TEXTS[:2], [given, PICTURES[1]])[0], wanted[0])
    with pytest.raises(ValueError, match="regions: holds 2 pictures, must be those of one"):
        task(TEXTS[0], RegionFeatures.open(tmp_path / "two.tsv"))
    with pytest.raises(ValueError, match="there is no width and height"):
        task(TEXTS[0], {"features": regions.features, "boxes": regions.boxes})
    with pytest.raises(ValueError, match=r"regions\[1\]: no features"):
        task(TEXTS[:2], [regions, {"boxes": fractions["boxes"]}])
    for wrong in (regions.features, 3, None):
        with pytest.raises(TypeError, match="must be Regions, an opened RegionFeatures or a mapping"):
            task(TEXTS[0], wrong)


def test_the_model_stays_as_it_was_and_gives_no_gradient():
    model = vilbert(hidden_dropout_prob=0.5)
    task = VQA(model, ANSWERS)
    wanted = task.scores(TEXTS, PICTURES)
    model.train()
    found = task.scores(TEXTS, PICTURES)
    assert torch.equal(found, wanted) and not found.requires_grad
    assert model.training and model.bert.embeddings.dropout.training


def test_long_questions_are_cut_to_the_models_positions():
    for model, answers in both():
        longest = model.config.max_position_embeddings
        found = VQA(model, answers).scores("cat " * 100, PICTURES[0])
        close(found, VQA(model, answers).scores("cat " * (longest - 2), PICTURES[0]))
        short = VQA(model, answers, max_tokens=5).scores("cat " * 100, PICTURES[0])
        close(short, VQA(model, answers).scores("cat cat cat", PICTURES[0]))


def test_max_regions_counts_the_global_one():
    model, regions = vilbert(), PICTURES[2]
    task = VQA(model, ANSWERS, max_regions=4)
    arguments = task.inputs([TEXTS[0]], [regions])
    assert arguments["num_regions"].tolist() == [4]
    close(arguments["image_feat"][0, 0], regions.features.mean(0))
    close(arguments["image_feat"][0, 1:], regions.features[:3])
    maps = task(TEXTS[0], regions, attention=True).attention
    assert len(maps.regions) == 3 and maps.text_to_image[0].shape[-1] == 4


def test_errors_name_what_is_wrong():
    model = vilbert()
    with pytest.raises(ValueError, match="answers has 3 entries, the model's 'vqa' head has 17 labels"):
        VQA(model, ["a", "b", "c"])
    with pytest.raises(ValueError, match="VQA: model has the heads vil, must have vqa"):
        VQA(vilbert(heads=("vil",)), ANSWERS)
    with pytest.raises(ValueError, match=r"model has the heads \(none\), must have vqa"):
        VQA(lxmert(heads="none"), ANSWERS)
    with pytest.raises(ValueError, match="images_per_answer is 2, must be 1"):
        VQA(lxmert(heads="vqa", images_per_answer=2), GQA_ANSWERS)
    with pytest.raises(ValueError, match="in_batch_pairs is True, must be False"):
        VQA(vilbert(in_batch_pairs=True), ANSWERS)
    with pytest.raises(TypeError, match="model is Linear, must be one of ViLBERT, LXMERT, VisualBERT"):
        VQA(torch.nn.Linear(2, 2), ANSWERS)
    with pytest.raises(ValueError, match="probabilities is 'tanh', must be"):
        VQA(model, ANSWERS, probabilities="tanh")
    with pytest.raises(ValueError, match="batch_size is 0"):
        VQA(model, ANSWERS, batch_size=0)
    bare = vilbert()
    bare.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer is None and the model carries none"):
        VQA(bare, ANSWERS)
    VQA(bare, ANSWERS, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="tokenizer has 60 tokens, the model only 50"):
        VQA(vilbert(vocab_size=50), ANSWERS)
    task = VQA(model, ANSWERS)
    with pytest.raises(ValueError, match="regions of picture img9 have 12 values, the model takes 20"):
        task(TEXTS[0], picture(9, dim=12))
    with pytest.raises(ValueError, match="3 texts and regions of 2 pictures"):
        task(TEXTS[:3], PICTURES[:2])
    with pytest.raises(ValueError, match="0 texts and regions of 2 pictures"):
        task.scores([], PICTURES[:2])
    for question in ("  ", ["a", ""], ["a", 3]):
        with pytest.raises(ValueError, match="must be a sentence"):
            task(question, PICTURES[0])
    with pytest.raises(ValueError, match="top is 0"):
        task(TEXTS[0], PICTURES[0], top=0)


def test_answer_lists_in_every_public_layout(tmp_path):
    wanted = ["yes", "no", "2 dögs"]
    write_answers(tmp_path, wanted)
    assert read_answers(tmp_path) == read_answers(tmp_path / "answers.json") == wanted
    files = {"a.json": json.dumps({"no": 1, "yes": 0, "2 dögs": 2}), "b.json": json.dumps(dict(enumerate(wanted))),
             "c.txt": "yes\nno\n2 dögs\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_answers(tmp_path / name) == wanted
    (tmp_path / "trainval_label2ans.pkl").write_bytes(pickle.dumps(wanted))
    (tmp_path / "answers.json").unlink()
    assert read_answers(tmp_path) == wanted
    model = vilbert(vqa_labels=3)
    assert VQA(model, tmp_path).answers == VQA(model, str(tmp_path / "c.txt")).answers == tuple(wanted)


@pytest.mark.parametrize("name, content, text", [
    ("a.json", b"[1]", "answer 0 is 1, must be a text"), ("a.json", b"[]", "at least one answer"),
    ("a.json", b'{"yes": 0, "no": 2}', "labels must be 0 ... 1"), ("a.json", b"{", "a.json"),
    ("a.json", b'"yes"', "holds a str"), ("a.json", b"\xff", "a.json"), ("a.json", b'{"yes": "no"}', "labels must be"),
    ("a.pkl", pickle.dumps(types.SimpleNamespace()), "SimpleNamespace"), ("a.pkl", b"x", "damaged pickle"),
])
def test_damaged_answer_lists_are_refused(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_answers(tmp_path / name)


def test_missing_answer_lists(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of answers.json"):
        read_answers(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_answers(tmp_path / "no.json")


@pytest.mark.parametrize("build, answers", [(vilbert, ANSWERS), (lxmert, GQA_ANSWERS)])
def test_a_saved_model_answers_the_same(tmp_path, build, answers):
    model = build()
    vlmfast.save_pretrained(model, tmp_path)
    write_answers(tmp_path, answers)
    loaded = vlmfast.load(tmp_path)
    assert loaded.tokenizer == TOKENIZER
    again = VQA(loaded, tmp_path)(TEXTS[0], PICTURES[0])
    assert again == VQA(model, answers)(TEXTS[0], PICTURES[0])
    file = next(path for path in tmp_path.iterdir() if path.suffix in (".bin", ".safetensors"))
    assert vlmfast.load(file).tokenizer == TOKENIZER
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert vlmfast.load(tmp_path).tokenizer is None
    (tmp_path / "vocab.txt").write_text("\n".join([*TOKENIZER.tokens(range(60)), *map(str, range(10, 50))]) + "\n")
    with pytest.raises(ValueError, match="the vocabulary has 100 tokens, the model only 97"):
        vlmfast.load(tmp_path)


def test_regions_objects_are_not_changed():
    regions = PICTURES[0]
    before = Regions(regions.image_id, regions.features.clone(), regions.boxes.clone(), 320, 200)
    VQA(vilbert(), ANSWERS)(TEXTS[0], regions, attention=True)
    assert torch.equal(before.features, regions.features) and torch.equal(before.boxes, regions.boxes)
