"""`vlmfast train uniter --task vqa` and its like: public annotation files to examples, and the job of fine-tuning."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import save_pretrained
from ..data.annotations import AnswerVocabulary, read_gqa, read_nlvr2, read_snli_ve, read_vqa
from ..data.annotations.records import AnnotationReport, Images, need, optional, read_json_lines
from ..data.region_text import RegionTextPairs, find_files
from ..data.regions import RegionFeatures
from ..data.report import Skip
from ..tasks.answer_metrics import normalize_answer
from ..tasks.answers import read_answers, write_answers
from ..tasks.pair_models import with_head
from ..training.fine_tuning import (
    Entailment,
    Example,
    Questions,
    Retrieval,
    Statements,
    TaskExamples,
    TaskLoss,
    TaskValidation,
    task_loader,
)
from .bert_data import GIB, MAX_CAPTIONS, Job, open_pairs, splits_of
from .bert_model import limited, make_model, make_tokenizer, pretraining_heads

# name on the command line -> key of `tasks.pair_models.TASK_HEADS`
TASKS = {"vqa": "vqa", "gqa": "gqa", "nlvr2": "nlvr2", "ve": "entailment", "entailment": "entailment",
         "retrieval": "retrieval"}


def prepare_task(settings, config, process, resumed: Path | None, say, line) -> Job:
    """The job of fine-tuning; see `bert_data.prepare`."""
    if settings.task not in TASKS:
        raise ValueError(f"--task is {settings.task!r}, must be one of {', '.join(TASKS)}")
    if settings.objectives:
        raise ValueError("--objectives are of pretraining, --task is fine-tuning; give one of them")
    name = TASKS[settings.task]
    features = _features(settings)
    train, val = _read(name, settings, config, features, say)
    store = RegionTextPairs(features, [(image_id, "") for one in (train, val) if one is not None
                                       for example in one[0] for image_id in example.images],
                            cache_bytes=int(settings.cache * GIB))
    kind = _kind(name, settings, train, resumed)
    train = _answerable(kind, train)
    tokenizer = make_tokenizer(settings, [example.text for example in train[0][:MAX_CAPTIONS]], resumed)
    torch.manual_seed(config.seed)
    facts = limited(store.facts(), settings.max_regions)
    heads = {} if settings.init else pretraining_heads(settings.model)
    model, started = make_model(settings, tokenizer, facts, store.feature_dim, heads, resumed=resumed)
    model = with_head(model, name, kind.labels).train()
    task = kind.make(model, batch_size=settings.batch_size, max_tokens=settings.max_tokens,
                     max_regions=settings.max_regions)
    examples = [TaskExamples(one[0], store, one[1]) if one is not None else None for one in (train, val)]
    for one, what in zip(examples, ("training", "validation"), strict=True):
        if one is not None:
            say(f"{what}: {one.report()}")
    loader, cut = task_loader(kind, task, examples[0], settings.batch_size, seed=config.seed, rank=process.rank,
                              world_size=process.world)
    if cut:
        say(f"{cut} texts have more than {task.max_tokens} tokens and are cut")
    validate = None
    if examples[1] is not None:
        validate = TaskValidation(kind, task, examples[1], settings.batch_size, say=line)
    return Job(model, started, loader, TaskLoss(task), f"task {name}", validate, cut, "examples",
               _unreadable(examples), _save(kind))


def _unreadable(examples: list) -> Callable[[], str]:
    known = [one.report().total_skipped if one is not None else 0 for one in examples]

    def skipped() -> str:
        return "; ".join(str(one.report()) for one, before in zip(examples, known, strict=True)
                         if one is not None and one.report().total_skipped > before)

    return skipped


def _save(kind) -> Callable[[nn.Module, Path], None] | None:
    """Writes the answers beside the model, where `vlmfast answer` finds them."""
    if not isinstance(kind, Questions):
        return None

    def save(model: nn.Module, folder: Path) -> None:
        save_pretrained(model, folder)
        write_answers(folder, kind.vocabulary.answers)

    return save


def _features(settings) -> RegionFeatures:
    path = Path(settings.data)
    return RegionFeatures.open(find_files(path)[0] or path, settings.format)


Part = tuple[list[Example], AnnotationReport]


def _read(name: str, settings, config, features: RegionFeatures, say) -> tuple[Part, Part | None]:
    """Examples for training and validation with their reports."""
    if name == "retrieval":
        pairs, val = open_pairs(settings, config, say)
        return tuple(None if part is None else (
            [Example(text, (image_id,)) for image_id, text in part.entries], AnnotationReport(used=len(part)))
            for part in (pairs, val))
    if not settings.train:
        raise ValueError(f"--train: the annotations of {settings.task} are missing")
    train = _examples(name, settings.train, settings.train_splits, settings, features)
    if settings.val or settings.val_splits:
        files = settings.val.split(",") if settings.val else settings.train
        return train, _examples(name, files, settings.val_splits, settings, features)
    images = list(dict.fromkeys(example.images[0] for example in train[0]))
    if not settings.val_fraction or len(images) < 20:
        return train, None
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    held = {images[i] for i in order[: max(1, round(settings.val_fraction * len(images)))]}
    sides = [[example for example in train[0] if any(image in held for image in example.images) == side]
             for side in (False, True)]
    return (sides[0], train[1]), (sides[1], AnnotationReport(used=len(sides[1])))


def _examples(name: str, files, splits: str | None, settings, features) -> Part:
    options = dict(images=features, image_name=settings.image_name)
    first, wanted = Path(files[0]), splits_of(splits)
    if first.suffix == ".jsonl" and name != "entailment":
        report = AnnotationReport()
        examples = list(_plain(first, name, wanted, Images(**_known(options)), report))
        report.used = len(examples)
    elif wanted is not None:
        raise ValueError(f"{first}: splits belong to caption files and .jsonl files with a field 'split'")
    else:
        if name == "vqa" and len(files) != 2:
            raise ValueError("--train of vqa needs two files, questions.json,annotations.json, or one .jsonl")
        read = {"vqa": read_vqa, "gqa": read_gqa, "nlvr2": read_nlvr2, "entailment": read_snli_ve}[name]
        found = read(*files, **options)
        examples, report = [_of_record(name, record) for record in found], found.report()
    if not examples:
        raise ValueError(f"{', '.join(map(str, files))}: no usable example\n{report}")
    return examples, report


def _known(options: dict) -> dict:
    return {"known": options["images"], "name": options["image_name"]}


def _of_record(name: str, record) -> Example:
    if name == "nlvr2":
        return Example(record.sentence, (record.left_id, record.right_id), record.label, group=record.group)
    if name == "entailment":
        return Example(record.hypothesis, (record.image_id,), record.label)
    return Example(record.question, (record.image_id,), record.answer, getattr(record, "answers", ()))


def _plain(path: Path, name: str, splits, images: Images, report: AnnotationReport) -> Iterable[Example]:
    """Examples of a .jsonl file of one's own: image_id, question, answer (and answers); or image_ids, statement, label;
    with a field `split` where only some are wanted."""
    for where, record in read_json_lines(path):
        if splits is not None and need(record, "split", "text", where) not in splits:
            continue
        if name == "nlvr2":
            ids = tuple(images.name(image) for image in need(record, "image_ids", "list", where))
            text, right = need(record, "statement", "text", where), record.get("label")
            if not isinstance(right, bool):
                raise ValueError(f"{where}: field 'label' is {right!r}, must be true or false")
            if len(ids) != 2:
                report.add(Skip("not two pictures", where, f"{len(ids)} pictures"))
                continue
            example = Example(text, ids, right, group=text)
        else:
            answers = tuple(map(str, optional(record, "answers", "list", where) or ()))
            right = need(record, "answer", "text", where)
            example = Example(need(record, "question", "text", where),
                              (images.name(need(record, "image_id", "id", where)),), right, answers)
        skip = images.missing(where, *example.images)
        if skip is not None:
            report.add(skip)
        else:
            yield example


def _kind(name: str, settings, train: Part, resumed: Path | None):
    examples = train[0]
    if name == "nlvr2":
        return Statements(examples)
    if name == "entailment":
        return Entailment(examples)
    if name == "retrieval":
        return Retrieval()
    unlabelled = [example for example in examples if example.right is None]
    if unlabelled:
        raise ValueError(f"{', '.join(settings.train)}: {len(unlabelled)} questions have no answer")
    if resumed is not None or settings.answers:
        answers = tuple(read_answers(resumed or settings.answers))
        vocabulary = AnswerVocabulary(answers, normalize_answer)
    else:
        asked = [_Answered(example.right) for example in examples]
        vocabulary = AnswerVocabulary.build(asked, settings.min_answers, normalize_answer)
    return Questions(vocabulary, examples, gqa=name == "gqa")


class _Answered:
    """What `AnswerVocabulary.build` counts."""

    def __init__(self, answer: str):
        self.answer = answer


def _answerable(kind, train: Part) -> Part:
    """Without questions none of whose answers the head can give; they are counted."""
    if not isinstance(kind, Questions):
        return train
    examples, report = train
    kept = []
    for example in examples:
        if any(answer in kind.vocabulary for answer in (*example.answers, example.right)):
            kept.append(example)
        else:
            report.add(Skip("no answer in the vocabulary", example.text, str(example.right)))
    report.used = len(kept)
    if not kept:
        raise ValueError(f"no training question has an answer in the vocabulary of {len(kind.vocabulary)} answers")
    return kept, report
