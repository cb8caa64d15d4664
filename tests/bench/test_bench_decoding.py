"""The decoding benchmark: all peers compute the truth on small models, and a wrong one is not timed."""

import pytest
import torch

from bench import decoding, harness
from bench.harness import Workload

TINY = {
    "dalle_step": decoding.Case("dalle-tiny", (0, 5, 18), 6, dict(
        dim=32, depth=5, heads=2, dim_head=16, num_text_tokens=20, text_seq_len=6, num_image_tokens=30,
        image_grid=(5, 4), conv_kernel=3)),
    "dalle_mini_step": decoding.Case("dalle-mini-tiny", (0, 3, 7), 6, dict(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_vocab_size=30, max_text_length=6, image_grid=3,
        image_vocab_size=25, num_image_codes=20, decoder_start_token_id=20)),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(decoding, "CASES", TINY)
    yield
    decoding.model.cache_clear()
    decoding._truth.cache_clear()


def test_cases_are_those_of_the_benchmark(monkeypatch):
    assert set(TINY) == set(decoding.OPS) == set(decoding.RIVALS)
    monkeypatch.undo()
    assert set(decoding.CASES) == set(decoding.OPS)
    config = decoding.model(decoding.Case("dalle-small", (), 0, {"depth": 1})).config
    assert config.prefix_len + config.image_seq_len == 1280


@pytest.mark.parametrize("op", decoding.OPS)
def test_every_peer_computes_the_truth_again_and_again(op):
    workload = Workload(op, (2,))
    tensors = decoding.inputs(workload)
    truth = decoding.truth(workload, tensors)
    peers = decoding.peers(workload)
    assert {peer.name for peer in peers} == {decoding.OURS, *decoding.RIVALS[op]}
    for peer in peers:
        step = harness.Step(peer.make(workload), tensors)
        for _ in range(2):
            found = harness.errors(step(), truth)
            assert max(found.values()) < 5e-6, (peer.name, found)


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch):
    workload = Workload("dalle_step", (1,))
    monkeypatch.setattr(decoding, "_eager", lambda query, key, value, mask: value[:, :, -1:].expand_as(query))
    run = decoding._checked(decoding._dalle_recomputed, workload)
    with pytest.raises(ValueError, match="logits_0 differs from float64"):
        run(*decoding.inputs(workload))


def test_targets_name_the_rivals():
    def row(op, peer, seconds):
        found = harness.Row("time", "decoding", op, peer, peer == decoding.OURS, "cpu", "float32", [4], 1)
        found.min_s = seconds
        return found

    rows = [row("dalle_step", decoding.OURS, 1.0), row("dalle_step", decoding.EAGER, 1.6),
            row("dalle_step", decoding.RECOMPUTED, 90.0), row("dalle_mini_step", decoding.OURS, 1.0),
            row("dalle_mini_step", decoding.MIN_DALLE, 1.3)]
    found = {target.figure: target for target in decoding.targets(rows)}
    assert found[f"against {decoding.EAGER}, dalle_step 4, 1 thread"].met is True
    assert found[f"against {decoding.RECOMPUTED}, dalle_step 4, 1 thread"].met is None
    assert found[f"against {decoding.MIN_DALLE}, dalle_mini_step 4, 1 thread"].met is False
    assert torch.tensor([target.value for target in found.values()]).max() == 90
