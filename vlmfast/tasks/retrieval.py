"""Text-to-image search over a folder with a dual encoder."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Match:
    """One answer: the file, and its cosine similarity to the query."""

    path: Path
    score: float


def list_images(folder: str | Path) -> list[Path]:
    """Image files below `folder` by suffix, sorted; hidden files and folders are left out.

    Raises:
        FileNotFoundError: no such folder. NotADirectoryError: it is a file. ValueError: it holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"images: {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"images: {folder} is a file, must be a folder")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names)
                  if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise ValueError(f"images: {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


class Retriever:
    """Embeds pictures once and ranks them for any number of queries.

    Args:
        model: a dual encoder with `encode_image`, `encode_text`; put into eval mode.
        tokenizer, preprocess: None takes `model.tokenizer` and `model.preprocess`.
        batch_size: pictures encoded at a time.
        device: where to compute; None keeps the model where it is.

    Attributes:
        paths: the files that were embedded, in order; features: [N, D] unit rows.
        skipped: (file, reason) of what could not be read.

    Raises:
        ValueError: the model carries no tokenizer or preprocess and none is given.
    """

    def __init__(self, model: nn.Module, *, tokenizer=None, preprocess=None, batch_size: int = 64, device=None):
        self.tokenizer = tokenizer or getattr(model, "tokenizer", None)
        self.preprocess = preprocess or getattr(model, "preprocess", None)
        for name in ("tokenizer", "preprocess"):
            if getattr(self, name) is None:
                raise ValueError(f"Retriever: the model carries no {name}, give one")
        self.model = (model if device is None else model.to(device)).eval()
        self.batch_size = batch_size
        self.paths: list[Path] = []
        self.skipped: list[tuple[Path, str]] = []
        self.features: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def add(self, images: str | Path | Iterable[str | Path], *, cache: str | Path | None = None,
            progress: bool = False) -> "Retriever":
        """Embeds a folder, searched with its subfolders, or the given files; unreadable ones land in `skipped`.

        Args:
            images: a folder, or files.
            cache: safetensors file with features of an earlier call, updated with new and changed files. It is
                ignored where it was made by other weights.
            progress: show a progress bar.

        Raises:
            FileNotFoundError, NotADirectoryError: see `list_images`. ValueError: no picture could be read.
        """
        paths = list_images(images) if isinstance(images, str | Path) else [Path(path) for path in images]
        fingerprint = self._fingerprint() if cache else ""
        known = _read_cache(cache, fingerprint) if cache else {}
        keys = {path: _key(path) for path in paths}
        fresh = [path for path in paths if keys[path] not in known]
        known.update(self._embed(fresh, keys, progress))
        usable = [path for path in paths if keys[path] in known]
        if not usable:
            reason = f"; {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise ValueError(f"images: none of {len(paths)} files could be read{reason}")
        rows = torch.stack([known[keys[path]] for path in usable]).to(self.device)
        self.features = rows if self.features is None else torch.cat([self.features, rows])
        self.paths += usable
        if cache:
            _write_cache(cache, fingerprint, {keys[path]: known[keys[path]] for path in usable})
        return self

    def _embed(self, paths: Sequence[Path], keys: dict[Path, str], progress: bool) -> dict[str, Tensor]:
        from tqdm.auto import tqdm

        from ..data.images import load_image

        found: dict[str, Tensor] = {}
        with tqdm(total=len(paths), unit="img", desc="embedding", disable=not progress or not paths) as bar:
            for start in range(0, len(paths), self.batch_size):
                batch, names = [], []
                for path in paths[start : start + self.batch_size]:
                    try:
                        batch.append(self.preprocess(load_image(path)))
                        names.append(path)
                    except (OSError, ValueError) as error:
                        self.skipped.append((path, " ".join(str(error).split())))
                    bar.update()
                if batch:
                    features = self.model.encode_image(torch.stack(batch).to(self.device))
                    features = F.normalize(features.float(), dim=-1).cpu()
                    found.update({keys[path]: row for path, row in zip(names, features, strict=True)})
        return found

    def _fingerprint(self) -> str:
        """Of the weights and of how pictures are prepared: features are only comparable where both are equal."""
        digest = hashlib.sha256(repr(self.preprocess).encode())
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def search(self, query: str, top: int = 10) -> list[Match]:
        """The `top` best pictures for a text, best first; ties keep the order of `paths`.

        Raises:
            ValueError: nothing was added, the query is empty, or top is under 1.
        """
        if self.features is None:
            raise ValueError("Retriever.search: no pictures yet, call add first")
        if not query.strip():
            raise ValueError("Retriever.search: query is empty")
        if top < 1:
            raise ValueError(f"Retriever.search: top is {top}, must be at least 1")
        text = F.normalize(self.model.encode_text(self.tokenizer([query]).to(self.device)).float(), dim=-1)
        scores = (self.features @ text[0]).cpu()
        order = scores.argsort(descending=True, stable=True)[:top].tolist()
        return [Match(self.paths[i], scores[i].item()) for i in order]


def _key(path: Path) -> str:
    """Path, size and time of change: what tells a changed file."""
    try:
        status = path.stat()
    except OSError:
        return f"{path.absolute()}|missing"
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"


def _read_cache(path: str | Path, fingerprint: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("model") != fingerprint:
                return {}
            features = file.get_tensor("features")
        keys = json.loads(metadata["files"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"cache: {path} is no feature cache ({error}); remove it or name another file") from error
    if len(keys) != len(features):
        raise ValueError(f"cache: {path} is damaged; remove it")
    return dict(zip(keys, features, strict=True))


def _write_cache(path: str | Path, fingerprint: str, known: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({"features": torch.stack(list(known.values()))}, partial,
              {"model": fingerprint, "files": json.dumps(list(known))})
    os.replace(partial, path)
