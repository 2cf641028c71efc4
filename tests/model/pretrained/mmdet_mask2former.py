"""Mask2Former as mmdet lays it out: its modules' names and orders, in plain torch, for inference alone."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

WINDOW, POINTS, LEVELS = 7, 4, 3


def mlp(width: int, inner: int) -> nn.Module:
    """mmcv's FFN: `layers.0.0` and `layers.1`."""
    module = nn.Module()
    module.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, inner)), nn.Linear(inner, width)])
    return module


class WindowAttention(nn.Module):
    """Attention within windows, (windows, 49, C); queries, keys and values in one, head by head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        steps = (torch.arange(WINDOW)[:, None] * (2 * WINDOW - 1) + torch.arange(WINDOW)).flatten()
        self.register_buffer("relative_position_index", (steps[:, None] + steps.flip(0)[None]).contiguous())

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(x).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q * (width // self.heads) ** -0.5 @ k.transpose(-1, -2)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = scores + bias.reshape(length, length, self.heads).permute(2, 0, 1)
        if mask is not None:
            scores = (scores.reshape(-1, len(mask), *scores.shape[1:]) + mask[:, None]).reshape(scores.shape)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, length, width))


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, shift: int):
        super().__init__()
        self.shift, self.norm1, self.norm2 = shift, nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.w_msa = WindowAttention(width, heads)
        self.ffn = mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        inner = functional.gelu(self.ffn.layers[0](self.norm2(x)))
        return x + self.ffn.layers[1](inner)

    def attend(self, x: Tensor) -> Tensor:
        """Attend within windows of (B, H, W, C), every second block between those of the block before."""
        height, width = x.shape[1:3]
        x = functional.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        mask = None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            areas, number = torch.zeros(1, *x.shape[1:3], 1), 0
            edges = (slice(0, -WINDOW), slice(-WINDOW, -self.shift), slice(-self.shift, None))
            for rows in edges:
                for columns in edges:
                    areas[:, rows, columns], number = number, number + 1
            flat = windows(areas).squeeze(-1)
            mask = (flat[:, None] != flat[:, :, None]).float() * -100
        parts = self.attn.w_msa(windows(x), mask)
        batch, rows, columns, channels = x.shape
        x = parts.reshape(batch, rows // WINDOW, columns // WINDOW, WINDOW, WINDOW, channels)
        x = x.transpose(2, 3).reshape(batch, rows, columns, channels)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


def windows(x: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels).transpose(2, 3)
    return x.reshape(-1, WINDOW * WINDOW, channels)


class Merging(nn.Module):
    """Four neighbours to one, by nn.Unfold: (B, H, W, C) to (B, H / 2, W / 2, 2 C)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = functional.pad(x, (0, 0, 0, width % 2, 0, height % 2)).permute(0, 3, 1, 2)
        size = x.shape[2] // 2, x.shape[3] // 2
        merged = functional.unfold(x, 2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(merged)).reshape(len(x), *size, -1)


class Swin(nn.Module):
    def __init__(self, width: int, depths: list[int], heads: list[int]):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.projection, self.patch_embed.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        self.stages = nn.ModuleList()
        for number, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            stage, channels = nn.Module(), width * 2**number
            stage.blocks = nn.ModuleList(SwinBlock(channels, count, WINDOW // 2 * (i % 2)) for i in range(depth))
            if number < 3:
                stage.downsample = Merging(channels)
            self.stages.append(stage)
            self.add_module(f"norm{number}", nn.LayerNorm(channels))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.patch_embed.norm(self.patch_embed.projection(pixels).permute(0, 2, 3, 1))
        found = []
        for number, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = block(x)
            found.append(self.get_submodule(f"norm{number}")(x).permute(0, 3, 1, 2))
            if number < 3:
                x = stage.downsample(x)
        return found


class ConvModule(nn.Module):
    """mmcv's: a convolution without bias where a group norm follows; the input convolutions of the decoder have one."""

    def __init__(self, width: int, channels: int, kernel: int, bias: bool, relu: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=bias)
        self.gn, self.relu = nn.GroupNorm(32, channels), relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.conv(x))
        return x.relu() if self.relu else x


def sines(height: int, width: int, channels: int) -> Tensor:
    """mmdet's sine positions, (H W, C): rows first, from 1 to 2 pi."""
    half = channels // 2
    wave = 10000 ** (2 * (torch.arange(half) // 2) / half)
    parts = []
    for length, repeat in ((height, lambda x: x.repeat_interleave(width, 0)), (width, lambda x: x.repeat(height, 1))):
        at = torch.arange(1, length + 1)[:, None] / (length + 1e-6) * 2 * math.pi / wave
        parts.append(repeat(torch.stack([at[:, 0::2].sin(), at[:, 1::2].cos()], -1).flatten(1)))
    return torch.cat(parts, 1)


class DeformableAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.sampling_offsets = nn.Linear(width, heads * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(width, heads * LEVELS * POINTS)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, positions: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        length, width = x.shape
        asked = x + positions
        values = self.value_proj(x).reshape(length, self.heads, -1)
        offsets = self.sampling_offsets(asked).reshape(length, self.heads, LEVELS, POINTS, 2)
        weights = self.attention_weights(asked).reshape(length, self.heads, LEVELS * POINTS).softmax(-1)
        weights = weights.reshape(length, self.heads, LEVELS, POINTS)
        middles = torch.cat([centres(*size) for size in sizes])
        found, start = torch.zeros(length, self.heads, width // self.heads), 0
        for level, (height, across) in enumerate(sizes):
            plane = values[start : start + height * across].permute(1, 2, 0).reshape(self.heads, -1, height, across)
            start += height * across
            at = middles[:, None, None] + offsets[:, :, level] / torch.tensor([across, height])
            picked = functional.grid_sample(plane, 2 * at.transpose(0, 1) - 1, align_corners=False)  # (heads, d, L, P)
            found += torch.einsum("hdlp,lhp->lhd", picked, weights[:, :, level])
        return x + self.output_proj(found.flatten(1))


def centres(height: int, width: int) -> Tensor:
    """The middles of the pixels of a plane, (H W, 2): x and y of 0 to 1."""
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack([columns.repeat(height), rows.repeat_interleave(width)], -1)


class PixelDecoder(nn.Module):
    def __init__(self, widths: list[int], hidden: int, heads: int, layers: int, inner: int):
        super().__init__()
        self.input_convs = nn.ModuleList(ConvModule(width, hidden, 1, True, False) for width in widths[:0:-1])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.attentions = nn.ModuleList([DeformableAttention(hidden, heads)])
            layer.ffns = nn.ModuleList([mlp(hidden, inner)])
            layer.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
            self.encoder.layers.append(layer)
        self.level_encoding = nn.Embedding(LEVELS, hidden)
        self.lateral_convs = nn.ModuleList([ConvModule(widths[0], hidden, 1, False, False)])
        self.output_convs = nn.ModuleList([ConvModule(hidden, hidden, 3, False, True)])
        self.mask_feature = nn.Conv2d(hidden, hidden, 1)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Give the mask features (C, h, w), and three levels (C, h, w), the smallest first; of one picture."""
        planes = [conv(plane)[0] for conv, plane in zip(self.input_convs, features[:0:-1], strict=True)]
        sizes = [tuple(plane.shape[1:]) for plane in planes]
        x = torch.cat([plane.flatten(1).T for plane in planes])
        width = x.shape[1]
        positions = torch.cat([sines(*size, width) + self.level_encoding.weight[i] for i, size in enumerate(sizes)])
        for layer in self.encoder.layers:
            x = layer.norms[0](layer.attentions[0](x, positions, sizes))
            x = layer.norms[1](x + layer.ffns[0].layers[1](layer.ffns[0].layers[0](x).relu()))
        parts = x.split([height * across for height, across in sizes])
        levels = [part.T.reshape(width, *size) for part, size in zip(parts, sizes, strict=True)]
        fine = self.lateral_convs[0](features[0])
        fine = fine + functional.interpolate(levels[-1][None], fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_feature(self.output_convs[0](fine))[0], levels


class Attention(nn.Module):
    """mmcv's wrapper around torch's attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)


class Head(nn.Module):
    def __init__(self, widths: list[int], hidden: int, heads: int, classes: int, queries: int, layers: tuple[int, int]):
        super().__init__()
        self.heads = heads
        self.pixel_decoder = PixelDecoder(widths, hidden, heads, layers[0], 2 * hidden)
        self.transformer_decoder = nn.Module()
        self.transformer_decoder.layers = nn.ModuleList()
        for _ in range(layers[1]):
            layer = nn.Module()
            layer.attentions = nn.ModuleList([Attention(hidden, heads), Attention(hidden, heads)])
            layer.ffns = nn.ModuleList([mlp(hidden, 3 * hidden)])
            layer.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
            self.transformer_decoder.layers.append(layer)
        self.transformer_decoder.post_norm = nn.LayerNorm(hidden)
        self.query_embed, self.query_feat = nn.Embedding(queries, hidden), nn.Embedding(queries, hidden)
        self.level_embed = nn.Embedding(LEVELS, hidden)
        self.cls_embed = nn.Linear(hidden, classes + 1)
        linear = [nn.Linear(hidden, hidden) for _ in range(3)]
        self.mask_embed = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Give class logits (Q, classes + 1) and mask logits (Q, h, w) of one picture."""
        fine, levels = self.pixel_decoder(features)
        x, asked = self.query_feat.weight, self.query_embed.weight
        classes, masks, hidden = self.predict(x, fine, levels[0].shape[1:])
        for number, layer in enumerate(self.transformer_decoder.layers):
            plane = levels[number % LEVELS]
            keys = plane.flatten(1).T + self.level_embed.weight[number % LEVELS]
            hidden[hidden.all(1)] = False
            places = sines(*plane.shape[1:], len(plane))
            found = layer.attentions[0].attn(
                (x + asked)[:, None], (keys + places)[:, None], keys[:, None], attn_mask=hidden
            )[0]
            x = layer.norms[0](x + found[:, 0])
            x = layer.norms[1](
                x + layer.attentions[1].attn((x + asked)[:, None], (x + asked)[:, None], x[:, None])[0][:, 0]
            )
            x = layer.norms[2](x + layer.ffns[0].layers[1](layer.ffns[0].layers[0](x).relu()))
            classes, masks, hidden = self.predict(x, fine, levels[(number + 1) % LEVELS].shape[1:])
        return classes, masks

    def predict(self, x: Tensor, fine: Tensor, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        x = self.transformer_decoder.post_norm(x)
        masks = torch.einsum("qc,chw->qhw", self.mask_embed(x), fine)
        small = functional.interpolate(masks[None], tuple(size), mode="bilinear", align_corners=False)[0]
        return self.cls_embed(x), masks, small.flatten(1).sigmoid() < 0.5


class Detector(nn.Module):
    """A small Mask2Former: 5 classes, 12 queries."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Swin(24, [2, 2, 2, 2], [1, 2, 4, 8])
        self.panoptic_head = Head([24, 48, 96, 192], 64, 8, 5, 12, (2, 4))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.panoptic_head(self.backbone(pixels))
        return found
