"""The loop: resume, log, interruption, bad losses, settings."""

import json
import os
import signal

import pytest
import torch
from training_helpers import PAIRS, assert_equal_bits, tiny_loader, tiny_model, weights

from vlmfast.training import NonFiniteLoss, TrainConfig, Trainer, train
from vlmfast.training.log import read_log
from vlmfast.training.state import read_state

CONFIG = TrainConfig(epochs=2, lr=1e-2, accumulate=2, ema=0.9, label_smoothing=0.1)


def run(out, *, resume=False, stop_after=None, config=CONFIG, resnet=False, dropout=0.2, **options):
    model = tiny_model(resnet=resnet, dropout=0.0 if resnet else dropout)
    options.setdefault("save_model", lambda model, folder: None)
    result = train(model, tiny_loader(), config, out=out, resume=resume, stop_after=stop_after, progress=False,
                   **options)
    return model, result


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("resnet", [False, True], ids=["vit", "resnet"])
def test_resumes_bit_for_bit(tmp_path, stop, resnet):
    whole, result = run(tmp_path / "whole", resnet=resnet)
    assert (result.step, result.total, result.interrupted) == (6, 6, False)
    _, first = run(tmp_path / "parts", stop_after=stop, resnet=resnet)
    assert (first.step, first.interrupted) == (stop, True)
    resumed, second = run(tmp_path / "parts", resume=True, resnet=resnet)
    assert second.step == 6 and not second.interrupted
    assert_equal_bits(weights(resumed), weights(whole))
    states = [read_state(tmp_path / name) for name in ("whole", "parts")]
    assert_equal_bits(states[0]["average"]["values"], states[1]["average"]["values"])
    for mine, theirs in zip(states[0]["optimizer"]["state"].values(), states[1]["optimizer"]["state"].values(),
                            strict=True):
        assert_equal_bits(mine, theirs)
    losses = [[r["loss"] for r in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_validation_does_not_disturb_training(tmp_path):
    plain, _ = run(None)
    validated, result = run(None, validate=lambda model: {"noise": torch.rand(()).item()})
    assert "noise" in result.validation
    assert_equal_bits(weights(validated), weights(plain))


def test_log_has_the_promised_fields(tmp_path):
    run(tmp_path, validate=lambda model: {"image_to_text_r1": 0.5})
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in steps] == [1, 1, 1, 2, 2, 2]
    fields = {"step", "epoch", "loss", "lr", "logit_scale", "accuracy", "images_per_second", "seconds"}
    for record in steps:
        assert record.keys() == fields
        assert all(isinstance(record[name], (int, float)) for name in fields)
        assert 0 <= record["accuracy"] <= 1 and record["images_per_second"] > 0
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    checks = [record for record in records if "validation" in record]
    assert [record["step"] for record in checks] == [3, 6]
    assert all(record["validation"] == {"image_to_text_r1": 0.5} for record in checks)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_learns_a_small_set():
    model = tiny_model()
    config = TrainConfig(epochs=60, lr=1e-2, weight_decay=0.0)
    result = train(model, tiny_loader(shift=0), config, progress=False)
    first, last = result.records[0], result.records[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] > 0.8


def test_ctrl_c_saves_and_can_be_resumed(tmp_path):
    whole, _ = run(tmp_path / "whole")
    config, parts = CONFIG, tmp_path / "parts"

    class Interrupting:
        """A loader during whose second batch someone presses Ctrl-C."""

        def __init__(self, loader):
            self.loader = loader
            self.batch_size, self.seed, self.set_epoch = loader.batch_size, loader.seed, loader.set_epoch

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for number, batch in enumerate(self.loader):
                if number == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    before = signal.getsignal(signal.SIGINT)
    result = train(tiny_model(dropout=0.2), Interrupting(tiny_loader()), config, out=parts, progress=False,
                   save_model=lambda model, folder: None)
    assert result.interrupted and result.step == 2
    assert signal.getsignal(signal.SIGINT) is before
    resumed, _ = run(parts, resume=True)
    assert_equal_bits(weights(resumed), weights(whole))


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    run(tmp_path, stop_after=3)
    kept = (tmp_path / "training_state.pt").read_bytes()
    model = tiny_model(dropout=0.2)
    loader = tiny_loader()
    trainer = Trainer(model, loader, CONFIG, out=tmp_path, resume=True, progress=False,
                      save_model=lambda model, folder: None)
    loader.mean = loader.mean * float("nan")
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 4: the loss is nan.*last checkpoint .* untouched"):
        trainer.run()
    assert (tmp_path / "training_state.pt").read_bytes() == kept
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, stop_after=3)
    kept = (tmp_path / "training_state.pt").read_bytes()

    def crash(state, file):
        file.write(b"half a checkpoint")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, resume=True)
    assert (tmp_path / "training_state.pt").read_bytes() == kept
    monkeypatch.undo()
    assert run(tmp_path, resume=True)[1].step == 6


def test_resume_rejects_what_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no training_state.pt"):
        run(tmp_path, resume=True)
    run(tmp_path, stop_after=2)
    with pytest.raises(ValueError, match="resume: lr is 0.5, the run in .* has 0.01"):
        run(tmp_path, resume=True, config=TrainConfig(**{**CONFIG.to_dict(), "lr": 0.5}))
    with pytest.raises(ValueError, match="batch size is 4 now, it was 8"):
        train(tiny_model(), tiny_loader(4), CONFIG, out=tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="of another model"):
        train(tiny_model(resnet=True), tiny_loader(), CONFIG, out=tmp_path, resume=True, progress=False)
    (tmp_path / "training_state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path, resume=True)


def test_resume_never_executes_a_pickle(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"step": Evil()}, tmp_path / "training_state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()


def test_logit_scale_stays_within_1_and_100():
    for start in (-5.0, 9.0):
        model = tiny_model(init_logit_scale=start)
        train(model, tiny_loader(), TrainConfig(epochs=1), progress=False)
        assert 1.0 <= model.logit_scale.exp().item() <= 100.001


def test_bf16_autocast_trains():
    model = tiny_model()
    result = train(model, tiny_loader(), TrainConfig(epochs=30, lr=1e-2, amp="bf16", accumulate=2), progress=False)
    assert result.records[-1]["loss"] < 0.8 * result.records[0]["loss"]
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("field, value, text", [
    ("lr", 0.0, "lr is 0.0, must be positive"), ("epochs", 0, "epochs is 0"), ("amp", "fp8", "amp is 'fp8'"),
    ("warmup", 1.0, "warmup is 1.0"), ("objective", "triplet", "objective is 'triplet'"),
    ("accumulate", 0, "accumulate is 0"),
])
def test_config_names_the_bad_field(field, value, text):
    with pytest.raises(ValueError, match=f"TrainConfig: {text}"):
        TrainConfig(**{field: value})


def test_fp16_needs_cuda_and_siglip_needs_a_bias():
    with pytest.raises(ValueError, match="amp is 'fp16' on cpu"):
        Trainer(tiny_model(), tiny_loader(), TrainConfig(amp="fp16"), device="cpu")
    with pytest.raises(ValueError, match="no logit_bias"):
        Trainer(tiny_model(), tiny_loader(), TrainConfig(objective="siglip"))


def test_pairs_are_seen_once_an_epoch():
    loader = tiny_loader()
    loader.set_epoch(0)
    first = torch.cat([tokens for _, tokens in loader])
    loader.set_epoch(1)
    second = torch.cat([tokens for _, tokens in loader])
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == PAIRS
    assert not torch.equal(first, second)
