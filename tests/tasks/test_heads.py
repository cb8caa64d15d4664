"""Which head answers, new heads, layouts of texts, region limits and attention maps of every model."""

import warnings

import pytest
import torch
from tasks.every_model import BUILD, SLOTS, build, example, options, pictures
from tasks.pair_helpers import ANSWERS, GQA_ANSWERS, PICTURES, TEXTS, TOKENIZER, close, picture, vilbert

import vlmfast
from vlmfast.models import AffectConfig, AffectModel
from vlmfast.tasks import (
    NLVR,
    VCR,
    VQA,
    Grounding,
    VisualEntailment,
    task_loss,
    with_head,
    write_answers,
)
from vlmfast.tasks.pair_texts import lay_out

PLAIN = {1: (0,), 2: (0, 1), 3: (0, 0, 1)}


def test_a_head_that_is_there_is_kept_and_a_new_one_takes_the_place_of_the_others():
    model = build("UNITER", heads=("pretraining", "vqa"))
    assert with_head(model, "vqa") is model and with_head(model, "vqa", 17) is model
    other = with_head(model, "vqa", 5)
    assert other.config.vqa_labels == 5 and other.available() == ("vqa",)
    assert torch.equal(other.word_table, model.word_table) and other.word_table is not model.word_table
    rank = with_head(model, "retrieval")
    assert rank is model and with_head(build("UNITER", heads=("mlm",)), "retrieval").available() == ("rank",)
    nlvr = with_head(model, "nlvr")
    types = nlvr.uniter.embeddings.token_type_embeddings.weight
    assert nlvr.config.type_vocab_size == 3 and torch.equal(types[2], types[1])
    vcr = with_head(model, "vcr").uniter.embeddings.token_type_embeddings.weight
    assert len(vcr) == 4 and torch.equal(vcr[2], vcr[0]) and torch.equal(vcr[3], vcr[0])
    assert with_head(build("LXMERT"), "nlvr2").config.images_per_answer == 2
    # VL-BERT's answer head starts as its masked-word head
    words = build("VLBERT")
    new = with_head(words, "vqa", 6)
    assert torch.equal(new.vqa_mlp[0].dense.weight, words.vlbert.mlm_head.predictions.transform.dense.weight)


def test_heads_that_a_model_cannot_have_are_refused_by_name():
    for kind in ("LXMERT", "VDBERT", "ImageBERT", "PixelBERT"):
        with pytest.raises(ValueError, match=f"Grounding: a {kind} has no head for grounding, must be one of ViLBERT"):
            Grounding(build(kind), **options(kind, build(kind)))
        with pytest.raises(ValueError, match="has no head for grounding"):
            with_head(build(kind), "grounding")
    with pytest.raises(ValueError, match="VCR: model.config.type_vocab_size is 2, must be at least 4: adapt the model"):
        VCR(build("UNITER", heads=("vcr",)))
    with pytest.raises(ValueError, match="VQA: model.config.classifier_images is 2, must be 1"):
        VQA(build("ImageBERT", heads=("classifier",), classifier_images=2), ANSWERS)
    with pytest.raises(ValueError, match="task is 'ocr', must be one of vqa, gqa"):
        task_loss("ocr", build("UNITER"), None)
    with pytest.raises(TypeError, match="must be one of ViLBERT"):
        with_head(torch.nn.Linear(2, 2), "vqa")
    with pytest.raises(ValueError, match="labels: is 4, the task's 'nlvr2' head has a fixed number"):
        with_head(build("VisualBERT"), "nlvr2", 4)
    with pytest.raises(TypeError, match="regions: is Regions, must be a picture"):
        model = with_head(build("PixelBERT"), "vqa", 6)
        VQA(model, ANSWERS[:6], **options("PixelBERT", model))(TEXTS[0], PICTURES[0])
    bare = picture(7)
    bare = type(bare)(bare.image_id, bare.features, bare.boxes, bare.width, bare.height)
    with pytest.raises(ValueError, match="img7 has no classes and confidences for 'vd_bert'"):
        VisualEntailment(with_head(build("VDBERT"), "entailment"))(TEXTS[0], bare)


def test_entailment_classes_have_the_order_of_each_models_code():
    text = "the cat is left"
    for kind, wanted in (("ViLBERT", ["contradiction", "neutral", "entailment"]),
                         ("UNITER", ["contradiction", "entailment", "neutral"])):
        task = VisualEntailment(with_head(build(kind), "entailment"))
        assert list(task(text, PICTURES[0])) == wanted
        batch = task.batch([text] * 3, PICTURES[:3], ["neutral", "entailment", "contradiction"])
        assert batch.target.tolist() == [wanted.index(name) for name in ("neutral", "entailment", "contradiction")]
    with pytest.raises(ValueError, match="label 'maybe' must be one of contradiction"):
        task.batch([text], PICTURES[:1], ["maybe"])


def test_texts_are_laid_out_with_their_masks_and_cut_to_fit():
    cat, dog = TOKENIZER.encode("the cat"), TOKENIZER.encode("how many dogs")
    cls, sep, mask = TOKENIZER.cls, TOKENIZER.sep, TOKENIZER.mask
    found = lay_out(TOKENIZER, ["the cat", ("the cat", "how many dogs")], None, PLAIN, 99)
    assert found["input_ids"][1].tolist() == [cls, *cat, sep, *dog, sep]
    assert found["input_ids"][0].tolist() == [cls, *cat, sep] + [TOKENIZER.pad] * (len(dog) + 1)
    assert found["token_type_ids"][1].tolist() == [0] * (len(cat) + 2) + [1] * (len(dog) + 1)
    assert found["text_lengths"].tolist() == [len(cat) + 2, len(cat) + len(dog) + 3]

    visual = VQA(with_head(build("VisualBERT"), "vqa", 17), ANSWERS)
    for text in ("the cat", "the cat?", "the cat ? "):
        assert visual.inputs([text], PICTURES[:1])["input_ids"][0].tolist() == [
            cls, *cat, *TOKENIZER.encode("?"), mask, sep]  # fmt: skip
    shorter = VQA(visual.model, ANSWERS, max_tokens=len(dog) + 3)  # loses its beginning, keeps what is asked for
    assert shorter.inputs(["how many dogs"], PICTURES[:1])["input_ids"][0].tolist() == [
        cls, *dog[1:], *TOKENIZER.encode("?"), mask, sep]  # fmt: skip
    vl = VQA(with_head(build("VLBERT"), "vqa", 17), ANSWERS, max_tokens=len(dog) + 3)
    given = vl.inputs(["how many dogs"], PICTURES[:1])
    assert given["input_ids"][0].tolist() == [cls, *dog[:-1], sep, mask, sep]
    assert given["token_type_ids"][0].tolist() == [0] * (len(dog) + 1) + [1, 1]
    with pytest.raises(ValueError, match="VQA: max_tokens: is 4, must be at least 5"):
        VQA(vl.model, ANSWERS, max_tokens=4).inputs(["a"], PICTURES[:1])

    uniter = VCR(with_head(build("UNITER"), "vcr"))
    given = uniter.inputs([("a", "the cat")], PICTURES[:1], ["how many dogs"])
    assert given["token_type_ids"][0].tolist() == [0] * (2 + len(TOKENIZER.encode("a"))) + [2] * (len(cat) + 1) + \
        [3] * (len(dog) + 1)
    given = VisualEntailment(with_head(build("VDBERT"), "entailment")).inputs(["the cat"], PICTURES[:1])
    assert given["input_ids"][0].tolist() == [cls, *[TOKENIZER.unk] * SLOTS, sep, *cat, sep]
    assert given["image_feat"].shape[1] == SLOTS and "token_type_ids" not in given


@pytest.mark.parametrize("kind", ["VLBERT", "VDBERT", "ImageBERT", "UNITER"])
def test_the_longest_text_still_fits_the_positions(kind):
    model = with_head(build(kind, **({"image_position": "sequence"} if kind == "ImageBERT" else {})), "entailment")
    answer = VisualEntailment(model)(" ".join(TEXTS * 4), PICTURES[2])
    assert sum(answer.values()) == pytest.approx(1)


def test_visualbert_appends_boxes_where_its_features_have_them():
    model = with_head(build("VisualBERT", visual_embedding_dim=26), "vqa", 17)
    task, regions = VQA(model, ANSWERS), PICTURES[0]
    given = task.inputs(TEXTS[:1], [regions])
    box = regions.boxes / torch.tensor([regions.width, regions.height] * 2)
    close(given["image_feat"][0], torch.cat([regions.features, box, box[:, 2:] - box[:, :2]], 1))
    with pytest.raises(ValueError, match="have 12 values, the model takes 26"):
        task(TEXTS[0], picture(9, dim=12))


def test_nlvr_reads_two_pictures_of_different_sizes_together():
    triplet = build("UNITER", heads=("nlvr2",), nlvr2="triplet", type_vocab_size=3)
    for kind, model in (("VisualBERT", build("VisualBERT")), ("UNITER", triplet)):
        task = NLVR(with_head(model, "nlvr"), batch_size=1)
        given = task.inputs(TEXTS[:2], PICTURES)
        first = {"VisualBERT": 0, "UNITER": 1}[kind]
        counts = [len(one) for one in PICTURES]
        assert given["num_regions"].tolist() == [counts[0] + counts[1], counts[2] + counts[3]]
        types = given["image_type_ids"][0, : given["num_regions"][0]].tolist()
        assert types == [first] * counts[0] + [first + 1] * counts[1]
        found = task(TEXTS[:2], [PICTURES[:2], PICTURES[2:]])
        alone = task(TEXTS[1], PICTURES[2:])
        assert found[1]["true"] == pytest.approx(alone["true"], abs=1e-5)


@pytest.mark.parametrize("kind", BUILD)
def test_attention_maps_are_those_of_the_model(kind):
    model = with_head(build(kind), "vqa", 17)
    task = VQA(model, ANSWERS, **options(kind, model))
    seen, row = pictures(kind), 1
    maps = task(TEXTS, seen, attention=True)[row].attention
    asked = "question" if task.head == "vqa" else ""
    with torch.no_grad():
        alone = model(**example(kind, (TEXTS[row],), seen[row], asked=asked), heads=(), output_attentions=True)
    words, regions = len(maps.tokens), len(maps.regions) + maps.global_region
    assert maps.global_region is (kind in ("ViLBERT", "VLBERT")) and maps.tokens[-1] == "[SEP]"
    for found, truth in zip(maps.text_to_image, alone.text_to_image, strict=True):
        truth = truth[0] if kind != "VDBERT" else truth[0][:, [0, *range(SLOTS + 1, truth.shape[2])], :regions]
        assert found.shape[1:] == (words, regions)
        close(found, truth)
    image = seen[row] if kind == "PixelBERT" else None
    if image is not None:
        boxes = maps.regions.boxes
        assert len(boxes) == 4 and boxes.min() == 0 and boxes[:, 2:].amax(0).tolist() == list(image.size)
        assert maps.draw(image.convert("RGB")).width > 100


def test_pixelbert_keeps_how_its_pictures_are_prepared(tmp_path):
    model = build("PixelBERT")
    model.preprocess = options("PixelBERT", model)["preprocess"]
    model = with_head(model, "vqa", 17)
    vlmfast.save_pretrained(model, tmp_path)
    loaded = vlmfast.load(tmp_path)
    assert loaded.preprocess == model.preprocess and VQA(loaded, ANSWERS).preprocess.image_size == 128
    close(VQA(loaded, ANSWERS).scores(TEXTS[0], pictures("PixelBERT")[0]),
          VQA(model, ANSWERS).scores(TEXTS[0], pictures("PixelBERT")[0]))
    assert VQA(with_head(build("PixelBERT"), "vqa", 17), ANSWERS).preprocess.image_size == 768


def test_load_with_a_task_keeps_or_adds_the_head(tmp_path):
    vlmfast.save_pretrained(build("VisualBERT"), tmp_path / "plain")
    with pytest.warns(UserWarning, match="no head for 'vqa'; its 'vqa' head of 17 labels is new and must be trained"):
        write_answers(tmp_path / "plain", ANSWERS)
        model = vlmfast.load(tmp_path / "plain", task="vqa")
    assert VQA(model, ANSWERS)(TEXTS[0], PICTURES[0]).answer in ANSWERS and not model.training
    with pytest.warns(UserWarning, match="of 9 labels"):
        assert vlmfast.load(tmp_path / "plain", task="gqa", labels=GQA_ANSWERS).config.vqa_labels == 9
    vlmfast.save_pretrained(vilbert(), tmp_path / "all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = vlmfast.load(tmp_path / "all", task="nlvr")
        assert kept.available() == vlmfast.load(tmp_path / "all").available()
    with pytest.raises(ValueError, match="load: task is 'ocr', must be one of"):
        vlmfast.load(tmp_path / "all", task="ocr")
    with pytest.warns(UserWarning, match="has no head for 'affect'; its head of 2 outputs is new"):
        affect = vlmfast.load(tmp_path / "all", task="affect", labels=["bad", "good"])
    assert isinstance(affect, AffectModel) and affect.config == AffectConfig(labels=("bad", "good"))
    vlmfast.save_pretrained(vlmfast.create("clip-tiny", vocab_size=600, context_length=16), tmp_path / "clip")
    with pytest.raises(ValueError, match="task is 'vqa', must be 'affect' or None for a CLIP"):
        vlmfast.load(tmp_path / "clip", task="vqa")
