"""Pictures for the runs on composed scenes, and threads of the trainings."""

import io
import json
import zipfile

import pytest
import torch
from PIL import Image, ImageDraw

KINDS = ("apple", "truck", "hat", "tree")
RGB = ((220, 20, 20), (20, 180, 40), (30, 40, 220), (240, 220, 10))


@pytest.fixture(scope="session")
def stamps(tmp_path_factory):
    """Five cut-outs of each of four kinds, in four colours."""
    path = tmp_path_factory.mktemp("stamps") / "stamps.zip"
    captions = [f"A {kind}." for _ in range(5) for kind in KINDS]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", json.dumps([{"i": i, "en": text} for i, text in enumerate(captions)]))
        for i in range(len(captions)):
            image, buffer = Image.new("RGBA", (60, 50), (0, 0, 0, 0)), io.BytesIO()
            ImageDraw.Draw(image).rectangle((2, 2, 20 + 9 * (i % 4), 45 - 9 * (i % 3)), fill=RGB[(i + i // 4) % 4])
            image.save(buffer, "WEBP", lossless=True)
            archive.writestr(f"img/{i}.webp", buffer.getvalue())
    return path


@pytest.fixture(autouse=True)
def _one_thread(request):
    """Two threads on a busy machine can take many times as long as one."""
    if request.node.get_closest_marker("training") is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
