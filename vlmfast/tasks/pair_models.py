"""How each BERT-like model takes texts and pictures, and which of its heads answers which task.

The only place with names of heads, layouts of texts, box formats, segments and orders of labels. Sources are the public
repositories; where there is none, or the architecture has no head of the kind, the generic "classifier" is used (our
choice, as in MMF).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ..data.annotations import ENTAILMENT_LABELS
from ..models.affect import AffectModel
from ..models.imagebert import ImageBERT
from ..models.lxmert import LXMERT
from ..models.pixelbert import PixelBERT
from ..models.uniter import UNITER
from ..models.vdbert import VDBERT
from ..models.vilbert import ViLBERT
from ..models.visualbert import VisualBERT
from ..models.vlbert import VLBERT

VILBERT_ENTAILMENT = ("contradiction", "neutral", "entailment")


@dataclass(frozen=True)
class PairInputs:
    """How a model takes a text with a picture.

    Attributes:
        model: its class.
        feature_dim: config field with the width of region features; None: it takes pictures, not regions.
        boxes: a format of `data.encode_regions`, or None for models without boxes.
        global_region: region 0 is the whole picture.
        segments: number of segments of a text -> their segment ids.
        cut_front: a text that is too long loses its beginning.
        entailment: classes of an entailment head in their order.
    """

    model: type[nn.Module]
    feature_dim: str | None
    boxes: str | None = None
    global_region: bool = False
    segments: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: {1: (0,), 2: (0, 1), 3: (0, 0, 1)})
    cut_front: bool = False
    entailment: tuple[str, ...] = ENTAILMENT_LABELS


MODELS: dict[str, PairInputs] = {
    "ViLBERT": PairInputs(ViLBERT, "v_feature_size", "vilbert", global_region=True, entailment=VILBERT_ENTAILMENT),
    "LXMERT": PairInputs(LXMERT, "visual_feat_dim", "lxmert"),
    "VisualBERT": PairInputs(VisualBERT, "visual_embedding_dim", cut_front=True),
    # a question, its answer and its rationale have segments of their own (VCR)
    "UNITER": PairInputs(UNITER, "img_dim", "uniter", segments={1: (0,), 2: (0, 2), 3: (0, 2, 3)}),
    "VLBERT": PairInputs(VLBERT, "image_feat_dim", "vl_bert", global_region=True),
    "VDBERT": PairInputs(VDBERT, "vis_feat_dim", "vd_bert"),
    "ImageBERT": PairInputs(ImageBERT, "visual_feat_dim", "imagebert"),
    "PixelBERT": PairInputs(PixelBERT, None),
}
# numbers of the task tokens of the public multi-task ViLBERT (12-in-1, arXiv:1912.02315)
TASK_IDS = {"vqa": 1, "vcr": 5, "vcr_rationale": 6, "retrieval": 7, "grounding": 9, "nlvr2": 12, "entailment": 13,
            "gqa": 15}


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """One head that answers a task.

    Attributes:
        head: its name in `available()` and `logits`.
        loss: a key of `fine_tuning.LOSSES`.
        labels: config field with the number of classes, where the task does not fix it.
        needs: config fields and the values that they must have; a tuple names several.
        fresh: config changes that make a new head of this kind; None takes `heads=(head,)` and `needs`.
        new_types: further rows of the segment table, each a copy of the row named here.
        text: "plain"; "question_mask", [CLS] question ? [MASK] [SEP]; "answer_mask", [CLS] question [SEP] [MASK] [SEP];
            "phrase", plain with the place of the last token.
        pictures: "one"; "passes", a pass for each of two pictures; "joint", both in one sequence.
        picture_types: segments of the regions of the two pictures.
        reads: "logits"; "odds", the log odds of class `match` among two; "class", the logit of that class.
        match: the class of a right pair or choice.
    """

    head: str
    loss: str
    labels: str | None = None
    needs: Mapping[str, object] = field(default_factory=dict)
    fresh: Mapping[str, object] | None = None
    new_types: tuple[int, ...] = ()
    text: str = "plain"
    pictures: str = "one"
    picture_types: tuple[int, int] | None = None
    reads: str = "logits"
    match: int = 1

    def problem(self, model: nn.Module) -> str | None:
        """Why this head of a model cannot serve, or None."""
        for name, must in self.needs.items():
            value = getattr(model.config, name)
            allowed = must if isinstance(must, tuple) else (must,)
            if value not in allowed:
                return f"model.config.{name} is {value!r}, must be {' or '.join(map(repr, allowed))}"
        least = 2 + len(self.new_types)
        if self.new_types and model.config.type_vocab_size < least:
            return (f"model.config.type_vocab_size is {model.config.type_vocab_size}, must be at least {least}: adapt "
                    f"the model with new_types={self.new_types}")
        return None

    def changes(self, model: nn.Module, labels: int | None) -> dict[str, object]:
        """Arguments of `model.adapted` that make a new head."""
        values = {name: must[0] if isinstance(must, tuple) else must for name, must in self.needs.items()}
        values = {"heads": (self.head,), **values, **(self.fresh or {})}
        if labels is not None:
            if self.labels is None:
                raise ValueError(f"labels: is {labels}, the task's {self.head!r} head has a fixed number")
            values[self.labels] = labels
        if missing := self.new_types[max(getattr(model.config, "type_vocab_size", 2) - 2, 0) :]:
            values["new_types"] = missing
        return values


def _answer(head: str = "vqa", labels: str = "vqa_labels", loss: str = "answer_bce", **more) -> TaskHead:
    return TaskHead(head=head, loss=loss, labels=labels, **more)


def _classifier(images: int, labels: int | None, loss: str, **more) -> TaskHead:
    needs = {"classifier_images": images} | ({} if labels is None else {"classifier_labels": labels})
    return TaskHead(head="classifier", loss=loss, labels="classifier_labels" if labels is None else None, needs=needs,
                 pictures="passes" if images == 2 else "one", **more)


def _match(head: str, fresh: tuple[str, ...] | str, match: int = 1, **more) -> TaskHead:
    return TaskHead(head=head, loss="choices_two_class", reads="odds", match=match, fresh={"heads": fresh, **more})


_POOLER = {"with_pooler": True}  # VL-BERT's is optional
_ALL_CELLS = {"pixel_random_sampling_size": 0}  # Pixel-BERT samples in pretraining only
_ANSWER = _classifier(1, None, "answer_bce")
_TWO = _classifier(2, 2, "classes")
_THREE = _classifier(1, 3, "classes")
_VL_ANSWER, _VL_TWO, _VL_THREE = (_classifier(*kind, fresh=_POOLER) for kind in
                                  ((1, None, "answer_bce"), (2, 2, "classes"), (1, 3, "classes")))
_PIXEL_TWO, _PIXEL_THREE = (_classifier(*kind, fresh=_ALL_CELLS) for kind in ((2, 2, "classes"), (1, 3, "classes")))
_RANK = TaskHead(head="rank", loss="choices")
_PIXEL_RANK = TaskHead(head="rank", loss="choices", fresh={"heads": ("rank",), **_ALL_CELLS})

_QUESTIONS: dict[str, tuple[TaskHead, ...]] = {
    "ViLBERT": (_answer(),),
    "LXMERT": (_answer(labels="num_qa_labels", needs={"images_per_answer": 1, "heads": "vqa"}),
               _answer(labels="num_qa_labels", loss="classes", needs={"images_per_answer": 1, "heads": "pretraining"})),
    "VisualBERT": (_answer(loss="answer_kl", text="question_mask"), _ANSWER),
    "UNITER": (_answer(), _ANSWER),
    "VLBERT": (_answer(text="answer_mask"), _VL_ANSWER),
    "VDBERT": (_ANSWER,),
    "ImageBERT": (_ANSWER,),
    "PixelBERT": (_answer(labels="num_labels", fresh=_ALL_CELLS), _ANSWER),
}
# task -> model -> heads, the first is the one that a model without any gets
TASK_HEADS: dict[str, dict[str, tuple[TaskHead, ...]]] = {
    "vqa": _QUESTIONS,
    "gqa": {**_QUESTIONS, "ViLBERT": (_answer("gqa", "gqa_labels"),)},
    "nlvr2": {
        "ViLBERT": (TaskHead(head="binary", loss="classes_bce", pictures="passes"),),
        "LXMERT": (TaskHead(head="vqa", loss="classes", pictures="passes",
                         needs={"images_per_answer": 2, "num_qa_labels": 2}, fresh={"heads": "vqa"}),),
        "VisualBERT": (TaskHead(head="nlvr2", loss="classes", needs={"nlvr2_labels": 2}, pictures="joint",
                             picture_types=(0, 1)), _TWO),
        "UNITER": (TaskHead(head="nlvr2", loss="classes", needs={"nlvr2": ("paired-attn", "paired")}, new_types=(1,),
                         pictures="passes", picture_types=(1, 2)),
                   TaskHead(head="nlvr2", loss="classes", needs={"nlvr2": "triplet"}, new_types=(1,), pictures="joint",
                         picture_types=(1, 2)), _TWO),
        "VLBERT": (_VL_TWO,),
        "VDBERT": (_TWO,),
        "ImageBERT": (_TWO,),
        "PixelBERT": (_PIXEL_TWO,),
    },
    "entailment": {
        "ViLBERT": (TaskHead(head="tri", loss="classes_bce"),),
        "LXMERT": (TaskHead(head="vqa", loss="classes", needs={"images_per_answer": 1, "num_qa_labels": 3},
                         fresh={"heads": "vqa"}),),
        "VisualBERT": (_THREE,),
        "UNITER": (TaskHead(head="ve", loss="classes_bce_sum", needs={"ve_labels": 3}), _THREE),
        "VLBERT": (_VL_THREE,),
        "VDBERT": (_THREE,),
        "ImageBERT": (_THREE,),
        "PixelBERT": (_PIXEL_THREE,),
    },
    "vcr": {
        "ViLBERT": (TaskHead(head="vil", loss="choices"),),
        "LXMERT": (TaskHead(head="vqa", loss="choices", needs={"images_per_answer": 1, "num_qa_labels": 1},
                         fresh={"heads": "vqa"}),),
        "VisualBERT": (TaskHead(head="vcr", loss="choices"),),
        "UNITER": (TaskHead(head="vcr", loss="choices_two_class", reads="class", new_types=(0, 0)),),
        "VLBERT": (TaskHead(head="vcr", loss="choices_bce", fresh=_POOLER),),
        "VDBERT": (TaskHead(head="nsp", loss="choices_two_class", reads="class"),),
        "ImageBERT": (_RANK,),
        "PixelBERT": (_PIXEL_RANK,),
    },
    "grounding": {
        "ViLBERT": (TaskHead(head="vision", loss="regions_bce"),),
        "VisualBERT": (TaskHead(head="flickr", loss="regions_kl", text="phrase"),),
        "UNITER": (TaskHead(head="referring", loss="regions_cross_entropy"),),
        "VLBERT": (TaskHead(head="referring", loss="regions_mean_bce"),),
    },
    "retrieval": {
        "ViLBERT": (TaskHead(head="vil", loss="choices"), _match("nsp", ("pretraining",), 0)),
        "LXMERT": (_match("matched", "pretraining"),),
        "VisualBERT": (_match("nsp", ("pretraining",)),),
        "UNITER": (TaskHead(head="rank", loss="choices_margin"), _match("itm", ("itm",))),
        "VLBERT": (_match("relationship", ("relationship",), **_POOLER),),
        "VDBERT": (_match("nsp", ("nsp",)),),
        "ImageBERT": (_RANK, _match("itm", ("pretraining",))),
        "PixelBERT": (_PIXEL_RANK, _match("itm", ("pretraining",))),
    },
    "affect": {
        "AffectModel": tuple(TaskHead(head="affect", loss=loss, needs={"kind": kind}) for kind, loss in
                             (("classes", "classes"), ("labels", "affect_labels"), ("intensity", "affect_intensity"))),
    },
}


ALIASES = {"nlvr": "nlvr2", "referring": "grounding", "snli_ve": "entailment"}


def plain_task(task: str) -> str:
    """A task's key in `TASK_HEADS`, for one of its other names too."""
    return ALIASES.get(task, task)


def trunk_of(model: nn.Module) -> nn.Module:
    """The model inside an `AffectModel`, else the model itself."""
    return model.trunk if isinstance(model, AffectModel) else model


def kind_of(model: nn.Module, where: str) -> str:
    """A model's key in `MODELS`; TypeError where it has none."""
    for name, entry in MODELS.items():
        if isinstance(trunk_of(model), entry.model):
            return name
    raise TypeError(f"{where}: model is {type(model).__name__}, must be one of {', '.join(MODELS)}")


def task_head_for(model: nn.Module, task: str, where: str, head: str | None = None) -> TaskHead:
    """The head that answers a task.

    Args:
        model: a BERT-like model or an `AffectModel`.
        task: a key of `TASK_HEADS`.
        where: what the error names first.
        head: one of the task's heads; None takes the first that the model has.

    Raises:
        TypeError: another model. ValueError: an unknown task or head, or the model has no head for it.
    """
    task = plain_task(task)
    if task not in TASK_HEADS:
        raise ValueError(f"{where}: task is {task!r}, must be one of {', '.join(TASK_HEADS)}")
    kind = type(model).__name__ if isinstance(model, AffectModel) else kind_of(model, where)
    known = TASK_HEADS[task].get(kind, ())
    if not known:
        raise ValueError(f"{where}: a {kind} has no head for {task}, must be one of {', '.join(TASK_HEADS[task])}")
    names = list(dict.fromkeys(score.head for score in known))
    if head is not None and head not in names:
        raise ValueError(f"{where}: head is {head!r}, must be one of {', '.join(names)}")
    names = names if head is None else [head]
    available, problems = model.available(), []
    for score in known:
        if score.head in names and score.head in available:
            problem = score.problem(model)
            if problem is None:
                return score
            problems.append(problem)
    if problems:
        raise ValueError(f"{where}: {problems[0]}")
    raise ValueError(f"{where}: model has the heads {', '.join(available) or '(none)'}, must have {' or '.join(names)}")


def with_head(model: nn.Module, task: str, labels: int | None = None) -> nn.Module:
    """A model that has a head for a task.

    Args:
        model: a BERT-like model.
        task: a key of `TASK_HEADS` except "affect", which `models.affect.AffectModel` adds.
        labels: classes of the answer head of "vqa" and "gqa"; None keeps what the model has, or its config's default.

    Returns:
        The model itself where its head serves; else a copy with a new head, not trained, in place of the old ones. The
        rest of its tensors are the model's.

    Raises:
        TypeError, ValueError: as `task_head_for`; `labels` where the task fixes it.
    """
    task = plain_task(task)
    if task == "affect":
        raise ValueError("with_head: task is 'affect', must be another; AffectModel adds its head")
    known = TASK_HEADS.get(task, {}).get(kind_of(model, "with_head"))
    try:
        score = task_head_for(model, task, "with_head")
        if labels is None or (score.labels and getattr(model.config, score.labels) == labels):
            return model
    except ValueError:
        if not known:
            raise
    score = known[0]
    changes, heads = score.changes(model, labels), model.config.heads
    if score.head in model.available() and (isinstance(heads, str) or score.head in heads):
        # of other sizes: nothing of it can be kept
        rest = "none" if isinstance(heads, str) else tuple(name for name in heads if name != score.head)
        model = model.adapted(heads=rest)
    return model.adapted(**changes)
