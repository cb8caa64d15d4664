"""Pretraining over the training loop: it learns, resumes bit for bit, and says what it cannot do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretraining_training_helpers import OBJECTIVES, WORDS, objective, tiny_uniter, toy_loader, toy_pairs
from pretraining_worker import plain_loss
from training_helpers import assert_equal_bits, weights

from vlmfast.data.region_text_batches import RegionTextEncoder
from vlmfast.training import TrainConfig
from vlmfast.training.log import read_log
from vlmfast.training.pretraining import ObjectiveTrainer, ValidationLosses

CONFIG = TrainConfig(epochs=2, lr=1e-3, weight_decay=0.01, accumulate=2, ema=0.5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return toy_pairs(tmp_path_factory.mktemp("regions"))


def train(pairs, out=None, *, names=OBJECTIVES, config=CONFIG, resume=False, stop_after=None, model=None, validate=None,
          name="toy", **options):
    model = tiny_uniter() if model is None else model
    loss = options.pop("loss", None) or objective(names, **options)
    trainer = ObjectiveTrainer(model, toy_loader(pairs, names=names), config, loss, name=name, out=out, resume=resume,
                               device="cpu", progress=False, validate=validate, save_model=lambda model, folder: None)
    return model, trainer.run(stop_after)


def mean(records, part, rows):
    return sum(record["parts"][part] for record in records[rows]) / len(records[rows])


def test_losses_of_masked_words_and_regions_fall(pairs):
    names = ("mlm", "mrfr", "mrc")
    config = TrainConfig(epochs=50, lr=1e-3, weight_decay=0.0)
    model = tiny_uniter(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
    _, result = train(pairs, names=names, config=config, model=model)
    assert list(result.records[0]["parts"]) == list(names)
    for part, factor in (("mlm", 0.5), ("mrfr", 0.8), ("mrc", 0.9)):
        first, last = mean(result.records, part, slice(0, 20)), mean(result.records, part, slice(-40, None))
        assert last < factor * first, (part, first, last)


@pytest.mark.parametrize("mix", ["sum", "sample"])
def test_resumes_bit_for_bit(pairs, tmp_path, mix):
    whole, result = train(pairs, tmp_path / "whole", mix=mix)
    assert (result.step, result.total) == (8, 8)
    _, first = train(pairs, tmp_path / "parts", stop_after=3, mix=mix)
    assert first.interrupted
    torch.manual_seed(99)
    resumed, second = train(pairs, tmp_path / "parts", resume=True, mix=mix)
    assert second.step == 8
    assert_equal_bits(weights(resumed), weights(whole))
    logs = [[record["parts"] for record in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 8


def test_a_run_goes_on_with_its_own_loss_only(pairs, tmp_path):
    train(pairs, tmp_path, stop_after=1)
    with pytest.raises(ValueError, match="loss is other now, it was toy"):
        train(pairs, tmp_path, resume=True, name="other")


def test_chunks_average_to_the_whole_batch(pairs):
    """With a loss that draws nothing and divides by examples."""
    found = []
    for chunks in (1, 2, 3):
        model = tiny_uniter(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        config = TrainConfig(steps=3, accumulate=chunks)
        trainer = ObjectiveTrainer(model, toy_loader(pairs), config, plain_loss, device="cpu", progress=False)
        trainer.run()
        found.append(weights(model))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_sampling_draws_one_objective_a_step_with_wra_beside_itm():
    drawn = objective(mix="sample", ratios={"itm": 2, "mlm": 2, "mrfr": 1}, seed=1)
    found = [drawn.names(step) for step in range(500)]
    assert set(found) == {("mlm",), ("itm", "wra"), ("mrfr",)}
    for names, share in ((("itm", "wra"), 0.4), (("mlm",), 0.4), (("mrfr",), 0.2)):
        assert abs(found.count(names) / 500 - share) < 0.1
    assert [drawn.names(step) for step in range(9)] == found[:9]
    assert objective().names(0) is None
    with pytest.raises(ValueError, match="ratios has 'wra', must be some of mlm, itm, mrfr"):
        objective(mix="sample", ratios={"wra": 1})
    with pytest.raises(ValueError, match="mix is 'all'"):
        objective(mix="all")


def test_validation_is_the_same_each_time_and_disturbs_nothing(pairs):
    encoder, lines = RegionTextEncoder("uniter", WORDS, 40, class_offset=1), []
    validate = ValidationLosses(pairs, encoder, objective(), 16, say=lines.append)
    model = tiny_uniter().eval()
    with torch.no_grad():
        first = validate(model)
        torch.manual_seed(5)
        assert validate(model) == first
    assert list(first) == ["loss", *OBJECTIVES]
    assert first["loss"] == pytest.approx(sum(first[name] for name in OBJECTIVES))
    assert lines[0].startswith("validation: mlm ") and lines[0].endswith("(40 pairs)")
    assert [len(batch) for batch in ValidationLosses(pairs, encoder, objective(), 13).batches] == [13, 13, 14]
    with pytest.raises(ValueError, match="there is one pair"):
        ValidationLosses(pairs.select([0]), encoder, objective(), 16)
    plain, _ = train(pairs)
    checked, result = train(pairs, validate=validate, loss=validate.objective)
    assert result.validation["mlm"] > 0
    assert_equal_bits(weights(checked), weights(plain))


def test_whole_words_and_bf16(pairs):
    config = TrainConfig(epochs=10, lr=3e-3, amp="bf16")
    model, result = train(pairs, names=("mlm_whole_word", "mrfr"), config=config)
    assert result.records[-1]["loss"] < 0.9 * result.records[0]["loss"]
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_objectives_that_model_or_data_cannot_serve_are_named():
    for names, message in ((["mrc_kl"], "objective 'mrc_kl' needs region_probs, which the region features do not"),
                           (["mrc"], "objective 'mrc' needs region_classes or region_probs"),
                           (["nsp"], "objective 'nsp' needs texts of two sentences"),
                           (["mrc_attributes"], "needs a head that this architecture does not have")):
        with pytest.raises(ValueError, match=message):
            objective(names).check(tiny_uniter())
    objective(["mrc"]).check(tiny_uniter(), ["region_classes"])
    with pytest.raises(ValueError, match="objective 'mrfr' needs 'mrfr', UNITER has 'mlm'"):
        objective(["mrfr"]).check(tiny_uniter(heads=("mlm",)))


def test_two_pairs_for_each_process_at_least(pairs):
    with pytest.raises(ValueError, match="1 pairs for 1 processes, must be two for each"):
        toy_loader(pairs.select([0]))


def test_two_processes_take_the_steps_of_one(tmp_path):
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), str(tests.parents[1])])}
    worker = [str(tests / "pretraining_worker.py"), str(tmp_path), str(tmp_path)]
    for command in ([sys.executable, *worker],
                    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *worker]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"rank{name}.pt", weights_only=True)
                            for name in ("0of1", "0of2", "1of2"))
    assert_equal_bits(first["model"], second["model"])
    for name, value in alone["model"].items():
        torch.testing.assert_close(first["model"][name], value, rtol=1e-6, atol=1e-8, msg=name)
    assert first["losses"] == pytest.approx(alone["losses"]) and not second["losses"]
