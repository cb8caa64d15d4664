"""`vlmfast train clip`, as a user runs it."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from cli_helpers import SMALL, write_pairs

import vlmfast
from vlmfast.cli import main
from vlmfast.training.log import read_log


def train(data, out, *more):
    return main(["train", "clip", "--data", str(data), "--out", str(out), *SMALL, *more])


def resume(out):
    return main(["train", "clip", "--out", str(out), "--resume", "--no-progress", "--device", "cpu"])


def test_writes_a_run_that_loads_again(run_folder):
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt",
             "training_state.pt", "train.json", "log.jsonl", "loss.png"}
    assert names <= {path.name for path in run_folder.iterdir()}
    model = vlmfast.load(run_folder)
    assert model.tokenizer.vocab_size == model.config.vocab_size
    state = torch.load(run_folder / "training_state.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    records = read_log(run_folder / "log.jsonl")
    checks = [record["validation"] for record in records if "validation" in record]
    assert len(checks) == 2 and all(0 <= check["image_to_text_r10"] <= 1 for check in checks)
    settings = json.loads((run_folder / "train.json").read_text())
    assert settings["batch_size"] == 12 and settings["epochs"] == 2


def test_bad_pictures_are_counted_and_reported(tmp_path, capsys):
    folder = tmp_path / "pairs"
    write_pairs(folder, 30)
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "04.png").unlink()
    whole = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(whole[: len(whole) // 2])
    assert train(folder, tmp_path / "run", "--epochs", "1", "--val-fraction", "0") == 0
    out = capsys.readouterr().out
    assert "28 pairs used, 2 skipped" in out and "1 missing image" in out and "04.png" in out
    assert "left out while reading" in out and "05.png" in out


def test_resume_gives_the_same_weights(pairs_folder, run_folder, tmp_path, monkeypatch):
    from vlmfast.training import Trainer

    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: run(self, stop_after=3))
    assert train(pairs_folder, tmp_path / "run") == 130
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0
    ours, theirs = vlmfast.load(tmp_path / "run"), vlmfast.load(run_folder)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_ctrl_c_saves_and_says_how_to_resume(pairs_folder, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vlmfast.cli", "train", "clip", "--data", str(pairs_folder), "--out", str(out),
               *SMALL, "--epochs", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, printed + errors
    assert f"vlmfast train clip --out {out} --resume" in printed
    assert "Traceback" not in errors
    state = torch.load(out / "training_state.pt", weights_only=True)
    assert state["step"] == max(record["step"] for record in read_log(out / "log.jsonl"))


def test_starts_from_a_checkpoint(run_folder, pairs_folder, tmp_path):
    assert train(pairs_folder, tmp_path / "run", "--model", str(run_folder), "--epochs", "1") == 0
    fine, start = vlmfast.load(tmp_path / "run"), vlmfast.load(run_folder)
    assert fine.tokenizer == start.tokenizer and fine.config == start.config


def test_siglip_learns_its_bias(pairs_folder, tmp_path):
    assert train(pairs_folder, tmp_path / "run", "--objective", "siglip", "--epochs", "1", "--weight-decay", "0") == 0
    assert vlmfast.load(tmp_path / "run").logit_bias.item() != -10.0


def shard(folder, path) -> None:
    with open(folder / "captions.csv", newline="", encoding="utf-8") as file, tarfile.open(path, "w") as tar:
        for row in list(csv.reader(file))[1:]:
            text = folder / (row[0][:-4] + ".txt")
            text.write_text(row[1], encoding="utf-8")
            tar.add(folder / row[0], row[0])
            tar.add(text, text.name)


def test_tar_shards_resume_bit_for_bit(tmp_path, capsys, monkeypatch):
    write_pairs(tmp_path / "pairs", 26)
    shard(tmp_path / "pairs", tmp_path / "a.tar")
    options = ["--val", str(tmp_path / "pairs")]
    assert train(tmp_path / "a.tar", tmp_path / "whole", *options) == 0
    assert "26 pairs for training, 26 for validation" in capsys.readouterr().out
    from vlmfast.training import Trainer

    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: run(self, stop_after=3))
    assert train(tmp_path / "a.tar", tmp_path / "parts", *options) == 130
    monkeypatch.undo()
    assert resume(tmp_path / "parts") == 0
    ours, theirs = vlmfast.load(tmp_path / "parts"), vlmfast.load(tmp_path / "whole")
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_torchrun_trains_on_two_processes(pairs_folder, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", str(port), "-m", "vlmfast.cli", "train", "clip", "--data", str(pairs_folder),
               "--out", str(tmp_path / "run"), *SMALL]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("steps done") == 1, "only the first process talks"
    assert "24 pairs, on 2 x cpu" in run.stdout
    steps = [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl") if "loss" in record]
    assert steps == list(range(1, len(steps) + 1)) and steps
    vlmfast.load(tmp_path / "run")


@pytest.fixture
def error(capsys):
    """Runs a command that must fail as a user's error; returns the one line it prints."""

    def run(*command):
        assert main([str(part) for part in command]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("vlmfast train: error: ")
        return lines[0]

    return run


def test_user_errors_are_one_line(error, pairs_folder, run_folder, tmp_path):
    clip = ["train", "clip", "--out", tmp_path / "run", "--no-progress"]
    assert "nowhere does not exist" in error(*clip, "--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in error(*clip, "--data", tmp_path / "empty")
    assert "--data is missing" in error(*clip)
    assert "holds no train.json" in error(*clip, "--resume")
    line = error(*clip, "--data", pairs_folder, "--model", "clip-tinny")
    assert "unknown model 'clip-tinny'; did you mean clip-tiny" in line
    assert "lr is -1.0, must be positive" in error(*clip, "--data", pairs_folder, "--lr", "-1")
    assert "--model: no/such/run does not exist" in error(*clip, "--data", pairs_folder, "--model", "no/such/run")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint at all")
    assert "bad.pt" in error(*clip, "--data", pairs_folder, "--model", tmp_path / "bad.pt")
    assert "nothing.gz" in error(*clip, "--data", pairs_folder, "--tokenizer", tmp_path / "nothing.gz")
    assert "already holds a run" in error("train", "clip", "--data", pairs_folder, "--out", run_folder)
    assert "--lr is 0.5, the run in" in error("train", "clip", "--out", run_folder, "--resume", "--lr", "0.5")
    assert not (tmp_path / "run").exists(), "nothing is written before everything fits"


def test_damaged_state_is_one_line(error, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "training_state.pt").write_bytes(b"PK\x03\x04 cut off")
    assert "training_state.pt cannot be read" in error("train", "clip", "--out", tmp_path / "run", "--resume")
    (tmp_path / "run" / "train.json").write_text("{")
    assert "train.json is damaged" in error("train", "clip", "--out", tmp_path / "run", "--resume")


def test_diverged_training_is_one_line(error, pairs_folder, tmp_path, monkeypatch):
    from vlmfast.models.clip import CLIP

    forward = CLIP.forward

    def nan(self, *inputs):
        out = forward(self, *inputs)
        return out._replace(image_features=out.image_features * float("nan"))

    monkeypatch.setattr(CLIP, "forward", nan)
    line = error("train", "clip", "--data", pairs_folder, "--out", tmp_path / "run", *SMALL)
    assert "the loss is nan" in line and "nothing was saved yet" in line


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["train", "clip", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"), "--debug"])
