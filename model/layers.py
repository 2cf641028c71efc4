"""The layers of MicroDiT: attention, feed-forward, experts, embedders and the transformer block.

Shapes: B batch, T image tokens, L caption tokens, D width, E experts, k tokens per expert.
Module and parameter names are those of the released checkpoints (arXiv 2407.15811), so a state dict loads as it is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On a CPU plain matmul and softmax, which give the same numbers, are faster up to so many keys, however many queries:
# in bf16 twice to four times, forward and backward (256 queries, 32 keys: 12 against 40 ms; 256 keys: 139 against 84).
PLAIN_ATTENTION_KEYS = 128


class LayerNorm(nn.LayerNorm):
    """LayerNorm that also takes float32 tokens with a bfloat16 weight, as FSDP gathers it; torch on a CPU refuses."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.dtype == torch.float32 else self.weight.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, None, self.eps)


def layer_norm(dim: int, eps: float) -> nn.LayerNorm:
    """Make a LayerNorm with a weight and no bias, as everywhere in the network."""
    return LayerNorm(dim, eps=eps, bias=False)


def gelu_tanh() -> nn.GELU:
    """Make the activation of everything but the experts (exact GELU) and the dense feed-forward (SwiGLU)."""
    return nn.GELU(approximate="tanh")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale x (B, T, D) by 1 + scale, and shift it; shift and scale (B, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def softmax(scores: Tensor) -> Tensor:
    """Take the softmax over the last axis, in float32 at least."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float, key_mask: Tensor | None = None) -> Tensor:
    """Attend with q and k normalised over all heads jointly, before the split into heads.

    q (B, N, H), k and v (B, M, H) -> (B, N, H). key_mask: bool (B, M), True = attend; no row may be all False.
    """
    batch, queries, hidden = q.shape
    keys = k.shape[1]
    q = F.layer_norm(q, (hidden,), eps=eps).to(v.dtype)
    k = F.layer_norm(k, (hidden,), eps=eps).to(v.dtype)
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if q.device.type == "cpu" and keys <= PLAIN_ATTENTION_KEYS:
        scores = (q * (hidden // heads) ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = softmax(scores).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, queries, hidden)


def padded(y: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Unpack caption tokens (N, D), the real ones of `mask` (B, L) alone -> (B, L, D) with zeros between.

    positions: int64 (N,), their indices among the B * L. Without it y is (B, L, D), and is returned as it is.
    """
    if mask is None or positions is None:
        return y
    return y.new_zeros(mask.numel(), y.shape[-1]).index_copy(0, positions, y).view(*mask.shape, -1)


def modulation(cond_dim: int, out_dim: int) -> nn.Sequential:
    """Make the adaLN layers: conditioning (B, cond_dim) -> shifts, scales and gates (B, out_dim)."""
    return nn.Sequential(gelu_tanh(), nn.Linear(cond_dim, out_dim))


class SelfAttention(nn.Module):
    """Self-attention of width `hidden` (a multiple of the head size) on tokens (B, T, dim) -> (B, T, dim).

    Packed tokens (N, dim) with their positions (see `padded`) stay packed.
    """

    def __init__(self, dim: int, hidden: int, heads: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.qkv = nn.Linear(dim, 3 * hidden, bias=bias)
        self.proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        q, k, v = padded(self.qkv(x), key_mask, positions).chunk(3, dim=-1)
        out = attention(q, k, v, self.heads, self.eps, key_mask)
        return self.proj(out if positions is None else out.flatten(0, 1).index_select(0, positions))

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)


class CrossAttention(nn.Module):
    """Image tokens (B, T, D) attend to caption tokens (B, L, D), or packed (see `padded`), at full width."""

    def __init__(self, dim: int, heads: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.q_linear = nn.Linear(dim, dim, bias=bias)
        self.kv_linear = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, y: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        k, v = padded(self.kv_linear(y), key_mask, positions).chunk(2, dim=-1)
        return self.proj(attention(self.q_linear(x), k, v, self.heads, self.eps, key_mask))

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.q_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.kv_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class FeedForward(nn.Module):
    """Dense SwiGLU feed-forward, (B, T, dim) -> (B, T, dim). Its width is 2/3 of `hidden`, up to `multiple_of`."""

    def __init__(self, dim: int, hidden: int, multiple_of: int, bias: bool) -> None:
        super().__init__()
        hidden = _round_up(int(2 * hidden / 3), multiple_of)
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        nn.init.trunc_normal_(self.w2.weight, std=out_std)
        nn.init.trunc_normal_(self.w3.weight, std=out_std)


class Experts(nn.Module):
    """Expert-choice mixture of experts (arXiv 2202.09368): each expert takes its k best tokens of each sample.

    k = int(capacity * T / E), at most T. Softmax over experts, then top-k over tokens; gates are not normalised, and
    a token that no expert takes gets zero. Tokens are gathered, pass two batched matmuls and are added back.
    """

    def __init__(self, dim: int, hidden: int, multiple_of: int, num_experts: int, capacity: float) -> None:
        super().__init__()
        self.num_experts, self.capacity = num_experts, capacity
        hidden = _round_up(hidden, multiple_of)
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def taken(self, tokens: int) -> int:
        """Count the tokens that each expert takes of a sample (k); 0 where there are too few."""
        return min(int(self.capacity * tokens / self.num_experts), tokens)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        k = self.taken(tokens)
        probs = softmax(self.gate(x))
        weight, token = probs.transpose(1, 2).topk(k, dim=-1)  # (B, E, k)
        row = token + torch.arange(batch, device=x.device)[:, None, None] * tokens
        row = row.transpose(0, 1).reshape(-1)  # (E * B * k): an expert's tokens lie together
        weight = weight.transpose(0, 1).reshape(self.num_experts, -1, 1)
        taken = x.reshape(-1, dim).index_select(0, row).view(self.num_experts, -1, dim)
        out = torch.bmm(F.gelu(torch.bmm(taken, self.w1)), self.w2)
        out = (out * weight.to(out.dtype)).view(-1, dim)
        return out.new_zeros(batch * tokens, dim).index_add(0, row, out).view(batch, tokens, dim)

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.trunc_normal_(self.w1, std=0.02)
        nn.init.trunc_normal_(self.w2, std=out_std)


class Block(nn.Module):
    """Transformer block: modulated self-attention, ungated cross-attention, modulated feed-forward or experts.

    The conditioning vector c (B, cond_dim) gives shift, scale and gate for the attention, then for the feed-forward.
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        head_dim: int,
        qkv_ratio: float,
        mlp_ratio: float,
        multiple_of: int,
        eps: float,
        bias: bool,
        num_experts: int,
        expert_capacity: float,
        out_std: float,
    ) -> None:
        """Build a block. num_experts 0: dense feed-forward; out_std: deviation of layers that write to the residual."""
        super().__init__()
        hidden = dim if qkv_ratio == 1 else _round_up(int(dim * qkv_ratio), 2 * head_dim)
        self.out_std = out_std
        self.norm1 = layer_norm(dim, eps)
        self.attn = SelfAttention(dim, hidden, hidden // head_dim, eps, bias)
        self.cross_attn = CrossAttention(dim, dim // head_dim, eps, bias)
        self.norm2 = layer_norm(dim, eps)
        self.norm3 = layer_norm(dim, eps)
        mlp_hidden = int(dim * mlp_ratio)
        self.mlp: Experts | FeedForward
        if num_experts:
            self.mlp = Experts(dim, mlp_hidden, multiple_of, num_experts, expert_capacity)
        else:
            self.mlp = FeedForward(dim, mlp_hidden, multiple_of, bias)
        self.adaLN_modulation = modulation(cond_dim, 6 * dim)

    def forward(
        self, x: Tensor, y: Tensor, c: Tensor, text_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Map x (B, T, D), y (B, L, D) or packed (`padded`), c (B, cond_dim), mask bool (B, L) | None to (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1.unsqueeze(1), self.attn(modulate(self.norm1(x), shift1, scale1)))
        x = x + self.cross_attn(self.norm2(x), y, text_mask, positions)
        return torch.addcmul(x, gate2.unsqueeze(1), self.mlp(modulate(self.norm3(x), shift2, scale2)))

    def init_weights(self) -> None:
        for part in (self.attn, self.cross_attn, self.mlp):
            part.init_weights(self.out_std)
        nn.init.zeros_(self.adaLN_modulation.get_parameter("1.weight"))


class CaptionBlock(nn.Module):
    """One unconditioned transformer block over the caption tokens, (B, L, D) -> (B, L, D); packed ones stay packed."""

    def __init__(self, dim: int, head_dim: int, multiple_of: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim, eps)
        self.attn = SelfAttention(dim, dim, dim // head_dim, eps, bias)
        self.norm2 = layer_norm(dim, eps)
        self.mlp = FeedForward(dim, 4 * dim, multiple_of, bias)

    def forward(self, y: Tensor, text_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        y = y + self.attn(self.norm1(y), text_mask, positions)
        return y + self.mlp(self.norm2(y))

    def init_weights(self) -> None:
        self.attn.init_weights(out_std=0.02)
        self.mlp.init_weights(out_std=0.02)
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.mlp.w3.weight)


class NormMlp(nn.Module):
    """Linear, GELU-tanh, LayerNorm, linear, (..., in_dim) -> (..., D): caption projection and pooled caption."""

    def __init__(self, in_dim: int, dim: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim)
        self.act = gelu_tanh()
        self.norm = layer_norm(dim, eps)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))

    def init_weights(self) -> None:
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)


class CaptionEmbedder(nn.Module):
    """Caption embeddings (..., in_dim) -> (..., D)."""

    def __init__(self, in_dim: int, dim: int, eps: float) -> None:
        super().__init__()
        self.y_proj = NormMlp(in_dim, dim, eps)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class PatchEmbedder(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, T, D), row-major over the grid of patches."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D): 512 sinusoidal features (cosines first, periods up to 10000), linear, GELU-tanh, linear."""

    features = 512

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, dim), gelu_tanh(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp.get_parameter("0.weight").dtype))

    def init_weights(self) -> None:
        nn.init.normal_(self.mlp.get_parameter("0.weight"), std=0.02)
        nn.init.normal_(self.mlp.get_parameter("2.weight"), std=0.02)


class FinalLayer(nn.Module):
    """Modulated norm and linear: (B, T, D), c (B, D) -> patches (B, T, patch * patch * C)."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = modulation(dim, 2 * dim)
        self.norm_final = layer_norm(dim, eps)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

    def init_weights(self) -> None:
        nn.init.zeros_(self.adaLN_modulation.get_parameter("1.weight"))
        nn.init.zeros_(self.linear.weight)
