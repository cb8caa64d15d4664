"""Which model does which task: what `vlmfast tasks` prints and the tests go through."""

from dataclasses import dataclass

from .pair_models import MODELS, TASK_HEADS


@dataclass(frozen=True)
class Row:
    """A task and a model that does it.

    Attributes:
        task: as in `load(path, task=...)` and `task_loss`.
        model: class name.
        heads: names of the model's heads that answer, the one that `with_head` adds first; empty where no head does.
        reads: "regions" or "pictures", beside texts.
        interface: name in `vlmfast.tasks`.
        metric: functions of `vlmfast.tasks`.
        loss: of the first head, a key of `fine_tuning.LOSSES`; "" where there is none to fine-tune.
    """

    task: str
    model: str
    heads: tuple[str, ...]
    reads: str
    interface: str
    metric: tuple[str, ...]
    loss: str = ""


_INTERFACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "vqa": ("VQA", ("vqa_accuracy",)),
    "gqa": ("GQA", ("accuracy",)),
    "nlvr2": ("NLVR2", ("accuracy", "nlvr2_consistency")),
    "entailment": ("VisualEntailment", ("accuracy",)),
    "vcr": ("VCR", ("accuracy",)),
    "grounding": ("Grounding", ("grounding_accuracy",)),
    "retrieval": ("CrossEncoderRetriever", ("recall_of_scores",)),
    "affect": ("Affect", ("classification_scores", "multi_label_scores", "intensity_scores")),
}


def _rows() -> list[Row]:
    rows = []
    for task, by_model in TASK_HEADS.items():
        interface, metric = _INTERFACES[task]
        for model, entry in MODELS.items():
            known = by_model.get("AffectModel" if task == "affect" else model)
            if known:
                heads = tuple(dict.fromkeys(one.head for one in known))
                rows.append(Row(task, model, heads, "pictures" if entry.feature_dim is None else "regions", interface,
                                metric, known[0].loss))
    interface, metric = _INTERFACES["affect"]
    rows += [
        Row("affect", "CLIP", ("affect",), "pictures", interface, metric, "classes"),
        Row("retrieval", "CLIP", (), "pictures", "Retriever", ("recall_at_k",)),
        Row("zero_shot", "CLIP", (), "pictures", "ZeroShotClassifier", ("accuracy",)),
    ]
    # a dual encoder's shortlist, put in order by the model named
    rows += [Row("reranking", row.model, row.heads, row.reads, "Reranker", ("recall_of_scores",), row.loss)
             for row in rows if row.task == "retrieval" and row.heads]
    return rows


_FURTHER: list[Row] = []


def add_rows(*rows: Row) -> None:
    """Makes `table` list further tasks; rows already there are not repeated."""
    _FURTHER.extend(row for row in rows if row not in _FURTHER)


def table(task: str | None = None, model: str | None = None) -> list[Row]:
    """The rows of a task, of a model, or all.

    Raises:
        ValueError: no such task or model.
    """
    rows = _rows() + _FURTHER
    for name, value, field in (("task", task, "task"), ("model", model, "model")):
        known = list(dict.fromkeys(getattr(row, field) for row in rows))
        if value is not None and value not in known:
            raise ValueError(f"table: {name} is {value!r}, must be one of {', '.join(known)}")
    return [row for row in rows if task in (None, row.task) and model in (None, row.model)]
