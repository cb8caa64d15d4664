"""Small files in the public annotation formats, for the tests of their readers."""

import json
from pathlib import Path


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def vqa_question(number=1, image=262148, text="how many dogs?"):
    return {"image_id": image, "question": text, "question_id": number}


def vqa_annotation(number=1, image=262148, answers=("2",) * 7 + ("two", "3", "3")):
    return {
        "question_id": number,
        "image_id": image,
        "question_type": "how many",
        "answer_type": "number",
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)
        ],
    }


def write_vqa(folder: Path, questions, annotations) -> tuple[Path, Path]:
    return (
        write_json(folder / "questions.json", {"task_type": "Open-Ended", "questions": questions}),
        write_json(folder / "annotations.json", {"annotations": annotations}),
    )


def gqa_question(**changes):
    record = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160", "02930158"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }
    return record | changes


def nlvr2_statement(identifier="dev-850-0-0", label="True", **changes):
    return {
        "identifier": identifier,
        "sentence": "There are two dogs.",
        "label": label,
        "left_url": "https://example.org/left.jpg",
        "right_url": "https://example.org/right.jpg",
        "directory": 12,
        "writer": 63,
        "validation": {"4": "True"},
        "synset": "dog",
        "query": "dogs0",
    } | changes


def vcr_question(**changes):
    return {
        "movie": "3015_CHARLIE_ST_CLOUD",
        "objects": ["person", "person", "person", "car"],
        "interesting_scores": [0, -1],
        "answer_likelihood": "possible",
        "img_fn": "lsmdc_3015/3015_00.23@0.jpg",
        "metadata_fn": "lsmdc_3015/3015_00.23@0.json",
        "answer_orig": "No, 1 and 3 do not .",
        "question_orig": "Does 3 feel comfortable?",
        "question": ["Does", [2], "feel", "comfortable", "?"],
        "answer_choices": [
            ["No", ",", [0, 2], "do", "not", "."],
            ["Yes", "."],
            [[1], "does", "."],
            [[0], "is", "in", [3], "."],
        ],
        "answer_label": 3,
        "rationale_choices": [[[0], "smiles", "."], ["It", "is", "."], ["No", "."], [[3], "is", "parked", "."]],
        "rationale_label": 1,
        "img_id": "train-0",
        "question_number": 0,
        "annot_id": "train-0",
    } | changes


def coco_captions():
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": 318556, "file_name": "COCO_train2014_000000318556.jpg", "height": 640, "width": 480},
            {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "height": 480, "width": 640},
        ],
        "annotations": [
            {"image_id": 318556, "id": 48, "caption": "A very clean bathroom."},
            {"image_id": 9, "id": 49, "caption": "A plate of food. "},
            {"image_id": 318556, "id": 50, "caption": "A blue and white bathroom."},
        ],
    }


def karpathy_image(name="COCO_val2014_000000391895.jpg", split="test", number=391895, texts=("A man.", "A bike.")):
    record = {
        "sentids": list(range(len(texts))),
        "imgid": 0,
        "sentences": [
            {"tokens": text.lower().strip(".").split(), "raw": text, "imgid": 0, "sentid": i}
            for i, text in enumerate(texts)
        ],
        "split": split,
        "filename": name,
    }
    return record | ({} if number is None else {"cocoid": number, "filepath": "val2014"})


ENTITY_SENTENCE = (
    "[/EN#283585/people Two young guys] with [/EN#283587/bodyparts shaggy hair] look at "
    "[/EN#283588/bodyparts/other their hands] in [/EN#0/notvisual the yard] ."
)
ENTITY_XML = """<annotation>
  <filename>1000092795.jpg</filename>
  <size><width>333</width><height>500</height><depth>3</depth></size>
  <object><name>283585</name><bndbox><xmin>1</xmin><ymin>18</ymin><xmax>187</xmax><ymax>491</ymax></bndbox></object>
  <object><name>283585</name><bndbox><xmin>168</xmin><ymin>5</ymin><xmax>333</xmax><ymax>498</ymax></bndbox></object>
  <object><name>283587</name><name>283588</name>
    <bndbox><xmin>70</xmin><ymin>19</ymin><xmax>107</xmax><ymax>66</ymax></bndbox></object>
  <object><name>283590</name><scene>1</scene><nobox>0</nobox></object>
  <object><name>283591</name><scene>0</scene><nobox>1</nobox></object>
</annotation>
"""


def write_entities(root: Path, image_id="1000092795", sentences=(ENTITY_SENTENCE, "No link here ."), xml=ENTITY_XML):
    for folder, suffix, text in (("Sentences", "txt", "\n".join(sentences) + "\n"), ("Annotations", "xml", xml)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{image_id}.{suffix}").write_text(text, encoding="utf-8")
    return root


def refcoco_reference(split="train", **changes):
    return {
        "sent_ids": [0, 1],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "ref_id": 7,
        "image_id": 581857,
        "split": split,
        "sentences": [
            {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
            {"tokens": ["blue", "shirt"], "raw": "blue shirt", "sent_id": 1, "sent": "blue shirt"},
        ],
        "category_id": 1,
    } | changes


def instances():
    return {
        "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": 427, "width": 640}],
        "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [103.5, 299, 238.25, 40], "category_id": 1}],
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }


def entailment(label="neutral", **changes):
    return {
        "annotator_labels": ["neutral"],
        "captionID": "4705552913.jpg#2",
        "gold_label": label,
        "pairID": "4705552913.jpg#2r1n",
        "sentence1": "Two women are embracing.",
        "sentence2": "The sisters are hugging goodbye.",
        "Flickr30K_ID": "4705552913",
    } | changes


def route(**changes):
    return {
        "distance": 10.5,
        "scan": "VLzqgDo317F",
        "path_id": 6250,
        "path": ["af3af33b", "5be14560", "79aedad1"],
        "heading": 3.751,
        "instructions": ["Walk down one flight of stairs. ", "Go down.", "Stop on the landing."],
    } | changes


def viewpoint(name, x, links, included=True):
    pose = [1, 0, 0, x, 0, 1, 0, 0.0, 0, 0, 1, 1.5, 0, 0, 0, 1]
    return {"image_id": name, "pose": pose, "included": included, "visible": links, "unobstructed": links,
            "height": 1.5}  # fmt: skip
