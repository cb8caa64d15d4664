"""`vlmfast`, `info`, `retrieve` and `demo`."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import vlmfast
from vlmfast.cli import main


def test_help_is_quick_and_names_the_commands():
    code = "import sys; from vlmfast.cli import main\n" \
           "try: main(['--help'])\nexcept SystemExit: pass\n" \
           "heavy = {'torch', 'PIL', 'matplotlib', 'tokenizers', 'tqdm'} & set(sys.modules); assert not heavy, heavy"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in ("info", "demo", "train", "retrieve", "answer"):
        assert f"    {command} " in run.stdout


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"vlmfast {vlmfast.__version__}"


def test_info_tells_backends_and_why_one_is_missing(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["vlmfast"] == vlmfast.__version__ and facts["threads"] >= 1
    assert facts["backends"] == vlmfast.ops.backends()
    assert facts["build"]["isa"] in facts["backends"]["native"]
    for state in facts["backends"].values():
        kind, _, reason = state.partition(": ")
        assert kind.startswith(("available", "missing")) and reason
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert vlmfast.__version__ in text and facts["backends"]["native"] in text and facts["build"]["isa"] in text


def test_wrong_arguments_exit_2(capsys):
    for arguments in (["retrieve"], ["train"], ["nonsense"], [], ["retrieve", "a", "b", "--images", "c", "--top", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_retrieve_prints_ranked_files_and_a_sheet(run_folder, pairs_folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(pairs_folder, photos)
    (photos / "broken.jpg").write_bytes(b"no picture")
    sheet = tmp_path / "new" / "sheet.png"
    command = ["retrieve", str(run_folder), "--images", str(photos), "a red heart", "--top", "3", "--no-progress"]
    assert main([*command, "--out", str(sheet)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["1", "2", "3"]
    scores = [float(line.split()[1]) for line in lines[:3]]
    assert scores == sorted(scores, reverse=True)
    assert "40 pictures searched" in lines[3] and str(sheet) in lines[3]
    assert "1 files skipped" in printed.err and "broken.jpg" in printed.err
    assert Image.open(sheet).width > 300

    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [match["path"] for match in answer["matches"]] == [line.split(maxsplit=2)[2] for line in lines[:3]]
    assert answer["images"] == 40 and len(answer["skipped"]) == 1


@pytest.mark.parametrize("change, text", [
    ({"model": "nowhere"}, "nowhere: no such file or folder"), ({"images": "nowhere"}, "nowhere does not exist"),
    ({"images": "empty"}, "holds no image"), ({"out": "sheet.pdf"}, "must end in .png"),
    ({"query": " "}, "query is empty"), ({"model": "empty"}, "no checkpoint"),
    ({"device": "tpu9"}, "device is 'tpu9'"), ({"device": "cuda:99"}, "device is 'cuda:99', PyTorch finds"),
])
def test_retrieve_errors_are_one_line(run_folder, pairs_folder, tmp_path, capsys, monkeypatch, change, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    values = {"model": str(run_folder), "query": "a heart", "images": str(pairs_folder), "out": "sheet.png",
              "device": "cpu", **change}
    command = ["retrieve", values["model"], values["query"], "--images", values["images"], "--out", values["out"]]
    assert main([*command, "--device", values["device"], "--no-progress"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vlmfast retrieve: error: ") and text in lines[0]


def test_retrieve_needs_a_vocabulary(run_folder, pairs_folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(run_folder / name, bare)
    command = ["retrieve", str(bare), "a cat", "--images", str(pairs_folder), "--no-progress"]
    assert main(command) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(run_folder)]) == 0


def test_demo_runs_and_writes_its_report(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seconds", "1", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    for text in ("native", "random tenth", "held-out concepts", "new skin tone of a known figure", "plain PyTorch",
                 "0.003 0.014 0.027"):
        assert text in printed, text
    report = (out / "report.md").read_text()
    for text in ("--seconds 1", "random tenth", "retrieval.png", "loss.png", "vlmfast info_nce"):
        assert text in report, text
    assert Image.open(out / "retrieval.png").width > 600
    model = vlmfast.load(out / "model")
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6
    assert model.tokenizer is not None


def test_demo_splits_do_not_leak():
    from vlmfast.cli.demo_model import CONCEPTS, RANDOM, Experiment

    experiment = Experiment.prepare(0)
    parts = experiment.train_pairs, experiment.random, experiment.concepts
    codes = [{record["u"] for record in pairs.records} for pairs in parts]
    assert len(codes[1]) == RANDOM and len(codes[2]) == CONCEPTS
    assert sum(map(len, codes)) == len(set.union(*codes)) == 3786
    bases = [{record["base"] for record in pairs.records} for pairs in parts]
    assert not bases[2] & (bases[0] | bases[1])
    assert len(experiment.loader.images) == len(codes[0])


def test_demo_rejects_bad_numbers(capsys, tmp_path):
    assert main(["demo", "--seconds", "-1", "--out", str(tmp_path)]) == 2
    assert "--seconds is -1.0, must be positive" in capsys.readouterr().err


def test_demo_generate_trains_draws_and_writes_its_report(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "generate", "--out", str(out), "--seconds", "1", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    report = (out / "report.md").read_text()
    for text in ("random tenth", "held-out concepts", "mean colour dB", "codes used", "another's caption"):
        assert text in printed and text in report, text
    assert Image.open(out / "reconstruction.png").width > 600 and Image.open(out / "drawn.png").height > 600
    sheet = tmp_path / "heart.png"
    draw = ["generate", str(out / "model"), "red heart", "--images", "2", "--out", str(sheet), "--no-progress"]
    assert main(draw) == 0
    assert sheet.exists()


def test_demo_generate_splits_do_not_leak():
    from vlmfast.cli.demo_pictures import CONCEPTS, RANDOM, Drawing

    drawing = Drawing.prepare(0)
    parts = drawing.train, *drawing.held_out
    assert [len(part) for part in parts] == [3786 - RANDOM - CONCEPTS, RANDOM, CONCEPTS]
    pictures = [{picture.numpy().tobytes() for picture in part.images} for part in parts]
    assert not pictures[0] & pictures[2]
