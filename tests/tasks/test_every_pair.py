"""Every pair of task and model that `vlmfast.tasks.table` lists: outputs, training, evaluation, saving."""

import warnings

import pytest
import torch
from models.two_stream_helpers import perturb
from tasks.every_model import BUILD, PHOTOS, build, example, options, pictures
from tasks.pair_helpers import TEXTS, close

import vlmfast
from vlmfast.data import CLIPTokenizer, ImagePreprocess
from vlmfast.models import AffectConfig, AffectModel
from vlmfast.tasks import (
    GQA,
    NLVR2,
    VCR,
    VQA,
    Affect,
    CrossEncoderRetriever,
    Grounding,
    Reranker,
    Retriever,
    VisualEntailment,
    ZeroShotClassifier,
    accuracy,
    classification_scores,
    grounding_accuracy,
    nlvr2_consistency,
    recall_of_scores,
    save_affect,
    table,
    task_loss,
    vqa_accuracy,
    with_head,
)

ANSWERS = [f"answer {i}" for i in range(6)]
CHOICES = [["the cat", "a red house", "dogs", "how many"], ["left", "right of the dog", "is there", "what color"]]
AFFECT = AffectConfig(labels=("sad", "calm", "glad"), hidden=8)
PAIRS = [(0, 1), (2, 3), (1, 0)]
TRUE = [True, False, True]
ENTAILMENT = ["contradiction", "entailment", "neutral", "entailment"]
ROWS = {(row.task, row.model): row for row in table()}
# the cross-encoder of reranking is that of retrieval; see test_reranking.py
TRAINED = [key for key in ROWS if key[1] in BUILD and key[0] != "reranking"]
CROSS = [key for key in TRAINED if key[0] != "affect"]


def ready(task: str, kind: str):
    """A model with the task's head, which is not trained, and the task."""
    model = build(kind)
    if task == "affect":
        torch.manual_seed(1)
        trunk = model.adapted(with_pooler=True) if kind == "VLBERT" else model
        model = AffectModel(trunk, AFFECT).eval()
    else:
        torch.manual_seed(1)
        model = with_head(model, task, len(ANSWERS) if task in ("vqa", "gqa") else None)
        model = perturb(model, 0.05)
    return model, interface(task, kind, model)


def interface(task: str, kind: str, model):
    more = options(kind, model.trunk if task == "affect" else model)
    if task in ("vqa", "gqa"):
        return {"vqa": VQA, "gqa": GQA}[task](model, ANSWERS, **more)
    kinds = {"nlvr2": NLVR2, "entailment": VisualEntailment, "vcr": VCR, "grounding": Grounding, "affect": Affect,
             "retrieval": CrossEncoderRetriever}
    return kinds[task](model, **more)


def true_boxes(kind: str) -> torch.Tensor:
    return torch.stack([regions.boxes[1] for regions in pictures(kind)])


def batch_of(task: str, asked, kind: str):
    seen = pictures(kind)
    if task in ("vqa", "gqa"):
        return asked.batch(TEXTS, seen, torch.eye(len(ANSWERS))[[0, 2, 4, 5]] * 0.9)
    if task == "nlvr2":
        return asked.batch(TEXTS[:3], [(seen[i], seen[j]) for i, j in PAIRS], TRUE)
    if task == "entailment":
        return asked.batch(TEXTS, seen, ENTAILMENT)
    if task == "vcr":
        return asked.batch(TEXTS[:2], CHOICES, seen[:2], [1, 3])
    if task == "grounding":
        return asked.batch(TEXTS, seen, true_boxes(kind))
    if task == "affect":
        return asked.batch(TEXTS, seen, ["sad", "glad", "calm", "glad"])
    return asked.batch(TEXTS, seen, generator=torch.Generator().manual_seed(0))


def outputs(task: str, asked, kind: str) -> torch.Tensor:
    """Everything that the task says about the examples, as numbers."""
    seen = pictures(kind)
    if task in ("vqa", "gqa"):
        return asked.scores(TEXTS, seen)
    if task == "nlvr2":
        return torch.tensor([answer["true"] for answer in asked(TEXTS[:3], [(seen[i], seen[j]) for i, j in PAIRS])])
    if task == "entailment":
        return torch.tensor([list(answer.values()) for answer in asked(TEXTS, seen)])
    if task == "vcr":
        return torch.stack([asked.scores(TEXTS[0], CHOICES[0], seen[0]),
                            asked.scores(TEXTS[1], CHOICES[1], seen[1], answer="the dog")])
    if task == "grounding":
        return torch.cat([found.probabilities for found in asked(TEXTS, seen)])
    if task == "affect":
        return torch.tensor([list(answer.values()) for answer in asked(TEXTS, seen)])
    return asked.score(TEXTS, seen)


def metric(task: str, asked, kind: str) -> float:
    seen = pictures(kind)
    if task in ("vqa", "gqa"):
        found = [str(answer) for answer in asked(TEXTS, seen)]
        return vqa_accuracy(found, [[ANSWERS[i]] * 10 for i in (0, 2, 4, 5)])
    if task == "nlvr2":
        found = [answer["true"] > 0.5 for answer in asked(TEXTS[:3], [(seen[i], seen[j]) for i, j in PAIRS])]
        assert 0 <= nlvr2_consistency(found, TRUE, TEXTS[:3]) <= 1
        return accuracy(found, TRUE)
    if task == "entailment":
        return accuracy([max(answer, key=answer.get) for answer in asked(TEXTS, seen)], ENTAILMENT)
    if task == "vcr":
        return accuracy([asked(TEXTS[i], CHOICES[i], seen[i]).index for i in (0, 1)], [1, 3])
    if task == "grounding":
        return grounding_accuracy(torch.tensor([found.box for found in asked(TEXTS, seen)]), true_boxes(kind))
    if task == "affect":
        found = [max(answer, key=answer.get) for answer in asked(TEXTS, seen)]
        return classification_scores(torch.tensor([AFFECT.labels.index(label) for label in found]),
                                     torch.tensor([0, 2, 1, 2]), 3).accuracy
    return recall_of_scores(asked.score(TEXTS, seen), (1,)).text_to_image[1]


@pytest.mark.parametrize("task, kind", TRAINED, ids=map("-".join, TRAINED))
def test_trains_evaluates_saves_and_reloads_to_identical_outputs(task, kind, tmp_path):
    model, asked = ready(task, kind)
    batch = batch_of(task, asked, kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = task_loss(task, model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses))) and min(losses[1:]) < losses[0], losses
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("word_embeddings" in name for name in moved)
    changed = {name.split(".")[0] for name in moved}
    assert changed - {"bert", "uniter", "vlbert", "cnn", "transformer", "trunk"} or kind == "PixelBERT", changed
    assert torch.equal(task_loss(asked, model, batch), task_loss(task, model, batch))

    value, wanted = metric(task, asked, kind), outputs(task, asked, kind)
    assert 0 <= value <= 1 and wanted.isfinite().all()
    if task == "affect":
        save_affect(model, tmp_path / "run")
    else:
        vlmfast.save_pretrained(model, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = vlmfast.load(tmp_path / "run", task=task)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(task, interface(task, kind, loaded), kind), wanted)


@torch.no_grad()
def by_hand(task: str, kind: str, model, head: str) -> torch.Tensor:
    """What `outputs` should be, of single examples."""
    seen = pictures(kind)

    def run(**arguments):
        return model(**arguments, heads=(head,)).logits[head][0]

    if task in ("vqa", "gqa"):
        logits = torch.stack([run(**example(kind, (text,), one, asked="question" if head == "vqa" else ""))
                              for text, one in zip(TEXTS, seen, strict=True)])
        return logits.softmax(-1) if kind == "VisualBERT" else logits.sigmoid()
    if task == "entailment":
        return torch.stack([run(**example(kind, (text,), one)).softmax(-1)
                            for text, one in zip(TEXTS, seen, strict=True)])
    if task == "nlvr2":
        return torch.stack([two_pictures(kind, model, head, text, seen[i], seen[j]).softmax(-1)[0, 1]
                            for text, (i, j) in zip(TEXTS, PAIRS, strict=False)])
    if task == "vcr":
        types = {"UNITER": (0, 2, 3)}.get(kind, (0, 0, 1))
        answers = [run(**example(kind, (TEXTS[0], choice), seen[0], types=(0, types[1] or 1))) for choice in CHOICES[0]]
        reasons = [run(**example(kind, (TEXTS[1], "the dog", choice), seen[1], types=types)) for choice in CHOICES[1]]
        return torch.stack([torch.stack(part)[:, -1] for part in (answers, reasons)])
    if task == "grounding":
        found = []
        for text, one in zip(TEXTS, seen, strict=True):
            given = example(kind, (text,), one)
            if kind == "VisualBERT":
                given["phrase_positions"] = torch.tensor([[given["input_ids"].shape[1] - 2]])
            row = run(**given).flatten()
            row = row.sigmoid() if kind in ("ViLBERT", "VLBERT") else row.softmax(0)
            found.append(row[1:] if kind in ("ViLBERT", "VLBERT") else row)
        return torch.cat(found)
    scores = torch.stack([torch.stack([run(**example(kind, (text,), one)) for one in seen]) for text in TEXTS])
    match = 0 if kind == "ViLBERT" else 1  # its class of a matching pair is 0
    return scores[..., 0] if scores.shape[-1] == 1 else scores[..., match] - scores[..., 1 - match]


def two_pictures(kind, model, head, text, left, right):
    given = [example(kind, (text,), one) for one in (left, right)]
    if kind == "VisualBERT":  # both in one sequence
        feat = torch.cat([one["image_feat"] for one in given], 1)
        types = torch.tensor([[0] * len(left) + [1] * len(right)])
        return model(**{**given[0], "image_feat": feat}, image_type_ids=types, heads=(head,)).logits[head]
    if kind == "UNITER":
        return uniter_pair(model, given)
    saved, name = {}, {"ViLBERT": "vil_binary_prediction", "LXMERT": "answer_head"}.get(kind, "classifier")
    for one in given:
        output = model(**one, heads=())
        vector = output.pooled if kind != "ViLBERT" else output.pooled_text * output.pooled_image
        saved[len(saved)] = vector
    return getattr(model, name)(torch.cat([saved[0], saved[1]], 1))


def uniter_pair(model, given):
    """Attention of each pass over the other's states, pooled."""
    left, right = (model(**one, image_type_ids=torch.full(one["image_feat"].shape[:2], kind), heads=()).hidden
                   for kind, one in zip((1, 2), given, strict=True))

    def read(attention, x, other):
        every = torch.ones(1, other.shape[1], dtype=torch.bool)
        x = model.fc(torch.cat([attention(x, other, every), x], -1))
        return model.attn_pool(x, torch.ones(1, x.shape[1], dtype=torch.bool))

    return model.nlvr2_output(torch.cat([read(model.attn1, left, right), read(model.attn2, right, left)], -1))


@pytest.mark.parametrize("task, kind", CROSS, ids=map("-".join, CROSS))
def test_outputs_are_those_of_the_model_called_by_hand(task, kind):
    model, asked = ready(task, kind)
    wanted = by_hand(task, kind, model, asked.head)
    assert wanted.std() > 1e-4  # inputs matter
    close(outputs(task, asked, kind), wanted, atol=5e-5)
    asked.batch_size = 3
    close(outputs(task, asked, kind), wanted, atol=5e-5)


def clip():
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(TEXTS, 520, 24)
    model = vlmfast.create("clip-tiny", vocab_size=tokenizer.vocab_size, context_length=24).eval()
    model.tokenizer, model.preprocess = tokenizer, ImagePreprocess(model.config.image_size)
    return model


@pytest.mark.parametrize("reads", ["pair", "image", "text"])
def test_affect_of_a_dual_encoder_trains_and_reloads(reads, tmp_path):
    model = AffectModel(clip(), AffectConfig(kind="intensity", reads=reads)).eval()
    asked, given = Affect(model), (None if reads == "image" else TEXTS, None if reads == "text" else PHOTOS)
    batch, losses = asked.batch(*given, [-2.0, 3.0, 0.5, 1.0]), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        loss = task_loss("affect", model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wanted = asked.logits(*given)
    save_affect(model, tmp_path)
    again = Affect(vlmfast.load(tmp_path, task="affect"))
    assert torch.equal(again.logits(*given), wanted) and asked(*given) == wanted.tolist()
    alone = again(*(part and part[0] for part in given))
    assert alone == pytest.approx(wanted[0].item(), abs=1e-5)


def test_the_rows_of_the_dual_encoder_work(tmp_path):
    assert {task for task, kind in ROWS if kind == "CLIP"} == {"affect", "retrieval", "zero_shot"}
    model = clip()
    for i, image in enumerate(PHOTOS):
        image.save(tmp_path / f"{i}.png")
    found = Retriever(model).add(tmp_path).search(TEXTS[0], top=2)
    assert len(found) == 2 and found[0].score >= found[1].score
    pixels = torch.stack([model.preprocess(image) for image in PHOTOS])
    assert len(ZeroShotClassifier(model, ["cat", "dog"]).predict(pixels)) == 4
    cross, asked = ready("retrieval", "PixelBERT")
    assert len(Reranker(Retriever(model).add(tmp_path), asked, shortlist=3).search(TEXTS[0])) == 3


def test_the_table_names_what_exists():
    for row in table():
        assert hasattr(vlmfast.tasks, row.interface) and all(hasattr(vlmfast.tasks, name) for name in row.metric)
        assert row.loss == "" or row.loss in vlmfast.tasks.fine_tuning.LOSSES
    assert {row.model for row in table("vqa")} == set(BUILD) and {row.task for row in table(model="UNITER")} > {"vcr"}
    with pytest.raises(ValueError, match="table: task is 'ocr', must be one of vqa, gqa"):
        table("ocr")
