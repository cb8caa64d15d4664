"""Pre-LN transformer with packed query/key/value weights, as in CLIP (arXiv:2103.00020) and GPT-2.

Sizes: B batch, T tokens, D width, H heads. Submodules carry the names of the public CLIP checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 (float64 stays float64); the result has the dtype of the input.

    Half-precision checkpoints keep these weights in float32, so input and weight may differ in dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of all OpenAI CLIP weights (arXiv:1606.08415, sec. 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head self-attention; rows of `in_proj_weight` [3D, D] are query, key, value.

    Raises:
        ValueError: width is not a multiple of heads.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"SelfAttention: width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.out_proj.weight, std=width**-0.5)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # [B, T, D] -> [B, T, D]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class TransformerBlock(nn.Module):
    """x + attention(ln_1 x), then x + mlp(ln_2 x).

    Args:
        width, heads: D and H; D must be a multiple of H.
        mlp_width: hidden units of the MLP.
        quick_gelu: QuickGELU instead of the exact GELU.
        eps: of both LayerNorms.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, quick_gelu: bool = True, eps: float = 1e-5):
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width, quick_gelu)
        self.ln_2 = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # [B, T, D] -> [B, T, D]
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of `layers` blocks. `causal`: token t sees tokens 0..t only.

    Initialisation of CLIP's public code: attention in N(0, D^-1/2), both residual outputs
    N(0, D^-1/2 (2 layers)^-1/2), MLP input N(0, (2D)^-1/2).
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        quick_gelu: bool = True,
        eps: float = 1e-5,
        causal: bool = False,
    ):
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(
            TransformerBlock(width, heads, mlp_width, quick_gelu, eps) for _ in range(layers)
        )
        for block in self.resblocks:
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        for block in self.resblocks:
            x = block(x, self.causal)
        return x
