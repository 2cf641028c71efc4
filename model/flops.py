"""Model FLOPs by formula: what the matrix products of MicroDiT cost, a multiply-add counted as two.

Softmax, norms, activations and the gather of tokens are left out, as usual for model FLOPs utilisation.
"""

from typing import cast

from torch import nn

from microdit.model.layers import Block, Experts, FeedForward, SelfAttention
from microdit.model.network import MicroDiT

# Dense bf16 peaks by the name of a GPU, FLOP/s, from the makers' data sheets (without sparsity).
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "A10G": 70e12, "RTX 4090": 165e12, "RTX 5090": 210e12, "B200": 2250e12,
}  # fmt: skip


def gpu_peak(name: str) -> float | None:
    """Look up the bf16 peak of a GPU, FLOP/s, by torch's name for it; None if it is not known."""
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def forward_flops(net: MicroDiT, latent_shape: tuple[int, int, int], text_tokens: int, mask_ratio: float = 0.0) -> int:
    """Count the FLOPs of a forward pass for one sample with latents (C, H, W) and padded text."""
    patch = net.patch_size
    tokens = latent_shape[1] // patch * (latent_shape[2] // patch)
    kept = int(tokens * (1 - mask_ratio))
    dim = net.config["dim"]
    total = tokens * 2 * dim * net.in_channels * patch**2
    total += _linears(net.t_embedder) + _linears(net.pooled_y_emb_process)
    caption = net.y_emb_preprocess
    total += text_tokens * _linears(net.y_embedder)
    total += _self_attention(caption.attn, text_tokens) + _feed_forward(caption.mlp, text_tokens)
    total += text_tokens * _linears(net.patch_mixer_map_y)
    total += tokens * _linears(net.patch_mixer_map_xin) + kept * _linears(net.patch_mixer_map_xout)
    total += sum(_block(cast(Block, block), tokens, text_tokens) for block in net.patch_mixer)
    total += sum(_block(cast(Block, block), kept, text_tokens) for block in net.blocks)
    return total + _linears(net.final_layer.adaLN_modulation) + kept * _linears(net.final_layer.linear)


def training_flops(net: MicroDiT, latent_shape: tuple[int, int, int], text_tokens: int, mask_ratio: float) -> int:
    """Count the FLOPs of forward and backward for one sample: three forward passes (recomputation is not counted)."""
    return 3 * forward_flops(net, latent_shape, text_tokens, mask_ratio)


def _linears(module: nn.Module) -> int:
    """Count the FLOPs of all linear layers in a module, for one token."""
    return sum(2 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _self_attention(attention: SelfAttention, tokens: int) -> int:
    return tokens * _linears(attention) + 4 * tokens**2 * attention.proj.in_features


def _feed_forward(mlp: Experts | FeedForward, tokens: int) -> int:
    if isinstance(mlp, FeedForward):
        return tokens * _linears(mlp)
    taken = mlp.num_experts * mlp.taken(tokens)
    return tokens * _linears(mlp.gate) + taken * 4 * mlp.w1.shape[1] * mlp.w1.shape[2]


def _block(block: Block, tokens: int, text_tokens: int) -> int:
    cross = block.cross_attn
    return (
        _self_attention(block.attn, tokens)
        + tokens * (_linears(cross.q_linear) + _linears(cross.proj))
        + text_tokens * _linears(cross.kv_linear)
        + 4 * tokens * text_tokens * cross.proj.in_features
        + _feed_forward(block.mlp, tokens)
        + _linears(block.adaLN_modulation)
    )
