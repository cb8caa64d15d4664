"""Lists of answers: the texts of an answer head's labels, as files beside a checkpoint."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.region_arrays import read_pickle

ANSWERS_NAME = "answers.json"
# ours, and what the LXMERT and ViLBERT repositories call theirs
ANSWER_NAMES = (ANSWERS_NAME, "answers.txt", "label2ans.json", "trainval_label2ans.json", "trainval_label2ans.pkl")


def find_answers(checkpoint: str | os.PathLike) -> Path | None:
    """The list of answers that lies in a checkpoint's folder, or None."""
    folder = Path(checkpoint)
    folder = folder if folder.is_dir() else folder.parent
    return next((folder / name for name in ANSWER_NAMES if (folder / name).is_file()), None)


def read_answers(path: str | os.PathLike) -> list[str]:
    """Answers in the order of the labels.

    Args:
        path: .json (a list, an object answer -> label, or one label -> answer), .pkl (the same, read without executing
            anything), another file with one answer a line; or a folder that holds one of `ANSWER_NAMES`.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or not a list of answers.
    """
    path = Path(path)
    if path.is_dir():
        found = find_answers(path)
        if found is None:
            raise FileNotFoundError(f"answers: {path} holds none of {', '.join(ANSWER_NAMES)}")
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"answers: {path} does not exist")
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".pkl":
            content = read_pickle(path.read_bytes())
        else:
            content = path.read_text(encoding="utf-8").splitlines()
        return _ordered(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"answers: {path}: {error}") from error


def write_answers(path: str | os.PathLike, answers: Sequence[str]) -> Path:
    """Writes a JSON list; into a folder as answers.json, where `vlmfast answer` finds it. Returns the file."""
    path = Path(path)
    path = path / ANSWERS_NAME if path.is_dir() else path
    text = json.dumps(_ordered(list(answers)), ensure_ascii=False, indent=0)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path


def _ordered(content) -> list[str]:
    if isinstance(content, dict):
        turned = content if all(isinstance(label, int) for label in content.values()) else None
        if turned is None:
            turned = {answer: int(label) for label, answer in content.items() if str(label).isdecimal()}
        if sorted(turned.values()) != list(range(len(content))):
            raise ValueError(f"labels must be 0 ... {len(content) - 1}, each once")
        content = sorted(turned, key=turned.get)
    if not isinstance(content, list) or not content:
        raise ValueError(f"holds a {type(content).__name__}, must be a list of at least one answer")
    for i, answer in enumerate(content):
        if not isinstance(answer, str):
            raise ValueError(f"answer {i} is {answer!r:.60}, must be a text")
    return content
