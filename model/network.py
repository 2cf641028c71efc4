"""MicroDiT (arXiv 2407.15811): a masked mixture-of-experts diffusion transformer conditioned on a caption.

    x (B, C, H, W) -> patches + position (B, T, D) -> patch mixer (B, T, Dm) -> drop masked tokens -> backbone
    (B, T', D) -> final layer (B, T', p*p*C) -> put back among mask tokens -> sample (B, C, H, W)

    y (B, L, Ccap) -> projection -> caption block (B, L, D) -> every block's cross-attention
                                       '-> mean over tokens -> MLP -> + timestep embedding -> every block's adaLN

State-dict keys, shapes and numbers are those of the released checkpoints.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microdit.model.layers import (
    Block,
    CaptionBlock,
    CaptionEmbedder,
    Experts,
    FinalLayer,
    NormMlp,
    PatchEmbedder,
    TimestepEmbedder,
    layer_norm,
    padded,
)

PRESETS: dict[str, dict[str, Any]] = {
    "xl_2": {"dim": 1024, "depth": 28, "head_dim": 64, "patch_mixer_dim": 768, "patch_mixer_depth": 6},
    "tiny_2": {"dim": 512, "depth": 16, "head_dim": 32, "patch_mixer_dim": 512, "patch_mixer_depth": 4},
}


def position_embedding(
    dim: int, height: int, width: int, scale: float, device: torch.device | str | None = None
) -> Tensor:
    """Compute the sin-cos position embedding (height * width, dim), float32, row-major over the grid.

    The first half of the features encodes the column, the second the row, sines before cosines in each; positions
    are divided by `scale`. Angles are computed in float64 from float32 positions. `dim` must be divisible by 4.
    """
    omega = 1.0 / 10000.0 ** (torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def features(count: int) -> Tensor:
        position = torch.arange(count, dtype=torch.float32, device=device) / scale
        angle = position.double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    column = features(width).expand(height, -1, -1)
    row = features(height)[:, None].expand(-1, width, -1)
    return torch.cat([column, row], dim=-1).reshape(height * width, dim).float()


def _per_block(values: Sequence[float] | None, depth: int, low: float, high: float, name: str) -> list[float]:
    """Give each block a multiplier: linear from low to high when None; a shorter list covers equal runs of blocks."""
    if values is None:
        return [low + i * (high - low) / max(depth - 1, 1) for i in range(depth)]
    values = [float(v) for v in values]
    if not values or depth % len(values):
        raise ValueError(f"{name} has {len(values)} values for {depth} blocks: give one, {depth}, or a divisor of it")
    return [v for v in values for _ in range(depth // len(values))]


class MicroDiT(nn.Module):
    """The network. `config` holds the arguments that rebuild it: `MicroDiT(**model.config)`.

    >>> network = MicroDiT(input_size=8, dim=32, depth=2, head_dim=16, caption_channels=24, patch_mixer_dim=32)
    >>> latents, c_noise, captions = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.randn(2, 5, 24)
    >>> network(latents, c_noise, captions)["sample"].shape
    torch.Size([2, 4, 8, 8])
    >>> MicroDiT(**network.config).load_state_dict(network.state_dict())
    <All keys matched successfully>

    input_size: side of the square latent that it is built for (latent pixels); others work too, see `forward`.
    pos_interp_scale: positions are divided by it (1 for 256 px, 2 for 512 px).
    qkv_multipliers, ffn_multipliers: widths of self-attention and feed-forward per block, relative to dim;
        None: 0.5 to 1.0 and 0.5 to 4.0, linearly over depth.
    multiple_of: feed-forward widths are rounded up to it.
    experts_every_n: every n-th block has experts, but never the last of the backbone; 0: none has.
    """

    pos_embed: Tensor
    mask_token: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        dim: int = 1024,
        depth: int = 28,
        head_dim: int = 64,
        multiple_of: int = 256,
        caption_channels: int = 1024,
        pos_interp_scale: float = 1.0,
        norm_eps: float = 1e-6,
        depth_init: bool = True,
        qkv_multipliers: Sequence[float] | None = None,
        ffn_multipliers: Sequence[float] | None = None,
        use_patch_mixer: bool = True,
        patch_mixer_depth: int = 6,
        patch_mixer_dim: int = 768,
        patch_mixer_qkv_ratio: float = 1.0,
        patch_mixer_mlp_ratio: float = 4.0,
        use_bias: bool = False,
        num_experts: int = 8,
        expert_capacity: float = 2.0,
        experts_every_n: int = 2,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            k: v for k, v in locals().items() if k in MicroDiT.__init__.__annotations__ and k != "return"
        }
        self._check_sizes()
        qkv_ratios = _per_block(qkv_multipliers, depth, 0.5, 1.0, "qkv_multipliers")
        ffn_ratios = _per_block(ffn_multipliers, depth, 0.5, 4.0, "ffn_multipliers")
        self.config |= {"qkv_multipliers": qkv_ratios, "ffn_multipliers": ffn_ratios}
        self.patch_size, self.in_channels, self.caption_channels = patch_size, in_channels, caption_channels
        self.grid_size = input_size // patch_size
        self.pos_interp_scale = pos_interp_scale
        # the order of what follows is that of the state dict, and decides which random numbers a weight starts from
        self.register_buffer("pos_embed", torch.empty(1, self.grid_size**2, dim, dtype=torch.float32))
        self.register_buffer("mask_token", torch.zeros(1, 1, patch_size**2 * in_channels))
        self.x_embedder = PatchEmbedder(patch_size, in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = CaptionEmbedder(caption_channels, dim, norm_eps)
        self.y_emb_preprocess = CaptionBlock(dim, head_dim, multiple_of, norm_eps, use_bias)
        self.pooled_y_emb_process = NormMlp(dim, dim, norm_eps)
        self.patch_mixer = nn.ModuleList(self._mixer_blocks())
        self.patch_mixer_map_xin = self._projection(dim, patch_mixer_dim)
        self.patch_mixer_map_xout = self._projection(patch_mixer_dim, dim)
        self.patch_mixer_map_y = self._projection(dim, patch_mixer_dim)
        self.blocks = nn.ModuleList(self._backbone_blocks(qkv_ratios, ffn_ratios))
        self.final_layer = FinalLayer(dim, patch_size**2 * in_channels, norm_eps)
        if not self.mask_token.is_meta:
            self.reset_positions()
            self.init_weights()

    def _check_sizes(self) -> None:
        """Raise ValueError if a width does not divide into heads and position features, or the input into patches."""
        config = self.config
        mixer_dim = config["patch_mixer_dim"] if config["use_patch_mixer"] else config["dim"]
        for name, width in (("dim", config["dim"]), ("patch_mixer_dim", mixer_dim)):
            if width % config["head_dim"] or width % 4:
                raise ValueError(f"{name}={width} must be a multiple of head_dim={config['head_dim']} and of 4")
        if config["input_size"] % config["patch_size"]:
            raise ValueError(
                f"input_size={config['input_size']} is not a multiple of patch_size={config['patch_size']}"
            )

    def _block(self, width: int, qkv_ratio: float, mlp_ratio: float, num_experts: int, std: float) -> Block:
        config = self.config
        return Block(
            width, config["dim"], config["head_dim"], qkv_ratio, mlp_ratio, config["multiple_of"], config["norm_eps"],
            config["use_bias"], num_experts, config["expert_capacity"], std,
        )  # fmt: skip

    def _experts_of(self, block: int) -> int:
        """Count the experts of a block: none in most, see `experts_every_n`."""
        every = self.config["experts_every_n"]
        return self.config["num_experts"] if every and (block + 1) % every == 0 else 0

    def _mixer_blocks(self) -> Iterator[Block]:
        config = self.config
        std = 0.02 / math.sqrt(2 * config["depth"])
        ratios = config["patch_mixer_qkv_ratio"], config["patch_mixer_mlp_ratio"]
        for i in range(config["patch_mixer_depth"] if config["use_patch_mixer"] else 0):
            yield self._block(config["patch_mixer_dim"], *ratios, self._experts_of(i) if i else 0, std)

    def _backbone_blocks(self, qkv_ratios: Sequence[float], ffn_ratios: Sequence[float]) -> Iterator[Block]:
        depth = self.config["depth"]
        for i in range(depth):
            std = 0.02 / math.sqrt(2 * (i + 1 if self.config["depth_init"] else depth))
            experts = self._experts_of(i) if i < depth - 1 else 0
            yield self._block(self.config["dim"], qkv_ratios[i], ffn_ratios[i], experts, std)

    def _projection(self, source: int, target: int) -> nn.Module:
        """Make what leads from the backbone's width to the mixer's, or back."""
        config = self.config
        if not config["use_patch_mixer"] or config["patch_mixer_dim"] == config["dim"]:
            return nn.Identity()
        norm = layer_norm(source, config["norm_eps"])
        return nn.Sequential(norm, nn.Linear(source, target, bias=config["use_bias"]))

    @classmethod
    def xl_2(cls, **config: Any) -> "MicroDiT":
        """Build MicroDiT-XL/2, the released size: 1,165M parameters. Any argument of the constructor may be given."""
        return cls(**(PRESETS["xl_2"] | config))

    @classmethod
    def tiny_2(cls, **config: Any) -> "MicroDiT":
        """Build MicroDiT-Tiny/2: 201M parameters. Any argument of the constructor may be given."""
        return cls(**(PRESETS["tiny_2"] | config))

    def init_weights(self) -> None:
        """Draw fresh weights as the released models started: the network's output is zero at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        for part in (
            self.t_embedder, self.y_embedder.y_proj, self.pooled_y_emb_process, self.y_emb_preprocess,
            *self.patch_mixer, *self.blocks, self.final_layer,
        ):  # fmt: skip
            part.init_weights()

    def _pos_embed(self, rows: int, columns: int, device: torch.device | None) -> Tensor:
        """Compute the position embedding (1, T, D) of a grid, of the same area as the one built for.

        A model built for 256 px thus sees a 512 px grid with positions halved, as the released 512 px models do.
        """
        scale = self.pos_interp_scale * math.sqrt(rows * columns) / self.grid_size
        return position_embedding(self.config["dim"], rows, columns, scale, device).unsqueeze(0)

    @torch.no_grad()
    def reset_positions(self) -> None:
        """Compute the position buffer again, in place: after `to_empty`, or for a checkpoint of another size."""
        self.pos_embed.copy_(self._pos_embed(self.grid_size, self.grid_size, self.pos_embed.device))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        text_mask: Tensor | None = None,
        mask_ratio: float = 0.0,
        permutation: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Predict F of the EDM preconditioning.

        x: latents (B, C, H, W), times c_in; H and W multiples of the patch size, otherwise free.
        t: c_noise = ln(sigma) / 4, (B,) or (1,), float32 also when the weights are bfloat16.
        y: caption embeddings (B, L, Ccap) or (B, 1, L, Ccap); all zero = unconditional.
        text_mask: bool (B, L), True = real token. Cross-attention, the caption block and the pooled mean then see
            real tokens only. None: all positions count, as released. A row without any real token counts as all
            real. Zero embeddings give the same output whatever their number and mask: all tokens are then equal.
        mask_ratio: share of patches to drop after the mixer (training only).
        permutation: int64 (B, T); sample b keeps the first int(T * (1 - mask_ratio)) of permutation[b].
            None: drawn at random.

        Returns 'sample' (B, C, H, W) and, when mask_ratio > 0, 'mask' (B, T) float32, 0 kept, 1 removed (removed
        patches of 'sample' hold mask_token, zero).
        """
        if y.ndim == 4:
            y = y.squeeze(1)
        self._check(x, t, y, text_mask)
        batch, rows, columns = x.shape[0], x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = self._embed_patches(x, rows, columns)
        if text_mask is not None:
            text_mask = text_mask | ~text_mask.any(dim=1, keepdim=True)
        positions = self._real_positions(text_mask)
        y, pooled = self._embed_captions(y, text_mask, positions)
        c = self.t_embedder(t.expand(batch)) + self.pooled_y_emb_process(pooled)

        x = self.patch_mixer_map_xin(x)
        y_mixer = self.patch_mixer_map_y(y)
        for block in self.patch_mixer:
            x = block(x, y_mixer, c, text_mask, positions)
        tokens = x.shape[1]
        keep = self._keep(batch, tokens, mask_ratio, permutation, x.device) if mask_ratio > 0 else None
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        x = self.patch_mixer_map_xout(x)
        for block in self.blocks:
            x = block(x, y, c, text_mask, positions)
        x = self.final_layer(x, c)
        if keep is None:
            return {"sample": self._unpatchify(x, rows, columns)}
        whole = self.mask_token.to(x.dtype).expand(batch, tokens, -1)
        x = whole.scatter(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)
        mask = torch.ones(batch, tokens, device=x.device).scatter(1, keep, 0.0)
        return {"sample": self._unpatchify(x, rows, columns), "mask": mask}

    def _embed_patches(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Turn latents (B, C, H, W) into tokens with positions, (B, rows * columns, D)."""
        dtype = self.x_embedder.proj.weight.dtype
        built_for = (rows, columns) == (self.grid_size, self.grid_size)
        pos_embed = self.pos_embed if built_for else self._pos_embed(rows, columns, x.device).to(dtype)
        return self.x_embedder(x.to(dtype)) + pos_embed

    def _embed_captions(self, y: Tensor, text_mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turn embeddings (B, L, Ccap) into tokens (B, L, D), or packed (see `padded`), and their mean (B, D)."""
        if positions is not None:
            y = y.flatten(0, 1).index_select(0, positions)
        y = y.to(self.x_embedder.proj.weight.dtype)
        y = self.y_emb_preprocess(self.y_embedder(y), text_mask, positions)
        return y, self._mean(padded(y, text_mask, positions), text_mask)

    def _check(self, x: Tensor, t: Tensor, y: Tensor, text_mask: Tensor | None) -> None:
        """Raise ValueError if an input of `forward` has another shape or dtype than expected."""
        batch = x.shape[0]
        if (
            x.ndim != 4
            or x.shape[1] != self.in_channels
            or x.shape[2] % self.patch_size
            or x.shape[3] % self.patch_size
        ):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected (B, {self.in_channels}, H, W), "
                f"H and W multiples of {self.patch_size}"
            )
        if t.ndim != 1 or t.shape[0] not in (1, batch):
            raise ValueError(f"t has shape {tuple(t.shape)}: expected ({batch},) or (1,)")
        if y.ndim != 3 or y.shape[0] != batch or y.shape[2] != self.caption_channels:
            raise ValueError(
                f"y has shape {tuple(y.shape)}: expected ({batch}, L, {self.caption_channels}); "
                "the caption width must be that of the text encoder the model was built for"
            )
        if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != y.shape[:2]):
            raise ValueError(
                f"text_mask is {text_mask.dtype} {tuple(text_mask.shape)}: expected bool {tuple(y.shape[:2])}"
            )

    @staticmethod
    def _real_positions(text_mask: Tensor | None) -> Tensor | None:
        """Find the positions of the real caption tokens, int64 (N,), to pack them by: on a CPU alone, else None.

        There every token costs time, so padding is left out wherever a layer takes each token by itself. A GPU would
        have to wait for their number, and a compiled graph would break at it.
        """
        if text_mask is None or text_mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return text_mask.flatten().nonzero().squeeze(1)

    @staticmethod
    def _mean(y: Tensor, text_mask: Tensor | None) -> Tensor:
        """Average the (real) caption tokens: (B, L, D) -> (B, D)."""
        if text_mask is None:
            return y.mean(dim=1)
        weight = text_mask.to(y.dtype).unsqueeze(-1)
        return (y * weight).sum(dim=1) / weight.sum(dim=1)

    @staticmethod
    def _keep(batch: int, tokens: int, ratio: float, permutation: Tensor | None, device: torch.device) -> Tensor:
        """Choose the tokens to keep: their indices, int64 (B, T')."""
        count = int(tokens * (1 - ratio))
        if not 0 < count <= tokens:
            raise ValueError(f"mask_ratio={ratio} keeps {count} of {tokens} tokens: expected 0 <= mask_ratio < 1")
        if permutation is None:
            permutation = torch.rand(batch, tokens, device=device).argsort(dim=1)
        elif permutation.shape != (batch, tokens):
            raise ValueError(f"permutation has shape {tuple(permutation.shape)}: expected ({batch}, {tokens})")
        return permutation[:, :count]

    def _unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Put patches together: (B, T, p*p*C), each in the order (p, q, c) -> (B, C, H, W)."""
        p = self.patch_size
        x = x.reshape(x.shape[0], rows, columns, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(x.shape[0], self.in_channels, rows * p, columns * p)


def check_training(
    config: Mapping[str, Any], latent_shape: tuple[int, int, int], text_width: int, mask_ratio: float
) -> None:
    """Try what a network is trained on, without numbers: latents (C, H, W), captions and a mask ratio.

    Raises:
        ValueError: they do not fit, or leave so few tokens that the experts would get none and learn nothing.
    """

    def refuse_idle(experts: Experts, inputs: tuple[Tensor]) -> None:
        tokens = inputs[0].shape[1]
        if not experts.taken(tokens):
            raise ValueError(
                f"each of the {experts.num_experts} experts gets none of {tokens} tokens (expert_capacity="
                f"{experts.capacity:g}): raise expert_capacity to {math.ceil(experts.num_experts / tokens)}, lower "
                "num_experts or mask_ratio, or take larger latents"
            )

    with torch.device("meta"), torch.no_grad():
        net = MicroDiT(**config)
        for module in net.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(refuse_idle)
        net(torch.empty(1, *latent_shape), torch.empty(1), torch.empty(1, 1, text_width), mask_ratio=mask_ratio)
