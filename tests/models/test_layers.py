"""Building blocks against torch's own modules."""

import pytest
import torch
from torch import nn

from vlmfast.layers import AttentionPool2d, Bottleneck, LayerNorm, SelfAttention, TransformerBlock


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_equals_torch_multihead_attention(causal):
    ours, theirs = SelfAttention(32, 4).double(), nn.MultiheadAttention(32, 4, batch_first=True).double()
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    mask = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1) if causal else None
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x, causal), expected)


def test_block_is_pre_norm_with_both_residuals():
    block = TransformerBlock(16, 2, 40, quick_gelu=True).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    middle = x + block.attn(block.ln_1(x))
    hidden = block.mlp.c_fc(block.ln_2(middle))
    torch.testing.assert_close(block(x), middle + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden)))
    exact = TransformerBlock(16, 2, 40, quick_gelu=False).double()
    exact.load_state_dict(block.state_dict())
    assert not torch.allclose(exact(x), block(x), atol=1e-6)


def test_layer_norm_takes_input_narrower_than_its_weights():
    norm = LayerNorm(64)
    x = (torch.randn(3, 64) * 1000).half()
    assert torch.equal(norm(x), nn.functional.layer_norm(x.float(), (64,)).half())
    assert norm(x.double()).dtype == torch.float64


def test_attention_pool_equals_multihead_attention_with_a_mean_query():
    pool, theirs = AttentionPool2d(3, 16, 2, 5).double(), nn.MultiheadAttention(16, 2, batch_first=True).double()
    with torch.no_grad():
        for i, part in enumerate((pool.q_proj, pool.k_proj, pool.v_proj)):
            theirs.in_proj_weight[16 * i : 16 * i + 16] = part.weight
            theirs.in_proj_bias[16 * i : 16 * i + 16] = part.bias
        theirs.out_proj.weight.copy_(torch.eye(16))
        theirs.out_proj.bias.zero_()
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64)
    cells = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + pool.positional_embedding
    expected = pool.c_proj(theirs(tokens[:, :1], tokens, tokens, need_weights=False)[0][:, 0])
    torch.testing.assert_close(pool(x), expected)


def test_bottleneck_strides_only_by_pooling():
    block = Bottleneck(8, 4, stride=2)
    assert block(torch.randn(1, 8, 6, 6)).shape == (1, 16, 3, 3)
    assert {module.stride for module in block.modules() if isinstance(module, nn.Conv2d)} == {(1, 1)}
    assert list(block.state_dict())[-6:-4] == ["downsample.0.weight", "downsample.1.weight"]


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 30 is not a multiple of heads 4"):
        SelfAttention(30, 4)
    with pytest.raises(ValueError, match="width 30 is not a multiple of heads 4"):
        AttentionPool2d(2, 30, 4, 8)
