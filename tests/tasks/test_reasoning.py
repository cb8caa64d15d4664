"""NLVR2, entailment, VCR and grounding against the model called by hand."""

import pytest
import torch
from tasks.pair_helpers import PICTURES, TEXTS, TOKENIZER, by_hand, close, lxmert, vilbert

from vlmfast.tasks import NLVR2, VCR, Grounding, VisualEntailment, box_iou, grounding_accuracy

PAIRS = [(PICTURES[0], PICTURES[1]), (PICTURES[2], PICTURES[3]), (PICTURES[1], PICTURES[0])]


def nlvr2_lxmert():
    return lxmert(heads="vqa", images_per_answer=2, num_qa_labels=2)


@pytest.mark.parametrize("build", [vilbert, nlvr2_lxmert])
def test_nlvr2_joins_the_two_pictures_of_a_statement(build):
    model = build()
    head = model.vil_binary_prediction if build is vilbert else model.answer_head
    wanted = []
    for text, pair in zip(TEXTS, PAIRS, strict=False):
        outputs = [by_hand(model, text, regions) for regions in pair] if build is vilbert else None
        if build is vilbert:
            fused = [output.pooled_text * output.pooled_image for output in outputs]
        else:
            model.config.__dict__["images_per_answer"] = 1  # the head is applied below, to both
            model.answer_head = torch.nn.Identity()
            fused = [by_hand(model, text, regions).pooled for regions in pair]
            model.config.__dict__["images_per_answer"], model.answer_head = 2, head
        with torch.no_grad():
            wanted.append(head(torch.cat(fused, 1)).softmax(-1)[0, 1].item())
    for batch_size in (64, 3, 1):
        task = NLVR2(model, batch_size=batch_size)
        found = task(TEXTS[:3], PAIRS)
        close([answer["true"] for answer in found], wanted)
        assert all(set(answer) == {"true", "false"} and sum(answer.values()) == pytest.approx(1) for answer in found)
    assert task(TEXTS[0], PAIRS[0])["true"] == pytest.approx(wanted[0], abs=1e-5)
    assert abs(wanted[0] - task(TEXTS[0], PAIRS[2])["true"]) > 1e-4  # left and right matter


def test_nlvr2_errors():
    task = NLVR2(vilbert())
    with pytest.raises(ValueError, match="NLVR2: regions is 3 pictures, must be two pictures"):
        task(TEXTS[0], PICTURES[:3])
    with pytest.raises(ValueError, match=r"NLVR2: regions\[1\] is Regions, must be two pictures"):
        task(TEXTS[:2], [PAIRS[0], PICTURES[0]])
    with pytest.raises(ValueError, match="2 statements and 3 pairs of pictures"):
        task(TEXTS[:2], PAIRS)
    with pytest.raises(ValueError, match="images_per_answer is 1, must be 2"):
        NLVR2(lxmert(heads="vqa"))
    with pytest.raises(ValueError, match="num_qa_labels is 9, must be 2"):
        NLVR2(lxmert(heads="vqa", images_per_answer=2))
    with pytest.raises(ValueError, match="NLVR2: model has the heads vqa, must have binary"):
        NLVR2(vilbert(heads=("vqa",)))


def test_entailment_names_the_classes_as_the_public_labels():
    model = vilbert(task_specific_tokens=True)
    task = VisualEntailment(model, batch_size=2)
    found = task(TEXTS, PICTURES)
    for text, regions, answer in zip(TEXTS, PICTURES, found, strict=True):
        wanted = by_hand(model, text, regions, task_id=13).logits["tri"].softmax(-1)[0].tolist()
        assert answer == pytest.approx(dict(zip(("contradiction", "neutral", "entailment"), wanted, strict=True)),
                                       abs=1e-5)
    assert list(VisualEntailment(model, labels=("a", "b", "c"))(TEXTS[0], PICTURES[0])) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="labels has 2 entries, the 'tri' head has 3"):
        VisualEntailment(model, labels=("a", "b"))
    with pytest.raises(ValueError, match="VisualEntailment: model has the heads vqa, must have tri"):
        VisualEntailment(vilbert(heads=("vqa",)))
    with pytest.raises(ValueError, match="VisualEntailment: model.config.num_qa_labels is 9, must be 3"):
        VisualEntailment(lxmert())


def test_vcr_ranks_answers_and_rationales():
    model = vilbert(task_specific_tokens=True)
    task, regions = VCR(model, batch_size=3), PICTURES[0]
    choices = ["the cat", "a red house is there", "dogs", "how many"]
    wanted = torch.stack([by_hand(model, TEXTS[0], regions, choice, task_id=5).logits["vil"][0, 0]
                          for choice in choices])
    found = task(TEXTS[0], choices, regions)
    close(found.probabilities, wanted.softmax(0))
    assert found.index == wanted.argmax() and str(found) == choices[found.index] == found.text
    joined = torch.stack([by_hand(model, f"{TEXTS[0]} [SEP] the dog", regions, choice, task_id=6).logits["vil"][0, 0]
                          for choice in choices])
    close(task.scores(TEXTS[0], choices, regions, answer="the dog"), joined)
    assert (joined - wanted).abs().max() > 1e-3
    assert TOKENIZER.encode("a [SEP] b").count(TOKENIZER.sep) == 1
    own = VCR(model, task_id=2).scores(TEXTS[0], choices, regions, answer="the dog")
    close(own[3], by_hand(model, f"{TEXTS[0]} [SEP] the dog", regions, choices[3], task_id=2).logits["vil"][0, 0])
    for wrong in ("abcd", ["only one"]):
        with pytest.raises(ValueError, match="choices is .* must be a list of at least two texts"):
            task(TEXTS[0], wrong, regions)
    with pytest.raises(ValueError, match="VCR: text 1 is ' ', must be a sentence"):
        task(TEXTS[0], ["a", " "], regions)
    with pytest.raises(TypeError, match="question is list, must be one text"):
        task(TEXTS[:2], choices, regions)
    with pytest.raises(ValueError, match="VCR: model has the heads vqa, must have vil"):
        VCR(vilbert(heads=("vqa",)))


def test_grounding_finds_the_region_with_the_best_score():
    model = vilbert()
    task = Grounding(model, batch_size=3)
    found = task(TEXTS, PICTURES)
    for text, regions, answer in zip(TEXTS, PICTURES, found, strict=True):
        wanted = by_hand(model, text, regions).logits["vision"][0, :, 0].sigmoid()  # 1 + R
        close(answer.probabilities, wanted[1:])
        best = int(wanted.argmax())
        assert answer.region == (best - 1 if best else None) and answer.probability == pytest.approx(wanted.max())
        box = regions.boxes[best - 1].tolist() if best else [0, 0, regions.width, regions.height]
        assert list(answer.box) == pytest.approx(box)
        inner = Grounding(model, whole_picture=False)(text, regions)
        assert inner.region == int(wanted[1:].argmax())
        assert list(inner.box) == pytest.approx(regions.boxes[inner.region].tolist())


def test_grounding_can_mean_the_whole_picture():
    model, regions = vilbert(), PICTURES[1]
    states = by_hand(model, TEXTS[1], regions).image_hidden[0]
    with torch.no_grad():
        model.vision_logit.weight.copy_(states[0] - states[1:].mean(0))
    answer = Grounding(model)(TEXTS[1], regions)
    assert answer.region is None and answer.box == (0.0, 0.0, 320, 200)
    assert answer.probability > answer.probabilities.max()


def test_iou_and_grounding_accuracy_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30], [1, 1, 1, 1]])
    close(box_iou(boxes, boxes[:2]), [[1, 25 / 175], [25 / 175, 1], [0, 0], [0, 0]])
    assert box_iou(boxes[3:], boxes[3:]).item() == 0
    truth = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 20], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert grounding_accuracy(boxes, truth) == 0.5  # IoU 1, 2/3, 0, 0
    assert grounding_accuracy(boxes, truth, threshold=0.7) == 0.25
    with pytest.raises(ValueError, match=r"found is \[4, 4\], truth is \[2, 4\]"):
        grounding_accuracy(boxes, truth[:2])
    with pytest.raises(ValueError, match=r"box_iou: others is \[4\]"):
        box_iou(boxes, boxes[0])
