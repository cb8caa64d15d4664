"""Codebook layers: public keys, the moving average's arithmetic, and modes in and out of training."""

import pytest
import torch

from vlmfast.layers import GumbelQuantizer, VectorQuantizer
from vlmfast.ops import gumbel_quantize, vector_quantize


def test_keys_are_those_of_taming():
    assert set(VectorQuantizer(5, 3).state_dict()) == {"embedding.weight"}
    assert set(VectorQuantizer(5, 3, decay=0.9).state_dict()) == {
        "embedding.weight", "embedding.cluster_size", "embedding.embed_avg"}
    gumbel = GumbelQuantizer(6, 5, 3).state_dict()
    assert {key: tuple(value.shape) for key, value in gumbel.items()} == {
        "proj.weight": (5, 6, 1, 1), "proj.bias": (5,), "embed.weight": (5, 3)}


@pytest.mark.parametrize("legacy", [False, True])
def test_learned_codes_get_the_ops_gradient(legacy):
    layer, x = VectorQuantizer(9, 4, beta=0.4, legacy=legacy), torch.randn(2, 4, 3, 3)
    found, plain = layer(x), vector_quantize(x, layer.embedding.weight, beta=0.4, legacy=legacy)
    assert torch.equal(found.z, plain.z) and found.loss == plain.loss
    found.loss.backward()
    assert layer.embedding.weight.grad.any()
    assert torch.equal(layer.decode(found.indices), found.z)


def test_moving_codes_follow_the_mean_of_their_vectors():
    layer = VectorQuantizer(3, 2, decay=0.8, eps=1e-3, layout="nlc")
    layer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [5.0, 5.0], [50.0, 50.0]]))
    layer.embedding.embed_avg.copy_(layer.embedding.weight)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [6.0, 6.0]]], requires_grad=True)
    found = layer(x)
    assert found.indices.tolist() == [[0, 0, 1]]
    assert torch.equal(found.z[0, 2], torch.tensor([5.0, 5.0]))  # the codes as they were
    found.loss.backward()
    assert torch.allclose(x.grad, 0.25 * 2 / 6 * (x.detach() - torch.tensor([[[0.0, 0], [0, 0], [5, 5]]])))
    # by hand: counts 1 -> .8 + .2 n, sums w -> .8 w + .2 sum
    counts = torch.tensor([1.2, 1.0, 0.8])
    sums = torch.tensor([[0.2, 0.2], [5.2, 5.2], [40.0, 40.0]])
    smoothed = (counts + 1e-3) / (3.0 + 3e-3) * 3.0
    assert torch.allclose(layer.embedding.cluster_size, counts)
    assert torch.allclose(layer.embedding.weight, sums / smoothed[:, None])


def test_moving_codes_rest_outside_training():
    layer, x = VectorQuantizer(8, 4, decay=0.9).eval(), torch.randn(1, 4, 5, 5)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(x)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    layer.train()(x)
    assert not torch.equal(before["embedding.weight"], layer.embedding.weight)


def test_unused_moving_codes_stay_where_they_are():
    layer = VectorQuantizer(2, 3, decay=0.5)
    layer.embedding.weight.copy_(torch.tensor([[0.0, 0, 0], [9, 9, 9]]))
    layer.embedding.embed_avg.copy_(layer.embedding.weight)
    for _ in range(5):
        layer(torch.randn(1, 3, 10, 10))
    assert (layer.embedding.weight[1] - 9).abs().max() < 0.05 and layer.embedding.weight[0].abs().max() < 1


def test_moving_codes_reduce_the_error():
    torch.manual_seed(1)
    layer, x = VectorQuantizer(16, 4, decay=0.5), torch.randn(4, 4, 8, 8)
    errors = [(layer(x).z - x).square().mean().item() for _ in range(20)]
    assert errors[-1] < 0.6 * errors[0]


def test_gumbel_quantizer_is_its_parts():
    layer, x = GumbelQuantizer(6, 12, 5, tau=0.7, kl_weight=0.01, straight_through=False), torch.randn(2, 6, 4, 4)
    plain = gumbel_quantize(layer.proj(x), layer.embed.weight, tau=0.7, kl_weight=0.01, seed=3)
    found = layer(x, seed=3)
    assert torch.equal(found.z, plain.z) and torch.equal(found.kl, plain.kl)
    hard = layer.eval()(x, seed=3)
    assert torch.equal(hard.z, layer.decode(hard.indices)) and torch.equal(hard.indices, found.indices)
    assert not torch.equal(layer.train()(x, tau=2.0, seed=3).z, found.z)
    assert torch.equal(layer.encode(x), layer.proj(x).argmax(1))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="decay is 1.0, it must be None or lie in"):
        VectorQuantizer(5, 3, decay=1.0)
    with pytest.raises(ValueError, match="legacy is True"):
        VectorQuantizer(5, 3, decay=0.9, legacy=True)
    with pytest.raises(ValueError, match="indices reach from 0 to 5, they must lie between 0 and 4"):
        VectorQuantizer(5, 3).decode(torch.tensor([[[0, 5]]]))


def gradients(z, loss, upstream, leaves):
    return torch.autograd.grad((z * upstream).sum() + loss, leaves)


@pytest.mark.parametrize("case, legacy", [("vq", True), ("vq2_legacy", True), ("vq2_fixed", False)])
def test_nearest_codes_match_taming(golden, golden_close, case, legacy):
    weights, inputs, outputs, meta = golden(f"generative/taming_quantize__{case}")
    args = meta["config"]["args"]
    layer = VectorQuantizer(args["n_e"], args["e_dim"], args["beta"], legacy)
    layer.load_state_dict(weights)
    x = inputs["z"].requires_grad_()
    found = layer(x)
    assert torch.equal(found.indices.flatten(), outputs["indices"].flatten())
    golden_close(found.z, outputs["z_q"])
    golden_close(layer.decode(found.indices), outputs["codebook_entry"])
    golden_close(found.loss, outputs["loss"])
    d_x, d_codebook = gradients(found.z, found.loss, inputs["grad_z_q"], (x, layer.embedding.weight))
    golden_close(d_x, outputs["grad.z"])
    golden_close(d_codebook, outputs["grad.codebook"])


@pytest.mark.parametrize("case", ["gumbel_soft", "gumbel_hard"])
def test_gumbel_codes_match_taming(golden, golden_close, case):
    weights, inputs, outputs, meta = golden(f"generative/taming_quantize__{case}")
    args = meta["config"]["args"]
    layer = GumbelQuantizer(args["num_hiddens"], args["n_embed"], args["embedding_dim"], meta["config"]["temp"],
                            straight_through=args["straight_through"])
    layer.load_state_dict(weights)
    x = inputs["z"].requires_grad_()
    golden_close(layer.proj(x), outputs["logits"])
    found = layer(x, noise=inputs["gumbel"])
    assert torch.equal(found.indices, outputs["indices"])
    golden_close(found.z, outputs["z_q"])
    golden_close(found.kl, outputs["loss"])
    leaves = x, layer.embed.weight, layer.proj.weight
    found = gradients(found.z, found.kl, inputs["grad_z_q"], leaves)
    golden_close(found[0], outputs["grad.z"])
    golden_close(found[1], outputs["grad.codebook"])
    golden_close(found[2], outputs["grad.proj.weight"], 5e-5)
