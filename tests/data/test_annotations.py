"""Readers of the public annotation formats: what they yield, skip and count."""

import gzip
import pickle

import pytest
import torch
from annotation_helpers import (
    ENTITY_SENTENCE,
    ENTITY_XML,
    coco_captions,
    entailment,
    gqa_question,
    instances,
    karpathy_image,
    nlvr2_statement,
    refcoco_reference,
    route,
    vcr_question,
    viewpoint,
    vqa_annotation,
    vqa_question,
    write_entities,
    write_json,
    write_lines,
    write_vqa,
)

from vlmfast.data import Regions, annotations, write_regions
from vlmfast.data.annotations import AnswerVocabulary, parse_entity_sentence, soft_score, vcr_words


def test_every_exported_name_exists():
    for name in annotations.__all__:
        assert getattr(annotations, name) is not None
    with pytest.raises(AttributeError):
        annotations.read_nothing  # noqa: B018


def test_vqa_joins_questions_and_answers(tmp_path):
    files = write_vqa(tmp_path, [vqa_question(1), vqa_question(2, 9)], [vqa_annotation(2, 9), vqa_annotation(1)])
    questions = annotations.read_vqa(*files, image_name="COCO_val2014_{:0>12}")
    assert len(questions) == 2 and questions.report().total_skipped == 0
    first = questions[0]
    assert (first.question_id, first.image_id, first.question) == (1, "COCO_val2014_000000262148", "how many dogs?")
    assert first.answer_counts == {"2": 7, "two": 1, "3": 2}
    assert (first.answer, first.question_type, first.answer_type) == ("2", "how many", "number")
    assert questions[1].image_id == "COCO_val2014_000000000009"


def test_vqa_test_questions_have_no_answers(tmp_path):
    path, _ = write_vqa(tmp_path, [vqa_question()], [])
    (question,) = annotations.read_vqa(path)
    assert question.answers == () and question.answer is None


def test_vqa_counts_what_does_not_fit_together(tmp_path):
    files = write_vqa(
        tmp_path,
        [vqa_question(1), vqa_question(1), vqa_question(2), vqa_question(3, 5), vqa_question(4, 6)],
        [vqa_annotation(1), vqa_annotation(1), vqa_annotation(3, 7), vqa_annotation(8), vqa_annotation(4, 6)],
    )
    questions = annotations.read_vqa(*files, images={"262148", "5"})
    assert [question.question_id for question in questions] == [1]
    assert questions.report().skipped == {
        "repeated question": 1,
        "repeated annotation": 1,
        "question without annotation": 1,
        "annotation of another image": 1,
        "annotation without question": 1,
        "image without features": 1,
    }
    assert "question_id 4" in questions.report().examples["image without features"][0]
    assert "1 records used, 6 skipped" in str(questions.report())


def test_images_may_be_region_features(tmp_path):
    from vlmfast.data import RegionFeatures

    regions = Regions("262148", torch.ones(2, 8), torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3]]), 8.0, 8.0)
    write_regions(tmp_path / "features.tsv", [regions])
    path, _ = write_vqa(tmp_path, [vqa_question(1), vqa_question(2, 5)], [])
    questions = annotations.read_vqa(path, images=RegionFeatures.open(tmp_path / "features.tsv"))
    assert [question.question_id for question in questions] == [1]
    assert questions.report().skipped == {"image without features": 1}


def test_answers_outside_the_vocabulary_are_counted(tmp_path):
    files = write_vqa(
        tmp_path, [vqa_question(1), vqa_question(2)], [vqa_annotation(1), vqa_annotation(2, answers=("cat",) * 10)]
    )
    questions = annotations.read_vqa(*files, vocabulary=AnswerVocabulary(("2", "3")))
    assert [question.question_id for question in questions] == [1]
    assert questions.report().skipped == {"no answer in the vocabulary": 1}
    assert questions.report().noted == {"answers outside the vocabulary": 1}
    assert "1 answers outside the vocabulary (kept)" in str(questions.report())


def test_vocabulary_holds_frequent_answers_by_frequency(tmp_path):
    answers = ["yes"] * 4 + ["no"] * 3 + ["No "] + ["blue"] * 2 + ["rare"]
    files = write_vqa(
        tmp_path,
        [vqa_question(i) for i in range(len(answers))],
        [vqa_annotation(i, answers=(answer,) * 10) for i, answer in enumerate(answers)],
    )
    questions = annotations.read_vqa(*files)
    vocabulary = AnswerVocabulary.build(questions, min_count=2)
    assert vocabulary.answers == ("no", "yes", "blue")  # equally frequent answers by alphabet
    assert vocabulary.index(" NO") == 0 and vocabulary.index("rare") is None and "rare" not in vocabulary
    with pytest.raises(ValueError, match="none of 4 answers comes 9 times"):
        AnswerVocabulary.build(questions)
    with pytest.raises(ValueError, match="'a' stands there twice"):
        AnswerVocabulary(("a", "b", "a"))


def test_soft_targets_follow_agreement():
    assert [soft_score(n) for n in range(6)] == [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]
    vocabulary = AnswerVocabulary(("a", "b", "c", "d"), normalize=str.lower)
    answers = ["a"] * 4 + ["B"] * 2 + ["b", "c", "x", "x"]
    target = vocabulary.soft_target(answers)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, torch.tensor([1.0, 0.9, 0.3, 0.0]))
    torch.testing.assert_close(vocabulary.soft_target({"a": 10, "c": 2}), torch.tensor([1.0, 0.0, 0.6, 0.0]))


def test_gqa_reads_files_and_folders(tmp_path):
    write_json(tmp_path / "all" / "a.json", {"02930152": gqa_question()})
    write_json(tmp_path / "all" / "b.json", {"02930152": gqa_question(), "7": gqa_question(imageId="1", answer="no")})
    questions = annotations.read_gqa(tmp_path / "all", images={"2354786", "1"})
    assert [question.question_id for question in questions] == ["02930152", "7"]
    assert questions.report().skipped == {"repeated question": 1}
    first = questions[0]
    assert (first.image_id, first.answer, first.full_answer) == ("2354786", "yes", "Yes, the sky is dark.")
    assert (first.structural, first.semantic, first.balanced) == ("verify", "attr", True)
    assert first.entailed == ("02930160", "02930158")
    only = annotations.read_gqa(tmp_path / "all" / "b.json", vocabulary=AnswerVocabulary(("no",)))
    assert [question.question_id for question in only] == ["7"]


def test_gqa_test_questions_have_no_answers(tmp_path):
    path = write_json(tmp_path / "test.json", {"1": {"question": "Dark?", "imageId": "n1", "isBalanced": False}})
    (question,) = annotations.read_gqa(path, labelled=False)
    assert question.answer is None and question.balanced is False
    with pytest.raises(ValueError, match="question 1: field 'answer' is missing"):
        annotations.read_gqa(path)


def test_nlvr2_names_both_images_and_groups_statements(tmp_path):
    path = write_lines(
        tmp_path / "dev.json",
        [
            nlvr2_statement("dev-850-0-0"),
            nlvr2_statement("dev-850-1-0", "False"),
            nlvr2_statement("dev-850-0-1", "false"),
            nlvr2_statement("dev-850-2-0"),
            nlvr2_statement("dev-850-0-0"),
        ],
    )
    known = {f"dev-850-{pair}-img{side}.png" for pair in (0, 1) for side in (0, 1)} | {"dev-850-2-img0.png"}
    statements = annotations.read_nlvr2(path, images=known, image_name="{}.png")
    assert [statement.identifier for statement in statements] == ["dev-850-0-0", "dev-850-1-0", "dev-850-0-1"]
    assert (statements[1].left_id, statements[1].right_id) == ("dev-850-1-img0.png", "dev-850-1-img1.png")
    assert [statement.label for statement in statements] == [True, False, False]
    assert statements[0].group == statements[1].group != statements[2].group
    assert statements.report().skipped == {"image without features": 1, "repeated statement": 1}
    assert "dev-850-2-img1" in statements.report().examples["image without features"][0]


def test_nlvr2_hidden_labels(tmp_path):
    record = nlvr2_statement()
    del record["label"]
    path = write_lines(tmp_path / "test2.json", [record])
    assert annotations.read_nlvr2(path, labelled=False)[0].label is None
    with pytest.raises(ValueError, match=r"test2.json: line 1 \(dev-850-0-0\): field 'label' is missing"):
        annotations.read_nlvr2(path)


def test_vcr_sentences_keep_their_object_tags(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [vcr_question(), vcr_question(annot_id="train-1", img_id="train-1")])
    questions = annotations.read_vcr(path, images={"train-0"})
    assert len(questions) == 1 and questions.report().skipped == {"image without features": 1}
    question = questions[0]
    assert question.question == ("Does", (2,), "feel", "comfortable", "?")
    assert question.answers[0][2] == (0, 2)
    premise, choices, label = question.choices("qa")
    assert (premise, choices, label) == (question.question, question.answers, 3)
    premise, choices, label = question.choices("qar")
    assert premise == (*question.question, (0,), "is", "in", (3,), ".")
    assert (choices, label) == (question.rationales, 1)
    assert annotations.read_vcr(path, image_field="img_fn")[0].image_id == "lsmdc_3015/3015_00.23@0.jpg"


def test_vcr_words_name_people_and_things(tmp_path):
    objects = ("car", "person", "person")
    words, named = vcr_words(("Is", (1, 2), "in", (0,), "?"), objects, and_word="and")
    assert words == ["Is", "Casey", "and", "Riley", "in", "car", "?"]
    assert named == [-1, 1, -1, 2, -1, 0, -1]
    assert vcr_words(((1, 2),), objects)[0] == ["Casey", "Riley"]
    assert vcr_words(((15,),), ["person"] * 16)[0] == ["Casey"]


def test_vcr_test_set_has_no_labels(tmp_path):
    record = vcr_question()
    del record["answer_label"], record["rationale_label"]
    (question,) = annotations.read_vcr(write_lines(tmp_path / "test.jsonl", [record]), labelled=False)
    assert question.choices("qa")[2] is None
    with pytest.raises(ValueError, match="train-0 has no answer_label"):
        question.choices("qar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": ["Does", [4], "?"]}, "field 'question' names object 4, there are 4"),
        ({"question": ["Does", [-1], "?"]}, "field 'question' names object -1, there are 4"),
        ({"answer_choices": [["a"], ["b"], ["c"]]}, "field 'answer_choices' has 3 items, must have 4"),
        ({"answer_label": 4}, "field 'answer_label' is 4, must be one of 0, 1, 2, 3"),
        ({"question": ["Does", 2, "?"]}, "a token of field 'question' is 2, must be a list"),
        ({"rationale_choices": [["a"], ["b"], ["c"], [["x"]]]}, "an object of field 'rationale_choices' is 'x'"),
    ],
)
def test_vcr_damage_is_named(tmp_path, changes, message):
    path = write_lines(tmp_path / "train.jsonl", [vcr_question(**changes)])
    with pytest.raises(ValueError, match=r"train.jsonl: line 1 \(train-0\)") as error:
        annotations.read_vcr(path)
    assert message in str(error.value)


def test_vcr_objects_stay_below_the_root(tmp_path):
    record = {"boxes": [[1, 2, 3, 4, 0.9], [5, 6, 7, 8, 0.5]], "names": ["person", "car"], "width": 1920,
              "height": 1080, "segms": []}  # fmt: skip
    write_json(tmp_path / "vcr1images" / "lsmdc_3015" / "3015_00.23@0.json", record)
    write_json(tmp_path / "secret.json", record)
    path = write_lines(tmp_path / "train.jsonl", [vcr_question(), vcr_question(metadata_fn="../secret.json")])
    good, bad = annotations.read_vcr(path)
    objects = annotations.read_vcr_objects(tmp_path / "vcr1images", good)
    assert objects.names == ("person", "car") and objects.boxes[1] == (5, 6, 7, 8) and objects.scores == (0.9, 0.5)
    assert (objects.width, objects.height) == (1920, 1080)
    with pytest.raises(ValueError, match="leads outside"):
        annotations.read_vcr_objects(tmp_path / "vcr1images", bad)


def test_coco_captions_are_gathered_by_image(tmp_path):
    content = coco_captions()
    content["images"].append({"id": 3, "file_name": "3.jpg"})
    content["annotations"] += [
        {"image_id": 77, "id": 51, "caption": "Nowhere."},
        {"image_id": 9, "id": 52, "caption": "  "},
    ]
    pictures = annotations.read_coco_captions(write_json(tmp_path / "c.json", content))
    assert [(picture.image_id, picture.captions) for picture in pictures] == [
        ("318556", ("A very clean bathroom.", "A blue and white bathroom.")),
        ("9", ("A plate of food.",)),
    ]
    assert pictures[0].file_name == "COCO_train2014_000000318556.jpg"
    assert pictures.report().skipped == {
        "caption of an unlisted image": 1,
        "empty caption": 1,
        "image without caption": 1,
    }


def test_karpathy_splits(tmp_path):
    path = write_json(
        tmp_path / "dataset_coco.json",
        {
            "dataset": "coco",
            "images": [
                karpathy_image(),
                karpathy_image(split="train", number=5),
                karpathy_image(split="restval", number=6),
                karpathy_image(split="restval", number=7, texts=(" ",)),
            ],
        },
    )
    train = annotations.read_karpathy(path, ("train", "restval"), images={"5", "6", "7"})
    assert [picture.image_id for picture in train] == ["5", "6"]
    assert train.report().skipped == {"image without caption": 1}
    (test,) = annotations.read_karpathy(path, "test", image_name="COCO_val2014_{:0>12}")
    assert test.image_id == "COCO_val2014_000000391895" and test.split == "test"
    assert test.file_name == "val2014/COCO_val2014_000000391895.jpg" and test.captions == ("A man.", "A bike.")
    assert len(annotations.read_karpathy(path)) == 3
    with pytest.raises(ValueError, match=r"splits is \('dev',\), the file has \['restval', 'test', 'train'\]"):
        annotations.read_karpathy(path, "dev")


def test_karpathy_flickr_takes_the_file_name(tmp_path):
    record = karpathy_image("1000092795.jpg", "train", None)
    path = write_json(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": [record]})
    (picture,) = annotations.read_karpathy(path)
    assert (picture.image_id, picture.file_name) == ("1000092795", "1000092795.jpg")


def test_entity_sentences_give_phrases_with_word_positions():
    sentence = parse_entity_sentence(ENTITY_SENTENCE)
    assert sentence.text == "Two young guys with shaggy hair look at their hands in the yard ."
    assert [(p.text, p.entity, p.types) for p in sentence.phrases] == [
        ("Two young guys", "283585", ("people",)),
        ("shaggy hair", "283587", ("bodyparts",)),
        ("their hands", "283588", ("bodyparts", "other")),
        ("the yard", "0", ("notvisual",)),
    ]
    for phrase in sentence.phrases:
        assert " ".join(sentence.words[phrase.first : phrase.last]) == phrase.text
    with pytest.raises(ValueError, match="damaged phrase"):
        parse_entity_sentence("[/EN#1/people Two men and [/EN#2/people a boy] .")


def test_entities_link_phrases_to_boxes(tmp_path):
    root = write_entities(tmp_path / "entities")
    (tmp_path / "train.txt").write_text("1000092795\n404\n")
    pictures = annotations.read_flickr_entities(root, tmp_path / "train.txt")
    assert pictures.report().skipped == {"missing file": 1}
    picture = pictures[0]
    assert (picture.image_id, picture.width, picture.height, len(picture.sentences)) == ("1000092795", 333, 500, 2)
    assert picture.boxes["283585"] == ((0, 17, 186, 490), (167, 4, 332, 497))  # counted from 0
    assert picture.boxes["283588"] == picture.boxes["283587"] == ((69, 18, 106, 65),)
    assert picture.scenes == {"283590"} and picture.without_box == {"283591"}
    assert [phrase.text for _, phrase, _ in picture.groundings()] == ["Two young guys", "shaggy hair", "their hands"]
    assert len(annotations.read_flickr_entities(root, images=set())) == 0


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "x">]><annotation>&b;</annotation>', "declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation><size>", "malformed XML"),
        ("<annotation/>", "element 'size' is missing"),
        (ENTITY_XML.replace("<xmin>70</xmin>", ""), "object 2: element 'xmin' is missing"),
        (ENTITY_XML.replace("<xmin>70</xmin>", "<xmin>7O</xmin>"), "object 2: xmin is '7O', must be an integer"),
    ],
)
def test_entity_boxes_refuse_damaged_and_hostile_xml(tmp_path, xml, message):
    root = write_entities(tmp_path, xml=xml)
    with pytest.raises(ValueError, match=r"1000092795.xml") as error:
        annotations.read_flickr_entities(root)
    assert message in str(error.value)


def test_entity_ids_cannot_leave_the_folder(tmp_path):
    with pytest.raises(ValueError, match="must be letters and digits"):
        annotations.read_flickr_entities(write_entities(tmp_path), ["../../etc/passwd"])


@pytest.mark.parametrize("protocol", [0, 2])  # what Python 2 wrote
def test_refcoco_joins_references_and_boxes(tmp_path, protocol):
    refs = tmp_path / "refs(unc).p"
    lost = refcoco_reference("testA", ann_id=5)
    refs.write_bytes(pickle.dumps([refcoco_reference(), refcoco_reference("val"), lost], protocol))
    found = annotations.read_refcoco(refs, write_json(tmp_path / "instances.json", instances()))
    assert [(e.text, e.split, e.sent_id) for e in found] == [
        ("the lady", "train", 0), ("blue shirt", "train", 1), ("the lady", "val", 0), ("blue shirt", "val", 1),
    ]  # fmt: skip
    assert found[0].box == (103.5, 299, 341.75, 339) and (found[0].width, found[0].height) == (640, 427)
    assert (found[0].category, found[0].image_id, found[0].ann_id, found[0].ref_id) == ("person", "581857", 1719310, 7)
    assert found.report().skipped == {"object not in the instances file": 2}
    val = annotations.read_refcoco(refs, tmp_path / "instances.json", "val", images={"581857.jpg"}, image_name="{}.jpg")
    assert {e.split for e in val} == {"val"} and len(val) == 2
    assert annotations.read_refcoco(refs, tmp_path / "instances.json", images=set()).report().skipped == {
        "image without features": 4, "object not in the instances file": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="the file has"):
        annotations.read_refcoco(refs, tmp_path / "instances.json", "testB")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (self.path,)


def test_refcoco_never_executes_a_pickle(tmp_path):
    from vlmfast.data.region_arrays import UnsafePickleError

    refs, trace = tmp_path / "refs(unc).p", tmp_path / "trace"
    refs.write_bytes(pickle.dumps([refcoco_reference(category_id=_Touch(trace))]))
    with pytest.raises(UnsafePickleError, match=r"refs\(unc\).p: the pickle refers to"):
        annotations.read_refcoco(refs, write_json(tmp_path / "instances.json", instances()))
    assert not trace.exists()


def test_refcoco_missing_fields_are_named(tmp_path):
    refs = tmp_path / "refs.p"
    record = refcoco_reference()
    del record["sentences"][1]["sent"]
    refs.write_bytes(pickle.dumps([record], 2))
    with pytest.raises(ValueError, match=r"refs.p: reference 0 \(ref_id 7\), sentence 1: field 'sent' is missing"):
        annotations.read_refcoco(refs, write_json(tmp_path / "instances.json", instances()))
    content = instances()
    content["annotations"][0]["bbox"] = [1, 2, 3]
    with pytest.raises(ValueError, match="item 0 of 'annotations': field 'bbox' has 3 values"):
        annotations.read_refcoco(refs, write_json(tmp_path / "instances.json", content))


def test_snli_ve_labels_are_those_of_the_checkpoints(tmp_path):
    misspelt = entailment("entailment", Flikr30kID="11.jpg")
    del misspelt["Flickr30K_ID"]
    path = write_lines(
        tmp_path / "dev.jsonl",
        [entailment("contradiction"), misspelt, entailment("neutral"), entailment("-"), entailment(Flickr30K_ID="12")],
    )
    pairs = annotations.read_snli_ve(path, images={"4705552913", "11"})
    assert [pair.label for pair in pairs] == [0, 1, 2]
    assert [pair.image_id for pair in pairs] == ["4705552913", "11", "4705552913"]
    assert pairs[0].hypothesis == "The sisters are hugging goodbye." and pairs[0].pair_id == "4705552913.jpg#2r1n"
    assert pairs.report().skipped == {"no gold label": 1, "image without features": 1}
    with pytest.raises(ValueError, match="line 1: field 'gold_label' is 'maybe', must be one of 'contradiction'"):
        annotations.read_snli_ve(write_lines(tmp_path / "bad.jsonl", [entailment("maybe")]))


def test_r2r_gives_one_record_an_instruction(tmp_path):
    path = write_json(tmp_path / "R2R_val.json", [route(), route(scan="other", path_id=2)])
    instructions = annotations.read_r2r(path, scans={"VLzqgDo317F"})
    assert [item.instruction_id for item in instructions] == ["6250_0", "6250_1", "6250_2"]
    assert instructions[0].instruction == "Walk down one flight of stairs."
    assert instructions[0].path == ("af3af33b", "5be14560", "79aedad1") and instructions[0].heading == 3.751
    assert instructions.report().skipped == {"scan without features": 3}
    with pytest.raises(ValueError, match=r"route 0 \(path_id 6250\): field 'heading' is NaN|is nan"):
        annotations.read_r2r(write_json(tmp_path / "bad.json", [route(heading=float("nan"))]))


def test_connectivity_gives_shortest_walks(tmp_path):
    #   a - b - c in a row, d is excluded, e is alone; a and c are joined only through b
    names = "abcde"
    links = {"a": "bd", "b": "ac", "c": "b", "d": "ac", "e": ""}
    records = [
        viewpoint(name, 2.0 * i, [other in links[name] for other in names], name != "d") for i, name in enumerate(names)
    ]
    graph = annotations.read_connectivity(write_json(tmp_path / "scan_connectivity.json", records))
    assert graph.neighbours == {"a": ("b",), "b": ("a", "c"), "c": ("b",), "e": ()}
    assert graph.distance("a", "c") == pytest.approx(4.0) and graph.distance("c", "c") == 0
    assert graph.distance("a", "e") == float("inf")
    assert graph.positions["b"] == (2.0, 0.0, 1.5)
    with pytest.raises(KeyError, match="no viewpoint 'd'"):
        graph.distance("a", "d")


def test_connectivity_takes_the_shorter_of_two_ways(tmp_path):
    # a ring whose ways from a to c lead over b (4 m) and over d (12 m)
    spots, links = {"a": 0.0, "b": 2.0, "c": 4.0, "d": 8.0}, {"a": "bd", "b": "ac", "c": "bd", "d": "ac"}
    records = [viewpoint(name, spots[name], [other in links[name] for other in spots]) for name in spots]
    graph = annotations.read_connectivity(write_json(tmp_path / "ring.json", records))
    assert graph.distance("a", "c") == graph.distance("c", "a") == 4.0
    assert graph.distance("b", "d") == 6.0 and graph.distance("a", "d") == 8.0


def test_multi30k_pairs_lines(tmp_path):
    (tmp_path / "train.en").write_text("A dog.\nA cat.\u2028\n\nA cow.\n", encoding="utf-8")
    with gzip.open(tmp_path / "train.de.gz", "wt", encoding="utf-8") as file:
        file.write("Ein Hund.\nEine Kätze.\nLeer.\nEine Kuh.\n")
    (tmp_path / "train.txt").write_text("1.jpg\n2.jpg#0\n3.jpg\n4.jpg\n")
    pairs = annotations.read_multi30k(
        tmp_path / "train.en", tmp_path / "train.de.gz", tmp_path / "train.txt", images={"1", "2"}
    )
    assert [(p.image_id, p.source, p.target, p.line) for p in pairs] == [
        ("1", "A dog.", "Ein Hund.", 1), ("2", "A cat.", "Eine Kätze.", 2),
    ]  # fmt: skip
    assert pairs.report().skipped == {"empty sentence": 1, "image without features": 1}
    (tmp_path / "short.txt").write_text("1.jpg\n")
    with pytest.raises(ValueError, match=r"train.en has 4, .*train.de.gz has 4, .*short.txt has 1 lines"):
        annotations.read_multi30k(tmp_path / "train.en", tmp_path / "train.de.gz", tmp_path / "short.txt")


READERS = {
    "vqa": (annotations.read_vqa, {"questions": [vqa_question()]}, ("questions", 0, "image_id")),
    "gqa": (annotations.read_gqa, {"7": gqa_question()}, ("7", "imageId")),
    "coco": (annotations.read_coco_captions, coco_captions(), ("annotations", 2, "caption")),
    "karpathy": (annotations.read_karpathy, {"images": [karpathy_image()]}, ("images", 0, "sentences")),
    "r2r": (annotations.read_r2r, [route()], (0, "scan")),
    "connectivity": (annotations.read_connectivity, [viewpoint("a", 0, [False])], (0, "included")),
}
LINE_READERS = {
    "nlvr2": (annotations.read_nlvr2, nlvr2_statement(), "sentence"),
    "vcr": (annotations.read_vcr, vcr_question(), "objects"),
    "snli_ve": (annotations.read_snli_ve, entailment(), "sentence2"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_missing_field_names_file_record_and_field(tmp_path, name):
    import copy

    read, content, (*way, field) = READERS[name]
    content = copy.deepcopy(content)
    record = content
    for key in way:
        record = record[key]
    del record[field]
    with pytest.raises(ValueError, match=f"{name}.json: [a-z]+ {way[-1]}.*field '{field}' is missing"):
        read(write_json(tmp_path / f"{name}.json", content))


@pytest.mark.parametrize("name", LINE_READERS)
def test_a_missing_field_names_file_line_and_field(tmp_path, name):
    read, record, field = LINE_READERS[name]
    damaged = {key: value for key, value in record.items() if key != field}
    with pytest.raises(ValueError, match=f"{name}.jsonl: line 2.*: field '{field}' is missing"):
        read(write_lines(tmp_path / f"{name}.jsonl", [record, damaged]))


@pytest.mark.parametrize("name", READERS)
def test_malformed_json_names_file_and_line(tmp_path, name):
    path = tmp_path / "damaged.json"
    path.write_text('{\n "images": [\n  {"id": 1,, }\n ]\n}\n')
    with pytest.raises(ValueError, match="damaged.json: line 3 is malformed JSON"):
        READERS[name][0](path)


@pytest.mark.parametrize("name", LINE_READERS)
def test_a_malformed_line_is_named(tmp_path, name):
    import json

    read, record, _ = LINE_READERS[name]
    path = tmp_path / "damaged.jsonl"
    path.write_text(json.dumps(record) + '\n\n{"identifier": \n')
    with pytest.raises(ValueError, match="damaged.jsonl: line 3 is malformed JSON"):
        read(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: the record is a list of 1, must be an object"):
        read(path)


@pytest.mark.parametrize("name", [*READERS, *LINE_READERS])
def test_hostile_text_gives_a_clear_error(tmp_path, name):
    read = (READERS | LINE_READERS)[name][0]
    path = tmp_path / "hostile.json"
    for content in (b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\xff\xfe"}', b"", b"7"):
        path.write_bytes(content)
        if content or name in READERS:
            with pytest.raises(ValueError, match="hostile.json"):
                read(path)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": 3}, "field 'question' is 3, must be a text"),
        ({"question_id": True}, "field 'question_id' is True, must be a text or an integer"),
        ({"image_id": [1]}, "field 'image_id' is a list of 1"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, changes, message):
    path, _ = write_vqa(tmp_path, [vqa_question() | changes], [])
    with pytest.raises(ValueError, match="questions.json: question 0") as error:
        annotations.read_vqa(path)
    assert message in str(error.value)
