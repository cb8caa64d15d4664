"""Search with a model that reads text and picture together."""

import pytest
import torch
from tasks.pair_helpers import PICTURES, TEXTS, by_hand, close, lxmert, vilbert

from vlmfast.data import RegionFeatures, write_regions
from vlmfast.tasks import CrossEncoderRetriever, recall_at_k, recall_of_scores

PRETRAINING = ("pretraining",)


def fit(model, head, text, regions, task_id=0):
    scores = by_hand(model, text, regions, task_id=task_id).logits[head][0]
    if head == "vil":
        return scores[0]
    probability = scores.softmax(0)[0 if head == "nsp" else 1]
    return torch.logit(probability)


@pytest.mark.parametrize("head", ["vil", "nsp", "matched"])
def test_every_text_is_scored_with_every_picture(head):
    model = lxmert() if head == "matched" else vilbert(heads=("vil",) if head == "vil" else PRETRAINING)
    wanted = torch.stack([torch.stack([fit(model, head, text, regions) for regions in PICTURES]) for text in TEXTS[:3]])
    assert wanted.std() > 0.01
    for batch_size in (64, 3, 1):
        retriever = CrossEncoderRetriever(model, batch_size=batch_size)
        assert retriever.head == head
        close(retriever.score(TEXTS[:3], PICTURES), wanted, atol=5e-5)
    close(retriever.score(TEXTS[1], PICTURES[2]), wanted[1:2, 2:3], atol=5e-5)


def test_the_head_and_the_task_token_can_be_chosen():
    model = vilbert(task_specific_tokens=True)
    assert CrossEncoderRetriever(model).head == "vil"
    retriever = CrossEncoderRetriever(model, head="nsp")
    close(retriever.score(TEXTS[0], PICTURES[0])[0, 0], fit(model, "nsp", TEXTS[0], PICTURES[0], task_id=7), atol=5e-5)
    retriever = CrossEncoderRetriever(model, task_id=8)
    close(retriever.score(TEXTS[0], PICTURES[0])[0, 0], fit(model, "vil", TEXTS[0], PICTURES[0], task_id=8), atol=5e-5)


def test_search_ranks_files_and_lists(tmp_path):
    model = lxmert()
    write_regions(tmp_path / "four.tsv", PICTURES)
    scores = CrossEncoderRetriever(model).score(TEXTS[0], PICTURES)[0]
    order = scores.argsort(descending=True).tolist()
    for regions in (PICTURES, RegionFeatures.open(tmp_path / "four.tsv")):
        retriever = CrossEncoderRetriever(model, batch_size=3).add(regions)
        found = retriever.search(TEXTS[0], top=3)
        assert [match.image_id for match in found] == [PICTURES[i].image_id for i in order[:3]]
        close([match.score for match in found], scores[order[:3]])
        close([match.probability for match in found], scores[order[:3]].sigmoid())
        assert len(retriever.search(TEXTS[0], top=99)) == 4


def test_what_belongs_to_the_text_is_computed_once():
    model = lxmert()
    seen = []
    model.bert.encoder.layer[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    CrossEncoderRetriever(model).score(TEXTS[:2], PICTURES)
    assert seen == model.tokenizer(TEXTS[:2]).lengths.tolist()  # the rows of one text each, without padding


def test_recall_of_scores_agrees_with_recall_of_features():
    image, text = torch.eye(6), torch.nn.functional.normalize(torch.randn(5, 6), dim=-1)
    image_ids, text_ids = torch.tensor([0, 1, 2, 3, 4, 1]), torch.tensor([2, 1, 1, 0, 9])
    wanted = recall_at_k(image, text, (1, 2, 3), image_ids=image_ids, text_ids=text_ids)
    found = recall_of_scores(text @ image.T, (1, 2, 3), image_ids=image_ids, text_ids=text_ids)
    assert found.to_dict() == wanted.to_dict() and 0 < found.text_to_image[3] < 1
    assert torch.equal(found.image_ranks, wanted.image_ranks) and torch.equal(found.text_ranks, wanted.text_ranks)
    scores = torch.tensor([[3.0, 1, 2], [9, 1, 2], [0, 0, 5]])  # texts by pictures
    report = recall_of_scores(scores, ks=(1,))
    assert report.text_to_image == {1: pytest.approx(2 / 3)} and report.image_to_text == {1: pytest.approx(1 / 3)}
    with pytest.raises(ValueError, match="recall_of_scores: text has 3 rows, image has 2; give ids"):
        recall_of_scores(scores[:, :2])
    with pytest.raises(ValueError, match=r"scores is \[3\], must be \[texts, images\]"):
        recall_of_scores(scores[0])
    with pytest.raises(ValueError, match=r"recall_of_scores: text_ids is \[2\], must be \[3\]"):
        recall_of_scores(scores, text_ids=torch.arange(2), image_ids=torch.arange(3))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="model has the heads vqa, must have vil or nsp"):
        CrossEncoderRetriever(vilbert(heads=("vqa",)))
    with pytest.raises(ValueError, match="model has the heads vqa, must have matched"):
        CrossEncoderRetriever(lxmert(heads="vqa"))
    with pytest.raises(ValueError, match="model has the heads vqa, must have nsp"):
        CrossEncoderRetriever(vilbert(heads=("vqa",)), head="nsp")
    with pytest.raises(ValueError, match="head is 'vqa', must be one of vil, nsp"):
        CrossEncoderRetriever(vilbert(), head="vqa")
    retriever = CrossEncoderRetriever(lxmert())
    with pytest.raises(ValueError, match="no pictures yet, call add first"):
        retriever.search(TEXTS[0])
    with pytest.raises(ValueError, match="1 texts and regions of 0 pictures"):
        retriever.score(TEXTS[0], [])
    retriever.add(PICTURES)
    with pytest.raises(ValueError, match="top is 0"):
        retriever.search(TEXTS[0], top=0)
    with pytest.raises(ValueError, match="text 0 is ' ', must be a sentence"):
        retriever.search(" ")
